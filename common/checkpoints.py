"""Models and checkpoints as folders that transformers loads; nothing in them unpickles.

A checkpoint has optimizer.safetensors and state.json beside the weights. It is written aside and
renamed, so a kill at any moment leaves the last good one.
"""

import json
import os
import re
import shutil
from pathlib import Path

import safetensors.torch
import torch

from adapters import lora
from common import InputError, first_line
from common.files import read_json, write_json
from common.processes import is_main_process, wait_for_all, world_size

AGAIN = "expected what the run wrote there; begin it again under another --name"  # where a file of a run is damaged


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run; they get their name when they are complete."""
    return max(filter(is_complete, (folder / "checkpoints").glob("step-*")), default=None)


def is_complete(path: Path) -> bool:
    """Whether a path is a checkpoint, though perhaps a damaged one; others may bear such a name."""
    return re.fullmatch(r"step-\d{8}", path.name) is not None and (path / "state.json").is_file()


def read_state(checkpoint: Path) -> dict:
    """What a checkpoint says of the run; InputError where it is damaged."""
    state = read_json(checkpoint / "state.json", "", AGAIN)
    kinds = {"step": int, "seconds": (int, float), "tokens": int, "window": list}
    if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise InputError(f"{checkpoint / 'state.json'}: {AGAIN}.")
    return state


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; InputError where it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); {AGAIN}.") from None


def save_model(model, tokenizer, folder: Path, merge: bool = False) -> None:
    """The model as a transformers folder, or its adapter, gathered on the first process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = None
    if world_size() > 1:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        kept = {name for pairs in (model.named_parameters(), model.named_buffers()) for name, _ in pairs}
        state = {name: value for name, value in state.items() if name in kept}  # tied weights are written once
    if is_main_process() and hasattr(model, "adapter") and not merge:
        lora.save_adapter(model, state or model.state_dict(), folder)
        tokenizer.save_pretrained(folder)
    elif is_main_process():
        state = lora.merged_state(model, state or model.state_dict()) if hasattr(model, "adapter") else state
        model.save_pretrained(folder, state_dict=state)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        if config.get("architectures"):  # fully_shard renames the class
            config["architectures"] = [name.removeprefix("FSDP") for name in config["architectures"]]
            write_json(path, config)
        tokenizer.save_pretrained(folder)


def save(folder: Path, model, optimizer, tokenizer, state: dict, device) -> Path:
    """Writes a checkpoint of all that a run depends on, and removes older ones."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    moments = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})  # on the first process only
    aside, final = (folder / "checkpoints" / f"{kind}-{state['step']:08d}" for kind in ("part", "step"))
    if is_main_process():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    save_model(model, tokenizer, aside)
    if is_main_process() and not is_complete(final):
        tensors = {
            f"{name}|{key}": value.contiguous() for name, values in moments.items() for key, value in values.items()
        }
        tensors["rng|cpu"] = torch.get_rng_state()
        if device.type == "cuda":
            tensors["rng|cuda"] = torch.cuda.get_rng_state(device)
        safetensors.torch.save_file(tensors, aside / "optimizer.safetensors")
        write_json(aside / "state.json", state)
        if final.exists():  # something else of that name
            shutil.rmtree(final) if final.is_dir() else final.unlink()
        os.replace(aside, final)
        for old in (folder / "checkpoints").iterdir():
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
    wait_for_all()
    return final


def restore(checkpoint: Path, model, optimizer, device) -> None:
    """Optimiser state and random numbers of a checkpoint; InputError where they are damaged."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    path = checkpoint / "optimizer.safetensors"
    tensors = load_tensors(path)
    moments: dict = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("|")
        if parameter != "rng":
            moments.setdefault(parameter, {})[key] = value
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    state = {"state": moments, "param_groups": groups}
    try:
        for name, parameter in model.named_parameters():
            if any(value.dim() and value.shape != parameter.shape for value in moments.get(name, {}).values()):
                raise ValueError(f"{name} has another shape")
        torch.set_rng_state(tensors["rng|cpu"])
        if "rng|cuda" in tensors and device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng|cuda"], device)
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # another model's, or only a part
        raise InputError(f"{path}: does not fit the model ({first_line(error)}); {AGAIN}.") from None
