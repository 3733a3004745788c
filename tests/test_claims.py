"""The papers' claims: intervals against closed forms, each rule of a verdict, the page and its
commands, and result files made by hand that move a verdict.
"""

import dataclasses
import importlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from common import InputError
from experiments import beds, beds_frontier, beds_toy, claims, dph_choices, equivalence
from experiments.claim_table import CLAIMS
from experiments.effects import (
    FAILS,
    HOLDS,
    NOT_RUN,
    UNDECIDED,
    Effect,
    Finding,
    Goal,
    beside,
    exact,
    in_words,
    paired,
    paired_interval,
    t_quantile,
    unpaired_interval,
)
from tests.house import ROOT
from tests.runs import lines_file

RESULTS = ROOT / "results"


def copied_results(tmp_path: Path) -> Path:
    """A folder with this repository's result files."""
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder, ignore=shutil.ignore_patterns("*.png"))
    return folder


# -- intervals


@pytest.mark.parametrize(
    ("degrees", "level", "expected"),
    [
        (1, 0.95, math.tan(0.475 * math.pi)),  # Cauchy's quantile
        (2, 0.95, 0.95 * math.sqrt(2 / (1 - 0.95**2))),
        (2, 0.5, 0.5 * math.sqrt(2 / (1 - 0.5**2))),
        (4, 0.95, 2.7764451),  # this and below: published tables
        (9, 0.95, 2.2621572),
        (30, 0.99, 2.7499957),
        (1e5, 0.95, 1.9599876),
    ],
)
def test_quantiles_of_students_t(degrees, level, expected):
    assert t_quantile(degrees, level) == pytest.approx(expected, rel=1e-5)


def test_quantiles_between_whole_degrees_lie_between_theirs():
    assert t_quantile(3) > t_quantile(3.5) > t_quantile(4)
    assert t_quantile(3.5) == pytest.approx(2.9400886, rel=1e-6)


def test_the_paired_interval_in_closed_form():
    mean, half = paired_interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)))
    assert paired_interval([5.0]) == (5.0, None)


def test_the_unpaired_interval_of_equal_sides_has_all_degrees_of_both():
    _, half = unpaired_interval((1.0, 0.3, 5), (0.0, 0.3, 5))
    assert half == pytest.approx(t_quantile(8) * 0.3 * math.sqrt(2 / 5))
    lone = unpaired_interval((1.0, 0.3, 5), (0.0, 0.0, 3))  # of a side without spread the other's remain
    assert lone == pytest.approx((1.0, t_quantile(4) * 0.3 / math.sqrt(5)))
    assert unpaired_interval((1.0, 0.0, 3), (0.5, 0.0, 3)) == (0.5, 0.0)


def test_intervals_hold_the_truth_as_often_as_they_say():
    draws = 1 + torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [paired_interval(row) for row in draws.tolist()]
    assert sum(abs(mean - 1) < half for mean, half in found) / len(found) == pytest.approx(0.95, abs=0.012)


def test_pairs_are_of_the_seeds_that_both_sides_have():
    effect = paired("x", {0: 3.0, 1: 4.0, 2: 6.0, 7: 9.0}, {2: 1.0, 1: 1.0, 0: 2.0, 8: 0.0})
    assert effect.values == {"seed 0": 1.0, "seed 1": 3.0, "seed 2": 5.0}
    assert (effect.mean, effect.runs) == (3.0, 3)
    logs = paired("x", {0: math.e**2}, {0: math.e}, scale=math.log)
    assert logs.values["seed 0"] == pytest.approx(1.0)


# -- rules


@pytest.mark.parametrize(
    ("goal", "low", "high", "verdict"),
    [
        (Goal(above=0.0), 0.1, 0.5, HOLDS),
        (Goal(above=0.0), -0.1, 0.5, UNDECIDED),
        (Goal(above=0.0), 0.0, 0.5, UNDECIDED),
        (Goal(above=0.0), -0.5, -0.1, FAILS),
        (Goal(above=-0.2), -0.1, 0.1, HOLDS),  # not worse by more than a margin
        (Goal(above=-0.2), -0.3, 0.1, UNDECIDED),
        (Goal(above=-0.2), -0.5, -0.3, FAILS),
        (Goal(within=0.2), -0.1, 0.1, HOLDS),
        (Goal(within=0.2), -0.1, 0.3, UNDECIDED),
        (Goal(within=0.2), 0.3, 0.4, FAILS),
        (Goal(within=0.2), -0.4, -0.3, FAILS),
    ],
)
def test_an_interval_has_the_verdict_of_its_goal(goal, low, high, verdict):
    middle, half = (low + high) / 2, (high - low) / 2
    assert Effect("x", goal, middle, half, runs=3).verdict == verdict
    assert Effect("x", goal, middle, half, runs=2).verdict == UNDECIDED  # too few seeds
    assert Effect("x", goal, middle, None, runs=3).verdict == UNDECIDED
    assert Effect("x", goal).verdict == NOT_RUN


def effect_of(verdict: str) -> Effect:
    """An effect with this verdict."""
    if verdict == NOT_RUN:
        return Effect("x")
    mean, half = {HOLDS: (1.0, 0.5), FAILS: (-1.0, 0.5), UNDECIDED: (0.0, 0.5)}[verdict]
    return Effect("x", mean=mean, half=half, runs=3)


@pytest.mark.parametrize(
    ("of_effects", "verdict"),
    [
        ((HOLDS, HOLDS), HOLDS),
        ((HOLDS, FAILS), FAILS),
        ((UNDECIDED, FAILS), FAILS),
        ((HOLDS, UNDECIDED), UNDECIDED),
        ((HOLDS, NOT_RUN), UNDECIDED),
        ((NOT_RUN, NOT_RUN), NOT_RUN),
    ],
)
def test_a_claim_has_the_verdict_of_all_that_decides_it(of_effects, verdict):
    effects = [effect_of(each) for each in of_effects]
    assert Finding(effects).verdict == verdict
    assert Finding([*effects, beside(effect_of(FAILS))]).verdict == verdict
    expected = NOT_RUN if verdict == NOT_RUN else UNDECIDED
    assert Finding(effects, unfit="the bed cannot show it").verdict == expected


def test_an_exact_effect_is_an_interval_of_no_width():
    assert exact("x", 1e-15, Goal(within=1e-12)).verdict == HOLDS
    assert exact("x", 1e-3, Goal(within=1e-12)).verdict == FAILS
    assert in_words(exact("x", 7e-15, Goal(within=1e-12))) == "x: 7e-15; within ± 1e-12: holds"


def test_effects_in_words():
    effect = Effect("ours - theirs", Goal(above=-0.1), -0.18, 0.4, 3, "3 seeds")
    assert in_words(effect) == "ours - theirs: -0.180 [-0.580, +0.220], 3 seeds; above -0.1: undecided"
    assert in_words(beside(effect)) == "ours - theirs: -0.180 [-0.580, +0.220], 3 seeds"
    assert in_words(Effect("x")) == "x: not run"


# -- the claims of this repository


def test_every_claim_is_there_once():
    assert list(CLAIMS) == list(range(1, 22))
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == list(CLAIMS)
    assert len({claim.finding for claim in CLAIMS.values()}) == len(CLAIMS)


@pytest.mark.parametrize("number", CLAIMS)
def test_commands_name_programs_and_flags_that_exist(number):
    programs = re.split(r"&&|;", CLAIMS[number].command)
    programs = [words for part in programs if "python" in (words := part.split())]
    assert programs
    for words in programs:
        words = words[words.index("python") + 1 :]
        module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        module = {"common.evaluate": "judging.command"}.get(module, module)  # its command line
        fields = {field.name.replace("_", "-") for field in dataclasses.fields(importlib.import_module(module).Args)}
        flags = [word.removeprefix("--") for word in words if word.startswith("--")]
        assert {flag.removeprefix("no-") if flag not in fields else flag for flag in flags} <= fields


@pytest.mark.parametrize("number", CLAIMS)
def test_a_claim_names_result_files_that_exist_or_was_not_run(number):
    finding = CLAIMS[number].finding(RESULTS)
    files = re.findall(r"`(results/[^`]+)`", finding.source)
    assert all((ROOT / file).is_file() for file in files)
    assert files or finding.verdict == NOT_RUN
    for effect in finding.effects:
        assert effect.mean is None or math.isfinite(effect.mean)


@pytest.mark.parametrize("number", CLAIMS)
def test_sentences_are_written_for_the_verdict_and_hold_no_measured_number(number):
    claim = CLAIMS[number]
    assert claim.finding(RESULTS).verdict in claim.because
    for sentence in claim.because.values():
        assert sentence.endswith(".")
        assert not re.search(r"\d*\.\d|%", sentence)


def test_without_result_files_nothing_was_run(tmp_path):
    for number, claim in CLAIMS.items():
        finding = claim.finding(tmp_path)
        assert (number, finding.verdict, finding.source) == (number, NOT_RUN, "")
        assert all(effect.mean is None for effect in finding.effects)


def test_a_file_of_before_the_frozen_worlds_says_so():
    assert "base models from before" in CLAIMS[13].finding(RESULTS).source
    line = {"git_commit": "0" * 40, "versions": {"torch": "2.14", "transformers": "5.24"}}
    source = beds.source_of("x.jsonl", [line, line | {"git_commit": "1" * 40}])
    assert source == "`results/x.jsonl`, commit 0000000, 1111111, torch 2.14, transformers 5.24"


# -- result files made by hand


def hacking_file(folder: Path, gain: float) -> None:
    """Three seeds of SuperHF and PPO, best at coefficients of their own, SuperHF by `gain`."""
    lines = []
    for seed in range(3):
        for method, best, n, at in (("SuperHF", 2.0 + gain + 0.01 * seed, 16, 0.0), ("PPO", 2.0, 1, 0.35)):
            for coefficient in (0.0, 0.35):
                reward = best if coefficient == at else best - 1.0
                line = {"method": method, "coefficient": coefficient, "n": n, "seed": seed, "answers": 20, "extra": ""}
                lines.append(line | {"proxy_reward": reward + 0.1 * seed, "true_reward": 0.0, "meteor_similarity": 0.5})
    other = {"method": "PPO", "coefficient": 0.0, "n": 1, "seed": 0, "answers": 2, "extra": "", "proxy_reward": 9.0}
    lines_file(folder, [*lines, other], "reward_hacking.jsonl")


def frontier_file(folder: Path, points: dict[str, list[tuple[float, float, float]]]) -> None:
    """Three seeds of methods with settings (value, KL, true reward), a tenth apart."""
    lines = []
    for seed in range(3):
        for method, settings in points.items():
            for value, kl, reward in settings:
                line = {"method": method, "value": value, "seed": seed, "asked": 20, "extra": ""}
                lines.append(line | {"kl": kl, "true_reward": reward + 0.1 * seed})
    lines_file(folder, lines, "frontier.jsonl")


@pytest.mark.parametrize(("gain", "verdict"), [(0.5, HOLDS), (-0.05, HOLDS), (-0.5, FAILS)])
def test_superhf_is_compared_at_the_best_of_each(tmp_path, gain, verdict):
    hacking_file(tmp_path, gain)
    finding = CLAIMS[13].finding(tmp_path)
    assert finding.verdict == (FAILS if verdict == FAILS else UNDECIDED)  # one of two beds was not run
    assert finding.effects[1].mean == pytest.approx(gain + 0.01)  # runs with other answers do not count
    ours, others = [(0.05, 2.0, 1.0 + gain), (1.0, 0.5, 0.2)], [(0.1, 3.0, 0.9), (0.3, 1.0, 1.0), (1.0, 0.5, 0.4)]
    frontier_file(tmp_path, {"SuperHF": ours, "PPO": others})
    finding = CLAIMS[13].finding(tmp_path)
    assert finding.verdict == verdict
    assert finding.effects[0].mean == pytest.approx(gain)
    assert finding.effects[0].what.endswith("SuperHF at 0.05 - PPO at 0.3")


def test_two_methods_at_the_kl_that_both_reach(tmp_path):
    """Straight lines over the root of the KL: .5 r + .1 from 1 to 3, and .2 r from 0 to 2; between
    1 and 2 the mean difference is that in the middle.
    """
    ours = [(value, r**2, 0.5 * r + 0.1) for value, r in ((0.1, 3.0), (0.3, 1.5), (1.0, 1.0))]
    frontier_file(tmp_path, {"point-wise DPO": ours, "DPO": [(0.1, 4.0, 0.4), (1.0, 0.0, 0.0), (0.3, 1.0, 0.2)]})
    (effect,) = CLAIMS[10].finding(tmp_path).effects
    assert effect.mean == pytest.approx(0.3 * 1.5 + 0.1)
    assert (effect.half, effect.over) == (pytest.approx(0, abs=1e-9), "3 seeds")
    frontier_file(tmp_path, {"point-wise DPO": ours, "DPO": [(0.1, 0.5, 0.4), (1.0, 0.0, 0.0)]})
    (effect,) = CLAIMS[10].finding(tmp_path).effects
    assert effect.mean is None  # no KL in common


def test_a_curve_is_read_between_its_points_only():
    points = [(0.0, 1.0), (1.0, 3.0), (1.0, 5.0), (2.0, 4.0)]
    assert [beds_frontier.height(points, root) for root in (0.0, 0.25, 1.5, 2.0)] == [1.0, 1.5, 4.5, 4.0]
    with pytest.raises(ValueError, match="beyond the curve"):
        beds_frontier.height(points, 2.1)


def test_a_new_file_moves_verdict_and_page(tmp_path):
    folder = copied_results(tmp_path)
    hacking_file(folder, 0.5)
    frontier_file(folder, {"SuperHF": [(0.05, 2.0, 1.5)], "PPO": [(0.1, 3.0, 1.7)]})
    assert "| **fails** |" in claims.block(folder, "table", "13", "13")
    frontier_file(folder, {"SuperHF": [(0.05, 2.0, 1.5)], "PPO": [(0.1, 3.0, 0.9)]})
    row = claims.block(folder, "table", "13", "13")
    assert "| **holds** |" in row
    assert "+0.510 [+0.485, +0.535], 3 seeds" in row
    holds = claims.block(folder, "verdicts").splitlines()[0]
    assert "13" in holds.split(": ")[1].split(", ")


def choices_file(folder: Path, head: int, seeds: int = 3, lm_after: int = 50) -> None:
    """Runs on 100 questions of two tasks and one other. On those tasks the LM before finds 50,
    SFT's and DPO's 60 and DPH's head `head`; on the other one all LMs after find `lm_after`."""
    bed = {"model": "m", "tasks": ["a", "b"], "others": ["c"], **dict.fromkeys(dph_choices.BED[2:], 0)}
    facts = {"git_commit": "c" * 40, "versions": {"torch": "2", "transformers": "5"}}

    def answers(method: str, lr: float, seed: int, rights: dict[str, int], other: int = lm_after) -> dict:
        right = {
            task: {
                name: dph_choices.pack([i < (other if task == "c" else count) for i in range(100)])
                for name, count in rights.items()
            }
            for task in ("a", "b", "c")
        }
        shares = {
            task: {name: dph_choices.unpack(bits).mean().item() for name, bits in each.items()}
            for task, each in right.items()
        }
        line = {"stage": "answers", "method": method, "lr": lr, "seed": seed, "accuracy": shares, "right": right}
        return bed | facts | line | {"perplexity": 20.0 + 0.01 * seed}

    lines = [answers("base", 0.0, 0, {"acc_token": 50}, 50)]
    rights = {"sft": {"acc_token": 60}, "dpo": {"acc_token": 60, "acc_implicit": 70}}
    rights["dph separable"] = {"acc_token": 60, "acc_head": head}
    for method, found in rights.items():
        for lr, share in ((1e-5, 0.5), (3e-5, 0.6)):
            tuning = {"stage": "tuning", "method": method, "lr": lr, "seed": 0, "share": share}
            lines.append(bed | facts | tuning)
        lines += [answers(method, 3e-5, seed, found) for seed in range(seeds)]
        lines.append(answers(method, 1e-5, 0, dict.fromkeys(found, 1)))  # at a rate that was not chosen
    lines.append(answers("dph separable", 3e-5, 0, {"acc_token": 9, "acc_head": 9}) | {"model": "another"})
    lines_file(folder, lines, "dph_choices.jsonl")


@pytest.mark.parametrize(
    ("head", "seeds", "first", "second"),
    [(80, 3, HOLDS, HOLDS), (40, 3, FAILS, FAILS), (60, 3, UNDECIDED, UNDECIDED), (80, 2, UNDECIDED, UNDECIDED)],
)
def test_the_head_is_compared_over_the_same_questions(tmp_path, head, seeds, first, second):
    choices_file(tmp_path, head, seeds)
    finding = CLAIMS[1].finding(tmp_path)
    assert (finding.verdict, CLAIMS[2].finding(tmp_path).verdict) == (first, second)
    effect = finding.effects[0]
    assert effect.mean == pytest.approx((head - 60) / 100)
    share = abs(head - 60) / 100  # of the questions, all on one side
    assert effect.half == pytest.approx(1.96 * math.sqrt(2 * share * (1 - share) / 99) / 2)
    assert effect.over == f"200 questions, {seeds} seeds"
    assert list(effect.values.values()) == pytest.approx([(head - 60) / 100] * seeds)


@pytest.mark.parametrize(("lm_after", "verdict"), [(50, HOLDS), (30, FAILS)])
def test_an_lm_is_unharmed_on_tasks_that_were_not_trained_on(tmp_path, lm_after, verdict):
    choices_file(tmp_path, 80, lm_after=lm_after)
    finding = CLAIMS[3].finding(tmp_path)
    assert finding.verdict == verdict
    assert finding.effects[0].mean == pytest.approx((lm_after - 50) / 100)
    assert list(finding.effects[0].values.values()) == pytest.approx([(lm_after - 50) / 100] * 3)
    assert finding.effects[1].mean == pytest.approx(-sum(math.log(1 + 0.0005 * seed) for seed in range(3)) / 3)


def test_a_text_that_has_become_unlikelier_harms_the_lm(tmp_path):
    choices_file(tmp_path, 80)
    path = tmp_path / "dph_choices.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line | ({"perplexity": 30.0} if line["method"] == "dph separable" else {}) for line in lines]
    lines_file(tmp_path, lines, "dph_choices.jsonl")
    assert CLAIMS[3].finding(tmp_path).verdict == FAILS


def chat_file(folder: Path, typo: float, files: tuple[str, ...] = ("hh_harmless", "hh_helpful")) -> None:
    """Three seeds of DPO, which wins half, and TYPO, which wins `typo`, at the rate with the best
    held-out accuracy; at the other one both always win."""
    lines = []
    for name in files:
        for method, rate in (("dpo", 0.5), ("typo", typo)):
            for seed in range(3):
                for lr, accuracy, wins in ((1e-5, 0.6, 1.0), (1e-4, 0.7, rate + 0.01 * seed)):
                    line = {"model": "m", "part": "pairs", "rows": 300, "data": name, "method": method, "lr": lr}
                    line |= {"seed": seed, "after": {"reward_accuracy": accuracy}, "win_rate_equal_length": wins}
                    lines.append(line | {"git_commit": "c" * 40, "versions": None})
    lines_file(folder, lines, "chat_model.jsonl")


@pytest.mark.parametrize(("typo", "verdict"), [(0.6, HOLDS), (0.48, HOLDS), (0.3, FAILS)])
def test_typo_is_competitive_within_a_margin(tmp_path, typo, verdict):
    chat_file(tmp_path, typo)
    finding = CLAIMS[9].finding(tmp_path)
    assert finding.verdict == verdict
    assert finding.effects[0].mean == pytest.approx(typo - 0.5)
    assert finding.effects[0].over == "6 runs of 3 seeds"
    chat_file(tmp_path, typo, files=("polite_instructions",))
    assert CLAIMS[9].finding(tmp_path).verdict == NOT_RUN  # other rows do not decide it
    assert CLAIMS[9].finding(tmp_path).effects[2].mean == pytest.approx(typo - 0.5)


def toy_file(folder: Path, name: str, **rewards: list[float]) -> None:
    """A file as experiments.collect writes it: the same values for three metrics of a script,
    behind runs at another beta."""
    entries = []
    for script, values in rewards.items():
        mean, std = sum(values) / len(values), 0.1
        after = {metric: [mean, std, values] for metric in ("frontier_efficiency", "true_reward", "kl")}
        command = f"python {script}.py --lr 0.001 --dtype float32 --kl-samples 400"
        entry = {"command": command, "seeds": list(range(len(values))), "after": after}
        entry |= {"git_commit": "c" * 40, "versions": {"torch": "2", "transformers": "5"}}
        another = {
            "command": f"{command} --beta 9.0",
            "after": {name: [7.0, std, [7.0] * len(values)] for name in after},
        }
        entries += [entry | another, entry]
    (folder / name).write_text(json.dumps(entries))


def test_toy_runs_are_paired_where_their_values_are_kept(tmp_path):
    values = {"ulma": [0.9, 0.8, 0.7], "pointwise_dpo": [0.6, 0.5, 0.41], "sft": [0.5, 0.41, 0.3]}
    toy_file(tmp_path, "toy_labelled.json", **values)
    old = json.loads((tmp_path / "toy_labelled.json").read_text())
    for entry in old:  # as files were before
        entry["after"] = {metric: cell[:2] for metric, cell in entry["after"].items()}
    (tmp_path / "toy_labelled.json").write_text(json.dumps(old))
    assert "unpaired" in CLAIMS[11].finding(tmp_path).effects[0].over
    toy_file(tmp_path, "toy_claim11.json", **values)
    finding = CLAIMS[11].finding(tmp_path)
    assert finding.verdict == HOLDS
    assert finding.effects[0].values == pytest.approx({"seed 0": 0.3, "seed 1": 0.3, "seed 2": 0.29})
    assert "toy_claim11.json" in finding.source
    assert "toy_labelled.json" not in finding.source  # never two base models


def test_toy_runs_of_one_file_are_preferred_to_more_seeds_of_fewer(tmp_path):
    toy_file(tmp_path, "toy_a.json", ulma=[0.9] * 5)
    toy_file(tmp_path, "toy_b.json", ulma=[0.9] * 3, pointwise_dpo=[0.5, 0.4, 0.3], sft=[0.5, 0.4, 0.3])
    assert CLAIMS[11].finding(tmp_path).effects[0].over == "3 seeds"


def test_flags_that_are_the_toys_defaults_do_not_tell_runs_apart():
    command = "python pointwise_dpo.py --lr 0.001 --learn-partition --labels continuous --kl-samples 400 --beta 0.05"
    assert beds_toy.flags_in(command) == {"learn-partition": "", "labels": "continuous", "beta": "0.05"}
    assert beds_toy.flags_in("python dpo.py --lr 0.003 --data toy:hard") == {"lr": "0.003", "data": "toy:hard"}


def pareto_file(folder: Path, **more: float) -> None:
    """Three seeds of MLE and conditional training, from the start and late, with a red team."""
    lines = []
    for seed in range(3):
        for kind, method, bad in (
            ("pretraining", "MLE", 0.2),
            ("pretraining", "conditional", 0.001),
            ("finetuning", "conditional", 0.1),
        ):
            line = {"task": "toy", "kind": kind, "method": method, "seed": seed, "misalignment": bad + 0.001 * seed}
            line |= {"kl_to_teacher": 1.0, "perplexity_good": 2.0, "git_commit": "c" * 40, "versions": None}
            lines.append(line | {name: value * bad for name, value in more.items()})
    lines_file(folder, lines, "pareto_toy.jsonl")


def test_the_red_team_is_half_of_the_claim(tmp_path):
    pareto_file(tmp_path)
    assert [effect.verdict for effect in CLAIMS[18].finding(tmp_path).effects] == [HOLDS, NOT_RUN]
    assert CLAIMS[18].finding(tmp_path).verdict == UNDECIDED
    pareto_file(tmp_path, red_team_mean=2.0)
    assert CLAIMS[18].finding(tmp_path).verdict == HOLDS
    assert CLAIMS[20].finding(tmp_path).verdict == HOLDS  # late feedback leaves more bad samples


def test_rivals_of_conditional_training_are_compared_at_their_cheapest_setting(tmp_path):
    """A setting counts with a tenth of MLE's misalignment only, and of those that do the one with
    the least KL in each seed.
    """
    runs = {  # KL and misalignment, by seed
        "MLE": ([1.0, 1.0, 1.0], [0.2, 0.2, 0.2]),
        "conditional": ([5.0, 5.0, 5.0], [0.0, 0.0, 0.0]),
        "conditional, d .3": ([2.0, 3.0, 2.5], [0.0, 0.02, 0.03]),  # the third is above a tenth
        "conditional, asked for bad": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        "RWR": ([9.0, 9.1, 9.2], [0.01, 0.01, 0.01]),
        "RWR, beta 10": ([1.0, 1.0, 1.0], [0.19, 0.19, 0.19]),
        "AWR": ([4.0, 4.0, 4.0], [0.0, 0.0, 0.1]),  # none left in the third
    }
    lines = [
        {"kind": "pretraining", "method": method, "seed": seed, "kl_to_teacher": kl, "misalignment": bad}
        for method, sides in runs.items()
        for seed, (kl, bad) in enumerate(zip(*sides))
    ]
    lines_file(tmp_path, [line | {"git_commit": "c" * 40, "versions": None} for line in lines], "pareto_toy.jsonl")
    awr, rwr, *_ = CLAIMS[17].finding(tmp_path).effects
    assert list(awr.values.values()) == pytest.approx([2.0, 1.0])
    assert list(rwr.values.values()) == pytest.approx([7.0, 6.1, 4.2])
    assert (awr.verdict, rwr.verdict) == (UNDECIDED, HOLDS)
    assert CLAIMS[17].finding(tmp_path).unfit == "settings tried: conditional 2, AWR 1, RWR 2"


# -- the command line, and contrastive DPH against cDPO


def test_the_command_prints_all_claims_or_all_of_one(capsys):
    claims.main(claims.Args())
    lines = capsys.readouterr().out.splitlines()
    assert [int(found[1]) for line in lines if (found := re.match(r"(\d+)\. ", line))] == list(CLAIMS)
    claims.main(claims.Args(claim=13))
    printed = capsys.readouterr().out
    assert "13. SuperHF reaches PPO's training reward: undecided" in printed
    assert re.search(r"seed 2: -0\.\d{3}\n", printed)
    claims.main(claims.Args(claim=7))
    assert "and 80 more" in capsys.readouterr().out


def test_what_the_command_refuses(tmp_path):
    with pytest.raises(InputError, match=r"--claim 22: expected 1 to 21\."):
        claims.main(claims.Args(claim=22))
    with pytest.raises(InputError, match="there is no such folder"):
        claims.main(claims.Args(results=str(tmp_path / "gone")))
    for words in (("table", "0", "4"), ("table", "x", "4"), ("table",), ("verdicts", "1"), ("else",)):
        with pytest.raises(KeyError):
            claims.block(RESULTS, *words)


def test_contrastive_dph_is_cdpo_and_another_loss_is_not(tmp_path, monkeypatch):
    equivalence.main(equivalence.Args(output_dir=str(tmp_path), pairs=200))
    finding = CLAIMS[4].finding(tmp_path)
    assert finding.verdict == HOLDS
    plain = equivalence.cdpo_loss
    monkeypatch.setattr(equivalence, "cdpo_loss", lambda *given: plain(*given[:-1], 0.9 * given[-1]))
    equivalence.main(equivalence.Args(output_dir=str(tmp_path), pairs=200))
    finding = CLAIMS[4].finding(tmp_path)
    assert [effect.verdict for effect in finding.effects] == [FAILS, FAILS]
