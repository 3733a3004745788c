"""Answers of a model to the prompts of a file, a line of JSON for each row: what
`python -m common.evaluate --generate` writes.

The lines are written as they come, to a file with ".begun" behind its name, and an interrupted
command goes on there: each group of rows is sampled with random numbers of its own.
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from chat import templates
from common import InputError
from common.data import sha256_of
from common.files import append_json_line, plain, read_rows, write_text
from common.generate import decode_completion, sample
from common.models import (
    choose_dtype,
    length_limit,
    load_model,
    load_tokenizer,
    load_weights,
    resolve_model,
    sha256_of_model,
)
from common.oracle import plain_rewards
from judging.heads import refuse_classifier
from rewards.prompts import prompt_of_row
from tokens.encode import encode_row

GROUP = 64  # rows that are sampled together


def answer_file(
    model_name: str,
    prompts: str,
    output: Path,
    best_of: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_length: int | None = None,
    chat: bool = False,
    chat_template: str | None = None,
) -> None:
    """Writes a line for each row of a file of prompts, in order, and says how many there are.

    A line holds row, prompt, answers (`best_of` of them), rewards where the folder has a reward
    head, and picked, the number of the answer with the largest reward; of a row that cannot be used
    row and reason. Sampling multiplies in bfloat16 where training would with `--dtype auto`, the
    head's rewards are computed in float32.

    Args:
        prompts: a file of rows with `prompt`, or of pairs.
        temperature: 0 is greedy.
        max_length: limit in tokens for prompt and answer; None: by the model.
        chat: whether strings go through the chat template; chat_template: a file with one.
    """
    if output.exists():
        raise InputError(f"--output {output}: the file exists already; choose another name.")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}.")
    rows = read_rows(prompts)
    texts = [prompt_of_row(where, row) for where, row in rows]  # a missing column stops here, before any work
    folder = resolve_model(model_name)
    refuse_classifier(model_name, folder, "--generate")
    head = load_weights(folder, "score.weight").get("score.weight")
    if best_of > 1 and head is None:
        raise InputError(f"--best-of {best_of}: {model_name} has no reward head; a run of dph.py has one.")
    settings = {
        "model_sha256": sha256_of_model(folder),
        "prompts_sha256": sha256_of([row for _, row in rows]),
        **{"best_of": best_of, "max_new_tokens": max_new_tokens, "temperature": temperature},
        **{"top_p": top_p, "seed": seed, "max_length": max_length},
    }
    tokenizer = load_tokenizer(folder, chat_template)
    settings |= {"chat": chat, "template_sha256": sha256_of(tokenizer.chat_template)}
    if chat:
        templates.check_chat(tokenizer, is_toy=False)
    elif hint := templates.hint(tokenizer, (text[0] for text, _ in texts if text)):
        print(hint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder, device, tokenizer).eval()
    settings["dtype"] = choose_dtype("auto", model, device)
    begun = output.with_name(output.name + ".begun")
    lines = begun_lines(begun, settings)
    if lines:
        print(f"Going on after row {len(lines) - 1} of {begun}.")
    room = length_limit(max_length, model) - max_new_tokens
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=settings["dtype"] == "bfloat16")
    shape = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "autocast": autocast}
    for start in range(len(lines), len(texts), GROUP):
        group = texts[start : start + GROUP]
        for line in answers_to(model, tokenizer, head, group, start, room, chat, best_of, seed, shape):
            append_json_line(begun, line)
            lines.append(line)
        print(f"{len(lines):,} of {len(texts):,} rows", flush=True)
    write_text(output, "".join(json.dumps(plain(line), allow_nan=False) + "\n" for line in lines))
    begun.unlink()
    reasons = Counter(line["reason"] for line in lines if "reason" in line)
    dropped = "".join(f", {n:,} dropped ({reason})" for reason, n in reasons.most_common())
    print(f"{len(lines):,} rows, {len(lines) - reasons.total():,} answered{dropped}. Written to {output}.")


def begun_lines(begun: Path, settings: dict) -> list[dict]:
    """The whole groups of lines of a file that was begun with these settings; it then ends in them.

    Raises InputError where it was begun with others."""
    if not begun.exists():
        append_json_line(begun, settings)
        return []
    complete = begun.read_text(encoding="utf-8").split("\n")[:-1]  # a kill may have cut the last one
    values = [json.loads(line) for line in complete]
    if values and values[0] != settings:
        changed = ", ".join(name for name in settings if values[0].get(name) != settings[name])
        raise InputError(f"{begun} was begun with other settings ({changed}); remove it, or choose another --output.")
    lines = values[1:]
    lines = lines[: len(lines) - len(lines) % GROUP]
    write_text(begun, "".join(json.dumps(value, allow_nan=False) + "\n" for value in [settings, *lines]))
    return lines


def answers_to(model, tokenizer, head, texts, first: int, room: int, chat: bool, best_of: int, seed: int, shape: dict):
    """The lines of a group of rows, the first of which has the number `first`.

    Args:
        texts: ((prompt,), None), or (None, reason), of each row. room: tokens that a prompt may
            have.
    """
    lines, prompt_ids = [], {}
    for number, (text, reason) in enumerate(texts, first):
        if text:
            row, reason, _ = encode_row(tokenizer, text[0], [], room, chat)
            prompt_ids |= {number: row["prompt"]} if row else {}
        lines.append({"row": number, "reason": reason} if reason else {"row": number, "prompt": text[0]})
    ids_of_rows, group_seed = list(prompt_ids.values()), 1_000_003 * seed + first
    completions = sample(model, ids_of_rows, tokenizer, n=best_of, seed=group_seed, **shape) if prompt_ids else []
    for i, (number, ids) in enumerate(prompt_ids.items()):
        candidates = completions[i * best_of : (i + 1) * best_of]
        line = lines[number - first]
        line["answers"] = [decode_completion(tokenizer, completion) for completion in candidates]
        if head is not None:
            line["rewards"] = plain_rewards(model, head, [(ids, completion) for completion in candidates])
            line["picked"] = max(range(best_of), key=line["rewards"].__getitem__)
    return lines
