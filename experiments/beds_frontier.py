"""What results/frontier.jsonl says about claims 10 and 13: as beds_toy.py, with several settings of
each method, so that two methods can be compared at one KL, or each at its best.
"""

import itertools
import math
from pathlib import Path

from experiments import study
from experiments.beds import most_common_bed, source_of
from experiments.effects import Effect, paired

POINTS = 21  # of the KL, at which two curves are compared


def frontier_lines(results: Path) -> list[dict]:
    """The lines of results/frontier.jsonl."""
    return most_common_bed(study.read_lines(results / "frontier.jsonl"), ("asked", "extra"))


def frontier_source(lines: list[dict]) -> str:
    """Where they are from; nothing where there are none."""
    return source_of("frontier.jsonl", lines) if lines else ""


def curves_of(lines: list[dict], method: str) -> dict[int, list[tuple[float, float]]]:
    """{seed: [(root of the KL, true reward), ...]} of a method's settings, by rising KL."""
    curves: dict[int, list[tuple[float, float]]] = {}
    for line in lines:
        if line["method"] == method:
            curves.setdefault(line["seed"], []).append((math.sqrt(max(0.0, line["kl"])), line["true_reward"]))
    return {seed: sorted(points) for seed, points in curves.items()}


def height(points: list[tuple[float, float]], root: float) -> float:
    """A curve's reward at a root of the KL within its reach: straight lines between its points."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= root <= right:
            return low if right == left else low + (high - low) * (root - left) / (right - left)
    raise ValueError(f"{root} is beyond the curve's {points[0][0]} to {points[-1][0]}")


def at_equal_kl(what: str, lines: list[dict], ours: str, others: str) -> Effect:
    """The difference of two methods' true rewards at the same KL: of each seed the mean over the KL
    that both curves reach, evenly over its root. A seed whose curves have no KL in common is left
    out.
    """
    sides, other_sides = curves_of(lines, ours), curves_of(lines, others)
    means: tuple[dict, dict] = ({}, {})
    for seed in sides.keys() & other_sides.keys():
        curves = sides[seed], other_sides[seed]
        low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
        if low < high:
            roots = [low + (high - low) * i / (POINTS - 1) for i in range(POINTS - 1)] + [high]
            for mean, curve in zip(means, curves):
                mean[seed] = sum(height(curve, root) for root in roots) / POINTS
    return paired(what, *means)


def best_value(lines: list[dict], method: str) -> float | None:
    """The setting whose runs reach the largest mean true reward."""
    rewards: dict[float, list[float]] = {}
    for line in lines:
        if line["method"] == method:
            rewards.setdefault(line["value"], []).append(line["true_reward"])
    return max(rewards, key=lambda value: sum(rewards[value]) / len(rewards[value])) if rewards else None
