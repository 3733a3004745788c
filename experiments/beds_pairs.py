"""What the result files say about claims 1 to 9, those of Direct Preference Heads and of New
Desiderata: a function a claim, from the folder of results to a Finding.

A function returns effects that were not measured where a file, or what it needs of one, is not
there.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from common.files import read_json
from experiments import chat_model, dph_choices, preservation, study
from experiments.beds import most_common_bed, source_of
from experiments.effects import Effect, Finding, Goal, beside, exact, paired
from experiments.tabular import tensor, total_variation

# -- Direct Preference Heads, arXiv 2405.20053

JOINT, HEAD_ALONE, FROZEN = "dph separable", "dph separable, head alone", "dph separable, frozen"
UNHARMED = Goal(above=-0.02)  # accuracy on tasks that were not trained on
SAME_TEXT = Goal(above=-0.05)  # log perplexity


def choice_lines(results: Path) -> dict[str, list[dict]]:
    """The answers of each method at its learning rate."""
    lines = study.read_lines(results / "dph_choices.jsonl")
    lines = most_common_bed(lines, ("model", *dph_choices.BED))
    tuned = {line["method"] for line in lines if line["stage"] == "tuning"}
    rates = {"base": 0.0} | {method: dph_choices.best_lr(lines, method) for method in tuned}
    found: dict[str, list[dict]] = {}
    for line in lines:
        if line["stage"] == "answers" and line["lr"] == rates.get(line["method"]):
            found.setdefault(line["method"], []).append(line)
    return found


def choice_effect(
    what: str, methods: dict[str, list[dict]], ours: tuple[str, str], others: tuple[str, str], part="tasks", goal=None
) -> Effect:
    """The difference of accuracies of (method, scorer) and another over the same questions; each
    seed's beside it."""
    goal = goal or Goal(above=0.0)
    (method, scorer), (other, other_scorer) = ours, others
    lines, other_lines = methods.get(method, []), methods.get(other, [])
    if not lines or not other_lines:
        return Effect(what, goal)
    tasks = tuple(lines[0][part])
    found = dph_choices.difference(lines, scorer, other_lines, other_scorer, tasks)
    if found is None:
        return Effect(what, goal)
    questions = sum(len(dph_choices.unpack(lines[0]["right"][task][scorer])) for task in tasks)

    def shares(group: list[dict], name: str) -> dict[int, float]:
        return {line["seed"]: dph_choices.mean_over(line["accuracy"], tasks, name) for line in group}

    mine, theirs = shares(lines, scorer), shares(other_lines, other_scorer)
    if other == "base":
        theirs = dict.fromkeys(mine, *theirs.values())
    values = {f"seed {seed}": mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())}
    return Effect(what, goal, *found, len(values), f"{questions:,} questions, {len(values)} seeds", values)


def choice_finding(methods: dict[str, list[dict]], effects: list[Effect]) -> Finding:
    """A finding of results/dph_choices.jsonl."""
    lines = [line for group in methods.values() for line in group]
    return Finding(effects, source_of("dph_choices.jsonl", lines) if lines else "")


def head_against_lm(results: Path) -> Finding:
    """Claim 1."""
    methods = choice_lines(results)
    head = partial(choice_effect, methods=methods)
    effects = [head("head - its own LM", ours=(JOINT, "acc_head"), others=(JOINT, "acc_token"))]
    for method in ("dph contrastive", HEAD_ALONE, FROZEN):
        effects.append(beside(head(f"{method}: head - LM", ours=(method, "acc_head"), others=(method, "acc_token"))))
    return choice_finding(methods, effects)


def head_against_methods(results: Path) -> Finding:
    """Claim 2."""
    methods = choice_lines(results)
    against = partial(choice_effect, methods=methods, ours=(JOINT, "acc_head"))
    effects = [
        against("head - SFT's LM", others=("sft", "acc_token")),
        against("head - DPO's LM", others=("dpo", "acc_token")),
        beside(against("head - DPO's implicit reward", others=("dpo", "acc_implicit"))),
    ]
    return choice_finding(methods, effects)


def lm_unharmed(results: Path) -> Finding:
    """Claim 3."""
    methods = choice_lines(results)
    lm = partial(choice_effect, methods=methods, others=("base", "acc_token"), part="others", goal=UNHARMED)
    effects = [lm("LM after - before, other tasks", ours=(JOINT, "acc_token")), text_effect(methods, JOINT)]
    for method in (HEAD_ALONE, FROZEN, "dpo"):
        effects.append(beside(lm(f"{method}: LM after - before", ours=(method, "acc_token"))))
    return choice_finding(methods, effects)


def text_effect(methods: dict[str, list[dict]], method: str) -> Effect:
    """How much less WikiText's log perplexity is after training than before."""
    before = [line["perplexity"] for line in methods.get("base", []) if line.get("perplexity")]
    after = {line["seed"]: line["perplexity"] for line in methods.get(method, []) if line.get("perplexity")}
    whole = dict.fromkeys(after, before[0]) if before else {}
    return paired("log perplexity of WikiText, before - after", whole, after, SAME_TEXT, math.log)


def contrastive_is_cdpo(results: Path) -> Finding:
    """Claim 4."""

    def effects(content: dict) -> list[Effect]:
        names = {"loss_deviation": "largest deviation of the loss", "gradient_deviation": "of the gradient"}
        return [exact(what, content[name], Goal(within=1e-12)) for name, what in names.items()]

    return exact_study(results, "equivalence.json", effects, "largest deviation of the loss")


def exact_study(results: Path, name: str, claim: Callable[[dict], list[Effect]], whats: str) -> Finding:
    """The finding of a file that holds an exact computation."""
    if not (results / name).exists():
        return Finding([Effect(whats)])
    content = read_json(results / name)
    return Finding(claim(content), source_of(name, [content]))


def distance(p: list[float], q: list[float]) -> float:
    """Total variation."""
    return total_variation(tensor(p), tensor(q)).item()


# -- New Desiderata, arXiv 2407.09072

FAMILY = ("DPO", "IPO", "f-DPO")
NEAR, APART = Goal(within=0.01), Goal(above=0.05)  # total variation


def typo_interpolates(results: Path) -> Finding:
    """Claim 5."""

    def effects(content: dict) -> list[Effect]:
        policies = [policy["TYPO"] for _, policy in sorted(content["population"].items(), key=lambda x: float(x[0]))]
        away = [distance(policy, content["target"]) for policy in policies]
        steps = [later - earlier for earlier, later in pairwise(away)]
        return [
            exact("from pi* at the smallest lambda", away[0], NEAR),
            exact("from ref at the largest", distance(policies[-1], content["reference"]), NEAR),
            exact("least rise of the distance from pi* between two lambdas", min(steps)),
        ]

    return exact_study(results, "interpolation.json", effects, "from pi* at the smallest lambda")


def typo_preserves(results: Path) -> Finding:
    """Claim 6."""

    def effects(content: dict) -> list[Effect]:
        mine = [errors for name, errors in content["methods"].items() if name.startswith("TYPO")]
        lost = max(value for errors in mine for value in errors["good_tv"])
        before = total_variation(*preservation.BAD).item()
        gained = min(before - value for errors in mine for value in errors["bad_tv"])
        return [
            exact("lost on the good prompt, most over lambda", lost, Goal(within=1e-9)),
            exact("gained on the bad prompt, least over lambda", gained),
        ]

    return exact_study(results, "preservation.json", effects, "lost on the good prompt")


def family_does_neither(results: Path) -> Finding:
    """Claim 7: two files."""
    names = ("preservation.json", "interpolation.json")
    if not all((results / name).exists() for name in names):
        return Finding([Effect("lost on the good prompt over gained on the bad one")])
    kept, ends = (read_json(results / name) for name in names)
    rows = {name: errors for name, errors in kept["methods"].items() if not name.startswith("TYPO")}
    ratios = {name: min(value for value in errors["ratio"] if value is not None) for name, errors in rows.items()}
    target, smallest = ends["target"], min(ends["population"], key=float)
    away = {method: distance(ends["population"][smallest][method], target) for method in FAMILY}
    sampled = ends["sampled"][min(ends["sampled"], key=float)]
    sides = [
        {seed: distance(policy, target) for seed, policy in enumerate(sampled[method]["seeds"])}
        for method in ("DPO", "TYPO")
    ]
    effects = [
        exact(
            "lost on the good prompt over gained on the bad one, least over methods and lambda", min(ratios.values())
        ),
        exact("from pi* at the smallest lambda, nearest method", min(away.values()), APART),
        beside(paired("sampled pairs: DPO from pi* - TYPO from pi*", *sides)),
    ]
    return Finding(effects, "; ".join(source_of(name, [content]) for name, content in zip(names, (kept, ends))))


def constraints_break_it(results: Path) -> Finding:
    """Claim 8."""

    def effects(content: dict) -> list[Effect]:
        gaps = {
            constraint: {float(lam): distance(ends["DPO"], ends["RLHF"]) for lam, ends in by_lambda.items()}
            for constraint, by_lambda in content["policies"].items()
        }
        found = [exact("DPO from RLHF without a constraint, most over lambda", max(gaps["none"].values()), NEAR)]
        for constraint in ("early stopping", "L2 decay"):
            found.append(exact(f"under {constraint}, most over lambda", max(gaps[constraint].values()), APART))
        return found

    return exact_study(results, "constraints.json", effects, "DPO from RLHF without a constraint")


HH = ("hh_harmless", "hh_helpful")
COMPETITIVE = Goal(above=-0.05)  # win rate


def typo_wins(results: Path) -> Finding:
    """Claim 9."""
    lines = study.read_lines(results / "chat_model.jsonl")
    lines = most_common_bed([line for line in lines if line["part"] == "pairs"], ("model", "rows"))
    found = {
        (method, name): chosen_runs(lines, name, method) for method in ("typo", "dpo") for name in chat_model.PAIRS
    }
    what = "win rate at equal length, TYPO - DPO"
    key = "win_rate_equal_length"

    def rates(method: str, names: tuple[str, ...]) -> dict:
        return {f"{line['seed']} of {name}": line[key] for name in names for line in found[method, name] if key in line}

    def difference(words: str, ours: dict, others: dict) -> Effect:
        effect = paired(words, ours, others, COMPETITIVE)
        seeds = {key.split()[1] for key in effect.values}
        return replace(effect, runs=len(seeds), over=f"{len(effect.values)} runs of {len(seeds)} seeds")

    effects = [difference(what, rates("typo", HH), rates("dpo", HH))]
    half = dict.fromkeys(rates("typo", HH), 0.5)
    effects.append(beside(difference("TYPO - the model it began with", rates("typo", HH), half)))
    for name in ("polite_instructions", "pandalm_votes"):
        effects.append(beside(difference(f"{name}: TYPO - DPO", rates("typo", (name,)), rates("dpo", (name,)))))
    used = [line for group in found.values() for line in group] if effects[0].mean is not None else []
    return Finding(effects, source_of("chat_model.jsonl", used) if used else "")


def chosen_runs(lines: list[dict], name: str, method: str) -> list[dict]:
    """The runs of a method on a file of rows at the learning rate that was chosen."""
    mine = [line for line in lines if (line["data"], line["method"]) == (name, method)]
    if not mine:
        return []
    rate = chat_model.best_lr(mine, name, method, min(line["seed"] for line in mine))
    return [line for line in mine if line["lr"] == rate]
