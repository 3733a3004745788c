"""Scores of the rows of a file, a line of JSON for each: what `python -m common.evaluate` writes.

Deliberately plain: two lines per pair, full logits, float32, nothing gathered and nothing shared.
"""

import json
import os
from collections import Counter
from pathlib import Path

import torch

from chat import templates
from chat.messages import as_answer, is_messages, read_chats
from common import InputError
from common.batches import row_length
from common.fields import is_unicode, pair_of_row, refuse_half_pair
from common.files import plain, read_rows, write_text
from common.generate import is_tiny
from common.metrics import accuracy
from common.models import length_limit, load_tokenizer, resolve_model
from common.oracle import plain_logps
from judging.heads import is_run, load_parts, rewards_of
from judging.reward_bench import print_subsets
from tokens.encode import encode_row

SCORES = ("chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens")
REWARDS = ("chosen_reward", "rejected_reward")
PAIRS = {"logps": SCORES[:2], "tokens": SCORES[2:], "reward": REWARDS}


def score_file(
    model_name: str,
    data: str,
    output: Path,
    max_length: int | None,
    batch_size: int,
    chat: bool = False,
    chat_template: str | None = None,
) -> None:
    """Writes the scores of every row of a file of pairs, in order, and says how many there are.

    Args:
        max_length: limit in tokens for prompt and one completion; None: by the model.
        batch_size: sequences in one forward pass.
        chat: whether strings go through the chat template; chat_template: a file with one.
    """
    if output.exists():
        raise InputError(f"--output {output}: the file exists already; choose another name.")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}.")
    rows = read_rows(data)
    sides = [sides_of_row(where, row) for where, row in rows]  # a missing column stops here, before any work
    folder = resolve_model(model_name)
    tokenizer = load_tokenizer(folder, chat_template)
    if chat:
        templates.check_chat(tokenizer, is_toy=False)
    elif hint := templates.hint(tokenizer, (row[0] for row, _ in sides if row)):
        print(hint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, reward, has_logps = load_parts(model_name, folder, tokenizer, device)
    if is_tiny(model) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    max_length = length_limit(max_length, model, None if has_logps else tokenizer)
    # Others' reward models are read at the text's end; a run was trained with an EOS there.
    encoded, reasons = encode_sides(tokenizer, sides, max_length, chat, add_eos=has_logps or is_run(folder))
    names = SCORES if reward is None else SCORES + REWARDS
    lines = [{"row": number, **dict.fromkeys(names)} for number in range(len(rows))]
    for number, reason in reasons.items():
        lines[number]["reason"] = reason
    pad_id = tokenizer.pad_token_id
    for number, scores in score_answers(model if has_logps else None, reward, encoded, pad_id, batch_size).items():
        for name, values in scores.items():
            lines[number] |= dict(zip(PAIRS[name], split_sides(sides[number][0], values)))
    write_text(output, "".join(json.dumps(plain(line), allow_nan=False) + "\n" for line in lines))
    print_subsets([row for _, row in rows], lines)
    say_scores(lines, Counter(reasons.values()), output, has_logps)


def encode_sides(tokenizer, sides: list[tuple], max_length: int, chat: bool, add_eos: bool) -> tuple[dict, dict]:
    """(token ids of each row that can be used, the reason of each other one), by its number."""
    encoded, reasons = {}, {}
    for number, (row, reason) in enumerate(sides):
        if row:
            prompt, *answers = row
            answers = [answer for side in answers for answer in (side if isinstance(side, tuple) else [side])]
            ids, reason, _ = encode_row(tokenizer, prompt, answers, max_length, chat, add_eos)
        if reason:
            reasons[number] = reason
        else:
            encoded[number] = ids
    return encoded, reasons


def sides_of_row(where: str, row: dict) -> tuple[tuple | None, str | None]:
    """((prompt, chosen, rejected), None) or (None, reason): a side is one answer, or a tuple of
    several where the row has a list of them."""
    refuse_half_pair(where, row)
    if not any(isinstance(row[name], list) and not is_turns(row[name]) for name in ("chosen", "rejected")):
        return pair_of_row(where, row)
    sides = [value if isinstance(value, list) else [value] for value in (row["chosen"], row["rejected"])]
    (prompt, *answers), reason = read_chats(row.get("prompt", row.get("conversations")), *sides[0], *sides[1])
    if reason:
        return None, reason
    if not all(sides):
        return None, "a side has no answer"
    if is_messages(prompt):
        answers = [as_answer(answer) for answer in answers]
    kind = is_messages if is_messages(prompt) else lambda value: isinstance(value, str)
    if not (is_messages(prompt) or isinstance(prompt, str)) or not all(map(kind, answers)):
        return None, "a field is neither text nor chat messages"
    if not is_unicode([prompt, answers]):
        return None, "a field is not valid Unicode text"
    if isinstance(prompt, str) and not prompt.strip():
        return None, "the prompt is empty"
    if not all(text.strip() for a in answers for text in ([a] if isinstance(a, str) else [m["content"] for m in a])):
        return None, "an answer is empty"
    n = len(sides[0])
    names = (("chosen", answers[:n]), ("rejected", answers[n:]))
    return (prompt, *(tuple(side) if isinstance(row[name], list) else side[0] for name, side in names)), None


def is_turns(value: list) -> bool:
    """Whether a list is one chat rather than several answers."""
    return bool(value) and all(isinstance(turn, dict) for turn in value)


def split_sides(row: tuple, values: list) -> list:
    """What is known of each answer as (chosen, rejected): a number for a side of one answer, a list
    for a side of several."""
    n = len(row[1]) if isinstance(row[1], tuple) else 1
    return [
        part if isinstance(side, tuple) else part[0] for side, part in zip((row[1], row[2]), (values[:n], values[n:]))
    ]


def score_answers(model, reward, rows: dict[int, dict], pad_id: int, batch_size: int) -> dict[int, dict]:
    """What is known of the answers of each row, by its number: {"tokens", "logps" of a language
    model, "reward" where there is one}, a value for each answer, chosen ones first."""
    scores = {number: {"tokens": list(map(len, row["completions"]))} for number, row in rows.items()}
    order = sorted(rows, key=lambda number: row_length(rows[number]))
    sequences = [(rows[number]["prompt"], ids) for number in order for ids in rows[number]["completions"]]
    columns = {}
    if model is not None and sequences:
        columns["logps"] = plain_logps(model, sequences, pad_id, batch_size).tolist()
    if reward is not None:
        columns["reward"] = rewards_of(reward, sequences)
    for name, values in columns.items():
        values = iter(values)
        for number in order:
            scores[number][name] = [next(values) for _ in rows[number]["completions"]]
    return scores


def share_above(lines: list[dict], chosen: str, rejected: str) -> str:
    """Share of the rows whose chosen answers all score higher than all rejected ones, ties one
    half."""
    scores = []
    for line in lines:
        if line.get(chosen) is not None:
            worst, best = line[chosen], line[rejected]
            worst = min(worst) if isinstance(worst, list) else worst
            scores.append([worst, max(best) if isinstance(best, list) else best])
    share = accuracy(torch.tensor(scores).view(-1, 2))
    return "-" if share is None else f"{share:.3f}"


def say_scores(lines: list[dict], reasons: Counter, output: Path, has_logps: bool) -> None:
    """The line at the end."""
    dropped = "".join(f", {n:,} dropped ({reason})" for reason, n in reasons.most_common())
    shares = [("preference", *PAIRS["logps"])] * has_logps + [("reward", *REWARDS)] * ("chosen_reward" in lines[0])
    words = ", ".join(f"{name} accuracy {share_above(lines, *sides)}" for name, *sides in shares)
    scored = len(lines) - reasons.total()
    print(f"{len(lines):,} rows, {scored:,} scored{dropped}. {words.capitalize()}. Written to {output}.")
