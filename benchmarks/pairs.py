"""DPO's training step against TRL's: the same model, token ids, batches and steps through dpo.py's
own functions and through TRL's DPOTrainer.

    python benchmarks/pairs.py             everything, an hour and a half on four cores; needs trl
    python benchmarks/pairs.py --tiny      a tiny model, three short steps: do the two agree?
    python benchmarks/pairs.py --profile   where the time of our own step goes, by kind of work

Three systems take turns, each time in a fresh process, so that a peak of memory is its own and a
slow spell of the machine hits all alike:

    ours         dpo.py: the reference computed once before training, the prompt once for both
                 answers, logits for completion tokens only; compiled: with its --compile
    TRL          DPOTrainer as it comes: gradient checkpointing, the reference at every step
    TRL, tuned   no gradient checkpointing, the reference's log-probabilities precomputed

TRL gets the very token ids: its own tokenisation, which would add an EOS, and its shuffling are
switched off. Optimiser (fused AdamW, no weight decay), learning rate (linear decay without
warm-up), clipping, beta and dropout (none) are the same. The loss, the gradient norm and the
log-probability of every sequence in the first step must agree to float32 rounding; where they do
not, it says so and exits with status 1. Where bfloat16 is among --dtypes every system runs in each:
float32 weights, products under autocast. Its numbers must agree within bfloat16's noise.

Share of the matrix rate: operations of a step that a loss needs (`useful_flops`) in a second of
the processor, over those of one large product in the same process.

Times are those of whole steps, collation and all, after a first one that is not counted. A
reference computed before training adds its share: the time of one batch, once over one epoch.
Tokens are prompt + completion of both answers, no padding, however a system lays them out. Memory
is the largest resident size of the process (of the allocator on a GPU) above what it was when the
model had been loaded, and that without gradients and AdamW's two moments; a reference model kept in
memory counts.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python benchmarks/pairs.py

from benchmarks.inputs import SHAPES, make_batches, save_model
from benchmarks.systems import Job
from common import InputError
from common.files import write_json
from report.facts import device_name, git_commit

FOLDER = Path(__file__).resolve().parent
SYSTEMS = {"ours": "ours", "ours-compiled": "ours, compiled", "trl": "TRL", "trl-tuned": "TRL, tuned"}
MEASURED = (
    "step_seconds",
    "step_processor_seconds",
    "reference_seconds_per_step",
    "tokens_per_second",
    "tokens_per_processor_second",
    "peak_bytes",
    "above_model_bytes",
    "above_training_state_bytes",
)


@dataclass
class Args:
    models: tuple[str, ...] = ("gpt2-small", "llama-19m")
    """Random weights: gpt2-small (124M), llama-19m and llama-135m (vocabulary 49,152), tiny."""
    shapes: tuple[str, ...] = ("prompt-heavy", "even", "completion-heavy", "hh")
    """prompt-heavy, even, completion-heavy, short, long, tiny; hh: real ones (PREFERENCE_DATA)."""
    systems: tuple[Literal["ours", "ours-compiled", "trl", "trl-tuned"], ...] = ("ours", "trl", "trl-tuned")
    """Who takes part; without TRL's two it need not be installed."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Of matrix products."""
    batch_size: int = 8
    """Pairs in a step."""
    steps: int = 3
    """Steps that are timed, after one that is not."""
    repeats: int = 3
    """Fresh processes of each system for each model and shape."""
    threads: int = 0
    """CPU threads; 0: torch's own choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    output: Path | None = None
    """File for the results; None: benchmarks/results/pairs-<device>.json, and no file with --tiny
    or --profile."""
    tiny: bool = False
    """A smoke test: the tiny model, tiny rows, one repeat, two steps."""
    profile: bool = False
    """Time of our own step by kind of work, instead of the comparison."""


# -- one model and one shape of rows


def key_of(system: str, dtype: str) -> str:
    """The name of a system's results: those in bfloat16 say so."""
    return system if dtype == "float32" else f"{system}-{dtype}"


def name_of(key: str) -> str:
    """The same for people."""
    system = key.removesuffix("-bfloat16")
    return SYSTEMS[system] + (", bfloat16" if key != system else "")


def start_process(job: Job) -> list[dict]:
    """Runs a job in a fresh process and returns the JSON objects that it printed."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    if job.threads:
        environment["OMP_NUM_THREADS"] = str(job.threads)
    if job.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(FOLDER / "systems.py"), json.dumps(vars(job))]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        raise InputError(f"{name_of(job.system)} failed:\n{process.stderr[-3000:]}")
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


def measure(args: Args, model: str, shape: str, folder: str, rows: Path) -> dict[str, list[dict]]:
    """What the processes of each system measured; all systems take turns in every round."""
    entries = [(system, dtype) for system in args.systems for dtype in args.dtypes]
    results: dict[str, list[dict]] = {key_of(*entry): [] for entry in entries}
    for repeat in range(args.repeats):
        for system, dtype in entries:
            job = Job(system, folder, str(rows), args.batch_size, args.threads, args.device, dtype, args.profile)
            *profiles, result = start_process(job)
            results[key_of(system, dtype)].append(result)
            if profiles:
                print_profile(f"{model}, {dtype}", shape, profiles[0])
            else:  # a line at once, so that a long run that is stopped has said something
                seconds = result["step_seconds"] + result["reference_seconds_per_step"]
                words = (
                    f"{model}, {shape}, {name_of(key_of(system, dtype))}, round {repeat + 1}: {seconds:.2f} s a step"
                )
                print(words, file=sys.stderr, flush=True)
    return results


def disagreements(results: dict[str, list[dict]]) -> list[str]:
    """What differs in the first step by more than float32 rounding, in words.

    Every run is compared with our first one.
    """
    sentences, expected = [], results[next(iter(results))][0]
    for system, runs in results.items():
        for run in runs:
            rounding = 2000.0 if system.endswith("bfloat16") else 1.0
            sentences += [f"{name_of(system)}: {words}" for words in differences(run, expected, rounding)]
    return sorted(set(sentences))


def differences(run: dict, expected: dict, rounding: float = 1.0) -> list[str]:
    """The same of one run against another; nan agrees with nothing.

    rounding: how many times float32's may be.
    """
    sentences = []
    logps, expected_logps = run["first_logps"], expected["first_logps"]
    gap = max(abs(a - b) for a, b in zip(logps, expected_logps))
    tolerance = 1e-3 + rounding * 1e-6 * max(map(abs, expected_logps))
    if len(logps) != len(expected_logps) or not gap <= tolerance:
        sentences.append(f"a log-probability of the first step is off by {gap:.3g} nats.")
    loss, expected_loss = run["losses"][0], expected["losses"][0]
    if not abs(loss - expected_loss) <= (1e-4 if rounding == 1 else 1e-2):
        sentences.append(f"the first loss is {loss:.6f} and not {expected_loss:.6f}.")
    norm, expected_norm = run["first_grad_norm"], expected["first_grad_norm"]
    if not abs(norm - expected_norm) <= (1e-3 if rounding == 1 else 5e-2) * expected_norm:
        sentences.append(f"the first gradient norm is {norm:.6f} and not {expected_norm:.6f}.")
    return sentences


def spread(runs: list[dict], key: str) -> dict[str, float]:
    """Median and range."""
    values = [run[key] for run in runs]
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def summarise(results: dict[str, list[dict]]) -> dict:
    """Medians and ranges for each system, and ours as ratios to the others: how many times as fast,
    and what share of the memory.
    """
    table = {system: {key: spread(runs, key) for key in MEASURED} for system, runs in results.items()}
    for system, runs in results.items():
        if "share_of_matrix_rate" in runs[0]:
            table[system]["share_of_matrix_rate"] = spread(runs, "share_of_matrix_rate")
    for own, system in comparisons(table):
        ours, theirs = table[own], table[system]

        def ratio(key: str, ours=ours, theirs=theirs) -> float:
            return ours[key]["median"] / theirs[key]["median"]

        # Runs of one round stood next to each other in time, so their ratio is what the machine's
        # moods disturb least.
        runs = list(zip(results[own], results[system]))
        rounds = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in runs]
        # Other programs on the machine stretch the clock more than the work.
        work = [a["tokens_per_processor_second"] / b["tokens_per_processor_second"] for a, b in runs]
        ours |= {
            f"processor_times_{system}": statistics.median(work),
            f"processor_times_{system}_rounds": {"least": min(work), "most": max(work)},
            f"times_{system}": ratio("tokens_per_second"),
            f"times_{system}_rounds": {"least": min(rounds), "most": max(rounds)},
            f"work_of_{system}": ratio("step_processor_seconds"),
            f"memory_of_{system}": ratio("above_training_state_bytes"),
        }
    return table


def comparisons(table: dict) -> list[tuple[str, str]]:
    """Ours against each other system in the same dtype, and bfloat16, compiled too, against our
    float32.
    """
    pairs = []
    for dtype in ("float32", "bfloat16"):
        own, compiled = key_of("ours", dtype), key_of("ours-compiled", dtype)
        pairs += [(compiled, own), *((own, key_of(system, dtype)) for system in ("trl", "trl-tuned"))]
    pairs += [("ours-bfloat16", "ours"), ("ours-compiled-bfloat16", "ours")]
    return [pair for pair in pairs if set(pair) <= table.keys()]


# -- what is printed


def print_table(model: str, shape: str, table: dict) -> None:
    """One model and shape, a line for each system."""
    print(f"\n{model}, {shape} rows", flush=True)
    times = f"{'tokens/s':>10}{'(range)':>18}{'step':>9}{'reference':>11}"
    print(f"  {'':12}{times}{'peak':>9}{'above model':>13}{'above state':>13}")
    for system, row in table.items():
        speed = row["tokens_per_second"]
        speeds = f"{speed['least']:,.0f} to {speed['most']:,.0f}"
        seconds, reference = row["step_seconds"]["median"], row["reference_seconds_per_step"]["median"]
        keys = ("peak_bytes", "above_model_bytes", "above_training_state_bytes")
        peak, above_model, above_state = (row[key]["median"] / 2**30 for key in keys)
        times = f"{speed['median']:10,.0f}{speeds:>18}{seconds:7.2f} s{reference:9.2f} s"
        print(f"  {name_of(system):12}{times}{peak:5.2f} GiB{above_model:9.2f} GiB{above_state:9.2f} GiB")
        if share := row.get("share_of_matrix_rate"):
            print(f"  {'':12}{share['median']:.0%} of the measured matrix rate")
    for own, system in comparisons(table):
        ours, rounds = table[own], table[own][f"processor_times_{system}_rounds"]
        by_round = f"{rounds['least']:.2f} to {rounds['most']:.2f} by round"
        print(
            f"  {name_of(own)} is {ours[f'times_{system}']:.2f} times as fast as {name_of(system)} by the clock,"
            f" {ours[f'processor_times_{system}']:.2f} times by processor time ({by_round}),"
            f" with {ours[f'memory_of_{system}']:.2f} of its memory above weights, gradients and optimiser."
        )


def print_profile(model: str, shape: str, profile: dict) -> None:
    """The kinds of work of our step, the largest first."""
    seconds = {kind: spent for kind, spent in profile.items() if kind != "largest of the rest"}
    total = sum(seconds.values())
    print(f"\n{model}, {shape} rows: {total:.2f} s a step under the profiler")
    for kind, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"  {kind:24}{spent:8.3f} s{spent / total:7.0%}")
    rest = profile["largest of the rest"].items()
    print("  of the rest: " + ", ".join(f"{name.removeprefix('aten::')} {spent:.3f} s" for name, spent in rest))


# -- the comparison


def versions() -> dict[str, str]:
    """Versions of everything that the numbers depend on."""
    installed = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "accelerate", "datasets"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def checked(args: Args) -> Args:
    """The arguments as they are used: --tiny and --profile replace some, and auto is decided.

    Raises InputError where they cannot be used.
    """
    if args.tiny:
        sizes = {"batch_size": 4, "steps": 2, "repeats": 1, "threads": args.threads or 1}
        args = replace(args, models=("tiny",), shapes=("tiny",), **sizes)
    if args.steps < 1 or args.repeats < 1 or args.batch_size < 1:
        raise InputError("--steps, --repeats and --batch-size must be at least 1.")
    if unknown := set(args.shapes) - set(SHAPES) - {"hh"}:
        raise InputError(f"--shapes {', '.join(sorted(unknown))}: expected {', '.join(SHAPES)} or hh.")
    shapes = tuple(shape for shape in args.shapes if shape != "hh" or os.environ.get("PREFERENCE_DATA"))
    if len(shapes) < len(args.shapes):
        print("Real HH rows are left out: PREFERENCE_DATA, the folder of real data, is not set.")
    args = replace(args, shapes=shapes)
    if args.profile:
        args = replace(args, systems=("ours",), repeats=1)
    if args.device == "auto":
        args = replace(args, device="cuda" if torch.cuda.is_available() else "cpu")
    if {"trl", "trl-tuned"} & set(args.systems) and "trl" not in versions():
        needs = "The comparison needs TRL: pip install trl (see requirements-optional.txt)."
        raise InputError(f"{needs} Without it: --systems ours.")
    return args


def compare(model: str, shape: str, results: dict[str, list[dict]]) -> dict:
    """Prints one model's and shape's table and returns its entry of the report."""
    table, sentences = summarise(results), disagreements(results)
    print_table(model, shape, table)
    if not sentences and len(results) > 1:
        print("  First loss, gradient norm and log-probabilities agree within rounding.", flush=True)
    for sentence in sentences:
        print(f"  NOT THE SAME: {sentence}", flush=True)
    return {"model": model, "shape": shape, "summary": table, "disagreements": sentences, "runs": results}


def main(args: Args) -> int:
    """Measures, prints, writes the file; returns the exit status."""
    args = checked(args)
    transformers.utils.logging.disable_progress_bar()
    output = args.output
    if output is None and not (args.tiny or args.profile):
        output = FOLDER / "results" / f"pairs-{args.device}.json"
    about = {
        "command": " ".join(["python", "benchmarks/pairs.py", *sys.argv[1:]]),
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": device_name(torch.device(args.device)),
        "versions": versions(),
        "batch_size": args.batch_size,
        "timed_steps": args.steps,
    }
    report: list[dict] = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            vocabulary = save_model(model, Path(folder))
            for shape in args.shapes:
                rows = Path(folder) / "rows.json"
                rows.write_text(json.dumps(make_batches(shape, vocabulary, args.batch_size, args.steps + 1)))
                results = measure(args, model, shape, folder, rows)
                if args.profile:
                    continue
                report.append(compare(model, shape, results))
                if output:
                    output.parent.mkdir(parents=True, exist_ok=True)
                    threads = next(iter(results.values()))[-1]["threads"]
                    write_json(output, about | {"threads": threads, "results": report})
    if output and report:
        print(f"\nWritten to {output}.")
    return 1 if any(entry["disagreements"] for entry in report) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
