"""Facts of a run for its summary.json: code, versions, machine, and hashes of what it read."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

from common.models import sha256_of_model
from common.processes import world_size
from toy import base, frozen

ROOT = Path(__file__).resolve().parent.parent


def git_commit() -> str | None:
    """The commit of the code that runs, "+" where files differ from it; None outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


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
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"cpu, {names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def describe_model(model, dtype, device) -> str:
    """What a model is, in a line."""
    count = sum(parameter.numel() for parameter in model.parameters())
    what = f"{type(model).__name__} of {count:,} parameters, weights float32"
    return f"{what}, products {str(dtype).removeprefix('torch.')}, on {device_name(device)}."


def machine(device) -> dict:
    """What a run was made on and with."""
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    return {
        "peak_memory_bytes": peak_memory_bytes(device),
        "versions": versions,
        "git_commit": git_commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }


def by_key(columns: dict[str, dict]) -> dict[str, dict]:
    """Metrics of the end table by the keys of summary.json: "after", "after_unseen", ..."""
    return {
        name if split == "held_out" else f"{name}_{split}": {k: v for k, v in metrics.items() if k != "samples"}
        for name, splits in columns.items()
        for split, metrics in splits.items()
    }


def sources(model_folder: str, data_sha256: str, args) -> dict:
    """Hashes of what a run read: the rows, and the weights that it began with, if any; and which of
    the toy's worlds, in which version, the rows or the model came from.

    model_folder: empty for a new model; a download of the hub's has its revision in its path."""
    settings = base.settings_of(args.data)
    world = settings["world"] if settings else base.MODELS.get(args.model)
    revision = Path(model_folder).name if Path(model_folder).parent.name == "snapshots" else None
    weights = sha256_of_model(model_folder) if model_folder else None
    hashes = {"data_sha256": data_sha256, "model_sha256": weights, "model_revision": revision}
    return hashes | {"toy_world": world and frozen.description(world, args.seed)}
