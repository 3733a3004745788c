"""Judging a policy: accuracies, KL, samples and what the toy's true reward says of them; and
`python -m common.evaluate`, whose command line stands in judging/command.py.
"""

import json
import math

import torch

from common.batches import collate, row_length
from common.generate import decode_completion, is_tiny, sample, text_after
from common.metrics import standard_error
from common.models import context_length
from common.oracle import plain_logps
from common.processes import gather, shard_items
from report import progress


@torch.no_grad()
def kl_of_samples(policy, reference, prompts, completions, pad_id: int, batch_size=16, autocast=None) -> torch.Tensor:
    """KL(policy || reference) in nats along each completion of the policy, [samples], float64.

    At each token the full-vocabulary KL is taken; its sum along samples of the policy at
    temperature 1 is an unbiased estimate of the KL per completion, never negative and of lower
    variance than the log-ratio of the sampled tokens."""
    device, values = next(policy.parameters()).device, []
    for start in progress.track(range(0, len(prompts), batch_size), "KL to the reference"):
        chunk = list(zip(prompts[start : start + batch_size], completions[start : start + batch_size]))
        length = max(len(p) + len(c) for p, c in chunk)
        ids = torch.tensor([p + c + [pad_id] * (length - len(p) - len(c)) for p, c in chunk], device=device)
        position = torch.arange(length, device=device)
        begin = torch.tensor([len(p) - 1 for p, _ in chunk], device=device)[:, None]
        end = torch.tensor([len(p) + len(c) for p, c in chunk], device=device)[:, None]
        inputs = {"input_ids": ids, "attention_mask": (position < end).long(), "use_cache": False}
        keep = length - min(len(p) - 1 for p, _ in chunk)
        with autocast() if autocast else torch.no_grad():
            log_p, log_q = (m(**inputs).logits[:, -keep:].float().log_softmax(-1) for m in (policy, reference))
        # Entries that a model masks are -inf in both: 0 * (-inf + inf) counts nothing.
        kl = torch.where(log_p > float("-inf"), log_p.exp() * (log_p - log_q), 0.0).sum(-1).double()  # [batch, keep]
        mask = ((position >= begin) & (position < end - 1))[:, -keep:]  # position t predicts the token at t + 1
        values.append(kl.masked_fill(~mask, 0.0).sum(-1).cpu())
    return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)


def distinct_prompts(rows: list[dict], longest: int) -> list[tuple]:
    """(prompt as read, its token ids) of each distinct prompt of at most so many tokens."""
    short = [row for row in rows if len(row["prompt"]) <= longest]
    return list({json.dumps(row["texts"][0], default=str): (row["texts"][0], row["prompt"]) for row in short}.values())


def evaluate_samples(
    policy, ref, rows, tokenizer, count, max_new_tokens, seed, autocast, judge=None, extra_metrics=None, best_of=None
) -> dict:
    """What a policy says: `count` answers at temperature 1 to the distinct prompts of `rows`.

    Args:
        ref: the model to take the KL to; None: the policy is the reference, the KL is 0.
        judge: `judge(answers, kl, ref)` -> more metrics, from (prompt, answer) pairs: what
            `toy.base.judge_of` gave.
        extra_metrics: `extra_metrics(prompts, answers)` -> more metrics, from all texts.
        best_of: (n, rewards): n answers are sampled and that with the largest reward counts;
            `rewards(batch)` -> [sequences].

    Returns:
        "kl" in nats per completion, for best of n an upper bound; what `judge` and `extra_metrics`
        say; "samples", three [prompt, answer]; "candidates", best of n's answers and rewards.
    """
    distinct = distinct_prompts(rows, context_length(policy) - max_new_tokens)
    if not distinct or count <= 0:
        return {"kl": None, "samples": []}
    n, rewards = best_of or (1, None)
    # As often each, or evenly spaced ones where there are more; as many on every process.
    mine = [i * len(distinct) // count if count < len(distinct) else i % len(distinct) for i in range(count)]
    mine = shard_items(mine)
    prompts = [distinct[i][1] for i in mine]
    completions = sample(policy, prompts, tokenizer, max_new_tokens, seed=seed + 1, autocast=autocast, n=n)
    groups = [completions[i : i + n] for i in range(0, len(completions), n)]
    metrics: dict = {}
    if n > 1:
        scores = score_candidates(rewards, prompts, groups, tokenizer.pad_token_id, autocast)  # [mine, n]
        picked = scores.argmax(1).tolist()
        lines = []
        for i, group, values, j in zip(mine, groups, scores.tolist(), picked):
            answers = [decode_completion(tokenizer, ids) for ids in group]
            lines.append({"prompt": distinct[i][0], "answers": answers, "rewards": values, "picked": j})
        metrics["candidates"] = gather(lines)[:count]
        completions = [group[j] for group, j in zip(groups, picked)]
    kls = kl_to_reference(policy, ref, prompts, completions, tokenizer.pad_token_id, n, autocast)
    texts = [text_after(tokenizer, prompt, ids) for prompt, ids in zip(prompts, completions)]
    answers = [(distinct[i][0], text) for i, text in gather(list(zip(mine, texts)))[:count]]
    kls = gather(kls.tolist())[:count]
    metrics |= {"kl": sum(kls) / count, "kl_se": None if ref is None else standard_error(kls)}
    if extra_metrics:
        metrics |= extra_metrics([prompt for prompt, _ in answers], [text for _, text in answers])
    if judge:
        metrics |= judge(answers, metrics["kl"], ref)
    return metrics | {"samples": three_of(answers)}


def kl_to_reference(policy, ref, prompts, completions, pad_id: int, best_of: int, autocast) -> torch.Tensor:
    """KL in nats along completions, [samples], float64: 0 without a reference.

    For best of n an upper bound, log n - (n - 1)/n plus the log-ratio of the picked answer, exact
    where no two candidates tie."""
    if ref is None:
        return torch.zeros(len(prompts), dtype=torch.float64)
    tiny = is_tiny(policy)
    if best_of == 1:
        size = 256 if tiny else 4
        return kl_of_samples(policy, ref, prompts, completions, pad_id, batch_size=size, autocast=autocast)
    pairs, size = list(zip(prompts, completions)), 256 if tiny else 8
    logratios = plain_logps(policy, pairs, pad_id, size) - plain_logps(ref, pairs, pad_id, size)
    return math.log(best_of) - (best_of - 1) / best_of + logratios.double()


def three_of(answers: list[tuple]) -> list[list]:
    """[prompt, answer] of three prompts, for the end table."""
    first = {json.dumps(prompt, default=str): [prompt, text.strip()] for prompt, text in reversed(answers)}
    return [first[key] for key in sorted(first)[:: max(1, len(first) // 3)][:3]]


def sample_rows(model, tokenizer, rows: list[dict], n: int, max_new_tokens: int, seed: int, autocast) -> list:
    """`n` answers at temperature 1 to the prompt of each row, as token ids, [rows][n]."""
    if not rows:
        return []
    # The longest prompt must leave room for its answer.
    room = min(max_new_tokens, context_length(model) - max(len(row["prompt"]) for row in rows))
    prompts = [row["prompt"] for row in shard_items(rows)]
    completions = sample(model, prompts, tokenizer, room, seed=seed + 2, autocast=autocast, n=n)
    return gather([completions[i : i + n] for i in range(0, len(completions), n)])[: len(rows)]


@torch.no_grad()
def score_candidates(rewards, prompts, groups: list[list[list[int]]], pad_id: int, autocast) -> torch.Tensor:
    """Rewards of sampled answers, [prompts, n], each in a line of its own."""
    rows = [{"prompt": prompt, "completions": group} for prompt, group in zip(prompts, groups)]
    longest = max(gather([len(groups[0]) * max(map(row_length, rows))]))  # the same on every process
    size = 64 if longest < 4096 else 4
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = []
    for start in progress.track(range(0, len(rows), size), f"rewards of {len(rows) * len(groups[0]):,} answers"):
        chunk = rows[start : start + size]
        with autocast():
            values = rewards(collate(chunk, pad_id, "rows", device))  # answer by answer
        parts.append(values.float().cpu().view(-1, len(chunk)).T)
    return torch.cat(parts)


if __name__ == "__main__":
    from judging.command import start

    start()
