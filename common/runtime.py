"""What every run needs and no paper is about: device and dtype, threads, seeds, the run folder, metrics, checkpoints, several processes.

A run folder `runs/<name>/` holds args.json, metrics.jsonl, summary.json, the model as a transformers folder, script.py (a copy),
checkpoints/ and, where matplotlib is installed, curves.png. Checkpoints are transformers folders with optimizer.safetensors and state.json
beside the weights; nothing in them unpickles. They are written aside and renamed, so a kill at any moment leaves the last good one.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist

from common.data import InputError, micro_batches, row_length, row_tokens

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------------------- models


def quietly_checked(name: str, kind: str, flag: str = "") -> None:
    """Raises InputError at once where a hub id neither exists nor is in the local cache; prints nothing.

    One request with a short limit, instead of the libraries' half a minute of retries. `kind` is "model" or "dataset".
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    flag = flag or ("--model" if kind == "model" else "--data")
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except HFValidationError:
        raise InputError(f"{flag} {name}: no such file or folder, and not the form of a hub id.") from None
    with contextlib.suppress(Exception):
        if os.environ.get("HF_HUB_OFFLINE") not in {"1", "true", "TRUE", "True", "ON", "YES", "yes"}:
            try:
                huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=5)
                return
            except RepositoryNotFoundError:
                raise InputError(f"{flag} {name}: no such {kind} on the hub, or it is private, and no such file or folder here.") from None
    try:
        huggingface_hub.snapshot_download(name, repo_type=kind, local_files_only=True)
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # cached: use that copy, do not retry the hub
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    except Exception:
        raise InputError(f"{flag} {name}: no such file or folder here, and the hub cannot be reached for a {kind} of that name.") from None


def resolve_model(name: str, seed: int = 0, flag: str = "--model") -> str:
    """A local folder for `toy`, a folder, or a hub id (downloaded: safetensors where there are any, no other formats beside them)."""
    if name == "toy":
        from common import toy

        return str(toy.base_model(seed))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"{flag} {name}: the folder has no config.json, so it is not a transformers model.")
        return name
    import huggingface_hub

    quietly_checked(name, "model", flag)
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    weights = ["*.safetensors"]
    if not offline and not any(s.rfilename.endswith(".safetensors") for s in huggingface_hub.HfApi().model_info(name).siblings):
        weights = ["*.bin"]
    wanted = ["*.json", "*.txt", "*.model", "*.jinja", *weights]
    return huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"], local_files_only=offline)


def load_tokenizer(folder: str):
    """The tokenizer of a model folder, with a pad token distinct from EOS."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise InputError(f"--model {folder}: no tokenizer can be loaded from it ({str(error).splitlines()[0]}).") from None
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # encoders end a text with it
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {folder}: the tokenizer has no EOS token, so an answer could not end.")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(choose_pad_id(tokenizer))
    return tokenizer


def choose_pad_id(tokenizer) -> int:
    """An existing id to pad with where the tokenizer has none of its own: resized embeddings would break every other loader.

    The unknown token where it is not EOS, else a token that is named for it, else the last ordinary one: in a BPE vocabulary the rarest
    merge. Training masks by length, so the choice matters only to sequence-classification loaders, which look for the last token that is
    not padding.
    """
    vocabulary = tokenizer.get_vocab()
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    named = [tokenizer.unk_token, "<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>"]
    for token in named:
        if token is not None and vocabulary.get(token, tokenizer.eos_token_id) not in ends:
            return vocabulary[token]
    return max(i for i in vocabulary.values() if i not in ends and i not in tokenizer.all_special_ids)


def load_model(folder: str, device, tokenizer=None):
    """A causal LM in float32 with dropout off, its pad id set to the tokenizer's. Float32 weights: bf16 ones do not move at lr 1e-6."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except Exception as error:
        raise InputError(f"--model {folder}: cannot be loaded as a causal language model ({str(error).splitlines()[0]}).") from None
    if tokenizer is not None:
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    fuse_gelu(model)
    return model.to(device)


def load_classifier(folder: str, device, tokenizer):
    """A sequence-classification model with one label in float32, its pad id set to the tokenizer's; a head that the folder does not have is zero."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        labels = AutoConfig.from_pretrained(folder)
        trained = any("ForSequenceClassification" in name for name in labels.architectures or [])
        if trained and labels.num_labels != 1:
            raise InputError(f"--model {folder}: a sequence-classification model with {labels.num_labels} labels; expected one.")
        model, found = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32, output_loading_info=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--model {folder}: cannot be loaded for sequence classification ({str(error).splitlines()[0]}).") from None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found["missing_keys"] and parameter.shape[0] == 1:  # the last layer alone: zeros further down would block its gradient
                parameter.zero_()
    model.config.pad_token_id = tokenizer.pad_token_id
    fuse_gelu(model)
    return model.to(device)


def fuse_gelu(model: torch.nn.Module) -> None:
    """GPT-2's GELU, which transformers spells out in eight operations, as torch's one: the same function, a tenth less time, a quarter less memory."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def load_weights(folder: str | Path, name: str) -> dict[str, torch.Tensor]:
    """The weight called `name` of a model folder as {name: tensor}, or {} where its safetensors hold none of that name."""
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            if name in set(file.keys()):
                return {name: file.get_tensor(name)}
    return {}


def disable_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout probability to 0, those of functional dropout included, and leaves the saved configuration as it is."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def context_length(model) -> int:
    """Positions that the model has, or a large number where the configuration names none."""
    config = model.config.get_text_config()
    return next((v for k in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len") if isinstance(v := getattr(config, k, None), int)), 1 << 30)


def length_limit(wanted: int | None, model, tokenizer=None) -> int:
    """`--max-length`, by default the smaller of 1024 and the model's context; InputError where it is more than the context. An encoder's tokenizer may
    allow less than the model has positions."""
    context = min(context_length(model), getattr(tokenizer, "model_max_length", 1 << 30))
    if wanted is not None and wanted > context:
        raise InputError(f"--max-length {wanted}: the model's context has {context} positions.")
    return wanted or min(1024, context)


def is_tiny(model) -> bool:
    """Whether layers are so small that several CPU threads wait for each other most of the time."""
    return sum(p.numel() for p in model.parameters()) < 5_000_000


def as_forward(model, function):
    """`function(model, ...)` bound to the model: `as_forward(model, f)(x)` is `f(model, x)`, and works on a sharded model too.

    fully_shard gathers weights around forward() only; a function that calls parts of the model must be registered as a forward method.
    """
    if hasattr(model, "set_requires_gradient_sync"):  # only a fully_shard model has it
        from torch.distributed.fsdp import register_fsdp_forward_method

        setattr(model, function.__name__, types.MethodType(function, model))
        register_fsdp_forward_method(model, function.__name__)
        return getattr(model, function.__name__)
    return lambda *args, **kwargs: function(model, *args, **kwargs)


def shard(model):
    """Splits weights, gradients and optimiser state over all processes with torch's fully_shard, block by block."""
    from torch.distributed.fsdp import fully_shard

    blocks = set(getattr(model, "_no_split_modules", None) or [])
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module)
    fully_shard(model, reshard_after_forward=True)  # the root too: passes without a backward would leave its weights gathered
    return model


# ---------------------------------------------------------------------------------------------------------------- a run


def quiet_libraries() -> None:
    """No progress bars or advice from the libraries: what a run prints is its own."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def whole(value: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; all processes must ask for it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def git_commit() -> str | None:
    """The commit of the code that runs, with "+" where files differ from it; None outside a git checkout."""
    try:
        head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else None


def sha256_of_model(folder: str) -> str:
    """Hash of the weights files of a model folder, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in {".safetensors", ".bin"} and "model" in p.name):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def plain(value):
    """Numbers fit for JSON: nan and infinities become None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def means_of(sums: dict[str, float], rows: int) -> dict[str, float]:
    """Summed metrics as means over rows, or, where there is a "count NAME" beside a NAME, over what that counts; nan where it counts nothing."""
    counts = {name: sums.get(f"count {name}", rows) for name in sums if not name.startswith("count ")}
    return {name: sums[name] / count if count else math.nan for name, count in counts.items()}


def write_json(path: Path, value) -> None:
    """Writes aside and renames, so that the file is whole at any moment."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(plain(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


class Run:
    """One run: its folder, its processes, where it stands. Made by `start`."""

    def __init__(self, args, script: str):
        self.script = Path(script)
        self.world_size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 where a product stays float32
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        quiet_libraries()
        self.args = self._with_resumed(args)
        self._check()
        self.dtype = self._dtype()
        self.folder = Path(self.args.output_dir) / self.args.name if not args.resume else Path(args.resume)
        self.step, self.total, self.seconds, self.tokens = 0, 0, 0.0, 0
        self.stopping, self._signal, self._started = 0, 0, 0.0
        self._pending: list[dict] = []  # steps whose metrics are still on the device
        self._read: list[dict] = []  # steps read from it and not yet in metrics.jsonl
        if self.main and not args.resume and self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(f"{self.folder}: this run exists already; choose another --name, or go on with it: --resume {self.folder}")
        self.checkpoint = self._find_checkpoint() if args.resume else None
        if self.checkpoint:
            state = json.loads((self.checkpoint / "state.json").read_text())
            self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
            self._read = state["unlogged"]
            self.say(f"Going on with {self.folder} after step {self.step}.")
        if args.resume and self.main:
            self._drop_later_metrics()
        torch.manual_seed(self.args.seed)
        self.tracker = None

    # -- the start

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def say(self, *words) -> None:
        """Prints on the first process only."""
        if self.main:
            print(*words, flush=True)

    def _with_resumed(self, args):
        """The arguments of the run to go on with, or `args` with a name where none was given."""
        if not args.resume:
            if args.name:
                return args
            stem = f"{self.script.stem}-{Path(args.model).name}-seed{args.seed}"
            taken = [stem, *(f"{stem}-{i}" for i in range(2, 10_000))]
            name = next(n for n in taken if not (Path(args.output_dir) / n).exists())
            if self.world_size > 1:
                shared = [name]
                dist.broadcast_object_list(shared, src=0)
                name = shared[0]
            return dataclasses.replace(args, name=name)
        path = Path(args.resume) / "args.json"
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            raise InputError(f"--resume {args.resume}: {path} cannot be read; expected the folder of a run.") from None
        if saved.pop("script", None) != self.script.name:
            raise InputError(f"--resume {args.resume}: that run was made by another script, not by {self.script.name}.")
        if (Path(args.resume) / "summary.json").exists():
            raise InputError(f"--resume {args.resume}: that run is finished; nothing is left to do.")
        for field in dataclasses.fields(args):
            given, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
            on_line = any(word.split("=")[0] in {flag, flag.replace("--", "--no-")} for word in sys.argv[1:])
            differs = field.name in saved and given != saved[field.name] and field.name != "resume"
            if differs and (on_line or given != field.default):
                raise InputError(f"--resume {args.resume}: {flag} is {saved[field.name]} in that run and cannot become {given}.")
        known = {field.name for field in dataclasses.fields(args)}
        return dataclasses.replace(args, **{k: v for k, v in saved.items() if k in known and k != "resume"})

    def _check(self) -> None:
        """Ranges of the arguments, for those that a script has; one sentence for the first that is wrong."""
        finite = math.isfinite
        rules = {
            "batch_size micro_batch_size n ref_samples max_new_tokens eval_every save_every log_every completions top_k ppo_epochs": (
                lambda v: v >= 1,
                "at least 1",
            ),
            "lr beta": (lambda v: v > 0 and finite(v), "a positive number"),
            "epochs": (lambda v: v > 0, "above 0"),
            "max_steps": (lambda v: v >= -1 and v != 0, "at least 1, or -1 for no limit"),
            "max_length": (lambda v: v is None or v >= 2, "at least 2"),
            "head_lr": (lambda v: v is None or (v > 0 and finite(v)), "a positive number"),
            "partition_lr": (lambda v: v > 0 and finite(v), "a positive number"),
            "temperature clip value_clip": (lambda v: v > 0 and finite(v), "a positive number"),
            "top_p gamma gae_lambda": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
            "beta_log_z": (finite, "a finite number"),
            "positive_weight negative_weight": (lambda v: v >= 0 and finite(v), "at least 0"),
            "holdout head_dropout": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
            "warmup": (lambda v: v >= 0, "at least 0"),
            "max_grad_norm": (lambda v: v > 0, "above 0 (inf: no clipping)"),
            "dtype": (lambda v: v in {"auto", "float32", "bfloat16"}, "auto, float32 or bfloat16"),
            "name": (lambda v: not v or Path(v).name == v, "one folder name"),
            "label_smoothing": (lambda v: 0 <= v < 0.5, "at least 0 and below 0.5"),
            "lam prior_decay dph_weight dpo_weight weight_decay kl_samples kl vf_coef": (lambda v: v >= 0 and finite(v), "at least 0"),
            "context": (lambda v: v >= 2, "at least 2"),
            "tokens": (lambda v: v > 0 and finite(v), "a positive number"),
            "vocabulary": (lambda v: v >= 257, "at least 257: a token for each byte, and the end of a document"),
            "alpha": (lambda v: v >= 0 and finite(v), "at least 0"),
            "drop": (lambda v: 0 <= v <= 1, "between 0 and 1"),
            "threshold_quantile": (lambda v: v is None or 0 <= v <= 1, "between 0 and 1"),
            "samples red_team": (lambda v: v >= 0, "at least 0"),
        }
        for names, (good, expected) in rules.items():
            for name in names.split():
                if hasattr(self.args, name) and not good(getattr(self.args, name)):
                    raise InputError(f"--{name.replace('_', '-')} {getattr(self.args, name)}: expected {expected}.")

    def _dtype(self):
        """The dtype of matrix products: bfloat16 on GPUs that have it, else float32. Weights, logits and sums stay float32 throughout."""
        wanted = self.args.dtype
        if wanted == "auto":
            wanted = "bfloat16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32

    def autocast(self):
        """The context of every forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def prepare(self, model, dynamic: bool | None = True):
        """Sets threads by size, gradient checkpointing, compilation and, with several processes, sharding. Call before the optimiser is made.

        dynamic: whether batches differ in shape, for the compiler; None: it finds out.
        """
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and is_tiny(model):
            torch.set_num_threads(1)
        if self.args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.args.compile:
            model.base_model.compile(dynamic=dynamic)
        if self.world_size > 1:
            shard(model)
        return model

    def _tracker(self):
        """None, or a function (step, numbers) that sends metrics to tensorboard or wandb."""
        if self.args.track == "none" or not self.main:
            return None
        try:
            if self.args.track == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(str(self.folder / "tensorboard"))
                return lambda step, numbers: [writer.add_scalar(k, v, step) for k, v in numbers.items() if isinstance(v, (int, float))]
            import wandb

            wandb.init(project="preferences", name=self.args.name, config=dataclasses.asdict(self.args))
            return lambda step, numbers: wandb.log(numbers, step=step)
        except ImportError:
            raise InputError(f"--track {self.args.track} needs a package that is not installed: pip install {self.args.track}") from None

    # -- values kept with the run

    def _make_folder(self) -> None:
        """Makes the run's folder once model and data were found to be good, so that a wrong path leaves nothing behind."""
        if self.main and not (self.folder / "args.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.script, self.folder / "script.py")
            write_json(self.folder / "args.json", {"script": self.script.name, **dataclasses.asdict(self.args)})
        self.tracker = self.tracker or self._tracker()

    def keep(self, name: str, compute) -> dict[str, torch.Tensor]:
        """A dict of tensors computed once and kept in the run folder. A resumed run loads it: recomputed in other batches it would differ
        in the last digits. Random numbers are left as they were."""
        self._make_folder()
        path = self.folder / f"{name}.safetensors"
        if self.args.resume and path.exists():
            return safetensors.torch.load_file(path)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            values = compute()
        if self.main:
            aside = path.with_suffix(".part")
            safetensors.torch.save_file({k: v.contiguous() for k, v in values.items()}, aside)
            os.replace(aside, path)
        return values

    def remember(self, name: str, compute) -> dict:
        """The same for a JSON value."""
        self._make_folder()
        path = self.folder / f"{name}.json"
        if self.args.resume and path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        value = compute()
        if self.main:
            write_json(path, value)
        return value

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the run's device, copied while the device computes."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor.to(self.device)

    def share_out(self, items: list) -> list:
        """This process's items, as many on each: the last ones are made up by repeating the first. `gather` puts them together again."""
        whole_rounds = -(-len(items) // self.world_size) * self.world_size
        return [items[i % len(items)] for i in range(whole_rounds)][self.rank :: self.world_size]

    def gather(self, items: list) -> list:
        """All processes' items in the order of `items[rank::world_size]`, on every process."""
        if self.world_size == 1:
            return items
        parts = [None] * self.world_size
        dist.all_gather_object(parts, items)
        n = sum(map(len, parts))
        return [parts[i % self.world_size][i // self.world_size] for i in range(n)]

    def gather_all(self, items: list) -> list:
        """All processes' items, process by process, on every process; as many as each has."""
        if self.world_size == 1:
            return items
        parts = [None] * self.world_size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def gathered(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Tensors of all processes, [n] each and of any length, as one, float64, on the CPU, on every process."""
        return torch.cat([torch.zeros(0, dtype=torch.float64), *self.gather_all([part.detach().double().cpu() for part in parts])])

    # -- the loop

    def learning_rate(self, step: int, steps: int) -> float:
        """Linear warm-up, then linear decay to 0. `warmup` below 1 is a share of all steps, else a number of steps."""
        warmup = self.args.warmup * steps if self.args.warmup < 1 else self.args.warmup
        if step < warmup:
            return self.args.lr * (step + 1) / (warmup + 1)
        return self.args.lr * (steps - step) / max(1.0, steps - warmup)

    def steps(self, total: int):
        """Step numbers still to do, under a progress bar. Ctrl-C and SIGTERM end the step at hand, save and say how to go on."""
        from tqdm import tqdm

        def stop(number, frame):
            self._signal = number
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        self.total = total
        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        interval = 0.2 if sys.stderr.isatty() else 10.0
        bar = tqdm(total=total, initial=self.step, desc="training", unit="step", disable=not self.main, mininterval=interval, maxinterval=interval)
        try:
            while self.step < total:
                self._started = time.perf_counter()
                yield self.step
                bar.update(1)
                if self.stopping:
                    bar.close()
                    self.say(f"Stopped after step {self.step}; everything is saved. Go on with: python {self.script.name} --resume {self.folder}")
                    raise SystemExit(128 + self.stopping)
        finally:
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def add(self, metrics: dict, real: bool) -> None:
        """Adds a micro-batch's summed metrics to the step at hand. They stay on the device until they are logged, as means over its rows, or over
        "count NAME" where that stands beside NAME."""
        if not self._pending or "step" in self._pending[-1]:
            self._pending.append({"sums": {}})
        sums = self._pending[-1]["sums"]
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.detach() * float(real)

    def log(self, rows: list[dict], grad_norm: torch.Tensor, lr: float, targets: int = 1) -> None:
        """Closes an optimiser step over `rows` (of all processes), and writes a line to metrics.jsonl where one is due. The metrics were summed over
        `targets` things in each row: target tokens, where rows are chunks of a corpus."""
        self.step += 1
        self.tokens += sum(map(row_tokens, rows))
        self._pending[-1] |= {"step": self.step, "rows": len(rows) * targets, "grad_norm": grad_norm.detach(), "lr": lr}
        self.stopping = self._agreed_stop()
        if any(map(self.due, (self.args.log_every, self.args.eval_every, self.args.save_every))) or self.stopping:
            self._read_metrics()
        if self.due(self.args.log_every):
            steps, self._read = self._read, []
            sums = {name: sum(p["sums"][name] for p in steps) for name in steps[0]["sums"]}
            means = means_of(sums, sum(p["rows"] for p in steps))
            self.write("train", {**means, "grad_norm": steps[-1]["grad_norm"], "lr": lr})
        now = time.perf_counter()
        self.seconds += now - self._started  # steps wait for the device only where metrics are read, so single steps may seem short or long

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is due after the step just closed; always so after the last one."""
        return self.step % every == 0 or self.step == self.total

    def _agreed_stop(self) -> int:
        """The signal that some process got, on all of them."""
        if self.world_size == 1:
            return self._signal
        flag = torch.tensor(self._signal, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def _read_metrics(self) -> None:
        """Brings the metrics since the last reading from the device; stops the run where a loss or gradient is not finite."""
        steps, self._pending = self._pending, []
        names = list(steps[0]["sums"])
        table = torch.stack([torch.stack([p["sums"][n].double() for n in names]) for p in steps])  # [steps, metrics]
        norms = torch.stack([whole(p["grad_norm"]).double() for p in steps]).tolist()
        if self.world_size > 1:
            dist.all_reduce(table)
        for p, sums, norm in zip(steps, table.tolist(), norms):
            p |= {"sums": dict(zip(names, sums)), "grad_norm": norm}
            if not (math.isfinite(p["sums"]["loss"]) and math.isfinite(norm)):
                what = "gradient" if math.isfinite(p["sums"]["loss"]) else "loss"
                kept = f"The checkpoint {self.checkpoint} is kept" if self.checkpoint else "No checkpoint had been written yet"
                cause = "the learning rate is likely too high" if p["step"] > 1 else "the model or a row likely holds extreme values"
                raise InputError(f"\nThe {what} of step {p['step']} is not finite: {cause}. {kept}; the run is in {self.folder}.")
        self._read += steps

    def write(self, split: str, numbers: dict) -> None:
        """One line of metrics.jsonl, and of the tracker where there is one."""
        if self.main and numbers:
            line = plain({"step": self.step, "split": split, **numbers})
            self.append("metrics.jsonl", [line])
            if self.tracker:
                self.tracker(self.step, {f"{split}/{k}": v for k, v in numbers.items()})

    def append(self, name: str, lines: list[dict]) -> None:
        """Adds lines to a JSON-lines file of the run folder."""
        if self.main:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(plain(line), allow_nan=False) + "\n" for line in lines)

    # -- passes without gradients

    def map_rows(self, function, rows: list) -> torch.Tensor:
        """`function(indices)` -> [indices, ...] over all rows, in batches of similar length, spread over the processes: [rows, ...], on the CPU."""
        order, found = sorted(range(len(rows)), key=lambda i: row_length(rows[i])), []
        for mine, real in micro_batches(order, self.args.micro_batch_size, self.rank, self.world_size):
            with torch.no_grad(), self.autocast():
                values = function(mine)
            found += [(mine, values.float().cpu())] if real else []
        if self.world_size > 1:
            parts = [None] * self.world_size
            dist.all_gather_object(parts, found)
            found = [pair for part in parts for pair in part]
        if not found:
            return torch.zeros(0, 2)
        indices = torch.tensor([i for mine, _ in found for i in mine])
        return torch.cat([values for _, values in found])[indices.argsort()]

    def mean_metrics(self, function, rows: list, targets: int = 1) -> dict[str, float]:
        """`function(indices)` -> summed metrics, as means over all rows, or over the `targets` tokens in each of them."""
        sums: dict = {}
        order = sorted(range(len(rows)), key=lambda i: row_length(rows[i]))
        for mine, real in micro_batches(order, self.args.micro_batch_size, self.rank, self.world_size):
            with torch.no_grad(), self.autocast():
                for name, value in function(mine).items():
                    sums[name] = sums.get(name, 0.0) + value.double() * real
        if not sums:
            return {}
        table = torch.stack(list(sums.values()))
        if self.world_size > 1:
            dist.all_reduce(table)
        return means_of(dict(zip(sums, table.tolist())), len(rows) * targets)

    # -- checkpoints

    def _find_checkpoint(self) -> Path | None:
        """The newest whole checkpoint. Checkpoints get their name when they are complete, so whatever has the name is whole."""
        return max((self.folder / "checkpoints").glob("step-*"), default=None)

    def _drop_later_metrics(self) -> None:
        """Lines after the checkpoint will be written again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}") and json.loads(line)["step"] <= self.step]
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def save_model(self, model, tokenizer, folder: Path) -> None:
        """The model as a transformers folder, gathered on the first process."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = None
        if self.world_size > 1:
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            once = {name for pairs in (model.named_parameters(), model.named_buffers()) for name, _ in pairs}
            state = {name: value for name, value in state.items() if name in once}  # tied weights are written once
        if self.main:
            model.save_pretrained(folder, state_dict=state)
            path = folder / "config.json"
            config = json.loads(path.read_text())
            if config.get("architectures"):  # fully_shard renames the class
                config["architectures"] = [name.removeprefix("FSDP") for name in config["architectures"]]
                write_json(path, config)
            tokenizer.save_pretrained(folder)

    def save(self, model, optimizer, tokenizer) -> None:
        """A checkpoint of everything that the rest of the run depends on: weights, optimiser, position in the data, random numbers."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})  # on the first process only
        aside, final = (self.folder / "checkpoints" / f"{kind}-{self.step:08d}" for kind in ("part", "step"))
        if self.main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.save_model(model, tokenizer, aside)
        if self.main and not final.exists():
            tensors = {f"{name}|{key}": value.contiguous() for name, values in state.items() for key, value in values.items()}
            tensors["rng|cpu"] = torch.get_rng_state()
            if self.device.type == "cuda":
                tensors["rng|cuda"] = torch.cuda.get_rng_state(self.device)
            safetensors.torch.save_file(tensors, aside / "optimizer.safetensors")
            write_json(aside / "state.json", {"step": self.step, "seconds": self.seconds, "tokens": self.tokens, "unlogged": self._read})
            os.replace(aside, final)
            for old in (self.folder / "checkpoints").iterdir():
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
        self.checkpoint = final
        if self.world_size > 1:
            dist.barrier()

    def restore(self, model, optimizer) -> None:
        """Optimiser state and random numbers of the checkpoint; the weights were loaded from its folder."""
        if not self.checkpoint:
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

        tensors = safetensors.torch.load_file(self.checkpoint / "optimizer.safetensors")
        torch.set_rng_state(tensors.pop("rng|cpu"))
        if "rng|cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors.pop("rng|cuda"), self.device)
        state: dict = {}
        for name, value in tensors.items():
            parameter, _, key = name.rpartition("|")
            if parameter != "rng":
                state.setdefault(parameter, {})[key] = value
        groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
        set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=StateDictOptions(full_state_dict=True))

    # -- the end

    def finish(self, columns: dict[str, dict], base_folder: str, data_sha256: str, extra: dict | None = None, flops_per_token: float | None = None) -> dict:
        """Writes summary.json and curves.png and removes the checkpoints, which the finished model replaces.

        Args:
            columns: "before", "after", ... -> split -> the dict of a script's `report`; its "samples" stay out of the summary. "held_out" is
                written under the column's name, "unseen" under the name with "_unseen" behind it.
            base_folder: of the model that training began with; empty: a new one.
            flops_per_token: of training, for the share of the devices' peak that the steps reached.
            extra: keys of one script alone.
        """
        import transformers

        summary = {
            "script": self.script.name,
            "args": {k: v for k, v in dataclasses.asdict(self.args).items() if k != "resume"},
            "steps": self.step,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": (speed := round(self.tokens / self.seconds, 1) if self.seconds else None),
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
            "git_commit": git_commit(),
            "data_sha256": data_sha256,
            "model_sha256": sha256_of_model(base_folder) if base_folder else None,
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "processes": self.world_size,
            "kl_samples": getattr(self.args, "kl_samples", None),
        }
        if flops_per_token is not None:
            peak = peak_flops(self.device, self.dtype)
            summary["peak_flops_share"] = speed * flops_per_token / (peak * self.world_size) if peak and speed else None
        for name, splits in columns.items():
            for split, values in splits.items():
                key = name if split == "held_out" else f"{name}_{split}"
                summary[key] = {k: v for k, v in values.items() if k != "samples"}
        summary = plain(summary | (extra or {}))
        if self.main:
            draw_curves(self.folder)
            write_json(self.folder / "summary.json", summary)
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()
        return summary


def peak_memory_bytes(device) -> int:
    """Largest memory of the run: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return f"cpu, {names[0] if names else platform.machine()}, {os.cpu_count()} cores"


PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def peak_flops(device, dtype) -> float | None:
    """Peak of dense bfloat16 products of a GPU in FLOP/s, float32 sums, as its maker states it; None for other devices and for float32."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None) if dtype == torch.bfloat16 else None


def training_flops(model, context: int) -> float:
    """Floating-point operations of training on one token, forward and backward: 6 for each weight that multiplies, and attention over `context`.

    Embeddings are looked up and count only where they are the output layer too. Attention counts all of the context, as is usual, though half
    of it is masked; recomputed activations are not counted.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.weight is not head.weight)
    weights = sum(p.numel() for p in model.parameters()) - looked_up
    return 6.0 * weights + 12.0 * config.num_hidden_layers * config.hidden_size * context


def start(args, script: str) -> Run:
    """Begins a run, or takes one up again. `run.args` are the arguments that hold from here on. Raises InputError for bad ones."""
    return Run(args, script)


def draw_curves(folder: Path) -> None:
    """curves.png from metrics.jsonl: a panel for each metric, training and held-out; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    names = [k for k in dict.fromkeys(k for line in lines for k in line) if k not in {"step", "split"}]
    if not names:
        return
    columns = min(4, len(names))
    figure, axes = plt.subplots(-(-len(names) // columns), columns, figsize=(3.4 * columns, 2.5 * -(-len(names) // columns)), squeeze=False)
    for axis, name in zip(axes.flat, names):
        for split, style in (("train", "-"), ("held_out", "o--")):
            points = [(line["step"], line[name]) for line in lines if line["split"] == split and line.get(name) is not None]
            if points:
                axis.plot(*zip(*points), style, markersize=3, linewidth=1.2, label=split.replace("_", "-"))
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("step", fontsize=7)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)
