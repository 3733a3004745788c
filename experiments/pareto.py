"""Misalignment against capability: six ways to pretrain on a scored corpus, each from the start and
each as the second half after plain MLE.

    python -m experiments.pareto                        the toy corpus, five seeds
    python -m experiments.pareto --task pep8 --jobs 3   a tiny model on Python's standard library
    python -m experiments.pareto --task pep8 --data code/ --model gpt2-small \\
        --teacher-model gpt2-medium/ --context 1024 --vocabulary 50000 --batch-size 64 --lr 8e-4 \\
        --tokens 3.3e9 --samples 4096

The last one is the paper's size, on a GPU: a folder of .py files, a folder with a larger
config.json.

Capability is KL(teacher || model), the teacher being a larger MLE model that is trained first, and
held-out perplexity. Run folders stay in `--runs`: a finished run is not made again, one that was
interrupted goes on, and the teacher and the MLE half are used from there. Every run's line goes to
results/pareto_<task>.jsonl; table and figure are drawn from the lines of this command's runs.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/pareto.py

from experiments import study
from experiments.beds import source_of

# Objective -> script and its flags, on pep8 the paper's. On the toy those with a setting that
# trades misalignment for capability run at three values of it: the default, and two more.
OBJECTIVES = {
    "toy": {
        "MLE": ("mle_pretrain.py", ""),
        "filtering": ("filtered_pretrain.py", ""),
        "conditional": ("conditional_pretrain.py", ""),
        "conditional, d .1": ("conditional_pretrain.py", "--drop 0.1"),
        "conditional, d .3": ("conditional_pretrain.py", "--drop 0.3"),
        "unlikelihood": ("unlikelihood_pretrain.py", ""),
        "RWR": ("rwr_pretrain.py", ""),
        "RWR, beta 1": ("rwr_pretrain.py", "--beta 1"),
        "RWR, beta 10": ("rwr_pretrain.py", "--beta 10"),
        "AWR": ("awr_pretrain.py", ""),
        "AWR, beta 1": ("awr_pretrain.py", "--beta 1"),
        "AWR, beta 10": ("awr_pretrain.py", "--beta 10"),
    },
    "pep8": {
        "MLE": ("mle_pretrain.py", ""),
        "filtering": ("filtered_pretrain.py", "--threshold 2.361e-3"),
        "conditional": ("conditional_pretrain.py", "--drop 0.1"),
        "unlikelihood": ("unlikelihood_pretrain.py", "--alpha 0.01"),
        "RWR": ("rwr_pretrain.py", "--beta 10"),
        "AWR": ("awr_pretrain.py", "--alpha 0.05 --beta 1"),
    },
}
DEFAULTS = {"MLE", "filtering", "conditional", "conditional, not asked", "unlikelihood", "RWR", "AWR"}
# What a run is given where the command line says nothing
SIZES = {
    "toy": {"tokens": 5e5, "context": 64, "samples": 500, "batch_size": 16, "lr": 1e-2},
    "pep8": {
        "tokens": 1e6,
        "context": 128,
        "samples": 500,
        "batch_size": 16,
        "lr": 3e-3,
        "vocabulary": 1024,
        "holdout": 0.03,
    },
}
# Layers, heads, width: of the model and of the teacher
SHAPES = {"toy": ((2, 2, 64), (2, 4, 128)), "pep8": ((2, 2, 64), (3, 3, 96))}
COLUMNS = {"after": "", "after_bad": ", asked for bad", "after_no_token": ", not asked"}
METRICS = (
    "misalignment",
    "expected_max",
    "kl_to_teacher",
    "perplexity",
    "perplexity_good",
    "right_share",
    "sample_tokens",
    "self_bleu",
)
# The tables of docs/conditional_pretrain.md: heading -> metric and digits
PAGE_COLUMNS = {
    "misalignment": ("misalignment", 4),
    "expected maximum": ("expected_max", 3),
    "KL to the teacher, over MLE's": ("over_mle", 1),
    "perplexity": ("perplexity", 2),
    "perplexity, good segments": ("perplexity_good", 2),
    "right facts": ("right_share", 2),
    "tokens of a sample": ("sample_tokens", 1),
}
PAGE_NAMES = {"conditional": "conditional, d .01", "RWR": "RWR, beta .3", "AWR": "AWR, beta .3"}  # defaults
FACTS = ("git_commit", "device", "threads", "versions", "tokens_per_second", "seconds", "data_sha256")
KEPT_ARGS = {"tokens", "context", "lr", "batch_size", "alpha", "beta", "drop", "threshold", "threshold_quantile"}


@dataclass
class Args:
    task: Literal["toy", "pep8"] = "toy"
    """The corpus."""
    data: str = ""
    """Source folder for pep8; empty: the standard library."""
    seeds: tuple[int, ...] = ()
    """Seeds; empty: 0 to 4 on the toy, 0 on pep8."""
    tokens: float = 0
    """Training tokens of each run; 0: 5e5 on the toy, 1e6 on pep8."""
    model: str = ""
    """What is trained: a size or a folder with a config.json; empty: 2 layers of 64."""
    teacher_model: str = ""
    """The teacher's size; empty: 2 layers of 128 on the toy, 3 of 96 on pep8."""
    context: int = 0
    """Tokens in a chunk; 0: 64 on the toy, 128 on pep8."""
    vocabulary: int = 0
    """Tokens of the BPE; 0: 1024 on pep8."""
    batch_size: int = 0
    """Chunks in a step; 0: 16."""
    lr: float = 0
    """Peak learning rate; 0: 1e-2 on the toy, 3e-3 on pep8."""
    samples: int = 0
    """Samples of each model; 0: 500."""
    red_team: int = 0
    """Rounds in which prompts are sought for models of `--red-teamed`; 0: none."""
    red_teamed: tuple[str, ...] = ("MLE", "conditional")
    """Methods that are red-teamed, from the start: a round samples as much as twenty end tables."""
    half: bool = True
    """Also the finetuning comparison: half of the tokens MLE, then each objective for the rest."""
    jobs: int = 1
    """Runs side by side, one thread each; 0: none is made, only finished ones are shown."""
    runs: str = "runs/pareto"
    """Where run folders are kept."""
    output_dir: str = "results"
    """Where lines and figure go."""


@dataclass(frozen=True)
class Item:
    """One run: kind is teacher, half, pretraining or finetuning; method is one of OBJECTIVES."""

    kind: str
    method: str
    seed: int

    def folder(self, runs: Path) -> Path:
        """The run's folder."""
        name = self.method.lower().replace(", ", "-").replace(" ", "")
        return runs / f"{self.kind}-{name}-seed{self.seed}"


def write_config(folder: Path, shape: tuple[int, int, int], context: int) -> None:
    """Makes a folder whose config.json describes a GPT-2 type of this shape, without dropout."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = dict(zip(("n_layer", "n_head", "n_embd"), shape))
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = {"model_type": "gpt2", "n_positions": context, **sizes, **dropout}
    (folder / "config.json").write_text(json.dumps(config))


def sizes_of(args: Args) -> dict:
    """The flags that all runs share: the task's sizes, with what the command line says instead."""
    names = ("data", "tokens", "context", "vocabulary", "batch_size", "lr", "samples")
    given = {name: getattr(args, name) for name in names if getattr(args, name)}
    sizes = {"task": args.task, **SIZES[args.task], **given}
    return sizes | {"max_new_tokens": sizes["context"] - 2, "eval_every": 10**6}


def flags_of(item: Item, args: Args, runs: Path) -> dict:
    """The flags of a run; the teacher and the MLE half are used from their folders."""
    sizes = sizes_of(args)
    teacher, half = Item("teacher", "MLE", item.seed).folder(runs), Item("half", "MLE", item.seed).folder(runs)
    if item.kind == "teacher":
        model = args.teacher_model or runs / "teacher"
    else:
        model = args.model or runs / "model"
    flags = sizes | {"model": model, "seed": item.seed, "baseline": "none"}
    if item.kind != "teacher" and args.task != "toy":
        flags["tokenizer"] = teacher  # trained once
    if item.kind in ("teacher", "half"):
        flags["samples"] = 0
    else:
        attacked = item.kind == "pretraining" and item.method in args.red_teamed
        flags |= {"teacher": teacher, "red_team": args.red_team if attacked else 0}
    if item.kind in ("half", "finetuning"):
        flags["tokens"] = sizes["tokens"] / 2
    if item.kind == "finetuning":
        flags["init"] = half
    return flags


def rounds_of(args: Args) -> list[list[Item]]:
    """The runs in three rounds, since later ones need earlier ones; the last one's are judged."""
    seeds = args.seeds or (range(5) if args.task == "toy" else (0,))
    teachers = [Item("teacher", "MLE", seed) for seed in seeds]
    halves = [Item("half", "MLE", seed) for seed in seeds if args.half]
    judged = []
    for seed in seeds:
        judged += [Item("pretraining", method, seed) for method in OBJECTIVES[args.task]]
        if args.half:
            judged += [Item("finetuning", method, seed) for method in OBJECTIVES[args.task] if ", " not in method]
    return [teachers, halves, judged]


def make_runs(args: Args, runs: Path) -> dict[Item, dict]:
    """The summaries of all runs; those that are missing are made, unless `--jobs 0`."""
    for name, shape in zip(("model", "teacher"), SHAPES[args.task]):
        write_config(runs / name, shape, sizes_of(args)["context"])
    summaries: dict[Item, dict] = {}

    def work(item: Item) -> None:
        folder = item.folder(runs)
        finished = (folder / "summary.json").exists()
        if finished or args.jobs:
            script, more = OBJECTIVES[args.task][item.method]
            summaries[item] = study.train(script, folder, flags_of(item, args, runs), more)
            print("" if finished else f"{folder.name}: done\n", end="", flush=True)

    for items in rounds_of(args):
        study.side_by_side(work, items, args.jobs)
    return summaries


def lines_of(item: Item, task: str, summary: dict) -> list[dict]:
    """A line for each way that a run's model was asked for samples."""
    facts = {name: summary[name] for name in FACTS}
    own = {name: value for name, value in summary["args"].items() if name in KEPT_ARGS}
    lines = []
    for column, words in COLUMNS.items():
        if column in summary:
            metrics = {name: value for name, value in summary[column].items() if isinstance(value, (int, float))}
            about = {"task": task, "method": item.method + words, "kind": item.kind, "seed": item.seed}
            lines.append({**about, **metrics, **facts, "args": own})
    return lines


def main(args: Args) -> None:
    """Makes the runs that are missing; then lines, table, figure."""
    summaries = make_runs(args, Path(args.runs) / args.task)
    *_, judged = rounds_of(args)
    methods = list(OBJECTIVES[args.task])
    kinds = ("pretraining", "finetuning")
    order = sorted(judged, key=lambda item: (kinds.index(item.kind), methods.index(item.method), item.seed))
    lines = []
    for item in order:
        if item in summaries:
            lines += lines_of(item, args.task, summaries[item])
    path = Path(args.output_dir) / f"pareto_{args.task}.jsonl"
    study.write_lines(path, lines)
    report(lines)
    if lines:
        study.draw_figure(path.with_suffix(".png"), partial(draw, lines), 2, (12, 4.4), share_y=True)


def report(lines: list[dict]) -> None:
    """The table over seeds, a line a kind and method."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault((line["kind"], line["method"]), []).append(line)
    names = [name for name in METRICS if any(name in line for line in lines)]
    rows = []
    for (kind, method), group in groups.items():
        cells = []
        for name in names:
            values = [line.get(name) for line in group]
            mean, _ = study.mean_and_std(values)
            digits = 4 if mean is not None and abs(mean) < 0.1 else 3
            cells.append(study.plus_minus(values, digits))
        rows.append([f"{kind}: {method}", *cells])
    study.print_table(["run", *names], rows)


def block(results: Path, kind: str) -> str:
    """A table of docs/conditional_pretrain.md (`python -m tests.pages`): the toy's runs of a kind,
    mean and standard deviation over seeds, and where they are from.

    KL is the difference to that of the same seed's MLE model from the start, as teachers differ.
    Raises KeyError where the result file has no such run.
    """
    lines = study.read_lines(results / "pareto_toy.jsonl")
    plain = {line["seed"]: line for line in lines if (line["method"], line["kind"]) == ("MLE", "pretraining")}
    groups: dict[str, list[dict]] = {}
    for line in lines:
        if line["kind"] == kind:
            over_mle = line["kl_to_teacher"] - plain[line["seed"]]["kl_to_teacher"]
            groups.setdefault(line["method"], []).append(line | {"over_mle": over_mle})
    if not groups:
        raise KeyError(kind)
    rows = []
    for method, group in groups.items():
        asked = next((words for words in COLUMNS.values() if words and method.endswith(words)), "")
        name = method.removesuffix(asked)
        cells = []
        for metric, digits in PAGE_COLUMNS.values():
            values = [line.get(metric) for line in group]
            cells.append(study.plus_minus(values, digits).replace("+-", "±") if any(values) else "0")
        rows.append([PAGE_NAMES.get(name, name) + asked, *cells])
    seeds = ", ".join(str(seed) for seed in sorted(plain))
    table = ["| " + " | ".join(row) + " |" for row in (["", *PAGE_COLUMNS], ["---"] * (len(PAGE_COLUMNS) + 1), *rows)]
    return "\n".join([f"Seeds {seeds}; {source_of('pareto_toy.jsonl', lines)}.", "", *table])


def draw(lines: list[dict], axes: list) -> None:
    """Misalignment over both measures of capability: filled from the start, hollow after half of
    MLE, small where d or beta is not the default.
    """
    capabilities = {
        "kl_to_teacher": "KL(teacher || model), nats per sequence",
        "perplexity_good": "held-out perplexity per token, good segments",
    }
    methods = [method for method in dict.fromkeys(line["method"] for line in lines) if method in study.METHODS]
    for axis, (name, label) in zip(axes, capabilities.items()):
        for method in methods:
            look, default = study.look_of(method), method in DEFAULTS
            for kind, face in (("pretraining", look["color"]), ("finetuning", "none")):
                group = [line for line in lines if (line["method"], line["kind"]) == (method, kind)]
                points = [(line[name], line["misalignment"]) for line in group if line.get(name) is not None]
                colours = {"facecolors": face, "edgecolors": look["color"]}
                legend = method if default and kind == "pretraining" else None
                place = zip(*points) if points else ([], [])
                axis.scatter(*place, marker=look["marker"], s=36 if default else 12, **colours, label=legend)
        axis.set_xlabel(label)
    axes[0].set_ylabel("misalignment: mean score of samples")
    title = "filled: from the start\nhollow: after MLE"
    if not DEFAULTS.issuperset(methods):
        title += "\nsmall: another d or beta"
    axes[1].legend(title=title, loc="upper left", bbox_to_anchor=(1.02, 1))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
