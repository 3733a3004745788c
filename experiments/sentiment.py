"""Controlled sentiment, the study of the DPO paper (arXiv 2305.18290, section 6.1), on any causal
language model: true reward against KL for every method in one picture.

    python -m experiments.sentiment --model $PREFERENCE_DATA/models/stories260K \\
        --prompts $PREFERENCE_DATA/text/tinystories_1000.txt.gz

The base model continues openings of texts. The true reward is 2 x VADER's compound score of the
continuation (package vaderSentiment), so it is known of any text, and a policy can be seen to
exploit it. Of each seed's training openings the base model says a few continuations; Bradley-Terry
labels all pairs of them, and each one alone. Every method trains on these, or sees the reward
itself (hollow marks), at three settings of the one number that says how far it may go. All are
judged alike, on openings that nobody trains on: `--judged` samples each at temperature 1, by the
mean true reward and by KL(policy || base model) in nats per continuation.

1. All openings have `--prompt-tokens` tokens and all continuations at most `--new-tokens`. A text
   that was cut there is cut there in training too, and has no EOS.
2. Continuations that the tokenizer would read as other tokens than those sampled, a few in a
   hundred, train nobody. They are counted.
3. "DPH's pick" is the best of n answers of DPH's LM (beta .3) by its head, with an upper bound of
   its KL; "best of n" the best of n answers of the base model by the true reward, its KL exact.
4. The best possible curve reweights `--bank` samples of the base model for each judged opening,
   and ends where fewer than EFFECTIVE of them carry the weight: it cannot be known beyond.

Every finished run adds a line to results/sentiment_MODEL.jsonl, and one that has its line is not
made again. The grid goes seed by seed. The paper has GPT-2 large, movie reviews and a classifier.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/sentiment.py

from common import InputError
from common.evaluate import kl_to_reference
from common.generate import is_tiny, sample, text_after
from common.models import length_limit, load_model, load_tokenizer, load_weights
from common.oracle import plain_logps, plain_rewards
from experiments import frontier, policies, sentiment_rows, study
from rewards.sentiment import vader_reward
from toy import world


@dataclass(frozen=True)
class Method:
    """How a method is run: its script, its rows, the flag that is tuned, three values of it, other
    flags.
    """

    script: str
    rows: str
    knob: str
    values: tuple[float, ...]
    flags: dict = field(default_factory=dict)


BETAS = (0.1, 0.3, 1)
HEAD_BETA = 0.3  # dph.py's own: the LM that the head picks answers of
METHODS = {
    "SFT": Method("sft.py", "pairs", "epochs", (1, 3, 9)),
    "DPO": Method("dpo.py", "pairs", "beta", BETAS),
    "cDPO": Method("cdpo.py", "pairs", "beta", BETAS),
    "TYPO": Method("typo.py", "pairs", "lam", (0.03, 0.3, 3)),
    "DPH's pick": Method("dph.py", "pairs", "n", (2, 4, 16)),
    "point-wise DPO": Method("pointwise_dpo.py", "labelled", "beta", BETAS),
    "ULMA": Method("ulma.py", "labelled", "beta", BETAS),
    "SuperHF": Method("superhf.py", "prompts", "kl", (0.05, 0.35, 1), {"epochs": 2, "completions": 16}),
    "PPO": Method("ppo.py", "prompts", "kl", (0.03, 0.1, 0.3), {"epochs": 16}),
    "best of n": Method("", "", "n", (4, 16, 64)),
}
BASE, HEAD_LM = "base model", "DPH's LM"  # runs whose lines hold the points of "best of n" and "DPH's pick"
COLUMNS = ("kl", "true_reward", "share")
HEADS = ["method", "setting", "seeds", "KL, nats", "true reward", "share of the best possible gain"]
EFFECTIVE = 10  # samples that must carry the weight of the best possible curve
SHOWN = 4  # continuations that a line keeps to read
TICKS = (0, 0.1, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 120)


@dataclass
class Args:
    model: str
    """The base model: a folder or hub id of a causal language model."""
    prompts: str
    """Rows with prompt or text, or a .txt file; of each text the opening counts. Also with .gz."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Only these methods, by their names in the picture."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds; each has its own training openings, continuations and labels."""
    prompt_tokens: int = 32
    """Length of every opening, in tokens."""
    new_tokens: int = 48
    """Length limit of every continuation, in tokens."""
    train_prompts: int = 300
    """Openings that a seed trains on."""
    test_prompts: int = 40
    """Openings that all policies of all seeds are judged by."""
    answers: int = 4
    """Continuations of each training opening that pairs are made of: the paper's four."""
    judged: int = 16
    """Continuations of each test opening by each policy."""
    bank: int = 512
    """Continuations of each test opening by the base model, for best of n and the curve."""
    epochs: float = 2.0
    """Passes over pairs and labelled continuations."""
    lr: float | None = None
    """Learning rate of all methods; None: 3e-4 for models below 5 M parameters, else 1e-5."""
    jobs: int = 1
    """Runs side by side, one thread each."""
    runs: str = "runs/sentiment"
    """Where the rows go."""
    output_dir: str = "results"
    """Where the lines and the figure go."""
    extra: str = ""
    """More words for the scripts' command lines, given as --extra="--max-steps 2"."""
    work: str = ""
    """Set by the program itself: the run that a worker process makes."""


SETTINGS = ("prompt_tokens", "new_tokens", "train_prompts", "test_prompts", "answers", "judged", "bank", "epochs")
SETTINGS += ("lr", "extra")


def check(args: Args) -> None:
    """Raises InputError where nothing good can come of the arguments."""
    if unknown := [name for name in args.methods if name not in METHODS]:
        raise InputError(f"--methods: {unknown[0]!r} is none of {', '.join(METHODS)}.")
    if not args.seeds or len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds: expected different numbers, got {' '.join(map(str, args.seeds)) or 'none'}.")
    for name, method in (("judged", "DPH's pick"), ("bank", "best of n")):
        least = max(METHODS[method].values)
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)}: expected {least} or more, of which the best is picked.")
    for name, least in (("prompt_tokens", 2), ("new_tokens", 1), ("train_prompts", 1), ("test_prompts", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {least} or more.")
    if args.lr is not None and not 0 < args.lr < float("inf"):
        raise InputError(f"--lr {args.lr}: expected a positive number.")
    if args.answers < 2:
        raise InputError(f"--answers {args.answers}: expected 2 or more, of which pairs are made.")
    vader_reward("experiments/sentiment.py")


def settings_of(args: Args) -> dict:
    """What all runs of a picture have in common; a line with other settings does not count."""
    names = {"model": Path(args.model).name, "prompts": Path(args.prompts).name}
    return names | {name: getattr(args, name) for name in SETTINGS}


def grid_of(args: Args) -> list[tuple[str, float, int]]:
    """(method, value, seed) of every run, seed by seed: the base model first, whose samples the
    curve and best of n are made of.
    """
    grid = []
    for seed in args.seeds:
        grid.append((BASE, 0, seed))
        for name in args.methods:
            if name == "DPH's pick":
                grid.append((HEAD_LM, HEAD_BETA, seed))
            elif name != "best of n":
                grid += [(name, value, seed) for value in METHODS[name].values]
    return grid


# -- one run


def load_policy(folder: str, tokenizer):
    """A model folder's policy in evaluation mode, on a GPU where there is one."""
    transformers.utils.logging.disable_progress_bar()
    return load_model(folder, "cuda" if torch.cuda.is_available() else "cpu", tokenizer).eval()


def split_openings(args: Args, tokenizer) -> tuple[list[str], list[str]]:
    """(openings to judge by, the same for all seeds; openings to train on)."""
    wanted = args.test_prompts + args.train_prompts
    openings = sentiment_rows.read_openings(args.prompts, tokenizer, args.prompt_tokens, wanted)
    return openings[: args.test_prompts], openings[args.test_prompts :]


def prepare(args: Args) -> None:
    """Settles the learning rate, and writes the rows of each seed where they are not there yet."""
    tokenizer = load_tokenizer(args.model)
    _, pool = split_openings(args, tokenizer)
    model = load_policy(args.model, tokenizer)
    length_limit(args.prompt_tokens + args.new_tokens, model)
    args.lr = args.lr or (3e-4 if is_tiny(model) else 1e-5)
    for seed in args.seeds:
        folder = sentiment_rows.folder_of(args.runs, settings_of(args), seed)
        if sentiment_rows.facts_of(folder) is None:
            generator = torch.Generator().manual_seed(seed)
            mine = [pool[i] for i in torch.randperm(len(pool), generator=generator)[: args.train_prompts].tolist()]
            groups = sentiment_rows.continue_openings(
                model, tokenizer, mine, args.answers, args.new_tokens, seed=1_000_003 * (seed + 1)
            )
            sentiment_rows.write_rows(folder, mine, groups, seed)


def continuations(policy, tokenizer, openings: list[str], n: int, new_tokens: int, seed: int) -> tuple:
    """`n` continuations of each opening in turn at temperature 1: prompts and completions as token
    ids, the texts, and their true rewards [openings, n].
    """
    prompts = [tokenizer(opening).input_ids for opening in openings]
    completions = sample(policy, prompts, tokenizer, new_tokens, seed=seed, n=n)
    prompts = [prompt for prompt in prompts for _ in range(n)]
    texts = [text_after(tokenizer, *ids) for ids in zip(prompts, completions)]
    rewards = torch.tensor(sentiment_rows.true_rewards(texts), dtype=torch.float64)
    return prompts, completions, texts, rewards.view(-1, n)


def judge_policy(folder: str, args: Args, seed: int) -> dict:
    """KL in nats and mean true reward of a run's policy on the test openings, some of what it says,
    and for a run of dph.py "picks", the same for its head's picks.
    """
    tokenizer = load_tokenizer(args.model)
    openings, _ = split_openings(args, tokenizer)
    policy, reference = load_policy(folder, tokenizer), load_policy(args.model, tokenizer)
    prompts, completions, texts, rewards = continuations(
        policy, tokenizer, openings, args.judged, args.new_tokens, seed + 1
    )
    kls = kl_to_reference(policy, reference, prompts, completions, tokenizer.pad_token_id, 1, None)
    line = {"kl": kls.mean().item(), "true_reward": rewards.mean().item()} | shown(openings, texts, args.judged)
    if "score.weight" in (weights := load_weights(folder, "score.weight")):
        pairs = list(zip(prompts, completions))
        line["picks"] = judge_picks(policy, reference, weights["score.weight"], pairs, rewards, tokenizer.pad_token_id)
    return line


def shown(openings: list[str], texts: list[str], n: int) -> dict:
    """The first continuations of the first openings, and the share of different texts."""
    samples = [[opening, texts[i * n]] for i, opening in enumerate(openings[:SHOWN])]
    return {"different_texts": len(set(texts)) / len(texts), "samples": samples}


def judge_picks(policy, reference, head, pairs: list[tuple], rewards: torch.Tensor, pad_id: int) -> list[dict]:
    """KL and true reward where a head picks the best of n of the same samples, the mean over every
    draw of n. The KL is an upper bound: `policies.kl_of_best` and the picks' mean log-ratio.
    """
    size = 256 if is_tiny(policy) else 8
    logratios = (plain_logps(policy, pairs, pad_id, size) - plain_logps(reference, pairs, pad_id, size)).double()
    scores = torch.tensor(plain_rewards(policy, head, pairs), dtype=torch.float64).view_as(rewards)
    picks = []
    for n in METHODS["DPH's pick"].values:
        weights = policies.pick_weights(scores, n)
        kl = policies.kl_of_best(n) + (weights * logratios.view_as(rewards)).sum(1).mean().item()
        picks.append({"n": n, "kl": kl, "true_reward": (weights * rewards).sum(1).mean().item()})
    return picks


def judge_base(args: Args, seed: int) -> dict:
    """The base model's mean true reward, the best possible curve and best of n, all of the same
    samples.
    """
    tokenizer = load_tokenizer(args.model)
    openings, _ = split_openings(args, tokenizer)
    model = load_policy(args.model, tokenizer)
    *_, texts, rewards = continuations(model, tokenizer, openings, args.bank, args.new_tokens, 10_007 + seed)
    best = []
    for n in METHODS["best of n"].values:
        weights = policies.pick_weights(rewards, n)
        kl = torch.special.xlogy(weights, weights * rewards.shape[1]).sum(1).mean().item()
        best.append({"n": n, "kl": kl, "true_reward": (weights * rewards).sum(1).mean().item()})
    line = {"kl": 0.0, "true_reward": rewards.mean().item()} | shown(openings, texts, args.bank)
    facts = sentiment_rows.facts_of(sentiment_rows.folder_of(args.runs, settings_of(args), seed))
    return line | {"curve": best_possible(rewards), "best": best, "rows": facts}


def make_run(name: str, value: float, seed: int, args: Args) -> dict:
    """Trains one policy, or weighs the base model's samples, and judges what came of it: the line
    that is kept.
    """
    torch.set_num_threads(1)
    line = {"method": name, "value": value, "seed": seed, "settings": settings_of(args)}
    if name == BASE:
        return line | judge_base(args, seed) | study.facts()
    method = METHODS["DPH's pick" if name == HEAD_LM else name]
    knob = "beta" if name == HEAD_LM else method.knob
    rows = sentiment_rows.folder_of(args.runs, settings_of(args), seed) / f"{method.rows}.jsonl"
    # Nothing is measured on the way, and no state is kept: only the model at the end counts.
    flags = {"model": args.model, "data": rows, "holdout": 0, "seed": seed, "lr": args.lr, "epochs": args.epochs}
    flags |= {"max_length": args.prompt_tokens + args.new_tokens, "max_new_tokens": args.new_tokens}
    flags |= {"kl_samples": 0, "eval_every": 10**6, "save_every": 10**6}
    if method.rows == "prompts":
        flags |= {"reward": "vader", "max_length": flags["max_length"] + 1}  # it must exceed prompt and answer here
    with tempfile.TemporaryDirectory() as folder:
        summary = study.train(method.script, f"{folder}/run", flags | method.flags | {knob: value}, args.extra)
        line |= {name: summary[name] for name in ("steps", "seconds")}
        line |= judge_policy(f"{folder}/run", args, seed)
    return line | study.facts()


def main(args: Args) -> None:
    """Makes the runs that have no line yet, then prints the table and draws the figure."""
    check(args)
    if args.work:
        print(json.dumps(make_run(*json.loads(args.work), args)))
        return
    prepare(args)
    settings = settings_of(args)

    def key_of(line: dict) -> tuple | None:
        return (line["method"], line["value"], line["seed"]) if line["settings"] == settings else None

    def describe(line: dict) -> str:
        run = f"{line['method']} {line['value']:g} seed {line['seed']}"
        return f"{run}: KL {line['kl']:.2f}, true reward {line['true_reward']:.2f}"

    path = Path(args.output_dir) / f"sentiment_{settings['model']}.jsonl"
    flags = {"model": args.model, "prompts": args.prompts, "runs": args.runs}
    flags |= {name: settings[name] for name in SETTINGS if name != "extra"}
    words = [*study.words_of(flags), f"--extra={args.extra}"]
    lines = study.complete(path, grid_of(args), key_of, __file__, words, args.jobs, describe)
    points, curves = points_of(lines, args.methods), curves_of(lines)
    study.print_table(HEADS, table_rows(points), "Unseen openings, mean and 95% interval over seeds")
    if points:
        study.draw_figure(path.with_suffix(".png"), partial(draw, points, curves), size=(9.6, 5.6))


# -- the best possible curve


def best_possible(rewards: torch.Tensor) -> list[list[float]]:
    """The largest mean true reward at a KL to the base model, as [KL, reward] rising from the base
    model itself, by reweighting its samples (`toy.world.frontier`).

    It ends where the mean over openings of the effective number of samples, 1 / sum of squared
    weights, falls below EFFECTIVE: the largest of n rewards says little of a policy that would say
    it always.

    Args:
        rewards: [openings, n] true rewards of the base model's samples.
    """
    curve = [[0.0, rewards.mean().item()]]
    for beta in torch.logspace(1.5, -2, 71, dtype=torch.float64):
        weights = (rewards.double() / beta).softmax(-1)  # [openings, n]
        kl, best = (values.item() for values in world.frontier(rewards, beta[None]))
        # It may end before, where every opening has its best answer.
        if (1 / weights.square().sum(-1)).mean() < EFFECTIVE or kl <= curve[-1][0]:
            break
        curve.append([kl, best])
    return curve


def best_at(curve: list[list[float]], kl: float) -> float | None:
    """The best possible reward at a KL, linear between the curve's points; None beyond its end."""
    for (low, below), (high, above) in pairwise([curve[0], *curve]):
        if low <= kl <= high:
            return below + (above - below) * (kl - low) / max(1e-12, high - low)
    return None


def share_of_gain(kl: float, reward: float, curve: list[list[float]]) -> float | None:
    """Gain over the base model as a share of the best possible gain at the same KL; None where the
    KL is below .01 or beyond the curve's end.
    """
    best = best_at(curve, kl) if kl >= 0.01 else None
    start = curve[0][1]
    return None if best is None or best - start < 1e-9 else (reward - start) / (best - start)


# -- tables


def points_of(lines: list[dict], methods: tuple[str, ...]) -> list[dict]:
    """A point for each method, value and seed, in the picture's order, with its "share" of the best
    possible gain: from the base model's lines best of n, from those of DPH's LM its head's picks.
    """
    curves, points = curves_of(lines), []
    for line in lines:
        name, inside = {BASE: ("best of n", "best"), HEAD_LM: ("DPH's pick", "picks")}.get(line["method"], (None, None))
        parts = [{"value": part["n"]} | part for part in line[inside]] if inside else [{}]
        points += [line | {"method": name or line["method"]} | part for part in parts]
    points = [point for point in points if point["method"] in methods and point["seed"] in curves]
    for point in points:
        point["share"] = share_of_gain(point["kl"], point["true_reward"], curves[point["seed"]])
    order = list(METHODS)
    return sorted(points, key=lambda point: (order.index(point["method"]), point["value"], point["seed"]))


def curves_of(lines: list[dict]) -> dict[int, list[list[float]]]:
    """The best possible curve of each seed."""
    return {line["seed"]: line["curve"] for line in lines if line["method"] == BASE}


def table_rows(points: list[dict]) -> list[list]:
    """The table over seeds, a line a method and value, below HEADS; no share of the gain where the
    curve of one of them does not reach so far.
    """
    rows = []
    for (name, value), group in frontier.groups_of(points).items():
        columns = [[point[column] for point in group] for column in COLUMNS]
        cells = [study.interval_cell([] if None in values else values) for values in columns]
        rows.append([name, setting_of(name, value), len(group), *cells])
    return rows


def setting_of(name: str, value: float) -> str:
    """A setting in words."""
    words = {"lam": "lambda", "kl": "KL weight"}
    return f"{words.get(METHODS[name].knob, METHODS[name].knob)} {value:g}"


# -- the picture


def draw(points: list[dict], curves: dict, axes: list) -> None:
    """Means of all settings with crosses of 95% intervals, and the best possible curve as far as it
    is known.
    """
    (axis,) = axes
    cells: dict[str, list] = {}
    for (name, _), group in frontier.groups_of(points).items():
        cells.setdefault(name, []).append([study.mean_and_interval([p[x] for p in group]) for x in COLUMNS])
    for name, settings in cells.items():
        frontier.draw_method(axis, name, settings)
    draw_best_possible(axis, curves)
    longest = 1.15 * max([1.0, *(setting[0][0] for settings in cells.values() for setting in settings)])
    # Small gains grow with the root of the KL, so on this axis the curve begins straight.
    axis.set_xscale("function", functions=(lambda x: x.clip(0) ** 0.5, lambda x: x**2))
    axis.set_xlim(0, longest)
    # One collapsed run can make an interval longer than all else: it is cut at the border.
    axis.set_ylim(min(reward[0] for settings in cells.values() for _, reward, _ in settings) - 0.3, 2.05)
    axis.set_xticks([tick for tick in TICKS if tick < longest])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("KL(policy || base model), nats per continuation (axis: square root)")
    axis.set_ylabel("true reward (2 x VADER's compound), unseen openings")
    axis.grid(color="0.93", linewidth=0.6)
    axis.set_axisbelow(True)
    draw_legends(axis, list(cells))


def draw_best_possible(axis, curves: dict) -> None:
    """The mean of the seeds' curves, up to the KL that all of them reach, and the base model."""
    reach = min(curve[-1][0] for curve in curves.values())
    kls = (torch.linspace(0, reach**0.5, 200, dtype=torch.float64) ** 2).clamp(max=reach).tolist()
    best = [sum(best_at(curve, kl) for curve in curves.values()) / len(curves) for kl in kls]
    axis.plot(kls, best, color="black", linewidth=1.4)
    where = {"textcoords": "offset points", "fontsize": 8, "color": "0.35"}
    axis.annotate("best possible, as far as\nthe samples tell", (kls[-1], best[-1]), (8, -8), **where)
    line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.7}
    axis.annotate("base model", (0, best[0]), (12, -16), **where, arrowprops=line)


def draw_legends(axis, names: list[str]) -> None:
    """Beside the panel, the methods by what they see."""
    kinds = {"learn from labels": (1.02, False), "see the true reward": (0.55, True)}
    for title, (top, sees) in kinds.items():
        shown_names = [name for name in names if (name in frontier.SEE_REWARD) == sees]
        handles = [axis.scatter([], [], **frontier.mark_of(name), label=legend_of(name)) for name in shown_names]
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, top), "frameon": False, "alignment": "left"}
        legend = axis.legend(handles=handles, title=title, **place)
        if not sees:
            axis.add_artist(legend)  # the next one would take its place


def legend_of(name: str) -> str:
    """A method with its values."""
    method = METHODS[name]
    words = setting_of(name, 0).rsplit(" ", 1)[0]
    return f"{name}: {words} {', '.join(f'{value:g}' for value in method.values)}"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
