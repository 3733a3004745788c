"""Rows of text to token ids; docs/data.md tells users the conventions.

Text to tokens is the tokenizer's own reading of `prompt + completion`; the prompt's tokens are the
same in all answers of a row; one EOS ends an answer that was not cut; rows that cannot be used are
dropped and counted.
"""

from chat.messages import chat_of_texts, common_prefix
from chat.templates import chat_ids
from common.batches import Rows


def encode_row(tokenizer, prompt, answers: list, max_length: int, chat: bool = False, add_eos: bool = True):
    """Token ids of one prompt and its answers.

    Args:
        prompt: a string, or a list of messages, which goes through the tokenizer's chat template.
            An empty one becomes the token that the tokenizer begins a text with, or EOS where it
            has none.
        answers: strings or lists of messages; none where only the prompt is asked for.
        max_length: limit in tokens for the prompt and one completion; completions lose their end.
        chat: strings go through the template too.
        add_eos: whether an EOS is put behind each answer that does not end in one.

    Returns:
        ({"prompt": ids, "completions": [ids, ...]}, None, moved), or (None, reason, False).
        `moved`: the boundary had to be moved to the left, because a token would have crossed it, or
        the template does not keep its generation prompt. With `add_eos` one EOS ends each
        completion that was not cut.
    """
    eos = tokenizer.eos_token_id
    if chat and isinstance(prompt, str):
        if not prompt.strip():
            return None, "no prompt, which --chat needs", False
        prompt, answers = chat_of_texts(prompt, answers)
    ids_of = text_ids if isinstance(prompt, str) else chat_ids
    encoded, reason = ids_of(tokenizer, prompt, answers)
    if reason:
        return None, reason, False
    prompt_ids, whole, boundary, ended = encoded
    if boundary == 0:
        return None, "prompt and answers share no token", False
    if boundary >= max_length:
        return None, "the prompt alone fills max_length", False
    whole = [ids if done or not add_eos else [*ids, eos] for ids, done in zip(whole, ended)]
    completions = [ids[boundary:max_length] for ids in whole]
    # A tokenizer that ends every text in EOS puts one behind the prompt: no boundary moved.
    own = len(prompt_ids) - (prompt_ids[-1] == eos)
    return {"prompt": (whole or [prompt_ids])[0][:boundary], "completions": completions}, None, boundary < own


def text_ids(tokenizer, prompt: str, answers: list[str]) -> tuple[tuple | None, str | None]:
    """((prompt ids, ids of prompt + answer for each, boundary, whether each ends in EOS), None)."""
    eos = tokenizer.eos_token_id
    prompt_ids, *whole = [ids_of_text(tokenizer, text) for text in (prompt, *(prompt + answer for answer in answers))]
    if not prompt and not prompt_ids:
        # Nothing precedes the text, not even a token of the tokenizer's: EOS stands for that.
        prompt_ids, whole = [eos], [[eos, *ids] for ids in whole]
    ends_in_eos = len(prompt_ids) > 1 and prompt_ids[-1] == eos  # as some tokenizers end every text
    boundary = min((common_prefix(prompt_ids, ids) for ids in whole), default=len(prompt_ids) - ends_in_eos)
    return (prompt_ids, whole, boundary, [bool(ids) and ids[-1] == eos for ids in whole]), None


def ids_of_text(tokenizer, text: str) -> list[int]:
    """The tokenizer's ids of a text, with one BOS where the text begins with it already."""
    ids, bos = tokenizer(text).input_ids, tokenizer.bos_token_id
    is_double = bos is not None and ids[:2] == [bos, bos] and text.startswith(tokenizer.bos_token)
    return ids[1:] if is_double and tokenizer("").input_ids[:1] == [bos] else ids  # a BOS that it put there itself


def encode_rows(
    tokenizer, texts: list[tuple], max_length: int, dropped=None, answers=2, columns=(), chat=False
) -> Rows:
    """Encodes rows (prompt, answer, ..., value, ...): `answers` answers, then a value for each name
    in `columns`.

    Rows that cannot be used are counted by reason beside those in `dropped`."""
    rows = Rows(seen=len(texts) + sum((dropped or {}).values()), dropped=dropped)
    for text in texts:
        prompt, *rest = text
        row, reason, moved = encode_row(tokenizer, prompt, rest[:answers], max_length, chat)
        if reason:
            rows.dropped[reason] += 1
        else:
            rows.append(row | {"texts": text} | dict(zip(columns, rest[answers:])))
            rows.moved += moved
    return rows
