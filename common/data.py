"""The rows of a run in their splits; docs/data.md tells users the conventions.

Rows that cannot be used are dropped and counted; a file that cannot be read stops the run with
file, line and field.
"""

import hashlib
import json
import random
from collections import Counter

from chat import templates
from choices.templates import file_of, is_choices, pairs_of_choices
from common import InputError
from common.batches import Rows
from common.fields import pair_of_row
from common.files import is_row_file, read_hub, read_rows
from common.processes import print0
from tokens.encode import encode_row as encode_row
from tokens.encode import encode_rows as encode_rows
from tokens.store import load_encoded
from toy import base

SPLITS = {"train": "Training rows", "held_out": "Held-out rows", "unseen": "Rows on unseen questions"}


def split_by_prompt(rows: list[tuple], share: float, seed: int) -> tuple[list, list]:
    """(train, held out): `share` of the distinct prompts (a row's first element) is held out."""
    keys = [json.dumps(row[0] or row[1], default=str) for row in rows]  # without a prompt the text itself decides
    distinct = sorted(set(keys))
    random.Random(seed).shuffle(distinct)
    held = set(distinct[: round(share * len(distinct))])
    return [r for r, k in zip(rows, keys) if k not in held], [r for r, k in zip(rows, keys) if k in held]


def usable(rows: list[tuple[str, dict]], of_row, source: str = "") -> tuple[list[tuple], Counter]:
    """The usable ones among rows as read, and how many were dropped for which reason; rows of
    `choices:FILE` become pairs first."""
    rows, dropped = pairs_of_choices(source, rows) if is_choices(source) else (rows, Counter())
    kept = []
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
        of_toy: `(seed, **base.settings_of(data))` -> {split: rows}, the toy's rows of this kind.
        of_row: `(where, row)` -> ((prompt, ...), None), or (None, reason) for a row to drop.
    """
    if settings := base.settings_of(data):
        splits = {name: ([tuple(row) for row in rows], Counter()) for name, rows in of_toy(seed, **settings).items()}
        return splits, sha256_of([rows for rows, _ in splits.values()])
    name = file_of(data)
    raw = {"train": read_rows(name)} if is_row_file(name) else read_hub(name)
    if eval_data:
        raw["test"] = read_rows(file_of(eval_data))
    digest = sha256_of([row for rows in raw.values() for _, row in rows])
    train, dropped = usable(raw["train"], of_row, data)
    if "test" in raw:
        return {"train": (train, dropped), "held_out": usable(raw["test"], of_row, eval_data or data)}, digest
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


def load_splits(source: tuple, kind, tokenizer, max_length: int, read, say, chat=False, **options):
    """({split: Rows}, facts) of `--data`, drops said by reason; InputError where no row is left.

    Args:
        source: (data, eval_data, holdout, seed).
        kind: what rows are read as, with all options that decide which come out.
        read: (say) -> ({split: (rows, dropped)}, facts), with "data_sha256" and "text", whether
            there are rows of plain text, added to the facts of `read_splits`.
        chat: whether strings go through the chat template.
        options: of `encode_rows`.
    """
    data, eval_data, *_ = source
    is_toy = base.settings_of(data) is not None
    base.check_tokenizer(data, tokenizer)
    if chat:
        templates.check_chat(tokenizer, is_toy)

    def read_and_remember() -> tuple[dict, dict]:
        """Words are kept, to be said again where the rows come from the disk."""
        words: list[str] = []
        texts, facts = read(words.append)
        prompts = (row[0] for rows, _ in texts.values() for row in rows)
        return texts, facts | {"words": words, "hint": templates.hint(tokenizer, prompts)}

    sources = [] if is_toy else [data, *filter(None, [eval_data])]
    settings = {"kind": kind, "eval_data": bool(eval_data), "split": source[2:]}
    settings["choices"] = [name for name in sources if is_choices(name)]  # a file's name may tell its task
    sources = [file_of(name) for name in sources]
    splits, facts = load_encoded(sources, settings, tokenizer, max_length, read_and_remember, chat=chat, **options)
    if chat or hasattr(tokenizer, "has_given_template"):  # another template would make other rows of them
        facts["data_sha256"] = sha256_of([facts["data_sha256"], tokenizer.chat_template])
    for words in [*facts["words"], *([facts["hint"]] if facts["hint"] and not chat and not is_toy else [])]:
        say(words)
    describe_splits(splits, data, eval_data, say)
    return splits, facts


def load_pairs(
    data: str, eval_data: str | None, holdout: float, seed: int, tokenizer, max_length: int, say=print0, chat=False
):
    """Preference pairs as {"train": Rows, "held_out": Rows, "unseen": Rows (toy only)}, and the
    sha256 of the rows as read."""
    source = (data, eval_data, holdout, seed)

    def read(say) -> tuple[dict, dict]:
        texts, digest = read_splits(*source, base.pairs, pair_of_row)
        return texts, {"data_sha256": digest}

    splits, facts = load_splits(source, "pairs", tokenizer, max_length, read, say, chat)
    return splits, facts["data_sha256"]


def sha256_of(value: object) -> str:
    """Hash of a JSON value, the same for the same rows however the file is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
