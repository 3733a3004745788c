"""Scores pairs of a file, or answers its prompts.

    python -m common.evaluate --model runs/my-run --data pairs.jsonl --output scores.jsonl

writes one line per row, in order: row, chosen_logps, rejected_logps, chosen_tokens,
rejected_tokens, and chosen_reward, rejected_reward where the folder has a reward head (a run of
dph.py); lists in place of numbers for a side with several answers; null values and `reason` for a
row that cannot be used.

    python -m common.evaluate --model runs/my-run --generate prompts.jsonl --best-of 8

writes one line per row: row, prompt, answers, and rewards and picked, the number of the answer with
the largest reward, where the folder has a reward head. Interrupted, the same command goes on.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import InputError
from judging.answers import answer_file
from judging.scores import score_file


@dataclass
class Args:
    model: str
    """A folder, a hub id, or toy."""
    data: str = ""
    """A file of preference pairs to score: .jsonl .json .csv .parquet, each also with .gz."""
    generate: str = ""
    """A file of prompts to answer, in place of --data."""
    output: str = "scores.jsonl"
    """Where the lines go; an existing file is refused."""
    max_length: int | None = None
    """Limit in tokens for prompt and one completion; None: the smaller of 1024 and the model's
    context."""
    chat: bool = False
    """Put rows of plain text through the model's chat template."""
    chat_template: str | None = None
    """A Jinja file with a chat template in place of the model's own."""
    batch_size: int = 8
    """--data: sequences in one forward pass."""
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
    """Scores or answers every row of a file; see the module's docstring."""
    if bool(args.data) == bool(args.generate):
        raise InputError("Expected one of --data FILE, to score its pairs, and --generate FILE, to answer its prompts.")
    if args.data:
        where = (args.model, args.data, Path(args.output))
        score_file(*where, args.max_length, args.batch_size, args.chat, args.chat_template)
        return
    ranges = {"best_of": args.best_of >= 1, "max_new_tokens": args.max_new_tokens >= 1}
    ranges |= {"temperature": 0 <= args.temperature < math.inf, "top_p": 0 < args.top_p <= 1}
    for name in (name for name, holds in ranges.items() if not holds):
        raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: out of range.")
    shape = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed, "max_length": args.max_length}
    shape |= {"chat": args.chat, "chat_template": args.chat_template}
    answer_file(args.model, args.generate, Path(args.output), args.best_of, args.max_new_tokens, **shape)


def start() -> None:
    """The command line of `python -m common.evaluate`."""
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)  # tyro would join its lines
    main(tyro.cli(Args, prog="python -m common.evaluate"))
