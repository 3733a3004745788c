"""How often one model's answers are better than another's by a reward, with and without the length.

A reward model may prefer whatever is long. The length-controlled rate asks what the rate would be
were both answers of the same length: a logistic fit of the wins on the difference of lengths, read
where that is zero, as length-controlled AlpacaEval does (Dubois et al. 2024, arXiv 2404.04475) with
one model and no term for the prompt.
"""

import math

import torch


def wins_of(rewards: torch.Tensor, other_rewards: torch.Tensor) -> torch.Tensor:
    """1 where the first reward is larger, .5 where they are equal, else 0: [prompts], float64."""
    if rewards.shape != other_rewards.shape or rewards.dim() != 1:
        shapes = f"{tuple(rewards.shape)} and {tuple(other_rewards.shape)}"
        raise ValueError(f"expected rewards of one shape [prompts], got {shapes}")
    return (rewards > other_rewards).double() + 0.5 * (rewards == other_rewards).double()


def length_controlled_rate(wins: torch.Tensor, differences: torch.Tensor) -> tuple[float, float]:
    """(win rate at equal length, its standard error).

    The fit: P(win) = sigma(a + b * tanh(d / s)), d the difference of lengths and s its standard
    deviation, b with a normal prior of mean 0 and deviation 1, by Newton's method. At d = 0 the
    rate is sigma(a); its error is that of a times the slope of sigma. Where all wins are the same
    nothing can be fitted: the plain rate, and an error of 0.

    Args:
        wins: [prompts], 0, .5 or 1. differences: [prompts], length of the first answer minus that
            of the other, in any unit.
    """
    wins, differences = wins.double(), differences.double()
    if wins.shape != differences.shape or wins.dim() != 1 or not len(wins):
        shapes = f"{tuple(wins.shape)} and {tuple(differences.shape)}"
        raise ValueError(f"expected wins and differences of one shape [prompts], got {shapes}")
    rate, scale = wins.mean().item(), differences.std(correction=0).item()
    if rate in {0.0, 1.0}:
        return rate, 0.0
    terms = torch.stack([torch.ones_like(wins), torch.tanh(differences / (scale or 1.0))], 1)  # [prompts, 2]
    weights, prior = torch.zeros(2, dtype=torch.float64), torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))
    for _ in range(100):
        chances = (terms @ weights).sigmoid()
        curvature = terms.T @ (terms * (chances * (1 - chances))[:, None]) + prior  # [2, 2]
        step = torch.linalg.solve(curvature, terms.T @ (wins - chances) - prior @ weights)
        weights = weights + step / max(1.0, step.abs().max().item())  # never further than 1: no overshoot
        if step.abs().max() < 1e-10:
            break
    at_zero = weights[0].sigmoid().item()
    error = math.sqrt(torch.linalg.inv(curvature)[0, 0].item())
    return at_zero, at_zero * (1 - at_zero) * error
