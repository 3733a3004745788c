"""What a pretrained model knows: log-probabilities, perplexity, and the KL from a teacher.

`banned_ids` (control tokens) are taken out of every distribution: the other tokens share their
probability. docs/metrics.md explains the numbers.
"""

import contextlib
import math

import torch

from common.metrics import mean_and_error
from common.models import context_length
from common.processes import gather, shard_items, world_size
from pretraining.sampling import evaluating, texts_of
from pretraining.tokens import ids_of


def log_probabilities(
    model, ids: torch.Tensor, banned_ids=(), vocabulary: int | None = None, autocast=contextlib.nullcontext
) -> torch.Tensor:
    """Next-token log-probabilities [batch, length, vocabulary], float32, banned tokens at -inf and
    the others renormalised; `vocabulary` cuts behind it.
    """
    with autocast():
        logits = model(input_ids=ids, use_cache=False).logits
    logits = logits[..., :vocabulary].float()
    inside = [i for i in banned_ids if i < logits.shape[-1]]
    logits[..., inside] = float("-inf")
    return logits.log_softmax(-1)


def batch_size(model, length: int) -> int:
    """How many lines of this length have logits that fill about 64 MiB."""
    return max(1, (1 << 24) // (length * model.get_output_embeddings().weight.shape[0]))


def batches(model, items: list, length: int) -> list[list[int]]:
    """This process's numbers of items in batches whose logits fill about 64 MiB; every process gets
    as many.
    """
    size = batch_size(model, length)
    mine = shard_items(list(range(len(items))))
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def device_of(model) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


def padded(lines: list[list[int]], device) -> torch.Tensor:
    """Lines of ids [lines, longest], padded on the right with 0, which no real token sees and
    nothing counts.
    """
    length = max(map(len, lines))
    return torch.tensor([line + [0] * (length - len(line)) for line in lines], device=device)


def kl_to_teacher(
    teacher,
    model,
    samples: list[list[int]],
    teacher_prefix,
    model_prefix,
    banned_ids=(),
    autocast=contextlib.nullcontext,
) -> dict:
    """KL(teacher || model) in nats per sequence, from samples of the teacher at temperature 1, for
    two models of one vocabulary of text.

    At each token the KL over the whole vocabulary is taken, so the estimate has little noise and is
    never negative. Control tokens are banned in both, the others renormalised; they are no part of
    the samples.

    Args:
        samples: token ids of the teacher's samples, behind `teacher_prefix`.
        model_prefix: what the model sees in front of them, EOS and the good token for instance; not
            counted.
        banned_ids: all tokens that are no text. What the model's vocabulary has beyond the
            teacher's must be among them.

    Returns:
        {"kl_to_teacher", "kl_to_teacher_se"}: mean over the samples and its standard error.
    """
    shared = min(m.get_output_embeddings().weight.shape[0] for m in (teacher, model))
    extra = set(range(shared, model.get_output_embeddings().weight.shape[0])) - set(banned_ids)
    if extra:
        raise ValueError(
            f"the teacher has no tokens {sorted(extra)[:4]} of the model; "
            "kl_of_texts compares models of different vocabularies"
        )
    samples = [ids for ids in samples if ids]
    values, longest = [], max(map(len, samples)) + max(len(teacher_prefix), len(model_prefix))
    with evaluating(teacher, model):
        for numbers in batches(model, samples, longest):
            logs = []
            for m, prefix in ((teacher, teacher_prefix), (model, model_prefix)):
                ids = padded([[*prefix, *samples[i]] for i in numbers], device_of(m))
                logps = log_probabilities(m, ids, banned_ids, shared, autocast)
                logs.append(logps[:, len(prefix) - 1 : -1])  # [some samples, tokens, vocabulary]
            log_p, log_q = logs
            terms = torch.where(log_p > float("-inf"), log_p.exp() * (log_p - log_q), 0.0)
            kl = terms.sum(-1)  # [some samples, tokens]
            lengths = torch.tensor([len(samples[i]) for i in numbers], device=kl.device)
            is_token = torch.arange(kl.shape[1], device=kl.device) < lengths[:, None]
            values += kl.masked_fill(~is_token, 0.0).double().sum(-1).tolist()
    return mean_and_error("kl_to_teacher", gather(values)[: len(samples)])


def sequence_logps(
    model,
    pairs: list[tuple[list[int], list[int]]],
    banned_ids=(),
    keep: list[list[bool]] | None = None,
    autocast=contextlib.nullcontext,
) -> list[float]:
    """Summed log-probability in nats of each (context, continuation)'s continuation.

    Banned tokens are left out of the distribution. With `keep` the sum is over those tokens of the
    continuation only for which it is true.
    """
    if keep is None:
        keep = [[True] * len(after) for _, after in pairs]
    sums, longest = [], max(len(before) + len(after) for before, after in pairs)
    with evaluating(model):
        for numbers in batches(model, pairs, longest):
            ids = padded([pairs[i][0] + pairs[i][1] for i in numbers], device_of(model))  # [some pairs, length]
            logps = log_probabilities(model, ids, banned_ids, autocast=autocast)[:, :-1]
            logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)  # position t predicts the token at t + 1
            counts = padded([[0] * len(pairs[i][0]) + list(map(int, keep[i])) for i in numbers], ids.device)[:, 1:]
            sums += logps.masked_fill(counts == 0, 0.0).double().sum(-1).tolist()
    return gather(sums)[: len(pairs)]


def kl_of_texts(
    teacher,
    teacher_tokenizer,
    model,
    tokenizer,
    samples: list[list[int]],
    model_prefix,
    banned_ids=(),
    autocast=contextlib.nullcontext,
) -> dict:
    """The same for a teacher with another tokenizer, any open language model: the mean of log
    teacher(text) - log model(text).

    Each model reads the text as its own tokenizer cuts it, so a text's probability is that of this
    one way to cut it, which is nearly all of it. The noise is larger than in `kl_to_teacher`; a
    single difference may be negative.
    """
    pairs: dict[str, list] = {"teacher": [], "model": []}
    for ids, text in zip(samples, texts_of(teacher_tokenizer, samples)):
        ended = bool(ids) and ids[-1] == teacher_tokenizer.eos_token_id
        readers = (tokenizer, teacher_tokenizer)
        mine, theirs = ([*ids_of(reader, [text])[0], *[reader.eos_token_id] * ended] for reader in readers)
        if mine and theirs and len(model_prefix) + len(mine) <= context_length(model):
            pairs["teacher"].append(([teacher_tokenizer.eos_token_id], theirs))
            pairs["model"].append((list(model_prefix), mine))
    if not pairs["model"]:
        return mean_and_error("kl_to_teacher", [])
    high = sequence_logps(teacher, pairs["teacher"], autocast=autocast)
    low = sequence_logps(model, pairs["model"], banned_ids, autocast=autocast)
    return mean_and_error("kl_to_teacher", [a - b for a, b in zip(high, low)])


def perplexity(
    model,
    ids: torch.Tensor,
    prefix_ids=(),
    banned_ids=(),
    keep: torch.Tensor | None = None,
    autocast=contextlib.nullcontext,
) -> float | None:
    """exp of the mean negative log-probability per token of chunks [chunks, context] without
    control tokens; None where there is no token.

    `prefix_ids` (two at most) stand before each chunk and are not counted. So that there is room
    for them, and all models are judged on the same tokens, the last two of each chunk are left out
    for every model; the first one, which has nothing before it, is not counted either. `keep`
    [chunks, context] says which of the others count; None: all. `ids` and `keep` are tensors, or
    are sliced like them: some batches are in memory at a time.
    """
    prefix, sums, count = list(prefix_ids), [], 0
    if len(prefix) > 2:
        raise ValueError(f"expected two tokens at most before a chunk, got {len(prefix)}")
    context = ids[:1].shape[1]
    size = 16 * world_size() * batch_size(model, len(prefix) + context - 2)
    for start in range(0, len(ids), size):
        some = ids[start : start + size]
        kept = (torch.ones_like(some) if keep is None else keep[start : start + size])[:, 1:-2].bool()
        pairs = [([*prefix, line[0]], line[1:]) for line in some[:, :-2].tolist()]
        sums += sequence_logps(model, pairs, banned_ids, kept.tolist(), autocast)
        count += kept.sum().item()
    return math.exp(-sum(sums) / count) if count else None
