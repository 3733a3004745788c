"""Labelled answers and demonstrations: rows of a file to prompt, answer and label, and the splits
of a run.
"""

import bisect
import functools
import re
import statistics

from chat.messages import CHATS, as_answer, is_messages, read_chat, read_chats, split_last_turn
from common import InputError
from common.batches import Rows
from common.data import load_splits, read_splits
from common.fields import is_unicode, names_of, pair_of_row
from common.processes import print0
from toy import base

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def number_of(value: object, from_text: bool) -> float | None:
    """A label as a number: a finite number, or true or false; as text too where the file has
    nothing else (.csv).

    None for all others, among them 1_000, which Python alone would read as a number."""
    if from_text and isinstance(value, str):
        word = value.strip().lower()
        if word in {"true", "false"}:
            return float(word == "true")
        value = float(word) if NUMBER.fullmatch(word) else None
    if not isinstance(value, (bool, int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return value if abs(value) < 3e38 else None  # neither nan nor more than a float32 holds


def labelled_of_row(where: str, row: dict, unlabelled: bool = False) -> tuple[tuple | None, str | None]:
    """((prompt, answer, label), None), texts as strings or lists of messages and the label a float,
    or (None, reason) for a row to drop.

    The answer is in `completion` or `response`, or all is in `text` and there is no prompt, or it
    is the last turn of a whole chat in `messages` or `conversations`; the label is in `label` or
    `score`. Raises InputError where a column is missing. unlabelled: rows without a label are
    demonstrations, with label 1."""
    answer = next((name for name in ("completion", "response", "text", *CHATS) if name in row), None)
    label = next((name for name in ("label", "score") if name in row), None)
    if answer is None or (answer in ("completion", "response") and "prompt" not in row):
        what = 'no field "prompt"' if answer else 'no field "completion" or "response"'
        raise InputError(
            f"{where}: {what}; expected prompt and completion (or response), or text or messages alone "
            f"(found {names_of(row)})."
        )
    if label is None and not unlabelled:
        raise InputError(
            f'{where}: no field "label" or "score"; expected one of them beside {answer} (found {names_of(row)}).'
        )
    texts, reason = answer_of_row(row, answer)
    if reason:
        return None, reason
    prompt, text = texts
    if label is None or (unlabelled and row[label] is None):
        value = 1.0
    else:
        value = number_of(row[label], from_text=re.search(r"\.csv(\.gz)?, line \d+$", where) is not None)
    if value is None:
        return None, "the label is not a finite number"
    if not is_unicode([prompt, text]):
        return None, "a field is not valid Unicode text"
    return (prompt, text, value), None


def answer_of_row(row: dict, answer: str) -> tuple[tuple | None, str | None]:
    """((prompt, answer), None) or (None, reason), the answer in the field of that name."""
    if answer in CHATS:
        chat, reason = read_chat(row[answer])
        if reason or not is_messages(chat):
            return None, reason or f"{answer} holds no chat messages"
        texts, reason = split_last_turn(chat)
        if reason:
            return None, reason
        prompt, text = texts
    else:
        (prompt, text), reason = read_chats("" if answer == "text" else row["prompt"], row[answer])
        if reason:
            return None, reason
        text = as_answer(text) if is_messages(prompt) else text
    if is_messages(prompt) and is_messages(text):
        if not all(m["content"].strip() for m in text):
            return None, "the answer is empty"
    elif not isinstance(prompt, str) or not isinstance(text, str):
        return None, "a field is neither text nor chat messages"
    elif not text.strip():
        return None, "the answer is empty"
    elif answer != "text" and not prompt.strip():
        return None, "the prompt is empty"
    return (prompt, text), None


def demonstration_of_row(where: str, row: dict) -> tuple[tuple | None, str | None]:
    """((prompt, answer), None) or (None, reason): the chosen side of a pair, or an answer without a
    label or labelled 1."""
    if "chosen" in row:
        texts, reason = pair_of_row(where, row)
        return (texts[:2] if texts else None), reason
    texts, reason = labelled_of_row(where, row, unlabelled=True)
    if texts and texts[2] != 1:
        return None, "not labelled 1, so no demonstration"
    return (texts[:2] if texts else None), reason


def scale_of(labels: list[float], how: str):
    """(function to [0, 1] fitted to labels, words that tell it). how: "minmax", linear; "quantile",
    the share of the labels that are smaller, ties counting one half. Values outside what was seen
    go to 0 or 1."""
    ordered = sorted(labels)
    low, high = ordered[0], ordered[-1]
    if low == high:
        raise InputError(f"--label-scale {how}: all training labels are {low:g}, so there is nothing to scale.")
    if how == "minmax":
        return lambda z: min(
            1.0, max(0.0, (z - low) / (high - low))
        ), f"Labels scaled linearly: {low:g} becomes 0, {high:g} becomes 1."
    marks = ", ".join(
        f"{ordered[round(q * (len(ordered) - 1))]:g} becomes about {q:g}" for q in (0, 0.25, 0.5, 0.75, 1)
    )
    words = f"Labels replaced by their quantile among the training labels: {marks}."
    return lambda z: (bisect.bisect_left(ordered, z) + bisect.bisect_right(ordered, z)) / (2 * len(ordered)), words


def read_labelled(data, eval_data, holdout, seed, labels: str, from_pairs: bool, unlabelled: bool):
    """`read_splits` of labelled answers, (prompt, answer, label); `from_pairs`: the chosen ones
    labelled 1, the rejected 0."""
    if not from_pairs:
        of_toy = functools.partial(base.labelled, continuous=labels == "continuous")
        of_row = functools.partial(labelled_of_row, unlabelled=unlabelled)
        return read_splits(data, eval_data, holdout, seed, of_toy, of_row)
    texts, digest = read_splits(data, eval_data, holdout, seed, base.pairs, pair_of_row)
    for name, (pairs, dropped) in texts.items():
        rows = []
        for prompt, chosen, rejected in pairs:
            rows += [(prompt, chosen, 1.0), (prompt, rejected, 0.0)]
        texts[name] = (rows, dropped)
    return texts, digest


def load_labelled(
    data: str,
    eval_data: str | None,
    holdout: float,
    seed: int,
    tokenizer,
    max_length: int,
    labels: str = "auto",
    label_scale: str = "none",
    from_pairs: bool = False,
    unlabelled: bool = False,
    say=print0,
    chat: bool = False,
) -> tuple[dict[str, Rows], str, str]:
    """Labelled answers as {"train": Rows, "held_out": Rows, "unseen": Rows (toy only)}, the sha256
    of the rows as read, and the kind of labels, "binary" (all 0 or 1) or "continuous".

    Rows have a column "labels". What was read is said. Raises InputError where no row is left."""
    source = (data, eval_data, holdout, seed)

    def read(say) -> tuple[dict, dict]:
        texts, digest = read_labelled(*source, labels, from_pairs, unlabelled)
        texts, kind = scale_labels(texts, labels, label_scale, say)
        return texts, {"data_sha256": digest, "label_kind": kind}

    kind = ["labelled", labels, label_scale, from_pairs, unlabelled]
    shape = {"chat": chat, "answers": 1, "columns": ("labels",)}
    splits, facts = load_splits(source, kind, tokenizer, max_length, read, say, **shape)
    describe_labels([row["labels"] for row in splits["train"]], facts["label_kind"], labels, say)
    return splits, facts["data_sha256"], facts["label_kind"]


def scale_labels(texts: dict, labels: str, label_scale: str, say) -> tuple[dict, str]:
    """The splits with labels as `--labels` and `--label-scale` want them, and the labels' kind."""
    values = [label for _, _, label in texts["train"][0]]
    kind = labels if labels != "auto" else "binary" if set(values) <= {0.0, 1.0} else "continuous"
    if kind == "binary":
        for name, (rows, dropped) in texts.items():
            good = [row for row in rows if row[2] in {0.0, 1.0}]
            dropped["the label is neither 0 nor 1"] += len(rows) - len(good)
            texts[name] = (good, +dropped)
    if label_scale != "none":
        if kind == "binary":
            raise InputError(
                f"--label-scale {label_scale}: the labels are binary; --labels continuous to take them as numbers."
            )
        if not values:
            raise InputError(
                f"--label-scale {label_scale}: no training row has a usable label, so there is nothing to scale."
            )
        scale, words = scale_of(values, label_scale)
        for name, (rows, dropped) in texts.items():
            texts[name] = ([(prompt, answer, scale(label)) for prompt, answer, label in rows], dropped)
        say(words)
    return texts, kind


def describe_labels(values: list[float], kind: str, labels: str, say) -> None:
    """Says which kind of labels the training rows have, and how they are spread."""
    reason = "as --labels says" if labels != "auto" else "as the data shows"
    share = sum(value == 1 for value in values) / len(values)
    if kind == "binary":
        say(f"Labels: binary, {reason}; in training {share:.1%} are positive (1), {1 - share:.1%} negative (0).")
        return
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    spread = f"mean {mean:.3g}, standard deviation {spread:.3g}"
    say(f"Labels: continuous, {reason}; {min(values):g} to {max(values):g}, {spread}; {share:.1%} are exactly 1.")


def load_demonstrations(
    data: str, eval_data: str | None, holdout: float, seed: int, tokenizer, max_length: int, say=print0, chat=False
) -> tuple[dict[str, Rows], str]:
    """Demonstrations as {"train": Rows, "held_out": Rows, "unseen": Rows (toy only)}, and the
    sha256 of the rows as read.

    On the toy they are the chosen answers of the pairs. Raises InputError where no row is left."""
    source = (data, eval_data, holdout, seed)

    def chosen_answers(seed: int, **settings) -> dict:
        return {name: [pair[:2] for pair in pairs] for name, pairs in base.pairs(seed, **settings).items()}

    def read(say) -> tuple[dict, dict]:
        texts, digest = read_splits(*source, chosen_answers, demonstration_of_row)
        return texts, {"data_sha256": digest}

    splits, facts = load_splits(source, "demonstrations", tokenizer, max_length, read, say, chat, answers=1)
    return splits, facts["data_sha256"]
