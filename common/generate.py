"""Sampling from a model, and the text of what was sampled."""

import contextlib
import inspect
import sys

import torch

from common import processes

TOP = 512  # top_p looks at so many of the likeliest tokens before it sorts a whole vocabulary


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
    n=1,
) -> list[list[int]]:
    """`n` completions of each prompt, side by side, as token ids that end in EOS unless cut.

    The arguments alone shape the distribution: the checkpoint's generation_config is not read.
    temperature 0 is greedy; `banned_ids` are never sampled, the others share their probability.
    `batch_size` 0: by the size of the model. Each completion has its own random numbers: but for
    rounding it depends neither on the rows beside it nor, if `shard_items` gave the prompts, on the
    number of processes, which all must call with the same seed and number of prompts. The caller's
    random numbers are untouched."""
    from tqdm import tqdm

    device, eos, world = next(model.parameters()).device, tokenizer.eos_token_id, processes.world_size()
    # float64: the steps of a float32 are too coarse for the rare tokens of a large vocabulary.
    shape, generator = (len(prompts) * world, n, max_new_tokens), torch.Generator().manual_seed(seed)
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)[processes.rank() :: world].flatten(0, 1)
    banned = torch.tensor(list(banned_ids), dtype=torch.long, device=device)

    def pick(logits, rows: list[int], step: int) -> torch.Tensor:
        logits = logits.float().index_fill(-1, banned, float("-inf"))  # [rows, vocabulary]
        return draw(logits, uniforms[rows, step].to(device), temperature, top_p)

    # Prompts of one length side by side, and equal ones among them.
    order = sorted(range(len(uniforms)), key=lambda i: (len(prompts[i // n]), prompts[i // n]))
    completions: list = [None] * len(order)
    batch_size = batch_size or samples_at_once(model)
    interval, hidden = 0.2 if sys.stderr.isatty() else 10.0, not processes.is_main_process()
    bar = tqdm(total=len(order), desc="sampling", delay=2.0, mininterval=interval, leave=False, disable=hidden)
    was_training = model.training
    model.eval()
    try:
        # One context for all batches: it keeps the weights that it has cast.
        with autocast() if autocast else contextlib.nullcontext():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                texts = [prompts[i // n] for i in rows]
                for i, new in complete(model, texts, rows, pick, tokenizer, max_new_tokens, bar.update).items():
                    completions[i] = new[: new.index(eos) + 1] if eos in new else new
                bar.update(start + len(rows) - bar.n)
    finally:
        bar.close()
        model.train(was_training)
    return completions


def complete(model, prompts, rows, pick, tokenizer, max_new_tokens: int, ended) -> dict[int, list[int]]:
    """Row -> completion of the prompt beside it, in one batch, which rows leave as they end.

    Args:
        rows: what `pick(logits, rows, step)` knows the completions by.
        ended: told how many have just ended.
    """
    device, completions = next(model.parameters()).device, {row: [] for row in rows}
    # A prompt that comes more than once is read once. `lines` are the rows' places in the last forward pass.
    distinct = {prompt: line for line, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    lines = [distinct[tuple(prompt)] for prompt in prompts]
    ids, mask = pad_left(list(map(list, distinct)), tokenizer.pad_token_id, device).values()
    cache: dict = {}
    for step in range(max_new_tokens):
        logits, cache = next_logits(model, ids, mask, cache)
        tokens = pick(logits[lines], rows, step)  # [rows]
        picked = tokens.tolist()
        for row, token in zip(rows, picked):
            completions[row].append(token)
        going = [i for i, token in enumerate(picked) if token != tokenizer.eos_token_id]
        ended(len(rows) - len(going))
        # Processes make as many passes, as sharding asks: one that has ended goes on with any row.
        counts = processes.sum_over_processes(torch.tensor(len(going), device=device))
        if step + 1 == max_new_tokens or not counts:
            break
        going = going or [0]
        rows, lines = [rows[i] for i in going], [lines[i] for i in going]
        if lines != list(range(len(ids))):
            chosen = torch.tensor(lines, device=device)
            ids, mask = ids[chosen], mask[chosen]
            for kept in cache.values():
                kept.reorder_cache(chosen)
        ids, mask = torch.cat([ids, tokens[going, None]], 1), torch.cat([mask, mask.new_ones(len(going), 1)], 1)
        lines = list(range(len(ids)))
    return completions


def next_logits(model, ids: torch.Tensor, mask: torch.Tensor, cache: dict) -> tuple[torch.Tensor, dict]:
    """Logits [lines, vocabulary] of the token after `ids`, and the model's cache by its argument's
    name; {} where it keeps no cache whose lines can be chosen: all is then computed anew each time.
    """
    from transformers import Cache

    known, positions = inspect.signature(model.forward).parameters, (mask.cumsum(-1) - 1).clamp(min=0)
    if cache:
        ids, positions = ids[:, -1:], positions[:, -1:]
    optional = {"position_ids": positions, "logits_to_keep": 1}
    inputs = {name: value for name, value in optional.items() if name in known} | cache
    output = model(input_ids=ids, attention_mask=mask, use_cache=True, **inputs)
    name = "cache" if "cache" in output.keys() else "past_key_values"  # before transformers 5.20
    kept = output.get(name)
    return output.logits[:, -1], {name: kept} if isinstance(kept, Cache) else {}


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float, top=TOP) -> torch.Tensor:
    """A token for each line of logits [lines, vocabulary]: the first whose cumulative probability
    is above the line's number of `uniforms`, float64 in [0, 1). One of probability 0 never is.

    top_p keeps the fewest tokens, the likeliest ones, that have this probability together; of equal
    ones the larger ids, as transformers does. The `top` likeliest are sorted, and all where those
    do not tell."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    kept, ids, is_told = nucleus(logits, top_p, top) if top_p < 1 else (logits, None, None)
    weights = (kept - kept.amax(-1, keepdim=True)).exp()
    # In float32 a sum over a large vocabulary would lose its rare tokens.
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    totals = cumulative[:, -1:]
    if not totals.isfinite().all():
        raise FloatingPointError("The model's logits are not finite: nothing can be sampled from it.")
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * totals, right=True)
    if ids is None:
        return tokens.squeeze(-1)
    tokens = ids.gather(-1, tokens).squeeze(-1)
    if not is_told.all():
        tokens[~is_told] = draw(logits[~is_told], uniforms[~is_told], 1.0, top_p, logits.shape[-1])
    return tokens


def nucleus(logits: torch.Tensor, top_p: float, top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `draw` keeps of the `top` likeliest tokens: their logits, -inf where left out, and their
    ids, [lines, top] each; and whether these are the right ones, [lines].
    """
    top = min(top, logits.shape[-1])
    ids = logits.topk(top, sorted=False).indices.sort(descending=True).values
    values = logits.gather(-1, ids)
    ranked, order = values.sort(descending=True, stable=True)  # of equal ones the larger id first
    probabilities = (ranked - logits.logsumexp(-1, keepdim=True)).double().exp()
    is_kept = probabilities.cumsum(-1) - probabilities < top_p  # those before it do not have top_p yet
    least = ranked.gather(-1, is_kept.sum(-1, keepdim=True) - 1)
    is_told = (ranked[:, -1:] < least).squeeze(-1) | (top == logits.shape[-1])
    is_kept = torch.zeros_like(is_kept).scatter(-1, order, is_kept)
    return values.masked_fill(~is_kept, float("-inf")), ids, is_told


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
