"""Perplexity of a text file: what `python -m common.evaluate --perplexity` measures."""

import math
from pathlib import Path

import torch

from common import InputError
from common.files import decode_text, format_of, read_bytes
from report import progress


def read_text(source: str) -> str:
    """The text of a .txt file, also with .gz; InputError where there is none."""
    path = Path(source)
    if not path.is_file():
        raise InputError(f"--perplexity {source}: no such file.")
    if format_of(path) != ".txt":
        raise InputError(f"--perplexity {source}: expected a .txt file, also with .gz.")
    text = decode_text(source, read_bytes(path))
    if not text.strip():
        raise InputError(f"--perplexity {source}: the file is empty.")
    return text


@torch.no_grad()
def token_logps(model, ids: list[int], first: int, context: int, stride: int) -> torch.Tensor:
    """log p of each token of a text given those before it, [tokens], float64, on the CPU.

    Windows of `context` tokens move by `stride`; each predicts the tokens that no window before it
    has, the first one as many as it holds. So every token is predicted once, and all but the first
    `context` ones after at least context - stride tokens. With stride = context this is the rolling
    log-likelihood of lm-eval, whose last window is a full one, too.

    Args:
        ids: the text's tokens without special ones. first: the token that stands before the text.
    """
    device, sequence, parts = next(model.parameters()).device, [first, *ids], []
    starts = [0, *range(context, len(ids), stride)]
    for begin in progress.track(starts, f"perplexity of {len(ids):,} tokens", unit="window"):
        end = min(len(ids), begin + (stride if begin else context))
        inputs = torch.tensor([sequence[max(0, end - context) : end]], device=device)
        targets = torch.tensor(ids[begin:end], device=device)
        logits = model(input_ids=inputs, use_cache=False).logits[0, begin - end :]  # [predicted, vocabulary]
        parts.append(-torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").double().cpu())
    return torch.cat(parts)


def perplexity_of_text(model, tokenizer, text: str, context: int, stride: int | None) -> dict:
    """Perplexities of a text as one sequence; docs/evaluation.md has the formulas.

    The text stands behind the tokenizer's BOS, or EOS where it has none. Words are what stands
    between white space.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise InputError(f"--stride {stride}: expected 1 to {context}, the tokens that a window holds (--max-length).")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise InputError("--perplexity: the tokenizer makes no token of that text.")
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    total = -token_logps(model, ids, first, context, stride).sum().item()  # nats
    words, size = len(text.split()), len(text.encode("utf-8"))
    counts = {"tokens": len(ids), "words": words, "bytes": size, "context": context, "stride": stride}
    return counts | {
        "nats_per_token": total / len(ids),
        "token_perplexity": exp(total / len(ids)),
        "word_perplexity": exp(total / words),
        "bits_per_byte": total / size / math.log(2),
    }


def exp(nats: float) -> float:
    """e to that power; inf where it is too large for a float."""
    return math.exp(nats) if nats < 709 else math.inf
