"""Prompts to sample answers to: rows of a file, and the splits of a run."""

import json

from chat.messages import CHATS, is_messages, prompt_of_chat, read_chat
from common import InputError
from common.batches import Rows
from common.data import load_splits, read_splits
from common.fields import is_unicode, names_of, pair_of_row
from common.processes import print0
from toy import base


def prompt_of_row(where: str, row: dict) -> tuple[tuple | None, str | None]:
    """((prompt,), None) or (None, reason): `prompt`, as a string or chat messages, what both sides
    of a pair begin with, or what a whole chat asks."""
    field = next((name for name in ("prompt", "chosen", *CHATS) if name in row), None)
    if field is None:
        raise InputError(
            f'{where}: no field "prompt"; expected prompt, chosen and rejected, or messages (found {names_of(row)}).'
        )
    if field == "chosen":
        texts, reason = pair_of_row(where, row)
        return (texts[:1] if texts else None), reason
    prompt, reason = read_chat(row[field])
    if not reason and field in CHATS and is_messages(prompt):
        prompt, reason = prompt_of_chat(prompt)
    if reason:
        return None, reason
    if not is_messages(prompt) and (field in CHATS or not isinstance(prompt, str)):
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
    chat: bool = False,
) -> tuple[dict[str, Rows], str]:
    """Distinct prompts as {"train": Rows, "held_out": Rows, "unseen": Rows (toy only)}, and the
    sha256 of the rows as read.

    A prompt must leave room for `max_new_tokens`. Raises InputError where no row is left."""
    source = (data, eval_data, holdout, seed)

    def read(say) -> tuple[dict, dict]:
        texts, digest = read_splits(*source, base.prompts, prompt_of_row)
        for name, (rows, dropped) in texts.items():
            distinct = list({json.dumps(row, default=str): row for row in rows}.values())
            dropped["the prompt comes again"] += len(rows) - len(distinct)
            texts[name] = (distinct, +dropped)
        return texts, {"data_sha256": digest}

    limit = max_length - max_new_tokens
    splits, facts = load_splits(source, "prompts", tokenizer, limit, read, say, chat, answers=0)
    return splits, facts["data_sha256"]
