"""Chat templates: messages to token ids, and where the answer begins in them."""

from pathlib import Path

from chat.messages import common_prefix
from common import InputError, first_line

# The default, then without thinking: some templates open a thought in the prompt that no answer
# has.
MODES: tuple[dict, ...] = ({}, {"enable_thinking": False})
# Stand for an answer where only the prompt is asked for; two, of which one may merge with the
# prompt.
PROBES = [[{"role": "assistant", "content": text}] for text in (".", "A")]
PROBE = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Nowhere"}]
REWRITTEN = "the chat template does not keep the prompt's tokens when an answer follows"


def chat_ids(tokenizer, prompt: list[dict], answers: list[list[dict]]) -> tuple[tuple | None, str | None]:
    """((prompt ids, ids of prompt + answer for each, boundary, whether each ends in EOS), None), or
    (None, reason).

    The boundary is the prompt's length where its ids begin all the others; else it is so without
    thinking; else the longest common prefix decides, which lies in the generation prompt: a
    template that changes what precedes it is refused."""
    if tokenizer.chat_template is None:
        return None, "chat messages, but the tokenizer has no chat template"
    found = None
    for mode in MODES:
        try:
            texts = [render(tokenizer, prompt, add_generation_prompt=True, **mode)]
            texts += [render(tokenizer, [*prompt, *answer], **mode) for answer in answers or PROBES]
        except Exception as error:  # templates raise what they like: no system role, roles that must alternate
            return None, f"the chat template refuses the messages: {first_line(error)}"
        prompt_ids, *whole = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        decide = min if answers else max
        boundary = decide(common_prefix(prompt_ids, ids) for ids in whole)
        found = found or (texts, prompt_ids, whole, boundary)
        if boundary == len(prompt_ids):
            found = (texts, prompt_ids, whole, boundary)
            break
    (text, *others), prompt_ids, whole, boundary = found
    if boundary < len(prompt_ids):
        kept = min(common_prefix(text, other) for other in others)  # in characters
        if kept < length_of_prompt(tokenizer, prompt, text):
            return None, REWRITTEN
    whole = [without_second_eos(tokenizer, ids, boundary) for ids in whole]
    # Templates put a newline after the end of turn, so the EOS need not be the last token.
    ended = [tokenizer.eos_token_id in ids[boundary:] for ids in whole]
    return (prompt_ids, whole if answers else [], boundary, ended), None


def without_second_eos(tokenizer, ids: list[int], boundary: int) -> list[int]:
    """The ids without an EOS that the template puts behind the answer's own."""
    eos, answer = tokenizer.eos_token_id, ids[boundary:-1]
    if ids[-1] != eos or eos not in answer:
        return ids
    between = answer[len(answer) - answer[::-1].index(eos) :]
    return ids if tokenizer.decode(between).strip() else ids[:-1]


def end_of_turn(tokenizer) -> str | None:
    """The special token that the chat template puts behind an answer, where that is not EOS.

    Some instruct models (Gemma, Phi 3) end their answers in it; their EOS ends documents."""
    if tokenizer.chat_template is None:
        return None
    try:
        text = render(tokenizer, PROBE)
    except Exception:  # it wants other messages than these
        return None
    _, found, behind = text.rpartition(PROBE[-1]["content"])
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [token for token in special if found and behind.lstrip().startswith(token)]
    return max(ends, key=len) if ends and tokenizer.eos_token not in ends else None


def render(tokenizer, messages: list[dict], **options) -> str:
    """The template's text for messages."""
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def length_of_prompt(tokenizer, prompt: list[dict], text: str) -> int:
    """Characters that the prompt's messages take in its text, the generation prompt left out."""
    try:
        return common_prefix(text, render(tokenizer, prompt))
    except Exception:  # a template that takes no prompt alone
        return len(text)


def use_template(tokenizer, path: str) -> None:
    """Gives the tokenizer the template of a file, in place of its own; InputError where it cannot
    be read. It is saved with the tokenizer."""
    import jinja2

    flag = f"--chat-template {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}: cannot be read ({first_line(error)}).") from None
    if not text.strip():
        raise InputError(f"{flag}: the file is empty; expected a Jinja template.")
    tokenizer.chat_template, tokenizer.has_given_template = text, True
    try:
        render(tokenizer, [{"role": "user", "content": "a"}])
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{flag}, line {error.lineno}: not a Jinja template ({first_line(error)}).") from None
    except Exception:  # it may want other messages than these
        return


def check_chat(tokenizer, is_toy: bool) -> None:
    """InputError where `--chat` cannot be had."""
    if is_toy:
        raise InputError("--chat: the toy's rows are judged as the plain text that they are; expected --data of yours.")
    if tokenizer.chat_template is None:
        raise InputError("--chat: the model's tokenizer has no chat template; --chat-template FILE gives it one.")


def hint(tokenizer, prompts) -> str | None:
    """The line for string rows that do not go through the template that there is."""
    if tokenizer.chat_template is None or not any(isinstance(prompt, str) for prompt in prompts):
        return None
    return "The model has a chat template, which these rows of plain text do not go through; --chat uses it."
