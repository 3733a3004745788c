"""Sampling from a model, and the text of what was sampled."""

import torch

from common import processes


@torch.no_grad()
def sample(
    model,
    prompts: list[list[int]],
    tokenizer,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    autocast=None,
    banned_ids: tuple[int, ...] = (),
    batch_size: int | None = None,
) -> list[list[int]]:
    """One sampled completion for each prompt, as token ids that end in EOS unless cut at
    `max_new_tokens`.

    Everything that shapes the distribution is passed here and the checkpoint's generation_config is
    set aside: transformers would sample from the 50 likeliest tokens where nothing is said.
    temperature 0 is greedy. `banned_ids` are never sampled, the others share their probability.
    `batch_size` None: by the size of the model. Prompts are padded on the left, with position ids
    from the mask. The caller's random numbers are untouched. With several processes each must call
    with the same number of prompts."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    shape = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    config = GenerationConfig(
        **shape, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad, use_cache=True
    )
    config.suppress_tokens = list(banned_ids) or None
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list = [None] * len(prompts)
    was_training, saved = model.training, model.generation_config
    model.eval()
    model.generation_config = config
    batch_size = batch_size or samples_at_once(model)
    synced = processes.world_size() > 1
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                length = max(len(prompts[i]) for i in chunk)
                ids = torch.tensor([[pad] * (length - len(prompts[i])) + prompts[i] for i in chunk], device=device)
                mask = torch.tensor(
                    [[0] * (length - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk], device=device
                )
                with autocast() if autocast else torch.no_grad():
                    out = model.generate(
                        input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=synced
                    )
                for i, new in zip(chunk, out[:, length:].tolist()):
                    completions[i] = new[: new.index(eos) + 1] if eos in new else new[:max_new_tokens]
        finally:
            model.generation_config = saved
            model.train(was_training)
    return completions


def is_tiny(model) -> bool:
    """Whether layers are so small that several CPU threads wait for each other most of the time."""
    return sum(p.numel() for p in model.parameters()) < 5_000_000


def samples_at_once(model) -> int:
    """How many completions are sampled in one batch: more of a tiny model, and on a GPU."""
    if is_tiny(model):
        return 512
    return 256 if next(model.parameters()).device.type == "cuda" else 64


def decode_completion(tokenizer, completion: list[int]) -> str:
    """The text of a completion, its EOS left out and nothing else."""
    ids = completion[:-1] if completion and completion[-1] == tokenizer.eos_token_id else completion
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()


def text_after(tokenizer, prompt: list[int], completion: list[int]) -> str:
    """The text that a completion adds to its prompt, its EOS left out: with the white space between
    them, which decoding it alone can lose.

    A reward model must read prompt + answer as it read them in training."""
    ids = completion[:-1] if completion and completion[-1] == tokenizer.eos_token_id else completion
    before, whole, alone = (
        tokenizer.decode(x, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for x in (prompt, prompt + ids, ids)
    )
    return whole[len(before) :] if whole.startswith(before) else alone
