"""The model card of a run, and what trackers are sent."""

import dataclasses
import importlib
import json
import re
import shlex
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tyro

from common import InputError
from report import card, trackers
from report.table import METRICS, cell
from tests.runs import ROOT, SHORT, train


@pytest.fixture(scope="module")
def run(tmp_path_factory, file13, tiny_llama):
    """A run of dph.py with samples, some arguments of every kind given."""
    folder = tmp_path_factory.mktemp("cards") / "run"
    changes = {"kl_samples": 4, "holdout": 0.3, "share_prompt": False, "head_lr": 0.002, "max_grad_norm": float("inf")}
    return train("dph", folder, model=str(tiny_llama), data=file13, max_steps=2, n=2, **changes)


@pytest.fixture(scope="module")
def text(run) -> str:
    return (run / "README.md").read_text(encoding="utf-8")


def test_the_hub_reads_the_front_matter(run):
    from huggingface_hub import ModelCard

    about = ModelCard.load(run / "README.md").data.to_dict()
    assert about == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dph", "preference-learning"],
    }  # no licence, and no base model: a folder is none of the hub's


def values_of(**changes) -> dict:
    args = {"model": "org/base", "data": "org/pairs:helpful", "seed": 3}
    values = {"script": "dpo.py", "args": args, "model_revision": "abc", "processes": 1, "device": "cpu"}
    return {**values, "versions": {"torch": "2"}, "steps": 7, "seconds": 1.0, "data_sha256": "d", **changes}


def test_models_and_data_of_the_hub_are_named():
    lines = card.front_matter(values_of(), gives_rewards=True).splitlines()
    assert 'base_model: "org/base"' in lines
    assert lines[lines.index("datasets:") + 1] == '- "org/pairs"'
    assert "pipeline_tag: text-classification" in lines
    for data in ("toy", "toy:0.2", "pairs.jsonl.gz", None):
        values = values_of(model_revision=None, args={"model": "runs/a", "data": data})
        text = card.front_matter(values, gives_rewards=False)
        assert "base_model" not in text
        assert "datasets" not in text


def test_the_card_says_what_was_done(run, text):
    docstring = importlib.import_module("dph").__doc__
    assert docstring.splitlines()[0] in text
    assert "[arXiv:2405.20053](https://arxiv.org/abs/2405.20053)" in text
    assert "`docs/dph.md`" in text
    summary = json.loads((run / "summary.json").read_text())
    for fact in (summary["data_sha256"], summary["model_sha256"], *summary["versions"].values(), summary["device"]):
        assert fact in text
    assert str(run.parent) not in text  # where the run lies is nobody's business
    assert str(ROOT) not in text.replace(shlex.join([summary["args"]["data"], summary["args"]["model"]]), "")


def test_its_command_repeats_the_run(run, text):
    import dph

    (line,) = re.findall(r"```bash\n(.*)\n```", text)
    program, script, *words = shlex.split(line)
    assert [program, script] == ["python", "dph.py"]
    again = dataclasses.asdict(tyro.cli(dph.Args, args=words))
    made = json.loads((run / "summary.json").read_text())["args"] | {"max_grad_norm": float("inf")}
    for name in again.keys() - {"name", "output_dir", "resume"}:
        assert again[name] == made[name], name
    assert "--seed" not in words  # what is a default need not be said


def test_several_processes_are_in_the_command():
    line = card.command(values_of(processes=4), {"seed": 3})
    assert line == "torchrun --nproc-per-node 4 dpo.py --model org/base --data org/pairs:helpful"


def test_its_tables_are_the_end_table(run, text):
    summary = json.loads((run / "summary.json").read_text())
    states = [summary[name] for name in ("before", "after", "after_best_of_n", "reference_best_of_n")]
    assert "| On held-out rows | before | after | after best of n | reference best of n |" in text
    for name in ("preference_accuracy", "kl"):
        cells = " | ".join(cell(metrics, name) for metrics in states)
        assert f"| {METRICS[name]} (`{name}`) | {cells} |" in text
    assert "curves.png" not in text  # none was drawn


def test_the_curve_is_shown_where_there_is_one(run, text):
    (run / "curves.png").write_bytes(b"")
    try:
        values = json.loads((run / "summary.json").read_text())
        assert "![Metrics while training](curves.png)" in card.model_card(run, values, {"before": {"held_out": {}}})
    finally:
        (run / "curves.png").unlink()


def test_samples_stand_in_the_card():
    columns = {"after": {"held_out": {"samples": [["Why ?", "Be|cause\nso"], [[{"content": "Hi"}], "Yes"]]}}}
    (title, lines) = card.samples_section(columns)
    assert title == "## Samples"
    assert lines.splitlines() == ['- after, to "Why ?": "Be|cause\\nso"', '- after, to "Hi": "Yes"']
    assert card.samples_section({"after": {"held_out": {"samples": ["alone"]}}})[1] == '- after, "alone"'
    assert card.samples_section({"before": {"held_out": {}}}) == []


def test_a_reward_model_is_a_classifier(tmp_path, file13, llama, monkeypatch):
    from huggingface_hub import ModelCard

    monkeypatch.delitem(SHORT, "kl_samples")
    folder = train("reward_model", tmp_path / "run", model=llama, data=file13, max_steps=1)
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == "text-classification"


# -- trackers


class Stub:
    """Stands for wandb: keeps what it is sent."""

    def __init__(self):
        self.lines, self.tables, self.is_finished = [], [], False
        self.module = ModuleType("wandb")
        self.summary: dict = {}
        self.module.init = self.init
        self.module.log = lambda metrics, step=None: self.lines.append((step, metrics))
        self.module.Table = lambda columns, data: SimpleNamespace(columns=columns, data=data)
        self.module.finish = lambda: setattr(self, "is_finished", True)

    def init(self, project, name, config):
        self.name, self.config = name, config
        return SimpleNamespace(summary=self.summary)


def test_wandb_gets_metrics_the_end_table_and_samples(tmp_path, file13, llama, monkeypatch):
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub.module)
    changes = {"kl_samples": 4, "holdout": 0.3, "track": "wandb"}
    folder = train("dpo", tmp_path / "run", model=llama, data=file13, max_steps=2, **changes)
    summary = json.loads((folder / "summary.json").read_text())
    assert stub.name == "run"
    assert stub.config["max_steps"] == 2
    assert [step for step, metrics in stub.lines if "train/loss" in metrics] == [1, 2]
    assert stub.summary.get("end/after/held_out/kl") == summary["after"]["kl"]
    assert stub.summary["end/before/held_out/preference_accuracy"] == summary["before"]["preference_accuracy"]
    (table,) = [metrics["samples"] for _, metrics in stub.lines if "samples" in metrics]
    assert table.columns == ["model", "prompt", "answer"]
    assert {row[0] for row in table.data} == {"before", "after"}
    assert stub.is_finished


def test_tensorboard_gets_the_same(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    columns = {"after": {"held_out": {"kl": 0.5, "samples": [["Why ?", "So"]]}}}
    board = trackers.tracker("tensorboard", tmp_path, {})
    board.send(1, {"train/loss": 2.0, "train/none": None})
    board.finish(2, columns)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("train/loss")[0].value == 2.0
    assert events.Scalars("end/after/held_out/kl")[0].value == 0.5
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| KL to the reference" in texts["end table/text_summary"]
    assert "So" in texts["samples/after/text_summary"]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_tracker_that_is_missing_leaves_nothing(kind, tmp_path, file13, llama, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises((InputError, ImportError)) as caught:
        train("dpo", tmp_path / "out" / "run", model=llama, data=file13, track=kind)
    how = f"pip install {kind} (see requirements-optional.txt)"
    assert str(caught.value) == f"--track {kind} needs a package that is not installed: {how}"
    assert not (tmp_path / "out").exists()
