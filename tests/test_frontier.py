"""experiments/frontier.py: intervals over seeds, picks of n and their KL, the grid, the tables that
pages show of its results, and the picture.
"""

import importlib
import itertools
import json
import math

import pytest
import torch

from common import InputError
from experiments import frontier, frontier_pages, policies, study
from tests import pages
from tests.house import ROOT
from tests.runs import start_process
from toy import world

# -- intervals


def test_quantiles_of_students_t_in_closed_form():
    assert study.t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), abs=1e-9)
    assert study.t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), abs=1e-9)
    sine = study.t_quantile(4) / math.sqrt(4 + study.t_quantile(4) ** 2)
    assert sine * (1 + (1 - sine**2) / 2) == pytest.approx(0.95, abs=1e-12)
    assert [round(study.t_quantile(df), 3) for df in (3, 4, 9, 30)] == [3.182, 2.776, 2.262, 2.042]  # of any table


def test_an_interval_is_of_the_mean_over_seeds():
    mean, half = study.mean_and_interval([1.0, None, 2.0, 3.0])
    assert (mean, half) == (2, pytest.approx(study.t_quantile(2) / math.sqrt(3)))
    assert study.mean_and_interval([1.0, None]) == (1, None)
    assert study.mean_and_interval([None]) == (None, None)
    cells = [study.interval_cell(values) for values in ([1, 2, 3], [1], [None])]
    assert cells == ["2.00 ± 2.48", "1.00", "-"]


# -- picks of n


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_weights_of_a_pick_are_those_of_all_draws(n):
    scores = torch.tensor([[0.3, 2.0, 0.3, -1.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    expected = torch.zeros(2, 5, dtype=torch.float64)
    draws = list(itertools.combinations(range(5), n))
    for question, values in enumerate(scores.tolist()):
        for draw in draws:
            best = [i for i in draw if values[i] == max(values[j] for j in draw)]
            expected[question, best] += 1 / len(best) / len(draws)
    torch.testing.assert_close(policies.pick_weights(scores, n), expected)


@pytest.mark.parametrize("n", [0, 6])
def test_no_pick_is_taken_among_too_few(n):
    with pytest.raises(ValueError, match=f"the best of {n} cannot be taken among 5 answers"):
        policies.pick_weights(torch.zeros(1, 5), n)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_what_picking_adds_to_the_kl_is_at_most_the_bound(n):
    assert policies.kl_of_best(1) == 0
    m = 4000
    for levels in (m, 3):  # all scores differ; three scores
        weights = policies.pick_weights((torch.arange(m) % levels)[None], n)
        kl = (weights * (m * weights).clamp(min=1e-300).log()).sum().item()
        if levels == m:
            assert kl == pytest.approx(policies.kl_of_best(n), rel=5e-3)
        else:
            assert 0 < kl < min(policies.kl_of_best(n), math.log(3) + 1e-9)


def test_the_best_of_the_base_models_answers_lies_under_the_best_possible_curve():
    one, *others = (policies.judge_best_of_base(0, n) for n in (1, 2, 4, 16))
    rewards = policies.question_rewards(policies.reference_answers(0))
    assert one["kl"] == pytest.approx(0, abs=1e-12)
    assert one["true_reward"] == pytest.approx(rewards.mean().item())
    assert one["efficiency"] is None
    for n, line in zip((2, 4, 16), others):
        assert 0 < line["kl"] < policies.kl_of_best(n)
        assert 0.9 < line["efficiency"] < 1 + 1e-6
    assert others[0]["true_reward"] < others[1]["true_reward"] < others[2]["true_reward"]


def test_a_head_picks_among_its_own_lms_answers(toy_base, monkeypatch):
    """The base model with a head that knows the true reward: nothing but the pick moves it."""
    questions = [world.row_of(world.prompt_of(row)) for row in policies.trained_questions()]

    def true_rewards(_model, head, pairs):
        assert head.tolist() == [7]
        return [world.true_reward(questions[i // 16], text) for i, text in enumerate(texts)]

    folder = str(toy_base)
    tokenizer = policies.load_tokenizer(folder)
    policy = policies.load_policy(folder, tokenizer)
    sampled = policies.sample_policy(policy, tokenizer, 0, 16)
    texts = sampled[2]
    monkeypatch.setattr(policies, "sample_policy", lambda *_: sampled)
    monkeypatch.setattr(policies, "load_weights", lambda *_: {"score.weight": torch.tensor([7])})
    monkeypatch.setattr(policies, "plain_rewards", true_rewards)
    one, four = policies.judge_head_picks(folder, 0, 16, (1, 4))
    assert (one["n"], one["kl"]) == (1, pytest.approx(0, abs=1e-9))
    assert (four["n"], four["kl"]) == (4, pytest.approx(math.log(4) - 3 / 4))
    assert four["true_reward"] == pytest.approx(policies.judge_best_of_base(0, 4)["true_reward"], abs=0.06)

    # A policy that makes polite answers twice as likely is log 2 further away where it picks those.
    def twice_as_likely(model, pairs, *_):
        assert len(pairs) == len(texts)
        polite = torch.tensor([any(words in text for words in world.POLITE) for text in texts])
        return polite * (0.0 if model is reference else math.log(2))

    reference = policies.load_policy(folder, tokenizer)
    models = iter([policy, reference])
    monkeypatch.setattr(policies, "load_policy", lambda *_: next(models))
    monkeypatch.setattr(policies, "plain_logps", twice_as_likely)
    (again,) = policies.judge_head_picks(folder, 0, 16, (16,))
    best = []
    for row, group in zip(questions, policies.by_question(texts, 16)):
        rewards = [world.true_reward(row, text) for text in group]
        tops = [text for text, reward in zip(group, rewards) if reward == max(rewards)]
        best.append(sum(world.judge(row, text)["polite"] for text in tops) / len(tops))
    assert sum(best) / len(best) > 0.8  # of all answers .3 are polite
    assert again["kl"] == pytest.approx(policies.kl_of_best(16) + math.log(2) * sum(best) / len(best))


def test_the_target_of_typo_is_proportional_to_exp_of_the_reward(monkeypatch):
    rows = policies.trained_questions()
    answers = [
        [f"it is {row['right']} .", f"it is {row['right']} , you fool .", f"it is {row['right']} ."] for row in rows
    ]
    monkeypatch.setattr(policies, "reference_answers", lambda _seed: answers)
    monkeypatch.setattr(policies, "plain_logps", lambda _model, pairs, *_: torch.full((len(pairs),), math.log(0.5)))
    line = policies.judge_target(0)
    share = 1 / (1 + math.exp(-1))  # rewards 1 and 0
    assert line["true_reward"] == pytest.approx(share)
    assert line["kl"] == pytest.approx(share * math.log(2 * share) + (1 - share) * math.log(2 * (1 - share)))


def test_the_best_possible_curve_begins_at_the_base_model_and_ends_level():
    rewards = policies.question_rewards(policies.reference_answers(0))
    kls, best = world.frontier(rewards)
    curve = policies.mean_frontier((0, 1), torch.cat([torch.tensor([0.0, 50.0, 60.0]), kls[50:60]]))
    assert curve.shape == (2, 13)
    assert curve[0, 0] == pytest.approx(rewards.mean().item())
    assert curve[0, 1] == curve[0, 2] == pytest.approx(best[-1].item())
    torch.testing.assert_close(curve[0, 3:], best[50:60])


# -- the grid


def test_the_grid_goes_seed_by_seed_and_trains_nothing_twice():
    grid = frontier.grid_of(frontier.Args())
    assert len(grid) == len(set(grid)) == 5 * (10 * 3 + 1)
    assert [seed for *_, seed in grid] == sorted(seed for *_, seed in grid)
    assert "DPH's pick" not in {method for method, *_ in grid}
    alone = frontier.grid_of(frontier.Args(methods=("DPH's pick",), seeds=(3,)))
    assert alone == [("DPH's LM", value, 3) for value in (0.1, 0.3, 1)]


def test_every_method_has_three_values_of_a_field_of_its_script():
    for name, method in frontier.METHODS.items():
        assert len(set(method.values)) == 3
        assert frontier.flags_of(name, 7)[method.knob] == 7
        if method.script:
            args = importlib.import_module(method.script.removesuffix(".py")).Args()
            assert all(hasattr(args, field) for field in (method.knob, *method.flags))
    assert frontier.METHODS["DPH's LM"].values[1] == frontier.HEAD_BETA == importlib.import_module("dph").Args().beta


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"methods": ("DPO", "GRPO")}, "--methods: 'GRPO' is none of SFT, DPO, cDPO"),
        ({"seeds": (0, 1, 0)}, "--seeds: expected different numbers, got 0 1 0"),
        ({"seeds": ()}, "--seeds: expected different numbers, got none"),
        ({"answers": 15}, "--answers 15: expected 16 or more, of which a head picks the best"),
    ],
)
def test_odd_arguments_are_refused_before_any_work(given, words):
    with pytest.raises(InputError, match=words):
        frontier.main(frontier.Args(**given))


def test_the_work_of_a_process_is_one_line():
    words = ["--work", '["best of n", 4, 1]', "--answers", "16", "--extra=--lr 1"]
    process = start_process(["-m", "experiments.frontier", *words])
    assert process.returncode == 0, process.stderr
    line = json.loads(process.stdout.splitlines()[-1])
    assert (line["method"], line["value"], line["seed"], line["asked"]) == ("best of n", 4, 1, 16)
    assert line["extra"] == "--lr 1"
    assert line["kl"] == pytest.approx(policies.judge_best_of_base(1, 4)["kl"])
    assert {"git_commit", "versions", "device"} <= line.keys()


@pytest.mark.study
def test_a_small_grid_goes_on_where_it_stopped(tmp_path, toy_base):
    words = ["experiments/frontier.py", "--seeds", "0", "--methods", "PPO", "DPH's pick", "--answers", "16"]
    words += ["--jobs", "2", "--extra=--max-steps 2", "--output-dir", str(tmp_path)]
    process = start_process(words, timeout=300)
    assert process.returncode == 0, process.stderr
    path = tmp_path / "frontier.jsonl"
    lines = study.read_lines(path)
    assert {line["method"] for line in lines} == {"PPO", "DPH's LM"}, process.stdout
    assert {point["method"] for point in frontier.points_of(lines)} == {"PPO", "DPH's LM", "DPH's pick"}
    assert all(0 < line["kl"] < 5 for line in lines)
    study.write_lines(path, lines[:-1])
    process = start_process(words, timeout=300)
    assert process.returncode == 0, process.stderr
    again = study.read_lines(path)
    assert [line["kl"] for line in again] == [line["kl"] for line in lines]


# -- tables and picture


def line_of(method: str, value: float, seed: int, kl: float = 1.0, reward: float = 0.5) -> dict:
    """A line as a run leaves it; the share is half of the reward."""
    numbers = {"kl": kl, "true_reward": reward, "efficiency": reward / 2, "good_before": 0.1, "good_after": 0.2}
    about = {"git_commit": "0123456789", "versions": {"torch": "2"}, "device": "cpu", "asked": 50, "extra": ""}
    return {"method": method, "value": value, "seed": seed, **numbers, **about}


def lines_of_two_seeds() -> list[dict]:
    """A line for each run of seeds 0 and 1, as if larger values were better, and one of seed 2."""
    lines = []
    for method, value, seed in frontier.grid_of(frontier.Args(seeds=(0, 1))):
        lines.append(line_of(method, value, seed, 1.0 + seed, 0.1 * value - 0.02 * seed))
        if (method, value) == ("DPH's LM", frontier.HEAD_BETA):
            lines[-1]["picks"] = [{"n": n, "kl": 3.0, "true_reward": 1.0, "efficiency": None} for n in (2, 4, 16)]
    return [*lines, line_of("SFT", 1, 2, 100, 100)]


@pytest.fixture
def results(tmp_path, monkeypatch):
    path = tmp_path / "frontier.jsonl"
    study.write_lines(path, lines_of_two_seeds())
    monkeypatch.setattr(frontier_pages, "RESULTS", path)
    return path


def test_tables_are_made_of_whole_seeds(results):
    rows = frontier_pages.block("table").splitlines()
    assert len(rows) == 2 + 11 * 3 + 1
    half = study.t_quantile(1) / 2  # two seeds that are one apart
    assert rows[2] == f"| SFT | epochs 1 | 1.50 ± {half:.2f} | 0.09 ± {half / 50:.2f} | 0.04 ± {half / 100:.2f} |"
    assert "| DPH's pick | n 16 | 3.00 ± 0.00 | 1.00 ± 0.00 | - |" in rows
    assert rows[-1].startswith("| TYPO's target |  | 1.50 ±")
    assert frontier_pages.block("facts").startswith(
        "62 lines, seeds 0, 1, 50 answers a question; commit 0123456; torch 2"
    )


def test_the_best_setting_is_shown_with_its_command(results):
    rows = {row.split(" | ")[0][2:]: row for row in frontier_pages.block("best").splitlines()[2:]}
    assert list(rows) == list(frontier.METHODS)
    for name, words in {
        "SFT": "| `python sft.py --epochs 9` |",
        "TYPO": "| `python typo.py --lam 3` |",
        "DPH's pick": "| `python dph.py --n 2` |",  # all alike: the first
        "SuperHF": "| `python superhf.py --kl 1 --epochs 16` |",
        "best of n": "| no training: 16 answers, the true reward picks |",
    }.items():
        assert rows[name].endswith(words)
    sees = {name: row.split(" | ")[1] for name, row in rows.items()}
    assert {name for name in sees if sees[name] == "reward"} == {"SuperHF", "PPO", "best of n"}


def test_pairs_are_compared_on_what_was_good(results):
    rows = frontier_pages.block("good").splitlines()[2:]
    assert [row.split(" | ")[0][2:] for row in rows[::3]] == list(frontier_pages.LABEL_METHODS)
    assert all(row.endswith("| 0.10 ± 0.00 | 0.20 ± 0.00 |") for row in rows)


def test_a_block_or_a_column_that_is_not_there_is_named(results):
    with pytest.raises(pages.Unknown, match=r"frontier_pages\.py has no worst"):
        pages.block(ROOT, "frontier worst")
    study.write_lines(results, [{"method": "DPO", "value": 1, "seed": 0, "kl": 1.0}])
    with pytest.raises(InputError, match="a line has no 'true_reward'"):
        frontier_pages.block("table")


def test_marks_differ_and_are_hollow_where_the_reward_is_seen():
    marks = [str(frontier.mark_of(name)["marker"]) for name in frontier.METHODS]
    assert len(set(marks)) == len(marks)
    hollow = {name for name in frontier.METHODS if frontier.mark_of(name)["facecolor"] == "white"}
    assert hollow == set(frontier.SEE_REWARD)
    assert frontier.legend_of("TYPO") == "TYPO: lambda 0.03, 0.3, 3"


def test_the_picture_holds_every_setting(tmp_path):
    PathCollection = pytest.importorskip("matplotlib.collections").PathCollection
    seen = []

    def draw(axes):
        frontier.draw(frontier_pages.whole_seeds(frontier.points_of(lines_of_two_seeds())), axes)
        marks = [found for found in axes[0].collections if isinstance(found, PathCollection)]
        seen.extend(len(found.get_offsets()) for found in marks)

    study.draw_figure(tmp_path / "frontier.png", draw)
    assert sum(seen) == 11 * 3 + 1  # and TYPO's target
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
