"""Pretraining steps of mle_pretrain.py beside a plain PyTorch loop and transformers' Trainer: the
same model, chunks and optimiser.

    python benchmarks/pretraining.py           two sizes, three systems; needs accelerate
    python benchmarks/pretraining.py --tiny    a few steps: do they compute the same?

    ours       mle_pretrain.py's loop over the helpers of common/run.py: micro-batches, metrics,
               a line in metrics.jsonl every ten steps
    plain      model(ids).logits, cross-entropy, backward, clipping, step; nothing is logged
    trainer    transformers' Trainer, logging every ten steps

Each runs in a fresh process, in turns. All have fused AdamW, the same rate, clipping at 1 and no
dropout; the first step's loss must agree to float32 rounding. Speed is tokens a second of the
processor, over all steps but the first two.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python benchmarks/pretraining.py

from benchmarks.inputs import word_tokenizer
from benchmarks.pairs import versions
from common import InputError
from common.files import write_json
from report.facts import device_name, git_commit

FOLDER = Path(__file__).resolve().parent
SIZES = {"tiny": (512, 64), "mini": (4096, 128)}  # vocabulary, context
BATCH, LR, WARM = 32, 1e-3, 2


@dataclass
class Args:
    sizes: tuple[Literal["tiny", "mini"], ...] = ("tiny", "mini")
    """Models of mle_pretrain.py: tiny (vocabulary 512, context 64), mini (4,096 and 128)."""
    systems: tuple[Literal["ours", "plain", "trainer"], ...] = ("ours", "plain", "trainer")
    """Who takes part; trainer needs the package accelerate."""
    steps: int = 60
    """Steps of each process."""
    repeats: int = 3
    """Fresh processes of each system and size."""
    output: Path | None = None
    """File for the results; None: benchmarks/results/pretraining-cpu.json, no file with --tiny."""
    tiny: bool = False
    """A smoke test: the tiny size, six steps, one process each."""
    job: str = ""
    """What one process does, as JSON: the command starts itself with it."""


# -- the systems


@dataclass
class Clock:
    """Losses of the steps, and the processor's time at the end of each."""

    losses: list
    ends: list

    def end_step(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach())
        self.ends.append(time.process_time())


def make_model(size: str):
    """(model with random weights, chunks of random ids [steps * batch, context])."""
    from pretraining.models import new_model

    vocabulary, context = SIZES[size]
    return new_model(size, word_tokenizer(vocabulary), context, seed=0).train()


def optimizer_of(model):
    """AdamW as mle_pretrain.py has it."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, weight_decay=0.1, fused=True)


class InMemory:
    """Chunks of tokens [chunks, context] as `pretraining.chunks.Chunks` gives them, with scores of
    0.
    """

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __getitem__(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.ids[numbers]
        return ids, torch.zeros(ids.shape)


def run_ours(size: str, chunks: torch.Tensor, clock: Clock) -> None:
    """mle_pretrain.main's loop over these chunks."""
    import mle_pretrain
    from common.run import start_run
    from pretraining.chunks import batch_of

    steps, targets = len(chunks) // BATCH, chunks.shape[1] - 1
    with tempfile.TemporaryDirectory() as folder:
        args = mle_pretrain.Args(model=size, output_dir=folder, name="run", lr=LR, batch_size=BATCH)
        run, args = start_run(args, mle_pretrain.__file__)
        model = make_model(size)
        run.prepare(model, dynamic=None)
        run.pin_sources("", "")
        batch = partial(batch_of, {"train": InMemory(chunks)}, {}, run.device, "train")
        optimizer = optimizer_of(model)
        for step, numbers_of_step in run.steps(torch.arange(len(chunks)).view(steps, BATCH).tolist()):
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate(step)
            for numbers, weight in run.micro_batches(numbers_of_step):
                with run.autocast():
                    loss, sums = mle_pretrain.compute_loss(model, batch(numbers), threshold=0.0)
                (loss * weight / (len(numbers_of_step) * targets)).backward()
                run.accumulate(sums, weight)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            run.end_step(BATCH * targets, BATCH * (targets + 1), grad_norm)
            clock.end_step(loss / (BATCH * targets))


def run_plain(size: str, chunks: torch.Tensor, clock: Clock) -> None:
    """What one writes first."""
    model = make_model(size)
    optimizer = optimizer_of(model)
    for ids in chunks.split(BATCH):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.end_step(loss)


def run_trainer(size: str, chunks: torch.Tensor, clock: Clock) -> None:
    """transformers' Trainer over these chunks, in their order."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    losses = []

    class InOrder(Trainer):
        def _get_train_sampler(self, *_args, **_kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            losses.append(super().compute_loss(*args, **kwargs))
            return losses[-1]

    class Timer(TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            clock.end_step(losses[-1])

    labels = chunks.index_fill(1, torch.tensor([0]), -100)  # the first has no prediction, and the Trainer counts it
    rows = [{"input_ids": ids, "labels": of_ids} for ids, of_ids in zip(chunks, labels)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = {"output_dir": folder, "per_device_train_batch_size": BATCH, "num_train_epochs": 1, "use_cpu": True}
        settings |= {"optim": "adamw_torch_fused", "learning_rate": LR, "weight_decay": 0.1, "max_grad_norm": 1.0}
        settings |= {"logging_steps": 10, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        arguments = TrainingArguments(**settings)
        InOrder(model=make_model(size), args=arguments, train_dataset=rows, callbacks=[Timer()]).train()


def work(job: dict) -> dict:
    """What one process measures."""
    torch.set_num_threads(1)
    vocabulary, context = SIZES[job["size"]]
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randint(2, vocabulary, (job["steps"] * BATCH, context), generator=generator)
    clock = Clock([], [])
    {"ours": run_ours, "plain": run_plain, "trainer": run_trainer}[job["system"]](job["size"], chunks, clock)
    spent = (clock.ends[-1] - clock.ends[WARM - 1]) / (len(clock.ends) - WARM)
    losses = [loss.item() for loss in clock.losses]
    return {"tokens_per_processor_second": BATCH * context / spent, "losses": [losses[0], losses[-1]]}


# -- the comparison


def start_process(system: str, size: str, steps: int) -> dict:
    """One job in a fresh process."""
    job = json.dumps({"system": system, "size": size, "steps": steps})
    process = subprocess.run([sys.executable, __file__, "--job", job], capture_output=True, text=True)
    if process.returncode:
        raise InputError(f"{system} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def measure(args: Args, size: str) -> dict:
    """All systems in turns: their runs, medians, and ours as a ratio to the others."""
    runs: dict[str, list[dict]] = {system: [] for system in args.systems}
    for _ in range(args.repeats):
        for system in args.systems:
            runs[system].append(start_process(system, size, args.steps))
    speeds = {name: [run["tokens_per_processor_second"] for run in runs[name]] for name in runs}
    entry = {"size": size, "median": {name: statistics.median(values) for name, values in speeds.items()}}
    first = [run["losses"][0] for name in runs for run in runs[name]]
    entry["disagree"] = not max(first) - min(first) <= 1e-4
    for name in speeds.keys() - {"ours"} if "ours" in speeds else ():
        ratios = [ours / other for ours, other in zip(speeds["ours"], speeds[name])]
        entry[f"times_{name}"] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return entry | {"runs": runs}


def main(args: Args) -> int:
    """Measures, prints, writes the file; returns the exit status."""
    if args.job:
        print(json.dumps(work(json.loads(args.job))))
        return 0
    if args.tiny:
        args = replace(args, sizes=("tiny",), steps=6, repeats=1)
    if args.steps <= WARM or args.repeats < 1:
        raise InputError(f"--steps must be above {WARM} and --repeats at least 1.")
    about = {
        "command": " ".join(["python", "benchmarks/pretraining.py", *sys.argv[1:]]),
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": device_name(torch.device("cpu")),
        "versions": versions(),
        "threads": 1,
        "steps": args.steps,
    }
    results = []
    for size in args.sizes:
        results.append(entry := measure(args, size))
        speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in entry["median"].items())
        print(f"{size}: {speeds} tokens a processor second.", flush=True)
        if entry["disagree"]:
            print(f"  NOT THE SAME: first losses { {n: r[0]['losses'][0] for n, r in entry['runs'].items()} }")
    output = args.output or (None if args.tiny else FOLDER / "results" / "pretraining-cpu.json")
    if output:
        write_json(output, about | {"results": results})
        print(f"Written to {output}.")
    return 1 if any(entry["disagree"] for entry in results) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
