"""Samples of a pretrained model, and their texts.

Models are in eval mode throughout. `banned_ids` (control tokens) are never sampled: the other
tokens share their probability. Samples are lists of token ids that end in EOS unless they were cut.
"""

import contextlib

import torch

from common import generate
from common.models import context_length
from common.processes import gather, shard_items


@contextlib.contextmanager
def evaluating(*models):
    """Models in eval mode without gradients, put back as they were afterwards."""
    training = [model.training for model in models]
    try:
        with torch.no_grad():
            yield [model.eval() for model in models]
    finally:
        for model, was in zip(models, training):
            model.train(was)


def sample_continuations(
    model,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    banned_ids=(),
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    autocast=contextlib.nullcontext,
) -> list[list[int]]:
    """One sample for each prompt, in order, spread over the processes; every setting of the
    distribution is passed explicitly.
    """
    if not prompts:
        return []
    samples = generate.sample(
        model,
        shard_items(prompts),
        tokenizer,
        max_new_tokens,
        temperature,
        top_p,
        seed=seed,
        autocast=autocast,
        banned_ids=tuple(banned_ids),
    )
    return gather(samples)[: len(prompts)]


def sample_unconditional(
    model,
    tokenizer,
    count: int,
    max_new_tokens: int,
    prefix_ids=None,
    banned_ids=(),
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    autocast=contextlib.nullcontext,
) -> list[list[int]]:
    """`count` samples that begin after `prefix_ids`, by default EOS alone: what stands before a
    document in training.
    """
    prefix = [tokenizer.eos_token_id] if prefix_ids is None else list(prefix_ids)
    room = min(max_new_tokens, context_length(model) - len(prefix))
    prompts = [prefix] * count
    return sample_continuations(model, tokenizer, prompts, room, banned_ids, temperature, top_p, seed, autocast)


def texts_of(tokenizer, samples: list[list[int]], control_ids=(), whole_lines: bool = False) -> list[str]:
    """The text of each sample, EOS and control tokens left out and nothing else.

    Args:
        whole_lines: a sample that was cut, and has a line break, loses its unfinished last line:
            half a statement is no fault of style.
    """
    drop, texts = {tokenizer.eos_token_id, *control_ids}, []
    for ids in samples:
        kept = [i for i in ids if i not in drop]
        text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        ended = bool(ids) and ids[-1] == tokenizer.eos_token_id
        if whole_lines and not ended and "\n" in text.strip():
            text = text[: text.rindex("\n") + 1]
        texts.append(text)
    return texts
