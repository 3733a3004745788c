"""Scores pairs of a file, answers its prompts, runs multiple-choice tasks, or measures perplexity.

    python -m common.evaluate --model runs/my-run --data pairs.jsonl --output scores.jsonl

writes one line per row, in order: row, chosen_logps, rejected_logps, chosen_tokens,
rejected_tokens, and chosen_reward, rejected_reward where the folder has a reward head (a run of
dph.py or reward_model.py); lists in place of numbers for a side with several answers; null values
and `reason` for a row that cannot be used. Rows with `subset` are counted by it at the end.

    python -m common.evaluate --model runs/my-run --generate prompts.jsonl --best-of 8

writes one line per row: row, prompt, answers, and rewards and picked, the number of the answer with
the largest reward, where the folder has a reward head. Interrupted, the same command goes on.

    python -m common.evaluate --model runs/my-run --tasks gpt4all,glue --score both
    python -m common.evaluate --model runs/my-run --perplexity wikitext.txt

run tasks of lm-eval by log-probability and by reward, and read a text; results.json has all
numbers. --write-tasks DIR --files DATA makes task files of data at hand, for --tasks-dir DIR.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from common import InputError
from common.files import write_json
from common.models import length_limit, load_model, load_tokenizer, resolve_model, sha256_of_model
from judging import tasks
from judging.answers import answer_file
from judging.heads import refuse_classifier
from judging.local_tasks import write_tasks
from judging.perplexity import perplexity_of_text, read_text
from judging.scores import score_file
from report.facts import machine

PERPLEXITIES = ("token_perplexity", "word_perplexity", "bits_per_byte")  # printed, in this order


@dataclass
class Args:
    model: str = ""
    """A folder, a hub id, or toy."""
    data: str = ""
    """A file of preference pairs to score: .jsonl .json .csv .parquet, each also with .gz."""
    generate: str = ""
    """A file of prompts to answer, in place of --data."""
    tasks: str = ""
    """Multiple-choice tasks: gpt4all, glue, or names of lm-eval's, with commas between."""
    perplexity: str = ""
    """A text file, .txt or .txt.gz, to measure the perplexity of; with --tasks or alone."""
    output: str = ""
    """Where the lines or numbers go; an existing file is refused. Empty: scores.jsonl; with --tasks
    or --perplexity results.json."""
    max_length: int | None = None
    """Limit in tokens for prompt and one completion, and for a window of --perplexity; None: the
    smaller of 1024 and the model's context."""
    chat: bool = False
    """Put rows of plain text through the model's chat template."""
    chat_template: str | None = None
    """A Jinja file with a chat template in place of the model's own."""
    batch_size: int = 8
    """--data, --tasks: sequences in one forward pass."""
    score: Literal["logprob", "reward", "both"] = "logprob"
    """--tasks: what a choice is judged by."""
    tasks_dir: str = ""
    """--tasks: a folder of lm-eval's task files that come before its own."""
    limit: int | None = None
    """--tasks: rows of each task, the first ones; None: all."""
    stride: int | None = None
    """--perplexity: tokens by which a window moves; None: as many as it holds."""
    write_tasks: str = ""
    """A folder to write task files for the data files of --files to."""
    files: str = ""
    """--write-tasks: a folder of data files such as hellaswag_val.jsonl.gz."""
    best_of: int = 1
    """--generate: answers sampled for each prompt, of which the reward head picks one."""
    max_new_tokens: int = 256
    """--generate: length limit of an answer, in tokens."""
    temperature: float = 1.0
    """--generate: of the sampled tokens; 0: always the likeliest."""
    top_p: float = 1.0
    """--generate: tokens are sampled from the likeliest ones that have this probability."""
    seed: int = 0
    """--generate: seed of the sampling."""


def main(args: Args) -> None:
    """Does what the one of the flags asks for; see the module's docstring."""
    asked = [args.data, args.generate, args.tasks or args.perplexity, args.write_tasks]
    if sum(map(bool, asked)) != 1:
        raise InputError(
            "Expected one of --data FILE, to score its pairs, --generate FILE, to answer its prompts, "
            "--tasks NAMES and --perplexity FILE, alone or together, and --write-tasks DIR."
        )
    if args.write_tasks:
        names = write_tasks(args.write_tasks, args.files)
        print(f"{len(names)} tasks written to {args.write_tasks}: {', '.join(names)}.")
        return
    if not args.model:
        raise InputError("--model: expected a folder, a hub id, or toy.")
    ranges = {"best_of": args.best_of >= 1, "max_new_tokens": args.max_new_tokens >= 1}
    ranges |= {"temperature": 0 <= args.temperature < math.inf, "top_p": 0 < args.top_p <= 1}
    ranges |= {"limit": args.limit is None or args.limit >= 1, "batch_size": args.batch_size >= 1}
    for name in (name for name, holds in ranges.items() if not holds):
        raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: out of range.")
    output = Path(args.output or ("results.json" if args.tasks or args.perplexity else "scores.jsonl"))
    if args.data:
        where = (args.model, args.data, output)
        score_file(*where, args.max_length, args.batch_size, args.chat, args.chat_template)
    elif args.generate:
        shape = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        shape |= {"max_length": args.max_length, "chat": args.chat, "chat_template": args.chat_template}
        answer_file(args.model, args.generate, output, args.best_of, args.max_new_tokens, **shape)
    else:
        measure(args, output)


def measure(args: Args, output: Path) -> None:
    """--tasks and --perplexity: prints the numbers and writes them."""
    if output.exists():
        raise InputError(f"--output {output}: the file exists already; choose another name.")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}.")
    text = read_text(args.perplexity) if args.perplexity else ""  # before any work
    folder = resolve_model(args.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {"model": args.model, "model_sha256": sha256_of_model(folder), **machine(device)}
    if args.perplexity:
        refuse_classifier(args.model, folder, "--perplexity")
        tokenizer = load_tokenizer(folder)
        model = load_model(folder, device, tokenizer).eval()
        numbers = perplexity_of_text(model, tokenizer, text, length_limit(args.max_length, model), args.stride)
        words = ", ".join(f"{name.replace('_', ' ')} {numbers[name]:.4f}" for name in PERPLEXITIES)
        print(f"{args.perplexity}: {numbers['tokens']:,} tokens, {numbers['words']:,} words; {words}.")
        results["perplexity"] = {"file": args.perplexity, **numbers}
    if args.tasks:
        how = {"batch_size": args.batch_size, "chat": args.chat, "chat_template": args.chat_template}
        where = (folder, args.model, args.tasks, args.score, args.tasks_dir)
        summary = tasks.run_tasks(*where, limit=args.limit, **how)
        tasks.print_table(summary)
        results |= {"limit": args.limit, "chat": args.chat, **summary}
    write_json(output, results)
    print(f"Written to {output}.")


def start() -> None:
    """The command line of `python -m common.evaluate`."""
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)  # tyro would join its lines
    main(tyro.cli(Args, prog="python -m common.evaluate"))
