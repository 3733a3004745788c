"""Rows to token ids, and the splits of a run.

The conventions (docs/data.md tells them to users): text to tokens is the tokenizer's own reading of
`prompt + completion` with nothing put between; the prompt's tokens are the same in all answers of a
row; one EOS ends an answer that was not cut; a row whose value cannot be used is dropped and
counted; a file that cannot be read stops the run with file, line and field.
"""

import bisect
import functools
import hashlib
import json
import random
import statistics
from collections import Counter

from common import InputError
from common.batches import Rows
from common.fields import common_prefix, demonstration_of_row, labelled_of_row, pair_of_row, prompt_of_row
from common.files import is_row_file, read_hub, read_rows
from common.processes import print0
from toy import base

SPLITS = {"train": "Training rows", "held_out": "Held-out rows", "unseen": "Rows on unseen questions"}


def split_by_prompt(rows: list[tuple], share: float, seed: int) -> tuple[list, list]:
    """(train, held out): `share` of the distinct prompts, never of the rows, is held out.

    A row's first element is its prompt.
    """
    keys = [json.dumps(row[0] or row[1]) for row in rows]  # without a prompt the text itself decides
    distinct = sorted(set(keys))
    random.Random(seed).shuffle(distinct)
    held = set(distinct[: round(share * len(distinct))])
    return [r for r, k in zip(rows, keys) if k not in held], [r for r, k in zip(rows, keys) if k in held]


def encode_row(tokenizer, prompt, answers: list, max_length: int) -> tuple[dict | None, str | None, bool]:
    """Token ids of one prompt and its answers.

    Args:
        prompt: a string, or a list of messages, which goes through the tokenizer's chat template.
            An empty one becomes the token that the tokenizer begins a text with, or EOS where it
            has none. answers: strings or lists of messages; none where only the prompt is asked
            for. max_length: limit in tokens for the prompt and one completion; completions lose
            their end.

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
    # A tokenizer that ends every text in EOS puts one behind the prompt: then no boundary was
    # moved.
    own = len(prompt_ids) - (prompt_ids[-1] == eos)
    return {"prompt": (whole or [prompt_ids])[0][:boundary], "completions": completions}, None, boundary < own


def text_ids(tokenizer, prompt: str, answers: list[str]) -> tuple[tuple | None, str | None]:
    """((prompt ids, ids of prompt + answer for each, boundary, whether each ends in EOS), None) of
    strings.
    """
    eos = tokenizer.eos_token_id
    prompt_ids = tokenizer(prompt).input_ids
    whole = [tokenizer(prompt + answer).input_ids for answer in answers]
    if not prompt and not prompt_ids:
        # Nothing precedes the text and the tokenizer begins it with nothing: EOS stands for its
        # beginning.
        prompt_ids, whole = [eos], [[eos, *ids] for ids in whole]
    prompt_end = len(prompt_ids) - (
        len(prompt_ids) > 1 and prompt_ids[-1] == eos
    )  # some tokenizers end every text in EOS
    boundary = min((common_prefix(prompt_ids, ids) for ids in whole), default=prompt_end)
    return (prompt_ids, whole, boundary, [bool(ids) and ids[-1] == eos for ids in whole]), None


def chat_ids(tokenizer, prompt: list[dict], answers: list[list[dict]]) -> tuple[tuple | None, str | None]:
    """The same of chat messages, or (None, reason)."""
    if tokenizer.chat_template is None:
        return None, "chat messages, but the tokenizer has no chat template"
    try:
        texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)]
        texts += [tokenizer.apply_chat_template(prompt + answer, tokenize=False) for answer in answers]
    except Exception as error:  # templates raise what they like: no system role here, roles that must alternate there
        return None, f"the chat template refuses the messages: {(str(error) or type(error).__name__).splitlines()[0]}"
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

    Rows that cannot be used are counted by reason beside those in `dropped`.
    """
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
    """The usable ones among rows as read, and how many were dropped for which reason; `of_row` is
    `pair_of_row` or its like.
    """
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
    """Says what was read and dropped.

    Raises InputError where no row is left to train on, or none of `--eval-data`.
    """
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

    Drops are counted by reason and said. Raises InputError where no row is left.
    """
    texts, digest = read_splits(data, eval_data, holdout, seed, base.pairs, pair_of_row)
    splits = {name: encode_rows(tokenizer, pairs, max_length, dropped) for name, (pairs, dropped) in texts.items()}
    describe_splits(splits, data, eval_data, say)
    return splits, digest


def scale_of(labels: list[float], how: str):
    """(function to [0, 1] fitted to labels, words that tell it). how: "minmax", linear; "quantile",
    the share of the labels that are smaller, ties counting one half. Values outside what was seen
    go to 0 or 1.
    """
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
    labelled 1, the rejected 0.
    """
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
) -> tuple[dict[str, Rows], str, str]:
    """Labelled answers as {"train": Rows, "held_out": Rows, "unseen": Rows (toy only)}, the sha256
    of the rows as read, and the kind of labels, "binary" (all 0 or 1) or "continuous".

    Rows have a column "labels". What was read is said. Raises InputError where no row is left.
    """
    texts, digest = read_labelled(data, eval_data, holdout, seed, labels, from_pairs, unlabelled)
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
    splits = {}
    for name, (rows, dropped) in texts.items():
        splits[name] = encode_rows(tokenizer, rows, max_length, dropped, answers=1, columns=("labels",))
    describe_splits(splits, data, eval_data, say)
    describe_labels([row["labels"] for row in splits["train"]], kind, labels, say)
    return splits, digest, kind


def describe_labels(values: list[float], kind: str, labels: str, say) -> None:
    """Says which kind of labels the training rows have, and how they are spread."""
    reason = "as --labels says" if labels != "auto" else "as the data shows"
    share = sum(value == 1 for value in values) / len(values)
    if kind == "binary":
        say(f"Labels: binary, {reason}; {share:.1%} of the training rows are positive (1), the others negative (0).")
        return
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    spread = f"mean {mean:.3g}, standard deviation {spread:.3g}"
    say(f"Labels: continuous, {reason}; {min(values):g} to {max(values):g}, {spread}; {share:.1%} are exactly 1.")


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

    A prompt must leave room for `max_new_tokens`. Raises InputError where no row is left.
    """
    texts, digest = read_splits(data, eval_data, holdout, seed, base.prompts, prompt_of_row)
    splits = {}
    for name, (rows, dropped) in texts.items():
        distinct = list({json.dumps(row): row for row in rows}.values())
        dropped["the prompt comes again"] += len(rows) - len(distinct)
        splits[name] = encode_rows(tokenizer, distinct, max_length - max_new_tokens, +dropped, answers=0)
    describe_splits(splits, data, eval_data, say)
    return splits, digest


def load_demonstrations(
    data: str, eval_data: str | None, holdout: float, seed: int, tokenizer, max_length: int, say=print0
) -> tuple[dict[str, Rows], str]:
    """Demonstrations as {"train": Rows, "held_out": Rows, "unseen": Rows (toy only)}, and the
    sha256 of the rows as read.

    On the toy they are the chosen answers of the pairs. Raises InputError where no row is left.
    """

    def chosen_answers(seed: int, flip: float) -> dict:
        return {name: [pair[:2] for pair in pairs] for name, pairs in base.pairs(seed, flip).items()}

    texts, digest = read_splits(data, eval_data, holdout, seed, chosen_answers, demonstration_of_row)
    splits = {}
    for name, (rows, dropped) in texts.items():
        splits[name] = encode_rows(tokenizer, rows, max_length, dropped, answers=1)
    describe_splits(splits, data, eval_data, say)
    return splits, digest


def sha256_of(value: object) -> str:
    """Hash of a JSON value, the same for the same rows however the file is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
