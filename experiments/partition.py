"""Why the partition function matters for labels on single answers (arXiv 2312.02554): four ways of
handling beta log Z(x), in tables and on the toy world.

    python -m experiments.partition            tables, then the toy, three seeds
    python -m experiments.partition --jobs 4   after an interruption the same command goes on
    python -m experiments.partition --seeds    the tables alone

Tables: two prompts with four answers each, uniform reference. Binary labels with P(z = 1) =
sigma(r), beta = 1, r = (4, 3, 2, 1) on prompt A and (-1, -2, -3, -4) on B; continuous labels with
beta = .1, z = (.95, .90, .85, .80) on A and (.20, .15, .10, .05) on B. The optimum is the same for
both prompts. The population loss of pointwise_dpo.py is minimised by L-BFGS from the reference; the
running mean of beta times the log-ratio as a shift (BCO's way) is no minimum of anything and is
followed by gradient descent.

Toy: labels are drawn from sigma(r* + d) with d by kind of question, +3 for colours and opposites,
-3 for capitals and sums, 0 for sounds: easy questions get nearly always a 1 and hard ones a 0,
whatever is answered. pointwise_dpo.py with constants and with one learned value a prompt. Lines are
added to results/partition.jsonl.
"""

import json
import math
import random
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/partition.py

from experiments import policies, study
from experiments.tabular import in_words, tensor
from pointwise_dpo import binary_pointwise_dpo_loss, continuous_pointwise_dpo_loss
from toy import base

HANDLINGS = ("log Z = 0", "one constant", "running mean", "one value a prompt")
REWARDS = tensor([[4, 3, 2, 1], [-1, -2, -3, -4]])  # [prompts, answers]
SCORES = tensor([[0.95, 0.90, 0.85, 0.80], [0.20, 0.15, 0.10, 0.05]])
CASES = {"binary": (REWARDS.sigmoid(), 1.0), "continuous": (SCORES, 0.1)}
# d, by the word that tells the kind of question
DIFFICULTY = {"capital": -3.0, "plus": -3.0, "sound": 0.0, "colour": 3.0, "opposite": 3.0}
COLUMNS = ("kl", "true_reward", "efficiency")


@dataclass
class Args:
    constants: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    """Constants for beta log Z on the toy; the best is told apart in the table."""
    betas: tuple[float, ...] = (0.3, 1.0)
    """Values of beta on the toy."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the toy, each with its own base model and labels; none: the tables alone."""
    answers: int = 50
    """Samples of each trained question."""
    jobs: int = 1
    """Runs side by side, one thread each."""
    output_dir: str = "results"
    """Where the lines and the figure go."""
    extra: str = ""
    """More words for pointwise_dpo.py's command line, given as --extra="--max-steps 2"."""
    work: str = ""
    """Set by the program itself: the run that a worker process makes."""


# -- tables


def population_loss(kind: str, logits: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Expected loss over prompts, answers of the uniform reference and labels.

    logits [prompts, answers], shift [prompts, 1].
    """
    labels, beta = CASES[kind]
    loss = binary_pointwise_dpo_loss if kind == "binary" else continuous_pointwise_dpo_loss
    ref = torch.full_like(labels, 1 / labels.shape[1]).log()
    rows = (logits.log_softmax(-1), ref, labels, shift.expand(labels.shape))
    policy, ref, labels, shift = (x.reshape(-1) for x in rows)
    return loss(policy, ref, labels, beta, shift).mean()  # linear in the label, so its probability may stand for it


def tabular(kind: str, handling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(policy [prompts, answers], shift [prompts, 1]) that a way of handling beta log Z(x) ends in,
    from the reference.
    """
    if handling == "running mean":
        return follow_running_mean(kind)
    labels, _ = CASES[kind]
    prompts, _ = labels.shape
    logits = torch.zeros_like(labels, requires_grad=True)
    values = {"log Z = 0": 0, "one constant": 1, "one value a prompt": prompts}[handling]
    c = torch.zeros(values, 1, dtype=labels.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits, c], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def shift_of() -> torch.Tensor:
        return c.expand(prompts, 1) if values else torch.zeros(prompts, 1, dtype=labels.dtype)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = population_loss(kind, logits, shift_of())
        loss.backward()
        return loss

    for _ in range(20):  # L-BFGS anew: its memory of the curvature is worth little after a long way
        optimizer.step(closure)
    return logits.detach().softmax(-1), shift_of().detach()


def follow_running_mean(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where the shift is minus the mean reward at hand, by gradient descent."""
    labels, beta = CASES[kind]
    prompts, answers = labels.shape
    logits = torch.zeros_like(labels, requires_grad=True)
    for _ in range(20_000):
        rewards = beta * (logits.log_softmax(-1) + math.log(answers))
        shift = -rewards.detach().mean().expand(prompts, 1)
        (gradient,) = torch.autograd.grad(population_loss(kind, logits, shift), logits)
        if gradient.abs().max() < 1e-10:
            break
        logits = (logits - gradient).detach().requires_grad_()
    return logits.detach().softmax(-1), shift


def optimum(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy proportional to ref exp(r / beta), and beta log Z.

    For continuous labels the reward is the label.
    """
    labels, beta = CASES[kind]
    rewards = REWARDS if kind == "binary" else labels
    scaled = rewards / beta - math.log(labels.shape[1])
    return scaled.softmax(-1), beta * scaled.logsumexp(-1, keepdim=True)


def print_tables() -> None:
    """Both cases, a line for each handling."""
    for kind in CASES:
        ends = {"optimum": optimum(kind)} | {handling: tabular(kind, handling) for handling in HANDLINGS}
        rows = []
        for handling, (policy, shift) in ends.items():
            rows.append([handling, *map(in_words, policy), f"{shift[0].item():.3f} {shift[1].item():.3f}"])
        study.print_table([f"{kind} labels", "prompt A", "prompt B", "beta log Z"], rows)


# -- toy


def difficulty(prompt: str) -> float:
    """d of a question."""
    return next(d for word, d in DIFFICULTY.items() if word in prompt.split())


def write_rows(path: Path, seed: int) -> None:
    """The toy's training answers with labels drawn from sigma(r* + d)."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for prompt, answer, good in base.labelled(seed, continuous=True)["train"]:
            reward = math.log(good / (1 - good))
            label = int(rng.random() < 1 / (1 + math.exp(-reward - difficulty(prompt))))
            file.write(json.dumps({"prompt": prompt, "completion": answer, "label": label}) + "\n")


def make_run(handling: str, beta: float, seed: int, args: Args) -> dict:
    """Trains one policy and judges it: the line that is kept.

    `handling`: a constant as text, or "learned".
    """
    torch.set_num_threads(1)
    flags = {"model": base.base_model(seed), "holdout": 0, "beta": beta, "seed": seed, "kl_samples": 0}
    flags |= {"learn_partition": True} if handling == "learned" else {"beta_log_z": handling}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, seed)
        study.train("pointwise_dpo.py", f"{folder}/run", {"data": rows} | flags, args.extra)
        metrics = policies.judge_policy(f"{folder}/run", seed, args.answers)
    return {"handling": handling, "beta": beta, "seed": seed, "extra": args.extra} | metrics | study.facts()


def handlings_of(args: Args) -> list[str]:
    """The toy's ways of handling beta log Z: the constants as text, and "learned"."""
    return [*map(str, args.constants), "learned"]


def main(args: Args) -> None:
    """Prints the tables, makes the toy runs that have no line yet, prints their table and draws the
    figure.
    """
    if args.work:
        print(json.dumps(make_run(*json.loads(args.work), args)))
        return
    print_tables()
    grid = []
    for seed in args.seeds:
        base.base_model(seed)  # built before runs start side by side
        grid += [(handling, beta, seed) for beta in args.betas for handling in handlings_of(args)]

    def key_of(line: dict) -> tuple | None:
        same = (line["answers"], line.get("extra", "")) == (args.answers, args.extra)
        return (line["handling"], line["beta"], line["seed"]) if same else None

    def describe(line: dict) -> str:
        run = f"{line['handling']}, beta {line['beta']}, seed {line['seed']}"
        return f"{run}: KL {line['kl']:.2f}, true reward {line['true_reward']:.2f}"

    folder = Path(args.output_dir)
    flags = ["--answers", str(args.answers), f"--extra={args.extra}"]
    lines = study.complete(folder / "partition.jsonl", grid, key_of, __file__, flags, args.jobs, describe)
    if lines:
        report(lines, args)
        study.draw_figure(folder / "partition.png", partial(draw, lines, args))


def report(lines: list[dict], args: Args) -> None:
    """The table over seeds, a line a value of beta and a handling."""
    rows = []
    for beta in args.betas:
        groups: dict[str, list[dict]] = {handling: [] for handling in handlings_of(args)}
        for line in lines:
            if line["beta"] == beta:
                groups[line["handling"]].append(line)
        groups = {handling: group for handling, group in groups.items() if group}
        constants = [handling for handling in groups if handling != "learned"]
        best = max(constants, key=lambda handling: mean_reward(groups[handling]), default=None)
        for handling, group in groups.items():
            cells = [study.plus_minus([line[name] for line in group]) for name in COLUMNS]
            rows.append([handling + (" (best)" if handling == best else ""), f"{beta:g}", *cells])
    study.print_table(["beta log Z", "beta", *COLUMNS], rows)


def mean_reward(lines: list[dict]) -> float:
    """The mean true reward of runs."""
    return sum(line["true_reward"] for line in lines) / len(lines)


def draw(lines: list[dict], args: Args, axes: list) -> None:
    """The points of all seeds: dark to light constants, and the learned values."""
    import matplotlib

    (axis,) = axes
    policies.draw_frontiers(axis, args.seeds)
    colours = matplotlib.colormaps["viridis"]
    for i, handling in enumerate(handlings_of(args)):
        group = [line for line in lines if line["handling"] == handling]
        points = [line["kl"] for line in group], [line["true_reward"] for line in group]
        if handling == "learned":
            axis.scatter(*points, color="#D55E00", marker="^", s=42, label="learned for each prompt")
        else:
            colour = colours(i / max(1, len(args.constants) - 1))
            axis.scatter(*points, color=colour, marker="o", s=26, label=f"constant {float(handling):g}")
    axis.legend()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
