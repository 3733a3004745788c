"""What a run says before and while it works, and how much of it is evaluation."""

import io
import json

import pytest
import torch

import common.run
from common.run import start_run
from report import progress
from tests import models
from tests.runs import ROOT, arguments, train


class Clock:
    """A clock that moves when told; stands for the time module."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "phase", "")
    return clock


def lines_of_pass(clock, seconds_each: float, steps: int, capsys) -> list[str]:
    for _ in progress.track(range(steps), "scoring"):
        clock.now += seconds_each
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_a_line_every_ten_seconds(clock, capsys):
    lines = lines_of_pass(clock, 4.0, 9, capsys)  # 36 s
    assert lines == [
        "scoring: batch 3 of 9, 33%, 0:24 left",
        "scoring: batch 6 of 9, 67%, 0:12 left",
        "scoring: batch 9 of 9, 100%, 0:00 left",
    ]


def test_short_passes_say_nothing(clock, capsys):
    assert lines_of_pass(clock, 0.9, 10, capsys) == []


def test_what_a_pass_is_made_for_stands_before_it(clock, capsys):
    progress.during("before training")
    assert lines_of_pass(clock, 60.0, 2, capsys)[0] == "before training: scoring: batch 1 of 2, 50%, 1:00 left"


def test_a_resumed_bar_counts_from_where_it_is(clock, capsys):
    bar = progress.Bar("training", 100, initial=80, unit="step")
    for _ in range(10):
        clock.now += 6.0
        bar.update()
    assert capsys.readouterr().err.splitlines()[-1] == "training: step 90 of 100, 90%, 1:00 left"


def test_on_a_terminal_a_bar_that_goes(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "phase", "")
    bar = progress.Bar("scoring", 5, delay=0.0)
    assert bar.bar.desc == "scoring"
    for _ in range(5):
        bar.update()
    bar.close()
    assert bar.bar.n == 5
    assert "scoring" in screen.getvalue()


def test_other_processes_say_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "is_main_process", lambda: False)
    assert lines_of_pass(clock, 60.0, 3, capsys) == []


@pytest.fixture
def bars(monkeypatch) -> list[tuple[str, int]]:
    """(name, steps) of all bars."""
    made = []

    class Recorded(progress.Bar):
        def __init__(self, what, total, *rest, **more):
            super().__init__(what, total, *rest, **more)
            made.append((self.what, total))

    monkeypatch.setattr(progress, "Bar", Recorded)
    return made


def test_every_phase_has_its_bar(bars, tmp_path, file13, llama):
    changes = {"kl_samples": 4, "holdout": 0.3, "n": 2, "eval_every": 1}
    train("dph", tmp_path / "run", model=llama, data=file13, max_steps=2, **changes)
    names = [name for name, _ in bars]
    rows = 13
    held_out = round(0.3 * rows)
    assert ("training", 2) in bars
    for expected in (
        f"reference: scoring {rows - held_out} rows",
        f"reference: scoring {held_out} rows",
        f"before training: scoring {held_out} rows",
        f"loss of {held_out} held-out rows",
        f"after training: scoring {held_out} rows",
        "after training: KL to the reference",
        "after training: rewards of 8 answers",
        "after training: log-probabilities of 4 answers",
    ):
        assert expected in names, expected


# -- the first lines


def test_the_first_lines_name_data_model_and_numbers(tmp_path, file13, llama, capsys):
    train("dpo", tmp_path / "run", model=llama, data=file13, max_steps=1, holdout=0.3, lr=0.003)
    first, third, fourth, second, *_ = capsys.readouterr().out.splitlines()
    assert first == f"dpo.py: model {llama}, data {file13}, learning rate 0.003, cpu."
    count = sum(p.numel() for p in models.tiny_llama(vocabulary_of(llama)).parameters())
    assert second.startswith(f"LlamaForCausalLM of {count:,} parameters, weights float32, products float32, on cpu")
    assert third.startswith("Training rows: 13 rows read, 9 used") or "9 used" in third
    assert third.endswith(" tokens.")
    assert fourth.startswith("Held-out rows")


def vocabulary_of(folder: str) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).vocab_size


def test_the_toy_is_named_as_such(tmp_path, capsys):
    _, args = arguments("dpo", tmp_path / "run", model="toy", data="toy")
    start_run(args, str(ROOT / "dpo.py"))
    assert "data toy (the embedded world, unless --data names other rows)" in capsys.readouterr().out


# -- how much is evaluated


@pytest.mark.parametrize(("tiny", "expected"), [(True, 400), (False, 64)])
def test_larger_models_are_sampled_from_less(tiny, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(common.run, "is_tiny", lambda model: tiny)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    _, args = arguments("dpo", tmp_path / "run", kl_samples=None)
    run, args = start_run(args, str(ROOT / "dpo.py"))
    run.prepare(models.tiny_llama(20))
    assert args.kl_samples == expected
    run.cached_json("before", dict)
    assert json.loads((run.folder / "args.json").read_text())["kl_samples"] == expected


def test_a_given_number_of_samples_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(common.run, "is_tiny", lambda model: False)
    for count in (0, 7):
        _, args = arguments("dpo", tmp_path / f"run{count}", kl_samples=count)
        run, args = start_run(args, str(ROOT / "dpo.py"))
        run.prepare(models.tiny_llama(20))
        assert args.kl_samples == count


@pytest.mark.parametrize(("tiny", "expected"), [(True, 1000), (False, 250)])
def test_while_a_larger_model_trains_held_out_rows_take_a_tenth(tiny, expected, tmp_path, monkeypatch):
    """Every row of the toy's model; else no more than .3 of the rows trained on in between, evenly
    spaced, since training takes three times as long for each. After training all.
    """
    monkeypatch.setattr(common.run, "is_tiny", lambda model: tiny)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    _, args = arguments("dpo", tmp_path / "run", eval_every=50, batch_size=20, micro_batch_size=1000)
    run, args = start_run(args, str(ROOT / "dpo.py"))
    run.prepare(models.tiny_llama(20))
    rows = [{"prompt": [1], "completions": [[2]], "number": i} for i in range(1000)]
    seen = []

    def loss_of(batch):
        seen.append([row["number"] for row in batch])
        return None, {"loss": torch.tensor(float(sum(seen[-1])))}

    for _ in run.steps([rows[:1]]):
        inside = run.evaluate_loss(loss_of, list, rows)
        run.step += 1
    after = run.evaluate_loss(loss_of, list, rows)
    assert len(seen[0]) == expected
    assert sorted(seen[0]) == list(range(0, 1000, 1000 // expected))
    assert inside["loss"] == pytest.approx(sum(seen[0]) / expected)  # the mean over the rows that were taken
    assert len(seen[1]) == 1000
    assert after["loss"] == pytest.approx(499.5)
