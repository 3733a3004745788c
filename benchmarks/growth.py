"""What a training step costs as lines grow longer, batches larger, rows more, vocabularies wider:
nothing but attention may grow with a square.

    python -m benchmarks.growth            about five CPU minutes; writes results/growth.json, .png
    python -m benchmarks.growth --quick    small sizes, no file: does it run?

CPU seconds of one thread, the least of a few repeats. A step is dpo.py's own: batch, loss, backward
pass, clipping, AdamW. Of longer lines attention is measured by leaving it out: the mask that a
batch holds, [lines, length, length], and in the model the products of queries, keys and values.
Rows are read and encoded, planned, given columns and passed through Run.predict with a function
that computes nothing. The exponent is the slope of the least-squares line through the logarithms of
the last four points: 1 is linear, 2 quadratic.
"""

import contextlib
import json
import math
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python benchmarks/growth.py

import dpo
from benchmarks.inputs import EOS, PAD, llama_shape, random_rows
from common import InputError, batches, data
from common.files import write_json
from common.run import Run
from report.facts import git_commit, machine
from toy import world

FOLDER = Path(__file__).resolve().parent
VOCABULARY, LONGEST = 4096, 8192


@dataclass
class Args:
    repeats: int = 3
    """Times that each point is measured; the least counts."""
    output: Path | None = None
    """Where the numbers go, and the plot beside them; None: benchmarks/results/growth.json, and no
    file with --quick."""
    quick: bool = False
    """A smoke test: small sizes, one repeat."""


# -- what is measured


def least_seconds(work, repeats: int) -> float:
    """CPU seconds of `work()`, the least of the repeats; a first call is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def no_attention(module, query, key, value, attention_mask, **_):
    """Attention left out: each token keeps a value, and queries and keys their gradients."""
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return (value + 0.0 * (query + key.repeat_interleave(query.shape[1] // key.shape[1], dim=1))).transpose(1, 2), None


def build(vocabulary: int, attention: str = "sdpa"):
    """A small Llama type with random weights."""
    transformers.AttentionInterface.register("none", no_attention)
    torch.manual_seed(0)
    ends = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    shape = llama_shape(128, 352, layers=2, heads=2) | {"vocab_size": vocabulary, "max_position_embeddings": LONGEST}
    config = transformers.LlamaConfig(**shape, **ends, tie_word_embeddings=True)
    config._attn_implementation = attention
    return transformers.LlamaForCausalLM(config).train()


def batch_of(rows: list[dict]) -> dict:
    """dpo's batch of rows in the shared layout, with reference columns."""
    batch = batches.collate(rows, PAD, "shared", "cpu")
    return batch | dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), torch.zeros(len(rows)))


def step_of(model, rows: list[dict], ready: dict | None = None):
    """A function that makes one whole step; `ready`: a batch in place of one made anew."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        loss, _ = dpo.compute_loss(model, ready or batch_of(rows), 0.1)
        (loss / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_length(length: int, repeats: int) -> dict[str, float]:
    """A step on one pair of so many tokens: whole, its batch with the mask, and the rest."""
    rows = random_rows((length // 2, length // 4, length // 4), VOCABULARY, 1)
    rest = least_seconds(step_of(build(VOCABULARY, "none"), rows, batch_of(rows)), repeats)
    whole = least_seconds(step_of(build(VOCABULARY), rows), repeats)
    collate = least_seconds(partial(batch_of, rows), repeats)
    segments = torch.zeros(1, length, dtype=torch.int64)
    mask = least_seconds(partial(batches.attention_mask, segments, "shared"), repeats)
    parts = {"whole step": whole, "attention and its mask": max(whole - rest - (collate - mask), 1e-9)}
    return parts | {"without attention": rest + max(collate - mask, 0.0)}


def by_batch(pairs: int, repeats: int) -> dict[str, float]:
    """A step on so many pairs of 128 tokens."""
    return {
        "whole step": least_seconds(step_of(build(VOCABULARY), random_rows((64, 32, 32), VOCABULARY, pairs)), repeats)
    }


def by_vocabulary(words: int, repeats: int) -> dict[str, float]:
    """A step on two pairs of 128 tokens with so many embeddings."""
    return {"whole step": least_seconds(step_of(build(words), random_rows((64, 32, 32), words, 2)), repeats)}


def by_rows(count: int, repeats: int) -> dict[str, float]:
    """What is done once for all rows: an epoch's plan, columns, a pass that computes nothing."""
    rng = random.Random(0)
    rows = batches.Rows(
        {"prompt": [5] * rng.randint(4, 64), "completions": [[6] * rng.randint(1, 32), [7] * rng.randint(1, 32)]}
        for _ in range(count)
    )
    run = Run.__new__(Run)
    run._args, run.device, run.dtype = SimpleNamespace(micro_batch_size=32), torch.device("cpu"), torch.float32

    def plan() -> None:
        batches.planned_rows(rows, batches.plan_batches(rows, 32, 1.0, -1, 0))

    def columns() -> None:
        rows.add_columns(("a", "b"), torch.zeros(count, 2))
        rows.columns("a", "b")

    def predict() -> None:
        run.predict(lambda numbers: torch.zeros(2 * len(numbers)), list, rows)

    works = {"plan": plan, "columns": columns, "predict": predict}
    return {name: least_seconds(work, 4 * repeats) for name, work in works.items()}


def by_file(count: int, repeats: int) -> dict[str, float]:
    """A file of so many rows is read, checked, split, encoded and hashed."""
    rng, tokenizer, questions = random.Random(0), world.build_tokenizer(), world.questions()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w") as file:
            for number in range(count):
                question = rng.choice(questions)
                answers = {f" {world.corpus_answer(question, rng)} {'a b'[: 1 + 2 * i]}" for i in range(2)}
                prompt, (chosen, rejected) = f"{number} {world.prompt_of(question)}", sorted(answers)
                file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
        load = partial(data.load_pairs, str(path), None, 0.1, 0, tokenizer, 1024, say=lambda words: None)
        return {"read and encode": least_seconds(load, repeats)}


GROWTH = {  # what doubles -> (how it is measured, sizes, sizes of --quick, what the axis says)
    "length": (by_length, [256, 512, 1024, 2048, 4096], [64, 128, 256, 512], "tokens of a pair's line"),
    "batch": (by_batch, [1, 2, 4, 8, 16, 32], [1, 2, 4, 8], "pairs in a step"),
    "vocabulary": (by_vocabulary, [2**n for n in range(12, 18)], [256, 512, 1024, 2048], "words in the vocabulary"),
    "rows": (by_rows, [6250 * 2**n for n in range(5)], [100, 200, 400, 800], "rows"),
    "file": (by_file, [500 * 2**n for n in range(5)], [50, 100, 200, 400], "rows of a file"),
}


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of the least-squares line through the logarithms of the last four points."""
    x, y = ([math.log(value) for value in values[-4:]] for values in (sizes, seconds))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y)) / sum((a - middle_x) ** 2 for a in x)


# -- all


def measure(args: Args) -> dict:
    """Sizes, seconds and exponents of everything that doubles; prints each."""
    found = {}
    for name, (by_size, sizes, quick, _) in GROWTH.items():
        sizes = quick if args.quick else sizes
        points = [by_size(size, 1 if args.quick else args.repeats) for size in sizes]
        curves = {part: [point[part] for point in points] for part in points[0]}
        slopes = {part: exponent(sizes, seconds) for part, seconds in curves.items()}
        found[name] = {"sizes": sizes, "cpu_seconds": curves, "exponents": slopes}
        for part, seconds in curves.items():
            words = " ".join(f"{value:.3g}" for value in seconds)
            print(
                f"{name:>10} {sizes[0]:,} to {sizes[-1]:,}, {part}: {words} s; exponent {slopes[part]:.2f}", flush=True
            )
    return found


def draw(found: dict, path: Path) -> None:
    """A panel for each thing that doubles, both axes logarithmic, beside lines of slope 1 and 2."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    looks = [("black", "-", "o"), ("0.35", "--", "s"), ("0.55", "-.", "^")]
    figure, grid = plt.subplots(1, len(found), figsize=(4 * len(found), 3.8), layout="constrained")
    for axes, (name, lines) in zip(grid, found.items()):
        sizes = lines["sizes"]
        values = [value for seconds in lines["cpu_seconds"].values() for value in seconds]
        top, bottom = max(values), min(values)
        for slope in (1, 2):
            guide = [top * (size / sizes[-1]) ** slope for size in sizes]
            axes.plot(sizes, guide, color="0.8", linestyle=":", zorder=0)
            place = next(i for i, value in enumerate(guide) if value >= bottom)
            axes.annotate(f"slope {slope}", (sizes[place], guide[place]), color="0.5", fontsize=8)
        for (part, seconds), (color, style, mark) in zip(lines["cpu_seconds"].items(), looks):
            label = f"{part} ({lines['exponents'][part]:.2f})"
            axes.plot(sizes, seconds, color=color, linestyle=style, marker=mark, markersize=4, label=label)
        axes.set(xscale="log", yscale="log", xlabel=GROWTH[name][3], ylabel="CPU seconds, one thread")
        axes.set_ylim(bottom / 1.6, 1.6 * top)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
        axes.minorticks_off()
        axes.legend(title="exponent in brackets", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    """Measures, prints, and writes numbers and plot."""
    if args.repeats < 1:
        raise InputError("--repeats must be at least 1.")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    output = args.output or (None if args.quick else FOLDER / "results" / "growth.json")
    found = measure(args)
    if output:
        about = {"command": " ".join(["python -m benchmarks.growth", *sys.argv[1:]]), "commit": git_commit()}
        about |= {name: value for name, value in machine(torch.device("cpu")).items() if name in ("versions", "device")}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, about | {"growth": found})
        with contextlib.suppress(ImportError):  # a package for development
            draw(found, output.with_suffix(".png"))
        print(f"Written to {output}.")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
