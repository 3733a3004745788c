"""Preservation: does a method leave a prompt alone whose reference is already right, while it improves another? (arXiv 2407.09072, criterion 1)

    python -m experiments.preservation

Good prompt: ref = pi* = (.6, .3, .1). Bad prompt: pi* = (.6, .2, .2), ref = (.4, .2, .4). With one-hot features a linear-softmax policy is one table
a prompt. Prints each method's errors over log lambda from -5 to 5 and the smallest ratio of total variation lost on the good prompt to that
gained on the bad one, and writes results/preservation.json and results/preservation.png.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from experiments.tabular import METHODS, kl, minimiser, tensor, total_variation

GOOD = (tensor([0.6, 0.3, 0.1]), tensor([0.6, 0.3, 0.1]))  # pi*, ref
BAD = (tensor([0.6, 0.2, 0.2]), tensor([0.4, 0.2, 0.4]))


@dataclass
class Args:
    output_dir: str = "results"
    """Where the numbers and the figure go."""
    points: int = 41
    """Values of log lambda between -5 and 5."""


def study(method: str, log_lambdas: torch.Tensor, draw_from_ref: bool = False) -> dict[str, torch.Tensor]:
    """Errors of the population minimiser at each lambda, [points]: KL(pi* || pi) and total variation on both prompts, and `ratio`: total
    variation lost on the good prompt over that gained on the bad one, nan where the bad prompt does not improve."""
    found: dict[str, list] = {}
    for log_lambda in log_lambdas:
        for name, (target, ref) in (("good", GOOD), ("bad", BAD)):
            policy = minimiser(method, target, ref, log_lambda.exp().item(), ref if draw_from_ref else None)
            found.setdefault(f"{name}_kl", []).append(kl(target, policy))
            found.setdefault(f"{name}_tv", []).append(total_variation(target, policy))
    result = {name: torch.stack(values) for name, values in found.items()}
    gained = total_variation(*BAD) - result["bad_tv"]
    result["ratio"] = torch.where(gained > 0, result["good_tv"] / gained, torch.nan)
    return result


def main(args: Args) -> None:
    """Prints the table and writes the figure."""
    log_lambdas = torch.linspace(-5, 5, args.points, dtype=torch.float64)
    result: dict = {"command": "python -m experiments.preservation", "log_lambda": log_lambdas.tolist(), "methods": {}}
    print(f"Reference on the bad prompt: KL(pi* || ref) {kl(*BAD):.4f}, total variation {total_variation(*BAD):.3f}; on the good prompt 0")
    print(f"\n{'':8}{'pairs':>10}{'good KL, max':>14}{'good KL at 5':>14}{'bad KL, min':>13}{'bad improves':>14}{'lost/gained, min':>18}")
    studies = {}
    for method in METHODS:
        for drawn in (False, True):
            found = study(method, log_lambdas, drawn)
            improves = int((found["ratio"] == found["ratio"]).sum())
            least = found["ratio"][found["ratio"] == found["ratio"]].min().item()
            words = f"{method:8}{'from ref' if drawn else 'uniform':>10}{found['good_kl'].max():14.2g}{found['good_kl'][-1]:14.2g}{found['bad_kl'].min():13.4f}"
            print(f"{words}{f'{improves} of {args.points}':>14}{least:18.3g}")
            name = f"{method}, {'from ref' if drawn else 'uniform'}"
            result["methods"][name] = {k: [None if x != x else float(f"{x:.4g}") for x in v.tolist()] for k, v in found.items()}
            if not drawn:
                studies[method] = found
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preservation.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    draw_figure(folder / "preservation.png", log_lambdas, studies)


def draw_figure(path: Path, log_lambdas: torch.Tensor, studies: dict) -> None:
    """Errors on both prompts and the ratio against log lambda; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("\nNo figure: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.4))
    for method, found in studies.items():
        for axis, key in zip(axes, ("good_kl", "bad_kl", "ratio")):
            axis.plot(log_lambdas, found[key], label=method)
    axes[1].axhline(kl(*BAD), color="grey", linestyle="--", label="reference")
    axes[2].axhline(1.0, color="grey", linestyle="--")
    for axis, title in zip(axes, ("good prompt: KL(pi* || pi)", "bad prompt: KL(pi* || pi)", "total variation lost on good / gained on bad")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("log lambda")
    axes[0].set_ylim(-0.02, 0.6)
    axes[1].set_ylim(-0.02, 0.6)
    axes[2].set_ylim(-0.1, 5)
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"\nFigure: {path}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
