"""Reward hacking on the toy world: SuperHF, PPO and simpler baselines raise a flawed proxy of the true reward, and the true reward looks on.

    python -m experiments.reward_hacking                 three seeds; go on after an interruption with the same command
    python -m experiments.reward_hacking --jobs 4        within twenty minutes on four idle cores

The proxy pays for each word beyond eight what the true reward takes off (common.toy.flawed_reward). SuperHF runs over KL coefficients (0 is RAFT) and over
completions per prompt, PPO over KL coefficients with as many completions in all as SuperHF has at 16 a prompt; beside them stand the base model, best of n
by the proxy, and SFT on the chosen answers of the toy's pairs. Every finished run adds a line to results/reward_hacking.jsonl, and a run that has its line is
not made again. Each policy is judged on the trained questions by `--answers` samples a question at temperature 1.
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

METHODS = ("base", "SFT on chosen", "best of n", "SuperHF", "PPO")
KEYS = ("proxy_reward", "true_reward", "meteor_similarity", "duplicate_share", "length", "right_share", "kl")
DEFAULT_KL = 0.35  # of the runs over completions per prompt


@dataclass
class Args:
    kls: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5)
    """KL coefficients of SuperHF; 0 is RAFT."""
    ppo_kls: tuple[float, ...] = (0.05, 0.2, 0.5)
    """KL coefficients of PPO."""
    completions: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Completions per prompt of SuperHF at KL coefficient .35."""
    n: int = 16
    """Of best of n, and completions per prompt of the other SuperHF runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each has its own base model."""
    answers: int = 20
    """Samples of each trained question that judge a policy."""
    jobs: int = 1
    """Runs side by side, one thread each."""
    output_dir: str = "results"
    """Where the lines and the figure go."""
    extra: str = ""
    """More words for the command lines of superhf.py and ppo.py, given as --extra="--max-steps 2"."""
    work: str = ""
    """Set by the program itself: the run that a worker process makes."""


def grid_of(args: Args) -> list[tuple[str, float, int, int]]:
    """(method, KL coefficient, completions per prompt, seed) of every run, each once."""
    superhf = [("SuperHF", kl, args.n) for kl in args.kls] + [("SuperHF", DEFAULT_KL, n) for n in args.completions]
    ppo = [("PPO", kl, 1) for kl in args.ppo_kls]
    return [
        (*run, seed)
        for seed in args.seeds
        for run in dict.fromkeys(
            [("base", 0.0, 1), ("SFT on chosen", 0.0, 1), ("best of n", 0.0, args.n), *superhf, *ppo]
        )
    ]


def judged(rows: list[dict], drawn: list[list[str]], seed: int) -> dict:
    """What is said about answers, [questions][n] texts: both rewards, right answers, and how much answers to different questions are alike."""
    said = [(row, text) for row, texts in zip(rows, drawn) for text in texts]
    found = {
        name: sum(judge(row, text) for row, text in said) / len(said)
        for name, judge in (("proxy_reward", toy.flawed_reward), ("true_reward", toy.true_reward))
    }
    found["right_share"] = sum(toy.judge(row, text)["right"] for row, text in said) / len(said)
    return found | evaluate.sameness(
        [toy.prompt_of(row) for row, _ in said], [text for _, text in said], seed, pairs=1000
    )


def command(method: str, kl: float, n: int, seed: int, folder: str, extra: str) -> list[str]:
    """The command line that trains a policy, as a user would give it. PPO gets as many completions as SuperHF at 16 a prompt: 8 passes of 16 over the prompts."""
    words = ["--seed", str(seed), "--kl-samples", "100", "--eval-every", "20", "--output-dir", folder, "--name", "run"]
    if method == "SFT on chosen":
        return ["sft.py", *words[:2], "--kl-samples", "0", *words[6:]]
    judges = ["--reward", "toy:flawed", "--test-reward", "toy", "--kl", str(kl), *extra.split()]
    return (
        ["superhf.py", "--completions", str(n), *judges, *words]
        if method == "SuperHF"
        else ["ppo.py", "--epochs", "128", *judges, *words]
    )


def make_run(method: str, kl: float, n: int, seed: int, count: int, extra: str) -> dict:
    """Trains one policy and judges it: the line that is kept."""
    torch.set_num_threads(1)
    base, line = (
        str(toy.base_model(seed)),
        {"method": method, "coefficient": kl, "n": n, "seed": seed, "answers": count},
    )
    tokenizer = runtime.load_tokenizer(base)
    policy = reference = runtime.load_model(base, "cpu", tokenizer).eval()
    with tempfile.TemporaryDirectory() as folder:
        if method in {"SuperHF", "PPO", "SFT on chosen"}:
            words = command(method, kl, n, seed, folder, extra)
            done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise SystemExit(f"{' '.join(words)} failed: {done.stderr[-500:]}")
            policy = runtime.load_model(f"{folder}/run", "cpu", tokenizer).eval()
            summary = json.loads(Path(folder, "run", "summary.json").read_text())
            line |= {
                "steps": summary["steps"],
                "seconds": summary["seconds"],
                "time_shares": summary.get("time_shares"),
            }
            logged = [json.loads(text) for text in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
            line["course"] = [
                [x["step"], x["reward"], x["test_reward"], x["meteor_similarity"]]
                for x in logged
                if x["split"] == "held_out" and "reward" in x
            ]
    rows = [row for row in toy.questions() if not row["unseen"]]
    several = n if method == "best of n" else 1
    prompts = [tokenizer(toy.prompt_of(row)).input_ids for row in rows for _ in range(count * several)]
    drawn = evaluate.sample(policy, prompts, tokenizer, toy.MAX_NEW_TOKENS, seed=seed + 1, batch_size=1000)
    texts = [evaluate.text_of(tokenizer, ids) for ids in drawn]
    owners = [row for row in rows for _ in range(count)]
    if several > 1:  # of each n the one that the proxy likes best
        groups = [texts[i : i + several] for i in range(0, len(texts), several)]
        texts = [
            max(group, key=lambda text, row=row: toy.flawed_reward(row, text)) for row, group in zip(owners, groups)
        ]
        line["kl"] = None
    else:
        line["kl"] = (
            evaluate.kl_of_samples(policy, reference, prompts, drawn, tokenizer.pad_token_id, batch_size=250)
            .mean()
            .item()
        )
    line |= judged(rows, [texts[i : i + count] for i in range(0, len(texts), count)], seed)
    return line | {
        "meteor": evaluate.meteor_form(),
        "git_commit": runtime.git_commit(),
        "device": runtime.device_name(torch.device("cpu")),
    }


def main(args: Args) -> None:
    """Makes the runs that have no line yet, then prints the tables and draws the figure."""
    if args.work:
        print(json.dumps(make_run(*json.loads(args.work), args.answers, args.extra)))
        return
    grid = grid_of(args)
    for seed in sorted({seed for *_, seed in grid}):
        toy.base_model(seed)  # built before runs start side by side

    def key(line: dict) -> tuple | None:
        return (
            (line["method"], line["coefficient"], line["n"], line["seed"]) if line["answers"] == args.answers else None
        )

    def say(line: dict) -> str:
        return f"{key(line)}: proxy {line['proxy_reward']:.2f}, true reward {line['true_reward']:.2f}"

    path = Path(args.output_dir) / "reward_hacking.jsonl"
    flags = ["--answers", str(args.answers), f"--extra={args.extra}"]
    report(
        complete(path, grid, key, "experiments.reward_hacking", flags, args.jobs, say),
        Path(args.output_dir) / "reward_hacking.png",
    )


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


def report(lines: list[dict], figure_path: Path) -> None:
    """The table over seeds, a line a setting, and the figure: rewards against the KL coefficient, METEOR over training, completions per prompt."""
    print(f"\n{'method':15}{'coefficient':>12}{'n':>4}{'runs':>6}" + "".join(f"{name:>19}" for name in KEYS))
    settings = sorted({(METHODS.index(x["method"]), x["coefficient"], x["n"]) for x in lines})
    for index, kl, n in settings:
        mine = [x for x in lines if (x["method"], x["coefficient"], x["n"]) == (METHODS[index], kl, n)]
        cells = "".join(f"{mean_and_spread([x[name] for x in mine]):>19}" for name in KEYS)
        print(
            f"{METHODS[index]:15}{kl if METHODS[index] in ('SuperHF', 'PPO') else '-':>12}{n:>4}{len(mine):>6}{cells}"
        )
    try:
        import matplotlib
    except ImportError:
        print("No figure: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.8))
    most = max((x["n"] for x in lines if x["method"] == "SuperHF"), default=0)

    def mean_of(found: list[dict], name: str) -> float:
        return sum(x[name] for x in found) / len(found)

    for method, marker in (("SuperHF", "o-"), ("PPO", "s--")):
        kls = sorted(
            {
                x["coefficient"]
                for x in lines
                if x["method"] == method and x["n"] in (most, 1 if method == "PPO" else most)
            }
        )
        some = [
            [
                x
                for x in lines
                if x["method"] == method and x["coefficient"] == kl and (method == "PPO" or x["n"] == most)
            ]
            for kl in kls
        ]
        for name, colour in (
            ("proxy_reward", "tab:red"),
            ("true_reward", "tab:blue"),
            ("meteor_similarity", "tab:gray"),
        ):
            if kls:
                axes[0].plot(
                    kls,
                    [mean_of(found, name) for found in some],
                    marker,
                    color=colour,
                    markersize=4,
                    label=f"{method}: {name.replace('_', ' ')}",
                )
    axes[0].set_xlabel("KL coefficient")
    for kl in sorted({x["coefficient"] for x in lines if x["method"] == "SuperHF"}):
        courses = [
            x["course"]
            for x in lines
            if x["method"] == "SuperHF" and x["coefficient"] == kl and x["n"] == most and x["course"]
        ]
        if courses:
            steps = [point[0] for point in courses[0]]
            axes[1].plot(
                steps,
                [sum(course[i][3] or 0 for course in courses) / len(courses) for i in range(len(steps))],
                label=f"kl {kl:g}",
                linewidth=1.2,
            )
    axes[1].set_xlabel("step of SuperHF")
    axes[1].set_ylabel("METEOR similarity")
    counts = sorted({x["n"] for x in lines if x["method"] == "SuperHF" and x["coefficient"] == DEFAULT_KL})
    for name, colour in (("proxy_reward", "tab:red"), ("true_reward", "tab:blue"), ("meteor_similarity", "tab:gray")):
        found = [
            [x for x in lines if x["method"] == "SuperHF" and x["coefficient"] == DEFAULT_KL and x["n"] == n]
            for n in counts
        ]
        if counts:
            axes[2].plot(
                counts,
                [mean_of(some, name) for some in found],
                "o-",
                color=colour,
                markersize=4,
                label=name.replace("_", " "),
            )
    axes[2].set_xscale("log", base=2)
    axes[2].set_xlabel(f"completions per prompt, kl {DEFAULT_KL:g}")
    for axis in axes:
        if axis.has_data():
            axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    figure.tight_layout()
    figure.savefig(figure_path, dpi=110)
    plt.close(figure)
    print(f"Figure: {figure_path}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
