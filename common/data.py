"""Rows to token ids, and the splits of a run; docs/data.md tells users the conventions.

Text to tokens is the tokenizer's own reading of `prompt + completion`; the prompt's tokens are the
same in all answers of a row; one EOS ends an answer that was not cut; rows that cannot be used are
dropped and counted; a file that cannot be read stops the run with file, line and field.
"""

import hashlib
import json
import random
from collections import Counter

from common import InputError, first_line
from common.batches import Rows
from common.fields import common_prefix, pair_of_row
from common.files import is_row_file, read_hub, read_rows
from common.processes import print0
from toy import base

SPLITS = {"train": "Training rows", "held_out": "Held-out rows", "unseen": "Rows on unseen questions"}


def split_by_prompt(rows: list[tuple], share: float, seed: int) -> tuple[list, list]:
    """(train, held out): `share` of the distinct prompts (a row's first element) is held out."""
    keys = [json.dumps(row[0] or row[1], default=str) for row in rows]  # without a prompt the text itself decides
    distinct = sorted(set(keys))
    random.Random(seed).shuffle(distinct)
    held = set(distinct[: round(share * len(distinct))])
    return [r for r, k in zip(rows, keys) if k not in held], [r for r, k in zip(rows, keys) if k in held]


def encode_row(tokenizer, prompt, answers: list, max_length: int) -> tuple[dict | None, str | None, bool]:
    """Token ids of one prompt and its answers.

    Args:
        prompt: a string, or a list of messages, which goes through the tokenizer's chat template.
            An empty one becomes the token that the tokenizer begins a text with, or EOS where it
            has none.
        answers: strings or lists of messages; none where only the prompt is asked for.
        max_length: limit in tokens for the prompt and one completion; completions lose their end.

    Returns:
        ({"prompt": ids, "completions": [ids, ...]}, None, moved), or (None, reason, False).
        `moved`: the boundary had to be moved to the left, because a token would have crossed it.
        One EOS ends each completion that was not cut.
    """
    eos = tokenizer.eos_token_id
    ids_of = text_ids if isinstance(prompt, str) else chat_ids
    encoded, reason = ids_of(tokenizer, prompt, answers)
    if reason:
        return None, reason, False
    prompt_ids, whole, boundary, ended = encoded
    if boundary == 0:
        return None, "prompt and answers share no token", False
    if boundary >= max_length:
        return None, "the prompt alone fills max_length", False
    whole = [ids if done else [*ids, eos] for ids, done in zip(whole, ended)]
    completions = [ids[boundary:max_length] for ids in whole]
    # A tokenizer that ends every text in EOS puts one behind the prompt: no boundary moved.
    own = len(prompt_ids) - (prompt_ids[-1] == eos)
    return {"prompt": (whole or [prompt_ids])[0][:boundary], "completions": completions}, None, boundary < own


def text_ids(tokenizer, prompt: str, answers: list[str]) -> tuple[tuple | None, str | None]:
    """((prompt ids, ids of prompt + answer for each, boundary, whether each ends in EOS), None)."""
    eos = tokenizer.eos_token_id
    prompt_ids = tokenizer(prompt).input_ids
    whole = [tokenizer(prompt + answer).input_ids for answer in answers]
    if not prompt and not prompt_ids:
        # Nothing precedes the text, not even a token of the tokenizer's: EOS stands for that.
        prompt_ids, whole = [eos], [[eos, *ids] for ids in whole]
    ends_in_eos = len(prompt_ids) > 1 and prompt_ids[-1] == eos  # as some tokenizers end every text
    boundary = min((common_prefix(prompt_ids, ids) for ids in whole), default=len(prompt_ids) - ends_in_eos)
    return (prompt_ids, whole, boundary, [bool(ids) and ids[-1] == eos for ids in whole]), None


def chat_ids(tokenizer, prompt: list[dict], answers: list[list[dict]]) -> tuple[tuple | None, str | None]:
    """The same of chat messages, or (None, reason)."""
    if tokenizer.chat_template is None:
        return None, "chat messages, but the tokenizer has no chat template"
    try:
        texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)]
        texts += [tokenizer.apply_chat_template(prompt + answer, tokenize=False) for answer in answers]
    except Exception as error:  # templates raise what they like: no system role, roles that must alternate
        return None, f"the chat template refuses the messages: {first_line(error)}"
    prompt_ids, *whole = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    boundary = len(prompt_ids)
    if any(ids[:boundary] != prompt_ids for ids in whole):
        return None, "the chat template does not keep the prompt's tokens when an answer follows"
    # Templates put a newline after the end of turn, so the EOS need not be the last token.
    ended = [tokenizer.eos_token_id in ids[boundary:] for ids in whole]
    return (prompt_ids, whole, boundary, ended), None


def encode_rows(tokenizer, texts: list[tuple], max_length: int, dropped=None, answers: int = 2, columns=()) -> Rows:
    """Encodes rows (prompt, answer, ..., value, ...): `answers` answers, then a value for each name
    in `columns`.

    Rows that cannot be used are counted by reason beside those in `dropped`."""
    rows = Rows(seen=len(texts) + sum((dropped or {}).values()), dropped=dropped)
    for text in texts:
        prompt, *rest = text
        row, reason, moved = encode_row(tokenizer, prompt, rest[:answers], max_length)
        if reason:
            rows.dropped[reason] += 1
        else:
            rows.append(row | {"texts": text} | dict(zip(columns, rest[answers:])))
            rows.moved += moved
    return rows


def usable(rows: list[tuple[str, dict]], of_row) -> tuple[list[tuple], Counter]:
    """The usable ones among rows as read, and how many were dropped for which reason."""
    kept, dropped = [], Counter()
    for where, row in rows:
        texts, reason = of_row(where, row)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(texts)
    return kept, dropped


def read_splits(
    data: str, eval_data: str | None, holdout: float, seed: int, of_toy, of_row
) -> tuple[dict[str, tuple[list[tuple], Counter]], str]:
    """The rows of `--data`, before any tokenizer: {split: (rows, how many were dropped for which
    reason)}, and their sha256.

    Splits are "train", "held_out" (`--eval-data`, the data's test split, or a share of the prompts)
    and, on the toy, "unseen".

    Args:
        of_toy: `(seed, flip)` -> {split: rows}, the toy's rows of this kind.
        of_row: `(where, row)` -> ((prompt, ...), None), or (None, reason) for a row to drop.
    """
    if (flip := base.flip_share(data)) is not None:
        splits = {name: ([tuple(row) for row in rows], Counter()) for name, rows in of_toy(seed, flip).items()}
        return splits, sha256_of([rows for rows, _ in splits.values()])
    raw = {"train": read_rows(data)} if is_row_file(data) else read_hub(data)
    if eval_data:
        raw["test"] = read_rows(eval_data)
    digest = sha256_of([row for rows in raw.values() for _, row in rows])
    train, dropped = usable(raw["train"], of_row)
    if "test" in raw:
        return {"train": (train, dropped), "held_out": usable(raw["test"], of_row)}, digest
    train, held_out = split_by_prompt(train, holdout, seed)
    return {"train": (train, dropped), "held_out": (held_out, Counter())}, digest


def describe_splits(splits: dict[str, Rows], data: str, eval_data: str | None, say) -> None:
    """Says what was read and dropped; InputError where no row is left to train or evaluate on."""
    for name, rows in splits.items():
        say(rows.describe(SPLITS[name]))
    uses = {"train": (f"--data {data}", "train on"), "held_out": (f"--eval-data {eval_data}", "evaluate on")}
    for name, (flag, use) in uses.items():
        if not splits[name] and (name == "train" or eval_data):
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in splits[name].dropped.most_common())
            raise InputError(f"{flag}: no usable row is left to {use} ({reasons or 'all were held out'}).")


def load_pairs(data: str, eval_data: str | None, holdout: float, seed: int, tokenizer, max_length: int, say=print0):
    """Preference pairs as {"train": Rows, "held_out": Rows, "unseen": Rows (toy only)}, and the
    sha256 of the rows as read.

    Drops are counted by reason and said. Raises InputError where no row is left."""
    texts, digest = read_splits(data, eval_data, holdout, seed, base.pairs, pair_of_row)
    splits = {name: encode_rows(tokenizer, pairs, max_length, dropped) for name, (pairs, dropped) in texts.items()}
    describe_splits(splits, data, eval_data, say)
    return splits, digest


def sha256_of(value: object) -> str:
    """Hash of a JSON value, the same for the same rows however the file is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
