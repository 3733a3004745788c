"""LoRA, Hu et al. 2021, arXiv 2106.09685: the pretrained weights are frozen, and beside each linear
layer W of the body two thin matrices train, W x + 2 B A x.

A is [rank, inputs] and random, B [outputs, rank] and zero: the first step starts from the model as
it was. The layers are peft's, put into the model where the linear ones were, so that its class,
body and output layer stay what they are. What is read, merged and written here is plain tensors,
so a folder with an adapter loads without peft.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch

from common import InputError, first_line
from common.files import read_json
from common.processes import print0, world_size

SCALE = 2  # alpha / rank
PREFIX = "base_model.model."  # of the names in an adapter's file, as peft writes them
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # of sequence classifiers, [labels, hidden]


@dataclass
class Adapter:
    """What a model with an adapter knows of it.

    base, revision: the pretrained model that the saved adapter belongs to. layers: names of the
    adapted ones. heads: names of modules that train whole. earlier: A and B of an adapter that the
    start brought, by layer, for saving; it is merged into the frozen weights.
    """

    rank: int
    base: str
    revision: str | None
    settings: dict
    layers: list[str]
    heads: list[str]
    earlier: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def check_arguments(args) -> None:
    """InputError where --merge has nothing to merge, or peft is missing."""
    rank = getattr(args, "lora_rank", 0)
    if rank:
        import_peft(rank)
    elif getattr(args, "merge", False):
        raise InputError("--merge: without an adapter there is nothing to merge; give --lora-rank with it.")


def import_peft(rank: int):
    """The package peft; InputError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        how = "pip install peft (see requirements-optional.txt)"
        raise InputError(f"--lora-rank {rank}: needs peft ({first_line(error)}); {how}") from None
    return peft


# -- folders


def has_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (Path(folder) / CONFIG).is_file()


def base_folder(folder: str, resolve) -> str:
    """The folder of the weights that an adapter belongs to, or the folder itself.

    resolve: `common.models.resolve_model`, name -> local folder."""
    if not has_adapter(folder):
        return folder
    settings = read_settings(folder)
    name, where = settings["base_model_name_or_path"], f"{Path(folder) / CONFIG}, base_model_name_or_path"
    base = resolve(name, flag=where, revision=settings.get("revision"))
    if has_adapter(base):
        raise InputError(f"{Path(folder) / CONFIG}: its base {name} is an adapter too; expected a whole model.")
    return base


def read_settings(folder: str | Path) -> dict:
    """adapter_config.json of a plain LoRA; InputError where it is something else."""
    path = Path(folder) / CONFIG
    settings = read_json(path, "", "expected the settings of a LoRA adapter")
    others = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if settings.get(name)]
    others += ["bias"] if settings.get("bias", "none") != "none" else []
    if settings.get("peft_type") != "LORA" or others:
        kind = ", ".join(others) or settings.get("peft_type")
        raise InputError(f"{path}: only plain LoRA adapters are read here, not {kind}; merge it with peft first.")
    if not (settings.get("r") and settings.get("lora_alpha") and settings.get("base_model_name_or_path")):
        raise InputError(f"{path}: expected r, lora_alpha and base_model_name_or_path.")
    return settings


def read_adapter(folder: str | Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
    """(A, B) of each adapted layer, scaled as here, W + 2 B A; and the other tensors, of heads."""
    settings, path = read_settings(folder), Path(folder) / WEIGHTS
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}).") from None
    tensors = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    ratio = settings["lora_alpha"] / settings["r"] / SCALE
    layers, others = {}, {}
    for name, value in tensors.items():
        layer, _, kind = name.partition(".lora_")
        if kind == "A.weight" and f"{layer}.lora_B.weight" in tensors:
            layers[layer] = (value.float(), tensors[f"{layer}.lora_B.weight"].float() * ratio)
        elif not kind:
            others[name] = value
        elif kind != "B.weight":
            raise InputError(f"{path}: only plain LoRA adapters of linear layers are read here, not {name}.")
    return layers, others


def from_pretrained(auto_class, folder: str, resolve, **options):
    """(model, what loading it said) of a folder; an adapter is merged into its base's weights."""
    if not has_adapter(folder):
        return auto_class.from_pretrained(folder, **options)
    layers, others = read_adapter(folder)
    labels = [others[name].shape[0] for name in HEADS if name in others]
    if "SequenceClassification" in auto_class.__name__ and labels:
        options = {"num_labels": labels[0]} | options
    model, loading = auto_class.from_pretrained(base_folder(folder, resolve), **options)
    try:
        merge_layers({name: model.get_submodule(name) for name in layers}, model.state_dict(), layers)
        model.load_state_dict(others, strict=False)
    except (AttributeError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: the adapter does not fit its base model ({first_line(error)}).") from None
    loading["missing_keys"] = set(loading["missing_keys"]) - set(others)
    return model, loading


@torch.no_grad()
def merge_layers(modules: dict, state: dict[str, torch.Tensor], layers: dict) -> None:
    """Adds 2 B A to the weight of each layer in a state dict, in place; modules: the layers."""
    for name, (down, up) in layers.items():
        target = state[f"{name}.weight"]
        delta = SCALE * up.to(target.device) @ down.to(target.device)  # [outputs, inputs]
        is_transposed = type(modules[name]).__name__ == "Conv1D"  # GPT-2's linear layers
        target.add_((delta.T if is_transposed else delta).to(target.dtype))


def weights_files(folder: str, resolve) -> list[Path]:
    """Weights files of a model folder, in order of name; those of an adapter's base come first."""
    folders = [base_folder(folder, resolve), folder] if has_adapter(folder) else [folder]
    kinds = {".safetensors", ".bin"}
    return [p for place in folders for p in sorted(Path(place).iterdir()) if p.suffix in kinds and "model" in p.name]


def start_of(checkpoint: Path | None, folder: str) -> Path | str:
    """Where the weights of a run come from: its checkpoint, or what it began with where that is
    missing or holds an adapter only."""
    return folder if checkpoint is None or has_adapter(checkpoint) else checkpoint


# -- models


def add_adapter(model, rank: int, name: str, folder: str, checkpoint: Path | None = None):
    """Freezes a model and puts an adapter on all linear layers of its body; rank 0: neither.

    Heads beside the body train whole. The adapter is new, or that of a checkpoint.

    Args:
        name, folder: what `--model` names, and the folder that it led to.
    """
    if not rank:
        return model
    heads = heads_of(model)
    is_head = [f"{head}." for head in heads]
    layers = {n: m for n, m in model.base_model.named_modules() if type(m).__name__ in {"Linear", "Conv1D"}}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    layers = {prefix + n: m for n, m in layers.items() if not f"{prefix}{n}.".startswith(tuple(is_head))}
    layers = {n: m for n, m in layers.items() if m is not model.get_output_embeddings()}
    adapter = Adapter(rank, *base_of(name, folder), settings_for(model, layers), list(layers), heads)
    if has_adapter(folder):
        adapter.earlier = earlier_layers(model, folder, adapter)
    peft = import_peft(rank)
    try:
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, lora_dropout=0.0, **adapter.settings), model
        )
    except ValueError as error:
        raise InputError(f"--lora-rank {rank}: {first_line(error)}") from None
    del model.peft_config  # transformers would take the model for one that it adapted itself
    model.adapter = adapter
    for head in heads:
        model.get_submodule(head).requires_grad_(True)
    if checkpoint:
        load_adapter(model, checkpoint)
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad or whole) for whole in (False, True)]
    print0(f"LoRA of rank {rank}, alpha {SCALE * rank}, on {len(layers)} layers: {sizes[0]:,} of {sizes[1]:,} train.")
    return model


def heads_of(model) -> list[str]:
    """Modules beside the body and the output layer, and an encoder's pooler, which a classifier
    can have anew."""
    body, output = model.base_model, model.get_output_embeddings()
    if body is model:
        return []
    beside = {
        n: child for n, child in model.named_children() if child is not body and any(True for _ in child.parameters())
    }
    heads = [n for n, child in beside.items() if all(module is not output for module in child.modules())]
    return heads + [f"{model.base_model_prefix}.pooler"] * (getattr(body, "pooler", None) is not None)


def settings_for(model, layers: dict) -> dict:
    """peft's settings of which layers an adapter is on: the last parts of their names."""
    ends = sorted({name.rsplit(".")[-1] for name in layers})
    same = [n for n, m in model.named_modules() if n not in layers and n.rsplit(".")[-1] in ends]
    transposed = any(type(module).__name__ == "Conv1D" for module in layers.values())
    return {"target_modules": ends, "exclude_modules": same or None, "fan_in_fan_out": transposed}


def base_of(name: str, folder: str) -> tuple[str, str | None]:
    """(name or path, revision) of the whole model that an adapter saved here will belong to."""
    if has_adapter(folder):
        settings = read_settings(folder)
        return settings["base_model_name_or_path"], settings.get("revision")
    if Path(folder).parent.name == "snapshots":  # a download of the hub's has its revision in its path
        return name, Path(folder).name
    return str(Path(folder).resolve()), None


def earlier_layers(model, folder: str, adapter: Adapter) -> dict:
    """The adapter that the start brought, which is merged already and must be in what is saved."""
    layers, others = read_adapter(folder)
    known = model.state_dict()
    odd = [name for name in layers if name not in adapter.layers]
    odd += [name for name in others if name in known and name.split(".")[0] not in adapter.heads]
    if odd:
        raise InputError(
            f"--model {folder}: its adapter changes {odd[0]}, which --lora-rank does not; merge it with peft first."
        )
    return layers


@torch.no_grad()
def load_adapter(model, folder: Path) -> None:
    """The adapter and heads of a checkpoint, which ends in the matrices that train."""
    layers, others = read_adapter(folder)
    try:
        for name in model.adapter.layers:
            layer, (down, up) = model.get_submodule(name), layers[name]
            layer.lora_A["default"].weight.copy_(down[-model.adapter.rank :])
            layer.lora_B["default"].weight.copy_(up[:, -model.adapter.rank :])
        model.load_state_dict(others, strict=False)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: the adapter does not fit the model ({first_line(error)}).") from None


def without_adapter(model):
    """The model as it was before its first step: modules of its own over the same frozen weights,
    no second copy of them. None where there is no adapter, or weights are sharded."""
    if not hasattr(model, "adapter") or world_size() > 1:
        return None
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    start = copy.deepcopy(model, shared)
    for name in model.adapter.layers:
        start.set_submodule(name, start.get_submodule(name).base_layer)
    for head in model.adapter.heads:
        parent, _, child = head.rpartition(".")
        delattr(start.get_submodule(parent), child)
    del start.adapter
    return start


# -- saving


def trained_layers(model, state: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of each layer that trains, out of a state dict."""
    kinds = ("lora_A", "lora_B")
    return {name: tuple(state[f"{name}.{kind}.default.weight"] for kind in kinds) for name in model.adapter.layers}


def merged_state(model, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as the model would have it without an adapter, 2 B A added to its weights."""
    modules = {name: model.get_submodule(name).base_layer for name in model.adapter.layers}
    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name in modules:
        merged[f"{name}.weight"] = merged[f"{name}.weight"].clone()
    merge_layers(modules, merged, trained_layers(model, state))
    return merged


def save_adapter(model, state: dict[str, torch.Tensor], folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as peft reads them, heads included.

    Where the start brought an adapter, both are written as one, [A1; A2] and [B1, B2]: their sum
    is exact, and belongs to the model that the first of them was trained on."""
    import peft

    adapter, tensors = model.adapter, {}
    first = max((down.shape[0] for down, _ in adapter.earlier.values()), default=0)
    for name, (down, up) in trained_layers(model, state).items():
        before = [torch.zeros(first, down.shape[1]), torch.zeros(up.shape[0], first)]
        if name in adapter.earlier:
            before = adapter.earlier[name]
        tensors[f"{name}.lora_A.weight"] = torch.cat([before[0], down.cpu()])
        tensors[f"{name}.lora_B.weight"] = torch.cat([before[1], up.cpu()], 1)
    for head in adapter.heads:
        tensors |= {name: value.cpu() for name, value in state.items() if name.startswith(f"{head}.")}
    kind = "SEQ_CLS" if "ForSequenceClassification" in type(model).__name__ else "CAUSAL_LM"
    about = {"task_type": kind, "base_model_name_or_path": adapter.base, "revision": adapter.revision}
    about |= {"modules_to_save": adapter.heads or None, "inference_mode": True}
    rank = first + adapter.rank
    folder.mkdir(parents=True, exist_ok=True)
    peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, **adapter.settings, **about).save_pretrained(folder)
    tensors = {PREFIX + name: value.contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
