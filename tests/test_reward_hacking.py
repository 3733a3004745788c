"""experiments/reward_hacking.py: its grid, its judgement, and a small run that goes on where it
stopped.
"""

import json

import pytest

from experiments import reward_hacking
from tests.runs import start_process
from toy import world


def test_every_run_is_in_the_grid_once():
    grid = reward_hacking.grid_of(reward_hacking.Args())
    assert len(grid) == len(set(grid)) == 3 * (3 + 6 + 4 + 3)  # 16 completions at kl .35 are in both lists
    assert {seed for *_, seed in grid} == {0, 1, 2}


def test_answers_are_judged_by_both_rewards():
    rows = world.questions()[:2]
    long = "well , let me think about that for a while : it is {} ."
    metrics = reward_hacking.judge_answers(rows, [[long.format(row["right"])] for row in rows], 0)
    assert metrics["proxy_reward"] == pytest.approx(1.7)
    assert metrics["true_reward"] == pytest.approx(0.3)
    assert (metrics["right_share"], metrics["length"], metrics["duplicate_share"]) == (1.0, 15.0, 0.0)
    if metrics["meteor_similarity"] is not None:  # 14 of 15 words are the same
        assert metrics["meteor_similarity"] > 0.8


@pytest.mark.study
def test_a_small_grid_goes_on_where_it_stopped(tmp_path, toy_base):
    words = [
        "-m",
        "experiments.reward_hacking",
        "--seeds",
        "0",
        "--kls",
        "0.35",
        "--ppo-kls",
        "0.2",
        "--completions",
        "2",
        "--answers",
        "2",
        "--n",
        "2",
    ]
    words += ["--jobs", "2", "--extra=--max-steps 1", "--output-dir", str(tmp_path)]
    first = start_process(words, timeout=200)
    assert first.returncode == 0, first.stderr
    lines = [json.loads(line) for line in (tmp_path / "reward_hacking.jsonl").read_text().splitlines()]
    assert {line["method"] for line in lines} == set(reward_hacking.METHODS)
    assert len(lines) == 5, first.stdout
    base = next(line for line in lines if line["method"] == "base")
    best = next(line for line in lines if line["method"] == "best of n")
    assert base["kl"] == pytest.approx(0, abs=1e-6)
    assert best["proxy_reward"] > base["proxy_reward"]
    kept = lines[:-1]
    (tmp_path / "reward_hacking.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    again = start_process(words, timeout=200)
    assert again.returncode == 0, again.stderr
    after = [json.loads(line) for line in (tmp_path / "reward_hacking.jsonl").read_text().splitlines()]
    assert after[:-1] == kept
    timed = {"seconds", "time_shares"}
    assert {k: v for k, v in after[-1].items() if k not in timed} == {
        k: v for k, v in lines[-1].items() if k not in timed
    }
