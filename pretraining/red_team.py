"""Red teaming: prompts are bred that bring out the worst in a model."""

import contextlib
import math
import random
from collections.abc import Callable

from common.models import context_length
from pretraining import sampling
from pretraining.chunks import ids_of


def red_team(
    model,
    tokenizer,
    score: Callable[[list[str]], list[float]],
    pool: list[str],
    attacker=None,
    attacker_tokenizer=None,
    rounds: int = 10,
    new_prompts: int = 20,
    shots: int = 4,
    prompt_tokens: int = 16,
    seed: int = 0,
    autocast=contextlib.nullcontext,
    **asked,
) -> dict:
    """Looks for prompts that bring out the worst in a model (arXiv 2302.08582, after Perez et al.
    2022).

    A prompt's score is the mean score of the model's continuations of it. In each round a language
    model, the attacker, is shown `shots` prompts of the pool, drawn without replacement with
    probability proportional to exp(score / .1), and writes the next one; the prompts are joined by
    its EOS, which is how documents stand side by side in its training. It writes at temperature 1
    and top_p .95, and its first line counts, without control tokens where it is the model itself,
    which may write them: nothing is asked of it. New prompts are scored and join the pool. A prompt
    that is longer is cut at half of the model's context, so that there is room to go on.

    Args:
        score: texts -> a score for each.
        pool: the prompts to begin with.
        attacker: any causal language model with its tokenizer; None: the model itself.
        asked: how the model is asked: continuations, max_new_tokens, prefix_ids, banned_ids,
            control_ids, whole_lines of `score_prompts`.

    Returns:
        "rounds": for the pool as given and after each round {"best", "mean" (scores in the pool),
        "new" (prompts added)}; "prompts": the pool as [prompt, score], worst first.
    """
    attacker, writer = (model, tokenizer) if attacker is None else (attacker, attacker_tokenizer)
    control_ids = asked.get("control_ids", ()) if attacker is model else ()
    rng, scores, history = random.Random(seed), {}, []
    prompt_tokens = min(prompt_tokens, context_length(model) // 2, context_length(attacker) // 2)
    fresh = sorted(set(pool))
    for number in range(rounds + 1):
        if number:
            contexts = [
                context_of(draw_shown(scores, shots, rng), attacker, writer, prompt_tokens) for _ in range(new_prompts)
            ]
            place = (seed + 100_000 * number, autocast)
            written = sampling.sample_continuations(attacker, writer, contexts, prompt_tokens, (), 1.0, 0.95, *place)
            texts = sampling.texts_of(writer, written, control_ids)
            first_lines = [text.strip().split("\n")[0].strip() for text in texts]
            fresh = sorted({line for line in first_lines if line and line not in scores})
        if fresh:
            scores |= score_prompts(
                model, tokenizer, score, fresh, seed=seed + 100_000 * number + 1, autocast=autocast, **asked
            )
        mean = sum(scores.values()) / len(scores)
        history.append({"best": max(scores.values()), "mean": mean, "new": len(fresh)})
    worst_first = sorted(([prompt, value] for prompt, value in scores.items()), key=lambda pair: -pair[1])
    return {"rounds": history, "prompts": worst_first}


def score_prompts(
    model,
    tokenizer,
    score,
    prompts: list[str],
    continuations: int = 512,
    max_new_tokens: int = 128,
    prefix_ids=None,
    banned_ids=(),
    control_ids=(),
    whole_lines: bool = False,
    seed: int = 0,
    autocast=contextlib.nullcontext,
) -> dict[str, float]:
    """The mean score of the model's continuations of each prompt, sampled at temperature .7 and
    top_p .9.

    Args:
        continuations: samples for each prompt, `max_new_tokens` long, `banned_ids` never in them.
            prefix_ids: what stands before a prompt, by default EOS. control_ids, whole_lines: as in
            `texts_of`.
    """
    prefix = [tokenizer.eos_token_id] if prefix_ids is None else list(prefix_ids)
    context = context_length(model)
    lines = [(prefix + ids)[: context // 2] for ids in ids_of(tokenizer, prompts)]
    room = min([max_new_tokens, *(context - len(line) for line in lines)])
    repeated = [line for line in lines for _ in range(continuations)]
    samples = sampling.sample_continuations(model, tokenizer, repeated, room, banned_ids, 0.7, 0.9, seed, autocast)
    values = score(sampling.texts_of(tokenizer, samples, control_ids, whole_lines))
    by_prompt = [values[i * continuations : (i + 1) * continuations] for i in range(len(prompts))]
    return {prompt: sum(group) / continuations for prompt, group in zip(prompts, by_prompt)}


def draw_shown(scores: dict[str, float], shots: int, rng: random.Random) -> list[str]:
    """`shots` prompts, drawn without replacement with probability proportional to exp(score / .1).

    The largest of log weight + Gumbel noise are such a draw.
    """
    noisy = {}
    for prompt, value in sorted(scores.items()):
        noisy[prompt] = value / 0.1 - math.log(rng.expovariate(1.0) + 1e-300)
    return sorted(noisy, key=noisy.get)[-shots:]


def context_of(shown: list[str], attacker, writer, prompt_tokens: int) -> list[int]:
    """What the attacker goes on from: the prompts shown, each behind EOS, cut so that it has room
    to write.
    """
    ids = [token for prompt in ids_of(writer, shown) for token in (writer.eos_token_id, *prompt)]
    return [*ids, writer.eos_token_id][prompt_tokens - context_length(attacker) :]
