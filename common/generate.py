"""Sampling from a model, and the text of what was sampled."""

import torch

from common import processes


@torch.no_grad()
def sample(
    model,
    prompts,
    tokenizer,
    max_new_tokens,
    temperature=1.0,
    top_p=1.0,
    seed=0,
    autocast=None,
    banned_ids=(),
    batch_size=0,
) -> list[list[int]]:
    """One completion for each prompt, as token ids that end in EOS unless cut.

    Everything that shapes the distribution is passed here and the checkpoint's generation_config is
    set aside: transformers would sample from the 50 likeliest tokens where nothing is said.
    temperature 0 is greedy. `banned_ids` are never sampled, the others share their probability.
    `batch_size` 0: by the size of the model. Prompts are padded on the left, with position ids
    from the mask. The caller's random numbers are untouched. With several processes each must call
    with the same number of prompts."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    shape = {"max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": pad, "use_cache": True}
    if temperature > 0:
        shape |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(**shape)
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
                inputs = pad_left([prompts[i] for i in chunk], pad, device)
                with autocast() if autocast else torch.no_grad():
                    output = model.generate(**inputs, generation_config=config, synced_gpus=synced)
                length = inputs["input_ids"].shape[1]
                for i, new in zip(chunk, output[:, length:].tolist()):
                    completions[i] = new[: new.index(eos) + 1] if eos in new else new[:max_new_tokens]
        finally:
            model.generation_config = saved
            model.train(was_training)
    return completions


def pad_left(prompts: list[list[int]], pad_id: int, device) -> dict[str, torch.Tensor]:
    """Prompts as [prompts, longest], padded on the left, and their mask."""
    gaps = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
    ids = [[pad_id] * gap + prompt for gap, prompt in zip(gaps, prompts)]
    mask = [[0] * gap + [1] * len(prompt) for gap, prompt in zip(gaps, prompts)]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


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
