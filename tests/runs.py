"""Short training runs for tests: a file of pairs in the toy's words, and a script's main() called in this process."""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from common import runtime, toy

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [name for name in ("dpo", "cdpo", "typo", "dph") if (ROOT / f"{name}.py").exists()]  # scripts with the same trunk


def pairs(rows: int, seed: int = 0) -> list[dict]:
    """Preference pairs in the toy's words, all prompts different; the chosen answer is the one with the larger true reward."""
    rng, found = random.Random(seed), []
    for question in rng.sample(toy.questions(), rows):
        texts: set[str] = set()
        while len(texts) < 2:
            texts.add(toy.corpus_answer(question, rng))
        rejected, chosen = sorted(texts, key=lambda text: (toy.true_reward(question, text), text))
        found.append({"prompt": toy.prompt_of(question), "chosen": " " + chosen, "rejected": " " + rejected})
    return found


def write_pairs(path: Path, rows: int, seed: int = 0) -> str:
    """A .jsonl of such pairs."""
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(rows, seed)))
    return str(path)


# Small and quick; each test names what it is about on top of these. No samples: they are the slow part of a short run.
SHORT = {"kl_samples": 0, "batch_size": 8, "micro_batch_size": 8, "log_every": 1, "eval_every": 1000, "save_every": 1000, "lr": 1e-2, "holdout": 0.0}


def arguments(script: str, folder: Path, **changes):
    """(the script's module, its Args) of a short run called `folder.name` inside `folder.parent`."""
    module = importlib.import_module(script)
    return module, module.Args(**{**SHORT, "name": folder.name, "output_dir": str(folder.parent), **changes})


def train(script: str, folder: Path, **changes) -> Path:
    """Runs a script's main() here and returns the run's folder."""
    module, args = arguments(script, folder, **changes)
    with torch.random.fork_rng(devices=[]):
        module.main(args)
    return folder


def resume(script: str, folder: Path, **changes) -> Path:
    """Goes on with a run here."""
    module = importlib.import_module(script)
    with torch.random.fork_rng(devices=[]):
        module.main(module.Args(resume=str(folder), **changes))
    return folder


def lines_of(folder: Path, split: str = "train") -> list[dict]:
    """Lines of metrics.jsonl of one split."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def model_of(folder: Path | str):
    """The folder's causal LM in evaluation mode."""
    return runtime.load_model(str(folder), "cpu").eval()


def start_process(words: list[str], cwd: Path = ROOT, timeout: float = 120) -> subprocess.CompletedProcess:
    """A command of the project in a process of its own, on one thread; its output as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
