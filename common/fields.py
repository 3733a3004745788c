"""One row of a file to prompt, answers and label, or to the reason why it cannot be used."""

import json

from chat.messages import as_answer, common_prefix, is_messages, pair_of_messages, read_chats
from common import InputError

MARKER = "\n\nAssistant:"  # where an answer begins in a dialogue that is one string


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


def refuse_half_pair(where: str, row: dict) -> None:
    """Raises InputError where one side of a pair is missing."""
    for field in ("chosen", "rejected"):
        if field not in row:
            raise InputError(
                f'{where}: no field "{field}"; expected chosen and rejected, and prompt unless it is part of both '
                f"(found {names_of(row)})."
            )


def pair_of_row(where: str, row: dict) -> tuple[tuple | None, str | None]:
    """((prompt, chosen, rejected), None), each a string or a list of messages, or (None, reason)
    for a row to drop.

    Raises InputError where a column is missing. Without `prompt` (or `conversations`) the prompt is
    implicit: what both answers begin with."""
    refuse_half_pair(where, row)
    field = "conversations" if "prompt" not in row and "conversations" in row else "prompt"
    (prompt, chosen, rejected), reason = read_chats(row.get(field), row["chosen"], row["rejected"])
    if reason:
        return None, reason
    if is_messages(prompt):
        chosen, rejected = as_answer(chosen), as_answer(rejected)
    if is_messages(chosen) and is_messages(rejected):
        pair, reason = pair_of_messages(prompt, chosen, rejected)
    elif any(isinstance(side, list) and side and isinstance(side[0], str) for side in (chosen, rejected)):
        pair, reason = None, "several answers on a side, which only common.evaluate reads"
    elif not all(isinstance(value, str) for value in (chosen, rejected, *([prompt] if field in row else []))):
        pair, reason = None, "a field is neither text nor chat messages"
    else:
        pair, reason = pair_of_texts(prompt, chosen, rejected)
    if pair and pair[1] == pair[2]:
        return None, "both answers are identical"
    if pair and not is_unicode(pair):
        return None, "a field is not valid Unicode text"
    return pair, reason


def pair_of_texts(prompt: str | None, chosen: str, rejected: str) -> tuple[tuple | None, str | None]:
    """The same for strings alone; prompt None: it is part of both answers."""
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
