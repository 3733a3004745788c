"""Accuracies by subset and section, ties, accuracy at equal length, and rewards of
sequence-classification models as `python -m common.evaluate --data` gives them.
"""

import json
import math
import random

import pytest
import torch

import reward_model
from common import InputError
from experiments.study import read_lines
from judging import command, reward_bench
from report import progress
from tests import models
from tests.runs import lines_file, pairs, train, write_pairs


def test_accuracy_of_a_row():
    assert reward_bench.row_accuracy(1.0, 0.5) == 1.0
    assert reward_bench.row_accuracy(0.5, 1.0) == 0.0
    assert reward_bench.row_accuracy(0.5, 0.5) == 0.5
    # RewardBench 2: one right answer among four; those that share the highest score share the row.
    assert reward_bench.row_accuracy([2.0], [1.0, 0.0, 1.5]) == 1.0
    assert reward_bench.row_accuracy([2.0], [2.0, 2.0, 1.5]) == pytest.approx(1 / 3)
    assert reward_bench.row_accuracy([1.0], [2.0, 2.0, 1.5]) == 0.0
    # Several right answers: the worst of them against the best other one.
    assert reward_bench.row_accuracy([3.0, 1.0], [0.5, 0.0]) == 1.0
    assert reward_bench.row_accuracy([3.0, 1.0], [1.0, 0.0]) == 0.0


def test_sections_by_hand():
    """math-prm weighs as much as six languages of code; a section is of the subsets at hand."""
    accuracies = {"math-prm": 0.5, "hep-cpp": 1.0, "hep-rust": 0.25, "mt-bench-hard": 0.4, "something else": 0.0}
    sections = reward_bench.section_scores(accuracies)
    assert sections == {"Chat Hard": 0.4, "Reasoning": pytest.approx((984 * 0.5 + 164 * 1.25) / (984 + 2 * 164))}
    safety = {"refusals-dangerous": 1.0, "xstest-should-refuse": 0.5, "xstest-should-respond": 0.0}
    expected = (100 + 250 * 0.5) / (100 + 250 + 154)
    assert reward_bench.section_scores(safety) == {"Safety": pytest.approx(expected)}
    subsets = [name for weights in reward_bench.SECTIONS.values() for name in weights]
    assert len(subsets) == len(set(subsets)) == 23
    # 2,985 rows, with 984 in place of math-prm's 447
    assert sum(sum(weights.values()) for weights in reward_bench.SECTIONS.values()) == 2985 - 447 + 984
    assert reward_bench.section_scores({"mine": 1.0}) == {}


def test_ties_by_hand():
    """Two questions, each part of the score by its definition."""
    rows = [
        ("ref:0", [2.0], [0.0, 1.0]),  # margin 1
        ("tied:0", [3.0, 2.5, 2.8], [1.0, 0.5]),  # margin 1.5, spread .5
        ("ref:1", [0.0], [0.2]),  # margin -.2
        ("tied:1", [1.0, 0.0], [-2.0]),  # margin 2, spread 1
        ("ref:2", [1.0], [0.0]),  # a question without its other row counts in the accuracy alone
    ]
    score = reward_bench.ties_score(rows)
    assert (score["tied_accuracy"], score["ref_accuracy"]) == (1.0, pytest.approx(2 / 3))
    assert (score["preferred"], score["preferred_hard"]) == (1.0, 0.5)
    margin = (math.tanh(1 / 0.5 - 1) + math.tanh(-0.2 / 1 - 1)) / 2
    assert score["margin"] == pytest.approx(margin)
    assert score["score"] == pytest.approx(0.3 + 0.3 * 2 / 3 + 0.2 + 0.2 * 0.5 + 0.01 * margin)
    perfect = reward_bench.ties_score([("ref:7", [1.0], [0.0]), ("tied:7", [1.0, 1.0], [0.0])])
    assert perfect["score"] == pytest.approx(1.01)  # without a spread the last term has its limit
    equal = reward_bench.ties_score([("ref:7", [0.0], [0.0]), ("tied:7", [0.0, 0.0], [0.0])])
    assert equal["score"] == 0.0
    assert reward_bench.ties_score([("tied:7", [1.0, 1.0], [0.0]), ("12", [1.0], [0.0])]) is None


def known(values: list, subsets: list, kind: str = "reward") -> tuple[list[dict], list[dict]]:
    """Rows and their lines with these (chosen, rejected) scores."""
    rows = [{"subset": subset, "id": name} for subset, name in subsets]
    sides = ("chosen", "rejected")
    tokens = {f"{side}_tokens": 3 for side in sides}
    return rows, [{f"{side}_{kind}": value for side, value in zip(sides, pair)} | tokens for pair in values]


def test_the_table_of_both_benchmarks(capsys):
    easy, hard = ("alpacaeval-easy", "1"), ("mt-bench-hard", "2")
    rows, lines = known([(1, 0), (0, 1), (1, 1), (3, 1), (None, None)], [easy, easy, easy, hard, hard])
    reward_bench.print_subsets(rows, lines)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table == [
        ["subset", "rows", "reward"],
        ["alpacaeval-easy", "3", "0.500", "±", "0.289"],
        ["mt-bench-hard", "1", "1.000"],
        ["section", "Chat", "0.500"],
        ["section", "Chat", "Hard", "1.000"],
        [*"RewardBench, mean of 2 of 4 sections".split(), "0.750"],
    ]
    subsets = [("Factuality", "a"), ("Math", "b"), ("Ties", "ref:0"), ("Ties", "tied:0"), ("Safety", "c")]
    values = [([2], [1, 2, 0]), ([1], [2, 0, 0]), ([1], [0]), ([3, 2], [1, 1]), ([1], [0, 0, 0])]
    reward_bench.print_subsets(*known(values, subsets))
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    ties = 0.3 + 0.3  # margins 1 and 1, spread 1: neither is above it, and tanh(0) is 0
    assert ["Ties", "2", f"{ties:.3f}"] in table
    mean = (0.5 + 0.0 + ties + 1.0) / 4
    assert table[-1] == [*"RewardBench 2, mean of 4 of 6 subsets".split(), f"{mean:.3f}"]
    reward_bench.print_subsets([{}, {"subset": 3}], known([(1, 0), (1, 0)], [])[1])
    assert capsys.readouterr().out == ""  # no subset, and too few rows for a fit


def test_accuracy_at_equal_length_takes_length_out():
    """Longer answers win; of equally long ones, chosen and rejected win as often."""
    rng, lines = random.Random(0), []
    for _ in range(600):
        chosen, rejected = rng.randint(5, 50), rng.randint(5, 40)
        lines.append({"chosen_tokens": chosen, "rejected_tokens": rejected})
        lines[-1] |= {"chosen_reward": chosen + rng.gauss(0, 9), "rejected_reward": rejected + rng.gauss(0, 9)}
    plain = sum(line["chosen_reward"] > line["rejected_reward"] for line in lines) / 600
    rate, error = reward_bench.equal_length_accuracy(lines, "reward")
    assert plain > 0.6
    assert abs(rate - 0.5) < 3 * error < 0.12
    names = {"chosen_tokens": "rejected_tokens", "rejected_tokens": "chosen_tokens"}
    shorter = [line | {new: line[old] for new, old in names.items()} for line in lines]
    assert reward_bench.equal_length_accuracy(shorter, "reward")[0] == pytest.approx(rate)  # a sign of lengths only
    assert reward_bench.equal_length_accuracy(lines[:9], "reward") is None
    assert reward_bench.equal_length_accuracy(lines, "logps") is None
    lists = [{**line, "chosen_reward": [line["chosen_reward"]], "rejected_reward": [0.0, 1.0]} for line in lines]
    assert reward_bench.equal_length_accuracy(lists, "reward") is None


# -- the command


def test_the_command_counts_by_subset(toy_base, tmp_path, capsys):
    rows = [row | {"subset": ("hep-cpp", "math-prm")[i % 2]} for i, row in enumerate(pairs(12))]
    unusable = {"prompt": "what is six ?", "chosen": "", "rejected": "b", "subset": "hep-cpp"}
    data = lines_file(tmp_path, [*rows, unusable])
    output = tmp_path / "scores.jsonl"
    command.main(command.Args(model=str(toy_base), data=data, output=str(output)))
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    lines = read_lines(output)
    right = [line["chosen_logps"] > line["rejected_logps"] for line in lines[:12]]
    shares = {"hep-cpp": sum(right[::2]) / 6, "math-prm": sum(right[1::2]) / 6}
    for name, share in shares.items():
        assert next(line for line in printed if line[:1] == [name])[:3] == [name, "6", f"{share:.3f}"]
    section = (164 * shares["hep-cpp"] + 984 * shares["math-prm"]) / (164 + 984)
    assert ["section", "Reasoning", f"{section:.3f}"] in printed
    assert any(line[:4] == "Accuracy at equal length:".split() for line in printed)
    assert set(lines[0]) == {"row", "chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens"}


def test_the_command_reads_lists_as_the_second_benchmark_does(toy_base, tmp_path, capsys):
    run = train("dph", tmp_path / "run", model=str(toy_base), data=write_pairs(tmp_path / "p.jsonl", 24))
    words = ["one", "two", "three", "four", "five", "six"]
    rows = [
        {
            "prompt": "what is one plus two ?",
            "chosen": [f" it is {word} ."],
            "rejected": [f" it is {w} ." for w in words],
        }
        for word in ("seven", "eight", "nine")
    ]
    rows = [row | {"subset": "Math", "id": str(i)} for i, row in enumerate(rows)]
    for kind, n in (("ref", 1), ("tied", 3)):
        sides = {"chosen": [f" {word} ." for word in words[:n]], "rejected": [f" {word} ." for word in words[3:]]}
        rows.append({"prompt": "what is one ?", **sides, "subset": "Ties", "id": f"{kind}:4"})
    output = tmp_path / "scores.jsonl"
    command.main(command.Args(model=str(run), data=lines_file(tmp_path, rows), output=str(output)))
    lines, printed = read_lines(output), [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [len(line["rejected_reward"]) for line in lines] == [6, 6, 6, 3, 3]
    right = [line["chosen_reward"][0] > max(line["rejected_reward"]) for line in lines[:3]]
    math_line = next(line for line in printed if line[:1] == ["Math"])
    assert math_line[-3] == f"{sum(right) / 3:.3f}"
    names = ("ref:4", "tied:4")
    ties = [(name, line["chosen_reward"], line["rejected_reward"]) for name, line in zip(names, lines[3:])]
    assert next(line for line in printed if line[:1] == ["Ties"])[-1] == f"{reward_bench.ties_score(ties)['score']:.3f}"
    assert "RewardBench 2, mean of 2 of 6 subsets" in " ".join(" ".join(line) for line in printed)


# -- sequence-classification models


@pytest.fixture(scope="module")
def rewards_run(toy_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    change = {"model": str(toy_base), "data": write_pairs(folder / "pairs.jsonl", 24), "lr": 1e-2, "holdout": 0.0}
    reward_model.main(reward_model.Args(**change, output_dir=str(folder), name="run"))
    return folder / "run"


def test_a_run_of_reward_model_is_judged_by_the_same_command(rewards_run, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [*pairs(5, seed=1), {"prompt": "what is six ?", "chosen": "", "rejected": "b"}]
    output = tmp_path / "scores.jsonl"
    command.main(command.Args(model=str(rewards_run), data=lines_file(tmp_path, rows), output=str(output)))
    lines, printed = read_lines(output), capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(rewards_run)
    model = AutoModelForSequenceClassification.from_pretrained(rewards_run).eval()
    for line, row in zip(lines, rows[:5]):
        assert (line["chosen_logps"], line["rejected_logps"]) == (None, None)
        for side in ("chosen", "rejected"):
            ids = [*tokenizer(row["prompt"] + row[side]).input_ids, tokenizer.eos_token_id]
            assert line[f"{side}_reward"] == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
            assert line[f"{side}_tokens"] == len(ids) - len(tokenizer(row["prompt"]).input_ids)
    assert lines[5]["chosen_reward"] is None
    right = sum(line["chosen_reward"] > line["rejected_reward"] for line in lines[:5]) / 5
    assert f"6 rows, 5 scored, 1 dropped (an answer is empty). Reward accuracy {right:.3f}. Written" in printed
    with pytest.raises(InputError, match=r"--generate: .* is a sequence-classification model, which has no"):
        command.main(command.Args(model=str(rewards_run), generate=str(tmp_path / "rows.jsonl"), output="new.jsonl"))


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_reward_models_of_others_are_read_at_the_text_s_end(labels, toy_tokenizer, tmp_path):
    """No EOS is put behind: they were not trained with one. Two labels: the second's logit minus
    the first's. A text that ends in the pad token is read there."""
    from transformers import LlamaForSequenceClassification

    config = models.tiny_llama(len(toy_tokenizer)).config
    config.num_labels = labels
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config).eval()
    folder = models.save(model, toy_tokenizer, tmp_path / "model")
    row = {"prompt": "what is six ?", "chosen": " it is six .", "rejected": f" it is two {toy_tokenizer.pad_token}"}
    flags = {"model": str(folder), "data": lines_file(tmp_path, [row]), "output": str(tmp_path / "scores.jsonl")}
    if labels == 3:
        with pytest.raises(InputError, match="the model has 3 labels; expected one, or two"):
            command.main(command.Args(**flags))
        return
    command.main(command.Args(**flags))
    (line,) = read_lines(tmp_path / "scores.jsonl")
    for side in ("chosen", "rejected"):
        ids = toy_tokenizer(row["prompt"] + row[side]).input_ids
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            logits = model.score(hidden)
        expected = (logits[-1] - logits[0] * (labels == 2)).item()
        assert line[f"{side}_reward"] == pytest.approx(expected, abs=1e-5)
        assert line[f"{side}_tokens"] == len(ids) - len(toy_tokenizer(row["prompt"]).input_ids)
    assert abs(line["chosen_reward"] - line["rejected_reward"]) > 1e-3


def test_scores_are_counted_while_they_come(toy_base, tmp_path, monkeypatch):
    """One pass over all answers, short ones first, which shows how far it is."""
    shown, track = [], progress.track

    def track_and_note(items, what, unit="batch"):
        shown.append((what, len(items)))
        return track(items, what, unit)

    monkeypatch.setattr(progress, "track", track_and_note)
    run = train("dph", tmp_path / "run", model=str(toy_base), data=write_pairs(tmp_path / "p.jsonl", 16))
    shown.clear()
    data = write_pairs(tmp_path / "rows.jsonl", 10)
    command.main(command.Args(model=str(run), data=data, output=str(tmp_path / "out.jsonl"), batch_size=4))
    assert shown == [("log-probabilities of 20 answers", 5), ("rewards of 20 answers", 20)]
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[9])["row"] == 9
