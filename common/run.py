"""One run: its folder, where it stands in training, its metrics. What every script needs and no
paper is about.

A run folder `runs/<name>/` holds args.json, metrics.jsonl, summary.json, the model as a
transformers folder, script.py (a copy), checkpoints/ and, where matplotlib is installed,
curves.png. README.md is its model card.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
import typing
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import transformers

from adapters import lora
from common import InputError, checkpoints, files, first_line
from common.batches import micro_batches, row_length
from common.files import append_json_line, plain, read_json, refuse_read_only, write_json, write_text
from common.generate import is_tiny
from common.models import PINNED, choose_dtype, full_tensor, shard
from common.processes import gather, is_main_process, print0, rank, sum_over_processes, wait_for_all, world_size
from report import card, curves, facts, progress
from report.table import print_end_table
from report.trackers import check_tracker, tracker
from toy import base

DISK_FULL = ("No space left", "quota exceeded", "File too large", "Read-only file system")
COUNT = (lambda v: v >= 1, "at least 1")
MANY, FEW = 400, 64  # --kl-samples where it is not given: few of a model that is slow to sample from
POSITIVE = (lambda v: 0 < v < math.inf, "a positive number")
NOT_NEGATIVE = (lambda v: 0 <= v < math.inf, "at least 0")
RANGES = {  # of the arguments that most scripts have; a script checks its own
    **dict.fromkeys("batch_size micro_batch_size max_new_tokens eval_every save_every log_every".split(), COUNT),
    **dict.fromkeys(("beta", "epochs"), POSITIVE),
    "lr": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    **dict.fromkeys(("warmup", "weight_decay", "lora_rank"), NOT_NEGATIVE),
    "kl_samples": (lambda v: v is None or v >= 0, "at least 0"),
    "max_steps": (lambda v: v >= -1 and v != 0, "at least 1, or -1 for no limit"),
    "max_length": (lambda v: v is None or v >= 2, "at least 2"),
    "holdout": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "max_grad_norm": (lambda v: v > 0, "above 0 (inf: no clipping)"),
    "dtype": (lambda v: v in {"auto", "float32", "bfloat16"}, "auto, float32 or bfloat16"),
    "name": (lambda v: v == Path(v).name and v != "..", "one folder name"),
}


def start_run(args, script: str):
    """(run, arguments that hold from here on): a new run, or one taken up again with the arguments
    that it began with.

    Raises InputError for arguments out of range, a name that is taken, or a folder that cannot be
    resumed."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    args = dataclasses.replace(args, model=base.model_for(args.model, args.data))
    if args.resume:
        args = resumed_arguments(args, Path(script).name)
    elif not args.name:
        args = dataclasses.replace(args, name=free_name(args, Path(script).stem))
    if args.lr is None:
        args = dataclasses.replace(args, lr=default_learning_rate(args))
    for name, (holds, expected) in RANGES.items():
        if hasattr(args, name) and not holds(getattr(args, name)):
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}.")
    for source in filter(None, (args.data, getattr(args, "eval_data", None))):
        if ":" not in source and files.is_row_file(source) and not Path(source).exists():  # a colon is no file's
            raise InputError(f"{source}: no such file.")
    lora.check_arguments(args)
    refuse_read_only(Path(args.output_dir))
    check_tracker(args.track)
    run = Run(args, script)
    sys.excepthook = run.explain
    data = args.data or args.task
    world = " (the embedded world, unless --data names other rows)" if data == "toy" else ""
    print0(f"{Path(script).name}: model {args.model}, data {data}{world}, learning rate {args.lr:g}, {run.device}.")
    return run, args


def default_learning_rate(args) -> float:
    """Without --lr: what suits the toy, models made from scratch, and pretrained ones."""
    sizes = {"toy": 1e-3, "tiny": 1e-2, "mini": 1e-2, "small": 1e-2}
    return sizes.get(args.model.partition(":")[0], 1e-3 if hasattr(args, "context") else 1e-5)


def free_name(args, script: str) -> str:
    """A name for a new run that no folder has yet, the same on every process."""
    stem = f"{script}-{Path(args.model).name}-seed{args.seed}".replace(":", "-")
    taken = [stem, *(f"{stem}-{i}" for i in range(2, 10_000))]
    return gather([next(name for name in taken if not (Path(args.output_dir) / name).exists())])[0]


def resumed_arguments(args, script: str):
    """The arguments of the run to go on with; refused where one was given that contradicts them."""
    folder = Path(args.resume)
    saved = read_json(folder / "args.json", f"--resume {folder}: ", "expected the folder of a run")
    if saved.pop("script", None) != script:
        raise InputError(f"--resume {folder}: that run was made by another script, not by {script}.")
    if (folder / "summary.json").exists():
        raise InputError(f"--resume {folder}: that run is finished; nothing is left to do.")
    fields = {field.name: field for field in dataclasses.fields(args) if field.name != "resume"}
    saved.pop("resume", None)
    PINNED[saved.get("model")] = saved.pop("model_revision", None)
    if odd := ", ".join(sorted(fields.keys() ^ saved.keys())):
        raise InputError(f"--resume {folder}: args.json and {script} do not have the same arguments ({odd}).")
    kinds = typing.get_type_hints(type(args))
    for name, field in fields.items():
        if saved[name] is None and kinds[name] is float:
            saved[name] = math.inf  # which JSON does not have
        if not fits(saved[name], kinds[name]):
            raise InputError(f"--resume {folder}: args.json has {saved[name]!r} for {name}, which it cannot be.")
        given, flag = getattr(args, name), "--" + name.replace("_", "-")
        on_line = any(word.split("=")[0] in {flag, flag.replace("--", "--no-")} for word in sys.argv[1:])
        if given != saved[name] and (on_line or given != field.default):
            raise InputError(f"--resume {folder}: {flag} is {saved[name]} in that run and cannot become {given}.")
    return dataclasses.replace(args, **saved)


def fits(value, kind) -> bool:
    """Whether a value of args.json is of the type of its field."""
    kinds = typing.get_args(kind) or (kind,)  # of a union the types, of a Literal the values
    return value in kinds or type(value) in kinds or (float in kinds and type(value) is int)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up (below 1: a share of all steps, else their number), then decay to 0."""
    warmup = warmup * steps if warmup < 1 else warmup
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (steps - step) / max(1.0, steps - warmup)


def means_of(sums: dict[str, float], count: float) -> dict[str, float]:
    """Summed metrics as means over `count` things, or, where there is a "count NAME" beside a NAME,
    over what that counts.

    nan where it counts nothing."""
    counts = {name: sums.get(f"count {name}", count) for name in sums if not name.startswith("count ")}
    return {name: sums[name] / count if count else math.nan for name, count in counts.items()}


class Run:
    """A run: `device`, `dtype` (after `prepare`), `folder`, `checkpoint` (to resume), `step`."""

    def __init__(self, args, script: str):
        self._args, self.script = args, Path(script)
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 where a product stays float32
        self.dtype = None  # of matrix products: the model's size decides
        transformers.utils.logging.disable_progress_bar()  # what a run prints is its own
        transformers.utils.logging.set_verbosity_error()
        self.folder = Path(args.resume or Path(args.output_dir) / args.name)
        self.step, self.total, self.seconds, self.tokens = 0, 0, 0.0, 0
        self.stopping, self._signal, self._started = 0, 0, 0.0
        self._pending: list[dict] = []  # steps whose metrics are still on the device
        self._window: list[dict] = []  # the last --log-every steps read from it
        self._track, self._sources = None, {}
        self._is_tiny: bool | None = None  # of the model, once there is one
        self._is_training = False
        progress.during("")
        self.checkpoint = checkpoints.newest(self.folder) if args.resume else None
        if not args.resume and is_main_process() and self.folder.exists() and any(self.folder.iterdir()):
            again = f"go on with it: --resume {self.folder}"
            raise InputError(f"{self.folder}: this run exists already; choose another --name, or {again}")
        if self.checkpoint:
            state = checkpoints.read_state(self.checkpoint)
            self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
            self._window = state["window"]
            print0(f"Going on with {self.folder} after step {self.step}.")
        if args.resume and is_main_process():
            files.drop_later_lines(self.folder / "metrics.jsonl", self.step)
        torch.manual_seed(args.seed)

    def autocast(self):
        """The context of every forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def prepare(self, model, dynamic: bool | None = True):
        """Sets, by the first model's size, dtype, threads and --kl-samples; gradient checkpointing,
        compilation and, with several processes, sharding.

        Call before the optimiser is made. dynamic: whether batches differ in shape, for the
        compiler; None: it finds out."""
        if self.dtype is None:  # args.json keeps what is chosen: a run resumed on another machine goes on with it
            self._is_tiny = is_tiny(model)
            self._args.dtype = choose_dtype(self._args.dtype, model, self.device)
            self.dtype = getattr(torch, self._args.dtype)
            print0(facts.describe_model(model, self.dtype, self.device))
            if getattr(self._args, "kl_samples", 0) is None:
                self._args.kl_samples = MANY if self._is_tiny or self.device.type == "cuda" else FEW
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and self._is_tiny:
            torch.set_num_threads(1)
        if self._args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self._args.compile:
            model.base_model.compile(dynamic=dynamic)
        dtype = self.dtype if self.device.type == "cuda" else torch.float32  # CPU norms want float32 weights
        return shard(model, dtype) if world_size() > 1 else model

    def explain(self, kind, error, trace) -> None:
        """For Python to call at the end: one sentence where the disk is full, and for Ctrl-C
        outside of the training loop; every other error is shown whole."""
        is_full = any(words in str(error) for words in DISK_FULL)
        if is_full or kind is KeyboardInterrupt:
            what = f"{self.folder} cannot be written ({first_line(error)})" if is_full else "Interrupted"
            again = f"python {self.script.name} --resume {self.folder}" if self.folder.exists() else "the same command"
            print(f"\n{what}. {self._kept()}; go on with: {again}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    def _make_folder(self) -> None:
        """Makes the run's folder once model and data were found to be good, so that a wrong path
        leaves nothing behind.

        It gets its name when it is complete: a kill at any moment leaves no half of one."""
        if is_main_process() and not (self.folder / "args.json").exists():
            aside = self.folder.with_name(f".{self.folder.name}.part")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            shutil.copyfile(self.script, aside / "script.py")
            about = {"script": self.script.name, "model_revision": self._sources.get("model_revision")}
            write_json(aside / "args.json", about | dataclasses.asdict(self._args))
            os.replace(aside, self.folder)
        wait_for_all()
        self._track = self._track or tracker(self._args.track, self.folder, dataclasses.asdict(self._args))

    def cached_tensors(self, name: str, compute) -> dict[str, torch.Tensor]:
        """A dict of tensors computed once and kept in the run folder; a resumed run loads it.

        Recomputed in other batches it would differ in the last digits. Random numbers are left as
        they were."""
        path = self.folder / f"{name}.safetensors"
        if self._is_cached(path):
            return checkpoints.load_tensors(path)
        progress.during(name)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            tensors = compute()
        progress.during("")
        if is_main_process():
            aside = path.with_suffix(".part")
            safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, aside)
            os.replace(aside, path)
        return tensors

    def cached_json(self, name: str, compute):
        """The same for a JSON object."""
        path = self.folder / f"{name}.json"
        if self._is_cached(path):
            return read_json(path, "", checkpoints.AGAIN)
        progress.during(f"{name} training" if name == "before" else "")
        value = compute()
        progress.during("")
        if is_main_process():
            write_json(path, value)
        return value

    def _is_cached(self, path: Path) -> bool:
        """Whether a resumed run has this file; after a step its value cannot be computed again."""
        self._make_folder()
        if self.checkpoint and not path.exists():
            raise InputError(f"{path} is missing; {checkpoints.AGAIN}.")
        return bool(self._args.resume) and path.exists()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to 0."""
        return learning_rate(step, self.total, self._args.lr, self._args.warmup)

    def steps(self, plan: list[list]):
        """(step, its rows) for what is left of a plan; Ctrl-C and SIGTERM end the step and save."""

        def stop(number, frame):
            self._signal = number
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        self.total, self._is_training = len(plan), True
        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        bar = progress.Bar("training", self.total, self.step, "step", delay=0.0)
        try:
            while self.step < self.total:
                self._started = time.perf_counter()
                yield self.step, plan[self.step]
                bar.update()
                if self.stopping:
                    bar.close()
                    again = f"python {self.script.name} --resume {self.folder}"
                    print0(f"Stopped after step {self.step}; everything is saved. Go on with: {again}")
                    raise SystemExit(128 + self.stopping)
        finally:
            bar.close()
            self._is_training = False
            progress.during("after training")
            for number, handler in previous.items():
                signal.signal(number, handler)

    def micro_batches(self, rows: list, size: int = 0) -> list[tuple[list, float]]:
        """This process's share of a step as (rows, weight): `size` rows, or --micro-batch-size."""
        return micro_batches(rows, size or self._args.micro_batch_size, rank(), world_size())

    def accumulate(self, metrics: dict, weight: float) -> None:
        """Adds a micro-batch's summed metrics to the step at hand.

        They are logged as means over the step's rows, or over "count NAME" beside NAME."""
        if not self._pending or "step" in self._pending[-1]:
            self._pending.append({"sums": {}})
        sums = self._pending[-1]["sums"]
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.detach() * (weight / world_size())

    def end_step(self, count: int, tokens: int, grad_norm: torch.Tensor) -> None:
        """Closes an optimiser step, and writes a line to metrics.jsonl where one is due.

        Args:
            count: pairs, rows or tokens that the metrics were summed over, on all processes.
            tokens: real tokens of the step, for the speed.
        """
        lr = self.learning_rate(self.step)
        self.step += 1
        self.tokens += tokens
        norm = grad_norm.detach().to(self.device)  # on the CPU where a step had no gradient
        self._pending[-1] |= {"step": self.step, "count": count, "grad_norm": norm, "lr": lr}
        reads = any(map(self.is_time, (self._args.save_every, self._args.log_every, self._args.eval_every)))
        self.stopping = self._agreed_stop() if reads or world_size() == 1 else 0  # to ask is to wait for the device
        if reads or self.stopping:
            self._read_metrics()
        if self.is_time(self._args.log_every):
            steps = self._window
            sums = {name: sum(step["sums"][name] for step in steps) for name in steps[0]["sums"]}
            means = means_of(sums, sum(step["count"] for step in steps))
            self.log("train", {**means, "grad_norm": steps[-1]["grad_norm"], "lr": lr})
        # Steps wait for the device where metrics are read: single ones may seem short or long.
        self.seconds += time.perf_counter() - self._started

    def is_time(self, every: int) -> bool:
        """Whether something done every so many steps is due; always so after the last one."""
        return self.step % every == 0 or self.step == self.total

    def is_time_to_save(self) -> bool:
        """Whether a checkpoint is due; also when the run was told to stop."""
        return self.is_time(self._args.save_every) or self.stopping > 0

    def _agreed_stop(self) -> int:
        """The signal that some process got, on all of them."""
        if world_size() == 1:
            return self._signal
        flag = torch.tensor(self._signal, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def _read_metrics(self) -> None:
        """Brings metrics from the device; stops the run where one is not finite."""
        steps, self._pending = self._pending, []
        names = list(steps[0]["sums"])
        table = torch.stack([torch.stack([step["sums"][name].double() for name in names]) for step in steps])
        norms = torch.stack([full_tensor(step["grad_norm"]).double() for step in steps]).tolist()
        for step, sums, norm in zip(steps, sum_over_processes(table).tolist(), norms):  # table: [steps, metrics]
            step |= {"sums": dict(zip(names, sums)), "grad_norm": norm}
            if not math.isfinite(step["sums"]["loss"]):
                self.refuse("loss", step["step"])
            if not math.isfinite(norm):
                self.refuse("gradient", step["step"])
        # A line is the mean over --log-every steps, the last one too, with fewer new ones.
        self._window = [*self._window, *steps][-self._args.log_every :]

    def pin_sources(self, model_folder: str, data_sha256: str) -> None:
        """Keeps hashes of rows and weights; InputError where those of a resumed run are others."""
        self._sources = current = facts.sources(model_folder, data_sha256, self._args)
        self._sources = self.cached_json("sources", lambda: current)
        for name, what in (("data_sha256", "rows of the data"), ("model_sha256", "weights of the model")):
            if current[name] != self._sources.get(name):
                raise InputError(f"--resume {self.folder}: the {what} are not those that the run began with.")

    def _kept(self) -> str:
        """Which checkpoint a run that ends here leaves."""
        return f"The checkpoint {self.checkpoint} is kept" if self.checkpoint else "No checkpoint had been written yet"

    def refuse(self, what: str, step: int) -> None:
        """Ends the run because a number is not finite."""
        kept, end = self._kept(), f"the run is in {self.folder}"
        cause = "the learning rate is likely too high" if step > 1 else "the model or a row likely holds extreme values"
        raise InputError(f"\nThe {what} of step {step} is not finite: {cause}. {kept}; {end}.")

    def log(self, split: str, metrics: dict) -> None:
        """One line of metrics.jsonl, and of the tracker where there is one."""
        if is_main_process() and metrics:
            append_json_line(self.folder / "metrics.jsonl", {"step": self.step, "split": split, **metrics})
            if self._track:
                self._track.send(self.step, {f"{split}/{name}": value for name, value in metrics.items()})

    def write_lines(self, name: str, lines: list[dict]) -> None:
        """A JSON-lines file of the run folder, whole or not at all."""
        if is_main_process():
            write_text(self.folder / name, "".join(json.dumps(plain(line), allow_nan=False) + "\n" for line in lines))

    def _passes(self, function, batch_of, rows: list, what: str):
        """(numbers of rows, weight, function(batch)) over all rows, similar lengths together."""
        order = sorted(range(len(rows)), key=lambda i: row_length(rows[i]))
        for numbers, weight in progress.track(self.micro_batches(order), what):
            with torch.no_grad(), self.autocast():
                yield numbers, weight, function(batch_of([rows[i] for i in numbers]))

    def predict(self, function, batch_of, rows: list) -> torch.Tensor:
        """`function(batch_of(rows))` for all rows: [rows, answers, ...], float32, on the CPU.

        function: batch -> [sequences, ...], numbered as by `collate`, or a tuple of such."""
        parts = []
        for numbers, weight, values in self._passes(function, batch_of, rows, f"scoring {len(rows):,} rows"):
            values = torch.cat(values) if isinstance(values, tuple) else values
            by_row = values.float().unflatten(0, (-1, len(numbers))).transpose(0, 1).cpu()
            parts += [(numbers, by_row)] if weight else []
        parts = gather(parts)
        if not parts:
            return torch.zeros(0, 1)
        places = torch.tensor([i for numbers, _ in parts for i in numbers])
        values = torch.cat([values for _, values in parts])[places.argsort()]
        if not bool(values.isfinite().all()):
            self.refuse("model's output after the end", self.step)
        return values

    def evaluate_loss(self, function, batch_of, rows: list, per_row: int = 1) -> dict[str, float]:
        """Metrics of `function(batch_of(rows))` -> (loss, sums) as means over `per_row` a row.

        While a model trains that is larger than the toy's, of evenly spaced rows: no more than take
        a tenth of its time."""
        if self._is_training and self._is_tiny is False:
            most = max(128, self._args.eval_every * self._args.batch_size * 3 // 10)  # to train on one takes thrice
            rows = rows[:: max(1, -(-len(rows) // most))]
        sums: dict = {}
        for _, weight, (_, metrics) in self._passes(function, batch_of, rows, f"loss of {len(rows):,} held-out rows"):
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value.double() * (weight / world_size())
        if not sums:
            return {}
        table = sum_over_processes(torch.stack(list(sums.values()))).tolist()
        metrics = means_of(dict(zip(sums, table)), len(rows) * per_row)
        if not math.isfinite(metrics["loss"]):
            self.refuse("held-out loss after the end", self.step)
        return metrics

    def save(self, model, optimizer, tokenizer) -> None:
        """A checkpoint of everything that the rest of the run depends on."""
        state = {"step": self.step, "seconds": self.seconds, "tokens": self.tokens, "window": self._window}
        self.checkpoint = checkpoints.save(self.folder, model, optimizer, tokenizer, state, self.device)

    def save_model(self, model, tokenizer, merge: bool = False) -> None:
        """The trained model in the run's folder: where it has an adapter that, or both as one."""
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            self.refuse("model after the end", self.step)
        checkpoints.save_model(model, tokenizer, self.folder, merge=merge)

    def restore(self, model, optimizer) -> None:
        """Optimiser state and random numbers of the checkpoint; its weights were loaded before."""
        if self.checkpoint:
            checkpoints.restore(self.checkpoint, model, optimizer, self.device)

    def finish(self, columns: dict[str, dict], extra: dict | None = None) -> None:
        """Writes summary.json, README.md and curves.png, prints the end table, removes checkpoints.

        Args:
            columns: "before", "after", ... -> split -> metrics. "held_out" is written under the
                column's name, others with their name behind it; "samples" are printed only.
            extra: keys of one script alone.
        """
        speed = round(self.tokens / self.seconds, 1) if self.seconds else None
        args = dataclasses.asdict(self._args)
        del args["resume"]
        values = {
            "script": self.script.name,
            "args": args,
            "steps": self.step,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": speed,
            **facts.machine(self.device),
            **self._sources,
            "kl_samples": args.get("kl_samples"),
            **facts.by_key(columns),
            **(extra or {}),
        }
        if is_main_process():
            curves.draw_curves(self.folder)
            write_json(self.folder / "summary.json", values)
            write_text(self.folder / "README.md", card.model_card(self.folder, values, columns))
            if self._track:
                self._track.finish(self.step, columns)
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            print_end_table(columns, self.folder, speed)
        wait_for_all()
        if world_size() > 1:
            dist.destroy_process_group()
