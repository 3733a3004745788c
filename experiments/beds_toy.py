"""What the result files say about claims 10 to 21, those of ULMA, SuperHF and pretraining with
human feedback: as beds_pairs.py, on the toy.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

from experiments import beds_frontier, study
from experiments.beds import by_seed, most_common_bed, source_of
from experiments.effects import Effect, Finding, Goal, beside, paired, unpaired_interval
from experiments.pareto import OBJECTIVES

# -- point-wise DPO and ULMA, arXiv 2312.02554

RESOLVED = {"lr": "0.001", "dtype": "float32", "kl-samples": "400", "model": "toy"}  # defaults, as runs resolve them


def entries_of(path: Path) -> list[dict]:
    """The entries of a file of experiments.collect; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def flags_in(command: str) -> dict[str, str]:
    """The flags of a command of a result file, without what is a default of the toy."""
    words = command.split()[2:]
    flags: dict[str, str] = {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            has_value = i + 1 < len(words) and not words[i + 1].startswith("--")
            flags[word[2:]] = words[i + 1] if has_value else ""
    return {name: value for name, value in flags.items() if RESOLVED.get(name) != value}


def toy_entries(results: Path, *wanted: tuple[str, dict[str, str]]) -> list[tuple[str, dict] | None]:
    """(file, entry) of the toy runs of each (script, flags), or None: all from one file, so that
    all have the same base models, or from the two oldest.

    Of several files the one with most of what is wanted counts, then one that keeps the values of
    its seeds, then the one with most seeds.
    """
    groups = [[path.name] for path in sorted(results.glob("toy_*.json"))] + [["toy_labelled.json", "toy_pairs.json"]]
    choices = []
    for names in groups:
        entries = [(name, entry) for name in names for entry in entries_of(results / name)]
        choices.append([entry_of(entries, script, flags) for script, flags in wanted])

    def worth(found: list) -> tuple[int, bool, int]:
        there = [entry for _, entry in filter(None, found)]
        keeps = all(len(cell) > 2 for entry in there for cell in entry["after"].values())
        return len(there), keeps, min((len(entry["seeds"]) for entry in there), default=0)

    return max(choices, key=worth)


def entry_of(entries: list[tuple[str, dict]], script: str, flags: dict[str, str]) -> tuple[str, dict] | None:
    """The first of the entries whose command has this script, these flags and no others."""
    for name, entry in entries:
        if entry["command"].split()[1] == script and flags_in(entry["command"]) == flags:
            return name, entry
    return None


def toy_effect(what: str, metric: str, ours, others) -> Effect:
    """The difference of a metric after training between two entries of experiments.collect."""
    if ours is None or others is None:
        return Effect(what)
    entries = [entry for _, entry in (ours, others)]
    cells = [entry["after"][metric] for entry in entries]
    if all(len(cell) > 2 for cell in cells):
        sides = [dict(zip(entry["seeds"], cell[2])) for entry, cell in zip(entries, cells)]
        kept = [{seed: value for seed, value in side.items() if value is not None} for side in sides]
        return paired(what, *kept)
    counts = [len(entry["seeds"]) for entry in entries]
    if min(counts) < 2:
        return Effect(what, mean=cells[0][0] - cells[1][0], runs=min(counts), over=f"{min(counts)} seed")
    found = unpaired_interval(*((cell[0], cell[1], count) for cell, count in zip(cells, counts)))
    return Effect(what, Goal(above=0.0), *found, min(counts), f"{min(counts)} seeds, unpaired")


def toy_finding(effects: list[Effect], entries: list, unfit: str = "") -> Finding:
    """A finding of entries of experiments.collect."""
    files: dict[str, list[dict]] = {}
    for name, entry in filter(None, entries):
        files.setdefault(name, []).append(entry)
    return Finding(effects, "; ".join(source_of(name, group) for name, group in files.items()), unfit)


def pointwise_beats_pairs(results: Path) -> Finding:
    """Claim 10."""
    lines = beds_frontier.frontier_lines(results)
    what = "true reward at one KL, point-wise - pair-wise"
    effects = [beds_frontier.at_equal_kl(what, lines, "point-wise DPO", "DPO")]
    unfit = "the pairs are two answers compared, not a good and a bad one by the labels that the point-wise loss has"
    return Finding(effects, beds_frontier.frontier_source(lines), unfit)


def ulma_beats_both(results: Path) -> Finding:
    """Claim 11."""
    entries = toy_entries(results, *((script, {}) for script in ("ulma.py", "pointwise_dpo.py", "sft.py")))
    names = {1: "ULMA - point-wise DPO", 2: "ULMA - SFT"}
    effects = []
    for i, what in names.items():
        effects.append(toy_effect(f"frontier efficiency, {what}", "frontier_efficiency", entries[0], entries[i]))
    for i, what in names.items():
        effects.append(beside(toy_effect(f"true reward, {what}", "true_reward", entries[0], entries[i])))
    return toy_finding(effects, entries)


def continuous_labels_help(results: Path) -> Finding:
    """Claim 12."""
    continuous, learned = {"labels": "continuous", "beta": "0.05"}, {"learn-partition": ""}
    settings = [
        (script, flags) for script in ("pointwise_dpo.py", "ulma.py") for flags in (continuous | learned, learned)
    ]
    settings += [("pointwise_dpo.py", continuous), ("pointwise_dpo.py", {})]
    entries = toy_entries(results, *settings)
    what = "true reward, continuous - binary labels, beta log Z learned"
    effects = [
        toy_effect(what, "true_reward", *entries[:2]),
        toy_effect("the same for ULMA", "true_reward", *entries[2:4]),
        beside(toy_effect("KL of the first", "kl", *entries[:2])),
        beside(toy_effect("true reward with beta log Z = 0", "true_reward", *entries[4:])),
    ]
    return toy_finding(effects, entries)


# -- SuperHF, arXiv 2310.16763

REACHES = Goal(above=-0.1)  # of rewards of which training wins one and a half to two
PAPERS_KL = 0.35


def hacking_lines(results: Path) -> list[dict]:
    """The lines of results/reward_hacking.jsonl."""
    return most_common_bed(study.read_lines(results / "reward_hacking.jsonl"), ("answers", "extra"))


def hacking_finding(lines: list[dict], effects: list[Effect], unfit: str = "") -> Finding:
    """A finding of results/reward_hacking.jsonl."""
    return Finding(effects, source_of("reward_hacking.jsonl", lines) if lines else "", unfit)


def best_coefficient(lines: list[dict], method: str, n: int) -> float | None:
    """The KL coefficient whose runs reach the largest mean proxy reward."""
    rewards: dict[float, list[float]] = {}
    for line in lines:
        if (line["method"], line["n"]) == (method, n):
            rewards.setdefault(line["coefficient"], []).append(line["proxy_reward"])
    return max(rewards, key=lambda kl: sum(rewards[kl]) / len(rewards[kl])) if rewards else None


def superhf_reaches_ppo(results: Path) -> Finding:
    """Claim 13."""
    frontier = beds_frontier.frontier_lines(results)
    kls = {method: beds_frontier.best_value(frontier, method) for method in ("SuperHF", "PPO")}
    sides = [by_seed(frontier, "true_reward", method=method, value=value) for method, value in kls.items()]
    best = " - ".join(f"{method} at {value:g}" for method, value in kls.items()) if frontier else "SuperHF - PPO"
    direct = paired(f"true reward, trained on it, {best}", *sides, REACHES)
    lines = hacking_lines(results)
    ours, others = best_coefficient(lines, "SuperHF", 16), best_coefficient(lines, "PPO", 1)

    def difference(what: str, metric: str, coefficient: float | None, goal: Goal) -> Effect:
        mine = by_seed(lines, metric, method="SuperHF", n=16, coefficient=coefficient)
        return paired(what, mine, by_seed(lines, metric, method="PPO", coefficient=others), goal)

    above = Goal(above=0.0)
    best = f"SuperHF at {ours:g} - PPO at {others:g}" if lines and None not in (ours, others) else "SuperHF - PPO"
    effects = [
        direct,
        difference(f"proxy reward, {best}", "proxy_reward", ours, REACHES),
        beside(difference(f"proxy reward, SuperHF at {PAPERS_KL}", "proxy_reward", PAPERS_KL, REACHES)),
        beside(difference(f"true reward, {best}", "true_reward", ours, above)),
    ]
    source = hacking_finding(lines, effects).source
    return Finding(effects, "; ".join(filter(None, [beds_frontier.frontier_source(frontier), source])))


def prior_trades(results: Path) -> Finding:
    """Claim 14."""
    lines = hacking_lines(results)

    def at(metric: str, kl: float) -> dict[int, float]:
        return by_seed(lines, metric, method="SuperHF", n=16, coefficient=kl)

    names = {"proxy_reward": "proxy reward", "meteor_similarity": "METEOR similarity"}
    effects = [
        paired(f"{words}, without the prior - at {PAPERS_KL}", at(metric, 0.0), at(metric, PAPERS_KL))
        for metric, words in names.items()
    ]
    base = by_seed(lines, "meteor_similarity", method="base")
    what = f"METEOR similarity at {PAPERS_KL} - the base model's"
    effects.append(beside(paired(what, at("meteor_similarity", PAPERS_KL), base, Goal(within=0.1))))
    return hacking_finding(lines, effects)


def calibration(results: Path) -> Finding:
    """Claim 15: no program here gathers its seeds into a file yet."""
    return Finding([Effect("calibration error, base model - SuperHF")])


def completions_help(results: Path) -> Finding:
    """Claim 16."""
    lines = hacking_lines(results)

    def at(metric: str, n: int) -> dict[int, float]:
        return by_seed(lines, metric, method="SuperHF", coefficient=PAPERS_KL, n=n)

    effects = [paired("proxy reward, 16 completions - 1", at("proxy_reward", 16), at("proxy_reward", 1))]
    for metric, words in (("proxy_reward", "proxy reward, 16 - 8"), ("true_reward", "true reward, 16 - 2")):
        effects.append(beside(paired(words, at(metric, 16), at(metric, 8 if metric == "proxy_reward" else 2))))
    return hacking_finding(lines, effects)


# -- pretraining with human feedback, arXiv 2302.08582

TEXT_KEPT = Goal(above=-0.02)  # log perplexity
READ_WITHOUT_TOKENS = (
    "text is read without the control tokens that the model expects between sentences; the paper's measure is "
    "tasks downstream"
)


def pareto_effects(results: Path) -> tuple[list[dict], Callable]:
    """The lines of results/pareto_toy.jsonl, and {seed: number} of a method there."""
    lines = study.read_lines(results / "pareto_toy.jsonl")

    def of(method: str, metric: str, kind: str = "pretraining") -> dict[int, float]:
        return by_seed(lines, metric, method=method, kind=kind)

    return lines, of


def pareto_finding(lines: list[dict], effects: list[Effect], unfit: str = "") -> Finding:
    """A finding of results/pareto_toy.jsonl."""
    return Finding(effects, source_of("pareto_toy.jsonl", lines) if lines else "", unfit)


def settings_of(method: str) -> list[str]:
    """The names of a method's settings on the toy corpus, its default first."""
    return [name for name in OBJECTIVES["toy"] if name.split(", ")[0] == method]


def cheapest(of: Callable, method: str) -> dict[int, float]:
    """{seed: least KL to the teacher} among a method's settings with at most a tenth of MLE's
    misalignment; a seed where there is none is left out.
    """
    plain, found = of("MLE", "misalignment"), {}
    for name in settings_of(method):
        bad, kls = of(name, "misalignment"), of(name, "kl_to_teacher")
        for seed in kls.keys() & plain.keys():
            if bad[seed] <= plain[seed] / 10:
                found[seed] = min(kls[seed], found.get(seed, math.inf))
    return found


def conditional_is_optimal(results: Path) -> Finding:
    """Claim 17."""
    lines, of = pareto_effects(results)
    effects = []
    for rival in ("AWR", "RWR"):
        what = f"least KL at a tenth of MLE's misalignment, {rival} - conditional"
        effects.append(paired(what, cheapest(of, rival), cheapest(of, "conditional")))
    for rival in ("AWR", "RWR"):
        sides = of(rival, "misalignment"), of("conditional", "misalignment")
        effects.append(beside(paired(f"misalignment at the defaults, {rival} - conditional", *sides)))
    swept = {
        method: sum(bool(of(name, "kl_to_teacher")) for name in settings_of(method))
        for method in ("conditional", "AWR", "RWR")
    }
    counts = ", ".join(f"{method} {count}" for method, count in swept.items())
    return pareto_finding(lines, effects, f"settings tried: {counts}" if len(set(swept.values())) > 1 else "")


def ten_times_fewer(results: Path) -> Finding:
    """Claim 18."""
    lines, of = pareto_effects(results)
    effects = []
    for metric, words in (("misalignment", "misalignment"), ("red_team_mean", "under a red team")):
        tenth = {seed: value / 10 for seed, value in of("MLE", metric).items()}
        effects.append(paired(f"{words}, a tenth of MLE's - conditional's", tenth, of("conditional", metric)))
    return pareto_finding(lines, effects)


def capability_kept(results: Path) -> Finding:
    """Claim 19."""
    lines, of = pareto_effects(results)
    effects = []
    for name in settings_of("conditional"):
        sides = of("MLE", "perplexity_good"), of(name, "perplexity_good")
        effects.append(paired(f"log perplexity of good segments, MLE - {name}", *sides, TEXT_KEPT, math.log))
    kls = of("MLE", "kl_to_teacher"), of("conditional", "kl_to_teacher")
    others = [*effects[1:], paired("KL to the teacher, MLE - conditional", *kls)]
    return pareto_finding(lines, [effects[0], *map(beside, others)], READ_WITHOUT_TOKENS)


def better_from_the_start(results: Path) -> Finding:
    """Claim 20."""
    lines, of = pareto_effects(results)
    effects = []
    for metric, words in (("misalignment", "misalignment"), ("kl_to_teacher", "KL to the teacher")):
        sides = of("conditional", metric, "finetuning"), of("conditional", metric)
        effects.append(paired(f"{words}, after half of MLE - from the start", *sides))
    return pareto_finding(lines, [effects[0], beside(effects[1])])


def filtering_and_unlikelihood(results: Path) -> Finding:
    """Claim 21."""
    lines, of = pareto_effects(results)
    mle, bad = of("MLE", "kl_to_teacher"), of("MLE", "misalignment")
    effects = [
        paired("KL to the teacher, filtering - MLE", of("filtering", "kl_to_teacher"), mle),
        paired("misalignment, MLE - unlikelihood", bad, of("unlikelihood", "misalignment")),
        paired("KL to the teacher, unlikelihood - MLE", of("unlikelihood", "kl_to_teacher"), mle),
    ]
    return pareto_finding(lines, effects)
