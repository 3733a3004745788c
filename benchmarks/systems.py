"""One process of benchmarks/pairs.py: trains a few steps with one system and prints what it
measured as its last line.

    python benchmarks/systems.py '{"system": "ours", ...}'     the JSON of a Job
"""

import contextlib
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python benchmarks/systems.py

import dpo
from benchmarks.inputs import PAD
from common import InputError, batches, models, oracle

BETA, LR = 0.1, 1e-6  # TRL's defaults


@dataclass
class Job:
    """One process's work, as its JSON argument."""

    system: str
    model: str
    rows: str
    batch_size: int
    threads: int
    device: str
    dtype: str = "float32"
    profile: bool = False

    def autocast(self):
        """The context of our forward passes."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")


# -- measuring


class Peak:
    """The largest memory of this process from here on, on a GPU that of the allocator."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            # Loading a model can take more than a small step does; Linux lets a process forget
            # its peak.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            self.base = self.now()

    def now(self) -> int:
        """Bytes at the peak since the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        try:  # ru_maxrss begins at the size of the process that started this one
            return next(
                1024 * int(line.split()[1])
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM")
            )
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def touch(model) -> int:
    """Reads every weight, so that none is still a file not yet read, and returns their bytes."""
    size = 0
    for parameter in model.parameters():
        parameter.detach().sum()
        size += parameter.numel() * parameter.element_size()
    return size


@dataclass
class Measurements:
    """What one process measured."""

    weights: int = 0  # bytes
    losses: list[torch.Tensor] = field(default_factory=list)
    grad_norms: list[torch.Tensor] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)  # when each step had ended, in seconds
    processor: list[float] = field(default_factory=list)  # processor seconds of the process until then
    reference: list[float] = field(default_factory=list)  # seconds for each batch
    reference_processor: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)  # useful ones of each step

    @contextlib.contextmanager
    def timed_reference(self, device: torch.device):
        """Notes the time of one batch's reference log-probabilities."""
        start, processor = time.perf_counter(), time.process_time()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.reference.append(time.perf_counter() - start)
        self.reference_processor.append(time.process_time() - processor)

    def end_step(self, device: torch.device) -> None:
        """Notes the time at the end of a step."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.processor.append(time.process_time())


# -- the systems


def run_ours(job: Job, steps: list[list[dict]], device: torch.device) -> tuple[Measurements, Peak]:
    """dpo.main's loop over these rows, without its files and metrics on disk."""
    args, measured = dpo.Args(beta=BETA, lr=LR), Measurements()
    model = models.load_model(job.model, device).train()
    measured.weights, peak = touch(model), Peak(device)
    rows = [row for rows_of_step in steps for row in rows_of_step]
    logps_of = partial(no_grad_logps, model)
    layout = oracle.choose_layout(logps_of, model, {"train": rows}, PAD, device, args.share_prompt)
    dtype = getattr(torch, job.dtype)
    batch_of = partial(batches.collate, pad_id=PAD, layout=layout, device=device, dtype=dtype)
    measured.flops = [useful_flops(model, rows_of_step) for rows_of_step in steps]
    if job.system == "ours-compiled":
        model.base_model.compile(dynamic=True)  # lengths differ from step to step
        with job.autocast():
            logps_of(batch_of(steps[0]))  # the compiler's time is no step's; training compiles in the first

    ref_logps = []
    for rows_of_step in steps:
        with measured.timed_reference(device), job.autocast():
            ref_logps.append(logps_of(batch_of(rows_of_step)).cpu())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    profiler = torch.profiler.profile(record_shapes=True) if job.profile else contextlib.nullcontext()
    for step, rows_of_step in enumerate(steps):
        if step == 1:
            profiler.__enter__()
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / len(steps))
        batch = batch_of(rows_of_step)
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = ref_logps[step].to(device).chunk(2)
        with job.autocast():
            loss, metrics = dpo.compute_loss(model, batch, args.beta)
        (loss / len(rows_of_step)).backward()
        measured.losses.append(metrics["loss"] / len(rows_of_step))
        measured.grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        measured.end_step(device)
    if job.profile:
        profiler.__exit__(None, None, None)
        print(json.dumps(by_kind(profiler, model.config.vocab_size, len(steps) - 1, device)))
    # The policy's too, before its first step; the loss would not be log 2 were they different.
    measured.logps = ref_logps[0].tolist()
    return measured, peak


def useful_flops(model, rows: list[dict]) -> float:
    """Operations of a training step in the matrix products that a loss needs: every token of
    prompt and answers through the body once, every answer token through the output layer; forward
    and backward. Attention's own products, padding and the reference are not counted.
    """
    head = model.get_output_embeddings().weight
    body = sum(p.numel() for m in model.base_model.modules() if is_product(m) for p in m.parameters() if p.dim() == 2)
    tokens = sum(map(batches.row_length, rows))
    return 6.0 * (body * tokens + head.numel() * sum(len(ids) for row in rows for ids in row["completions"]))


def is_product(module) -> bool:
    """Whether a layer multiplies by its weight (GPT-2's are of a class of their own)."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def no_grad_logps(model, batch: dict) -> torch.Tensor:
    """dpo.completion_logps as the reference computes it."""
    with torch.no_grad():
        return dpo.completion_logps(model, batch)


def trl_trainer_class(measured: Measurements, device: torch.device):
    """A DPOTrainer that takes token ids as they are, in the order given, and notes what it
    computes.
    """
    from trl import DPOTrainer

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_args, **_kwargs):
            return dataset

        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(
                train_dataset if train_dataset is not None else self.train_dataset
            )

        def compute_ref_log_probs(self, model, inputs):
            with measured.timed_reference(device):
                return super().compute_ref_log_probs(model, inputs)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            measured.losses.append(loss.detach())
            return loss

        def _clip_grad_norm(self, model):
            norm = super()._clip_grad_norm(model)
            measured.grad_norms.append(norm.detach())
            return norm

    return Trainer


def trl_config(job: Job, folder: str, device: torch.device):
    """DPOConfig with the numbers of our own run; TRL would choose bfloat16 by itself."""
    from trl import DPOConfig

    tuned = {"gradient_checkpointing": False, "precompute_ref_log_probs": True} if job.system == "trl-tuned" else {}
    return DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=job.batch_size,
        num_train_epochs=1,
        learning_rate=LR,
        beta=BETA,
        bf16=job.dtype == "bfloat16",
        max_length=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        **tuned,
    )


def run_trl(job: Job, steps: list[list[dict]], device: torch.device) -> tuple[Measurements, Peak]:
    """TRL's DPOTrainer over these rows."""
    measured = Measurements()
    try:
        from datasets import Dataset

        trainer_class = trl_trainer_class(measured, device)
    except ImportError as error:
        how = "pip install trl (see requirements-optional.txt), or --systems ours"
        raise InputError(f"The comparison needs TRL: {how}. ({error})") from None
    from transformers import AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            measured.end_step(device)

    def note_logps(_module, _inputs, outputs):
        if torch.is_grad_enabled() and not measured.logps:
            measured.logps = outputs.log_probs.detach().sum(1).tolist()

    model = models.load_model(job.model, device)
    measured.weights, peak = touch(model), Peak(device)
    rows = []
    for row in (row for rows_of_step in steps for row in rows_of_step):
        chosen, rejected = row["completions"]
        rows.append({"prompt_ids": row["prompt"], "chosen_ids": chosen, "rejected_ids": rejected})
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            args=trl_config(job, folder, device),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job.model),
            callbacks=[Clock()],
        )
        model.register_forward_hook(note_logps)
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    return measured, peak


# -- the whole of one process


def matrix_rate(dtype: str, size: int = 2048) -> float:
    """Operations a processor second of one large product, the median of nine."""
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    spent = []
    for _ in range(10):
        start = time.process_time()
        torch.nn.functional.linear(a, b)
        spent.append(time.process_time() - start)
    return 2.0 * size**3 / statistics.median(spent[1:])


def main(text: str) -> None:
    """Runs a job and prints what it measured as the last line."""
    job = Job(**json.loads(text))
    if job.threads:
        torch.set_num_threads(job.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    device = torch.device(job.device)
    steps = json.loads(Path(job.rows).read_text())
    run = run_ours if job.system.startswith("ours") else run_trl
    rates = [matrix_rate(job.dtype)] if device.type == "cpu" else []
    measured, peak = run(job, steps, device)
    peak_bytes, later = peak.now(), steps[1:]
    seconds = (measured.ends[-1] - measured.ends[0]) / len(later)
    # The first pass of a process is slow for reasons of its own.
    reference = statistics.mean(measured.reference[1:]) if measured.reference else 0.0
    processor = (measured.processor[-1] - measured.processor[0]) / len(later)
    reference_processor = statistics.mean(measured.reference_processor[1:]) if measured.reference_processor else 0.0
    tokens = statistics.mean(batches.count_tokens(rows) for rows in later)
    result = {
        "step_seconds": seconds,
        "step_processor_seconds": processor,
        "reference_seconds_per_step": reference,
        "tokens_per_second": tokens / (seconds + reference),
        "tokens_per_processor_second": tokens / (processor + reference_processor),
        "useful_flops_per_step": statistics.mean(measured.flops[1:]) if measured.flops else None,
        "peak_bytes": peak_bytes,
        "above_model_bytes": peak_bytes - peak.base,
        "above_training_state_bytes": peak_bytes - peak.base - 3 * measured.weights,
        "losses": [loss.item() for loss in measured.losses],
        "first_grad_norm": measured.grad_norms[0].item(),
        "first_logps": measured.logps,
        "threads": torch.get_num_threads(),
    }
    if rates:  # before and after, since a busy machine's rate changes
        rates.append(matrix_rate(job.dtype))
        result["matrix_flops_per_processor_second"] = statistics.mean(rates)
    if rates and measured.flops:
        result["share_of_matrix_rate"] = result["useful_flops_per_step"] / processor / statistics.mean(rates)
    print(json.dumps(result))


# -- profile

KINDS = ("attention", "body's matrix products", "output layer", "loss", "optimiser and clipping", "the rest")


LOSS_NAMES = ("softmax", "nll_loss", "logsigmoid", "log_sigmoid")
OPTIMISER_NAMES = ("adam", "_foreach_", "optimizer")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear")


def kind_of(name: str, shapes: list[list[int]], vocabulary: int) -> str:
    """The kind of work of an operation; shapes tell the output layer from the body."""
    if "attention" in name or "flash" in name:
        return "attention"
    if name.startswith(PRODUCTS):
        return "output layer" if any(vocabulary in shape for shape in shapes) else "body's matrix products"
    if any(word in name for word in LOSS_NAMES) or any(shape[-1] == vocabulary for shape in shapes):
        return "loss"
    if any(word in name.lower() for word in OPTIMISER_NAMES):
        return "optimiser and clipping"
    return "the rest"


def by_kind(profiler, vocabulary: int, steps: int, device: torch.device) -> dict:
    """Seconds per step of each kind of work, and the operations that take most of the rest."""
    seconds, rest = dict.fromkeys(KINDS, 0.0), {}
    for event in profiler.key_averages(group_by_input_shape=True):
        total = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent = total / 1e6 / steps
        shapes = [shape for shape in event.input_shapes if shape and all(isinstance(n, int) for n in shape)]
        kind = kind_of(event.key, shapes, vocabulary)
        seconds[kind] += spent
        if kind == "the rest":
            rest[event.key] = rest.get(event.key, 0.0) + spent
    largest = sorted(rest.items(), key=lambda item: -item[1])[:6]
    return seconds | {"largest of the rest": dict(largest)}


if __name__ == "__main__":
    main(sys.argv[1])
