"""The plain model beside which the other objectives are shown: a run of mle_pretrain.py."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from common import InputError
from common.models import load_model, load_tokenizer, sha256_of_model
from common.processes import gather, is_main_process, print0

ROOT = Path(__file__).resolve().parent.parent

# What the plain run has in common with the run that is compared with it.
SAME = "task data scorer text_field holdout model init tokenizer vocabulary context tokens seed lr max_steps batch_size"
SAME += " micro_batch_size warmup weight_decay max_grad_norm gradient_checkpointing dtype compile"


def baseline_folder(args, script: Path, data_sha256: str, device, say=print0) -> str:
    """The folder of the plain model that `--baseline` asks for, or "" for none.

    `auto`: on the toy a run of mle_pretrain.py, the script beside `script`, with the same data,
    size, budget, schedule and seed; made by that script in a process of its own on first use and
    kept in the user's cache. On other tasks none. A lock lets one process train, while others of
    the same run, or of another, wait for its folder.

    Raises InputError where that run fails.
    """
    if args.baseline != "auto":
        return "" if args.baseline == "none" else args.baseline
    if args.task != "toy":
        return ""
    plain = Path(script).resolve().with_name("mle_pretrain.py")
    if not plain.is_file():
        say(f"Baseline: none, since {plain.name} is not beside {Path(script).name}.")
        return ""
    # One process decides and trains; the others wait for its answer.
    return gather([trained_once(args, plain, data_sha256, device, say) if is_main_process() else None])[0]


def column(folder: str, evaluate_model, device) -> dict:
    """The plain model's column of the end table, or none where there is no folder."""
    if not folder:
        return {}
    tokenizer = load_tokenizer(folder)
    return {"mle": {"held_out": evaluate_model(load_model(folder, device, tokenizer), tokenizer)}}


def trained_once(args, plain: Path, data_sha256: str, device, say) -> str:
    """The folder of the cached run, which is made first where there is none."""
    same = {name: getattr(args, name) for name in SAME.split()}
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preference-pretrain"
    folder = root / f"mle-{args.task}-{key_of(same, plain, data_sha256, device)}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back by the system when the process ends, however it ends
        if not (folder / "summary.json").is_file():
            say(f"Baseline: {plain.name} with the same data and budget, trained once, into {folder}.")
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left behind
            train_plain(same, plain, folder)
        else:
            say(f"Baseline: the run of {plain.name} in {folder}.")
    return str(folder)


def key_of(same: dict, plain: Path, data_sha256: str, device) -> str:
    """A name for everything that the plain model depends on: arguments, corpus, code, versions,
    device, and the models named.
    """
    import transformers

    packages = [ROOT / name for name in ("common", "pretraining", "toy")]
    code = [plain, *(path for package in packages for path in sorted(package.glob("*.py")))]
    digest = hashlib.sha256()
    for path in code:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    config = Path(same["model"]) / "config.json"
    facts = [same, data_sha256, config.read_text() if config.is_file() else ""]
    facts.append(sha256_of_model(same["init"]) if same["init"] else "")
    facts += [torch.__version__, transformers.__version__, platform.python_version(), torch.device(device).type]
    digest.update(json.dumps(facts).encode())
    return digest.hexdigest()[:16]


def train_plain(same: dict, plain: Path, folder: Path) -> None:
    """Runs the plain script, alone and without samples, into a folder; with its progress bar."""
    flags = {"baseline": "none", "name": folder.name, "output_dir": str(folder.parent), "samples": 0, "red_team": 0}
    flags |= {"eval_every": 1 << 30, "save_every": 1 << 30, "log_every": 10} | same
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag}={value}")
    # A process of its own, none of the several that torchrun may have started.
    several = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in several}
    command = [sys.executable, str(plain), *words]
    process = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    if process.returncode:
        raise InputError(
            f"--baseline auto: {plain.name} ended with status {process.returncode}; --baseline none goes without it."
        )
