"""All methods on a small pretrained chat model and real rows: equal tuning, three seeds, and win
rates by a reward model that saw other rows.

    python -m experiments.chat_model --model SmolLM2-135M-Instruct --part pairs
    python -m experiments.chat_model --model SmolLM2-135M-Instruct --part labelled
    python -m experiments.chat_model --model SmolLM2-135M-Instruct --part policies

pairs: DPO, cDPO, TYPO, DPH and SFT on four files of pairs. labelled: point-wise DPO and ULMA on two
files of scored answers. policies: SuperHF and PPO against the reward model of one half of the
judge's rows, the other half's as test reward. Data are those below $PREFERENCE_DATA.

Rows become chats: a prompt is a user's message, a dialogue its turns, and all goes through the
model's template. Of each file `--rows` rows train and evaluate policies, and as many as `--judge-
rows` others, with other prompts, train the judge (reward_model.py). Equal tuning: each method runs
at every one of `--lrs` with the first seed; the learning rate with the best held-out value of
CHOICE counts, the smaller one of two that are equal, and the other seeds run at it. A run's held-
out prompts are then answered by it and by the model that it began with, and the judge says which
answer is better.

Every run adds a line to results/chat_model.jsonl, and one that has its line is not made again.
"""

import json
import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/chat_model.py

from common import InputError
from common.data import read_splits, usable
from common.fields import pair_of_row
from common.files import append_json_line, read_rows, write_text
from experiments import study
from judging.answers import answer_file
from judging.win_rate import length_controlled_rate, wins_of
from rewards.models import load_reward

PAIRS = {
    "polite_instructions": "pairs/polite_instructions.jsonl.gz",
    "hh_harmless": "pairs/hh_harmless_base.jsonl.gz",
    "hh_helpful": "pairs/hh_helpful_base.jsonl.gz",
    "pandalm_votes": "pairs/pandalm_votes.jsonl.gz",
}
LABELLED = {
    "qa_feedback_scores": "labelled/qa_feedback_scores.jsonl.gz",
    "reward_model_scores": "labelled/reward_model_scores.jsonl.gz",
}
METHODS = {
    "pairs": {name: f"{name}.py" for name in ("dpo", "cdpo", "typo", "dph", "sft")},
    "labelled": {name: f"{name}.py" for name in ("pointwise_dpo", "ulma")},
    "policies": {name: f"{name}.py" for name in ("superhf", "ppo")},
}
CHOICE = {  # what decides between learning rates, of a run's held-out report
    **dict.fromkeys(("dpo", "cdpo", "typo", "dph"), "reward_accuracy"),
    **dict.fromkeys(("pointwise_dpo", "ulma"), "reward_auc"),
    **{"sft": "perplexity", "superhf": "reward", "ppo": "reward"},
}
FLAGS = {"dph": {"n": 2}}  # of a method alone: the head's picks are not kept, and cost more than the training
LEAST = {"perplexity"}  # of these the smallest value counts
KEPT = ("preference_accuracy", "reward_accuracy", "logps_auc", "reward_auc", "perplexity", "reward", "test_reward")
KEPT += ("kl", "length")
TURN = re.compile(r"\n\n(Human|Assistant):")  # of Anthropic's dialogues
ROLES = {"Human": "user", "Assistant": "assistant"}
SAMPLES = 5  # answers of each run that its line keeps, with the base model's beside them


@dataclass
class Args:
    model: str
    """Folder of the chat model."""
    part: Literal["pairs", "labelled", "policies"]
    """Which methods and files."""
    data: tuple[str, ...] = ()
    """Only these files, by the names above; none: all of the part."""
    methods: tuple[str, ...] = ()
    """Only these methods; none: all of the part."""
    rows: int = 400
    """Rows of a file that train and evaluate policies; a fifth of their prompts is held out."""
    judge_rows: int = 1000
    """Other rows of the file that train the judge."""
    lrs: tuple[float, ...] = (3e-6, 1e-5, 3e-5)
    """Learning rates that each method tries with the first seed."""
    judge_lr: float = 1e-5
    """Learning rate of the judges."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each holds out other prompts."""
    batch_size: int = 8
    """Pairs, rows or prompts of a step, of the judges too."""
    max_length: int = 384
    """Tokens of prompt and one answer."""
    max_new_tokens: int = 96
    """Length limit of sampled answers, in tokens."""
    temperature: float = 0.7
    """Of the answers that are judged; the KL's samples are always drawn at temperature 1."""
    answers: int = 64
    """Held-out prompts that are answered for the win rate."""
    jobs: int = 1
    """Runs side by side, one thread each."""
    runs: str = "runs/chat_model"
    """Where run folders, files of rows and answers go."""
    output: str = "results/chat_model.jsonl"
    """The file of lines."""
    extra: str = ""
    """More words for every script's command line: --extra="--max-steps 2"."""


# -- rows


def messages_of(prompt: str) -> list[dict]:
    """A prompt as chat messages: a dialogue's turns up to the empty one that asks for an answer, or
    one message of the user's.
    """
    before, *pieces = TURN.split(prompt)
    turns = [{"role": ROLES[role], "content": text.strip()} for role, text in zip(pieces[::2], pieces[1::2])]
    if before.strip() or not turns or turns[-1] != {"role": "assistant", "content": ""}:
        return [{"role": "user", "content": prompt.strip()}]
    return turns[:-1]


def write_file(path: Path, rows: list[dict]) -> Path:
    """A .jsonl file of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def split_file(args: Args, name: str) -> tuple[Path, Path | None]:
    """Files of the policies' rows and the judge's: no prompt is in both. Labelled answers have no
    judge of their own.
    """
    root = os.environ.get("PREFERENCE_DATA", "")
    if not root:
        raise InputError("PREFERENCE_DATA is not set; expected the folder that holds pairs/ and labelled/.")
    folder, rng = Path(args.runs) / "rows", random.Random(0)
    raw = read_rows(str(Path(root) / (PAIRS | LABELLED)[name]))
    if name in LABELLED:
        rows = [row | {"prompt": messages_of(row["prompt"]), "response": row["response"].strip()} for _, row in raw]
        rng.shuffle(rows)
        return write_file(folder / f"{name}.jsonl", rows[: args.rows]), None
    pairs, _ = usable(raw, pair_of_row)
    prompts: dict[str, list] = {}
    for prompt, chosen, rejected in pairs:
        row = {"prompt": messages_of(prompt), "chosen": chosen.strip(), "rejected": rejected.strip()}
        prompts.setdefault(prompt, []).append(row)
    groups = list(prompts.values())
    rng.shuffle(groups)
    rows = [row for group in groups for row in group]
    begin = next((i for i in range(args.rows, len(rows)) if rows[i]["prompt"] != rows[i - 1]["prompt"]), len(rows))
    judge = rows[begin : begin + args.judge_rows]
    if not judge:
        raise InputError(f"--rows {args.rows}: {name} has {len(rows):,} usable pairs, which leaves none to the judge.")
    return write_file(folder / f"{name}.jsonl", rows[:begin]), write_file(folder / f"{name}-judge.jsonl", judge)


def held_out_prompts(args: Args, file: Path, seed: int) -> Path:
    """A file of the first `--answers` prompts that the runs with this seed hold out."""
    splits, _ = read_splits(str(file), None, 0.2, seed, None, pair_of_row)
    prompts = list(dict.fromkeys(json.dumps(pair[0]) for pair in splits["held_out"][0]))[: args.answers]
    return write_file(
        file.with_name(f"{file.stem}-prompts-{seed}.jsonl"), [{"prompt": json.loads(text)} for text in prompts]
    )


# -- runs


def judge_of(args: Args, name: str, judge_file: Path, half: str = "all") -> Path:
    """The run folder of a reward model on the judge's rows, or on one half of their prompts."""
    folder = Path(args.runs) / f"judge-{name}-{half}"
    flags = {"model": args.model, "data": judge_file, "half": half, "lr": args.judge_lr, "max_length": args.max_length}
    flags |= {"batch_size": args.batch_size}
    study.train("reward_model.py", folder, flags, args.extra)
    return folder


def train(args: Args, name: str, file: Path, method: str, lr: float, seed: int, more: dict) -> tuple[Path, dict]:
    """(folder, summary) of one run."""
    folder = Path(args.runs) / f"{name}-{method}-{lr:g}-seed{seed}"
    flags = {"model": args.model, "data": file, "holdout": 0.2, "lr": lr, "seed": seed, "max_length": args.max_length}
    flags |= {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens, **more, **FLAGS.get(method, {})}
    return folder, study.train(METHODS[args.part][method], folder, flags, args.extra)


def answers_of(args: Args, model: str, prompts: Path, output: Path, seed: int) -> list[dict]:
    """The lines of a model's answers to a file of prompts, sampled where there are none yet."""
    if not output.exists():
        shape = {"temperature": args.temperature, "seed": seed, "max_length": args.max_length}
        answer_file(model, str(prompts), output, 1, args.max_new_tokens, **shape)
    return [line for line in study.read_lines(output) if "answers" in line]


def compare(reward, answers: list[dict], base_answers: list[dict]) -> dict:
    """Win rate of answers against the base model's to the same prompts, plain and at equal length
    in words, and a few of both to read.
    """
    by_row = {line["row"]: line["answers"][0] for line in base_answers}
    prompts = [line["prompt"] for line in answers]
    texts, others = [line["answers"][0] for line in answers], [by_row[line["row"]] for line in answers]
    rewards, other_rewards = reward(prompts, texts), reward(prompts, others)
    wins = wins_of(rewards, other_rewards)
    lengths = torch.tensor([float(len(a.split()) - len(b.split())) for a, b in zip(texts, others)])
    rate, error = length_controlled_rate(wins, lengths)
    numbers = {"win_rate": wins.mean().item(), "win_rate_equal_length": rate, "win_rate_equal_length_se": error}
    numbers |= {"words": sum(len(text.split()) for text in texts) / len(texts), "answers": len(texts)}
    samples = [[prompt[-1]["content"], *both] for prompt, *both in zip(prompts, texts, others)][:SAMPLES]
    return numbers | {"mean_reward": rewards.mean().item(), "samples": samples}


def key_of(args: Args, name: str, method: str, lr: float, seed: int) -> dict:
    """What tells runs apart."""
    key = {"model": Path(args.model).name, "part": args.part, "data": name, "rows": args.rows}
    return key | {"method": method, "lr": lr, "seed": seed}


def line_of(key: dict, summary: dict) -> dict:
    """What is kept of a run."""
    after = {key: summary["after"][key] for key in KEPT if summary["after"].get(key) is not None}
    before = {key: summary["before"][key] for key in KEPT if summary["before"].get(key) is not None}
    costs = {key: summary[key] for key in ("steps", "seconds", "peak_memory_bytes")}
    return key | {"before": before, "after": after, **costs, **study.facts()}


# -- one file of rows, all methods


def best_lr(lines: list[dict], name: str, method: str, seed: int) -> float:
    """The learning rate with the best held-out value of CHOICE among the first seed's runs, of
    equal ones the smallest.

    Raises InputError where a run has no such value, which would decide nothing.
    """
    tried = [line for line in lines if (line["data"], line["method"], line["seed"]) == (name, method, seed)]
    measure = CHOICE[method]
    if any(line["after"].get(measure) is None for line in tried):
        raise InputError(f"{method} on {name}: a run has no held-out {measure}, by which its learning rate is chosen.")
    sign = -1 if measure in LEAST else 1
    return max(tried, key=lambda line: (sign * line["after"][measure], -line["lr"]))["lr"]


def work_on(args: Args, name: str, lines: list[dict]) -> None:
    """Trains and judges all methods of the part on one file; appends to `lines` and to the file."""
    file, judge_file = split_file(args, name)
    judge = judge_of(args, name, judge_file) if args.part == "pairs" else None
    more = {}
    if args.part == "policies":
        halves = {half: judge_of(args, name, judge_file, half) for half in ("first", "second")}
        more, judge = {"reward": halves["first"], "test_reward": halves["second"]}, halves["second"]
    reward = load_reward(str(judge), str(file), torch.device("cpu"), torch.no_grad) if judge else None
    prompts, base_answers = {}, {}
    for seed in args.seeds if reward else ():
        prompts[seed] = held_out_prompts(args, file, seed)
        output = prompts[seed].with_suffix(".base.jsonl")
        base_answers[seed] = answers_of(args, args.model, prompts[seed], output, seed)
    methods = [method for method in METHODS[args.part] if not args.methods or method in args.methods]

    def run(item: tuple[str, float, int]) -> None:
        method, lr, seed = item
        key = key_of(args, name, method, lr, seed)
        if any(key.items() <= line.items() for line in lines):
            return
        folder, summary = train(args, name, file, method, lr, seed, more)
        line = line_of(key, summary)
        if reward:
            answers = answers_of(args, str(folder), prompts[seed], folder / "answers.jsonl", seed)
            line |= compare(reward, answers, base_answers[seed])
        append_json_line(Path(args.output), line)
        lines.append(line)
        print(f"{name} {method} lr {lr:g} seed {seed}: {line['after']} {line.get('win_rate', '')}", flush=True)

    first, *others = args.seeds
    study.side_by_side(run, [(method, lr, first) for method in methods for lr in args.lrs], args.jobs)
    chosen = {method: best_lr(lines, name, method, first) for method in methods}
    study.side_by_side(run, [(method, chosen[method], seed) for method in methods for seed in others], args.jobs)


def print_part(args: Args, name: str, lines: list[dict]) -> None:
    """The table of a file: each method at its learning rate, mean and deviation over seeds."""
    expected = {"model": Path(args.model).name, "part": args.part, "data": name, "rows": args.rows}
    rows, mine = [], [line for line in lines if expected.items() <= line.items()]
    metrics = [key for key in KEPT if any(key in line["after"] for line in mine)]
    more = [key for key in ("win_rate", "win_rate_equal_length", "words") if any(key in line for line in mine)]
    for method in dict.fromkeys(line["method"] for line in mine):
        lr = best_lr(mine, name, method, args.seeds[0])
        runs = [line for line in mine if (line["method"], line["lr"]) == (method, lr)]
        cells = [study.plus_minus([line["after"].get(key) for line in runs]) for key in metrics]
        cells += [study.plus_minus([line.get(key) for line in runs]) for key in more]
        minutes = study.plus_minus([line["seconds"] / 60 for line in runs], 1)
        memory = study.plus_minus([line["peak_memory_bytes"] / 2**30 for line in runs], 1)
        rows.append([method, f"{lr:g}", len(runs), *cells, minutes, memory])
    study.print_table(["method", "lr", "seeds", *metrics, *more, "minutes", "GiB"], rows, f"{args.part}, {name}")


def main(args: Args) -> None:
    """Runs what has no line yet, and prints the tables."""
    known = LABELLED if args.part == "labelled" else PAIRS
    for flag, given, names in (("data", args.data, known), ("methods", args.methods, METHODS[args.part])):
        if odd := sorted(set(given) - set(names)):
            raise InputError(f"--{flag} {' '.join(odd)}: expected some of {', '.join(names)}.")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    lines = study.read_lines(Path(args.output))
    names = args.data or (("hh_harmless",) if args.part == "policies" else tuple(known))
    for name in names:
        work_on(args, name, lines)
        print_part(args, name, lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
