"""DPO's training step against TRL's: the same model, token ids, batches and steps through dpo.py's own functions and through TRL's DPOTrainer.

    python benchmarks/pairs.py                   everything, about an hour and a half on four cores; needs trl (pip install trl)
    python benchmarks/pairs.py --quick           a tiny model and three short steps: does it run, and do the two agree?
    python benchmarks/pairs.py --profile         where the time of our own step goes, by kind of work

Three systems take turns, each time in a fresh process, so that a peak of memory is its own and a slow spell of the machine hits all alike:

    ours           dpo.py: the reference computed once before training, the prompt once for both answers, logits for completion tokens only
    TRL            DPOTrainer as it comes, in float32 (it would choose bfloat16): gradient checkpointing, the reference at every step
    TRL, tuned     no gradient checkpointing, the reference's log-probabilities precomputed

TRL gets the very token ids: its own tokenisation, which would add an EOS, and its shuffling are switched off. Optimiser (fused AdamW, no
weight decay), learning rate (linear decay without warm-up), clipping, beta and dropout (none) are the same. The loss, the gradient norm and
the log-probability of every sequence in the first step must agree to float32 rounding; where they do not, it says so and exits with status 1.

Times are those of whole steps, collation and all, after a first one that is not counted. A reference computed before training adds its share:
the time of one batch, once over one epoch. Tokens are prompt + completion of both answers, no padding, however a system lays them out.
Memory is the largest resident size of the process (of the allocator on a GPU) above what it was when the model had been loaded, and that
without gradients and AdamW's two moments; a reference model kept in memory counts.
"""

import contextlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dpo  # noqa: E402
from common import data, evaluate, runtime  # noqa: E402

SYSTEMS = {"ours": "ours", "trl": "TRL", "trl-tuned": "TRL, tuned"}
SHAPES = {"prompt-heavy": (448, 32), "even": (192, 64), "completion-heavy": (64, 192), "tiny": (24, 8)}
LONGEST = 512  # tokens of prompt and one completion of the real rows
PAD, EOS = 0, 1  # ids are only places in a table here: the weights are random
BETA, LR = 0.1, 1e-6  # TRL's defaults


@dataclass
class Args:
    models: tuple[str, ...] = ("gpt2-small", "llama-19m")
    """Models with random weights: gpt2-small (124M), llama-19m (vocabulary 49,152), tiny."""
    shapes: tuple[str, ...] = ("prompt-heavy", "even", "completion-heavy", "hh")
    """Rows: prompt-heavy (448 + 32 tokens), even (192 + 64), completion-heavy (64 + 192), tiny; hh: real ones, with PREFERENCE_DATA set."""
    systems: tuple[Literal["ours", "trl", "trl-tuned"], ...] = ("ours", "trl", "trl-tuned")
    """Who takes part; ours alone needs no TRL."""
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
    """File for the results; None: benchmarks/results/pairs-<device>.json, and no file with --quick or --profile."""
    quick: bool = False
    """A smoke test: the tiny model, tiny rows, one repeat, two steps."""
    profile: bool = False
    """Time of our own step by kind of work, instead of the comparison."""


@dataclass
class Job:
    """One process's work, as its JSON argument."""

    system: str
    model: str
    rows: str
    batch_size: int
    threads: int
    device: str
    profile: bool = False


# ------------------------------------------------------------------------------------------------------------ models and rows


def build_model(name: str):
    """A model with random weights, the same at every call."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ends = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    torch.manual_seed(0)
    if name == "gpt2-small":
        return GPT2LMHeadModel(GPT2Config(**ends))
    small = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    known = {"llama-19m": (small, 49_152), "tiny": (tiny, 512)}
    if name not in known:
        raise data.InputError(f"--models {name}: expected gpt2-small, llama-19m or tiny.")
    shape, vocabulary = known[name]
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=1024, tie_word_embeddings=True, **shape, **ends))


def save_model(name: str, folder: Path) -> int:
    """Writes model and tokenizer there and returns the vocabulary's size. TRL asks for a tokenizer; only its pad and EOS ids matter here."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    model = build_model(name)
    model.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": PAD, "<eos>": EOS}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>").save_pretrained(folder)
    return model.config.vocab_size


def make_batches(shape: str, vocabulary: int, batch_size: int, steps: int) -> list[list[dict]]:
    """Rows as data.encode_rows returns them, the first of a training plan: both systems get them in this order."""
    rng = random.Random(0)
    if shape in SHAPES:
        prompt, completion = SHAPES[shape]

        def ids(n):
            return [rng.randrange(2, vocabulary) for _ in range(n)]

        rows = [{"prompt": ids(prompt), "completions": [ids(completion), ids(completion)]} for _ in range(steps * batch_size)]
    else:
        rows = real_rows(Path(os.environ["PREFERENCE_DATA"]), max(steps, 16) * batch_size, vocabulary)
    plan = data.plan_batches(rows, batch_size, 1.0, steps, seed=0)
    return [[rows[i] for i in step] for step in plan]


def real_rows(folder: Path, n: int, vocabulary: int) -> list[dict]:
    """A random sample of the HH rows. Ids beyond a smaller vocabulary are folded into it: what a token is called does not matter here."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizers" / "gpt2")
    files = sorted((folder / "pairs").glob("hh_*.jsonl.gz"))
    if not files:
        raise data.InputError(f"--shapes hh: no pairs/hh_*.jsonl.gz in PREFERENCE_DATA, {folder}.")
    pairs = [pair for file in files for pair in data.usable(data.read_rows(str(file)), data.pair_of_row)[0]]
    random.Random(0).shuffle(pairs)
    rows = data.encode_rows(tokenizer, pairs[: 2 * n], LONGEST)[:n]
    return [{"prompt": [t % vocabulary for t in r["prompt"]], "completions": [[t % vocabulary for t in c] for c in r["completions"]]} for r in rows]


# ------------------------------------------------------------------------------------------------------------------- memory


class Peak:
    """The largest memory of this process from here on, on a GPU that of the allocator."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            # Loading a model can take more than a small step does; Linux lets a process forget its peak.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            self.base = self.now()

    def now(self) -> int:
        """Bytes at the peak since the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        try:  # ru_maxrss begins at the size of the process that started this one
            return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def touch(model) -> int:
    """Reads every weight, so that none is still a file not yet read, and returns their bytes."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.detach().sum() is not None)


@dataclass
class Seen:
    """What one process measured."""

    weights: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)
    grad_norms: list[torch.Tensor] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)  # when each step had ended
    worked: list[float] = field(default_factory=list)  # processor seconds of the whole process until then
    reference: list[float] = field(default_factory=list)  # seconds for each batch

    def ended(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.worked.append(time.process_time())


# -------------------------------------------------------------------------------------------------------------- the systems


def run_ours(job: Job, batches: list[list[dict]], device: torch.device) -> tuple[Seen, Peak]:
    """dpo.main's loop over these batches, without its files and metrics on disk."""
    args, seen = dpo.Args(beta=BETA, lr=LR), Seen()
    model = runtime.load_model(job.model, device)
    runtime.disable_dropout(model)
    model.train()
    seen.weights, peak = touch(model), Peak(device)
    rows = [row for batch in batches for row in batch]
    layout = evaluate.choose_layout(lambda batch: no_grad_logps(model, batch), model, {"train": rows}, PAD, device, args.share_prompt)

    references = []
    for batch in batches:
        start = time.perf_counter()
        references.append(no_grad_logps(model, data.collate(batch, PAD, layout, device)).cpu())
        seen.reference.append(time.perf_counter() - start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    profiler = torch.profiler.profile(record_shapes=True) if job.profile else contextlib.nullcontext()
    for step, examples in enumerate(batches):
        if step == 1:
            profiler.__enter__()
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / len(batches))
        batch = data.collate(examples, PAD, layout, device)
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = references[step].to(device).chunk(2)
        loss, metrics = dpo.compute_loss(model, batch, args)
        (loss / len(examples)).backward()
        seen.losses.append(metrics["loss"] / len(examples))
        seen.grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        seen.ended(device)
    if job.profile:
        profiler.__exit__(None, None, None)
        print(json.dumps(by_kind(profiler, model.config.vocab_size, len(batches) - 1, device)))
    seen.logps = references[0].tolist()  # the policy's too, before its first step; the loss would not be log 2 were they different
    return seen, peak


def no_grad_logps(model, batch: dict) -> torch.Tensor:
    """dpo.completion_logps as the reference computes it."""
    with torch.no_grad():
        return dpo.completion_logps(model, batch)


def run_trl(job: Job, batches: list[list[dict]], device: torch.device) -> tuple[Seen, Peak]:
    """TRL's DPOTrainer over these batches."""
    try:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise data.InputError(f"The comparison needs TRL: pip install trl; without it --systems ours. ({error})") from None
    from transformers import AutoTokenizer, TrainerCallback

    seen, tuned = Seen(), job.system == "trl-tuned"

    class Trainer(DPOTrainer):
        """DPOTrainer that takes token ids as they are, in the order given, and notes what it computes."""

        def _prepare_dataset(self, dataset, *_args, **_kwargs):
            return dataset

        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

        def compute_ref_log_probs(self, model, inputs):
            start = time.perf_counter()
            logps = super().compute_ref_log_probs(model, inputs)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seen.reference.append(time.perf_counter() - start)
            return logps

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            seen.losses.append(loss.detach())
            return loss

        def _clip_grad_norm(self, model):
            norm = super()._clip_grad_norm(model)
            seen.grad_norms.append(norm.detach())
            return norm

    class Clock(TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            seen.ended(device)

    def note_logps(_module, _inputs, outputs):
        if torch.is_grad_enabled() and not seen.logps:
            seen.logps = outputs.log_probs.detach().sum(1).tolist()

    model = runtime.load_model(job.model, device)
    seen.weights, peak = touch(model), Peak(device)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=job.batch_size,
            num_train_epochs=1,
            learning_rate=LR,
            beta=BETA,
            bf16=False,
            max_length=None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            **({"gradient_checkpointing": False, "precompute_ref_log_probs": True} if tuned else {}),
        )
        rows = [{"prompt_ids": r["prompt"], "chosen_ids": r["completions"][0], "rejected_ids": r["completions"][1]} for b in batches for r in b]
        trainer = Trainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(job.model), callbacks=[Clock()]
        )
        model.register_forward_hook(note_logps)
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    return seen, peak


def work(text: str) -> None:
    """The whole of one process: runs a job and prints what it measured as the last line."""
    job = Job(**json.loads(text))
    if job.threads:
        torch.set_num_threads(job.threads)
    runtime.quiet_libraries()
    device = torch.device(job.device)
    batches = json.loads(Path(job.rows).read_text())
    seen, peak = (run_ours if job.system == "ours" else run_trl)(job, batches, device)
    top, later = peak.now(), batches[1:]
    seconds = (seen.ends[-1] - seen.ends[0]) / len(later)
    share = statistics.mean(seen.reference[1:]) if seen.reference else 0.0  # the first pass of a process is slow for reasons of its own
    tokens = statistics.mean(sum(map(data.row_tokens, batch)) for batch in later)
    result = {
        "step_seconds": seconds,
        "step_processor_seconds": (seen.worked[-1] - seen.worked[0]) / len(later),
        "reference_seconds_per_step": share,
        "tokens_per_second": tokens / (seconds + share),
        "peak_bytes": top,
        "above_model_bytes": top - peak.base,
        "above_training_state_bytes": top - peak.base - 3 * seen.weights,
        "losses": [x.item() for x in seen.losses],
        "first_grad_norm": seen.grad_norms[0].item(),
        "first_logps": seen.logps,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


# -------------------------------------------------------------------------------------------------------------------- profile

KINDS = ("attention", "body's matrix products", "output layer", "loss", "optimiser and clipping", "the rest")


def by_kind(profiler, vocabulary: int, steps: int, device: torch.device) -> dict[str, float]:
    """Seconds per step of each kind of work, and the operations that take most of the rest. Shapes tell the output layer from the body."""
    seconds, rest = dict.fromkeys(KINDS, 0.0), {}
    for event in profiler.key_averages(group_by_input_shape=True):
        spent = (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1e6 / steps
        shapes = [s for s in event.input_shapes if s and all(isinstance(n, int) for n in s)]
        name, product = event.key, event.key.startswith(("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"))
        if "attention" in name or "flash" in name:
            kind = "attention"
        elif product and any(vocabulary in s for s in shapes):
            kind = "output layer"
        elif product:
            kind = "body's matrix products"
        elif any(word in name for word in ("softmax", "nll_loss", "logsigmoid", "log_sigmoid")) or any(s[-1] == vocabulary for s in shapes):
            kind = "loss"
        elif any(word in name.lower() for word in ("adam", "_foreach_", "optimizer")):
            kind = "optimiser and clipping"
        else:
            kind = "the rest"
            rest[name] = rest.get(name, 0.0) + spent
        seconds[kind] += spent
    return seconds | {"largest of the rest": dict(sorted(rest.items(), key=lambda x: -x[1])[:6])}


# ----------------------------------------------------------------------------------------------------------------- the parent


def start_process(job: Job) -> list[dict]:
    """Runs a job in a fresh process and returns the JSON objects that it printed."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    if job.threads:
        environment["OMP_NUM_THREADS"] = str(job.threads)
    if job.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, __file__, "work", json.dumps(vars(job))], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise data.InputError(f"{SYSTEMS[job.system]} failed:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def disagreements(results: dict[str, list[dict]]) -> list[str]:
    """What differs in the first step by more than float32 rounding, in words; every run is compared with our first one."""
    found, expected = [], results[next(iter(results))][0]
    for system, runs in results.items():
        for run in runs:
            pairs = list(zip(run["first_logps"], expected["first_logps"]))
            gap = max(abs(a - b) for a, b in pairs)
            if len(run["first_logps"]) != len(expected["first_logps"]) or not gap <= 1e-3 + 1e-6 * max(abs(b) for _, b in pairs):
                found.append(f"{SYSTEMS[system]}: a log-probability of the first step is off by {gap:.3g} nats.")
            if not abs(run["losses"][0] - expected["losses"][0]) <= 1e-4:
                found.append(f"{SYSTEMS[system]}: the first loss is {run['losses'][0]:.6f} and not {expected['losses'][0]:.6f}.")
            if not abs(run["first_grad_norm"] - expected["first_grad_norm"]) <= 1e-3 * expected["first_grad_norm"]:
                found.append(f"{SYSTEMS[system]}: the first gradient norm is {run['first_grad_norm']:.6f} and not {expected['first_grad_norm']:.6f}.")
    return sorted(set(found))


def spread(runs: list[dict], key: str) -> dict[str, float]:
    """Median and range."""
    values = [run[key] for run in runs]
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def summarise(results: dict[str, list[dict]]) -> dict:
    """Medians and ranges for each system, and ours as ratios to the others: how many times as fast, and what share of the memory."""
    keys = (
        "step_seconds",
        "step_processor_seconds",
        "reference_seconds_per_step",
        "tokens_per_second",
        "peak_bytes",
        "above_model_bytes",
        "above_training_state_bytes",
    )
    table = {system: {key: spread(runs, key) for key in keys} for system, runs in results.items()}
    for system in table.keys() - {"ours"} if "ours" in table else ():
        mine, theirs = table["ours"], table[system]
        mine[f"times_{system}"] = mine["tokens_per_second"]["median"] / theirs["tokens_per_second"]["median"]
        # Runs of one round stood next to each other in time, so their ratio is what the machine's moods disturb least.
        rounds = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(results["ours"], results[system])]
        mine[f"times_{system}_rounds"] = {"least": min(rounds), "most": max(rounds)}
        # Other programs on the machine stretch the clock more than the work; the reference computed beforehand is not in this one.
        mine[f"work_of_{system}"] = mine["step_processor_seconds"]["median"] / theirs["step_processor_seconds"]["median"]
        mine[f"memory_of_{system}"] = mine["above_training_state_bytes"]["median"] / theirs["above_training_state_bytes"]["median"]
    return table


def print_table(model: str, shape: str, table: dict) -> None:
    """One model and shape, a line for each system."""
    print(f"\n{model}, {shape} rows", flush=True)
    print(f"  {'':12}{'tokens/s':>10}{'(range)':>18}{'step':>9}{'reference':>11}{'peak':>9}{'above model':>13}{'above state':>13}")
    for system, row in table.items():
        speed, memory = row["tokens_per_second"], [row[k]["median"] / 2**30 for k in ("peak_bytes", "above_model_bytes", "above_training_state_bytes")]
        print(
            f"  {SYSTEMS[system]:12}{speed['median']:10,.0f}{'{:,.0f} to {:,.0f}'.format(speed['least'], speed['most']):>18}{row['step_seconds']['median']:7.2f} s"
            f"{row['reference_seconds_per_step']['median']:9.2f} s{memory[0]:5.2f} GiB{memory[1]:9.2f} GiB{memory[2]:9.2f} GiB"
        )
    for system in table.keys() - {"ours"} if "ours" in table else ():
        mine, rounds = table["ours"], table["ours"][f"times_{system}_rounds"]
        print(
            f"  ours is {mine[f'times_{system}']:.2f} times as fast as {SYSTEMS[system]} ({rounds['least']:.2f} to {rounds['most']:.2f} by round),"
            f" a step takes {mine[f'work_of_{system}']:.2f} of its processor time,"
            f" with {mine[f'memory_of_{system}']:.2f} of its memory above weights, gradients and optimiser."
        )


def versions() -> dict[str, str]:
    """Versions of everything that the numbers depend on."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "accelerate", "datasets"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main(args: Args) -> int:
    """Measures, prints, writes the file; returns the exit status."""
    if args.quick:
        args = Args(
            models=("tiny",), shapes=("tiny",), systems=args.systems, batch_size=4, steps=2, repeats=1, threads=args.threads or 1, output=args.output,
            device=args.device, profile=args.profile, quick=True,
        )  # fmt: skip
    if args.steps < 1 or args.repeats < 1 or args.batch_size < 1:
        raise data.InputError("--steps, --repeats and --batch-size must be at least 1.")
    unknown = set(args.shapes) - set(SHAPES) - {"hh"}
    if unknown:
        raise data.InputError(f"--shapes {', '.join(sorted(unknown))}: expected {', '.join(SHAPES)} or hh.")
    shapes = [s for s in args.shapes if s != "hh" or os.environ.get("PREFERENCE_DATA")]
    if len(shapes) < len(args.shapes):
        print("Real HH rows are left out: PREFERENCE_DATA, the folder of real data, is not set.")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    systems = ["ours"] if args.profile else list(args.systems)
    if any(s != "ours" for s in systems) and "trl" not in versions():
        raise data.InputError("The comparison needs TRL, which is a package for development: pip install trl. Without it: --systems ours.")
    runtime.quiet_libraries()
    output = args.output or (None if args.quick or args.profile else ROOT / "benchmarks" / "results" / f"pairs-{device}.json")
    about = {
        "command": " ".join(["python", "benchmarks/pairs.py", *sys.argv[1:]]),
        "commit": runtime.git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": runtime.device_name(torch.device(device)),
        "versions": versions(),
        "batch_size": args.batch_size,
        "timed_steps": args.steps,
    }
    report, found = [], []
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            vocabulary = save_model(model, Path(folder))
            for shape in shapes:
                rows = Path(folder) / "rows.json"
                rows.write_text(json.dumps(make_batches(shape, vocabulary, args.batch_size, args.steps + 1)))
                results: dict[str, list[dict]] = {system: [] for system in systems}
                for repeat in range(1 if args.profile else args.repeats):
                    for system in systems:
                        job = Job(system, folder, str(rows), args.batch_size, args.threads, device, args.profile)
                        *profiled, result = start_process(job)
                        results[system].append(result)
                        if profiled:
                            print_profile(model, shape, profiled[0])
                        else:  # a line at once, so that a long run that is stopped has said something
                            seconds = result["step_seconds"] + result["reference_seconds_per_step"]
                            print(f"{model}, {shape}, {SYSTEMS[system]}, round {repeat + 1}: {seconds:.2f} s a step", file=sys.stderr, flush=True)
                if args.profile:
                    continue
                differences = disagreements(results)
                table = summarise(results)
                print_table(model, shape, table)
                if not differences and len(systems) > 1:
                    print("  First loss, gradient norm and log-probabilities agree to float32 rounding.", flush=True)
                for line in differences:
                    print(f"  NOT THE SAME: {line}", flush=True)
                found += differences
                report.append({"model": model, "shape": shape, "summary": table, "disagreements": differences, "runs": results})
                if output:
                    output.parent.mkdir(parents=True, exist_ok=True)
                    runtime.write_json(output, about | {"threads": result["threads"], "results": report})
    if output and report:
        print(f"\nWritten to {output}.")
    return 1 if found else 0


def print_profile(model: str, shape: str, seconds: dict) -> None:
    """The kinds of work of our step, the largest first."""
    rest = seconds.pop("largest of the rest")
    print(f"\n{model}, {shape} rows: {sum(seconds.values()):.2f} s a step under the profiler")
    for kind, spent in sorted(seconds.items(), key=lambda x: -x[1]):
        print(f"  {kind:24}{spent:8.3f} s{spent / sum(seconds.values()):7.0%}")
    print("  of the rest: " + ", ".join(f"{name.removeprefix('aten::')} {spent:.3f} s" for name, spent in rest.items()), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2])
    else:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
