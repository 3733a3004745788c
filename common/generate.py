"""Sampling from a model, and the text of what was sampled."""

import contextlib
import inspect
import sys
from functools import partial

import torch

from common import processes


@torch.no_grad()
def sample(
    model, prompts, tokenizer, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, autocast=None, banned_ids=(), n=1
) -> list[list[int]]:
    """`n` completions of each prompt, side by side, as token ids that end in EOS unless cut.

    The arguments alone shape the distribution, not the checkpoint's generation_config: temperature
    0 is greedy; `banned_ids` are never sampled, the others share their probability. A completion's
    random numbers are its own: but for rounding it depends neither on the rows beside it nor, for
    prompts of `shard_items`, on the number of processes, all called alike. The caller's stay."""
    from tqdm import tqdm

    world, generator = processes.world_size(), torch.Generator().manual_seed(seed)
    # The steps of float32 are too coarse for the rare tokens of a large vocabulary.
    uniforms = torch.rand(len(prompts) * world, n, max_new_tokens, generator=generator, dtype=torch.float64)
    uniforms = uniforms[processes.rank() :: world].flatten(0, 1)  # [completions, max_new_tokens]
    pick = partial(draw, temperature=temperature, top_p=top_p, banned_ids=list(banned_ids))
    # Prompts of one length side by side, and equal ones among them.
    order = sorted(range(len(uniforms)), key=lambda i: (len(prompts[i // n]), prompts[i // n]))
    interval, hidden = 0.2 if sys.stderr.isatty() else 10.0, not processes.is_main_process()
    bar = tqdm(total=len(order), desc="sampling", delay=2.0, mininterval=interval, leave=False, disable=hidden)
    completions, size, was_training = {}, samples_at_once(model), model.training
    model.eval()
    try:
        # One context for all batches: it keeps the weights that it has cast.
        with bar, autocast() if autocast else contextlib.nullcontext():
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                new = complete(model, [prompts[i // n] for i in rows], tokenizer, uniforms[rows], pick, bar)
                completions |= zip(rows, new)
                bar.update(start + len(rows) - bar.n)
    finally:
        model.train(was_training)
    return [completions[i] for i in range(len(order))]


def complete(model, prompts, tokenizer, uniforms: torch.Tensor, pick, bar) -> list[list[int]]:
    """A completion of each prompt, in a batch that reads equal ones once and that ended rows leave;
    `pick(logits, uniforms)` picks their tokens."""
    device, eos = next(model.parameters()).device, tokenizer.eos_token_id
    distinct = {prompt: line for line, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    # The completions that go on, and the line of each in the last forward pass.
    rows, lines = list(range(len(prompts))), [distinct[tuple(prompt)] for prompt in prompts]
    ids, mask = pad_left(list(map(list, distinct)), tokenizer.pad_token_id, device).values()
    completions, cache = [[] for _ in prompts], {}
    for uniform in uniforms.to(device).T:  # [prompts]
        logits, cache = next_logits(model, ids, mask, cache, room=uniforms.shape[1])
        tokens = pick(logits[lines], uniform[rows])  # [rows]
        picked = tokens.tolist()
        for row, token in zip(rows, picked):
            completions[row].append(token)
        going = [i for i, token in enumerate(picked) if token != eos]
        bar.update(len(rows) - len(going))
        # A sharded model needs all processes in each pass; one without rows goes on with any.
        if not processes.sum_over_processes(torch.tensor(len(going), device=device)):
            break
        going = going or [0]
        rows, lines = [rows[i] for i in going], [lines[i] for i in going]
        if lines != list(range(len(ids))):
            chosen = torch.tensor(lines, device=device)
            ids, mask = ids[chosen], mask[chosen]
            for states in cache.values():
                states.reorder_cache(chosen)
        ids, mask = torch.cat([ids, tokens[going, None]], 1), torch.cat([mask, mask.new_ones(len(going), 1)], 1)
        lines = list(range(len(rows)))
    return [new[: new.index(eos) + 1] if eos in new else new for new in completions]


def next_logits(model, ids: torch.Tensor, mask: torch.Tensor, cache: dict, room: int) -> tuple[torch.Tensor, dict]:
    """Logits [lines, vocabulary] of the token after `ids`, and the cache by its argument's name: {}
    of a model whose cache is of another kind, which computes all anew for each token. A new cache
    has room for that many more tokens."""
    from transformers import Cache

    from attention.rooms import make_room

    positions, new = (mask.cumsum(-1) - 1).clamp(min=0), slice(-1 if cache else None, None)
    inputs = {"input_ids": ids[:, new], "position_ids": positions[:, new], "attention_mask": mask} | cache
    known, inputs = inspect.signature(model.forward).parameters, inputs | {"use_cache": True, "logits_to_keep": 1}
    output = model(**{name: value for name, value in inputs.items() if name in known})
    name = "cache" if "cache" in output else "past_key_values"  # its name in older transformers
    if not isinstance(output.get(name), Cache):
        return output.logits[:, -1], {}
    if not cache:
        make_room(output[name], room)
    return output.logits[:, -1], {name: output[name]}


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float, banned_ids) -> torch.Tensor:
    """A token for each line of logits [lines, vocabulary]: the first whose cumulative probability
    is above the line's number of `uniforms`, float64 in [0, 1). One of probability 0 never is."""
    logits = logits.float()
    logits[:, banned_ids] = float("-inf")
    if temperature == 0:
        return logits.argmax(-1)
    logits, ids = logits if temperature == 1 else logits / temperature, None
    if top_p < 1:
        logits, ids = nucleus(logits, top_p)
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum(-1, dtype=torch.float64)
    totals = cumulative[:, -1:]
    if not totals.isfinite().all():
        raise FloatingPointError("The model's logits are not finite: nothing can be sampled from it.")
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * totals, right=True)  # [lines, 1]
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)


def nucleus(logits: torch.Tensor, top_p: float, top: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits [lines, vocabulary] the `top` largest, [lines, top], and their ids, which ascend;
    -inf but at the fewest tokens, the likeliest ones, that together have probability top_p; of
    equal ones the larger ids. More than `top` where those do not tell."""
    top = min(top, logits.shape[-1])
    ids = logits.topk(top, sorted=False).indices.sort(descending=True).values
    ranked, order = logits.gather(-1, ids).sort(descending=True, stable=True)  # of equal ones the larger id first
    probabilities = (ranked - logits.logsumexp(-1, keepdim=True)).double().exp()
    is_kept = probabilities.cumsum(-1) - probabilities < top_p  # those before it do not have top_p yet
    if top < logits.shape[-1] and (is_kept & (ranked == ranked[:, -1:])).any():
        return nucleus(logits, top_p, 16 * top)  # tokens that were not looked at may belong to it
    kept = torch.empty_like(ranked).scatter_(-1, order, ranked.masked_fill(~is_kept, float("-inf")))
    return kept.flip(-1), ids.flip(-1)


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
    return 512 if is_tiny(model) else 256 if next(model.parameters()).device.type == "cuda" else 64


def decode_completion(tokenizer, completion: list[int]) -> str:
    """The text of a completion, its EOS left out and nothing else."""
    ids = completion[:-1] if completion and completion[-1] == tokenizer.eos_token_id else completion
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()


def text_after(tokenizer, prompt: list[int], completion: list[int]) -> str:
    """The text that a completion adds to its prompt, its EOS left out: with the white space between
    them, which decoding it alone can lose and which a reward model reads."""
    ids = completion[:-1] if completion and completion[-1] == tokenizer.eos_token_id else completion
    before, whole, alone = (
        tokenizer.decode(x, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for x in (prompt, prompt + ids, ids)
    )
    return whole[len(before) :] if whole.startswith(before) else alone
