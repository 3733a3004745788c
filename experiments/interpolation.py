"""Strong interpolation: where do four methods' minimisers go between lambda = 0 and infinity?
(arXiv 2407.09072, criterion 2)

    python -m experiments.interpolation

One prompt, three answers, pi* = (.6, .3, .1), ref = (.4, .4, .2). Prints the population minimisers,
then 213 sampled pairs over 100 seeds, and writes results/interpolation.json and
results/interpolation.png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/interpolation.py

from experiments import study
from experiments.tabular import METHODS, in_words, label_weights, minimiser, population_loss, tensor

TARGET, REF = tensor([0.6, 0.3, 0.1]), tensor([0.4, 0.4, 0.2])
LAMBDAS = (0.01, 0.1, 1.0, 10.0, 100.0)
SAMPLED_LAMBDAS = (1e-5, 1.0, 100.0)


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


def train_on_sample(method: str, lam: float, counts: torch.Tensor, steps: int) -> torch.Tensor:
    """Policies trained on sampled pairs, [seeds, answers].

    `counts` [seeds, answers, answers] are shares of (preferred, other).
    """
    logits = REF.log().expand(len(counts), -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        population_loss(method, logits, REF, counts, lam).sum().backward()
        optimizer.step()
    return logits.detach().softmax(-1)


def draw_counts(seeds: int, pairs: int) -> torch.Tensor:
    """Shares of (preferred, other) among pairs drawn uniformly and labelled by Bradley-Terry,
    [seeds, answers, answers].
    """
    generator = torch.Generator().manual_seed(0)
    weights = label_weights(TARGET).flatten().expand(seeds, -1)
    cells = torch.multinomial(weights, pairs, replacement=True, generator=generator)  # [seeds, pairs]
    return torch.nn.functional.one_hot(cells, 9).double().mean(1).view(seeds, 3, 3)


def study_population() -> dict:
    """Prints the population minimisers and returns them: lambda -> method -> probabilities."""
    minimisers: dict = {}
    rows = []
    for lam in LAMBDAS:
        policies = {method: minimiser(method, TARGET, REF, lam) for method in METHODS}
        minimisers[str(lam)] = {method: rounded(policy) for method, policy in policies.items()}
        rows.append([f"{lam:g}", *map(in_words, policies.values())])
    title = "Population minimisers, pairs of two different answers drawn uniformly; pi* = .6 .3 .1, ref = .4 .4 .2"
    study.print_table(["lambda", *METHODS], rows, title)
    return minimisers


def study_samples(args: Args) -> dict:
    """Prints what training on sampled pairs ends in, and returns it: lambda -> method -> mean, std
    and the policy of each seed.
    """
    counts = draw_counts(args.seeds, args.pairs)
    results: dict = {}
    rows = []
    for lam in SAMPLED_LAMBDAS:
        results[str(lam)] = {}
        for method in METHODS:
            policies = train_on_sample(method, lam, counts, args.steps)  # [seeds, answers]
            mean, std = policies.mean(0), policies.std(0)
            each = [rounded(policy) for policy in policies]
            results[str(lam)][method] = {"mean": rounded(mean), "std": rounded(std), "seeds": each}
            rows.append([f"{lam:g}", method, *(f"{m:.3f} ({s:.3f})" for m, s in zip(mean, std))])
    title = f"{args.pairs} sampled pairs, {args.steps} Adam steps from the reference: mean (standard deviation)"
    heads = ["lambda", "method", "answer 1", "answer 2", "answer 3"]
    study.print_table(heads, rows, f"{title} over {args.seeds} seeds")
    return results


def rounded(policy: torch.Tensor) -> list[float]:
    """Probabilities as they are written to the file."""
    return [round(p, 4) for p in policy.tolist()]


def main(args: Args) -> None:
    """Prints the tables and writes numbers and figure."""
    result = {
        "command": "python -m experiments.interpolation",
        "target": TARGET.tolist(),
        "reference": REF.tolist(),
        "population": study_population(),
        "sampled": study_samples(args),
    }
    folder = Path(args.output_dir)
    study.write_result(folder / "interpolation.json", result)
    study.draw_figure(folder / "interpolation.png", draw, len(METHODS), (12.5, 3.1), share_y=True)


def draw(axes: list) -> None:
    """Probability of each answer against lambda, a panel a method."""
    lambdas = torch.logspace(-2.5, 2.5, 61, dtype=torch.float64)
    for axis, method in zip(axes, METHODS):
        policies = torch.stack([minimiser(method, TARGET, REF, lam.item()) for lam in lambdas])  # [lambdas, answers]
        for i, look in enumerate(study.LOOKS[: len(TARGET)]):
            colour, mark = look["color"], look["marker"]
            axis.plot(lambdas, policies[:, i], color=colour, marker=mark, markevery=10, label=f"answer {i + 1}")
            axis.axhline(TARGET[i], color=colour, linestyle=":", linewidth=1)
            axis.axhline(REF[i], color=colour, linestyle="--", linewidth=0.7, alpha=0.6)
        axis.set_xscale("log")
        axis.set_title(method)
        axis.set_xlabel("lambda")
    axes[0].set_ylabel("probability of the answer")
    axes[0].legend(loc="upper right", title="dotted pi*, dashed ref")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
