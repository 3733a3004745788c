"""Policies of the toy world: what they answer to the trained questions, how good that is, and the
best possible curve to draw beside them.
"""

import torch
import transformers

from common.evaluate import kl_of_samples
from common.generate import decode_completion, sample
from common.models import load_model, load_tokenizer
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
    kl = nats.mean().item()
    rewards = question_rewards(by_question(texts, count))
    before = question_rewards(reference_answers(seed))
    good = before.mean(1).argsort(descending=True)[: len(before) // 5]
    reward = rewards.mean().item()
    return {
        "answers": count,
        "kl": kl,
        "true_reward": reward,
        "efficiency": world.frontier_efficiency(kl, reward, before),
        "good_before": before[good].mean().item(),
        "good_after": rewards[good].mean().item(),
    }


def draw_frontiers(axis, seeds: tuple[int, ...]) -> None:
    """The best possible true reward at each KL, a line a seed, and the names of the axes."""
    for seed in seeds:
        kls, rewards = world.frontier(question_rewards(reference_answers(seed)))
        label = "best possible (one line a seed)" if seed == seeds[0] else None
        axis.plot(kls, rewards, color="black", linewidth=1, alpha=0.6, label=label)
    axis.set_xscale("symlog", linthresh=0.5)
    axis.set_xlabel("KL(policy || reference), nats per answer")
    axis.set_ylabel("true reward, trained questions")
