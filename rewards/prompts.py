"""Prompts to sample answers to: rows of a file, and the splits of a run."""

import json

from common import InputError
from common.batches import Rows
from common.data import describe_splits, encode_rows, read_splits
from common.fields import is_messages, is_unicode, names_of, pair_of_row
from common.processes import print0
from toy import base


def prompt_of_row(where: str, row: dict) -> tuple[tuple | None, str | None]:
    """((prompt,), None) or (None, reason): `prompt`, as a string or chat messages, or what both
    sides of a pair begin with."""
    if "prompt" not in row:
        if "chosen" not in row:
            raise InputError(
                f'{where}: no field "prompt"; expected prompt, or chosen and rejected (found {names_of(row)}).'
            )
        texts, reason = pair_of_row(where, row)
        return (texts[:1] if texts else None), reason
    prompt = row["prompt"]
    if not isinstance(prompt, str) and not is_messages(prompt):
        return None, "the prompt is neither text nor chat messages"
    if isinstance(prompt, str) and not prompt.strip():
        return None, "the prompt is empty"
    return ((prompt,), None) if is_unicode(prompt) else (None, "a field is not valid Unicode text")


def load_prompts(
    data: str,
    eval_data: str | None,
    holdout: float,
    seed: int,
    tokenizer,
    max_length: int,
    max_new_tokens: int,
    say=print0,
) -> tuple[dict[str, Rows], str]:
    """Distinct prompts as {"train": Rows, "held_out": Rows, "unseen": Rows (toy only)}, and the
    sha256 of the rows as read.

    A prompt must leave room for `max_new_tokens`. Raises InputError where no row is left."""
    texts, digest = read_splits(data, eval_data, holdout, seed, base.prompts, prompt_of_row)
    splits = {}
    for name, (rows, dropped) in texts.items():
        distinct = list({json.dumps(row, default=str): row for row in rows}.values())
        dropped["the prompt comes again"] += len(rows) - len(distinct)
        splits[name] = encode_rows(tokenizer, distinct, max_length - max_new_tokens, +dropped, answers=0)
    describe_splits(splits, data, eval_data, say)
    return splits, digest
