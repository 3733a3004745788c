"""All that a GPU should be asked, in one command of under ten minutes that needs no network.

    python -m benchmarks.gpu             on a GPU; writes benchmarks/results/gpu-<device>.json
    python -m benchmarks.gpu --tiny      the same on a CPU with tiny models: does it run?

    rate       matrix products a second in bfloat16, beside what the maker states
    tests      the tests marked gpu, tests/test_gpu.py
    scripts    every script on the toy for a few steps, in bfloat16
    pretrain   mle_pretrain's step: tokens a second, share of the peak, memory beside the formula of
               benchmarks/memory.py
    sampling   completions: tokens a second
    pairs      dpo's step beside TRL's DPOTrainer where that is installed, as it comes, tuned and
               padding-free; 0.1B and 1B, lines of 1,024 and 2,048 tokens, random weights

Each part runs in a process of its own under a time limit of its own, and the file is written after
each: what fails or hangs, says so there and loses nothing of the others.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python benchmarks/gpu.py

from common import InputError
from common.files import write_json
from report.facts import device_name, git_commit

FOLDER = Path(__file__).resolve().parent
# Seconds at most; together under ten minutes
PARTS = {"rate": 30, "tests": 100, "scripts": 150, "pretrain": 50, "sampling": 40, "pairs": 200}
WHOLE = 585


@dataclass
class Args:
    parts: tuple[str, ...] = tuple(PARTS)
    """Which parts: rate, tests, scripts, pretrain, sampling, pairs."""
    scripts: tuple[str, ...] = ()
    """Scripts of the part scripts, without .py; none: all of them."""
    tiny: bool = False
    """Tiny models and few steps, on a CPU too; no file unless --output names one."""
    output: Path | None = None
    """File for the results; None: benchmarks/results/gpu-<device>.json."""


def run_part(name: str, flags: list[str], limit: float) -> dict:
    """One part in a process of its own: its JSON lines, its seconds, and what went wrong."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_parts", name, *flags]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        places = {"cwd": FOLDER.parent, "env": environment, "stdout": out, "stderr": err}
        process = subprocess.Popen(command, **places, start_new_session=True)
        try:
            status = process.wait(limit)
            error = f"ended with {status}" if status else ""
        except subprocess.TimeoutExpired:
            error = f"not finished in {limit:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started, too
        process.wait()
        out.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith("{")]
        err.seek(0)
        last = err.read().strip()[-1500:]
    found = {"seconds": round(time.perf_counter() - started, 1), "lines": []}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # a line cut by the limit
            found["lines"].append(json.loads(line))
    return found | ({"error": f"{error}: {last}"} if error else {})


def main(args: Args) -> int:
    """Runs the parts, prints and writes what they say; status 1 where one failed."""
    if unknown := set(args.parts) - PARTS.keys():
        raise InputError(f"--parts {', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}.")
    cuda = torch.cuda.is_available()
    if not cuda and not args.tiny:
        raise InputError("No GPU is seen here. --tiny runs the same on a CPU with tiny models.")
    device = device_name(torch.device("cuda" if cuda else "cpu"))
    output = args.output
    if output is None and not args.tiny:
        output = FOLDER / "results" / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    report = {
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "tiny": args.tiny,
        "parts": {},
    }
    flags = ["--tiny"] * args.tiny + (["--scripts", *args.scripts] if args.scripts else [])
    started = time.perf_counter()
    for name in args.parts:
        patience = 3 if args.tiny else 1  # a CPU that others use, too
        left = patience * WHOLE - (time.perf_counter() - started)
        limit = min(left, patience * PARTS[name])
        part = run_part(name, flags, limit) if left > 5 else {"seconds": 0.0, "lines": [], "error": "no time left"}
        report["parts"][name] = part
        print(f"\n{name}: {part['seconds']} s" + (f"; FAILED: {part['error']}" if "error" in part else ""))
        for line in part["lines"]:
            print("  " + ", ".join(f"{key} {value}" for key, value in line.items()), flush=True)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(output, report | {"seconds": round(time.perf_counter() - started, 1)})
    if output:
        print(f"\nWritten to {output}.")
    failed = [part for part in report["parts"].values() if "error" in part or any("failed" in x for x in part["lines"])]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
