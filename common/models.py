"""Models and tokenizers: found, loaded in float32, sharded; what of them other code must know."""

import hashlib
import os
import types
from pathlib import Path

import safetensors.torch
import torch

from adapters import lora
from chat.templates import end_of_turn, use_template
from common import InputError, first_line
from common.files import check_hub_id
from common.generate import is_tiny
from toy import base

UNLIMITED = 1 << 30  # positions, where a configuration names no limit
PINNED: dict[str, str | None] = {}  # hub id -> the revision that a resumed run began with


def resolve_model(name: str, seed: int = 0, flag: str = "--model", revision: str | None = None) -> str:
    """A local folder for `toy` or `toy:hard`, a folder, or a hub id, which is downloaded."""
    if name in base.MODELS:
        return str(base.base_model(seed, base.MODELS[name]))
    if Path(name).is_dir():
        if not ((Path(name) / "config.json").is_file() or lora.has_adapter(name)):
            raise InputError(f"{flag} {name}: the folder has no config.json, so it is not a transformers model.")
        return name
    import huggingface_hub

    check_hub_id(name, "model", flag)
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    weights = ["*.safetensors"]
    files = [] if offline else huggingface_hub.HfApi().model_info(name).siblings
    if files and not any(file.rfilename.endswith(".safetensors") for file in files):
        weights = ["*.bin"]
    wanted = {"allow_patterns": ["*.json", "*.txt", "*.model", "*.jinja", *weights], "ignore_patterns": ["*/*"]}
    revision = revision or PINNED.get(name)
    return huggingface_hub.snapshot_download(name, revision=revision, **wanted, local_files_only=offline)


def load_tokenizer(folder: str, chat_template: str | None = None):
    """The tokenizer of a model folder, with a pad token distinct from EOS; chat_template: a file
    with one in place of its own."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"--model {folder}: no tokenizer can be loaded from it ({first_line(error)}).") from None
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # encoders end a text with it
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {folder}: the tokenizer has no EOS token, so an answer could not end.")
    if chat_template:
        use_template(tokenizer, chat_template)
    if token := end_of_turn(tokenizer):
        tokenizer.eos_token = token  # answers end in it, in the rows and where the model samples
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(choose_pad_id(tokenizer))
    return tokenizer


def choose_pad_id(tokenizer) -> int:
    """An existing id to pad with where the tokenizer has none of its own: resized embeddings would
    break every other loader.

    The unknown token where it is not EOS, else a token that is named for it, else the last ordinary
    one: in a BPE vocabulary the rarest merge. Training masks by length, so the choice matters only
    to sequence-classification loaders, which look for the last token that is not padding."""
    vocabulary = tokenizer.get_vocab()
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    named = [tokenizer.unk_token, "<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>"]
    for token in named:
        if token is not None and vocabulary.get(token, tokenizer.eos_token_id) not in ends:
            return vocabulary[token]
    return max(i for i in vocabulary.values() if i not in ends and i not in tokenizer.all_special_ids)


def load_model(folder: str, device, tokenizer=None):
    """A causal LM in float32 (bf16 weights do not move at lr 1e-6), dropout off, with a pad id.

    Raises InputError where weights are missing: transformers would go on with random ones."""
    from transformers import AutoModelForCausalLM

    # Keys that heads share need not be copied for each head, which a CPU takes its time for.
    os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = str(int(torch.device(device).type == "cpu"))
    model, loading = load_with(AutoModelForCausalLM, folder, "a causal language model")
    refuse_missing(f"--model {folder}", loading["missing_keys"])
    if tokenizer is not None:
        rows = model.get_input_embeddings().weight.shape[0]
        largest = max(tokenizer.get_vocab().values())
        if largest >= rows:
            raise InputError(f"--model {folder}: the tokenizer has ids up to {largest}, the model {rows} embeddings.")
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.base_model is model:  # Llama 4 types name a body that they do not have
        bodies = [name for name, child in model.named_children() if hasattr(child, "get_input_embeddings")]
        model.base_model_prefix = bodies[0] if len(bodies) == 1 else model.base_model_prefix
    return ready(model, folder).to(device)


def load_with(auto_class, folder: str, what: str, flag: str = "--model", **options):
    """(model in float32, what loading it said) by one of transformers' Auto classes.

    Code that comes with a model is not run."""
    options = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True} | options
    try:
        return lora.from_pretrained(auto_class, folder, resolve_model, **options)
    except Exception as error:
        needs_code = "trust_remote_code" in str(error)
        reason = "it needs code of its own to run, which is refused" if needs_code else first_line(error)
        raise InputError(f"{flag} {folder}: cannot be loaded as {what} ({reason}).") from None


def refuse_missing(flag: str, names) -> None:
    """Raises InputError where weights are missing in a folder."""
    if names := sorted(names):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(f"{flag}: weights are missing in the folder ({', '.join(names[:3])}{more}).")


def ready(model, folder: str):
    """The model with a fast GELU and dropout off; InputError where a weight is not finite."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"--model {folder}: the weight {name} holds values that are not finite.")
    fuse_gelu(model)
    disable_dropout(model)
    return model


def fuse_gelu(model: torch.nn.Module) -> None:
    """GPT-2's GELU of eight operations as torch's one: a tenth faster, a quarter less memory."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def load_weights(folder: str | Path, *names: str) -> dict[str, torch.Tensor]:
    """Those of the named weights that the safetensors of a model folder have, by name."""
    weights = {}
    for path in sorted(Path(folder).glob("*model*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            keys = {key.removeprefix(lora.PREFIX): key for key in sorted(file.keys())}
            weights |= {name: file.get_tensor(keys[name]) for name in names if name in keys}
    return weights


def disable_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout probability to 0; the saved configuration stays as it is."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def context_length(model) -> int:
    """Positions that the model has, or a large number where the configuration names none."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        if isinstance(positions := getattr(config, name, None), int):
            return positions
    return UNLIMITED


def length_limit(wanted: int | None, model, tokenizer=None) -> int:
    """`--max-length`, by default the smaller of 1024 and the model's context; InputError where it
    is more than the context. An encoder's tokenizer may allow less than the model has positions."""
    context = min(context_length(model), getattr(tokenizer, "model_max_length", UNLIMITED))
    if wanted is not None and wanted > context:
        raise InputError(f"--max-length {wanted}: the model's context has {context} positions.")
    return wanted or min(1024, context)


def choose_dtype(dtype: str, model, device: torch.device) -> str:
    """What `--dtype auto` is: bfloat16 on GPUs that have it and, unless the model is tiny, on
    processors that multiply it in tiles (AMX), several times as fast as float32."""
    if dtype == "auto" and device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    has_tiles = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    return dtype if dtype != "auto" else "bfloat16" if has_tiles and not is_tiny(model) else "float32"


def bind_forward(model, function):
    """`function(model, ...)` bound to the model: `bind_forward(model, f)(x)` is `f(model, x)`, and
    works on a sharded model too.

    fully_shard gathers weights around forward() only; a function that calls parts of the model must
    be registered as a forward method."""
    if hasattr(model, "set_requires_gradient_sync"):  # only a fully_shard model has it
        from torch.distributed.fsdp import register_fsdp_forward_method

        setattr(model, function.__name__, types.MethodType(function, model))
        register_fsdp_forward_method(model, function.__name__)
        return getattr(model, function.__name__)
    return lambda *args, **kwargs: function(model, *args, **kwargs)


def shard(model, dtype: torch.dtype = torch.float32):
    """Splits weights, gradients and optimiser state over all processes, block by block.

    dtype: what blocks are gathered in, under autocast; nothing is kept, summed, optimised in it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blocks = set(getattr(model, "_no_split_modules", None) or [])
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)  # a cast rounds the residual stream
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mp_policy=policy)
    # The root stays float32, and reshards too: passes without a backward would leave it gathered.
    return fully_shard(model, reshard_after_forward=True)


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; all processes must ask for it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def sha256_of_model(folder: str) -> str:
    """Hash of the weights files of a model folder, in order of name, and of its adapter's base."""
    digest = hashlib.sha256()
    for path in lora.weights_files(folder, resolve_model):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
