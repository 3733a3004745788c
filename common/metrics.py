"""Metrics of rows, rewards and texts; pure functions. docs/metrics.md explains them."""

import math

import torch


def accuracy(scores: torch.Tensor, ties_say_nothing: bool = False) -> float | None:
    """Share of rows whose chosen answer scores higher than the rejected one; ties count one half.

    Args:
        scores: [rows, 2], chosen and rejected: log-probabilities or rewards. ties_say_nothing: None
            instead of .5 where all rows are ties, as rewards are before the first step.
    """
    if not len(scores):
        return None
    if scores.dim() != 2 or scores.shape[1] != 2:
        raise ValueError(f"expected scores [rows, 2], got {tuple(scores.shape)}")
    if ties_say_nothing and bool((scores[:, 0] == scores[:, 1]).all()):
        return None
    return correctness(scores).mean().item()


def correctness(scores: torch.Tensor) -> torch.Tensor:
    """1 for each row whose chosen answer scores higher, .5 for a tie, else 0: [rows]."""
    chosen, rejected = scores.unbind(1)
    return (chosen > rejected).double() + 0.5 * (chosen == rejected).double()


def pair_accuracies(logps: torch.Tensor, rewards: torch.Tensor) -> dict:
    """Preference and reward accuracy of log-probabilities and rewards, [rows, 2] each."""
    metrics: dict = {}
    for name, scores in (("preference_accuracy", logps), ("reward_accuracy", rewards)):
        value = accuracy(scores, ties_say_nothing=name == "reward_accuracy")
        error = None if value is None else standard_error(correctness(scores))
        metrics |= {name: value, f"{name}_se": error}
    return metrics


def standard_error(values) -> float | None:
    """Standard error of the mean of values, [n]; None for fewer than two."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return (values.std(correction=1) / math.sqrt(len(values))).item() if len(values) > 1 else None


def mean_and_error(name: str, values) -> dict:
    """{NAME: mean, NAME_se: its standard error} of values [n]; None where there are too few."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return {name: values.mean().item() if len(values) else None, f"{name}_se": standard_error(values)}


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Share of the couples of rows with different labels whose scores are ordered as their labels,
    ties counting one half: for binary labels the area under the ROC curve.

    Args:
        scores, labels: [rows].

    Returns:
        None where all labels are the same, or all scores are, as rewards are before the first step.
    """
    if scores.shape != labels.shape or scores.dim() != 1:
        shapes = f"{tuple(scores.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"expected scores and labels of one shape [rows], got {shapes}")
    ordered = couples = 0.0
    for score, label in zip(scores.split(512), labels.split(512)):
        above = label[:, None] > labels[None]  # [some rows, rows]
        couples += above.sum().item()
        order = (score[:, None] > scores[None]).double() + 0.5 * (score[:, None] == scores[None]).double()
        ordered += order[above].sum().item()
    return ordered / couples if couples and bool((scores != scores[0]).any()) else None
