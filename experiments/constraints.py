"""Constraints: does DPO still solve the RLHF objective when training is stopped early or weights
decay? (arXiv 2407.09072, criterion 3)

    python -m experiments.constraints

One prompt, three answers, pi* = (.6, .3, .1), ref = (.4, .4, .2). Each method and the exact RLHF
objective get the same treatment: to the end, gradient descent stopped early, or L2 decay of the
logits. Without a constraint DPO's minimum is the RLHF optimum; the table shows the total variation
between a method's policy and the RLHF one under the same constraint, and each one's distance to
pi*. Writes results/constraints.json and results/constraints.png.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/constraints.py

from experiments import study
from experiments.interpolation import REF, TARGET, rounded
from experiments.tabular import (
    METHODS,
    closed_form,
    in_words,
    label_weights,
    minimise,
    minimiser,
    population_loss,
    rlhf_objective,
    total_variation,
)

LAMBDAS = (0.01, 0.1, 1.0, 10.0)
CONSTRAINTS = ("none", "early stopping", "L2 decay")
OBJECTIVES = ("RLHF", *METHODS)


@dataclass
class Args:
    output_dir: str = "results"
    """Where the numbers and the figure go."""
    steps: int = 200
    """Steps of gradient descent until early stopping."""
    lr: float = 0.05
    """Its step size."""
    decay: float = 0.05
    """Strength of the L2 decay: (decay / 2) * sum of squared logits is added."""


def objective(method: str, lam: float):
    """The function of logits that a method minimises."""
    if method == "RLHF":
        return lambda logits: rlhf_objective(logits, TARGET, REF, lam)
    weights = label_weights(TARGET)
    return lambda logits: population_loss(method, logits, REF, weights, lam)


def stopped_early(loss, steps: int, lr: float) -> torch.Tensor:
    """Policy after so many steps of gradient descent from the reference, [answers]."""
    logits = REF.log().clone()
    for _ in range(steps):
        point = logits.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point), point)
        logits = (point - lr * gradient).detach()
    return logits.softmax(-1)


def decayed(loss, decay: float) -> torch.Tensor:
    """Policy that minimises the loss plus L2 decay of its centred logits, [answers]."""

    def penalised(logits: torch.Tensor) -> torch.Tensor:
        return loss(logits) + decay / 2 * (logits - logits.mean()).square().sum()

    return minimise(penalised, REF.log()).softmax(-1)


def policies(method: str, lam: float, args: Args) -> dict[str, torch.Tensor]:
    """The policy under each constraint."""
    loss = objective(method, lam)
    if method == "RLHF":
        free = closed_form("DPO", TARGET, REF, lam).exp()
    else:
        free = minimiser(method, TARGET, REF, lam)
    early = stopped_early(loss, args.steps, args.lr)
    return {"none": free, "early stopping": early, "L2 decay": decayed(loss, args.decay)}


def main(args: Args) -> None:
    """Prints the table and writes numbers and figure."""
    by_lambda = {lam: {name: policies(name, lam, args) for name in OBJECTIVES} for lam in LAMBDAS}
    table: dict = {}
    rows = []
    for constraint in CONSTRAINTS:
        table[constraint] = {}
        for lam in LAMBDAS:
            ends = {name: by_lambda[lam][name][constraint] for name in OBJECTIVES}
            table[constraint][str(lam)] = {name: rounded(policy) for name, policy in ends.items()}
            gaps = [total_variation(ends[name], ends["RLHF"]).item() for name in METHODS]
            words = map(in_words, ends.values())
            rows.append([constraint, f"{lam:g}", *words, *(f"{gap:.3f}" for gap in gaps)])
    title = f"Constraints: {args.steps} steps of gradient descent at step size {args.lr}; L2 decay {args.decay}"
    gap_heads = [f"{name} to RLHF" for name in METHODS]
    title += "\nPolicies, and their total variation to the RLHF policy under the same constraint"
    study.print_table(["constraint", "lambda", *OBJECTIVES, *gap_heads], rows, title)
    numbers = {"steps": args.steps, "lr": args.lr, "decay": args.decay, "policies": table}
    folder = Path(args.output_dir)
    study.write_result(folder / "constraints.json", {"command": "python -m experiments.constraints"} | numbers)
    study.draw_figure(folder / "constraints.png", partial(draw, args), len(CONSTRAINTS), (12.5, 3.3), share_y=True)


def draw(args: Args, axes: list) -> None:
    """Total variation between each method and RLHF under the same constraint, against lambda."""
    lambdas = torch.logspace(-2, 1, 22, dtype=torch.float64)
    curves = {name: [policies(name, lam.item(), args) for lam in lambdas] for name in OBJECTIVES}
    for axis, constraint in zip(axes, CONSTRAINTS):
        for method in METHODS:
            ends = zip(curves[method], curves["RLHF"])
            gaps = [total_variation(policy[constraint], rlhf[constraint]).item() for policy, rlhf in ends]
            axis.plot(lambdas, gaps, **study.look_of(method), markevery=3, label=method)
        axis.set_xscale("log")
        axis.set_xlabel("lambda")
        axis.set_title(f"constraint: {constraint}")
    axes[0].set_ylabel("total variation to RLHF")
    axes[0].legend()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
