"""What experiments/sentiment.py trains and judges with: openings of texts, the base model's
continuations of them with their true rewards, and rows that Bradley-Terry labelled.

All openings have as many tokens, and all continuations the same limit. So `--max-length`, the sum,
cuts the EOS that scripts put behind every text exactly where the sampled text was cut, too: no
policy learns to stop where the base model did not.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from common import InputError
from common.fields import names_of
from common.files import decode_text, format_of, read_bytes, read_json, read_rows, write_json
from common.generate import sample, text_after
from experiments import study
from judging.perplexity import documents_of
from rewards.sentiment import vader_reward
from tokens.encode import encode_row

SCALE = 2.0  # the true reward is this times VADER's compound score: between -2 and 2


def true_rewards(texts: list[str], score=None) -> list[float]:
    """The true reward of each text; `score(prompts, texts)` -> [n], VADER's compound by default."""
    score = score or vader_reward("experiments/sentiment.py")
    return (SCALE * score([""] * len(texts), texts).double()).tolist()


# -- openings


def read_texts(source: str) -> list[str]:
    """The texts of a file: rows with "prompt" or "text", or plain text whose documents stand
    between lines "<|endoftext|>".

    Raises InputError where there are none.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"--prompts {source}: no such file; expected rows with prompt or text, or a .txt file.")
    if format_of(path) == ".txt":
        return documents_of(decode_text(source, read_bytes(path, "--prompts ")))
    texts = []
    for where, row in read_rows(source):
        text = row.get("prompt", row.get("text"))
        if not isinstance(text, str):
            raise InputError(f'{where}: no field "prompt" or "text" with a string (found {names_of(row)}).')
        texts.append(text)
    return texts


def opening_of(tokenizer, text: str, count: int) -> str | None:
    """The beginning of a text that is `count` tokens long, the tokenizer's own special ones
    included; None where those do not end with a word, or would be other tokens by themselves.
    """
    ids = tokenizer(text[: 12 * count]).input_ids[:count]  # a token has a few characters
    opening = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ends_inside = text[len(opening) :][:1].isalnum()
    if not text.startswith(opening) or ends_inside or tokenizer(opening).input_ids != ids or len(ids) < count:
        return None
    return opening


def read_openings(source: str, tokenizer, count: int, wanted: int) -> list[str]:
    """The different openings of a file's texts, shuffled; InputError with fewer than `wanted`."""
    found = [opening_of(tokenizer, text, count) for text in read_texts(source)]
    openings = list(dict.fromkeys(opening for opening in found if opening))
    if len(openings) < wanted:
        have = f"{len(openings):,} of {len(found):,} texts have an opening of {count} tokens of their own"
        raise InputError(f"--prompts {source}: {have}; expected {wanted:,}, to train on and to judge by.")
    random.Random(0).shuffle(openings)
    return openings


# -- continuations


@dataclass
class Continuation:
    """What the base model said behind an opening: its text and true reward, and whether scripts
    would read the very tokens that were sampled from opening + text.
    """

    text: str
    reward: float
    is_exact: bool


def is_exact(tokenizer, opening: str, text: str, completion: list[int], max_length: int) -> bool:
    """Whether opening and text become the tokens that were sampled, as training reads them."""
    row, reason, _ = encode_row(tokenizer, opening, [text], max_length)
    expected = {"prompt": tokenizer(opening).input_ids, "completions": [completion]}
    return reason is None and row == expected


def continue_openings(model, tokenizer, openings: list[str], n: int, new_tokens: int, seed: int, score=None) -> list:
    """`n` continuations of each opening at temperature 1, [openings][n]."""
    prompts = [tokenizer(opening).input_ids for opening in openings]
    completions = sample(model, prompts, tokenizer, new_tokens, seed=seed, n=n)
    texts = [text_after(tokenizer, prompts[i // n], ids) for i, ids in enumerate(completions)]
    found = []
    for i, (text, reward) in enumerate(zip(texts, true_rewards(texts, score), strict=True)):
        opening, limit = openings[i // n], len(prompts[i // n]) + new_tokens
        usable = bool(text.strip()) and is_exact(tokenizer, opening, text, completions[i], limit)
        found.append(Continuation(text, reward, usable))
    return [found[i : i + n] for i in range(0, len(found), n)]


# -- labels


def prefers_first(first: float, second: float, rng: random.Random) -> bool:
    """A label by Bradley-Terry: true with probability sigma(first - second) of the true rewards."""
    return rng.random() < torch.tensor(first - second, dtype=torch.float64).sigmoid().item()


def pairs_of(openings: list[str], groups: list[list[Continuation]], rng: random.Random) -> list[dict]:
    """All pairs of different exact continuations of one opening, labelled by Bradley-Terry."""
    rows = []
    for opening, group in zip(openings, groups, strict=True):
        for a, b in combinations([answer for answer in group if answer.is_exact], 2):
            if a.text != b.text:
                first, second = (a, b) if prefers_first(a.reward, b.reward, rng) else (b, a)
                rows.append({"prompt": opening, "chosen": first.text, "rejected": second.text})
    return rows


def labelled_of(openings: list[str], groups: list[list[Continuation]], rng: random.Random) -> list[dict]:
    """All exact continuations, each with a label of its own: 1 with probability sigma(reward), as
    against an answer of reward 0.
    """
    rows = []
    for opening, group in zip(openings, groups, strict=True):
        for answer in group:
            if answer.is_exact:
                label = int(prefers_first(answer.reward, 0.0, rng))
                rows.append({"prompt": opening, "response": answer.text, "label": label})
    return rows


# -- files


def folder_of(runs: str, settings: dict, seed: int) -> Path:
    """The folder of a seed's rows: other settings have another one."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path(runs) / f"{settings['model']}-{digest}" / f"seed{seed}"


def write_rows(folder: Path, openings: list[str], groups: list[list[Continuation]], seed: int) -> None:
    """Writes prompts.jsonl, pairs.jsonl and labelled.jsonl, and facts.json about them as the last
    file.
    """
    pairs = pairs_of(openings, groups, random.Random(seed))
    labelled = labelled_of(openings, groups, random.Random(seed + 1))
    study.write_lines(folder / "prompts.jsonl", [{"prompt": opening} for opening in openings])
    study.write_lines(folder / "pairs.jsonl", pairs)
    study.write_lines(folder / "labelled.jsonl", labelled)
    answers = [answer for group in groups for answer in group]
    facts = {
        "prompts": len(openings),
        "pairs": len(pairs),
        "labelled": len(labelled),
        "positive_share": sum(row["label"] for row in labelled) / max(1, len(labelled)),
        "other_tokens": sum(not answer.is_exact for answer in answers),
        "sampled": len(answers),
    }
    write_json(folder / "facts.json", facts)


def facts_of(folder: Path) -> dict | None:
    """What facts.json says of a folder's rows; None where they are not all written."""
    path = folder / "facts.json"
    return read_json(path) if path.exists() else None
