"""Policies of the toy world: what they answer to the trained questions, how good that is, and the
best possible curve to draw beside them.
"""

import math

import torch
import transformers

from common.evaluate import kl_of_samples
from common.generate import decode_completion, sample
from common.models import load_model, load_tokenizer, load_weights
from common.oracle import plain_logps, plain_rewards
from toy import base, frozen, world


def trained_questions() -> list[dict]:
    """The questions that the toy's data asks."""
    return [row for row in world.questions() if not row["unseen"]]


def question_rewards(answers: list[list[str]]) -> torch.Tensor:
    """True rewards of answers to the trained questions, [questions, n]; `answers` holds a list for
    each of them.
    """
    rewards = []
    for row, texts in zip(trained_questions(), answers, strict=True):
        rewards.append([world.true_reward(row, text) for text in texts])
    return torch.tensor(rewards, dtype=torch.float64)


def reference_answers(seed: int) -> list[list[str]]:
    """The base model's kept answers to the trained questions."""
    kept = frozen.read_answers(base.base_model(seed))
    return [texts for row, texts in zip(world.questions(), kept) if not row["unseen"]]


def load_policy(folder: str, tokenizer):
    """A model folder's policy in evaluation mode."""
    transformers.utils.logging.disable_progress_bar()
    return load_model(folder, "cpu", tokenizer).eval()


def sample_policy(policy, tokenizer, seed: int, count: int) -> tuple[list, list, list[str]]:
    """`count` answers to each trained question in turn, at temperature 1: prompts and completions
    as token ids, and the answers' texts.
    """
    prompts = [tokenizer(world.prompt_of(row)).input_ids for row in trained_questions() for _ in range(count)]
    completions = sample(policy, prompts, tokenizer, base.MAX_NEW_TOKENS, seed=seed + 1)
    return prompts, completions, [decode_completion(tokenizer, ids) for ids in completions]


def by_question(texts: list, count: int) -> list[list]:
    """A flat list with `count` things a question as a list for each question."""
    return [texts[i : i + count] for i in range(0, len(texts), count)]


def judge_policy(folder: str, seed: int, count: int) -> dict:
    """What a run on the toy of this seed answers to the trained questions, `count` answers each:

    KL in nats, true reward, its share of the best possible gain, and the true reward on the fifth
    of the questions that the reference answers best, before and after.
    """
    tokenizer = load_tokenizer(folder)
    policy, reference = load_policy(folder, tokenizer), load_policy(str(base.base_model(seed)), tokenizer)
    prompts, completions, texts = sample_policy(policy, tokenizer, seed, count)
    nats = kl_of_samples(policy, reference, prompts, completions, tokenizer.pad_token_id, batch_size=250)
    rewards = question_rewards(by_question(texts, count))
    return {"answers": count} | judge_means(nats.mean().item(), rewards.mean(1), seed)


def judge_means(kl: float, means: torch.Tensor, seed: int) -> dict:
    """The metrics of `judge_policy` from a KL in nats and the mean true reward of each trained
    question, [questions].
    """
    before = question_rewards(reference_answers(seed))
    good = before.mean(1).argsort(descending=True)[: len(before) // 5]
    reward = means.mean().item()
    return {
        "kl": kl,
        "true_reward": reward,
        "efficiency": world.frontier_efficiency(kl, reward, before),
        "good_before": before[good].mean().item(),
        "good_after": means[good].mean().item(),
    }


# -- the best of n answers


def pick_weights(scores: torch.Tensor, n: int) -> torch.Tensor:
    """How likely each of m answers is the best of n distinct ones among them, [questions, m]; equal
    scores share alike.

    With c answers at most as good and d worse ones the best of n is among the c - d equals in
    C(c, n) - C(d, n) of C(m, n) draws. So sum(weights * x) is the mean of x over every draw of n:
    an unbiased estimate of what the best of n fresh answers has.

    Args:
        scores: [questions, m], the larger the better.
    Raises ValueError where n is not between 1 and m.
    """
    m = scores.shape[1]
    if not 1 <= n <= m:
        raise ValueError(f"the best of {n} cannot be taken among {m} answers")
    ways = torch.tensor([math.comb(count, n) / math.comb(m, n) for count in range(m + 1)], dtype=torch.float64)
    ordered = scores.sort(1).values.contiguous()
    worse = torch.searchsorted(ordered, scores.contiguous())  # [questions, m], d
    not_better = torch.searchsorted(ordered, scores.contiguous(), right=True)  # [questions, m], c
    return (ways[not_better] - ways[worse]) / (not_better - worse)


def kl_of_best(n: int) -> float:
    """An upper bound of KL(best of n || the policy that the n answers are of), in nats: log n -
    (n - 1)/n, which it comes to where no two answers have equal scores.
    """
    return math.log(n) - (n - 1) / n


def judge_best_of_base(seed: int, n: int) -> dict:
    """The metrics of `judge_policy` for the best of n answers of the base model by the true reward.

    Both reward and KL are exact for the kept answers as the base model's distribution: the picks
    are those answers with other weights, as the policies of the best possible curve are.
    """
    rewards = question_rewards(reference_answers(seed))
    weights = pick_weights(rewards, n)
    kl = torch.special.xlogy(weights, weights * rewards.shape[1]).sum(1).mean().item()
    return {"answers": rewards.shape[1]} | judge_means(kl, (weights * rewards).sum(1), seed)


def judge_head_picks(folder: str, seed: int, count: int, ns: tuple[int, ...]) -> list[dict]:
    """The metrics of `judge_policy`, with "n" before them, where the reward head of a run of dph.py
    picks the best of n answers of its own LM; the mean over every draw of n of the same samples.

    The KL to the base model is an upper bound: what picking adds at most, `kl_of_best`, and the
    log-ratio of the picked answers.
    """
    tokenizer = load_tokenizer(folder)
    policy, reference = load_policy(folder, tokenizer), load_policy(str(base.base_model(seed)), tokenizer)
    head = load_weights(folder, "score.weight")["score.weight"]
    prompts, completions, texts = sample_policy(policy, tokenizer, seed, count)
    pairs, pad = list(zip(prompts, completions)), tokenizer.pad_token_id
    logratios = (plain_logps(policy, pairs, pad, 250) - plain_logps(reference, pairs, pad, 250)).double()
    scores = torch.tensor(plain_rewards(policy, head, pairs), dtype=torch.float64).view(-1, count)
    rewards = question_rewards(by_question(texts, count))  # [questions, count]
    lines = []
    for n in ns:
        weights = pick_weights(scores, n)
        kl = kl_of_best(n) + (weights * logratios.view(-1, count)).sum(1).mean().item()
        lines.append({"n": n} | judge_means(kl, (weights * rewards).sum(1), seed))
    return lines


def judge_target(seed: int) -> dict:
    """KL and true reward, as `judge_policy` names them, of the policy proportional to exp(r*) over
    the distinct kept answers of the base model: what Bradley-Terry labels of the true reward make
    likeliest, whatever the reference says.
    """
    folder = str(base.base_model(seed))
    tokenizer = load_tokenizer(folder)
    model, kls, means = load_policy(folder, tokenizer), [], []
    for row, texts in zip(trained_questions(), reference_answers(seed)):
        distinct = sorted(set(texts))
        prompt = tokenizer(world.prompt_of(row)).input_ids
        completions = [tokenizer(text).input_ids[1:] + [tokenizer.eos_token_id] for text in distinct]
        pairs = [(prompt, completion) for completion in completions]
        logps = plain_logps(model, pairs, tokenizer.pad_token_id, 256).double()  # [answers]
        rewards = torch.tensor([world.true_reward(row, text) for text in distinct], dtype=torch.float64)  # [answers]
        target_logps = rewards.log_softmax(0)  # [answers]
        kls.append((target_logps.exp() * (target_logps - logps)).sum())
        means.append((target_logps.exp() * rewards).sum())
    return {"answers": len(texts)} | judge_means(torch.stack(kls).mean().item(), torch.stack(means), seed)


# -- the best possible curve


def mean_frontier(seeds: tuple[int, ...], kls: torch.Tensor) -> torch.Tensor:
    """The best possible true reward at each KL of `kls`, [seeds, kls].

    Beyond the KL that the kept answers reach the line stays level: there every question has the
    best of its answers, and none is better.
    """
    curves = []
    for seed in seeds:
        rewards = question_rewards(reference_answers(seed))
        xs, ys = world.frontier(rewards)
        xs, ys = torch.cat([xs.new_zeros(1), xs]), torch.cat([rewards.mean()[None], ys])  # the base model itself
        right = torch.searchsorted(xs, kls.double()).clamp(1, len(xs) - 1)
        share = ((kls - xs[right - 1]) / (xs[right] - xs[right - 1]).clamp(min=1e-12)).clamp(0, 1)
        curves.append(ys[right - 1] + share * (ys[right] - ys[right - 1]))
    return torch.stack(curves)


def draw_frontiers(axis, seeds: tuple[int, ...]) -> None:
    """The best possible true reward at each KL, a line a seed, and the names of the axes."""
    for seed in seeds:
        kls, rewards = world.frontier(question_rewards(reference_answers(seed)))
        label = "best possible (one line a seed)" if seed == seeds[0] else None
        axis.plot(kls, rewards, color="black", linewidth=1, alpha=0.6, label=label)
    axis.set_xscale("symlog", linthresh=0.5)
    axis.set_xlabel("KL(policy || reference), nats per answer")
    axis.set_ylabel("true reward, trained questions")
