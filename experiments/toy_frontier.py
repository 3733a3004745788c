"""True reward against KL on the toy world, for real policies: DPO, cDPO, DPH's language model and
TYPO, with the best possible curve drawn.

    python -m experiments.toy_frontier            a small grid, three seeds
    python -m experiments.toy_frontier --jobs 4   after an interruption the same command goes on

Every finished run adds a line to results/toy_frontier.jsonl, and a run that has its line is not
made again. Each policy is judged on the trained questions by `--answers` samples a question. The
targets differ: DPO and its relatives aim at ref exp(r*/beta), which lies on the frontier; TYPO with
small lambda at the Bradley-Terry-optimal policy, proportional to exp(r*), which does not: its point
is drawn for the answers among 512 samples of the reference. No toy question is "good" in the sense
of ref = pi*; the fifth of the questions with the reference's largest mean true reward stands for it
here.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/toy_frontier.py

from common.models import load_tokenizer
from common.oracle import plain_logps
from experiments import policies, study
from toy import base, world

SCRIPTS = {"DPO": "dpo.py", "cDPO": "cdpo.py", "DPH's LM": "dph.py", "TYPO": "typo.py"}
COLUMNS = ("kl", "true_reward", "efficiency", "good_before", "good_after")


@dataclass
class Args:
    betas: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Values of beta for DPO, cDPO and DPH."""
    lams: tuple[float, ...] = (0.03, 0.3, 3.0)
    """Values of lambda for TYPO."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each has its own base model and pairs."""
    answers: int = 50
    """Samples of each trained question."""
    jobs: int = 1
    """Runs side by side, one thread each."""
    output_dir: str = "results"
    """Where the lines and the figure go."""
    extra: str = ""
    """More words for the scripts' command lines, given as --extra="--max-steps 2"."""
    work: str = ""
    """Set by the program itself: the run that a worker process makes."""


def make_run(method: str, value: float, seed: int, args: Args) -> dict:
    """Trains one policy and judges it: the line that is kept."""
    torch.set_num_threads(1)
    flags = {"lam" if method == "TYPO" else "beta": value, "seed": seed, "kl_samples": 0}
    with tempfile.TemporaryDirectory() as folder:
        study.train(SCRIPTS[method], f"{folder}/run", flags, args.extra)
        metrics = policies.judge_policy(f"{folder}/run", seed, args.answers)
    return {"method": method, "value": value, "seed": seed, "extra": args.extra} | metrics | study.facts()


def typo_target(seed: int) -> tuple[float, float]:
    """(KL to the reference, true reward) of the policy proportional to exp(r*) over the answers
    among the reference's samples.
    """
    folder = str(base.base_model(seed))
    tokenizer = load_tokenizer(folder)
    model = policies.load_policy(folder, tokenizer)
    kls, rewards = [], []
    for row, texts in zip(policies.trained_questions(), policies.reference_answers(seed)):
        distinct = sorted(set(texts))
        prompt = tokenizer(world.prompt_of(row)).input_ids
        completions = [tokenizer(text).input_ids[1:] + [tokenizer.eos_token_id] for text in distinct]
        pairs = [(prompt, completion) for completion in completions]
        logps = plain_logps(model, pairs, tokenizer.pad_token_id, 256).double()  # [answers]
        reward = torch.tensor([world.true_reward(row, text) for text in distinct], dtype=torch.float64)  # [answers]
        target_logps = reward.log_softmax(0)  # [answers]
        kls.append((target_logps.exp() * (target_logps - logps)).sum().item())
        rewards.append((target_logps.exp() * reward).sum().item())
    return sum(kls) / len(kls), sum(rewards) / len(rewards)


def main(args: Args) -> None:
    """Makes the runs that have no line yet, then prints the table and draws the figure."""
    if args.work:
        print(json.dumps(make_run(*json.loads(args.work), args)))
        return
    grid = []
    for seed in args.seeds:
        base.base_model(seed)  # built before runs start side by side
        for method in SCRIPTS:
            grid += [(method, value, seed) for value in (args.lams if method == "TYPO" else args.betas)]

    def key_of(line: dict) -> tuple | None:
        same = (line["answers"], line.get("extra", "")) == (args.answers, args.extra)
        return (line["method"], line["value"], line["seed"]) if same else None

    def describe(line: dict) -> str:
        run = f"{line['method']} {line['value']} seed {line['seed']}"
        return f"{run}: KL {line['kl']:.2f}, true reward {line['true_reward']:.2f}"

    folder = Path(args.output_dir)
    flags = ["--answers", str(args.answers), f"--extra={args.extra}"]
    lines = study.complete(folder / "toy_frontier.jsonl", grid, key_of, __file__, flags, args.jobs, describe)
    targets = [typo_target(seed) for seed in args.seeds]
    report(lines, targets)
    study.draw_figure(folder / "toy_frontier.png", partial(draw, lines, args.seeds, targets))


def report(lines: list[dict], targets: list[tuple[float, float]]) -> None:
    """The table over seeds, a line a method and value."""
    groups: dict[tuple, list[dict]] = {}
    for line in sorted(lines, key=lambda line: (list(SCRIPTS).index(line["method"]), line["value"])):
        groups.setdefault((line["method"], line["value"]), []).append(line)
    rows = []
    for (method, value), group in groups.items():
        cells = [study.plus_minus([line[name] for line in group]) for name in COLUMNS]
        rows.append([method, f"{value:g}", *cells])
    study.print_table(["method", "value", *COLUMNS], rows)
    kl, reward = (study.plus_minus(list(values)) for values in zip(*targets))
    print(f"TYPO's own target, proportional to exp(r*): KL {kl}, true reward {reward}")


def draw(lines: list[dict], seeds: tuple[int, ...], targets: list[tuple[float, float]], axes: list) -> None:
    """The points of all seeds, under each seed's best possible curve."""
    (axis,) = axes
    policies.draw_frontiers(axis, seeds)
    for method in SCRIPTS:
        group = [line for line in lines if line["method"] == method]
        kls, rewards = [line["kl"] for line in group], [line["true_reward"] for line in group]
        axis.scatter(kls, rewards, **study.points_of(method), s=28, alpha=0.8, label=method)
    axis.scatter(*zip(*targets), marker="*", s=110, color="black", label="TYPO's target, exp(r*)")
    axis.legend()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
