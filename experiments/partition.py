"""Why the partition function matters for labels on single answers (arXiv 2312.02554): four ways of handling beta log Z(x), in tables and on the toy world.

    python -m experiments.partition                     tables, then the toy, three seeds; go on after an interruption with the same command
    python -m experiments.partition --jobs 4
    python -m experiments.partition --seeds             the tables alone

Tables: two prompts with four answers each, uniform reference. Binary labels with P(z = 1) = sigma(r), beta = 1, r = (4, 3, 2, 1) on prompt A and
(-1, -2, -3, -4) on B; continuous labels with beta = .1, z = (.95, .90, .85, .80) on A and (.20, .15, .10, .05) on B. The optimum is the same for both prompts. The
population loss of pointwise_dpo.py is minimised by L-BFGS from the reference; the running mean of beta times the log-ratio as a shift (BCO's way) is
no minimum of anything and is followed by gradient descent.

Toy: labels are drawn from sigma(r* + d) with d by kind of question, +3 for colours and opposites, -3 for capitals and sums, 0 for sounds: easy questions get
nearly always a 1 and hard ones a 0, whatever is answered. pointwise_dpo.py with constants and with one learned value a prompt. Lines are added to results/partition.jsonl.
"""

import json
import math
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import runtime, toy  # noqa: E402
from experiments.grid import complete  # noqa: E402
from experiments.tabular import tensor  # noqa: E402
from experiments.toy_frontier import judge_policy, mean_and_spread, question_rewards, reference_answers, train  # noqa: E402
from pointwise_dpo import binary_pointwise_dpo_loss, continuous_pointwise_dpo_loss  # noqa: E402

HANDLINGS = ("log Z = 0", "one constant", "running mean", "one value a prompt")
REWARDS = tensor([[4, 3, 2, 1], [-1, -2, -3, -4]])  # [prompts, answers]
SCORES = tensor([[0.95, 0.90, 0.85, 0.80], [0.20, 0.15, 0.10, 0.05]])
CASES = {"binary": (REWARDS.sigmoid(), 1.0), "continuous": (SCORES, 0.1)}
DIFFICULTY = {
    "capital": -3.0,
    "plus": -3.0,
    "sound": 0.0,
    "colour": 3.0,
    "opposite": 3.0,
}  # d, by the word that tells the kind of question


@dataclass
class Args:
    constants: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    """Constants for beta log Z on the toy; the best is told apart in the table."""
    betas: tuple[float, ...] = (0.3, 1.0)
    """Values of beta on the toy."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the toy; each has its own base model, answers and labels. None: the tables alone."""
    answers: int = 50
    """Samples of each trained question."""
    jobs: int = 1
    """Runs side by side, one thread each."""
    output_dir: str = "results"
    """Where the lines and the figure go."""
    work: str = ""
    """Set by the program itself: the run that a worker process makes."""


# --------------------------------------------------------------------------------------------------------------- tables


def population_loss(kind: str, logits: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Expected loss over prompts, answers of the uniform reference and labels; logits [prompts, answers], shift [prompts, 1]."""
    labels, beta = CASES[kind]
    loss = binary_pointwise_dpo_loss if kind == "binary" else continuous_pointwise_dpo_loss
    ref = torch.full_like(labels, 1 / labels.shape[1]).log()
    rows = (logits.log_softmax(-1), ref, labels, shift.expand(labels.shape))
    policy, ref, labels, shift = (x.reshape(-1) for x in rows)
    return loss(policy, ref, labels, beta, shift).mean()  # linear in the label, so its probability may stand for it


def tabular(kind: str, handling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(policy [prompts, answers], shift [prompts, 1]) that a way of handling beta log Z(x) ends in, from the reference."""
    labels, beta = CASES[kind]
    prompts, answers = labels.shape
    logits = torch.zeros_like(labels, requires_grad=True)
    if handling == "running mean":
        for _ in range(20_000):
            rewards = beta * (logits.log_softmax(-1) + math.log(answers))
            shift = -rewards.detach().mean().expand(prompts, 1)
            (gradient,) = torch.autograd.grad(population_loss(kind, logits, shift), logits)
            if gradient.abs().max() < 1e-10:
                break
            logits = (logits - gradient).detach().requires_grad_()
        return logits.detach().softmax(-1), shift
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


def optimum(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy proportional to ref exp(r / beta), and beta log Z; for continuous labels the reward is the label."""
    labels, beta = CASES[kind]
    rewards = REWARDS if kind == "binary" else labels
    scaled = rewards / beta - math.log(labels.shape[1])
    return scaled.softmax(-1), beta * scaled.logsumexp(-1, keepdim=True)


def print_tables() -> None:
    """Both cases, a line for each handling."""
    for kind in CASES:
        print(f"\n{kind} labels{'prompt A':>26}{'prompt B':>27}{'beta log Z':>19}")
        for words, (policy, shift) in [("optimum", optimum(kind)), *((h, tabular(kind, h)) for h in HANDLINGS)]:
            cells = "   ".join(" ".join(f"{p:.3f}" for p in row) for row in policy.tolist())
            print(f"  {words:20}{cells}   {shift[0].item():6.3f} {shift[1].item():6.3f}")


# ------------------------------------------------------------------------------------------------------------------ toy


def difficulty(prompt: str) -> float:
    """d of a question."""
    return next(d for word, d in DIFFICULTY.items() if word in prompt.split())


def write_rows(path: Path, seed: int) -> None:
    """The toy's training answers with labels drawn from sigma(r* + d)."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for prompt, answer, good in toy.labelled(seed, continuous=True)["train"]:
            reward = math.log(good / (1 - good))
            label = int(rng.random() < 1 / (1 + math.exp(-reward - difficulty(prompt))))
            file.write(json.dumps({"prompt": prompt, "completion": answer, "label": label}) + "\n")


def make_run(handling: str, beta: float, seed: int, count: int) -> dict:
    """Trains one policy and judges it: the line that is kept. `handling`: a constant as text, or "learned"."""
    torch.set_num_threads(1)
    how = ["--learn-partition"] if handling == "learned" else ["--beta-log-z", handling]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, seed)
        words = [
            "--model",
            str(toy.base_model(seed)),
            "--data",
            str(rows),
            "--holdout",
            "0",
            "--beta",
            str(beta),
            "--seed",
            str(seed),
            "--kl-samples",
            "0",
        ]
        train("pointwise_dpo.py", *words, *how, "--output-dir", folder, "--name", "run")
        line = {"handling": handling, "beta": beta, "seed": seed} | judge_policy(f"{folder}/run", seed, count)
    return line | {"git_commit": runtime.git_commit(), "device": runtime.device_name(torch.device("cpu"))}


def main(args: Args) -> None:
    """Prints the tables, makes the toy runs that have no line yet, prints their table and draws the figure."""
    if args.work:
        print(json.dumps(make_run(*json.loads(args.work), args.answers)))
        return
    print_tables()
    grid = [(h, b, s) for s in args.seeds for b in args.betas for h in (*map(str, args.constants), "learned")]
    for seed in args.seeds:
        toy.base_model(seed)  # built before runs start side by side

    def key(line: dict) -> tuple | None:
        return (line["handling"], line["beta"], line["seed"]) if line["answers"] == args.answers else None

    def say(line: dict) -> str:
        return f"{line['handling']}, beta {line['beta']}, seed {line['seed']}: KL {line['kl']:.2f}, true reward {line['true_reward']:.2f}"

    path = Path(args.output_dir) / "partition.jsonl"
    lines = complete(path, grid, key, "experiments.partition", ["--answers", str(args.answers)], args.jobs, say)
    if lines:
        report(lines, args, Path(args.output_dir) / "partition.png")


def report(lines: list[dict], args: Args, figure_path: Path) -> None:
    """The table over seeds, and the figure with all seeds' points."""
    columns = ("kl", "true_reward", "efficiency")
    print(f"\n{'beta log Z':14}{'beta':>6}" + "".join(f"{name:>18}" for name in columns))
    for beta in args.betas:
        groups = {
            h: [x for x in lines if (x["handling"], x["beta"]) == (h, beta)]
            for h in (*map(str, args.constants), "learned")
        }
        groups = {h: found for h, found in groups.items() if found}
        best = max(
            (h for h in groups if h != "learned"),
            key=lambda h: sum(x["true_reward"] for x in groups[h]) / len(groups[h]),
            default=None,
        )
        for handling, found in groups.items():
            name = handling + (" (best)" if handling == best else "")
            print(
                f"{name:14}{beta:>6g}" + "".join(f"{mean_and_spread([x[key] for x in found]):>18}" for key in columns)
            )
    try:
        import matplotlib
    except ImportError:
        print("No figure: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4.6))
    for seed in args.seeds:
        kls, rewards = toy.frontier(question_rewards(reference_answers(seed)))
        axis.plot(
            kls,
            rewards,
            color="black",
            linewidth=1,
            alpha=0.6,
            label="best possible (one line a seed)" if seed == args.seeds[0] else None,
        )
    colours = plt.get_cmap("viridis")
    for i, constant in enumerate(args.constants):
        mine = [x for x in lines if x["handling"] == str(constant)]
        colour = colours(i / max(1, len(args.constants) - 1))
        axis.scatter(
            [x["kl"] for x in mine],
            [x["true_reward"] for x in mine],
            color=colour,
            s=26,
            label=f"constant {constant:g}",
        )
    mine = [x for x in lines if x["handling"] == "learned"]
    axis.scatter(
        [x["kl"] for x in mine],
        [x["true_reward"] for x in mine],
        color="tab:red",
        marker="^",
        s=42,
        label="learned for each prompt",
    )
    axis.set_xscale("symlog", linthresh=0.5)
    axis.set_xlabel("KL(policy || reference), nats per answer")
    axis.set_ylabel("true reward, trained questions")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(figure_path, dpi=110)
    plt.close(figure)
    print(f"Figure: {figure_path}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
