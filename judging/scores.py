"""Scores of the rows of a file, a line of JSON for each: what `python -m common.evaluate` writes.

Deliberately plain: two lines per pair, full logits, float32, nothing gathered and nothing shared.
"""

import json
import os
from collections import Counter
from pathlib import Path

import torch

from common import InputError
from common.batches import row_length
from common.data import encode_row
from common.fields import pair_of_row
from common.files import plain, read_rows, write_text
from common.generate import is_tiny
from common.metrics import accuracy
from common.models import length_limit, load_model, load_tokenizer, load_weights, resolve_model
from common.oracle import plain_logps, plain_rewards, sequences_of

SCORES = ("chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens")
REWARDS = ("chosen_reward", "rejected_reward")


def score_file(model_name: str, data: str, output: Path, max_length: int | None, batch_size: int) -> None:
    """Writes the scores of every row of a file of pairs, in order, and says how many there are.

    Args:
        max_length: limit in tokens for prompt and one completion; None: by the model.
        batch_size: sequences in one forward pass.
    """
    if output.exists():
        raise InputError(f"--output {output}: the file exists already; choose another name.")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}.")
    rows = read_rows(data)
    pairs = [pair_of_row(where, row) for where, row in rows]  # a missing column stops here, before any work
    folder = resolve_model(model_name)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, "cuda" if torch.cuda.is_available() else "cpu", tokenizer).eval()
    if is_tiny(model) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    max_length = length_limit(max_length, model)
    # [1, hidden] where the folder is a dph.py run, or another reward model
    head = load_weights(folder, "score.weight").get("score.weight")
    lines, encoded, reasons = [], {}, Counter()
    for number, (pair, reason) in enumerate(pairs):
        if pair:
            row, reason, _ = encode_row(tokenizer, pair[0], list(pair[1:]), max_length)
        if reason:
            reasons[reason] += 1
        else:
            encoded[number] = row
        lines.append({"row": number, **dict.fromkeys(SCORES if head is None else SCORES + REWARDS)})
        lines[-1] |= {"reason": reason} if reason else {}
    order = sorted(encoded, key=lambda number: row_length(encoded[number]))
    step = max(1, batch_size // 2)
    for start in range(0, len(order), step):
        numbers = order[start : start + step]
        chunk = [encoded[number] for number in numbers]
        for number, scores in zip(numbers, score_pairs(model, head, chunk, tokenizer.pad_token_id, batch_size)):
            lines[number] |= scores
    write_text(output, "".join(json.dumps(plain(line), allow_nan=False) + "\n" for line in lines))
    scores = [[line["chosen_logps"], line["rejected_logps"]] for line in lines if line["chosen_logps"] is not None]
    dropped = "".join(f", {n:,} dropped ({reason})" for reason, n in reasons.most_common())
    share = accuracy(torch.tensor(scores).view(-1, 2))
    share = "-" if share is None else f"{share:.3f}"
    print(f"{len(lines):,} rows, {len(encoded):,} scored{dropped}. Preference accuracy {share}. Written to {output}.")


def score_pairs(model, head, rows: list[dict], pad_id: int, batch_size: int) -> list[dict]:
    """What a line of the output says of each pair."""
    logps = plain_logps(model, sequences_of(rows), pad_id, batch_size).view(2, -1).T.tolist()
    scores = []
    for row, values in zip(rows, logps):
        scores.append(dict(zip(SCORES, [*values, *map(len, row["completions"])])))
        if head is not None:
            rewards = plain_rewards(model, head, [(row["prompt"], ids) for ids in row["completions"]])
            scores[-1] |= dict(zip(REWARDS, rewards))
    return scores
