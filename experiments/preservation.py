"""Preservation: does a method leave a prompt alone whose reference is already right, while it
improves another? (arXiv 2407.09072, criterion 1)

    python -m experiments.preservation

Good prompt: ref = pi* = (.6, .3, .1). Bad prompt: pi* = (.6, .2, .2), ref = (.4, .2, .4). With
one-hot features a linear-softmax policy is one table a prompt. Prints each method's errors over log
lambda from -5 to 5 and the smallest ratio of total variation lost on the good prompt to that gained
on the bad one, and writes results/preservation.json and results/preservation.png.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/preservation.py

from experiments import study
from experiments.tabular import METHODS, kl, minimiser, tensor, total_variation

GOOD = (tensor([0.6, 0.3, 0.1]), tensor([0.6, 0.3, 0.1]))  # pi*, ref
BAD = (tensor([0.6, 0.2, 0.2]), tensor([0.4, 0.2, 0.4]))


@dataclass
class Args:
    output_dir: str = "results"
    """Where the numbers and the figure go."""
    points: int = 41
    """Values of log lambda between -5 and 5."""


def errors_of(method: str, log_lambdas: torch.Tensor, draw_from_ref: bool = False) -> dict[str, torch.Tensor]:
    """Errors of the population minimiser at each lambda, [points].

    KL(pi* || pi) in nats and total variation on both prompts, and `ratio`: total variation lost on
    the good prompt over that gained on the bad one, nan where the bad prompt does not improve.
    """
    columns: dict[str, list] = {}
    for log_lambda in log_lambdas:
        for name, (target, ref) in (("good", GOOD), ("bad", BAD)):
            policy = minimiser(method, target, ref, log_lambda.exp().item(), ref if draw_from_ref else None)
            columns.setdefault(f"{name}_kl", []).append(kl(target, policy))
            columns.setdefault(f"{name}_tv", []).append(total_variation(target, policy))
    errors = {name: torch.stack(values) for name, values in columns.items()}
    gained = total_variation(*BAD) - errors["bad_tv"]
    errors["ratio"] = torch.where(gained > 0, errors["good_tv"] / gained, torch.nan)
    return errors


def row_of(method: str, pairs: str, errors: dict[str, torch.Tensor]) -> list[str]:
    """A line of the table: the errors' extremes over lambda."""
    ratios = errors["ratio"][~errors["ratio"].isnan()]
    good, bad = errors["good_kl"], errors["bad_kl"]
    improves = f"{len(ratios)} of {len(good)}"
    least = f"{ratios.min().item():.3g}"
    return [method, pairs, f"{good.max():.2g}", f"{good[-1]:.2g}", f"{bad.min():.4f}", improves, least]


def plain_numbers(values: torch.Tensor) -> list[float | None]:
    """Numbers as they are written to the file, None for nan."""
    return [None if value != value else float(f"{value:.4g}") for value in values.tolist()]


def main(args: Args) -> None:
    """Prints the table and writes numbers and figure."""
    log_lambdas = torch.linspace(-5, 5, args.points, dtype=torch.float64)
    uniform = {method: errors_of(method, log_lambdas) for method in METHODS}
    from_ref = {method: errors_of(method, log_lambdas, draw_from_ref=True) for method in METHODS}
    rows, methods = [], {}
    for method in METHODS:
        for pairs, errors in (("uniform", uniform[method]), ("from ref", from_ref[method])):
            rows.append(row_of(method, pairs, errors))
            methods[f"{method}, {pairs}"] = {name: plain_numbers(values) for name, values in errors.items()}
    reference = f"KL(pi* || ref) {kl(*BAD):.4f}, total variation {total_variation(*BAD):.3f}"
    heads = ["method", "pairs", "good KL, max", "good KL at 5", "bad KL, min", "bad improves", "lost/gained, min"]
    study.print_table(heads, rows, f"Reference on the bad prompt: {reference}; on the good prompt 0")
    folder = Path(args.output_dir)
    command = "python -m experiments.preservation"
    result = {"command": command, "log_lambda": log_lambdas.tolist(), "methods": methods}
    study.write_result(folder / "preservation.json", result)
    study.draw_figure(folder / "preservation.png", partial(draw, log_lambdas, uniform), 3, (12.5, 3.4))


def draw(log_lambdas: torch.Tensor, errors: dict[str, dict], axes: list) -> None:
    """Errors on both prompts and the ratio against log lambda; `errors` by method."""
    panels = (
        ("good_kl", "good prompt", "KL(pi* || pi), nats", 0.6),
        ("bad_kl", "bad prompt", "KL(pi* || pi), nats", 0.6),
        ("ratio", "total variation lost on good / gained on bad", "ratio", 5),
    )
    for axis, (name, title, label, top) in zip(axes, panels):
        for method, values in errors.items():
            axis.plot(log_lambdas, values[name], **study.look_of(method), markevery=5, label=method)
        axis.set_title(title)
        axis.set_xlabel("log lambda")
        axis.set_ylabel(label)
        axis.set_ylim(-top / 30, top)
    axes[1].axhline(kl(*BAD), color="grey", linewidth=1, label="reference")
    axes[2].axhline(1.0, color="grey", linewidth=1)
    axes[1].legend()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
