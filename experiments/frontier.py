"""Reward against KL on the toy world for every method that trains on preferences or rewards, in one
picture under the best possible curve.

    python -m experiments.frontier            five seeds: some forty minutes on one idle core
    python -m experiments.frontier --jobs 4   after an interruption the same command goes on

Every method has three settings of the one number that says how far it may go, and all else as its
script has it. Every policy is judged alike: `--answers` samples at temperature 1 for each of the 80
trained questions, by the true reward and by KL(policy || base model) in nats per answer.

1. Methods do not see the same. Most learn from labels that Bradley-Terry made of the true reward,
   one pass over them; SuperHF, PPO and best of n see the true reward itself (hollow marks).
2. "DPH's pick" is the best of n answers of DPH's LM (beta .3) by its head. Its KL is an upper
   bound: log n - (n - 1)/n and the log-ratio of the picked answers. "best of n" picks among the
   base model's answers by the true reward; its KL is exact for the answers that are kept.
3. "TYPO's target" is the policy proportional to exp(r*), which TYPO aims at where lambda is small,
   for the answers among the kept ones of the base model.
4. Runs are as long as their scripts make them, but for SuperHF: 16 passes over the prompts, not 8,
   since at small KL weights its reward still rises there.

Every finished run adds a line to results/frontier.jsonl, and a run that has its line is not made
again. The grid goes seed by seed, so that an unfinished one has whole seeds.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/frontier.py

from common import InputError
from experiments import policies, study
from toy import base


@dataclass(frozen=True)
class Method:
    """How a method is run: its script, the flag that is tuned, three values of it, other flags."""

    script: str
    knob: str
    values: tuple[float, ...]
    flags: dict = field(default_factory=dict)


HEAD_BETA = 0.3  # dph.py's own: the LM that the head picks answers of
METHODS = {
    "SFT": Method("sft.py", "epochs", (1, 3, 9)),
    "DPO": Method("dpo.py", "beta", (0.1, 0.3, 1)),
    "cDPO": Method("cdpo.py", "beta", (0.1, 0.3, 1)),
    "TYPO": Method("typo.py", "lam", (0.03, 0.3, 3)),
    "DPH's LM": Method("dph.py", "beta", (0.1, 0.3, 1)),
    "DPH's pick": Method("dph.py", "n", (2, 4, 16)),
    "point-wise DPO": Method("pointwise_dpo.py", "beta", (0.1, 0.3, 1)),
    "ULMA": Method("ulma.py", "beta", (0.1, 0.3, 1)),
    "SuperHF": Method("superhf.py", "kl", (0.05, 0.35, 1), {"epochs": 16}),
    "PPO": Method("ppo.py", "kl", (0.1, 0.3, 1)),
    "best of n": Method("", "n", (2, 4, 16)),
}
SEE_REWARD = ("SuperHF", "PPO", "best of n")  # the others see labels
TARGET = "TYPO's target"
COLUMNS = ("kl", "true_reward", "efficiency")
TICKS = (0, 0.05, 0.2, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20)


@dataclass
class Args:
    methods: tuple[str, ...] = tuple(METHODS)
    """Only these methods, by their names in the picture."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds; each has its own base model and labels."""
    answers: int = 50
    """Samples of each trained question."""
    jobs: int = 1
    """Runs side by side, one thread each."""
    output_dir: str = "results"
    """Where the lines and the figure go."""
    extra: str = ""
    """More words for the scripts' command lines, given as --extra="--max-steps 2"."""
    work: str = ""
    """Set by the program itself: the run that a worker process makes."""


def check(args: Args) -> None:
    """Raises InputError where nothing good can come of the arguments."""
    if unknown := [name for name in args.methods if name not in METHODS]:
        raise InputError(f"--methods: {unknown[0]!r} is none of {', '.join(METHODS)}.")
    if not args.seeds or len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds: expected different numbers, got {' '.join(map(str, args.seeds)) or 'none'}.")
    least = max(METHODS["DPH's pick"].values)
    if args.answers < least:
        raise InputError(f"--answers {args.answers}: expected {least} or more, of which a head picks the best.")


def grid_of(args: Args) -> list[tuple[str, float, int]]:
    """(method, value, seed) of every run, seed by seed. A head's picks are judged with its LM, and
    TYPO's target is computed where TYPO runs.
    """
    grid = []
    for seed in args.seeds:
        for name in args.methods:
            run = "DPH's LM" if name == "DPH's pick" else name
            grid += [(run, value, seed) for value in METHODS[run].values]
            grid += [(TARGET, 0, seed)] if name == "TYPO" else []
    return list(dict.fromkeys(grid))


def flags_of(name: str, value: float) -> dict:
    """The flags of a method's run that are not its script's defaults; for a head's pick of `value`
    answers those that train it.
    """
    method = METHODS[name]
    own = {} if (name, value) == ("DPH's LM", HEAD_BETA) else {method.knob: value}
    return own | method.flags


def make_run(name: str, value: float, seed: int, args: Args) -> dict:
    """Trains one policy, or weighs the base model's answers, and judges what came of it: the line
    that is kept.
    """
    torch.set_num_threads(1)
    line = {"method": name, "value": value, "seed": seed, "asked": args.answers, "extra": args.extra}
    if name == TARGET:
        return line | policies.judge_target(seed) | study.facts()
    if name == "best of n":
        return line | policies.judge_best_of_base(seed, int(value)) | study.facts()
    # Nothing is measured on the way, and no state is kept: only the model at the end counts.
    quiet = {"seed": seed, "kl_samples": 0, "eval_every": 10**6, "save_every": 10**6}
    with tempfile.TemporaryDirectory() as folder:
        summary = study.train(METHODS[name].script, f"{folder}/run", flags_of(name, value) | quiet, args.extra)
        line |= {"steps": summary["steps"], "seconds": summary["seconds"]}
        line |= policies.judge_policy(f"{folder}/run", seed, args.answers)
        if (name, value) == ("DPH's LM", HEAD_BETA):
            ns = METHODS["DPH's pick"].values
            line["picks"] = policies.judge_head_picks(f"{folder}/run", seed, args.answers, ns)
    return line | study.facts()


def main(args: Args) -> None:
    """Makes the runs that have no line yet, then prints the table and draws the figure."""
    check(args)
    if args.work:
        print(json.dumps(make_run(*json.loads(args.work), args)))
        return
    for seed in args.seeds:
        base.base_model(seed)  # built before runs start side by side

    def key_of(line: dict) -> tuple | None:
        same = (line["asked"], line["extra"]) == (args.answers, args.extra)
        return (line["method"], line["value"], line["seed"]) if same else None

    def describe(line: dict) -> str:
        run = f"{line['method']} {line['value']:g} seed {line['seed']}"
        return f"{run}: KL {line['kl']:.2f}, true reward {line['true_reward']:.2f}"

    folder = Path(args.output_dir)
    flags = ["--answers", str(args.answers), f"--extra={args.extra}"]
    lines = study.complete(folder / "frontier.jsonl", grid_of(args), key_of, __file__, flags, args.jobs, describe)
    points = points_of(lines)
    report(points)
    study.draw_figure(folder / "frontier.png", partial(draw, points), size=(9.6, 5.6))


# -- tables


def points_of(lines: list[dict]) -> list[dict]:
    """A point for each method, value and seed, in the picture's order: the lines, and from those of
    DPH's LM at beta .3 the head's picks.

    Raises InputError where a line lacks what a point needs.
    """
    points = []
    for line in lines:
        if lacking := [name for name in ("method", "value", "seed", *COLUMNS) if name not in line]:
            raise InputError(f"results of the frontier: a line has no {lacking[0]!r}; expected one of this program's.")
        points.append(line)
        if (line["method"], line["value"]) == ("DPH's LM", HEAD_BETA):
            points += [line | {"method": "DPH's pick", "value": pick["n"]} | pick for pick in line["picks"]]
    order = [*METHODS, TARGET]
    return sorted(points, key=lambda point: (order.index(point["method"]), point["value"], point["seed"]))


def groups_of(points: list[dict]) -> dict[tuple[str, float], list[dict]]:
    """The points of all seeds for each method and value."""
    groups: dict[tuple[str, float], list[dict]] = {}
    for point in points:
        groups.setdefault((point["method"], point["value"]), []).append(point)
    return groups


def cells_of(group: list[dict]) -> list[str]:
    """Mean and 95% interval over seeds of KL, true reward and share of the best possible gain."""
    return [study.interval_cell([point[name] for point in group]) for name in COLUMNS]


def setting_of(name: str, value: float) -> str:
    """A setting in words."""
    words = {"lam": "lambda", "kl": "KL weight"}
    return "" if name == TARGET else f"{words.get(METHODS[name].knob, METHODS[name].knob)} {value:g}"


def report(points: list[dict]) -> None:
    """The table over seeds, a line a method and value."""
    rows = []
    for (name, value), group in groups_of(points).items():
        rows.append([name, setting_of(name, value), len(group), *cells_of(group)])
    heads = ["method", "setting", "seeds", "KL, nats", "true reward", "share of the best gain"]
    study.print_table(heads, rows, "Trained questions, mean and 95% interval over seeds")


# -- the picture


def draw(points: list[dict], axes: list) -> None:
    """Means of all settings with crosses of 95% intervals, under the best possible curve."""
    (axis,) = axes
    groups = groups_of(points)
    means = {
        key: [study.mean_and_interval([point[x] for point in group]) for x in COLUMNS] for key, group in groups.items()
    }
    for name in METHODS:
        draw_method(axis, name, [cell for (other, _), cell in means.items() if other == name])
    if target := means.get((TARGET, 0)):
        spot = target[0][0], target[1][0]
        axis.scatter(*spot, marker="+", s=60, color=study.points_of("TYPO")["color"])
        axis.annotate("what TYPO aims at", spot, (6, -3), textcoords="offset points", fontsize=8)
    longest = 1.15 * max(1, *(kl[0] for kl, *_ in means.values()))
    draw_best_possible(axis, sorted({point["seed"] for point in points}), longest)
    # Small gains grow with the root of the KL, so on this axis every curve begins straight.
    axis.set_xscale("function", functions=(lambda x: x.clip(0) ** 0.5, lambda x: x**2))
    axis.set_xlim(0, longest)
    # One collapsed run can make an interval longer than all else: it is cut at the border.
    axis.set_ylim(min(0, *(reward[0] for _, reward, _ in means.values())) - 0.35, 1.6)
    axis.set_xticks([tick for tick in TICKS if tick < axis.get_xlim()[1]])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("KL(policy || base model), nats per answer (axis: square root)")
    axis.set_ylabel("true reward, mean over the trained questions")
    axis.grid(color="0.93", linewidth=0.6)
    axis.set_axisbelow(True)
    draw_legends(axis, {name for name, _ in means})


def draw_method(axis, name: str, cells: list) -> None:
    """A method's settings, joined in the order of their values; `cells` hold (mean, half of the
    interval) of KL, true reward and share.
    """
    if not cells:
        return
    (kls, kl_halves), (rewards, reward_halves) = (list(zip(*[cell[i] for cell in cells])) for i in (0, 1))
    look = study.points_of(name)
    axis.plot(kls, rewards, color=look["color"], linewidth=1, alpha=0.5)
    for kl, kl_half, reward, reward_half in zip(kls, kl_halves, rewards, reward_halves):
        if kl_half is not None:
            axis.plot([max(0, kl - kl_half), kl + kl_half], [reward] * 2, color=look["color"], linewidth=0.8, alpha=0.6)
            axis.plot(
                [kl] * 2, [reward - reward_half, reward + reward_half], color=look["color"], linewidth=0.8, alpha=0.6
            )
    axis.scatter(kls, rewards, **mark_of(name), zorder=3)


def mark_of(name: str) -> dict:
    """A method's mark for scatter: hollow where the method sees the true reward."""
    look = study.points_of(name)
    size = 34 if isinstance(look["marker"], str) and look["marker"] != "*" else 60  # stars are thin
    face = "white" if name in SEE_REWARD else look["color"]
    return {"marker": look["marker"], "s": size, "facecolor": face, "edgecolor": look["color"], "linewidth": 1.1}


def draw_legends(axis, names: set[str]) -> None:
    """Beside the panel, the methods by what they see."""
    kinds = {"learn from labels": (1.02, False), "see the true reward": (0.6, True)}
    for title, (top, sees) in kinds.items():
        shown = [name for name in METHODS if name in names and (name in SEE_REWARD) == sees]
        handles = [axis.scatter([], [], **mark_of(name), label=legend_of(name)) for name in shown]
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, top), "frameon": False, "alignment": "left"}
        legend = axis.legend(handles=handles, title=title, **place)
        if not sees:
            axis.add_artist(legend)  # the next one would take its place


def legend_of(name: str) -> str:
    """A method with its three values."""
    values = ", ".join(f"{value:g}" for value in METHODS[name].values)
    return f"{name}: {setting_of(name, 0)[:-2]} {values}"


def draw_best_possible(axis, seeds: list[int], longest: float) -> None:
    """The best possible true reward at each KL, mean over seeds; what lies above no policy has."""
    roots = torch.linspace(0, longest**0.5, 300, dtype=torch.float64)
    best = policies.mean_frontier(tuple(seeds), roots**2).mean(0)
    axis.plot(roots**2, best, color="black", linewidth=1.4)
    axis.fill_between(roots**2, best, 2, color="0.94", linewidth=0)
    axis.annotate("no policy is here", (0.12, 1.2), fontsize=8, color="0.35")
    line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.7}
    axis.annotate("base model", (0, best[0]), (10, -42), textcoords="offset points", fontsize=8, arrowprops=line)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
