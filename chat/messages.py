"""Chats in the forms that rows hold, all read as lists of {"role": str, "content": str}."""

import re

# The names that ShareGPT's turns have for the roles; others stay as they are.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
CHATS = ("messages", "conversations")  # fields that hold a whole chat
CALLS = ("tool_calls", "function_call")
TURN = re.compile(r"\n\n(Human|Assistant):")


def common_prefix(a, b) -> int:
    """Length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def is_messages(value: object) -> bool:
    """A chat: a non-empty list of {"role": str, "content": str}."""
    return isinstance(value, list) and len(value) > 0 and all(map(is_message, value))


def is_message(value: object) -> bool:
    """One turn of a chat."""
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def read_chat(value: object) -> tuple[object, str | None]:
    """(value, None): a chat, in whichever form, as a list of messages, everything else as it is; or
    (None, reason) for a chat that cannot be used.

    Forms: a list of messages or one alone, each {"role", "content"} or ShareGPT's {"from",
    "value"}; content as a string or as parts of type text. A further key of a message stays where
    it has a value: templates read some."""
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return value, None
    messages = []
    for turn in turns:
        names = ("role", "content") if "role" in turn else ("from", "value")
        role, content = (turn.get(name) for name in names)
        if content is None and any(turn.get(name) for name in CALLS):
            return None, "a message calls a tool and has no text"
        if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
            content = [part.get("text") if part.get("type") == "text" else None for part in content]
            if not all(isinstance(text, str) for text in content):
                return None, "a message has parts other than text"
            content = "".join(content)
        role = ROLES.get(role, role) if isinstance(role, str) and names[0] == "from" else role
        further = {key: x for key, x in turn.items() if key not in names and x is not None}
        messages.append({"role": role, "content": content} | further)
    return (messages, None) if is_messages(messages) else (value, None)


def read_chats(*values) -> tuple[list, str | None]:
    """The same of several fields; the reason of the first that cannot be used."""
    read = [read_chat(value) for value in values]
    return [value for value, _ in read], next((reason for _, reason in read if reason), None)


def as_answer(value: object) -> object:
    """A string as the assistant's one message; everything else as it is."""
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def split_last_turn(chat: list[dict]) -> tuple[tuple | None, str | None]:
    """((prompt, answer), None) of a whole chat, or (None, reason): the answer is the assistant's
    last turn, the prompt all before it, the assistant's earlier turns included; what follows the
    last turn answers nothing and goes."""
    last = max((i for i, message in enumerate(chat) if message["role"] == "assistant"), default=-1)
    if last <= 0:
        return None, "no message of the assistant" if last < 0 else "no message before the answer"
    return (chat[:last], [chat[last]]), None


def prompt_of_chat(chat: list[dict]) -> tuple[list | None, str | None]:
    """(what a whole chat asks, None), or (None, reason): all of it, or, where the assistant has the
    last word, what precedes that."""
    if chat[-1]["role"] != "assistant":
        return chat, None
    split, reason = split_last_turn(chat)
    return (split[0] if split else None), reason


def chat_of_texts(prompt: str, answers: list[str]) -> tuple[list[dict], list[list[dict]]]:
    """What `--chat` makes of strings: (prompt, answers) as messages.

    The prompt becomes the user's message, a dialogue "\\n\\nHuman: ... \\n\\nAssistant:" its turns;
    an answer becomes the assistant's message, without the white space that it begins with, which
    stood between prompt and answer."""
    return turns_of(prompt), [as_answer(answer.lstrip()) for answer in answers]


def turns_of(prompt: str) -> list[dict]:
    """The messages of a dialogue that is one string; any other string is one message."""
    start, *rest = TURN.split(prompt)
    names, texts = rest[::2], [text.strip() for text in rest[1::2]]
    # Human and Assistant take turns, and the last, empty one is the Assistant's.
    if start.strip() or len(names) % 2 or names != ["Human", "Assistant"] * (len(names) // 2) or not names:
        return [{"role": "user", "content": prompt}]
    if texts[-1] or not all(texts[:-1]):
        return [{"role": "user", "content": prompt}]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": text} for name, text in zip(names[:-1], texts[:-1])]


def pair_of_messages(prompt, chosen: list[dict], rejected: list[dict]) -> tuple[tuple | None, str | None]:
    """((prompt, chosen, rejected), None) or (None, reason) of answers that are chat messages: whole
    dialogues, or what follows the prompt."""
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
