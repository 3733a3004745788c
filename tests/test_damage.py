"""Damaged folders of runs, and a full disk: one sentence and an exit with 1, or the right run."""

import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from common import InputError, checkpoints
from common.run import Run, resumed_arguments
from tests.runs import ROOT, arguments, resume, start_process, train, weights, write_pairs

SIZES = {"batch_size": 4, "micro_batch_size": 4, "epochs": 2, "save_every": 3, "log_every": 1, "holdout": 0.2}


class Killed(BaseException):
    """Raised where a process would be killed: nothing catches it."""


def killed(folder, monkeypatch, after: int = 3, **changes):
    """A run of dpo.py that was killed behind this step; the checkpoint of step 3 is there."""

    def dying(run, *args):
        if run.step == after:
            raise Killed
        return end_step(run, *args)

    end_step = Run.end_step
    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_step", dying)
        with pytest.raises(Killed):
            train("dpo", folder, **SIZES, **changes)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_llama):
    """What all tests here damage a copy of: a killed run, and the same run without a kill."""
    folder = tmp_path_factory.mktemp("runs")
    setup = {"data": write_pairs(folder / "pairs.jsonl", 13), "model": str(tiny_llama)}
    with pytest.MonkeyPatch.context() as patch:
        run = killed(folder / "killed", patch, 4, **setup)
    return SimpleNamespace(run=run, whole=train("dpo", folder / "whole", **SIZES, **setup), setup=setup)


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of the killed run."""
    return shutil.copytree(stopped.run, tmp_path / "run")


def refused(folder) -> str:
    """The sentence that --resume ends with."""
    with pytest.raises(InputError) as error:
        resume("dpo", folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def half(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nothing(path) -> None:
    path.write_bytes(b"")


def noise(path) -> None:
    path.write_bytes(b"\xff\x00[{" * 50)


def folder_instead(path) -> None:
    path.unlink()
    path.mkdir()


CHECKPOINT = "checkpoints/step-00000003/"
FILES = ["args.json", "sources.json", "before.json", "reference.safetensors"]
FILES += [CHECKPOINT + name for name in ("state.json", "optimizer.safetensors", "model.safetensors", "config.json")]


@pytest.mark.parametrize("damage", [half, nothing, noise, folder_instead])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_in_one_sentence(name, damage, run):
    damage(run / name)
    if name == CHECKPOINT + "state.json" and damage is folder_instead:
        return  # then it is no checkpoint at all
    message = refused(run)
    assert name in message or (name.startswith(CHECKPOINT) and CHECKPOINT[:-1] in message)


@pytest.mark.parametrize("name", FILES[1:4] + [CHECKPOINT + "optimizer.safetensors"])
def test_a_missing_file_is_not_made_from_the_trained_model(name, run):
    """Reference and report before training are of the model that the run began with."""
    (run / name).unlink()
    assert name in refused(run)


@pytest.mark.parametrize("value", ["[]", "null", "3", '"text"'])
@pytest.mark.parametrize("name", ["args.json", "sources.json", "before.json", CHECKPOINT + "state.json"])
def test_json_of_another_kind_is_refused(name, value, run):
    (run / name).write_text(value)
    assert str(run) in refused(run)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "fast"),
        ("lr", [1]),
        ("batch_size", 2.5),
        ("batch_size", None),
        ("model", 3),
        ("dtype", "float8"),
        ("compile", 1),
    ],
)
def test_arguments_of_another_type_are_refused(name, value, run):
    saved = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(saved | {name: value}))
    assert name in refused(run)


@pytest.mark.parametrize("change", [{"step": "3"}, {"window": None}, {"seconds": []}])
def test_a_state_with_other_values_is_refused(change, run):
    path = run / CHECKPOINT / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "state.json" in refused(run)


@pytest.mark.parametrize("change", ["another model", "a part", "no random numbers", "odd random numbers"])
def test_optimizer_state_that_does_not_fit_is_refused(change, run):
    path = run / CHECKPOINT / "optimizer.safetensors"
    tensors = safetensors.torch.load_file(path)
    names = sorted(name for name in tensors if name.endswith("exp_avg"))
    if change == "another model":
        tensors[names[0]] = torch.zeros(3, 3)
    elif change == "a part":
        tensors = {
            name: value for name, value in tensors.items() if name.rpartition("|")[0] != names[0].rpartition("|")[0]
        }
    elif change == "no random numbers":
        del tensors["rng|cpu"]
    else:
        tensors["rng|cpu"] = tensors["rng|cpu"][:100].clone()
    safetensors.torch.save_file(tensors, path)
    assert "optimizer.safetensors" in refused(run)


def test_a_broken_line_of_metrics_is_named(run):
    path = run / "metrics.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(first + first[:20] + "\n" + "".join(rest))
    assert f"{path}, line 2" in refused(run)
    path.write_text(first + "[1]\n" + "".join(rest))
    assert f"{path}, line 2" in refused(run)
    path.write_bytes(first.encode() + b"\xff\n")
    assert f"{path}, line 2" in refused(run)


def test_a_last_line_of_metrics_that_was_cut_is_written_again(run, stopped):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "split": "train"}'[:-4])
    resume("dpo", run)
    assert (run / "metrics.jsonl").read_text() == (stopped.whole / "metrics.jsonl").read_text()


@pytest.mark.parametrize("name", ["step-00000009", "step-00000006", "step-x", "step-", "step-00000004.part", "step-9"])
@pytest.mark.parametrize("kind", ["file", "folder", "full folder"])
def test_what_is_no_checkpoint_is_ignored(name, kind, run, stopped):
    """Also where the run is about to write a checkpoint of that name."""
    stray = run / "checkpoints" / name
    stray.write_text("x") if kind == "file" else stray.mkdir()
    if kind == "full folder":
        (stray / "notes.txt").write_text("x")
    assert checkpoints.newest(run).name == "step-00000003"
    resume("dpo", run)
    assert weights(run) == weights(stopped.whole)
    assert not (run / "checkpoints").exists()


def test_no_clipping_is_taken_up_again(tmp_path, stopped, monkeypatch):
    """JSON has no infinity; args.json holds null."""
    run = killed(tmp_path / "run", monkeypatch, **stopped.setup, max_grad_norm=float("inf"))
    _, args = arguments("dpo", run)
    assert resumed_arguments(type(args)(resume=str(run)), "dpo.py").max_grad_norm == float("inf")
    resume("dpo", run)
    assert weights(run) == weights(
        train("dpo", tmp_path / "whole", **SIZES, **stopped.setup, max_grad_norm=float("inf"))
    )


# -- a full disk


def full_disk(size: int, words: list[str]) -> subprocess.CompletedProcess:
    """dpo.py where no file can become larger than `size` bytes: the system's own error."""
    limit = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
    run = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return start_process(["-c", limit + run, str(ROOT / "dpo.py"), *words])


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_sentence(run, stopped):
    """The checkpoint is larger than what can be written; with room again the run goes on."""
    process = full_disk(30_000, ["--resume", str(run)])
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert "cannot be written" in last
    assert f"{run / CHECKPOINT.rstrip('/')} is kept; go on with: python dpo.py --resume {run}" in last
    resume("dpo", run)
    assert weights(run) == weights(stopped.whole)
    assert (run / "metrics.jsonl").read_text() == (stopped.whole / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_metrics_that_cannot_be_written_end_a_run_in_one_sentence(run, stopped):
    size = (run / "metrics.jsonl").stat().st_size
    text = (run / "metrics.jsonl").read_text()
    kept = sum(len(line) + 1 for line in text.splitlines() if json.loads(line)["step"] <= 3)
    assert kept <= size
    process = full_disk(kept + 10, ["--resume", str(run)])  # the file ends in a part of a line
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "is kept; go on with" in process.stderr.splitlines()[-1]
    resume("dpo", run)
    assert (run / "metrics.jsonl").read_text() == (stopped.whole / "metrics.jsonl").read_text()
