"""True reward against KL on the toy world, for real policies: DPO, cDPO, DPH's language model and TYPO, with the best possible curve drawn.

    python -m experiments.toy_frontier                  a small grid, three seeds; go on after an interruption with the same command
    python -m experiments.toy_frontier --jobs 4

Every finished run adds a line to results/toy_frontier.jsonl, and a run that has its line is not made again. Each policy is judged on the trained
questions by `--answers` samples a question. The targets differ: DPO and its relatives aim at ref exp(r*/beta), which lies on the frontier;
TYPO with small lambda at the Bradley-Terry-optimal policy, proportional to exp(r*), which does not: its point is drawn for the answers seen among
512 samples of the reference. No toy question is "good" in the sense of ref = pi*; the fifth of the questions with the reference's largest mean
true reward stands for it here.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import evaluate, runtime, toy  # noqa: E402
from experiments.grid import complete  # noqa: E402

METHODS = {
    "DPO": ("dpo.py", "--beta"),
    "cDPO": ("cdpo.py", "--beta"),
    "DPH's LM": ("dph.py", "--beta"),
    "TYPO": ("typo.py", "--lam"),
}


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
    work: str = ""
    """Set by the program itself: the run that a worker process makes."""


def question_rewards(answers: list[list[str]]) -> torch.Tensor:
    """True rewards of answers to the trained questions, [questions, n]; `answers` holds a list for each of them."""
    rows = [row for row in toy.questions() if not row["unseen"]]
    return torch.tensor(
        [[toy.true_reward(row, text) for text in texts] for row, texts in zip(rows, answers)], dtype=torch.float64
    )


def reference_answers(seed: int) -> list[list[str]]:
    """The base model's kept answers to the trained questions."""
    kept = json.loads((toy.base_model(seed) / "answers.json").read_text())
    return [texts for row, texts in zip(toy.questions(), kept) if not row["unseen"]]


def judge_policy(folder: str, seed: int, count: int) -> dict:
    """What a run on the toy of this seed says to the trained questions, `count` answers each: KL, true reward, its share of the best possible gain,
    and true reward on the questions that were good before, before and after."""
    tokenizer = runtime.load_tokenizer(folder)
    policy = runtime.load_model(folder, "cpu", tokenizer).eval()
    reference = runtime.load_model(str(toy.base_model(seed)), "cpu", tokenizer).eval()
    prompts = [
        tokenizer(toy.prompt_of(row)).input_ids for row in toy.questions() if not row["unseen"] for _ in range(count)
    ]
    drawn = evaluate.sample(policy, prompts, tokenizer, toy.MAX_NEW_TOKENS, seed=seed + 1, batch_size=1000)
    nats = evaluate.kl_of_samples(policy, reference, prompts, drawn, tokenizer.pad_token_id, batch_size=250)
    texts = [evaluate.text_of(tokenizer, ids) for ids in drawn]
    rewards = question_rewards([texts[i : i + count] for i in range(0, len(texts), count)])
    before = question_rewards(reference_answers(seed))
    good = before.mean(1).argsort(descending=True)[: len(before) // 5]
    found = {"answers": count, "kl": nats.mean().item(), "true_reward": rewards.mean().item()}
    found["efficiency"] = toy.frontier_efficiency(found["kl"], found["true_reward"], before)
    return found | {"good_before": before[good].mean().item(), "good_after": rewards[good].mean().item()}


def train(script: str, *words: str) -> None:
    """Runs a script as a user would; SystemExit with the end of what it printed where it fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(words)} failed: {done.stderr[-500:]}")


def make_run(method: str, value: float, seed: int, count: int) -> dict:
    """Trains one policy and judges it: the line that is kept."""
    torch.set_num_threads(1)
    script, flag = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        train(
            script, flag, str(value), "--seed", str(seed), "--kl-samples", "0", "--output-dir", folder, "--name", "run"
        )
        line = {"method": method, "value": value, "seed": seed} | judge_policy(f"{folder}/run", seed, count)
    return line | {"git_commit": runtime.git_commit(), "device": runtime.device_name(torch.device("cpu"))}


def typo_target(seed: int) -> tuple[float, float]:
    """(KL to the reference, true reward) of the policy proportional to exp(r*) over the answers seen in the reference's samples."""
    folder = str(toy.base_model(seed))
    tokenizer = runtime.load_tokenizer(folder)
    model = runtime.load_model(folder, "cpu", tokenizer).eval()
    kls, rewards = [], []
    for row, texts in zip([row for row in toy.questions() if not row["unseen"]], reference_answers(seed)):
        distinct = sorted(set(texts))
        prompt = tokenizer(toy.prompt_of(row)).input_ids
        ids = [tokenizer(text).input_ids[1:] + [tokenizer.eos_token_id] for text in distinct]
        logps = evaluate.plain_logps(
            model, [(prompt, completion) for completion in ids], tokenizer.pad_token_id, 256
        ).double()
        reward = torch.tensor([toy.true_reward(row, text) for text in distinct], dtype=torch.float64)
        log_w = reward.log_softmax(0)
        kls.append((log_w.exp() * (log_w - logps)).sum().item())
        rewards.append((log_w.exp() * reward).sum().item())
    return sum(kls) / len(kls), sum(rewards) / len(rewards)


def main(args: Args) -> None:
    """Makes the runs that have no line yet, then prints the table and draws the figure."""
    if args.work:
        method, value, seed = json.loads(args.work)
        print(json.dumps(make_run(method, value, seed, args.answers)))
        return
    grid = [(m, v, s) for s in args.seeds for m in METHODS for v in (args.lams if m == "TYPO" else args.betas)]
    for seed in args.seeds:
        toy.base_model(seed)  # built before runs start side by side

    def key(line: dict) -> tuple | None:
        return (line["method"], line["value"], line["seed"]) if line["answers"] == args.answers else None

    def say(line: dict) -> str:
        return f"{line['method']} {line['value']} seed {line['seed']}: KL {line['kl']:.2f}, true reward {line['true_reward']:.2f}"

    path = Path(args.output_dir) / "toy_frontier.jsonl"
    lines = complete(path, grid, key, "experiments.toy_frontier", ["--answers", str(args.answers)], args.jobs, say)
    report(lines, args.seeds, Path(args.output_dir) / "toy_frontier.png")


def mean_and_spread(values: list[float | None]) -> str:
    """ "mean +- standard deviation" of the values that are there."""
    found = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    return (
        "-"
        if not len(found)
        else f"{found.mean():.2f} +- {found.std():.2f}"
        if len(found) > 1
        else f"{found.mean():.2f}"
    )


def report(lines: list[dict], seeds: tuple[int, ...], figure_path: Path) -> None:
    """The table over seeds, and the figure for the first seed with all seeds' points."""
    columns = ("kl", "true_reward", "efficiency", "good_before", "good_after")
    print(f"\n{'method':10}{'value':>7}" + "".join(f"{name:>18}" for name in columns))
    for method, value in dict.fromkeys(
        (line["method"], line["value"])
        for line in sorted(lines, key=lambda x: (list(METHODS).index(x["method"]), x["value"]))
    ):
        mine = [line for line in lines if (line["method"], line["value"]) == (method, value)]
        print(
            f"{method:10}{value:>7g}"
            + "".join(f"{mean_and_spread([line[name] for line in mine]):>18}" for name in columns)
        )
    targets = [typo_target(seed) for seed in seeds]
    print(
        f"TYPO's own target, proportional to exp(r*): KL {mean_and_spread([k for k, _ in targets])}, true reward {mean_and_spread([r for _, r in targets])}"
    )
    try:
        import matplotlib
    except ImportError:
        print("No figure: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4.6))
    for seed in seeds:
        kls, rewards = toy.frontier(question_rewards(reference_answers(seed)))
        axis.plot(
            kls,
            rewards,
            color="black",
            linewidth=1,
            alpha=0.6,
            label="best possible (one line a seed)" if seed == seeds[0] else None,
        )
    for method, marker in zip(METHODS, "osD^"):
        mine = [line for line in lines if line["method"] == method]
        axis.scatter(
            [line["kl"] for line in mine],
            [line["true_reward"] for line in mine],
            marker=marker,
            s=28,
            alpha=0.8,
            label=method,
        )
    axis.scatter(*zip(*targets), marker="*", s=110, color="tab:red", label="TYPO's target, exp(r*)")
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
