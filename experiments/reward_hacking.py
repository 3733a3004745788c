"""Reward hacking on the toy world: SuperHF, PPO and simpler baselines raise a flawed proxy of the
true reward, and the true reward looks on.

    python -m experiments.reward_hacking            three seeds
    python -m experiments.reward_hacking --jobs 4   within twenty minutes on four idle cores

The proxy pays for each word beyond eight what the true reward takes off (toy.world.flawed_reward).
SuperHF runs over KL coefficients (0 is RAFT) and over completions per prompt, PPO over KL
coefficients with as many completions in all as SuperHF has at 16 a prompt; beside them stand the
base model, best of n by the proxy, and SFT on the chosen answers of the toy's pairs. Every finished
run adds a line to results/reward_hacking.jsonl, and a run that has its line is not made again, so
the same command goes on after an interruption. Each policy is judged on the trained questions by
`--answers` samples a question at temperature 1.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/reward_hacking.py

from common.evaluate import kl_of_samples
from common.models import load_tokenizer
from experiments import policies, study
from rewards.metrics import meteor_form, similarity
from toy import base, world

METHODS = ("base", "SFT on chosen", "best of n", "SuperHF", "PPO")
TRAINED = ("SFT on chosen", "SuperHF", "PPO")
COLUMNS = ("proxy_reward", "true_reward", "meteor_similarity", "duplicate_share", "length", "right_share", "kl")
QUANTITIES = {"proxy_reward": "-", "true_reward": "--", "meteor_similarity": ":"}  # with their dashes in the figure
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
    """More words for superhf.py's and ppo.py's command lines: --extra="--max-steps 2"."""
    work: str = ""
    """Set by the program itself: the run that a worker process makes."""


def grid_of(args: Args) -> list[tuple[str, float, int, int]]:
    """(method, KL coefficient, completions per prompt, seed) of every run, each once."""
    settings = [("base", 0.0, 1), ("SFT on chosen", 0.0, 1), ("best of n", 0.0, args.n)]
    settings += [("SuperHF", kl, args.n) for kl in args.kls]
    settings += [("SuperHF", DEFAULT_KL, n) for n in args.completions]
    settings += [("PPO", kl, 1) for kl in args.ppo_kls]
    return [(*setting, seed) for seed in args.seeds for setting in dict.fromkeys(settings)]


def judge_answers(rows: list[dict], answers: list[list[str]], seed: int) -> dict:
    """Metrics of answers to questions, [questions][n] texts: both rewards, the share of right ones,
    and how much answers to different questions are alike.
    """
    pairs = [(row, text) for row, texts in zip(rows, answers) for text in texts]
    count = len(pairs)
    metrics = {
        "proxy_reward": sum(world.flawed_reward(row, text) for row, text in pairs) / count,
        "true_reward": sum(world.true_reward(row, text) for row, text in pairs) / count,
        "right_share": sum(world.judge(row, text)["right"] for row, text in pairs) / count,
    }
    prompts, texts = [world.prompt_of(row) for row, _ in pairs], [text for _, text in pairs]
    return metrics | similarity(prompts, texts, seed, pairs=1000)


def train(method: str, kl: float, n: int, seed: int, folder: Path, extra: str) -> dict:
    """Trains a policy as a user would, and returns what its run tells of the training.

    PPO gets as many completions as SuperHF at 16 a prompt: 8 passes of 16 over the prompts.
    """
    if method == "SFT on chosen":
        summary = study.train("sft.py", folder, {"seed": seed, "kl_samples": 0})
    else:
        flags = {"seed": seed, "kl_samples": 100, "eval_every": 20}
        flags |= {"reward": "toy:flawed", "test_reward": "toy", "kl": kl}
        script, own = ("superhf.py", {"completions": n}) if method == "SuperHF" else ("ppo.py", {"epochs": 128})
        summary = study.train(script, folder, flags | own, extra)
    course = []
    for line in study.read_lines(folder / "metrics.jsonl"):
        if line["split"] == "held_out" and "reward" in line:
            course.append([line["step"], line["reward"], line["test_reward"], line["meteor_similarity"]])
    times = {"seconds": summary["seconds"], "time_shares": summary.get("time_shares")}
    return {"steps": summary["steps"], **times, "course": course}


def make_run(method: str, kl: float, n: int, seed: int, args: Args) -> dict:
    """Trains one policy and judges it: the line that is kept."""
    torch.set_num_threads(1)
    folder, count = str(base.base_model(seed)), args.answers
    tokenizer = load_tokenizer(folder)
    policy = reference = policies.load_policy(folder, tokenizer)
    line = {"method": method, "coefficient": kl, "n": n, "seed": seed, "answers": count, "extra": args.extra}
    if method in TRAINED:
        with tempfile.TemporaryDirectory() as output:
            line |= train(method, kl, n, seed, Path(output) / "run", args.extra)
            policy = policies.load_policy(f"{output}/run", tokenizer)
    rows = policies.trained_questions()
    several = n if method == "best of n" else 1
    prompts, completions, texts = policies.sample_policy(policy, tokenizer, seed, count * several)
    if method == "best of n":
        owners = [row for row in rows for _ in range(count)]
        groups = policies.by_question(texts, several)
        texts = [best_by_proxy(row, group) for row, group in zip(owners, groups)]
        line["kl"] = None
    else:
        nats = kl_of_samples(policy, reference, prompts, completions, tokenizer.pad_token_id, batch_size=250)
        line["kl"] = nats.mean().item()
    line |= judge_answers(rows, policies.by_question(texts, count), seed)
    return line | {"meteor": meteor_form()} | study.facts()


def best_by_proxy(row: dict, texts: list[str]) -> str:
    """The answer that the proxy likes best."""
    return max(texts, key=lambda text: world.flawed_reward(row, text))


def main(args: Args) -> None:
    """Makes the runs that have no line yet, then prints the table and draws the figure."""
    if args.work:
        print(json.dumps(make_run(*json.loads(args.work), args)))
        return
    for seed in args.seeds:
        base.base_model(seed)  # built before runs start side by side

    def key_of(line: dict) -> tuple | None:
        same = (line["answers"], line.get("extra", "")) == (args.answers, args.extra)
        return (line["method"], line["coefficient"], line["n"], line["seed"]) if same else None

    def describe(line: dict) -> str:
        return f"{key_of(line)}: proxy {line['proxy_reward']:.2f}, true reward {line['true_reward']:.2f}"

    path = Path(args.output_dir) / "reward_hacking.jsonl"
    flags = ["--answers", str(args.answers), f"--extra={args.extra}"]
    lines = study.complete(path, grid_of(args), key_of, __file__, flags, args.jobs, describe)
    report(lines)
    if lines:
        study.draw_figure(path.with_suffix(".png"), partial(draw, lines), 3, (12.5, 4.2))


def report(lines: list[dict]) -> None:
    """The table over seeds, a line a setting."""
    groups: dict[tuple, list[dict]] = {}
    for line in sorted(lines, key=lambda x: (METHODS.index(x["method"]), x["coefficient"], x["n"])):
        groups.setdefault((line["method"], line["coefficient"], line["n"]), []).append(line)
    rows = []
    for (method, kl, n), group in groups.items():
        cells = [study.plus_minus([line[name] for line in group]) for name in COLUMNS]
        rows.append([method, kl if method in ("SuperHF", "PPO") else "-", n, len(group), *cells])
    study.print_table(["method", "coefficient", "n", "runs", *COLUMNS], rows)


def draw(lines: list[dict], axes: list) -> None:
    """Rewards against the KL coefficient, METEOR over training, and completions per prompt."""
    superhf = [line for line in lines if line["method"] == "SuperHF"]
    most = max((line["n"] for line in superhf), default=0)
    full = [line for line in superhf if line["n"] == most]
    for method, group in (("SuperHF", full), ("PPO", [line for line in lines if line["method"] == "PPO"])):
        draw_means(axes[0], method, group, "coefficient")
    axes[0].set_xlabel("KL coefficient")
    draw_courses(axes[1], full)
    default = [line for line in superhf if line["coefficient"] == DEFAULT_KL]
    draw_means(axes[2], "SuperHF", default, "n")
    axes[2].set_xscale("log", base=2)
    axes[2].set_xlabel(f"completions per prompt, kl {DEFAULT_KL:g}")
    for axis in axes:
        if axis.has_data():
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def draw_means(axis, method: str, lines: list[dict], name: str) -> None:
    """Means over seeds of both rewards and of METEOR similarity against a setting of a method."""
    settings = sorted({line[name] for line in lines})
    axis.set_ylabel("reward, or METEOR similarity")
    for quantity, dashes in QUANTITIES.items():
        groups = [[line[quantity] for line in lines if line[name] == setting] for setting in settings]
        means = [study.mean_and_std(values)[0] for values in groups]
        if any(mean is not None for mean in means):
            label = f"{method}: {quantity.replace('_', ' ')}"
            axis.plot(settings, means, **study.points_of(method), linestyle=dashes, label=label)


def draw_courses(axis, lines: list[dict]) -> None:
    """METEOR similarity over training, a line a KL coefficient, from dark to light."""
    import matplotlib

    coefficients = sorted({line["coefficient"] for line in lines})
    colours = matplotlib.colormaps["viridis"]
    for i, kl in enumerate(coefficients):
        courses = [line["course"] for line in lines if line["coefficient"] == kl and line["course"]]
        if courses:
            steps = [step for step, *_ in courses[0]]
            means = [sum(course[j][3] or 0 for course in courses) / len(courses) for j in range(len(steps))]
            look = {"color": colours(i / len(coefficients)), "marker": study.LOOKS[i % len(study.LOOKS)]["marker"]}
            axis.plot(steps, means, **look, label=f"kl {kl:g}")
    axis.set_xlabel("step of SuperHF")
    axis.set_ylabel("METEOR similarity of answers")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
