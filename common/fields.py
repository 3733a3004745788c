"""One row of a file to prompt, answers and label, or to the reason why it cannot be used."""

import json
import math
import re

from common import InputError

MARKER = "\n\nAssistant:"  # where an answer begins in a dialogue that is one string


def is_messages(value: object) -> bool:
    """A chat: a non-empty list of {"role": str, "content": str}."""
    return isinstance(value, list) and len(value) > 0 and all(map(is_message, value))


def is_message(value: object) -> bool:
    """One turn of a chat."""
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def common_prefix(a, b) -> int:
    """Length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def split_implicit_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two whole texts: cut after the last common "\\n\\nAssistant:",
    else before the last whitespace ahead of the first difference, so that no word is cut and the
    whitespace belongs to the completions. The prompt may come out empty."""
    same = common_prefix(chosen, rejected)
    turn = chosen.rfind(MARKER, 0, same)
    if turn >= 0:
        cut = turn + len(MARKER)
    else:
        cut = next((i for i in range(same - 1, 0, -1) if chosen[i].isspace()), 0)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def is_unicode(value: object) -> bool:
    """Whether texts can be encoded: JSON can hold half a surrogate pair, which no tokenizer has."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def names_of(row: dict) -> str:
    """The fields of a row, for a message."""
    return ", ".join(map(str, row)) or "none"


def pair_of_row(where: str, row: dict) -> tuple[tuple | None, str | None]:
    """((prompt, chosen, rejected), None), each a string or a list of messages, or (None, reason)
    for a row to drop.

    Raises InputError where a column is missing. Without `prompt` the prompt is implicit: what both
    answers begin with."""
    for field in ("chosen", "rejected"):
        if field not in row:
            raise InputError(
                f'{where}: no field "{field}"; expected chosen and rejected, and prompt unless it is part of both '
                f"(found {names_of(row)})."
            )
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if is_messages(chosen) and is_messages(rejected):
        pair, reason = pair_of_messages(prompt, chosen, rejected)
    elif not all(isinstance(row[field], str) for field in ("prompt", "chosen", "rejected") if field in row):
        pair, reason = None, "a field is neither text nor chat messages"
    else:
        pair, reason = pair_of_texts(prompt, chosen, rejected)
    if pair and pair[1] == pair[2]:
        return None, "both answers are identical"
    if pair and not is_unicode(pair):
        return None, "a field is not valid Unicode text"
    return pair, reason


def pair_of_messages(prompt, chosen: list[dict], rejected: list[dict]) -> tuple[tuple | None, str | None]:
    """The same for answers that are chat messages: whole dialogues, or what follows the prompt."""
    if is_messages(prompt):
        repeated = chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt
        n = len(prompt) if repeated else 0
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
    return (prompt, chosen, rejected), None


def pair_of_texts(prompt: str | None, chosen: str, rejected: str) -> tuple[tuple | None, str | None]:
    """The same for strings; prompt None: it is part of both answers."""
    if not chosen.strip() or not rejected.strip():
        return None, "an answer is empty"
    if prompt is None:
        if chosen == rejected:
            return None, "both answers are identical"
        prompt, chosen, rejected = split_implicit_prompt(chosen, rejected)
        if not prompt.strip():
            return None, "no common prompt"
        if not (chosen.strip() and rejected.strip()):
            return None, "an answer is empty"
    elif not prompt.strip():
        return None, "the prompt is empty"
    return (prompt, chosen, rejected), None


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


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
    return value if math.isfinite(value) else None


def labelled_of_row(where: str, row: dict, unlabelled: bool = False) -> tuple[tuple | None, str | None]:
    """((prompt, answer, label), None), texts as strings or lists of messages and the label a float,
    or (None, reason) for a row to drop.

    The answer is in `completion` or `response`, or all is in `text` and there is no prompt; the
    label is in `label` or `score`. Raises InputError where a column is missing. unlabelled: rows
    without a label are demonstrations, with label 1."""
    answer = next((name for name in ("completion", "response", "text") if name in row), None)
    label = next((name for name in ("label", "score") if name in row), None)
    if answer is None or (answer != "text" and "prompt" not in row):
        what = 'no field "prompt"' if answer else 'no field "completion" or "response"'
        raise InputError(
            f"{where}: {what}; expected prompt and completion (or response), or text alone (found {names_of(row)})."
        )
    if label is None and not unlabelled:
        raise InputError(
            f'{where}: no field "label" or "score"; expected one of them beside {answer} (found {names_of(row)}).'
        )
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
    if label is None or (unlabelled and row[label] is None):
        value = 1.0
    else:
        value = number_of(row[label], from_text=re.search(r"\.csv(\.gz)?, line \d+$", where) is not None)
    if value is None:
        return None, "the label is not a finite number"
    if not is_unicode([prompt, text]):
        return None, "a field is not valid Unicode text"
    return (prompt, text, value), None


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
