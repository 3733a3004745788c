"""Perplexity of a text file: what `python -m common.evaluate --perplexity` measures."""

import math
import re
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


def documents_of(text: str) -> list[str]:
    """The parts of a text between lines "<|endoftext|>", without white space at their ends; a text
    without such a line is one document, as it is."""
    parts = re.split(r"^<\|endoftext\|>[ \t]*$", text, flags=re.MULTILINE)
    return [part.strip() for part in parts if part.strip()] if len(parts) > 1 else [text]


@torch.no_grad()
def token_logps(model, documents: list[list[int]], first: int, context: int, stride: int) -> torch.Tensor:
    """log p of each token of each document given those before it there, [tokens], float64, on the
    CPU.

    Windows of `context` tokens move by `stride`; each predicts the tokens that no window before it
    has, the first one as many as it holds. So every token is predicted once, and all but the first
    `context` ones after at least context - stride tokens. With stride = context this is the rolling
    log-likelihood of lm-eval, whose last window is a full one, too.

    Args:
        documents: token ids without special ones. first: the token that stands before a document.
    """
    device, parts = next(model.parameters()).device, []
    windows = [(ids, begin) for ids in documents for begin in (0, *range(context, len(ids), stride))]
    count = sum(map(len, documents))
    for ids, begin in progress.track(windows, f"perplexity of {count:,} tokens", unit="window"):
        end = min(len(ids), begin + (stride if begin else context))
        inputs = [first, *ids[: end - 1]] if end <= context else ids[end - context - 1 : end - 1]
        inputs = torch.tensor([inputs], device=device)
        targets = torch.tensor(ids[begin:end], device=device)
        logits = model(input_ids=inputs, use_cache=False).logits[0, begin - end :]  # [predicted, vocabulary]
        parts.append(-torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").double().cpu())
    return torch.cat(parts)


def perplexity_of_text(model, tokenizer, text: str, context: int, stride: int | None) -> dict:
    """Perplexities of the documents of a text; docs/evaluation.md has the formulas.

    Each stands behind the tokenizer's BOS, or EOS where it has none, which is not predicted, as no
    EOS behind it is. Words are what stands between white space.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise InputError(f"--stride {stride}: expected 1 to {context}, the tokens that a window holds (--max-length).")
    texts = documents_of(text)
    documents = [tokenizer(part, add_special_tokens=False, verbose=False).input_ids for part in texts]
    documents = [ids for ids in documents if ids]
    tokens = sum(map(len, documents))
    if not tokens:
        raise InputError("--perplexity: the tokenizer makes no token of that text.")
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    total = -token_logps(model, documents, first, context, stride).sum().item()  # nats
    words, size = sum(len(part.split()) for part in texts), sum(len(part.encode("utf-8")) for part in texts)
    counts = {"documents": len(documents), "tokens": tokens, "words": words, "bytes": size}
    return counts | {
        "context": context,
        "stride": stride,
        "nats_per_token": total / tokens,
        "token_perplexity": exp(total / tokens),
        "word_perplexity": exp(total / words),
        "bits_per_byte": total / size / math.log(2),
    }


def exp(nats: float) -> float:
    """e to that power; inf where it is too large for a float."""
    return math.exp(nats) if nats < 709 else math.inf
