"""Contrastive DPH is cDPO on rewards (arXiv 2405.20053): the head's rewards stand where beta times
the log-ratios do.

    python -m experiments.equivalence

Compares loss and gradient of the two scripts' own losses in float64, on rewards drawn anew at each
scale and label smoothing, and writes the largest deviations to results/equivalence.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/equivalence.py

from cdpo import cdpo_loss
from dph import contrastive_dph_loss
from experiments import study

SCALES = (0.1, 1.0, 10.0)  # of the rewards; the last one saturates sigmas
SMOOTHINGS = (0.0, 0.1, 0.3, 0.49)  # cDPO refuses 0.5, where no pair says anything


@dataclass
class Args:
    output_dir: str = "results"
    """Where the numbers go."""
    pairs: int = 10_000
    """Pairs of rewards drawn for each scale and label smoothing."""
    beta: float = 0.3
    """Of cDPO, whose log-ratios are the rewards over beta."""


def deviations(rewards: torch.Tensor, label_smoothing: float, beta: float) -> tuple[float, float]:
    """Largest absolute deviation of losses and of gradients; rewards [2, pairs] of chosen and
    rejected answers."""
    results = []
    for method in ("DPH", "cDPO"):
        chosen, rejected = (row.clone().requires_grad_() for row in rewards)
        if method == "DPH":
            losses = contrastive_dph_loss(chosen, rejected, label_smoothing)  # [pairs]
        else:
            ref = torch.zeros_like(chosen)
            losses = cdpo_loss(chosen / beta, rejected / beta, ref, ref, beta, label_smoothing)
        gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
        results.append((losses.detach(), torch.stack(gradients)))
    return tuple((ours - theirs).abs().max().item() for ours, theirs in zip(*results))


def main(args: Args) -> None:
    """Prints the table and writes the largest deviations."""
    generator, rows, largest = torch.Generator().manual_seed(0), [], [0.0, 0.0]
    for scale in SCALES:
        for label_smoothing in SMOOTHINGS:
            rewards = scale * torch.randn(2, args.pairs, generator=generator, dtype=torch.float64)
            found = deviations(rewards, label_smoothing, args.beta)
            largest = [max(pair) for pair in zip(largest, found)]
            rows.append([f"{scale:g}", f"{label_smoothing:g}", *(f"{value:.1e}" for value in found)])
    heads = ["scale of rewards", "label smoothing", "loss", "gradient"]
    study.print_table(heads, rows, "Largest deviation of contrastive DPH from cDPO on its rewards")
    result = {"command": "python -m experiments.equivalence", "pairs": args.pairs, "beta": args.beta}
    result |= dict(zip(("loss_deviation", "gradient_deviation"), largest))
    study.write_result(Path(args.output_dir) / "equivalence.json", result)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
