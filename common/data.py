"""Rows in, batches out: load, check, format, tokenise, collate.

The conventions (docs/data.md tells them to users): text to tokens is the tokenizer's own reading of `prompt + completion` with nothing put
between; the prompt's tokens are the same in all answers of a row; one EOS ends an answer that was not cut; a row whose value cannot be
used is dropped and counted; a file that cannot be read stops the run with file, line and field.
"""

import bisect
import csv
import functools
import gzip
import hashlib
import io
import json
import math
import random
import re
import statistics
import sys
import zlib
from collections import Counter
from pathlib import Path

import torch

MASKED = -1e9  # added to attention scores; finite, so that a row of padding gives no nan, and its exponential is exactly 0


class InputError(SystemExit):
    """Bad input: one sentence for the user. Uncaught, Python prints it and exits with status 1."""


# ---------------------------------------------------------------------------------------------------------------- reading


def read_rows(source: str) -> list[tuple[str, dict]]:
    """Rows of a local file as (where, row), `where` naming file and line for messages.

    Formats by ending: .jsonl, .json (a list of objects, or lines), .csv, .parquet, each also with .gz. Values keep the types they have in
    the file. Raises InputError for a missing, empty or unreadable file, naming the line.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{source}: no such file.")
    kind = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if kind not in {".jsonl", ".json", ".csv", ".parquet"}:
        raise InputError(f"{source}: unknown kind of file; expected .jsonl, .json, .csv or .parquet, each also with .gz.")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{source}: cannot be read ({error}).") from None
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{source}: not a readable parquet file ({str(error).splitlines()[0]}).") from None
        found = [(f"{source}, row {i}", row) for i, row in enumerate(rows, 1)]
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise InputError(f"{source}, line {line}: not UTF-8 text (byte {error.start} of the file).") from None
        if kind == ".csv":
            csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses answers of 128 KiB
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)  # strict: a quote that never closes swallows no rows
            try:
                found = [(f"{source}, line {reader.line_num}", row) for row in reader]
            except csv.Error as error:
                raise InputError(f"{source}, line {reader.line_num + 1}: not valid CSV ({error}).") from None  # the line after the last good row
            for where, row in found:
                if None in row:
                    raise InputError(f"{where}: more values than the header has names ({len(row) - 1}).")
        elif kind == ".json" and text.lstrip().startswith("["):
            try:
                rows = json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"{source}, line {error.lineno}: not valid JSON ({error.msg}).") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{source}: not readable JSON ({error}).") from None
            found = [(f"{source}, row {i}", row) for i, row in enumerate(rows, 1)]
        else:
            found = [(f"{source}, line {i}", parse_line(source, i, line)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not found:
        raise InputError(f"{source}: the file has no rows.")
    for where, row in found:
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with named fields, found {type(row).__name__}.")
    return found


def parse_line(source: str, number: int, line: str) -> object:
    """One line of a JSON-lines file; InputError names file and line."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{source}, line {number}: not valid JSON ({error.msg} at character {error.pos + 1}).") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists nested without end
        raise InputError(f"{source}, line {number}: not readable JSON ({error}).") from None


def read_hub(name: str) -> dict[str, list[tuple[str, dict]]]:
    """Splits of a data set of the hub, `name` or `name:subset` (a configuration or a data folder), as {"train": rows, "test": rows or absent}."""
    import datasets

    from common.runtime import quietly_checked

    name, _, subset = name.partition(":")
    quietly_checked(name, "dataset")
    datasets.disable_progress_bars()
    try:
        try:
            loaded = datasets.load_dataset(name, subset or None)
        except ValueError:
            if not subset:
                raise
            loaded = datasets.load_dataset(name, data_dir=subset)
    except Exception as error:
        raise InputError(f"--data {name}: the data set cannot be loaded ({str(error).splitlines()[0]}).") from None
    names = {"train": "train", "test": next((s for s in ("test", "validation") if s in loaded), None)}
    if "train" not in loaded:
        raise InputError(f"--data {name}: no train split (found {', '.join(loaded)}).")
    return {k: [(f"{name}, {v} row {i}", row) for i, row in enumerate(loaded[v], 1)] for k, v in names.items() if v}


# ------------------------------------------------------------------------------------------------------- rows to text


def is_messages(value: object) -> bool:
    """A chat: a non-empty list of {"role": str, "content": str}."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
    )


def common_prefix(a, b) -> int:
    """Length of the longest common prefix of two sequences."""
    n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return n


def split_implicit_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two whole texts: cut after the last common "\\n\\nAssistant:", else before the last whitespace ahead of
    the first difference, so that no word is cut and the whitespace belongs to the completions. The prompt may come out empty.
    """
    same = common_prefix(chosen, rejected)
    marker = "\n\nAssistant:"
    turn = chosen.rfind(marker, 0, same)
    if turn >= 0:
        cut = turn + len(marker)
    else:
        cut = next((i for i in range(same - 1, 0, -1) if chosen[i].isspace()), 0)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def is_unicode(value: object) -> bool:
    """Whether texts can be encoded: JSON can hold half a surrogate pair, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def pair_of_row(where: str, row: dict) -> tuple[tuple | None, str | None]:
    """((prompt, chosen, rejected), None), each a string or a list of messages, or (None, reason) for a row to drop.

    Raises InputError where a column is missing. Without `prompt` the prompt is implicit: what both answers begin with.
    """
    for field in ("chosen", "rejected"):
        if field not in row:
            raise InputError(
                f'{where}: no field "{field}"; expected chosen and rejected, and prompt unless it is part of both (found {", ".join(map(str, row)) or "none"}).'
            )
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if is_messages(chosen) and is_messages(rejected):
        if is_messages(prompt):
            n = len(prompt) if chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt else 0
            chosen, rejected = chosen[n:], rejected[n:]
        else:  # a string beside whole dialogues repeats the first question (UltraFeedback): the messages themselves decide
            n = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
            if n <= 0 and isinstance(prompt, str) and prompt.strip():
                prompt = [{"role": "user", "content": prompt}]
            else:
                prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
        if not prompt:
            return None, "no common prompt"
        if not chosen or not rejected or not all(m["content"].strip() for m in (*chosen, *rejected)):
            return None, "an answer is empty"
    else:
        if not isinstance(chosen, str) or not isinstance(rejected, str) or ("prompt" in row and not isinstance(prompt, str)):
            return None, "a field is neither text nor chat messages"
        if not chosen.strip() or not rejected.strip():
            return None, "an answer is empty"
        if "prompt" not in row:
            prompt, chosen, rejected = split_implicit_prompt(chosen, rejected)
            if chosen != rejected and not prompt.strip():
                return None, "no common prompt"
            if chosen != rejected and not (chosen.strip() and rejected.strip()):
                return None, "an answer is empty"
        elif not prompt.strip():
            return None, "the prompt is empty"
    if chosen == rejected:
        return None, "both answers are identical"
    if not is_unicode([prompt, chosen, rejected]):
        return None, "a field is not valid Unicode text"
    return (prompt, chosen, rejected), None


def split_by_prompt(rows: list[tuple], share: float, seed: int) -> tuple[list, list]:
    """(train, held out): `share` of the distinct prompts, never of the rows, is held out. A row's first element is its prompt."""
    keys = [json.dumps(row[0] or row[1]) for row in rows]  # without a prompt the text itself decides
    distinct = sorted(set(keys))
    random.Random(seed).shuffle(distinct)
    held = set(distinct[: round(share * len(distinct))])
    return [r for r, k in zip(rows, keys) if k not in held], [r for r, k in zip(rows, keys) if k in held]


# ------------------------------------------------------------------------------------------------------ text to tokens


def encode(tokenizer, prompt, answers: list, max_length: int) -> tuple[dict | None, str | None, bool]:
    """Token ids of one prompt and its answers.

    Args:
        prompt: a string, or a list of messages, which goes through the tokenizer's chat template. An empty one becomes the token that the
            tokenizer begins a text with, or EOS where it has none.
        answers: strings or lists of messages; none where only the prompt is asked for.
        max_length: limit in tokens for the prompt and one completion; completions lose their end.

    Returns:
        ({"prompt": ids, "completions": [ids, ...]}, None, moved), or (None, reason, False). `moved`: the boundary had to be moved to the
        left, because a token would have crossed it. One EOS ends each completion that was not cut.
    """
    eos = tokenizer.eos_token_id
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt).input_ids
        whole = [tokenizer(prompt + answer).input_ids for answer in answers]
        if not prompt and not prompt_ids:  # nothing precedes the text and the tokenizer begins it with nothing: EOS stands for its beginning
            prompt_ids, whole = [eos], [[eos, *ids] for ids in whole]
        prompt_end = len(prompt_ids) - (len(prompt_ids) > 1 and prompt_ids[-1] == eos)  # some tokenizers end every text in EOS
        boundary = min((common_prefix(prompt_ids, ids) for ids in whole), default=prompt_end)
        ended = [bool(ids) and ids[-1] == eos for ids in whole]
    else:
        if tokenizer.chat_template is None:
            return None, "chat messages, but the tokenizer has no chat template", False
        try:
            texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)]
            texts += [tokenizer.apply_chat_template(prompt + answer, tokenize=False) for answer in answers]
        except Exception as error:  # templates raise what they like: no system role here, roles that must alternate there
            return None, f"the chat template refuses the messages: {(str(error) or type(error).__name__).splitlines()[0]}", False
        prompt_ids, *whole = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        boundary = len(prompt_ids)
        if any(ids[:boundary] != prompt_ids for ids in whole):
            return None, "the chat template does not keep the prompt's tokens when an answer follows", False
        ended = [eos in ids[boundary:] for ids in whole]  # templates put a newline after the end of turn
    if boundary == 0:
        return None, "prompt and answers share no token", False
    if boundary >= max_length:
        return None, "the prompt alone fills max_length", False
    whole = [ids if done else [*ids, eos] for ids, done in zip(whole, ended)]
    completions = [ids[boundary:max_length] for ids in whole]
    own = len(prompt_ids) - (prompt_ids[-1] == eos)  # a tokenizer that ends every text in EOS puts one behind the prompt: no boundary moved
    return {"prompt": (whole or [prompt_ids])[0][:boundary], "completions": completions}, None, boundary < own


class Rows(list):
    """Encoded rows, with `texts` (the rows as read), `seen` (how many were read), `dropped` (reason -> count) and `moved` (boundaries)."""

    def __init__(self, examples=(), texts=(), seen=0, dropped=None, moved=0):
        super().__init__(examples)
        self.texts, self.seen, self.dropped, self.moved = list(texts), seen, Counter(dropped or {}), moved

    def describe(self, name: str) -> str:
        """The sentence printed at the start of a run."""
        parts = [f"{name}: {self.seen:,} rows read, {len(self):,} used"]
        if self.dropped:
            parts.append("dropped " + ", ".join(f"{n:,} ({reason})" for reason, n in self.dropped.most_common()))
        if self.moved:
            parts.append(f"in {self.moved:,} the boundary moved left because a token spans prompt and answer")
        return "; ".join(parts) + "."


def encode_rows(tokenizer, texts: list[tuple], max_length: int, dropped: Counter | None = None, answers: int = 2, extra: tuple[str, ...] = ()) -> Rows:
    """Encodes rows (prompt, answer, ..., value, ...): `answers` answers, then a value for each name in `extra`.

    A row comes out as {"prompt": ids, "completions": [ids of each answer], and the values under their names}.
    """
    rows = Rows(seen=len(texts) + sum((dropped or {}).values()), dropped=dropped)
    for prompt, *rest in texts:
        example, reason, moved = encode(tokenizer, prompt, rest[:answers], max_length)
        if reason:
            rows.dropped[reason] += 1
        else:
            rows.append(example | dict(zip(extra, rest[answers:])))
            rows.texts.append((prompt, *rest))
            rows.moved += moved
    return rows


def usable(found: list[tuple[str, dict]], of_row) -> tuple[list[tuple], Counter]:
    """The usable ones among rows as read, and how many were dropped for which reason; `of_row(where, row)` is `pair_of_row` or one of its kind."""
    kept, dropped = [], Counter()
    for where, row in found:
        texts, reason = of_row(where, row)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(texts)
    return kept, dropped


def read_splits(args, of_toy, of_row) -> tuple[dict[str, tuple[list[tuple], Counter]], str]:
    """The rows of `--data`, before any tokenizer: {split: (rows, how many were dropped for which reason)}, and the sha256 of the rows as read.

    Splits are "train", "held_out" (`--eval-data`, the data's test split, or a share of the prompts) and, on the toy, "unseen".

    Args:
        args: has data, eval_data, holdout and seed.
        of_toy: `(seed, flip)` -> {split: rows}, the toy's rows of this kind.
        of_row: `(where, row)` -> ((prompt, ...), None), or (None, reason) for a row to drop.
    """
    from common import toy

    if (flip := toy.flip_share(args.data)) is not None:
        splits = {name: ([tuple(row) for row in rows], Counter()) for name, rows in of_toy(args.seed, flip).items()}
        return splits, sha256_of([rows for rows, _ in splits.values()])
    is_file = Path(args.data).exists() or Path(args.data).suffix in {".jsonl", ".json", ".csv", ".parquet", ".gz"}
    found = {"train": read_rows(args.data)} if is_file else read_hub(args.data)
    if args.eval_data:
        found["test"] = read_rows(args.eval_data)
    digest = sha256_of([row for rows in found.values() for _, row in rows])
    train, dropped = usable(found["train"], of_row)
    if "test" in found:
        return {"train": (train, dropped), "held_out": usable(found["test"], of_row)}, digest
    train, held_out = split_by_prompt(train, args.holdout, args.seed)
    return {"train": (train, dropped), "held_out": (held_out, Counter())}, digest


def say_splits(splits: dict[str, Rows], args, say=print) -> None:
    """Says what was read and dropped. Raises InputError where no row is left to train on, or none of `--eval-data`."""
    for name, rows in splits.items():
        say(rows.describe({"train": "Training rows", "held_out": "Held-out rows", "unseen": "Rows on unseen questions"}[name]))
    for name, flag, use in (("train", f"--data {args.data}", "train on"), ("held_out", f"--eval-data {args.eval_data}", "evaluate on")):
        if not splits[name] and (name == "train" or args.eval_data):
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in splits[name].dropped.most_common()) or "all were held out"
            raise InputError(f"{flag}: no usable row is left to {use} ({reasons}).")


def load_pairs(args, tokenizer, max_length: int, say=print) -> tuple[dict[str, Rows], str]:
    """Preference pairs as {"train": Rows, "held_out": Rows, "unseen": Rows (toy only)}, and the sha256 of the rows as read.

    `args` has data, eval_data, holdout and seed. Drops are counted by reason and said. Raises InputError where no row is left.
    """
    from common import toy

    found, digest = read_splits(args, toy.pairs, pair_of_row)
    splits = {name: encode_rows(tokenizer, pairs, max_length, dropped) for name, (pairs, dropped) in found.items()}
    say_splits(splits, args, say)
    return splits, digest


def number_of(value: object, from_text: bool) -> float | None:
    """A label as a number: a finite number, or true or false; as text too where the file has nothing else (.csv). None for all others."""
    if from_text and isinstance(value, str):
        word = value.strip().lower()
        try:
            value = {"true": True, "false": False}[word] if word in {"true", "false"} else float(word)
        except ValueError:
            return None
    if not isinstance(value, (bool, int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return value if math.isfinite(value) else None


def labelled_of_row(where: str, row: dict, unlabelled: bool = False) -> tuple[tuple | None, str | None]:
    """((prompt, answer, label), None), texts as strings or lists of messages and the label a float, or (None, reason) for a row to drop.

    The answer is in `completion` or `response`, or all is in `text` and there is no prompt; the label is in `label` or `score`. Raises InputError
    where a column is missing. unlabelled: rows without a label are demonstrations, with label 1.
    """
    names = ", ".join(map(str, row)) or "none"
    answer = next((name for name in ("completion", "response", "text") if name in row), None)
    label = next((name for name in ("label", "score") if name in row), None)
    if answer is None or (answer != "text" and "prompt" not in row):
        what = 'no field "prompt"' if answer else 'no field "completion" or "response"'
        raise InputError(f"{where}: {what}; expected prompt and completion (or response), or text alone (found {names}).")
    if label is None and not unlabelled:
        raise InputError(f'{where}: no field "label" or "score"; expected one of them beside {answer} (found {names}).')
    prompt, text = "" if answer == "text" else row["prompt"], row[answer]
    if is_messages(prompt) and isinstance(text, str):
        text = [{"role": "assistant", "content": text}]
    if is_messages(prompt) and is_messages(text):
        if not all(m["content"].strip() for m in text):
            return None, "the answer is empty"
    elif not isinstance(prompt, str) or not isinstance(text, str):
        return None, "a field is neither text nor chat messages"
    elif not text.strip():
        return None, "the answer is empty"
    elif answer != "text" and not prompt.strip():
        return None, "the prompt is empty"
    value = 1.0 if label is None or (unlabelled and row[label] is None) else number_of(row[label], re.search(r"\.csv(\.gz)?, line \d+$", where) is not None)
    if value is None:
        return None, "the label is not a finite number"
    if not is_unicode([prompt, text]):
        return None, "a field is not valid Unicode text"
    return (prompt, text, value), None


def scale_of(labels: list[float], how: str):
    """(function to [0, 1] fitted to labels, words that tell it). how: "minmax", linear; "quantile", the share of the labels that are smaller, ties
    counting one half. Values outside what was seen go to 0 or 1."""
    ordered = sorted(labels)
    low, high = ordered[0], ordered[-1]
    if low == high:
        raise InputError(f"--label-scale {how}: all training labels are {low:g}, so there is nothing to scale.")
    if how == "minmax":
        return lambda z: min(1.0, max(0.0, (z - low) / (high - low))), f"Labels scaled linearly: {low:g} becomes 0, {high:g} becomes 1."
    marks = ", ".join(f"{ordered[round(q * (len(ordered) - 1))]:g} becomes about {q:g}" for q in (0, 0.25, 0.5, 0.75, 1))
    words = f"Labels replaced by their quantile among the training labels: {marks}."
    return lambda z: (bisect.bisect_left(ordered, z) + bisect.bisect_right(ordered, z)) / (2 * len(ordered)), words


def load_labelled(args, tokenizer, max_length: int, say=print, unlabelled: bool = False) -> tuple[dict[str, Rows], str, str]:
    """Labelled answers as {"train": Rows, "held_out": Rows, "unseen": Rows (toy only)}, the sha256 of the rows as read, and the kind of labels,
    "binary" (all 0 or 1) or "continuous".

    `args` has data, eval_data, holdout, seed, from_pairs, labels and label_scale. An example has "label", a float. What was found is said. Raises
    InputError where no row is left.
    """
    from common import toy

    if args.from_pairs:
        found, digest = read_splits(args, toy.pairs, pair_of_row)
        found = {
            name: ([row for prompt, good, bad in rows for row in ((prompt, good, 1.0), (prompt, bad, 0.0))], dropped) for name, (rows, dropped) in found.items()
        }
    else:
        toys = functools.partial(toy.labelled, continuous=args.labels == "continuous")
        found, digest = read_splits(args, toys, functools.partial(labelled_of_row, unlabelled=unlabelled))
    labels = [label for _, _, label in found["train"][0]]
    kind = args.labels if args.labels != "auto" else "binary" if set(labels) <= {0.0, 1.0} else "continuous"
    if kind == "binary":
        for name, (rows, dropped) in found.items():
            good = [row for row in rows if row[2] in {0.0, 1.0}]
            dropped["the label is neither 0 nor 1"] += len(rows) - len(good)
            found[name] = (good, +dropped)
    if args.label_scale != "none":
        if kind == "binary":
            raise InputError(f"--label-scale {args.label_scale}: the labels are binary; --labels continuous to take them as numbers.")
        scale, words = scale_of(labels, args.label_scale)
        found = {name: ([(p, a, scale(z)) for p, a, z in rows], dropped) for name, (rows, dropped) in found.items()}
        say(words)
    splits = {name: encode_rows(tokenizer, rows, max_length, dropped, answers=1, extra=("label",)) for name, (rows, dropped) in found.items()}
    say_splits(splits, args, say)
    labels = [example["label"] for example in splits["train"]]
    told = "as --labels says" if args.labels != "auto" else "as the data shows"
    share = sum(z == 1 for z in labels) / len(labels)
    if kind == "binary":
        say(f"Labels: binary, {told}; of the training rows {share:.1%} are positive (1), {1 - share:.1%} negative (0).")
    else:
        mean, spread = statistics.fmean(labels), statistics.pstdev(labels)
        say(f"Labels: continuous, {told}; {min(labels):g} to {max(labels):g}, mean {mean:.3g}, standard deviation {spread:.3g}; {share:.1%} are exactly 1.")
    return splits, digest, kind


def prompt_of_row(where: str, row: dict) -> tuple[tuple | None, str | None]:
    """((prompt,), None) or (None, reason): `prompt`, as a string or chat messages, or what both sides of a pair begin with."""
    if "prompt" not in row:
        if "chosen" not in row:
            raise InputError(f'{where}: no field "prompt"; expected prompt, or the chosen and rejected of pairs (found {", ".join(map(str, row)) or "none"}).')
        texts, reason = pair_of_row(where, row)
        return (texts[:1] if texts else None), reason
    prompt = row["prompt"]
    if not isinstance(prompt, str) and not is_messages(prompt):
        return None, "the prompt is neither text nor chat messages"
    if isinstance(prompt, str) and not prompt.strip():
        return None, "the prompt is empty"
    return ((prompt,), None) if is_unicode(prompt) else (None, "a field is not valid Unicode text")


def load_prompts(args, tokenizer, max_length: int, say=print) -> tuple[dict[str, Rows], str]:
    """Distinct prompts as {"train": Rows, "held_out": Rows, "unseen": Rows (toy only)}, and the sha256 of the rows as read.

    `args` has data, eval_data, holdout, seed and max_new_tokens, for which a prompt must leave room. Raises InputError where no row is left.
    """
    from common import toy

    found, digest = read_splits(args, toy.prompts, prompt_of_row)
    splits = {}
    for name, (rows, dropped) in found.items():
        distinct = list({json.dumps(row): row for row in rows}.values())
        dropped["the prompt comes again"] += len(rows) - len(distinct)
        splits[name] = encode_rows(tokenizer, distinct, max_length - args.max_new_tokens, +dropped, answers=0)
    say_splits(splits, args, say)
    return splits, digest


def demonstration_of_row(where: str, row: dict) -> tuple[tuple | None, str | None]:
    """((prompt, answer), None) or (None, reason): the chosen side of a pair, or an answer without a label or labelled 1."""
    if "chosen" in row:
        texts, reason = pair_of_row(where, row)
        return (texts[:2] if texts else None), reason
    texts, reason = labelled_of_row(where, row, unlabelled=True)
    if texts and texts[2] != 1:
        return None, "not labelled 1, so no demonstration"
    return (texts[:2] if texts else None), reason


def load_demonstrations(args, tokenizer, max_length: int, say=print) -> tuple[dict[str, Rows], str]:
    """Demonstrations as {"train": Rows, "held_out": Rows, "unseen": Rows (toy only)}, and the sha256 of the rows as read.

    `args` has data, eval_data, holdout and seed. On the toy they are the chosen answers of the pairs. Raises InputError where no row is left.
    """
    from common import toy

    def chosen(seed: int, flip: float) -> dict:
        return {name: [(prompt, answer) for prompt, answer, _ in pairs] for name, pairs in toy.pairs(seed, flip).items()}

    found, digest = read_splits(args, chosen, demonstration_of_row)
    splits = {name: encode_rows(tokenizer, rows, max_length, dropped, answers=1) for name, (rows, dropped) in found.items()}
    say_splits(splits, args, say)
    return splits, digest


def half_of(rows: Rows, which: str) -> Rows:
    """The rows of one half of the prompts, "first" or "second", or "all". A hash decides for each prompt alone, whatever else is in the rows: two runs on
    different halves share no prompt, even where their seeds hold out different ones. A half has about half of the prompts."""
    if which == "all":
        return rows
    first = [hashlib.sha256(json.dumps(texts[0] or texts[1]).encode()).digest()[0] < 128 for texts in rows.texts]
    kept = [i for i, is_first in enumerate(first) if is_first == (which == "first")]
    if not kept:
        raise InputError(f"--half {which}: the {len(rows):,} training rows leave nothing in that half.")
    return Rows([rows[i] for i in kept], [rows.texts[i] for i in kept], rows.seen, rows.dropped, rows.moved)


def sha256_of(value: object) -> str:
    """Hash of a JSON value, the same for the same rows however the file is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------- tokens to batches


def row_tokens(example) -> int:
    """Real tokens of a row as its answers are read one by one: prompt + completion for each, no padding, however the batch is laid out. A chunk of
    a corpus, a tensor, is all tokens."""
    if isinstance(example, torch.Tensor):
        return len(example)
    return sum(len(example["prompt"]) + len(ids) for ids in example["completions"])


def row_length(example) -> int:
    """Length of a row in the shared-prompt layout, or of a chunk of a corpus, in tokens."""
    if isinstance(example, torch.Tensor):
        return len(example)
    return len(example["prompt"]) + sum(map(len, example["completions"]))


def plan_batches(rows: list[dict], batch_size: int, epochs: float, max_steps: int, seed: int) -> list[list[int]]:
    """The order of training: for each optimiser step, the indices of its rows. A pure function of its arguments, so a resumed run finds it again.

    Each epoch is shuffled anew. Rows of similar length are put into the same step, within windows of 16 steps, and the order of those steps is
    shuffled again: little padding, and what a step sees stays random across the data. The last step of an epoch may be smaller; its rows are
    random ones, since always the longest would otherwise be left for it and weigh more.
    """
    if not rows:
        raise ValueError("no rows to plan")
    rng, lengths = random.Random(seed), [row_length(row) for row in rows]
    plan, total = [], max(1, round(epochs * len(rows)))
    while total > 0:
        order = list(range(len(rows)))
        rng.shuffle(order)
        order = order[: min(total, len(order))]
        total -= len(order)
        window, full = 16 * batch_size, len(order) - len(order) % batch_size
        steps = []
        for start in range(0, full, window):
            by_length = sorted(order[start : min(start + window, full)], key=lambda i: lengths[i])
            cut = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
            rng.shuffle(cut)
            steps += cut
        plan += steps + ([order[full:]] if full < len(order) else [])
    return plan[:max_steps] if max_steps >= 0 else plan


def only_planned(rows: Rows, plan: list[list[int]]) -> tuple[Rows, list[list[int]]]:
    """The rows that a plan uses, and the plan in their numbering: with few steps on much data nothing is computed for the other rows."""
    used = sorted({i for step in plan for i in step})
    place = {i: k for k, i in enumerate(used)}
    kept = Rows([rows[i] for i in used], [rows.texts[i] for i in used], rows.seen, rows.dropped, rows.moved)
    return kept, [[place[i] for i in step] for step in plan]


def micro_batches(rows: list[int], size: int, rank: int = 0, world_size: int = 1) -> list[tuple[list[int], bool]]:
    """This process's share of a step as [(rows, real)], the same number of micro-batches on every process.

    A process with no row left gets the step's first row with `real` False: it must run forward and backward like the others, and its loss
    must count 0.
    """
    passes = -(-len(rows) // (size * world_size))
    chunks = []
    for i in range(passes):
        mine = rows[i * size * world_size : (i + 1) * size * world_size][rank::world_size]
        chunks.append((mine, True) if mine else (rows[:1], False))
    return chunks


def collate(examples: list[dict], pad_id: int, layout: str, device) -> dict:
    """A batch of rows with one or more completions each.

    Sequences are numbered answer by answer: of n rows with two answers, sequence i is the chosen answer of row i and n + i its rejected one.
    layout "shared": one line `[prompt | first | second]` a row; positions restart after the prompt for each answer, and the float mask lets
    a token see the prompt and its own answer only. layout "rows": one line `[prompt | answer]` a sequence. layout "model_head": the same,
    and `logits_to_keep` tells the model's own output layer how many last positions are asked for.

    Returns a dict of tensors on `device`:
        input_ids, position_ids   [lines, length] int64
        attention_mask            [lines, 1, length, length] float32, 0 or -1e9 ("shared"); [lines, length] int64, 1 or 0
        source                    [tokens] int64: index into the flattened lines * length of the position that predicts a completion token
        targets                   [tokens] int64: the completion tokens
        sequence                  [tokens] int64: the sequence that each completion token belongs to
        completion_tokens         [sequences] int64: completion length
        last                      [sequences] int64: flat index of each sequence's last token
    """
    answers = len(examples[0]["completions"])
    n = len(examples)
    if layout == "shared":
        lines = [(example["prompt"], [(j * n + i, ids) for j, ids in enumerate(example["completions"])]) for i, example in enumerate(examples)]
    else:
        lines = [(examples[s % n]["prompt"], [(s, examples[s % n]["completions"][s // n])]) for s in range(answers * n)]
    length = max(len(prompt) + sum(len(ids) for _, ids in parts) for prompt, parts in lines)
    input_ids, position_ids, segments, source, targets, sequence = [], [], [], [], [], []
    completion_tokens, last = [0] * (answers * n), [0] * (answers * n)
    for line, (prompt, parts) in enumerate(lines):
        ids, positions, segment, start = list(prompt), list(range(len(prompt))), [0] * len(prompt), line * length
        for s, completion in parts:
            k, begin = len(completion), start + len(ids)
            source += [start + len(prompt) - 1, *range(begin, begin + k - 1)]  # the first token is predicted by the prompt's last
            targets += completion
            sequence += [s] * k
            completion_tokens[s], last[s] = k, begin + k - 1
            ids += completion
            positions += range(len(prompt), len(prompt) + k)
            segment += [1 + s // n] * k
        padding = length - len(ids)
        input_ids.append(ids + [pad_id] * padding)
        position_ids.append(positions + [0] * padding)
        segments.append(segment + [-1] * padding)

    def put(values):
        tensor = torch.tensor(values, dtype=torch.int64)
        return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor.to(device)

    batch = {"input_ids": put(input_ids), "position_ids": put(position_ids), "source": put(source), "targets": put(targets)}
    batch |= {"sequence": put(sequence), "completion_tokens": put(completion_tokens), "last": put(last)}
    segments = put(segments)  # [lines, length]: 0 prompt, 1.. answer, -1 padding
    if layout == "shared":
        key, query = segments[:, None, :], segments[:, :, None]
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        visible = causal & ((key == query) | (key == 0))
        batch["attention_mask"] = torch.where(visible, 0.0, MASKED)[:, None]
    else:
        batch["attention_mask"] = (segments >= 0).long()
    if layout == "model_head":
        batch["logits_to_keep"] = length - min(i % length for i in source)
    return batch
