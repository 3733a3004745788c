"""experiments/partition.py: what each way of handling the partition function ends in, and the toy's
labels.
"""

import json
import math

import pytest
import torch

from experiments import partition
from experiments.tabular import tensor
from toy import world

A, B = (0.644, 0.237, 0.087, 0.032), (0.455, 0.276, 0.167, 0.102)  # the optima, the same for both prompts
TABLE = {
    ("binary", "log Z = 0"): ((0.287, 0.275, 0.247, 0.191), (0.939, 0.041, 0.015, 0.005)),
    ("binary", "one constant"): ((0.315, 0.291, 0.239, 0.155), (0.980, 0.013, 0.005, 0.002)),
    ("binary", "running mean"): ((0.351, 0.308, 0.223, 0.118), (0.989, 0.007, 0.003, 0.001)),
    ("binary", "one value a prompt"): (A, A),
    ("continuous", "log Z = 0"): ((0.269, 0.256, 0.244, 0.231), (0.334, 0.275, 0.220, 0.171)),
    ("continuous", "one constant"): ((0.322, 0.272, 0.225, 0.181), (0.998, 0.001, 0.001, 0.000)),
    ("continuous", "running mean"): ((0.269, 0.256, 0.244, 0.231), (0.335, 0.275, 0.220, 0.171)),
    ("continuous", "one value a prompt"): (B, B),
}
SHIFTS = {
    ("binary", "one constant"): (1.005, 1.005),
    ("continuous", "one constant"): (0.714, 0.714),
    ("binary", "one value a prompt"): (3.05, -1.95),
}


@pytest.mark.parametrize("case", TABLE)
def test_where_each_handling_ends(case):
    policy, shift = partition.tabular(*case)
    torch.testing.assert_close(policy, tensor(TABLE[case]), atol=2e-3, rtol=0)
    if case in SHIFTS:
        assert shift[:, 0].tolist() == pytest.approx(SHIFTS[case], abs=6e-3)


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_one_value_a_prompt_is_exact_and_nothing_else_is(kind):
    policy, shift = partition.optimum(kind)
    ends = {handling: partition.tabular(kind, handling) for handling in partition.HANDLINGS}
    torch.testing.assert_close(ends["one value a prompt"][0], policy, atol=1e-4, rtol=0)
    torch.testing.assert_close(ends["one value a prompt"][1], shift, atol=1e-3, rtol=0)
    for handling in partition.HANDLINGS[:3]:
        assert (ends[handling][0] - policy).abs().max() > 0.05


def test_labels_of_the_toy_follow_reward_and_difficulty(tmp_path, toy_base):
    partition.write_rows(tmp_path / "rows.jsonl", 0)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for d in (-3.0, 0.0, 3.0):
        mine = [row for row in rows if partition.difficulty(row["prompt"]) == d]
        expected = [
            1 / (1 + math.exp(-world.true_reward(world.row_of(row["prompt"]), row["completion"]) - d)) for row in mine
        ]
        assert len(mine) > 1000
        assert sum(row["label"] for row in mine) / len(mine) == pytest.approx(sum(expected) / len(expected), abs=0.04)
