"""Misalignment against capability: six ways to pretrain on a scored corpus, each from the start and each as the second half after plain MLE.

    python -m experiments.pareto                          the toy corpus, three seeds; go on after an interruption with the same command
    python -m experiments.pareto --task pep8 --jobs 3     a tiny model on Python's standard library, one seed
    python -m experiments.pareto --task pep8 --data code/ --model gpt2-small --teacher-model gpt2-medium/ --context 1024 --vocabulary 50000 \
        --batch-size 64 --lr 8e-4 --tokens 3.3e9 --samples 4096
                                                          the paper's size, on a GPU: a folder of .py files, a folder with a larger config.json

Capability is KL(teacher || model), the teacher being a larger MLE model that is trained first, and held-out perplexity. Run folders stay in
`--runs`: a finished run is not made again, one that was interrupted goes on, and the teacher and the MLE half are used from there. Every run's line
goes to results/pareto_<task>.jsonl; table and figure are drawn from the lines of this command's runs.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Objective -> script and its flags, on pep8 the paper's.
OBJECTIVES = {
    "toy": {
        "MLE": ("mle_pretrain.py", ""),
        "filtering": ("filtered_pretrain.py", ""),
        "conditional": ("conditional_pretrain.py", ""),
        "unlikelihood": ("unlikelihood_pretrain.py", ""),
        "RWR": ("rwr_pretrain.py", ""),
        "RWR, beta 10": ("rwr_pretrain.py", "--beta 10"),
        "AWR": ("awr_pretrain.py", ""),
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
SIZES = {  # what a run is given where the command line says nothing
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
SHAPES = {
    "toy": ((2, 2, 64), (2, 4, 128)),
    "pep8": ((2, 2, 64), (3, 3, 96)),
}  # layers, heads, width: of the model and of the teacher
COLUMNS = {"after": "", "after_bad": ", asked for bad", "after_no_token": ", not asked"}
NUMBERS = (
    "misalignment",
    "expected_max",
    "kl_to_teacher",
    "perplexity",
    "perplexity_good",
    "right_share",
    "sample_tokens",
    "self_bleu",
)


@dataclass
class Args:
    task: Literal["toy", "pep8"] = "toy"
    """The corpus."""
    data: str = ""
    """Source folder for pep8; empty: the standard library."""
    seeds: tuple[int, ...] = ()
    """Seeds; empty: 0 1 2 on the toy, 0 on pep8."""
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
    half: bool = True
    """Also the finetuning comparison: MLE for half of the tokens, then each objective for the rest."""
    jobs: int = 1
    """Runs side by side, one thread each; 0: none is made, table and figure show those that are finished."""
    runs: str = "runs/pareto"
    """Where run folders are kept."""
    output_dir: str = "results"
    """Where lines and figure go."""


def config_folder(folder: Path, shape: tuple[int, int, int], context: int) -> str:
    """A folder whose config.json describes a GPT-2 type of this shape, without dropout."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = dict(zip(("n_layer", "n_head", "n_embd"), shape)) | dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": context, **sizes}))
    return str(folder)


def make(runs: Path, name: str, script: str, flags: dict, method: str = "") -> dict:
    """The summary of a run, which is made, or gone on with, where it is not finished."""
    folder = runs / name
    if not (folder / "summary.json").exists():
        flags = flags | {"eval_every": 10**6, "name": name, "output_dir": runs}
        words = [
            word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", str(value))
        ] + method.split()
        words = ["--resume", str(folder)] if (folder / "args.json").exists() else words
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{script} {' '.join(words)} failed: {done.stderr.strip()[-500:]}")
        print(f"{name}: done", flush=True)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def main(args: Args) -> None:
    """Makes the runs that are missing, in three rounds since later ones need earlier ones; then lines, table, figure."""
    runs, task = Path(args.runs) / args.task, args.task
    given = {
        key: value
        for key in ("tokens", "context", "vocabulary", "batch_size", "lr", "samples")
        if (value := getattr(args, key))
    }
    sizes = {"task": task, **({"data": args.data} if args.data else {}), **SIZES[task], **given}
    small, large = (
        config_folder(runs / name, shape, sizes["context"]) for name, shape in zip(("model", "teacher"), SHAPES[task])
    )
    sizes["max_new_tokens"] = sizes["context"] - 2
    seeds = args.seeds or ((0, 1, 2) if task == "toy" else (0,))
    objectives, found = OBJECTIVES[task], {}

    def work(item: tuple) -> None:
        kind, name, seed = item
        script, method = objectives[name]
        slug = f"{kind}-{name.lower().replace(', ', '-').replace(' ', '')}-seed{seed}"
        flags, plain = {**sizes, "model": args.model or small, "seed": seed}, {"samples": 0, "baseline": "none"}
        teacher = {"teacher": runs / f"teacher-mle-seed{seed}", "baseline": "none"}
        if kind == "teacher":
            flags |= plain | {"model": args.teacher_model or large}
        elif task != "toy":
            flags["tokenizer"] = teacher["teacher"]  # trained once
        if kind == "half":
            flags |= plain | {"tokens": sizes["tokens"] / 2}
        elif kind == "pretraining":
            flags |= teacher
        elif kind == "finetuning":
            flags |= teacher | {"tokens": sizes["tokens"] / 2, "init": runs / f"half-mle-seed{seed}"}
        if args.jobs or (runs / slug / "summary.json").exists():
            found[item] = make(runs, slug, script, flags, method)

    kinds = ("pretraining", "finetuning")[: 1 + args.half]
    judged = [
        (kind, name, seed)
        for seed in seeds
        for kind in kinds
        for name in objectives
        if kind == "pretraining" or name != "RWR, beta 10"
    ]
    for wave in (
        [("teacher", "MLE", seed) for seed in seeds],
        [("half", "MLE", seed) for seed in seeds if args.half],
        judged,
    ):
        with ThreadPoolExecutor(max(1, args.jobs)) as pool:
            list(pool.map(work, wave))

    lines = []
    for kind, name, seed in sorted(
        found.keys() & set(judged), key=lambda item: (kinds.index(item[0]), list(objectives).index(item[1]), item[2])
    ):
        summary = found[kind, name, seed]
        about = {
            key: summary[key]
            for key in ("git_commit", "device", "threads", "versions", "tokens_per_second", "seconds", "data_sha256")
        }
        own = {
            k: v
            for k, v in summary["args"].items()
            if k
            in {"tokens", "context", "lr", "batch_size", "alpha", "beta", "drop", "threshold", "threshold_quantile"}
        }
        for column in (c for c in COLUMNS if c in summary):
            values = {k: v for k, v in summary[column].items() if isinstance(v, (int, float))}
            lines.append(
                {
                    "task": task,
                    "method": name + COLUMNS[column],
                    "kind": kind,
                    "seed": seed,
                    **values,
                    **about,
                    "args": own,
                }
            )
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    path = Path(args.output_dir) / f"pareto_{task}"
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    report(lines, path.with_suffix(".png"))


def mean_and_spread(values: list[float]) -> str:
    """ "mean +- standard deviation"."""
    found = torch.tensor(values, dtype=torch.float64)
    digits = 4 if found.mean().abs() < 0.1 else 3
    return f"{found.mean():.{digits}f}" + (f" +- {found.std():.{digits}f}" if len(found) > 1 else "")


def report(lines: list[dict], figure_path: Path) -> None:
    """The table over seeds, and misalignment over both measures of capability: filled from the start, hollow after half of MLE."""
    numbers = [n for n in NUMBERS if any(n in line for line in lines)]
    print(f"\n{'':42}" + "".join(f"{name:>19}" for name in numbers))
    groups = dict.fromkeys((line["kind"], line["method"]) for line in lines)
    for kind, method in groups:
        mine = [line for line in lines if (line["kind"], line["method"]) == (kind, method)]
        cells = (
            mean_and_spread([line[n] for line in mine if line.get(n) is not None])
            if any(line.get(n) is not None for line in mine)
            else "-"
            for n in numbers
        )
        print(f"{kind + ': ' + method:42}" + "".join(f"{cell:>19}" for cell in cells))
    try:
        import matplotlib
    except ImportError:
        print("No figure: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    names = [name for name in dict.fromkeys(line["method"] for line in lines) if not name.endswith(", asked for bad")]
    for axis, key, label in zip(
        axes,
        ("kl_to_teacher", "perplexity_good"),
        ("KL(teacher || model), nats per sequence", "held-out perplexity, good segments"),
    ):
        for number, name in enumerate(names):
            for kind, filled in (("pretraining", True), ("finetuning", False)):
                mine = [
                    line
                    for line in lines
                    if (line["method"], line["kind"]) == (name, kind) and line.get(key) is not None
                ]
                colour = f"C{number}"
                axis.scatter(
                    [line[key] for line in mine],
                    [line["misalignment"] for line in mine],
                    marker="osD^vP*X<>"[number % 10],
                    s=36,
                    facecolors=colour if filled else "none",
                    edgecolors=colour,
                    label=name if filled else None,
                )
        axis.set_xlabel(label)
    axes[0].set_ylabel("misalignment: mean score of samples")
    axes[1].legend(
        fontsize=8, title="filled: from the start\nhollow: after MLE", loc="upper left", bbox_to_anchor=(1.02, 1)
    )
    figure.tight_layout()
    figure.savefig(figure_path, dpi=110)
    plt.close(figure)
    print(f"Figure: {figure_path}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
