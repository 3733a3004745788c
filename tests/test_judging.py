"""Answers to a file of prompts, and win rates with and without the length."""

import json
import math

import pytest
import torch

from common import InputError
from experiments.study import read_lines
from judging import answers, command, win_rate
from tests import models
from tests.runs import train

PROMPTS = ["what is one plus two ?", "", "what colour has mud ?", *(f"what is {n} ?" for n in ("one", "two", "six"))]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def ask(model, prompts, output, **changes) -> list[dict]:
    """The lines of `--generate`."""
    flags = {"max_new_tokens": 6} | changes
    command.main(command.Args(model=str(model), generate=str(prompts), output=str(output), **flags))
    return read_lines(output)


def test_every_row_has_a_line_in_order(toy_base, prompts, tmp_path, capsys):
    lines = ask(toy_base, prompts, tmp_path / "answers.jsonl")
    assert [line["row"] for line in lines] == list(range(6))
    assert lines[1] == {"row": 1, "reason": "the prompt is empty"}
    for line, prompt in zip(lines, PROMPTS):
        if line["row"] != 1:
            assert set(line) == {"row", "prompt", "answers"}
            assert line["prompt"] == prompt
            assert len(line["answers"]) == 1
    assert "6 rows, 5 answered, 1 dropped (the prompt is empty)." in capsys.readouterr().out
    assert not (tmp_path / "answers.jsonl.begun").exists()


def test_greedy_answers_are_the_models_likeliest_tokens(toy_base, prompts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = ask(toy_base, prompts, tmp_path / "answers.jsonl", temperature=0.0)
    tokenizer, model = AutoTokenizer.from_pretrained(toy_base), AutoModelForCausalLM.from_pretrained(toy_base)
    ids = tokenizer(PROMPTS[0]).input_ids
    begin = len(ids)
    while len(ids) < begin + 6 and ids[-1] != tokenizer.eos_token_id:
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    expected = tokenizer.decode([i for i in ids[begin:] if i != tokenizer.eos_token_id])
    assert lines[0]["answers"] == [expected.strip()]


@pytest.fixture
def head_run(toy_base, tmp_path):
    """A run of dph.py with a head that has learned something."""
    return train("dph", tmp_path / "dph", model=str(toy_base), max_steps=5, lr=1e-2, kl_samples=0)


def test_the_head_picks_the_largest_reward(head_run, prompts, tmp_path, monkeypatch):
    """Rewards as a sequence-classification loader gives them for the sampled tokens."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    sample, sampled = answers.sample, []

    def sample_and_keep(*words, **more):
        sampled.extend(sample(*words, **more))
        return sampled

    monkeypatch.setattr(answers, "sample", sample_and_keep)
    lines = ask(head_run, prompts, tmp_path / "answers.jsonl", best_of=4, max_new_tokens=24)
    tokenizer = AutoTokenizer.from_pretrained(head_run)
    judge = AutoModelForSequenceClassification.from_pretrained(head_run, num_labels=1).eval()
    answered = [line for line in lines if "answers" in line]
    assert len(sampled) == 4 * len(answered) == 20
    for i, line in enumerate(answered):
        prompt = tokenizer(line["prompt"]).input_ids
        with torch.no_grad():
            expected = [judge(torch.tensor([prompt + ids])).logits.item() for ids in sampled[4 * i : 4 * i + 4]]
        assert line["rewards"] == pytest.approx(expected, abs=1e-4)
        assert line["rewards"][line["picked"]] == max(line["rewards"])
        assert max(expected) - min(expected) > 1e-3
    assert len({line["picked"] for line in answered}) > 1


def test_an_interrupted_command_goes_on_where_it_stopped(toy_base, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "GROUP", 2)
    whole = ask(toy_base, prompts, tmp_path / "whole.jsonl")
    assert len({line["answers"][0] for line in whole if "answers" in line}) > 2
    sample, calls = answers.sample, []

    def sample_twice(*words, **more):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(words)
        return sample(*words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(answers, "sample", sample_twice)
        with pytest.raises(KeyboardInterrupt):
            ask(toy_base, prompts, tmp_path / "answers.jsonl")
    begun = tmp_path / "answers.jsonl.begun"
    begun.write_text(begun.read_text()[:-5])  # the kill cut a line
    with pytest.raises(InputError, match=r"begun with other settings \(seed\)"):
        ask(toy_base, prompts, tmp_path / "answers.jsonl", seed=1)
    assert ask(toy_base, prompts, tmp_path / "answers.jsonl") == whole
    assert not begun.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_multiplies_in_the_dtype_that_training_would(dtype, toy_base, prompts, tmp_path, monkeypatch):
    sample, seen = answers.sample, []

    def sample_in(*words, autocast, **more):
        with autocast():
            seen.append(torch.ones(2, 2) @ torch.ones(2, 2))
        return sample(*words, autocast=autocast, **more)

    monkeypatch.setattr(answers, "sample", sample_in)
    monkeypatch.setattr(answers, "choose_dtype", lambda *rest: dtype)
    ask(toy_base, prompts, tmp_path / "answers.jsonl")
    assert [products.dtype for products in seen] == [getattr(torch, dtype)]


def test_refusals(toy_base, prompts, tmp_path):
    with pytest.raises(InputError, match="has no reward head"):
        ask(toy_base, prompts, tmp_path / "answers.jsonl", best_of=2)
    with pytest.raises(InputError, match=r"--top-p 0\.0: out of range"):
        ask(toy_base, prompts, tmp_path / "answers.jsonl", top_p=0.0)
    with pytest.raises(InputError, match="Expected one of --data"):
        command.main(command.Args(model=str(toy_base), generate=str(prompts), data=str(prompts)))
    with pytest.raises(InputError, match="Expected one of --data"):
        command.main(command.Args(model=str(toy_base)))
    (tmp_path / "answers.jsonl").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        ask(toy_base, prompts, tmp_path / "answers.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]


def test_wins_and_ties():
    wins = win_rate.wins_of(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 2.0, 1.0]))
    assert wins.tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="one shape"):
        win_rate.wins_of(torch.zeros(2), torch.zeros(3))


def test_a_preference_for_length_alone_is_taken_out():
    """Wins drawn from the fitted form: the rate at equal length is found, the plain one is off."""
    generator = torch.Generator().manual_seed(0)
    differences = 20 + 30 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    scale = differences.std(correction=0)
    for intercept in (0.0, 0.4, -0.7):
        chances = (intercept + 1.5 * torch.tanh(differences / scale)).sigmoid()
        wins = (torch.rand(len(chances), generator=generator, dtype=torch.float64) < chances).double()
        rate, error = win_rate.length_controlled_rate(wins, differences)
        expected = 1 / (1 + math.exp(-intercept))
        assert abs(rate - expected) < 3.5 * error
        assert 0.002 < error < 0.006
        assert abs(wins.mean().item() - expected) > 5 * error


def test_equal_lengths_leave_the_rate_and_its_error():
    wins = torch.tensor([1.0] * 30 + [0.0] * 10 + [0.5] * 10)
    rate, error = win_rate.length_controlled_rate(wins, torch.zeros(50))
    assert rate == pytest.approx(0.7, abs=1e-9)
    assert error == pytest.approx(math.sqrt(0.7 * 0.3 / 50), rel=1e-9)
    assert win_rate.length_controlled_rate(torch.ones(5), torch.arange(5.0)) == (1.0, 0.0)


def test_lengths_that_tell_wins_apart_end_in_numbers():
    """Wins that length alone decides: without a prior the fit would run away."""
    differences = torch.linspace(-3, 3, 40)
    rate, error = win_rate.length_controlled_rate((differences > 0).double(), differences)
    assert rate == pytest.approx(0.5, abs=1e-6)
    assert 0 < error < 0.5


def test_answers_do_not_depend_on_a_padded_company(tmp_path):
    """A bigram model: what a row is given is drawn from its own distribution whatever stands beside
    it.
    """
    tokenizer = models.byte_tokenizer(bos=True)
    table = torch.full((len(tokenizer), len(tokenizer)), -1e4, dtype=torch.float64)
    for token in range(len(tokenizer)):
        table[token, (token + 1) % len(tokenizer)] = 0.0  # the next id, always
    folder = models.save(models.bigram_model(table), tokenizer, tmp_path / "model")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "some longer words", "b")))
    lines = ask(folder, path, tmp_path / "answers.jsonl", max_new_tokens=3)
    for line, last in zip(lines, "asb"):
        first = tokenizer(last).input_ids[-1]
        assert line["answers"] == [tokenizer.decode([first + 1, first + 2, first + 3]).strip()]
