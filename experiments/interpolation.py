"""Strong interpolation: where do four methods' minimisers go between lambda = 0 and infinity? (arXiv 2407.09072, criterion 2)

    python -m experiments.interpolation

One prompt, three answers, pi* = (.6, .3, .1), ref = (.4, .4, .2). Prints the population minimisers, then 213 sampled pairs over 100 seeds, and
writes results/interpolation.json and results/interpolation.png.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from experiments.tabular import METHODS, label_weights, minimiser, population_loss, row, tensor

TARGET, REF = tensor([0.6, 0.3, 0.1]), tensor([0.4, 0.4, 0.2])
LAMBDAS = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass
class Args:
    output_dir: str = "results"
    """Where the numbers and the figure go."""
    seeds: int = 100
    """Sampled data sets."""
    pairs: int = 213
    """Pairs in each of them."""
    steps: int = 3000
    """Adam steps on them, from the reference, at learning rate .02."""


def sampled(method: str, lam: float, counts: torch.Tensor, steps: int) -> torch.Tensor:
    """Policies trained on sampled pairs, [seeds, answers]; `counts` [seeds, answers, answers] are shares of (preferred, other)."""
    logits = REF.log().expand(len(counts), -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        population_loss(method, logits, REF, counts, lam).sum().backward()
        optimizer.step()
    return logits.detach().softmax(-1)


def draw_counts(seeds: int, pairs: int) -> torch.Tensor:
    """Shares of (preferred, other) among pairs drawn uniformly and labelled by Bradley-Terry, [seeds, answers, answers]."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(label_weights(TARGET).flatten().expand(seeds, -1), pairs, replacement=True, generator=generator)
    return torch.nn.functional.one_hot(draws, 9).double().mean(1).view(seeds, 3, 3)


def main(args: Args) -> None:
    """Prints the tables and writes the figure."""
    result: dict = {"command": "python -m experiments.interpolation", "target": TARGET.tolist(), "reference": REF.tolist(), "population": {}, "sampled": {}}
    print("Population minimisers, pairs of two different answers drawn uniformly; pi* = .6 .3 .1, ref = .4 .4 .2")
    print(f"{'lambda':>10}" + "".join(f"   {method:17}" for method in METHODS))
    for lam in LAMBDAS:
        found = [minimiser(method, TARGET, REF, lam) for method in METHODS]
        result["population"][str(lam)] = {m: [round(x, 4) for x in p.tolist()] for m, p in zip(METHODS, found)}
        print(row(f"{lam:g}", *found))
    counts = draw_counts(args.seeds, args.pairs)
    print(f"\n{args.pairs} sampled pairs, {args.steps} Adam steps from the reference: mean (standard deviation) over {args.seeds} seeds")
    for lam in (1e-5, 1.0, 100.0):
        for method in METHODS:
            policies = sampled(method, lam, counts, args.steps)
            mean, spread = policies.mean(0), policies.std(0)
            result["sampled"].setdefault(str(lam), {})[method] = {"mean": [round(x, 4) for x in mean.tolist()], "std": [round(x, 4) for x in spread.tolist()]}
            print(f"{lam:>10g}  {method:6}" + "".join(f"  {m:.3f} ({s:.3f})" for m, s in zip(mean, spread)))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "interpolation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw_figure(folder / "interpolation.png")


def draw_figure(path: Path) -> None:
    """Probability of each answer against lambda, a panel a method; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("\nNo figure: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lambdas = torch.logspace(-2.5, 2.5, 61, dtype=torch.float64)
    figure, axes = plt.subplots(1, 4, figsize=(12.5, 3.1), sharey=True)
    for axis, method in zip(axes, METHODS):
        curves = torch.stack([minimiser(method, TARGET, REF, lam.item()) for lam in lambdas])
        for i, colour in enumerate(("tab:blue", "tab:orange", "tab:green")):
            axis.plot(lambdas, curves[:, i], color=colour, label=f"answer {i + 1}")
            axis.axhline(TARGET[i], color=colour, linestyle=":", linewidth=1)
            axis.axhline(REF[i], color=colour, linestyle="--", linewidth=0.7, alpha=0.6)
        axis.set_xscale("log")
        axis.set_title(method)
        axis.set_xlabel("lambda")
    axes[0].set_ylabel("probability")
    axes[0].legend(fontsize=8, loc="upper right", title="dotted pi*, dashed ref", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"\nFigure: {path}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
