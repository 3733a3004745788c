"""Every script on a real chat model, SmolLM2-135M-Instruct or one like it: one step on a few real
rows, as a user starts it. Half a minute each:

    python -m pytest tests/test_chat_model.py --chat-model FOLDER
"""

import gzip
import json
import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.house import FAMILIES

FEW = ["--max-steps", "1", "--max-length", "160", "--epochs", "1"]
SAMPLED = ["--kl-samples", "4", "--max-new-tokens", "8"]
PAIRS = [*FAMILIES["pairs"], "sft", "reward_model"]
PRETRAINING = FAMILIES["scored corpus"]


@pytest.fixture(scope="session")
def chat_model(request) -> str:
    folder = request.config.getoption("--chat-model")
    if not folder:
        pytest.skip("needs a chat model: pytest --chat-model FOLDER")
    return str(Path(folder).resolve())


def rows_file(data: Path, name: str, count: int, folder: Path) -> str:
    """The first rows of a file of real data, as a file of their own."""
    with gzip.open(data / name, "rt", encoding="utf-8") as file:
        lines = list(islice(file, count))
    path = folder / "rows.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def run(root: Path, script: str, *words: str) -> dict:
    """The summary of a script's run in a process of its own."""
    command = [sys.executable, f"{script}.py", *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    folder = Path(words[words.index("--output-dir") + 1]) / words[words.index("--name") + 1]
    return json.loads((folder / "summary.json").read_text()) | {"folder": folder}


def check(summary: dict, before: str, after: str) -> None:
    """Numbers that are there and finite, weights that moved, and the dtype that the machine has."""
    assert summary["steps"] == 1
    for name in (before, after):
        numbers = [value for value in summary[name].values() if value is not None]
        assert numbers
        assert all(map(math.isfinite, numbers))
    tiles = torch.cpu.get_capabilities().get("amx_bf16", False) or torch.cuda.is_available()
    assert summary["args"]["dtype"] == ("bfloat16" if tiles else "float32")


@pytest.mark.parametrize("script", PAIRS)
def test_pairs_on_a_chat_model(script, root, chat_model, preference_data, tmp_path):
    data = rows_file(preference_data, "pairs/polite_instructions.jsonl.gz", 40, tmp_path)
    sampled = SAMPLED if script != "reward_model" else []
    words = ["--model", chat_model, "--data", data, "--chat", "--batch-size", "8", "--holdout", "0.3", *FEW, *sampled]
    summary = run(root, script, *words, "--name", script, "--output-dir", str(tmp_path))
    check(summary, "before", "after")
    if script in FAMILIES["pairs"]:
        # What an untrained policy's loss is: a step of 8 pairs moved it by little.
        (line, *_) = [json.loads(line) for line in (summary["folder"] / "metrics.jsonl").read_text().splitlines()]
        loss = next(value for name, value in line.items() if name.endswith("loss"))
        assert loss > 0.3 if script == "typo" else abs(loss - math.log(2)) < (1.5 if script == "dph" else 0.02)


@pytest.mark.parametrize("script", FAMILIES["labelled answers"])
def test_labelled_answers_on_a_chat_model(script, root, chat_model, preference_data, tmp_path):
    data = rows_file(preference_data, "labelled/reward_model_scores.jsonl.gz", 24, tmp_path)
    words = ["--model", chat_model, "--data", data, "--chat", "--batch-size", "8", "--holdout", "0.3", *FEW, *SAMPLED]
    check(run(root, script, *words, "--name", script, "--output-dir", str(tmp_path)), "before", "after")


@pytest.mark.parametrize("script", ["superhf", "ppo"])
def test_policies_on_a_chat_model(script, root, chat_model, preference_data, tmp_path):
    data = rows_file(preference_data, "pairs/polite_instructions.jsonl.gz", 24, tmp_path)
    words = ["--model", chat_model, "--data", data, "--chat", "--holdout", "0.3", *FEW, "--output-dir", str(tmp_path)]
    reward = run(root, "reward_model", *words, "--batch-size", "4", "--name", "reward")["folder"]
    words += ["--batch-size", "2", *SAMPLED, "--reward", str(reward)]
    words += ["--completions", "2"] if script == "superhf" else []
    check(run(root, script, *words, "--name", script), "before", "after")


@pytest.mark.parametrize("script", PRETRAINING)
def test_pretraining_goes_on_with_a_chat_model(script, root, chat_model, tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    for i in range(40):
        (code / f"{i}.py").write_text("".join(f"def f{i}_{j}(x):\n    return x+{i * j}\n\n\n" for j in range(6)))
    words = ["--init", chat_model, "--task", "pep8", "--data", str(code), "--tokens", "256", "--batch-size", "2"]
    words += ["--samples", "4", "--max-steps", "1"]
    summary = run(root, script, *words, "--name", script, "--output-dir", str(tmp_path))
    assert summary["steps"] == 1
    assert all(math.isfinite(value) for value in summary["after"].values() if isinstance(value, float))
