"""experiments/sentiment.py: VADER as a reward, openings, Bradley-Terry labels, rows that become the
sampled tokens again, the best possible curve, and one run of the grid.
"""

import itertools
import json
import math
import random
import sys

import pytest
import torch

from common import InputError, data
from common.generate import sample
from common.models import load_model, load_tokenizer
from experiments import policies, sentiment, sentiment_pages, sentiment_rows, study
from experiments.sentiment_rows import Continuation
from rewards.models import load_reward
from rewards.sentiment import vader_reward
from tests import models, pages
from tests.house import ROOT
from tests.runs import lines_file

STORIES, TEXTS = "models/stories260K", "text/tinystories_1000.txt.gz"


def length_of_text(prompts: list, texts: list[str]) -> torch.Tensor:
    """A reward for tests."""
    return torch.tensor([len(text) / 20 for text in texts])


def settings(**changes) -> sentiment.Args:
    return sentiment.Args(**({"model": "m", "prompts": "p.jsonl"} | changes))


# -- VADER


def test_vader_judges_the_answer_alone():
    pytest.importorskip("vaderSentiment", reason="needs the package vaderSentiment")
    reward = load_reward("vader", "pairs.jsonl", torch.device("cpu"), torch.no_grad)
    scores = reward(["a terrible day", "a happy day", "a day"], ["He was happy.", "He was sad.", "He was there."])
    assert scores.dtype == torch.float32
    # Of a single word of valence v the compound score is v / sqrt(v^2 + 15): 2.7 and -2.1.
    assert scores.tolist() == pytest.approx([2.7 / math.sqrt(2.7**2 + 15), -2.1 / math.sqrt(2.1**2 + 15), 0], abs=1e-4)
    assert sentiment_rows.true_rewards(["He was happy."]) == pytest.approx([2 * scores[0].item()])


def test_without_its_package_vader_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(InputError, match=r"^--test-reward vader: needs vaderSentiment .*pip install vaderSentiment"):
        load_reward("vader", "toy", torch.device("cpu"), torch.no_grad, flag="--test-reward")
    with pytest.raises(InputError, match=r"^experiments/sentiment.py: needs vaderSentiment"):
        sentiment.check(settings())


# -- openings


def test_an_opening_has_its_tokens_and_ends_with_a_word(toy_tokenizer):
    text = "what is the capital of france ? it is paris , my friend ."
    opening = sentiment_rows.opening_of(toy_tokenizer, text, 8)  # BOS and seven words
    assert opening == "what is the capital of france ?"
    assert len(toy_tokenizer(opening).input_ids) == 8
    assert sentiment_rows.opening_of(toy_tokenizer, "what is the", 8) is None


def test_openings_of_real_text_become_the_same_tokens_again(preference_data):
    tokenizer = load_tokenizer(str(preference_data / STORIES))
    texts = sentiment_rows.read_texts(str(preference_data / TEXTS))
    openings = sentiment_rows.read_openings(str(preference_data / TEXTS), tokenizer, 32, 340)
    assert len(set(openings)) == len(openings) < len(texts) == 1000
    for opening in openings[:50]:
        assert len(tokenizer(opening).input_ids) == 32
        rest = next(text for text in texts if text.startswith(opening))[len(opening) :]
        assert not rest[0].isalnum()


def test_files_without_openings_are_refused_in_a_sentence(tmp_path, toy_tokenizer):
    def refusal(source: str, wanted: int = 1) -> str:
        with pytest.raises(InputError) as refused:
            sentiment_rows.read_openings(source, toy_tokenizer, 5, wanted)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert refusal("no/file.jsonl").startswith("--prompts no/file.jsonl: no such file; expected rows")
    rows = lines_file(tmp_path, [{"prompt": "what is the capital of france ?"}, {"text": 3}])
    assert 'line 2: no field "prompt" or "text" with a string (found text)' in refusal(rows)
    rows = lines_file(tmp_path, [{"text": "what is the capital of france ?"}, {"text": "what is"}])
    assert "1 of 2 texts have an opening of 5 tokens of their own; expected 2, to train on" in refusal(rows, 2)
    assert sentiment_rows.read_openings(rows, toy_tokenizer, 5, 1) == ["what is the capital"]


# -- labels


def test_bradley_terry_decides_which_answer_is_chosen():
    gap = 1.3
    group = [Continuation(" bad", -0.4, True), Continuation(" good", -0.4 + gap, True)]
    groups = [group, group[::-1]] * 4000
    rows = sentiment_rows.pairs_of(["x"] * len(groups), groups, random.Random(0))
    share = sum(row["chosen"] == " good" for row in rows) / len(rows)
    expected = 1 / (1 + math.exp(-gap))
    assert len(rows) == 8000
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 8000))
    labelled = sentiment_rows.labelled_of(["x"] * len(groups), groups, random.Random(0))
    for text, reward in ((" bad", -0.4), (" good", -0.4 + gap)):
        labels = [row["label"] for row in labelled if row["response"] == text]
        expected = 1 / (1 + math.exp(-reward))
        assert sum(labels) / len(labels) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / len(labels)))


def test_every_pair_of_different_exact_answers_is_made_once():
    group = [
        Continuation(text, 0.0, exact) for text, exact in ((" a", True), (" b", True), (" c", True), (" d", False))
    ]
    rows = sentiment_rows.pairs_of(["x", "y"], [group, [*group[:2], group[0]]], random.Random(0))
    made = {(row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in rows}
    assert made == {("x", " a", " b"), ("x", " a", " c"), ("x", " b", " c"), ("y", " a", " b")}
    assert len(rows) == 5  # " a" was said twice to y, and stands against " b" each time
    labelled = sentiment_rows.labelled_of(["x"], [group], random.Random(0))
    assert [row["response"] for row in labelled] == [" a", " b", " c"]


# -- rows become the sampled tokens again


def test_scripts_read_the_very_tokens_that_were_sampled(tmp_path, toy_tokenizer):
    """A text that ended has its EOS, one that was cut at the limit has none, although scripts put
    an EOS behind every text.
    """
    table = models.random_table(len(toy_tokenizer), seed=1, spread=0.5)
    table[:, toy_tokenizer.eos_token_id] += 3
    model, limit = models.bigram_model(table.log_softmax(-1)), 6
    openings = ["what is the capital of france ?", "what is the capital of italy ?"]
    groups = sentiment_rows.continue_openings(model, toy_tokenizer, openings, 24, limit, 5, length_of_text)
    prompts = [toy_tokenizer(opening).input_ids for opening in openings]
    sampled = sample(model, prompts, toy_tokenizer, limit, seed=5, n=24)
    by_opening = dict(zip(openings, (sampled[:24], sampled[24:])))
    exact = [answer.is_exact for group in groups for answer in group]
    assert 24 < sum(exact) < 48  # special words, and texts that begin with EOS, do not come back

    sentiment_rows.write_rows(tmp_path, openings, groups, 0)
    length = len(prompts[0]) + limit
    assert len(prompts[1]) + limit == length
    splits, _ = data.load_pairs(
        str(tmp_path / "pairs.jsonl"), None, 0.0, 0, toy_tokenizer, length, say=lambda *words: None
    )
    ends = set()
    for row in splits["train"]:
        for completion in row["completions"]:
            assert completion in by_opening[row["texts"][0]]
            ends.add((len(completion) == limit, completion[-1] == toy_tokenizer.eos_token_id))
    assert {(True, False), (False, True)} <= ends
    facts = sentiment_rows.facts_of(tmp_path)
    assert facts["labelled"] == sum(exact) == facts["sampled"] - facts["other_tokens"]
    assert facts["pairs"] == len(splits["train"]) == len(study.read_lines(tmp_path / "pairs.jsonl"))


def test_rewards_go_with_their_texts(toy_tokenizer, bigram):
    openings = ["what is the capital of france ?"]
    (group,) = sentiment_rows.continue_openings(bigram.load(), toy_tokenizer, openings, 8, 5, 0, length_of_text)
    assert [answer.reward for answer in group] == pytest.approx([len(answer.text) / 10 for answer in group])
    assert len({answer.text for answer in group}) > 1


def test_other_settings_have_other_rows(tmp_path):
    folders = [
        sentiment_rows.folder_of(str(tmp_path), sentiment.settings_of(settings(**changes)), seed)
        for changes in ({}, {"answers": 3}, {"lr": 1e-4}, {"extra": "--max-steps 1"})
        for seed in (0, 1)
    ]
    assert len(set(folders)) == 8
    assert sentiment_rows.facts_of(folders[0]) is None


# -- the best possible curve


def test_the_best_possible_curve_of_a_small_distribution():
    """p exp(r / beta) / Z in closed form, for samples that stand in the very proportions of p."""
    p, r = torch.tensor([0.5, 0.375, 0.125]).double(), torch.tensor([-1.0, 0.5, 1.5]).double()
    rewards = r.repeat_interleave((p * 800).long())[None]
    curve = sentiment.best_possible(rewards)
    assert curve[0] == [0, pytest.approx((p * r).sum().item())]
    assert curve == sorted(curve)
    for beta in (3, 1, 0.5, 0.2):
        q = (p.log() + r / beta).softmax(0)
        kl, reward = (q * (q / p).log()).sum().item(), (q * r).sum().item()
        assert sentiment.best_at(curve, kl) == pytest.approx(reward, abs=2e-3)
        assert sentiment.share_of_gain(kl, reward, curve) == pytest.approx(1, abs=5e-3)
    assert curve[-1] == pytest.approx([math.log(8), 1.5], abs=1e-3)  # a hundred samples have the largest reward
    assert sentiment.best_at(curve, math.log(8) + 0.1) is None
    assert sentiment.share_of_gain(3.0, 1.5, curve) is None
    assert sentiment.share_of_gain(0.005, 1.5, curve) is None
    assert sentiment.best_possible(torch.zeros(2, 64)) == [[0, 0]]
    assert sentiment.best_at([[0, 0.3]], 0) == 0.3
    half = (sentiment.best_at(curve, 1.0) + curve[0][1]) / 2
    assert sentiment.share_of_gain(1.0, half, curve) == pytest.approx(0.5)


def test_the_curve_ends_where_few_samples_carry_it():
    rewards = torch.linspace(-2, 2, 512, dtype=torch.float64).repeat(3, 1)
    kl, reward = sentiment.best_possible(rewards)[-1]
    assert kl < math.log(512 / sentiment.EFFECTIVE) + 0.5
    betas = torch.logspace(1.5, -2, 20_001, dtype=torch.float64)
    effective = 1 / (rewards[0] / betas[:, None]).softmax(-1).square().sum(-1)
    last = betas[effective >= sentiment.EFFECTIVE].min()
    limit = ((rewards[0] / last).softmax(-1) * rewards[0]).sum().item()
    assert limit - 0.05 < reward <= limit + 1e-9  # the last of the curve's own prices before that


# -- the grid and its points


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("DPO", "IPO")}, "--methods: 'IPO' is none of SFT, DPO, "),
        ({"seeds": ()}, "--seeds: expected different numbers, got none"),
        ({"judged": 8}, "--judged 8: expected 16 or more"),
        ({"bank": 32}, "--bank 32: expected 64 or more"),
        ({"lr": -1.0}, "--lr -1.0: expected a positive number"),
        ({"answers": 1}, "--answers 1: expected 2 or more"),
        ({"prompt_tokens": 1}, "--prompt-tokens 1: expected 2 or more"),
    ],
)
def test_arguments_that_lead_nowhere_are_refused(changes, words):
    with pytest.raises(InputError) as refused:
        sentiment.check(settings(**changes))
    assert str(refused.value).startswith(words)
    assert "\n" not in str(refused.value)


def test_every_method_has_three_settings_seed_by_seed():
    grid = sentiment.grid_of(settings(seeds=(0, 1)))
    assert len(grid) == len(set(grid)) == 2 * (2 + 8 * 3)
    assert [seed for *_, seed in grid] == [0] * 26 + [1] * 26
    assert all(len(method.values) == 3 for method in sentiment.METHODS.values())
    assert sentiment.grid_of(settings(methods=("best of n",), seeds=(3,))) == [(sentiment.BASE, 0, 3)]


def lines_of_a_grid(seeds=(0, 1)) -> list[dict]:
    """Made-up lines of a whole grid."""
    lines = []
    for method, value, seed in sentiment.grid_of(settings(seeds=seeds)):
        line = {"method": method, "value": value, "seed": seed, "kl": 1.0 + seed, "true_reward": 0.7 + value / 100}
        if method == sentiment.BASE:
            line |= {
                "curve": [[0.0, 0.5], [1.5, 1.1]],
                "best": [{"n": n, "kl": 0.3, "true_reward": 0.6} for n in (4, 16)],
            }
        if method == sentiment.HEAD_LM:
            line["picks"] = [{"n": n, "kl": 1.0, "true_reward": 0.9} for n in (2, 4, 16)]
        lines.append(line)
    return lines


def test_points_come_of_lines_with_their_share_of_the_gain():
    lines = lines_of_a_grid()
    points = sentiment.points_of(lines, tuple(sentiment.METHODS))
    assert list(dict.fromkeys(point["method"] for point in points)) == list(sentiment.METHODS)
    by_key = {(point["method"], point["value"], point["seed"]): point for point in points}
    assert by_key["DPH's pick", 4, 1]["share"] == pytest.approx(0.4 / 0.4)
    assert by_key["best of n", 16, 0]["share"] == pytest.approx(0.1 / 0.12)
    assert by_key["DPO", 1, 0]["share"] == pytest.approx(0.21 / 0.4)
    assert by_key["DPO", 1, 1]["share"] is None  # a KL of 2 is beyond the curve
    alone = [line for line in lines if (line["method"], line["seed"]) != (sentiment.BASE, 1)]
    assert {point["seed"] for point in sentiment.points_of(alone, ("DPO",))} == {0}
    rows = sentiment.table_rows(points)
    assert len(rows) == 9 * 3 + 2
    assert next(row for row in rows if row[:2] == ["DPO", "beta 1"])[2:] == [2, "1.50 ± 6.35", "0.71 ± 0.00", "-"]


def test_pages_show_the_table_and_what_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sentiment_pages, "RESULTS", tmp_path)
    assert pages.block(ROOT, "sentiment table m") == "No run is kept yet."
    lines = [
        line
        | {"git_commit": "0123456789", "versions": {"torch": "2.x"}, "device": "a CPU"}
        | {"samples": [["One", text]]}
        for line, text in zip(lines_of_a_grid(), (f" text {i} | of it" for i in range(100)))
    ]
    study.write_lines(tmp_path / "sentiment_m.jsonl", lines)
    table = pages.block(ROOT, "sentiment table m")
    assert table.startswith("| method | setting | seeds |")
    assert "| base model |  | 2 | 0.00 | 0.70 ± 0.00 |" in table
    assert "| DPO | beta 1 | 2 | 1.50 ± 6.35 | 0.71 ± 0.00 | - |" in table
    assert table.endswith(
        "52 runs; the best possible curve is known up to a KL of 1.5; commit 0123456; torch 2.x; a CPU."
    )
    samples = pages.block(ROOT, "sentiment samples m")
    assert samples.startswith('Behind "One":')
    number = [(line["method"], line["value"]) for line in lines].index(("DPO", 1))  # the largest reward
    assert f"| DPO | 1 | 1.0 | text {number} \\| of it |" in samples
    with pytest.raises(pages.Unknown, match="has no other"):
        pages.block(ROOT, "sentiment other m")


def test_the_picture_is_drawn_of_lines_alone(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    lines, seen = lines_of_a_grid(), {}

    def draw(axes):
        sentiment.draw(sentiment.points_of(lines, tuple(sentiment.METHODS)), sentiment.curves_of(lines), axes)
        seen.update(limit=axes[0].get_xlim()[1], curve=axes[0].get_lines()[-1].get_xdata()[-1])

    study.draw_figure(tmp_path / "picture.png", draw)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert seen["limit"] == pytest.approx(1.15 * 1.5)
    assert seen["curve"] == pytest.approx(1.5)  # as far as the samples reach, not to the axis' end


def test_a_head_picks_by_its_scores(monkeypatch):
    """Scores that are the rewards: the pick is the best of n, as far away as log-ratios say."""
    rewards = torch.tensor([[0.1, -0.5, 1.0, 0.4] * 4, [0.2, 0.3, -1.0, 2.0] * 4], dtype=torch.float64)
    pairs = [([1], [i]) for i in range(32)]
    monkeypatch.setattr(
        sentiment, "plain_logps", lambda model, *_: torch.full((32,), {"policy": 1.5, "ref": 1.0}[model])
    )
    monkeypatch.setattr(sentiment, "plain_rewards", lambda *_: rewards.flatten().tolist())
    monkeypatch.setattr(sentiment, "is_tiny", lambda _: True)
    picks = sentiment.judge_picks("policy", "ref", None, pairs, rewards, 0)
    assert [pick["n"] for pick in picks] == [2, 4, 16]
    for pick in picks:
        n = pick["n"]
        assert pick["kl"] == pytest.approx(0.5 + math.log(n) - (n - 1) / n)
    draws = itertools.combinations(range(16), 2)
    best_of_two = [[row[list(draw)].max().item() for row in rewards] for draw in draws]
    assert picks[0]["true_reward"] == pytest.approx(torch.tensor(best_of_two).mean().item())
    assert picks[2]["true_reward"] == pytest.approx(1.5)


# -- a run


def test_a_small_run_of_the_grid(preference_data, tmp_path, capsys):
    pytest.importorskip("vaderSentiment", reason="needs the package vaderSentiment")
    sizes = {"train_prompts": 4, "test_prompts": 2, "bank": 64, "new_tokens": 12, "seeds": (0,)}
    places = {"model": str(preference_data / STORIES), "prompts": str(preference_data / TEXTS)}
    args = sentiment.Args(**places, **sizes, runs=str(tmp_path / "rows"), extra="--max-steps 2")
    sentiment.prepare(args)
    assert args.lr == 3e-4  # of a tiny model
    lines = []
    for key in ((sentiment.BASE, 0, 0), ("DPO", 0.1, 0), ("SuperHF", 0.05, 0)):
        args.work = json.dumps(key)
        sentiment.main(args)
        lines.append(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))
    base, dpo, superhf = lines
    assert base["settings"] == dpo["settings"] == superhf["settings"] == sentiment.settings_of(args)
    assert superhf["steps"] == 2  # its four prompts were used, so there was room behind them
    assert (dpo["method"], dpo["value"], dpo["seed"], dpo["steps"]) == ("DPO", 0.1, 0, 2)
    assert dpo["kl"] > 0.01
    assert -2 <= dpo["true_reward"] <= 2
    assert base["rows"]["prompts"] == 4
    assert base["rows"]["pairs"] > 10
    openings, _ = sentiment.split_openings(args, tokenizer := load_tokenizer(args.model))
    assert [opening for opening, _ in base["samples"]] == openings
    model = load_model(args.model, "cpu", tokenizer)
    *_, rewards = sentiment.continuations(model, tokenizer, openings, 64, 12, 10_007)
    assert base["true_reward"] == pytest.approx(rewards.mean().item())
    weights = policies.pick_weights(rewards, 16)
    assert base["best"][1]["true_reward"] == pytest.approx((weights * rewards).sum(1).mean().item())
    assert base["curve"] == sentiment.best_possible(rewards)
    with pytest.raises(InputError, match="--max-length 600: the model's context has 512"):
        sentiment.prepare(sentiment.Args(**places, **sizes | {"new_tokens": 568}, runs=str(tmp_path)))


def test_the_reward_is_the_packages_own():
    pytest.importorskip("vaderSentiment", reason="needs the package vaderSentiment")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    texts = ["The party was great, but the cake was not good at all!", "A LOVELY day :)"]
    expected = [SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in texts]
    assert vader_reward()([""] * 2, texts).tolist() == pytest.approx(expected)
