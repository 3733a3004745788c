"""The benchmarks run, and what benchmarks/pairs.py compares is the same computation."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import inputs, pairs, systems

ROOT = Path(__file__).resolve().parent.parent


def tiny(tmp_path, *flags: str) -> dict:
    """Results of the smoke test, by system."""
    command = [sys.executable, "benchmarks/pairs.py", "--tiny", "--output", str(tmp_path / "out.json"), *flags]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "commit", "date", "machine", "threads", "versions"} <= report.keys()
    return report["results"][0]


def test_tiny_runs_without_trl(tmp_path):
    result = tiny(tmp_path, "--systems", "ours")
    run, summary = result["runs"]["ours"][0], result["summary"]["ours"]
    assert run["losses"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert len(run["first_logps"]) == 8
    assert all(x < 0 for x in run["first_logps"])
    assert summary["tokens_per_second"]["median"] > 0
    assert run["above_model_bytes"] > 0
    assert 0 < run["share_of_matrix_rate"] < 1


def test_tiny_agrees_with_trl(tmp_path):
    if importlib.util.find_spec("trl") is None:
        pytest.skip("needs TRL: pip install trl")
    result = tiny(tmp_path)
    assert result["disagreements"] == []
    ours, *theirs = (result["runs"][system][0] for system in ("ours", "trl", "trl-tuned"))
    for run in theirs:
        assert run["first_logps"] == pytest.approx(ours["first_logps"], abs=1e-3)
        # Later losses follow from the gradients and the optimiser, so these are the same too.
        assert run["losses"] == pytest.approx(ours["losses"], abs=1e-4)
        assert run["first_grad_norm"] == pytest.approx(ours["first_grad_norm"], rel=1e-3)


@pytest.mark.study
def test_tiny_in_both_dtypes(tmp_path):
    result = tiny(tmp_path, "--systems", "ours", "--dtypes", "float32", "bfloat16")
    assert result["disagreements"] == []
    wide, narrow = (result["runs"][system][0] for system in ("ours", "ours-bfloat16"))
    assert narrow["losses"][0] == pytest.approx(math.log(2), abs=1e-5)  # the reference is computed alike
    assert narrow["first_logps"] != wide["first_logps"]
    assert result["summary"]["ours-bfloat16"]["processor_times_ours"] > 0


def test_what_is_compared():
    names = ["ours", "ours-bfloat16", "trl", "trl-bfloat16", "trl-tuned"]
    expected = [("ours", "trl"), ("ours", "trl-tuned"), ("ours-bfloat16", "trl-bfloat16"), ("ours-bfloat16", "ours")]
    assert pairs.comparisons(dict.fromkeys(names)) == expected
    assert pairs.comparisons({"trl": None}) == []


def test_useful_operations_of_a_step():
    """Two layers of 32 and 64 by hand: four square matrices of attention, three of the MLP."""
    rows = [{"prompt": [2] * 5, "completions": [[3] * 2, [4] * 3]}]
    body = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert systems.useful_flops(inputs.build_model("tiny"), rows) == 6 * (body * 10 + 32 * 512 * 5)


def run_of(**changed) -> dict:
    """What a process reports of its first step."""
    return {"first_logps": [-300.0, -310.0], "losses": [math.log(2)], "first_grad_norm": 2.0} | changed


@pytest.mark.parametrize(
    "changed",
    [
        {"first_logps": [-300.0, -310.01]},
        {"losses": [0.694]},
        {"first_grad_norm": 2.01},
        {"first_logps": [-300.0]},
        {"losses": [math.nan]},
    ],
)
def test_a_difference_is_found(changed):
    assert pairs.disagreements({"ours": [run_of()], "trl": [run_of()]}) == []
    assert pairs.disagreements({"ours": [run_of()], "trl": [run_of(**changed)]})


@pytest.mark.study
def test_pretraining_systems_compute_the_same(tmp_path):
    systems = ["ours", "plain"] + ["trainer"] * (importlib.util.find_spec("accelerate") is not None)
    command = [sys.executable, "benchmarks/pretraining.py", "--tiny", "--output", str(tmp_path / "out.json")]
    process = subprocess.run([*command, "--systems", *systems], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "commit", "date", "machine", "threads", "versions"} <= report.keys()
    (entry,) = report["results"]
    losses = {name: runs[0]["losses"] for name, runs in entry["runs"].items()}
    for name in systems:  # random ids of 512: the first loss is near log 512
        assert losses[name][0] == pytest.approx(math.log(512), abs=0.1)
        assert losses[name][0] == pytest.approx(losses["ours"][0], abs=1e-5)
    assert losses["ours"][1] != losses["ours"][0]
    assert entry["times_plain"]["median"] > 0


def test_batches_are_those_of_the_plan():
    batches = inputs.make_batches("tiny", 512, batch_size=3, steps=2)
    assert [len(batch) for batch in batches] == [3, 3]
    assert batches == inputs.make_batches("tiny", 512, batch_size=3, steps=2)
    assert all(
        len(row["prompt"]) == 24 and list(map(len, row["completions"])) == [8, 8] for batch in batches for row in batch
    )


def test_real_rows_fit(preference_data):
    rows = inputs.real_rows(preference_data, 16, vocabulary=1000)
    assert len(rows) == 16
    assert all(
        len(row["prompt"]) + len(ids) <= inputs.LONGEST and max(row["prompt"] + ids) < 1000
        for row in rows
        for ids in row["completions"]
    )


@pytest.mark.study
def test_a_tiny_corpus_is_prepared_and_measured(tmp_path):
    pytest.importorskip("pycodestyle")
    command = [sys.executable, "benchmarks/corpora.py", "--tiny", "--output", str(tmp_path / "out.json")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "commit", "date", "machine", "versions", "pep8_seconds_per_mb"} <= report.keys()
    (result,) = report["results"]
    assert set(result["seconds"]) == {"read and score", "read again", "tokenise and pack", "pack again"}
    assert result["chunks"] > 0
    assert result["kept_bytes"] > 20_000  # the texts, and more
    assert result["training_peak_bytes"] > 1 << 20
    assert result["perplexity"] > 1


def test_sampling_is_timed_against_generate(tmp_path):
    command = [sys.executable, "benchmarks/sampling.py", "--tiny", "--output", str(tmp_path / "out.json")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "commit", "date", "machine", "threads", "versions"} <= report.keys()
    assert [entry["top_p"] for entry in report["sampling"]] == [0.95, 1.0]
    for entry in report["sampling"]:
        for system in ("before", "after"):
            (run,) = entry["runs"][system]
            assert run["completions"] == 8
            assert run["tokens"] <= 8 * 4
            assert entry["a_second"][system]["tokens"] == pytest.approx(run["tokens"] / run["seconds"])
