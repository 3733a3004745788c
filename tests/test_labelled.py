"""Labelled answers and demonstrations: their rows, and pointwise_dpo.py, ulma.py and sft.py at work
in short runs.
"""

import csv
import importlib
import json
import math
from collections import Counter

import pytest
import safetensors.torch
import torch
from torch.nn.functional import logsigmoid

from common import InputError, batches, data, metrics, oracle
from common import models as loading
from common.files import read_rows
from labelled import rows as labelled_rows
from tests import models
from tests.house import FAMILIES
from tests.runs import (
    CHAT,
    SHORT,
    lines_file,
    lines_of,
    model_of,
    recorded,
    resume,
    start_process,
    train,
    train_until_killed,
    weights,
    write_pairs,
)
from toy import base, world

LABELLED = FAMILIES["labelled answers"]
ALL = [*LABELLED, "sft"]


@pytest.fixture(scope="module")
def plain():
    """A tokenizer without BOS."""
    return models.byte_tokenizer()


def load(path, tokenizer, holdout=0.0, seed=0, eval_data=None, **options):
    """(splits, kind of labels, what was said)"""
    said = []
    rows_from = (str(path), eval_data, holdout, seed)
    splits, _, kind = labelled_rows.load_labelled(*rows_from, tokenizer, 64, say=said.append, **options)
    return splits, kind, said


def demonstrations(path, tokenizer):
    return labelled_rows.load_demonstrations(str(path), None, 0.0, 0, tokenizer, 64, say=lambda words: None)[0]


# -- rows


def test_formats():
    question, answer = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Hello"}]
    read = {
        "trl": ({"prompt": "a", "completion": " b", "label": True}, ("a", " b", 1.0)),
        "scores": ({"prompt": "a", "response": " b", "score": -2.5, "dataset": "x"}, ("a", " b", -2.5)),
        "text": ({"text": "b", "label": 0}, ("", "b", 0.0)),
        "chat": ({"prompt": question, "completion": answer, "label": False}, (question, answer, 0.0)),
        "chat and a string": ({"prompt": question, "response": "Hello", "label": 1}, (question, answer, 1.0)),
    }
    for name, (row, expected) in read.items():
        assert labelled_rows.labelled_of_row("file, line 1", row) == (expected, None), name


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "label": 1}, 'no field "completion" or "response"'),
        ({"completion": "a", "label": 1}, 'no field "prompt"'),
        ({"prompt": "a", "completion": "b"}, 'no field "label" or "score"'),
        ({}, "found none"),
    ],
)
def test_a_missing_column_stops_with_file_line_and_field(row, words, tmp_path, plain):
    path = lines_file(tmp_path, [{"prompt": "p", "completion": "a", "label": 1}, row])
    with pytest.raises(InputError) as caught:
        load(path, plain)
    assert f"{path}, line 2" in str(caught.value)
    assert words in str(caught.value)


def test_bad_values_are_dropped_and_counted(tmp_path, plain):
    bad = [math.nan, math.inf, "good", "1", None, [1], {}, 10**400]
    rows = [{"prompt": f"p{i}", "completion": "a", "label": i % 2} for i in range(6)] + [
        {"prompt": "p", "completion": "a", "label": z} for z in bad
    ]
    rows += [
        {"prompt": "p", "completion": " ", "label": 1},
        {"prompt": "", "completion": "a", "label": 1},
        {"prompt": 3, "completion": "a", "label": 1},
    ]
    rows += [{"prompt": "p" * 80, "completion": "a", "label": 1}, {"prompt": "p", "completion": "\ud800", "label": 1}]
    splits, kind, said = load(lines_file(tmp_path, rows), plain)
    assert kind == "binary"
    assert [row["labels"] for row in splits["train"]] == [0.0, 1.0] * 3
    assert splits["train"].dropped == Counter(
        {
            "the label is not a finite number": 8,
            "the answer is empty": 1,
            "the prompt is empty": 1,
            "a field is neither text nor chat messages": 1,
            "the prompt alone fills max_length": 1,
            "a field is not valid Unicode text": 1,
        }
    )
    assert "19 rows read, 6 used" in said[0]
    assert "50.0% are positive" in said[-1]


def test_labels_of_csv_files_are_read_as_numbers(tmp_path, plain):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["prompt", "completion", "label"],
                ["p", "a", "true"],
                ["q", "b", "0"],
                ["r", "c", "False"],
                ["s", "d", "1.0"],
                ["t", "e", "x"],
            ]
        )
    splits, kind, _ = load(path, plain)
    assert kind == "binary"
    assert [row["labels"] for row in splits["train"]] == [1.0, 0.0, 0.0, 1.0]
    assert splits["train"].dropped == Counter({"the label is not a finite number": 1})


def test_numbers_that_are_no_labels(tmp_path):
    """Among them what a float32 cannot hold, and digits that a careless pattern reads for hours."""
    for text in ("1_000", "1e39", "-1e39", "nan", "inf", "1e400", "", "1" * 100_000 + "x"):
        assert labelled_rows.number_of(text, from_text=True) is None, text[:20]
    for value in (float("nan"), float("inf"), 1.7e308, 10**400, "1", None, [1]):
        assert labelled_rows.number_of(value, from_text=False) is None
    assert [labelled_rows.number_of(text, from_text=True) for text in ("1.", ".5", "-2e3", "+1.5", " True ")] == [
        1,
        0.5,
        -2e3,
        1.5,
        1,
    ]


def test_the_kind_of_labels_comes_from_the_data_or_the_flag(tmp_path, plain):
    def file(name, labels):
        return lines_file(
            tmp_path, [{"prompt": f"p{i}", "completion": "a", "label": z} for i, z in enumerate(labels)], name
        )

    binary, mixed = file("binary.jsonl", [0, 1, True, False]), file("mixed.jsonl", [0, 1, 0.5, 2])
    assert load(binary, plain)[1] == "binary"
    splits, kind, said = load(mixed, plain)
    assert kind == "continuous"
    assert "continuous, as the data shows; 0 to 2" in said[-1]
    assert load(binary, plain, labels="continuous")[1] == "continuous"
    splits, kind, said = load(mixed, plain, labels="binary")
    assert (kind, len(splits["train"])) == ("binary", 2)
    assert splits["train"].dropped == Counter({"the label is neither 0 nor 1": 2})
    assert "binary, as --labels says" in said[-1]


def test_scales(tmp_path, plain):
    scores = [-4.0, 0.0, 0.0, 4.0]
    train = lines_file(tmp_path, [{"prompt": f"p{i}", "response": "a", "score": z} for i, z in enumerate(scores)])
    held = lines_file(
        tmp_path,
        [{"prompt": f"q{i}", "response": "a", "score": z} for i, z in enumerate([-9.0, 2.0, 9.0])],
        "held.jsonl",
    )
    splits, kind, said = load(train, plain, label_scale="minmax", eval_data=held)
    assert kind == "continuous"
    assert [row["labels"] for row in splits["train"]] == [0.0, 0.5, 0.5, 1.0]
    assert [row["labels"] for row in splits["held_out"]] == [0.0, 0.75, 1.0]
    assert "-4 becomes 0, 4 becomes 1" in said[0]
    splits, _, said = load(train, plain, label_scale="quantile", eval_data=held)
    assert [row["labels"] for row in splits["train"]] == [0.125, 0.5, 0.5, 0.875]
    assert [row["labels"] for row in splits["held_out"]] == [0.0, 0.75, 1.0]
    assert "-4 becomes about 0" in said[0]
    with pytest.raises(InputError, match="--label-scale minmax: all training labels are 3"):
        load(
            lines_file(tmp_path, [{"prompt": "p", "response": "a", "score": 3}], "same.jsonl"),
            plain,
            label_scale="minmax",
        )
    with pytest.raises(InputError, match="the labels are binary"):
        load(
            lines_file(tmp_path, [{"prompt": "p", "response": "a", "score": z} for z in (0, 1)], "b.jsonl"),
            plain,
            label_scale="minmax",
        )


def test_pairs_become_two_rows_of_one_split(tmp_path, plain):
    pairs = [{"prompt": f"p{i}", "chosen": " yes", "rejected": " no"} for i in range(20)]
    splits, kind, _ = load(lines_file(tmp_path, pairs), plain, from_pairs=True, holdout=0.3)
    assert kind == "binary"
    assert [len(splits[name]) for name in ("train", "held_out")] == [28, 12]
    for split in splits.values():
        by_prompt = {}
        for prompt, answer, label in (row["texts"] for row in split):
            by_prompt.setdefault(prompt, []).append((answer, label))
        assert all(sorted(found) == [(" no", 0.0), (" yes", 1.0)] for found in by_prompt.values())
        assert [row["labels"] for row in split] == [row["texts"][2] for row in split]


def test_rows_with_text_alone_split_by_text_and_begin_with_bos_or_eos(tmp_path, plain):
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(10)]
    splits, _, _ = load(lines_file(tmp_path, rows), plain, holdout=0.2)
    assert [len(splits[name]) for name in ("train", "held_out")] == [8, 2]
    eos = plain.eos_token_id
    assert all(row["prompt"] == [eos] for row in splits["train"])  # no BOS: EOS stands for the beginning
    assert all(
        row["completions"] == [[*plain(text).input_ids, eos]]
        for row in splits["train"]
        for _, text, _ in [row["texts"]]
    )
    with_bos = models.byte_tokenizer(bos=True)
    row = load(lines_file(tmp_path, rows), with_bos)[0]["train"][0]
    assert row["prompt"] == [with_bos.bos_token_id]
    assert row["completions"] == [[*plain("t0").input_ids, eos]]


def test_rows_without_a_label_are_demonstrations_for_ulma_alone(tmp_path, plain):
    path = lines_file(
        tmp_path,
        [
            {"prompt": "p", "completion": "a"},
            {"prompt": "q", "completion": "b", "label": 0},
            {"prompt": "r", "completion": "c", "label": None},
        ],
    )
    splits, _, _ = load(path, plain, unlabelled=True)
    assert [row["labels"] for row in splits["train"]] == [1.0, 0.0, 1.0]
    with pytest.raises(InputError, match=r'line 1: no field "label"'):
        load(path, plain)


def test_chat_rows_go_through_the_template(tmp_path):
    chat = models.byte_tokenizer(bos=True, chat_template=CHAT)
    row = {"prompt": [{"role": "user", "content": "Hi"}], "response": "Hello", "label": True}
    example = load(lines_file(tmp_path, [row]), chat)[0]["train"][0]
    assert chat.decode(example["prompt"]) == "<s>[user]Hi</s>\n[assistant]"
    assert chat.decode(example["completions"][0]) == "Hello</s>\n"


def test_demonstrations(tmp_path, plain):
    path = lines_file(
        tmp_path, [{"prompt": f"p{i}", "completion": "a", "label": z} for i, z in enumerate([1, 0, True, 0.5])]
    )
    splits = demonstrations(path, plain)
    assert [row["texts"] for row in splits["train"]] == [("p0", "a"), ("p2", "a")]
    assert splits["train"].dropped == Counter({"not labelled 1, so no demonstration": 2})
    for rows in ([{"prompt": "p", "chosen": " y", "rejected": " n"}], [{"prompt": "p", "completion": " y"}]):
        splits = demonstrations(lines_file(tmp_path, rows), plain)
        assert [row["texts"] for row in splits["train"]] == [("p", " y")]


def test_toy_labels_follow_the_true_reward(toy_base):
    splits = base.labelled(0)
    assert {label for rows in splits.values() for _, _, label in rows} == {0.0, 1.0}
    expected = [1 / (1 + math.exp(-world.true_reward(world.row_of(p), a))) for p, a, _ in splits["train"]]
    drawn = [label for _, _, label in splits["train"]]
    assert sum(drawn) / len(drawn) == pytest.approx(sum(expected) / len(expected), abs=0.015)
    continuous = base.labelled(0, continuous=True)["train"]
    assert [label for _, _, label in continuous] == pytest.approx(
        [1 / (1 + math.exp(-world.true_reward(world.row_of(p), a))) for p, a, _ in continuous]
    )
    assert [row[:2] for row in continuous] == [row[:2] for row in splits["train"]]
    flipped = base.labelled(0, flip=0.25)
    assert flipped["held_out"] == splits["held_out"]
    assert sum(a[2] != b[2] for a, b in zip(flipped["train"], splits["train"])) / len(drawn) == pytest.approx(
        0.25, abs=0.02
    )
    asked = {name: {p for p, _, _ in rows} for name, rows in splits.items()}
    assert asked["train"] == asked["held_out"]
    assert not asked["train"] & asked["unseen"]


def test_concordance():
    scores, labels = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert metrics.auc(scores, labels) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert metrics.auc(scores, torch.tensor([0.9, 0.1, 0.5, 0.4])) == pytest.approx((3 + 0 + 1.5 + 1) / 6)
    assert metrics.auc(torch.zeros(4), labels) is None  # all ties: as before the first step
    assert metrics.auc(scores, torch.ones(4)) is None
    many = torch.arange(1500.0)
    assert metrics.auc(many, many) == 1.0
    with pytest.raises(ValueError, match="one shape"):
        metrics.auc(scores, labels[:, None])


# -- the passes

EXAMPLES = [
    {"prompt": [5, 6, 7], "completions": [[8, 9]], "labels": 1.0},
    {"prompt": [10], "completions": [[11, 12, 13, 2]], "labels": 0.0},
]


@pytest.mark.parametrize("layout", ["rows", "model_head"])
@pytest.mark.parametrize("script", ALL)
def test_exact_log_probabilities(script, layout, bigram):
    got = importlib.import_module(script).completion_logps(bigram.load(), batches.collate(EXAMPLES, 0, layout, "cpu"))
    expected = [bigram.logps(e["prompt"], e["completions"][0]) for e in EXAMPLES]
    assert got.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("layout", ["rows", "model_head"])
@pytest.mark.parametrize("script", LABELLED)
def test_prompt_states_are_those_of_the_prompt_alone(script, layout, tiny_llama):
    module, model = importlib.import_module(script), model_of(tiny_llama)
    with torch.no_grad():
        got = module.prompt_states(model, batches.collate(EXAMPLES, 0, layout, "cpu"))
        expected = [model.base_model(torch.tensor([e["prompt"]])).last_hidden_state[0, -1] for e in EXAMPLES]
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("script", LABELLED)
def test_the_loss_of_a_batch_by_hand(script, bigram):
    """Weights, constant and labels where they belong, with log-probabilities that are known."""
    module = importlib.import_module(script)
    batch = batches.collate(EXAMPLES, 0, "rows", "cpu") | {"ref_logps": torch.tensor([-4.0, -20.0])}
    numbers = {"beta": 0.2, "beta_log_z": 0.7, "positive_weight": 3.0, "negative_weight": 0.5}
    loss, sums = module.compute_loss(bigram.load(), batch, label_kind="binary", **numbers)
    logps = torch.tensor([bigram.logps(e["prompt"], e["completions"][0]) for e in EXAMPLES])
    h = 0.2 * (logps - torch.tensor([-4.0, -20.0])) + 0.7
    positive = -logps[0] if script == "ulma" else -logsigmoid(h[0])
    assert loss.item() == pytest.approx((3.0 * positive - 0.5 * logsigmoid(-h[1])).item(), rel=1e-5)
    assert sums["rewards/positive"].item() == pytest.approx(h[0].item(), rel=1e-4)
    assert sums["rewards/negative"].item() == pytest.approx(h[1].item(), rel=1e-4)
    squared, _ = module.compute_loss(bigram.load(), batch, label_kind="continuous", **numbers)
    positive = -logps[0] if script == "ulma" else (1 - h[0]) ** 2
    assert squared.item() == pytest.approx((3.0 * positive + 0.5 * h[1] ** 2).item(), rel=1e-5)


# -- training


@pytest.fixture(scope="module")
def file14(tmp_path_factory) -> str:
    """14 rows, both labels, lengths of all kinds: batches of 8 and 4 leave an uneven last step."""
    path = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    pairs = write_pairs(path.with_name("pairs.jsonl"), 14)
    rows = [row for _, row in read_rows(pairs)]
    labelled = [
        {"prompt": r["prompt"], "completion": r["chosen" if i % 3 else "rejected"], "label": int(i % 3 > 0)}
        for i, r in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    return str(path)


@pytest.fixture
def llama(tiny_llama) -> str:
    return str(tiny_llama)


def method(script: str) -> dict:
    """What makes the most of a script take part."""
    return {"learn_partition": True, "positive_weight": 2.0, "partition_lr": 5e-2} if script in LABELLED else {}


def assert_same_weights(a, b):
    assert weights(a) == weights(b)


@pytest.mark.parametrize("script", LABELLED)
def test_the_first_logged_loss_is_known(script, tmp_path, file14, llama):
    folder = train(script, tmp_path / "run", model=llama, data=file14, max_steps=1, batch_size=14, micro_batch_size=5)
    first = lines_of(folder)[0]
    rows = [row for _, row in read_rows(file14)]
    tokenizer = loading.load_tokenizer(llama)
    examples = data.encode_rows(
        tokenizer, [(r["prompt"], r["completion"], r["label"]) for r in rows], 64, answers=1, columns=("labels",)
    )
    logps = oracle.plain_logps(model_of(llama), oracle.sequences_of(examples), 0)
    expected = [-logp if script == "ulma" and row["label"] else math.log(2) for row, logp in zip(rows, logps.tolist())]
    assert first["loss"] == pytest.approx(sum(expected) / 14, rel=1e-5)
    assert first["rewards/positive"] == pytest.approx(0, abs=1e-5)
    assert first["logps"] == pytest.approx(logps.mean().item(), rel=1e-5)


def test_means_over_a_class_are_over_that_class(tmp_path, file14, llama):
    """Metrics with a count of their own, over uneven micro-batches and the steps of one line."""
    given = {
        "model": llama,
        "data": file14,
        "batch_size": 5,
        "micro_batch_size": 2,
        "log_every": 3,
        "beta_log_z": 0.6,
        "lr": 1e-12,
    }
    line = lines_of(train("pointwise_dpo", tmp_path / "run", **given))[0]
    assert [line["rewards/positive"], line["rewards/negative"]] == pytest.approx(
        [0.6, 0.6], abs=1e-4
    )  # not .6 times a class's share
    assert not any(name.startswith("count") for name in line)


@pytest.mark.parametrize("script", ALL)
def test_every_row_or_token_weighs_the_same_however_a_step_is_cut(script, tmp_path, file14, llama):
    whole = recorded(
        script, tmp_path / "whole", model=llama, data=file14, batch_size=8, micro_batch_size=8, **method(script)
    )
    cut = recorded(
        script, tmp_path / "cut", model=llama, data=file14, batch_size=8, micro_batch_size=3, **method(script)
    )
    assert whole[0] == cut[0]
    assert len(whole[1]) == 2
    for name, gradient in whole[1][0].items():
        torch.testing.assert_close(
            cut[1][0][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda words, name=name: f"{name}: {words}"
        )
    a, b = (lines_of(tmp_path / run)[0] for run in ("whole", "cut"))
    assert {k: v for k, v in a.items() if k != "split"} == pytest.approx(
        {k: v for k, v in b.items() if k != "split"}, rel=1e-4, abs=1e-5
    )


def test_sft_is_the_mean_over_the_tokens_of_a_step(tmp_path, file14, llama):
    """Against a gradient by the longest way: each answer alone, full logits, prompt tokens left
    out.
    """
    _, gradients = recorded("sft", tmp_path / "run", model=llama, data=file14, batch_size=20, micro_batch_size=4)
    rows = [row for _, row in read_rows(file14) if row["label"] == 1]
    tokenizer, model, total, tokens = loading.load_tokenizer(llama), model_of(llama), 0.0, 0
    for row in rows:
        prompt, ids = (
            tokenizer(row["prompt"]).input_ids,
            [*tokenizer(row["prompt"] + row["completion"]).input_ids, tokenizer.eos_token_id],
        )
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        total = total - sum(logps[t, ids[t + 1]] for t in range(len(prompt) - 1, len(ids) - 1))
        tokens += len(ids) - len(prompt)
    (total / tokens).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            gradients[0][name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda words, name=name: f"{name}: {words}"
        )
    assert lines_of(tmp_path / "run")[0]["loss"] == pytest.approx((total / tokens).item(), rel=1e-5)


@pytest.mark.parametrize("script", ALL)
def test_a_killed_run_resumes_bit_for_bit(script, tmp_path, file14, llama):
    given = {
        "model": llama,
        "data": file14,
        "batch_size": 4,
        "epochs": 2,
        "save_every": 2,
        "holdout": 0.2,
        "kl_samples": 4,
        "max_new_tokens": 4,
        **method(script),
    }
    whole = train(script, tmp_path / "whole", **given)
    train_until_killed(script, tmp_path / "part", **given)
    part = resume(script, tmp_path / "part")
    assert_same_weights(part, whole)
    assert (part / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    a, b = (json.loads((run / "summary.json").read_text()) for run in (part, whole))
    assert (a["before"], a["after"]) == (b["before"], b["after"])


@pytest.mark.parametrize("script", LABELLED)
def test_a_learned_partition_moves_with_its_own_rate_and_is_saved(script, tmp_path, file14, llama):
    given = {
        "model": llama,
        "data": file14,
        "batch_size": 14,
        "max_steps": 1,
        "warmup": 0.0,
        "lr": 1e-4,
        "max_grad_norm": math.inf,
    }
    folder = train(script, tmp_path / "run", **given, learn_partition=True, partition_lr=3e-2)
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert saved["partition.bias"].abs().item() == pytest.approx(3e-2, rel=1e-3)  # AdamW's first step
    assert saved["partition.weight"].abs().max().item() == pytest.approx(3e-2, rel=1e-3)
    start = model_of(llama).state_dict()
    assert max((saved[name] - start[name]).abs().max().item() for name in saved if name in start) == pytest.approx(
        1e-4, rel=1e-2
    )
    constant = train(script, tmp_path / "constant", **given)
    plain = safetensors.torch.load_file(constant / "model.safetensors")
    assert not any("partition" in name for name in plain)
    assert all(
        torch.equal(plain[name], saved[name]) for name in plain
    )  # the head reads the reference's states: no gradient reaches the LM through it
    assert model_of(folder) is not None  # the folder is still a causal LM


def test_a_learned_partition_finds_the_difficulty_of_prompts(tmp_path, llama):
    """Two questions, one always answered well and one badly, whatever is said: the values explain
    the labels and the policy need not move.
    """
    asked = {"what colour has snow ?": 1, "what is one plus two ?": 0}
    rows = [
        {"prompt": q, "completion": f" it is {word} .", "label": z}
        for q, z in asked.items()
        for word in ("white", "red", "three", "four", "big", "cold")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "model": llama,
        "data": str(path),
        "batch_size": 12,
        "micro_batch_size": 12,
        "epochs": 60,
        "lr": 1e-3,
        "log_every": 60,
        "beta": 0.1,
    }
    moved = {}
    for learn in (False, True):
        folder = train("pointwise_dpo", tmp_path / f"run{learn}", **given, learn_partition=learn, partition_lr=0.3)
        line, start, end = lines_of(folder)[-1], model_of(llama).state_dict(), model_of(folder).state_dict()
        moved[learn] = sum((end[name] - start[name]).norm().item() for name in start)
    assert line["loss"] < 0.1
    assert moved[True] < 0.5 * moved[False]


@pytest.mark.parametrize("script", ALL)
def test_two_processes_train_like_one(script, tmp_path, file14, llama):
    setup = {
        "model": llama,
        "data": file14,
        "micro_batch_size": 3,
        "batch_size": 7,
        "holdout": 0.2,
        "eval_every": 2,
        "lr": 1e-3,
        "save_every": 1,
    }
    setup |= {"kl_samples": 3, "max_new_tokens": 4, **method(script)}
    one = train(script, tmp_path / "one", **setup)
    given = {**SHORT, **setup, "name": "two", "output_dir": str(tmp_path)}
    words = [f"--{k.replace('_', '-')}" if v is True else f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
    process = start_process(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"{script}.py", *words]
    )
    assert process.returncode == 0, process.stderr[-3000:]
    a, b = (safetensors.torch.load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    assert a.keys() == b.keys()
    for name in a:
        rate = 5e-2 if name.startswith("partition") else 1e-3
        torch.testing.assert_close(
            b[name], a[name], rtol=0, atol=0.1 * rate * 2, msg=lambda words, name=name: f"{name}: {words}"
        )
    for split in ("train", "held_out"):
        for x, y in zip(lines_of(one, split), lines_of(tmp_path / "two", split), strict=True):
            x, y = ({k: v for k, v in line.items() if k != "split" and v is not None} for line in (x, y))
            assert x == pytest.approx(y, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("script", ALL)
def test_a_run_is_a_model_for_other_scripts(script, tmp_path, file14, llama):
    first = train(script, tmp_path / "first", model=llama, data=file14, **method(script))
    pairs = write_pairs(tmp_path / "pairs.jsonl", 6)
    for other in ("dpo", "dph", "typo"):
        second = train(other, tmp_path / other, model=str(first), data=pairs, max_steps=1, max_new_tokens=4)
        if other == "dpo":
            assert lines_of(second)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    second = train("pointwise_dpo", tmp_path / "again", model=str(first), data=file14, max_steps=1)
    assert lines_of(second)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_summaries_of_the_toy(toy_base, tmp_path, capsys):
    folder = train("pointwise_dpo", tmp_path / "run", model="toy", kl_samples=8, max_steps=2)
    summary = json.loads((folder / "summary.json").read_text())
    for column in ("before", "after", "before_unseen", "after_unseen"):
        assert {"logps_auc", "reward_auc", "kl", "true_reward", "frontier_efficiency"} <= set(summary[column])
    assert summary["before"]["reward_auc"] is None
    assert summary["before"]["logps_auc"] > 0.6  # the base's own likelihood goes with quality
    assert "Labels: binary" in capsys.readouterr().out
    folder = train("sft", tmp_path / "sft", model="toy", kl_samples=8, max_steps=2)
    summary = json.loads((folder / "summary.json").read_text())
    assert 1 < summary["before"]["perplexity"] < 3


def test_demonstrations_alone_are_supervised_fine_tuning(tmp_path, llama):
    """ULMA without a negative row and SFT have one gradient, up to the number that the sum is
    divided by.
    """
    pairs = [row for _, row in read_rows(write_pairs(tmp_path / "pairs.jsonl", 6))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) + "\n" for r in pairs))
    _, a = recorded("ulma", tmp_path / "ulma", model=llama, data=str(path), labels="binary")
    _, b = recorded("sft", tmp_path / "sft", model=llama, data=str(path))
    tokenizer = loading.load_tokenizer(llama)
    tokens = sum(
        len(tokenizer(r["chosen"]).input_ids) for r in pairs
    )  # BOS and EOS: one is not there, the other not counted
    for name, gradient in a[0].items():
        torch.testing.assert_close(gradient * 6 / tokens, b[0][name], rtol=1e-4, atol=1e-6)
