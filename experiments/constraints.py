"""Constraints: does DPO still solve the RLHF objective when training is stopped early or weights decay? (arXiv 2407.09072, criterion 3)

    python -m experiments.constraints

One prompt, three answers, pi* = (.6, .3, .1), ref = (.4, .4, .2). Each method and the exact RLHF objective get the same treatment: to the end,
gradient descent stopped early, or L2 decay of the logits. Without a constraint DPO's minimum is the RLHF optimum; the table shows the total
variation between a method's policy and the RLHF one under the same constraint, and each one's distance to pi*. Writes
results/constraints.json and results/constraints.png.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from experiments.interpolation import REF, TARGET
from experiments.tabular import METHODS, closed_form, label_weights, minimise, minimiser, population_loss, rlhf_objective, total_variation

LAMBDAS = (0.01, 0.1, 1.0, 10.0)


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
        logits = (point - lr * torch.autograd.grad(loss(point), point)[0]).detach()
    return logits.softmax(-1)


def decayed(loss, decay: float) -> torch.Tensor:
    """Policy that minimises the loss plus L2 decay of its centred logits, [answers]."""
    return minimise(lambda logits: loss(logits) + decay / 2 * (logits - logits.mean()).square().sum(), REF.log()).softmax(-1)


def policies(method: str, lam: float, args: Args) -> dict[str, torch.Tensor]:
    """The policy under each constraint."""
    free = closed_form("DPO", TARGET, REF, lam).exp() if method == "RLHF" else minimiser(method, TARGET, REF, lam)
    loss = objective(method, lam)
    return {"none": free, "early stopping": stopped_early(loss, args.steps, args.lr), "L2 decay": decayed(loss, args.decay)}


def main(args: Args) -> None:
    """Prints the table and writes the figure."""
    names = ("RLHF", *METHODS)
    found = {lam: {name: policies(name, lam, args) for name in names} for lam in LAMBDAS}
    result: dict = {"command": "python -m experiments.constraints", "steps": args.steps, "lr": args.lr, "decay": args.decay, "policies": {}}
    print(f"Constraints: {args.steps} steps of gradient descent at step size {args.lr}; L2 decay {args.decay}")
    print(f"\n{'constraint':>16}{'lambda':>8}   " + "".join(f"{name:>22}" for name in names) + "     total variation to RLHF: " + "  ".join(METHODS))
    for constraint in ("none", "early stopping", "L2 decay"):
        for lam in LAMBDAS:
            row = [found[lam][name][constraint] for name in names]
            gaps = [total_variation(p, row[0]).item() for p in row[1:]]
            cells = "".join(f"{' '.join(f'{x:.3f}' for x in p):>22}" for p in row)
            print(f"{constraint:>16}{lam:>8g}   {cells}{'':31}" + "  ".join(f"{gap:.3f}" for gap in gaps))
            result["policies"].setdefault(constraint, {})[str(lam)] = {n: [round(x, 4) for x in p.tolist()] for n, p in zip(names, row)}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "constraints.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw_figure(folder / "constraints.png", args)


def draw_figure(path: Path, args: Args) -> None:
    """Total variation between each method and RLHF under the same constraint, against lambda; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("\nNo figure: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lambdas = torch.logspace(-2, 1, 22, dtype=torch.float64)
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.3), sharey=True)
    curves = {name: [policies(name, lam.item(), args) for lam in lambdas] for name in ("RLHF", *METHODS)}
    for axis, constraint in zip(axes, ("none", "early stopping", "L2 decay")):
        for method in METHODS:
            gaps = [total_variation(p[constraint], q[constraint]).item() for p, q in zip(curves[method], curves["RLHF"])]
            axis.plot(lambdas, gaps, label=method)
        axis.set_xscale("log")
        axis.set_xlabel("lambda")
        axis.set_title(f"constraint: {constraint}", fontsize=10)
    axes[0].set_ylabel("total variation to RLHF")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"\nFigure: {path}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
