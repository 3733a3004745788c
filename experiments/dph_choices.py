"""Direct Preference Heads on multiple choice, the paper's study in small: does a reward head choose
better than the language model that it sits on, and is that model unharmed?

    python -m experiments.dph_choices --model SmolLM2-135M-Instruct

Of each task's training file, below $PREFERENCE_DATA/eval, `--rows` questions become pairs of the
right choice and a wrong one, all tasks in one file; questions whose prompt stands in a test file
are left out. SFT, DPO, cDPO and DPH train on it: DPH with either loss, jointly with cDPO, with the
head's loss alone, and on a frozen backbone.

Equal tuning: each method runs at three learning rates with the first seed. The one whose run finds
the right choice of most of `--held-out` further questions of each training file counts, the smaller
of two that are equal; the other seeds run at it. DPH's runs choose by the head there, all others by
the mean log-probability of a token.

The runs at that learning rate then answer `--limit` questions drawn of each test file, of the tasks
trained on and of others, by the log-probability of each choice, by its ratio to the base model's,
and by the head.
Every run adds a line to results/dph_choices.jsonl, and one that has its line is not made again.
"""

import json
import math
import os
import random
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/dph_choices.py

from choices.templates import Question, question_of_row
from common import InputError
from common.data import sha256_of
from common.files import append_json_line, decode_text, plain, read_bytes, read_json, read_rows, write_json, write_text
from common.models import choose_dtype, load_model, load_tokenizer, load_weights
from common.oracle import plain_logps
from experiments import study
from judging.choices import SCORERS, read_questions, right_by, score_questions

FILES = {  # task: (training file, test file), named as lm-eval's tasks are
    "arc_easy": ("arc_easy_train", "arc_easy_test"),
    "arc_challenge": ("arc_challenge_train", "arc_challenge_test"),
    "openbookqa": ("openbookqa_train", "openbookqa_test"),
    "sst2": ("sst2_train", "sst2_dev"),
    "mrpc": ("mrpc_train", "mrpc_val"),
    "cola": ("cola_train", "cola_val"),
}
TESTS = {task: test for task, (_, test) in FILES.items()}
OTHERS = {"hellaswag": "hellaswag_val", "piqa": "piqa_val", "boolq": "boolq_val", "winogrande": "winogrande_val"}
HEAD_ALONE, FROZEN = {"dpo_weight": 0.0}, {"freeze_backbone": True}
SEPARABLE, CONTRASTIVE = {"dph_loss": "separable"}, {"dph_loss": "contrastive"}
METHODS = {  # name -> (script, its flags)
    "sft": ("sft.py", {}),
    "dpo": ("dpo.py", {}),
    "cdpo": ("cdpo.py", {}),
    "dph separable": ("dph.py", SEPARABLE),
    "dph contrastive": ("dph.py", CONTRASTIVE),
    "dph separable, head alone": ("dph.py", SEPARABLE | HEAD_ALONE),
    "dph contrastive, head alone": ("dph.py", CONTRASTIVE | HEAD_ALONE),
    "dph separable, frozen": ("dph.py", SEPARABLE | FROZEN),
    "dph contrastive, frozen": ("dph.py", CONTRASTIVE | FROZEN),
}
BASE = ("base", 0.0, 0)  # the run that is none
RUN = ("method", "lr", "seed")
BED = (  # arguments whose runs cannot be compared where they differ
    "tasks others rows held_out all_wrong limit text_tokens head_factor epochs batch_size beta max_length extra"
).split()
SPLIT_SEED = 0  # of the draws of rows and questions, and of the held-out prompts: the same for all runs


@dataclass
class Args:
    model: str
    """Folder of the model that training begins with, a base or a chat model."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Only these methods, by the names in METHODS."""
    tasks: tuple[str, ...] = tuple(FILES)
    """Tasks to train on and to test."""
    others: tuple[str, ...] = tuple(OTHERS)
    """Tasks that are tested only."""
    rows: int = 200
    """Questions of each training file to train on."""
    held_out: int = 50
    """Further ones, which decide between learning rates."""
    all_wrong: bool = False
    """Pairs with each wrong choice, not with one."""
    limit: int = 200
    """Questions drawn of each test file."""
    text_tokens: int = 8192
    """Tokens of WikiText-2 whose perplexity is measured; 0: none."""
    lrs: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    """Learning rates that each method tries with the first seed."""
    head_factor: float = 100.0
    """A head's learning rate in multiples of --lrs, on a frozen backbone too; it begins at 0."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the order of the pairs; the first one decides between learning rates."""
    epochs: float = 1.0
    """Passes over the pairs."""
    batch_size: int = 16
    """Pairs in one step."""
    beta: float = 0.1
    """Of DPO, and of cDPO alone and in DPH; the paper's value."""
    max_length: int = 512
    """Tokens of a prompt and one choice in training."""
    jobs: int = 1
    """Runs side by side, one thread each."""
    keep_weights: bool = False
    """Leave the weights of runs that have their line in their folders."""
    runs: str = "runs/dph_choices"
    """Where run folders and files of rows go."""
    output: str = "results/dph_choices.jsonl"
    """The file of lines."""
    extra: str = ""
    """More words for every script's command line: --extra="--max-steps 2"."""


# -- rows


def data_folder() -> Path:
    """$PREFERENCE_DATA."""
    if not (root := os.environ.get("PREFERENCE_DATA", "")):
        raise InputError("PREFERENCE_DATA is not set; expected the folder that holds eval/ and text/.")
    return Path(root)


def rows_of(name: str) -> list[tuple[dict, Question]]:
    """The usable rows of a file below eval/, in an order that is drawn once: some of the files are
    sorted by their source."""
    source, found = str(data_folder() / "eval" / f"{name}.jsonl.gz"), []
    for where, row in read_rows(source):
        question, reason = question_of_row(source, where, row)
        if not reason:
            found.append((row, question))
    random.Random(SPLIT_SEED).shuffle(found)
    return found


def write_rows(path: Path, rows: list[dict]) -> None:
    """A .jsonl file of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_files(args: Args, folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The files of training rows, {"train", "held_out"}, and of test questions by task.

    Rows keep their fields, and test files the names that `python -m common.evaluate` knows them by.
    """
    tests, prompts = {}, set()
    for task, name in (only(TESTS, args.tasks) | only(OTHERS, args.others)).items():
        rows = rows_of(name)
        prompts |= {question.prompts[0] for _, question in rows}
        tests[task] = folder / "test" / f"{name}.jsonl"
        write_rows(tests[task], [row for row, _ in rows[: args.limit]])
    splits: dict[str, list[dict]] = {"train": [], "held_out": []}
    for task in args.tasks:
        distinct = {question.prompts[0]: row for row, question in rows_of(FILES[task][0])}
        # The name tells CoLA from SST-2, and MRPC from RTE, in a file of all tasks.
        name = "arc" if task.startswith("arc") else task
        rows = [row | {"task": name} for prompt, row in distinct.items() if prompt not in prompts]
        splits["held_out"] += rows[: args.held_out]
        splits["train"] += rows[args.held_out : args.held_out + args.rows]
    for name, rows in splits.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return {name: folder / f"{name}.jsonl" for name in splits}, tests


def only(table: dict, names: tuple[str, ...]) -> dict:
    """The entries of these names."""
    return {name: table[name] for name in names}


# -- what a model answers


def load(folder: str) -> SimpleNamespace:
    """The model of a folder, its tokenizer, its reward head or None, and the type of products."""
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, "cpu", tokenizer).eval()
    head = load_weights(folder, "score.weight").get("score.weight")  # [1, hidden]
    dtype = getattr(torch, choose_dtype("auto", model, torch.device("cpu")))
    return SimpleNamespace(model=model, tokenizer=tokenizer, head=head, dtype=dtype)


def scores_of(loaded, questions: dict[str, list[Question]]) -> dict[str, list[dict]]:
    """The scores of the questions of each task."""
    flat = [question for each in questions.values() for question in each]
    scores = iter(score_questions(loaded.model, loaded.tokenizer, flat, loaded.head, loaded.dtype))
    return {task: [next(scores) for _ in each] for task, each in questions.items()}


def answers_of(questions: dict, scores: dict, base_scores: dict | None = None) -> dict:
    """What a run's line keeps of its answers: {"accuracy", "right"}, task -> scorer -> share, and
    which."""
    right = {
        task: right_by(each, scores[task], base_scores[task] if base_scores else None)
        for task, each in questions.items()
    }
    shares = {task: {name: sum(hits) / len(hits) for name, hits in found.items()} for task, found in right.items()}
    packed = {task: {name: pack(hits) for name, hits in found.items()} for task, found in right.items()}
    return {"accuracy": shares, "right": packed}


def most_frequent(questions: list[Question]) -> float:
    """The accuracy of who always takes the choice, by number, that is right most often."""
    return max(Counter(question.right for question in questions).values()) / len(questions)


def perplexity(loaded, tokens: int) -> float | None:
    """Of the first tokens of WikiText-2's test text, in windows of 512 that see nothing before."""
    if not tokens:
        return None
    path = data_folder() / "text" / "wikitext2_test.txt.gz"
    ids = loaded.tokenizer(decode_text(str(path), read_bytes(path)), verbose=False).input_ids[:tokens]
    windows = [ids[i : i + 512] for i in range(0, len(ids), 512)]
    sequences = [(window[:1], window[1:]) for window in windows if len(window) > 1]
    with torch.autocast("cpu", torch.bfloat16, enabled=loaded.dtype == torch.bfloat16):
        logps = plain_logps(loaded.model, sequences, loaded.tokenizer.pad_token_id, 1)
    return math.exp(-logps.double().sum().item() / sum(len(rest) for _, rest in sequences))


def pack(right: list[bool]) -> str:
    """Which questions were answered right, as a hexadecimal number: a 1, then a bit for each."""
    return f"{int('1' + ''.join(str(int(value)) for value in right), 2):x}"


def unpack(digits: str) -> torch.Tensor:
    """What `pack` packed, [questions] of 0. and 1., float64."""
    return torch.tensor([float(bit) for bit in f"{int(digits, 16):b}"[1:]], dtype=torch.float64)


# -- runs


def bed_of(args: Args) -> dict:
    """What all lines that are compared have in common."""
    return {"model": Path(args.model).name} | {name: plain(getattr(args, name)) for name in BED}


def folder_of(args: Args) -> Path:
    """Where the runs, rows and scores of this bed are."""
    return Path(args.runs) / sha256_of(bed_of(args))[:8]


def run_folder(args: Args, method: str, lr: float, seed: int) -> Path:
    """Where a run is."""
    return folder_of(args) / f"{method.replace(',', '').replace(' ', '-')}-{lr:g}-seed{seed}"


def train(args: Args, file: Path, method: str, lr: float, seed: int) -> dict:
    """The summary of a run, which is made where it is not there, weights and all."""
    script, flags = METHODS[method]
    folder = run_folder(args, method, lr, seed)
    if (folder / "summary.json").exists() and not list(folder.glob("*.safetensors")):
        shutil.rmtree(folder)  # its weights were dropped
    data = f"{'choices-all' if args.all_wrong else 'choices'}:{file}"
    flags = {"model": args.model, "data": data, "holdout": 0.0, "lr": lr, "seed": seed} | flags
    flags |= {"epochs": args.epochs, "batch_size": args.batch_size, "micro_batch_size": args.batch_size}
    flags |= {"max_length": args.max_length, "kl_samples": 0}
    if script != "sft.py":
        flags["beta"] = args.beta
    if script == "dph.py" and not is_frozen(method):
        flags["head_lr"] = head_lr(args, lr)
    return study.train(script, folder, flags, args.extra)


def head_lr(args: Args, lr: float) -> float:
    """The head's learning rate beside that of the backbone, without the tail of a product."""
    return float(f"{args.head_factor * lr:g}")


def is_frozen(method: str) -> bool:
    """Whether only a head is trained, which takes learning rates of its own."""
    return "freeze_backbone" in METHODS[method][1]


def costs_of(summary: dict) -> dict:
    """What a run took."""
    return {name: summary[name] for name in ("steps", "seconds", "peak_memory_bytes")}


def best_lr(lines: list[dict], method: str) -> float:
    """The learning rate of the method's tuning run with the largest held-out share; of equal ones
    the smallest."""
    tried = [line for line in lines if (line["stage"], line["method"]) == ("tuning", method)]
    return max(tried, key=lambda line: (line["share"], -line["lr"]))["lr"]


class Study:
    """The lines of a bed, and what makes those that are missing."""

    def __init__(self, args: Args):
        self.args, self.output = args, Path(args.output)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [line for line in study.read_lines(self.output) if bed_of(args).items() <= line.items()]
        files, tests = write_files(args, folder_of(args) / "rows")
        self.train_file, self.held_out = files["train"], read_questions(str(files["held_out"]))[0]
        self.tests = {task: read_questions(str(path))[0] for task, path in tests.items()}
        self.base_scores: dict = {}

    def has(self, stage: str, run: tuple) -> bool:
        """Whether a run (method, learning rate, seed) has its line; stage: tuning or answers."""
        return any((line["stage"], *run_of(line)) == (stage, *run) for line in self.lines)

    def add(self, stage: str, run: tuple, content: dict, words: str) -> None:
        """Keeps a line, and says so."""
        line = bed_of(self.args) | {"stage": stage, **dict(zip(RUN, run)), **content, **study.facts()}
        append_json_line(self.output, line)
        self.lines.append(line)
        print(f"{stage}: {run[0]}, lr {run[1]:g}, seed {run[2]}: {words}", flush=True)

    def answer_base(self) -> None:
        """The base model's answers; its scores are kept beside the runs, which are compared with
        them."""
        kept = folder_of(self.args) / "base_scores.json"
        if not kept.exists() or not self.has("answers", BASE):
            loaded = load(self.args.model)
            scores = scores_of(loaded, self.tests)
            write_json(kept, scores)
            if not self.has("answers", BASE):
                content = {"most_frequent": {task: most_frequent(each) for task, each in self.tests.items()}}
                self.add_answers(BASE, loaded, scores, content)
        self.base_scores = read_json(kept)

    def add_answers(self, run: tuple, loaded, scores: dict, content: dict) -> None:
        """Keeps the line of a run's, or the base model's, answers."""
        content |= answers_of(self.tests, scores, self.base_scores)
        content["perplexity"] = perplexity(loaded, self.args.text_tokens)
        self.add("answers", run, content, means_of(content["accuracy"]))

    def tune(self, run: tuple) -> None:
        """A run's share of the held-out questions."""
        if not self.has("tuning", run):
            summary = train(self.args, self.train_file, *run)
            scores = scores_of(load(str(run_folder(self.args, *run))), {"held_out": self.held_out})
            shares = answers_of({"held_out": self.held_out}, scores)["accuracy"]["held_out"]
            # A head that gives all choices the same has learned nothing.
            share = shares.get("acc_head" if run[0].startswith("dph") else "acc_token", 0.0)
            self.add("tuning", run, {"share": share, **costs_of(summary)}, f"{share:.3f} of the held-out questions")

    def answer(self, run: tuple) -> None:
        """A run's answers to the test questions."""
        if not self.has("answers", run):
            summary = train(self.args, self.train_file, *run)
            loaded = load(str(run_folder(self.args, *run)))
            self.add_answers(run, loaded, scores_of(loaded, self.tests), costs_of(summary))

    def work_on(self, method: str) -> None:
        """All runs of a method: tuning with the first seed, then every seed's answers."""
        args = self.args
        first, *others = args.seeds
        lrs = [head_lr(args, lr) for lr in args.lrs] if is_frozen(method) else args.lrs
        tried = [(method, lr, first) for lr in lrs]
        study.side_by_side(self.tune, tried, args.jobs)
        lr = best_lr(self.lines, method)
        chosen = [(method, lr, seed) for seed in (first, *others)]
        study.side_by_side(self.answer, chosen, args.jobs)
        if not args.keep_weights:
            for run in {*tried, *chosen}:
                drop_weights(run_folder(args, *run))


def run_of(line: dict) -> tuple:
    """What tells the lines of a bed apart."""
    return tuple(line[name] for name in RUN)


def drop_weights(folder: Path) -> None:
    """Removes the weights of a finished run: half a gigabyte each of a model of 135M."""
    for path in folder.glob("*.safetensors"):
        path.unlink()


# -- tables


def mean_over(accuracy: dict, tasks: tuple[str, ...], scorer: str) -> float | None:
    """Plain average of a scorer's accuracy over tasks; None where it has none."""
    values = [accuracy[task].get(scorer) for task in tasks]
    return None if not values or None in values else sum(values) / len(values)


def means_of(accuracy: dict) -> str:
    """The averages over all tasks, for a line of progress."""
    means = {name: mean_over(accuracy, tuple(accuracy), name) for name in SCORERS}
    return ", ".join(f"{name} {value:.3f}" for name, value in means.items() if value is not None)


def difference(ours: list[dict], our_scorer: str, others: list[dict], scorer: str, tasks: tuple[str, ...]):
    """(mean difference of accuracies, half the width of its 95% interval) of two groups of lines
    over the same questions, averaged over tasks; None where a scorer is missing.

    Of each question the mean over the lines (seeds) of a group counts, so the interval says what
    other questions would do, not other seeds."""
    means, variances = [], []
    for task in tasks:
        sides = []
        for lines, name in ((ours, our_scorer), (others, scorer)):
            if not lines or any(name not in line["right"][task] for line in lines):
                return None
            sides.append(torch.stack([unpack(line["right"][task][name]) for line in lines]).mean(0))
        gaps = sides[0] - sides[1]  # [questions]
        means.append(gaps.mean().item())
        variances.append(gaps.var(correction=1).item() / len(gaps))
    return (sum(means) / len(tasks), 1.96 * math.sqrt(sum(variances)) / len(tasks)) if tasks else None


def comparisons(by_method: dict[str, list[dict]], tasks: tuple[str, ...], others: tuple[str, ...]) -> list[list[str]]:
    """Rows of the table of differences."""
    rows = []
    for method, lines in by_method.items():
        asked = []
        if method.startswith("dph"):
            than = [(name, "LM", "acc_token") for name in (method, "base", "sft", "dpo")]
            than += [("dpo", "implicit reward", "acc_implicit")]
            asked = [("its head", "acc_head", *each, tasks) for each in than]
        if method != "base":
            asked += [("its LM", "acc_token", "base", "LM", "acc_token", part) for part in (tasks, others)]
        for what, ours, other, whose, scorer, part in asked:
            found = difference(lines, ours, by_method.get(other, []), scorer, part)
            if found:
                where = "trained tasks" if part is tasks else "other tasks"
                than = f"its own {whose}" if other == method else f"{whose} of {other}"
                rows.append([f"{method}: {what} - {than}", where, f"{found[0]:+.3f} +- {found[1]:.3f}"])
    return rows


def print_tables(args: Args, lines: list[dict]) -> None:
    """Accuracies of each method by each scorer, then paired differences."""
    by_method: dict[str, list[dict]] = {}
    for line in lines:
        method = line["method"]
        if line["stage"] == "answers" and (method == "base" or line["lr"] == best_lr(lines, method)):
            by_method.setdefault(method, []).append(line)
    tasks, rows = (*args.tasks, *args.others), []
    if base := by_method.get("base"):
        same = base[0]["most_frequent"]
        rows.append(["the most frequent choice", "", "", *(f"{same[task]:.2f}" for task in tasks), "", "", ""])
    for method, group in by_method.items():
        for scorer in SCORERS:
            of_runs = [line["accuracy"] for line in group if scorer in line["accuracy"][tasks[0]]]
            if of_runs:
                cells = [study.plus_minus([each[task].get(scorer) for each in of_runs]) for task in tasks]
                for part in (args.tasks, args.others):
                    cells.append(study.plus_minus([mean_over(each, part, scorer) for each in of_runs], 3))
                texts = study.plus_minus([line.get("perplexity") for line in group]) if scorer == "acc" else ""
                rows.append([method, scorer, f"{group[0]['lr']:g}", *cells, texts])
    heads = ["method", "ranked by", "lr", *tasks, "mean, trained", "mean, others", "WikiText-2"]
    study.print_table(heads, rows, f"Accuracy on {args.limit} questions of each task")
    for scorer, words in SCORERS.items():
        print(f"{scorer}: {words}")
    rows = comparisons(by_method, args.tasks, args.others)
    study.print_table(["difference of accuracies", "averaged over", "95% interval"], rows, "Over the same questions")


def main(args: Args) -> None:
    """Runs what has no line yet, and prints the tables."""
    names = {"methods": (args.methods, METHODS), "tasks": (args.tasks, FILES), "others": (args.others, OTHERS)}
    for flag, (given, known) in names.items():
        odd = sorted(set(given) - set(known))
        if odd or (not given and flag != "others"):
            raise InputError(f"--{flag} {' '.join(odd) or '(none)'}: expected some of {', '.join(known)}.")
    transformers.utils.logging.set_verbosity_error()  # a causal model is no loss of the head beside it
    work = Study(args)
    work.answer_base()
    for method in args.methods:
        work.work_on(method)
    print_tables(args, work.lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
