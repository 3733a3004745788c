"""One row of a file to prompt, answers and label, or to the reason why it cannot be used."""

import json

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
    return " ".join(", ".join(map(str, row)).split()) or "none"  # a name may hold line breaks


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
