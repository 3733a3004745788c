"""PPO from a reward: the policy samples, a reward scores, clipped policy gradients raise it.

Schulman et al. 2017, arXiv 1707.06347, as the baseline of SuperHF (arXiv 2310.16763). For a
completion y of prompt x, token by token, with pi_old the policy that sampled it:
    r_t  = -kl * [log pi_old(y_t) - log ref(y_t)], at the last token + reward(x, y); all / their std
    A_t  = sum_l (gamma * gae_lambda)^l * [r_(t+l) + gamma * V_(t+l+1) - V_(t+l)], then whitened
    loss = mean of max(-A * ratio, -A * clamp(ratio, 1 - clip, 1 + clip)), ratio = pi / pi_old,
         + vf_coef * mean of 1/2 max((V - R)^2, (clamp(V, V_old +- value_clip) - R)^2), R = A + V

Means and whitenings are over completion tokens. V is a linear head on the policy's hidden states.

    python ppo.py                                       the toy world, a minute on a CPU
    python ppo.py --reward toy:flawed --test-reward toy --kl 0.02       a flawed reward, exploited
    python ppo.py --model gpt2 --data prompts.jsonl --reward runs/reward_model-gpt2-seed0 \\
        --lr 1e-5 --kl 0.2 --batch-size 16 --max-new-tokens 64
    torchrun --nproc-per-node 8 ppo.py --model gpt2 --data prompts.jsonl --lr 1e-5 \\
        --reward runs/reward_model-gpt2-seed0 --batch-size 16

A batch (line i is row i: a prompt and its completions, or as many as fit):
    input_ids, position_ids [lines, length]: positions restart after the prompt for each completion
    attention_mask [lines, 1, length, length]: 0 where a token sees, -1e9 elsewhere; without shared
    prompts [lines, length], 0 at padding, else 1
    logit_index, targets, sequence_ids [tokens]: flat position that predicts a completion token;
    that token; the completion it belongs to, numbered as common.batches.collate does
    completion_tokens, rewards [completions]: lengths and rewards, in the order of targets
    old_logps, old_values, advantages, returns [tokens]: while sampling, in the order of targets

Differences from the authors' code (more details: docs/ppo.md):
1. Prompts are in no loss, no KL and no whitening; their responses include the prompt.
2. Rewards are divided by their std s, no more: their mean m becomes m / s. The usual whitening,
   (r - m) / s + m, adds m * (1 - 1 / s) to every token: a bonus or a price on length.
3. Old log-probabilities come from a training pass in the same micro-batches, not from generation:
   the first ratio is exactly 1.
"""

import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro
from torch.utils.checkpoint import checkpoint


def ppo_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    clip: float,
    value_clip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped losses of each token, (policy, value), unreduced, [tokens] each.

    arXiv 1707.06347, equation 7; the value's clipping is common practice.

    Args: log-probabilities of the sampled tokens now and while sampling, advantages, values now and
        while sampling, returns, each [tokens]; clip, value_clip, numbers.
    Gradient: with respect to logps -advantage * ratio where the ratio is not clipped or clipping
        would raise the loss, else 0; to values V - return where the clipped value is not the worse
        one, else 0. At logps = old_logps: -advantage; at values = old_values: (V - return)^2 / 2.
    Raises ValueError where the shapes are not all [tokens].
    """
    shapes = {tuple(x.shape) for x in (logps, old_logps, advantages, values, old_values, returns)}
    if len(shapes) > 1 or logps.dim() != 1:
        raise ValueError(f"expected six tensors of one shape [tokens], got {sorted(shapes)}")
    ratio = (logps - old_logps).exp()  # [tokens]
    policy_losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    value_losses = 0.5 * torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2)
    return policy_losses, value_losses


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16).

    Args: rewards and values at each token, mask 1 where there is one, each [batch, length], the
        tokens of a row one after another from its first position; the value behind the last token
        is 0.
    Returns: advantages A_t = sum over l of (gamma * lam)^l * [r_(t+l) + gamma * V_(t+l+1) -
        V_(t+l)] and returns A_t + V_t, each [batch, length], 0 where mask is 0.
    Raises ValueError where the shapes are not all [batch, length].
    """
    if rewards.dim() != 2 or not rewards.shape == values.shape == mask.shape:
        shapes = [tuple(x.shape) for x in (rewards, values, mask)]
        raise ValueError(f"expected rewards, values and mask of one shape [batch, length], got {shapes}")
    rewards, values = rewards * mask, values * mask
    advantages, after, value_after = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        after = rewards[:, t] + gamma * value_after - values[:, t] + gamma * lam * after  # [batch]
        advantages[:, t], value_after = after, values[:, t]
    return advantages * mask, (advantages + values) * mask


def compute_loss(
    model, batch: dict, clip: float, value_clip: float, vf_coef: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the completion tokens of a micro-batch, and its metrics.

    "count NAME" is how many things the metric NAME is the sum of.
    """
    logps, values = logps_and_values(model, batch)  # [tokens] each
    old_logps, old_values = batch["old_logps"], batch["old_values"]  # [tokens] each
    advantages, returns = batch["advantages"], batch["returns"]  # [tokens] each
    policy_losses, value_losses = ppo_loss(
        logps, old_logps, advantages, values, old_values, returns, clip, value_clip
    )  # [tokens] each
    losses = policy_losses + vf_coef * value_losses  # [tokens]
    ratio = (logps - old_logps).exp().detach()  # [tokens]
    sums = {
        "loss": losses.detach().sum(),
        "loss/policy": policy_losses.detach().sum(),
        "loss/value": value_losses.detach().sum(),
        "clipped_share": ((ratio - 1).abs() > clip).to(logps.dtype).sum(),
        "ratio": ratio.sum(),
    }
    tokens = batch["completion_tokens"].sum()
    return losses.sum(), sums | {f"count {name}": tokens for name in sums}


def logps_and_values(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every completion token in nats and the value before it, [tokens] each.

    A model without `model.value` has values 0.
    """
    states = hidden_states(model, batch)[batch["logit_index"]]  # [tokens, hidden]
    logps = token_logps(model.get_output_embeddings(), states, batch["targets"])  # [tokens]
    if not hasattr(model, "value"):
        return logps, torch.zeros_like(logps)
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    return logps, (states * model.value.weight[0]).sum(-1) + model.value.bias


def add_critic(model, saved: dict[str, torch.Tensor]):
    """Puts the linear head `model.value`, hidden state -> expected return, on a causal LM: the one
    among the `saved` weights, else zero.
    """
    model.value = torch.nn.Linear(model.config.get_text_config().hidden_size, 1, device=model.device)
    with torch.no_grad():
        for name, parameter in model.value.named_parameters():
            parameter.copy_(saved.get(f"value.{name}", torch.zeros(())))
    return model


# Logits exist for this many tokens at a time, and are worked on in blocks that stay in the cache.
CHUNK, BLOCK = 4096, 64


class TokenLogps(torch.autograd.Function):
    """(logits [tokens, vocabulary], targets [tokens]) -> log softmax(logits)[target], [tokens].

    Autograd would keep the log-softmax beside the logits and add a gradient as large again. Here
    the logits alone are kept, and the backward pass turns them into their gradient,
    grad * (1[target] - softmax), in place: nothing else may use them. At least float32.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        # In bfloat16 a sum over a vocabulary is off by tenths of a nat.
        wide = torch.promote_types(logits.dtype, torch.float32)
        blocks = [block.to(wide).logsumexp(-1, keepdim=True) for block in logits.split(BLOCK)]
        totals = torch.cat(blocks)  # [tokens, 1]
        ctx.save_for_backward(logits, targets[:, None], totals)
        return (logits.gather(-1, targets[:, None]) - totals).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        logits, targets, totals = ctx.saved_tensors
        for block, y, total, g in zip(*(x.split(BLOCK) for x in (logits, targets, totals, grad[:, None]))):
            block.copy_(block.to(total.dtype).sub_(total).exp_().mul_(-g).scatter_add_(-1, y, g))
        return logits, None


def token_logps(head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target in nats, [tokens], from the states [tokens, hidden] before it.

    With many tokens each chunk's logits are computed again in the backward pass.
    """
    if len(targets) <= CHUNK:
        return TokenLogps.apply(head(hidden), targets)

    def chunk_logps(states, ids):
        return TokenLogps.apply(head(states), ids)

    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK))
    return torch.cat([checkpoint(chunk_logps, states, ids, use_reentrant=False) for states, ids in chunks])


def hidden_states(model, batch: dict) -> torch.Tensor:
    """Hidden states after the final norm, [lines * length, hidden]."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)


def model_logits(model, batch: dict) -> torch.Tensor:
    """Logits [tokens, vocabulary] of a model that scales or caps them: its own output layer's."""
    keep, length = batch["logits_to_keep"], batch["input_ids"].shape[1]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, -keep:]  # [lines, keep, vocabulary]
    line, position = batch["logit_index"] // length, batch["logit_index"] % length
    return logits[line, position - (length - keep)]


def completion_logps(model, batch: dict, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Summed (not averaged) log-probability of every completion in nats, [sequences].

    Only positions that predict a completion token reach the output layer: prompts and padding cost
    nothing there. `hidden` is what `hidden_states` returns, where it is at hand.
    """
    if "logits_to_keep" in batch:
        logps = TokenLogps.apply(model_logits(model, batch), batch["targets"])  # [tokens]
    else:
        hidden = hidden_states(model, batch) if hidden is None else hidden
        states = hidden[batch["logit_index"]]  # [tokens, hidden]
        logps = token_logps(model.get_output_embeddings(), states, batch["targets"])  # [tokens]
    sums = logps.new_zeros(len(batch["completion_tokens"]))
    return sums.index_add(0, batch["sequence_ids"], logps)


MARKERS = ("\n\nHuman:", "\n\nAssistant:")  # where a dialogue would go on


@dataclass
class Completion:
    """A sampled completion and its reward; the answer is its text behind the prompt."""

    prompt_ids: list[int]
    prompt: str | list
    completion_ids: list[int]
    answer: str
    reward: float


@contextmanager
def timed(seconds: dict[str, float], name: str):
    """Adds the time that a block takes to seconds[name]."""
    started = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - started


def truncate_at_turn(tokenizer, ids: list[int]) -> list[int]:
    """A completion without what follows a marker of the next turn: its first tokens, as many as
    have no part of it. It then ends without EOS.
    """

    def text_of(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def has_marker(count: int) -> bool:
        text = text_of(count)
        return any(marker in text for marker in MARKERS)

    if not has_marker(len(ids)):
        return ids
    end = next(count for count in range(1, len(ids) + 1) if has_marker(count))
    text = text_of(end)
    begin = min(text.index(marker) for marker in MARKERS if marker in text)  # in characters
    while end and len(text_of(end)) > begin:
        end -= 1
    return ids[:end]


def rollout(rows: list[dict], count: int, tokenizer, sample, text_after, reward, seconds) -> list[list[Completion]]:
    """`count` completions of each row's prompt with their rewards, [rows][count].

    Args:
        sample: prompts as ids, n -> n completions of each as ids. text_after: (tokenizer, prompt
            ids, completion ids) -> the answer as text. reward: (prompts, answers) -> [n]. seconds:
            what this takes is added to its "generation" and "scoring".
    """
    prompt_ids = [row["prompt"] for row in rows for _ in range(count)]
    prompts = [row["texts"][0] for row in rows for _ in range(count)]
    with timed(seconds, "generation"):
        completion_ids = [truncate_at_turn(tokenizer, ids) for ids in sample([row["prompt"] for row in rows], n=count)]
        answers = [text_after(tokenizer, *ids) for ids in zip(prompt_ids, completion_ids)]
    with timed(seconds, "scoring"):
        rewards = reward(prompts, answers).tolist()
    columns = (prompt_ids, prompts, completion_ids, answers, rewards)
    completions = [Completion(*values) for values in zip(*columns)]
    return [completions[i : i + count] for i in range(0, len(completions), count)]


def sums_and_counts(values: dict[str, list[float]], device) -> dict[str, torch.Tensor]:
    """Sums of lists of numbers, with "count NAME" beside NAME: how many numbers that is."""
    sums = {}
    for name, numbers in values.items():
        sums[name] = torch.tensor(float(sum(numbers)), device=device)
        sums[f"count {name}"] = torch.tensor(float(len(numbers)), device=device)
    return sums


def token_rewards(
    rewards: torch.Tensor, logps: torch.Tensor, ref_logps: torch.Tensor, completion_tokens: torch.Tensor, kl: float
) -> torch.Tensor:
    """-kl * (log pi - log ref) at each token, + the completion's reward at its last one; [tokens].

    Args: rewards [completions], logps and ref_logps [tokens], the completions one after another,
        completion_tokens [completions].
    """
    penalties = -kl * (logps - ref_logps)
    return penalties.index_add(0, completion_tokens.cumsum(0) - 1, rewards.to(penalties.dtype))


def std(values: torch.Tensor) -> float:
    """Standard deviation of values [tokens], never 0."""
    return (((values - values.mean()) ** 2).mean() + 1e-8).sqrt().item()


def pad_rows(flat: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """[tokens], the completions one after another, as [completions, longest], 0 behind ends."""
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)


def unpad_rows(padded: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The same back, from [completions, longest] to [tokens]."""
    return torch.cat([row[:length] for row, length in zip(padded, lengths)])


def lines_of(groups: list[list[Completion]], most: int, max_length: int) -> list[dict]:
    """Rows {"prompt", "completions", "rewards"} of a step, one a line: a prompt and at most `most`
    of its completions, together at most `max_length` tokens, but one always.

    Longer lines would spend on attention what they save on prompts. Empty completions are left out.
    """
    rows = []
    for group in groups:
        room = -1  # of the line at hand: none yet
        for completion in (c for c in group if c.completion_ids):
            ids = completion.completion_ids
            if room < len(ids) or len(rows[-1]["completions"]) == most:
                rows.append({"prompt": completion.prompt_ids, "completions": [], "rewards": []})
                room = max_length - len(completion.prompt_ids)
            rows[-1]["completions"].append(ids)
            rows[-1]["rewards"].append(completion.reward)
            room -= len(ids)
    return rows


def with_rewards(batch: dict, rows: list[dict]) -> dict:
    """The batch with rewards and lengths of its completions in the order of targets, the lengths
    also as a list: none is read from the device.
    """
    lengths = [len(ids) for row in rows for ids in row["completions"]]
    rewards = [reward for row in rows for reward in row["rewards"]]
    columns = {"completion_tokens": torch.tensor(lengths), "rewards": torch.tensor(rewards)}  # [completions] each
    return batch | {name: column.to(batch["targets"].device) for name, column in columns.items()} | {"lengths": lengths}


def values_of_step(parts: list[tuple[dict, float]], name: str, gather) -> torch.Tensor:
    """What the batches of all processes hold under a name, [n], float64, on the CPU."""
    values = [batch[name].double() for batch, weight in parts if weight]
    mine = torch.cat(values).cpu() if values else torch.zeros(0, dtype=torch.float64)
    return torch.cat(gather([mine]))


@torch.no_grad()
def add_token_rewards(parts: list[tuple[dict, float]], policy_of, ref_of, autocast, kl: float) -> None:
    """What policy and reference think of the sampled tokens, as columns of each batch.

    Adds old_logps, old_values, token_rewards [tokens] and logratios [completions]. The passes are
    those of training, in the same micro-batches: the first ratio is exactly 1.

    Args:
        parts: (batch, weight) of each micro-batch. policy_of, ref_of: batch -> log-probabilities
            and values, [tokens] each.
    """
    for batch, _ in parts:
        with autocast():
            old_logps, old_values = policy_of(batch)  # [tokens] each
            ref_logps, _ = ref_of(batch)  # [tokens]
        rewards, lengths = batch["rewards"], batch["completion_tokens"]  # [completions] each
        batch |= {"old_logps": old_logps, "old_values": old_values}
        batch["token_rewards"] = token_rewards(rewards, old_logps, ref_logps, lengths, kl)  # [tokens]
        logratios = (old_logps - ref_logps).float()  # [tokens]
        batch["logratios"] = pad_rows(logratios, batch["lengths"]).sum(1)  # [completions]


def add_advantages(parts: list[tuple[dict, float]], gather, gamma: float, gae_lambda: float) -> None:
    """Adds returns and whitened advantages, [tokens] each, to each batch.

    Args:
        parts: (batch, weight) of each micro-batch, weight 0 where it only stands in for one.
        gather: items of this process -> items of all.
    """
    # Divided by their deviation alone: putting the mean back whole would pay for every token.
    scale = 1.0 / std(values_of_step(parts, "token_rewards", gather))
    for batch, _ in parts:
        lengths = batch["lengths"]
        mask = pad_rows(torch.ones_like(batch["token_rewards"]), lengths)  # [completions, longest]
        rewards = pad_rows(scale * batch["token_rewards"], lengths)  # [completions, longest]
        values = pad_rows(batch["old_values"], lengths)  # [completions, longest]
        advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)  # [completions, longest] each
        batch["advantages"], batch["returns"] = unpad_rows(advantages, lengths), unpad_rows(returns, lengths)
    all_advantages = values_of_step(parts, "advantages", gather)  # [tokens of the step]
    mean, deviation = all_advantages.mean().item(), std(all_advantages)
    for batch, _ in parts:
        batch["advantages"] = (batch["advantages"] - mean) / deviation


def update(parts, compute, model, optimizer, completions: list[Completion], max_grad_norm: float, run):
    """One optimiser step over the micro-batches; the norm of its gradient before clipping.

    Args:
        parts: (batch, weight) of each micro-batch of this process. compute: batch -> summed loss,
            summed metrics. completions: those of the whole step, on all processes.
    """
    tokens = sum(len(completion.completion_ids) for completion in completions)
    for batch, weight in parts:
        with run.autocast():
            loss, sums = compute(batch)
        # Every token of the step weighs the same, however the step is cut.
        (loss * weight / tokens).backward()
        run.accumulate(sums, weight)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def rollout_metrics(sampled: list[Completion], logratios: list[float], similarity, step: int, device) -> dict:
    """What is logged of a step besides its loss. A step without completions has the same names."""
    values = {"loss": [], "loss/policy": [], "loss/value": [], "clipped_share": [], "ratio": []}
    values["reward"] = [completion.reward for completion in sampled]
    values["logratio"] = logratios
    prompts, answers = [completion.prompt for completion in sampled], [completion.answer for completion in sampled]
    for name, value in similarity(prompts, answers, step, pairs=16).items():
        values[name] = [] if value is None else [value]
    return sums_and_counts(values, device)


def longest_row(splits: dict, eos_id: int) -> dict:
    """The longest prompt with two completions of two tokens, to choose the layout of batches by."""
    prompt = max((row["prompt"] for rows in splits.values() for row in rows), key=len)
    return {"prompt": prompt, "completions": [[eos_id, eos_id]] * 2}


def load_rewards(reward: str, test_reward: str, load_reward, shared: tuple) -> dict:
    """What is raised and, where it is named, what only judges: (prompts, answers) -> [n] each.

    Args:
        shared: `load_reward`'s arguments behind the name.
    """
    rewards = {"reward": load_reward(reward, *shared)}
    if test_reward:
        rewards["test_reward"] = load_reward(test_reward, *shared, "--test-reward")
    return rewards


def text_metrics(prompts: list, answers: list[str], rewards: dict, similarity, seed: int) -> dict:
    """Mean rewards of sampled answers, and how much these are alike."""
    answers = [re.split("|".join(MARKERS), answer)[0] for answer in answers]
    means = {name: reward(prompts, answers).mean().item() for name, reward in rewards.items()}
    return means | similarity(prompts, answers, seed)


def report(splits: dict, samples_of, ref_model) -> dict:
    """The end table of the policy as it is now; ref_model None: it still is the reference.

    Args:
        samples_of: (ref_model, rows) -> what sampled answers to the rows' prompts are like.
    """
    return {name: samples_of(ref_model, rows) for name, rows in splits.items() if name != "train"}


@dataclass
class Args:
    kl: float = 0.2
    """Price per nat and token of log pi - log ref, off the reward. The paper has 0.2."""
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    """lambda of the advantage: 1 sums rewards to the end, near 0 trusts the value."""
    clip: float = 0.2
    """The ratio to the sampling policy counts within 1 - clip and 1 + clip."""
    value_clip: float = 0.2
    """The value counts within this distance from what it was while sampling."""
    vf_coef: float = 0.1
    """Weight of the value's loss."""
    ppo_epochs: int = 4
    """Optimiser steps on each batch of completions."""
    completions: int = 1
    """Completions sampled for each prompt of a step."""
    reward: str = "toy"
    """What is raised: toy, toy:flawed, vader, or a sequence classifier, folder or hub id."""
    test_reward: str = ""
    """A second reward that only judges, named in the same way; empty: none."""

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("kl", 0 <= self.kl < float("inf"), "at least 0"),
            ("gamma", 0 < self.gamma <= 1, "above 0 and at most 1"),
            ("gae_lambda", 0 < self.gae_lambda <= 1, "above 0 and at most 1"),
            ("clip", 0 < self.clip < float("inf"), "a positive number"),
            ("value_clip", 0 < self.value_clip < float("inf"), "a positive number"),
            ("vf_coef", 0 <= self.vf_coef < float("inf"), "at least 0"),
            ("ppo_epochs", self.ppo_epochs >= 1, "at least 1"),
            ("completions", self.completions >= 1, "at least 1"),
        ):
            if not holds:
                raise SystemExit(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}.")

    model: str = "toy"
    """toy, a hub id, or a folder, a run among them: the policy's start and the reference."""
    data: str = "toy"
    """toy, a hub id or id:subset, or a file of rows with prompt, or of pairs."""
    eval_data: str | None = None
    """A file of held-out prompts; None: the data's test split, or a share of the prompts."""
    holdout: float = 0.1
    """Share of the prompts held out where the data has no test split."""
    name: str = ""
    """Name of the run's folder, a new one; empty: made from script, model and seed."""
    output_dir: str = "runs"
    """Where run folders go."""
    seed: int = 0
    """Seed of the order of the data and of all sampling."""
    resume: str = ""
    """Folder of an interrupted run to go on with; all other arguments come from it."""
    lr: float | None = None
    """Peak learning rate of AdamW; None: 1e-3 for the toy's tiny model, 1e-5 for all others."""
    epochs: float = 60.0
    """Passes over the training prompts; may be a fraction."""
    max_steps: int = -1
    """Optimiser steps at most; -1: no limit."""
    batch_size: int = 64
    """Prompts in one step, over all processes. The paper has 16."""
    micro_batch_size: int = 64
    """Completions in one forward pass of a process; smaller only saves memory."""
    warmup: float = 0.1
    """Linear warm-up, then linear decay: below 1 a share of all steps, else their number."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; inf: never."""
    max_length: int | None = None
    """Tokens of prompt and completion, and of a line; None: the smaller of 1024 and the context."""
    chat: bool = False
    """Put rows of plain text through the model's chat template."""
    chat_template: str | None = None
    """A Jinja file with a chat template in place of the model's own."""
    share_prompt: bool = True
    """Compute a prompt once for as many of its completions as fit in a line; otherwise for each."""
    lora_rank: int = 0
    """Train a LoRA adapter of this rank, not all weights; 0: none. Needs peft; see docs/lora.md."""
    merge: bool = False
    """With --lora-rank: save adapter and model as one, a folder that loads without peft."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: bfloat16 where it is fast (GPUs, AMX), but not for tiny models."""
    compile: bool = False
    """Compile the model's body with torch.compile."""
    eval_every: int = 50
    """Steps between held-out evaluations."""
    save_every: int = 200
    """Steps between checkpoints; the newest is kept."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    kl_samples: int | None = None
    """Answers sampled for KL and true reward; None: 400, or 64 on a CPU from 5 M parameters on."""
    max_new_tokens: int = 24
    """Length limit of every completion, in tokens."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics also go: none, tensorboard or wandb."""


def main(args: Args) -> None:
    try:
        from adapters import lora
        from common import batches, evaluate, generate, models, oracle
        from common.processes import gather, print0, shard_items
        from common.run import start_run
        from rewards.metrics import meteor_form, similarity
        from rewards.models import load_reward
        from rewards.prompts import load_prompts
        from toy.base import judge_of
    except ImportError as error:
        needs = "adapters/, attention/, chat/, choices/, common/, report/, rewards/, tokens/ and toy/"
        raise SystemExit(f"Training needs {needs} beside this file. ({error})") from None
    run, args = start_run(args, __file__)

    # The policy, the reference that it began as, and what rewards them.
    ref_folder = models.resolve_model(args.model, args.seed)
    tokenizer = models.load_tokenizer(ref_folder, args.chat_template)
    shared = (args.data, run.device, run.autocast, args.chat)
    rewards = load_rewards(args.reward, args.test_reward, load_reward, shared)
    value_head = models.load_weights(run.checkpoint or ref_folder, "value.weight", "value.bias")
    model = models.load_model(lora.start_of(run.checkpoint, ref_folder), run.device, tokenizer)
    model = lora.add_adapter(add_critic(model, value_head), args.lora_rank, args.model, ref_folder, run.checkpoint)

    # The prompts, and the order in which training sees them.
    max_length = models.length_limit(args.max_length, model)
    rows_from = (args.data, args.eval_data, args.holdout, args.seed)
    splits, data_sha256 = load_prompts(*rows_from, tokenizer, max_length, args.max_new_tokens, chat=args.chat)
    plan = batches.plan_batches(splits["train"], args.batch_size, args.epochs, args.max_steps, args.seed)
    longest = {"longest": [longest_row(splits, tokenizer.eos_token_id)]}
    splits["train"], plan = batches.planned_rows(splits["train"], plan)
    pad_id = tokenizer.pad_token_id
    plain = partial(completion_logps, model)
    shares = args.share_prompt and min(args.completions, args.micro_batch_size) > 1
    layout = oracle.choose_layout(plain, model, longest, pad_id, run.device, shares)
    if layout == "model_head":
        raise SystemExit(f"--model {args.model}: its output layer scales or caps logits, which ppo.py does not do.")
    run.prepare(model.train())
    ref_model = lora.without_adapter(model) or models.load_model(ref_folder, run.device, tokenizer)
    ref_model = run.prepare(ref_model.eval().requires_grad_(False))
    numbers = {"clip": args.clip, "value_clip": args.value_clip, "vf_coef": args.vf_coef}
    compute = partial(models.bind_forward(model, compute_loss), **numbers)
    policy_of = models.bind_forward(model, logps_and_values)
    ref_of = models.bind_forward(ref_model, logps_and_values)
    run.pin_sources(ref_folder, data_sha256)
    batch_of = partial(batches.collate, pad_id=pad_id, layout=layout, device=run.device, dtype=run.dtype)
    most = min(args.completions, args.micro_batch_size) if layout == "shared" else 1  # completions of a line
    names = "; test reward: ".join(filter(None, [args.reward, args.test_reward]))
    print0(f"Reward: {names}. METEOR: {meteor_form() or 'needs nltk'}.")

    # What is sampled, in training and for the end table, and what it took.
    seconds = {"generation": 0.0, "scoring": 0.0, "training": 0.0}
    lengths = {"tokenizer": tokenizer, "max_new_tokens": args.max_new_tokens, "autocast": run.autocast}
    sample = partial(generate.sample, model, **lengths)
    judges = {"judge": judge_of(args.data, ref_folder, tokenizer, args.seed)}
    judges["extra_metrics"] = partial(text_metrics, rewards=rewards, similarity=similarity, seed=args.seed)
    samples_of = partial(evaluate.evaluate_samples, model, count=args.kl_samples, seed=args.seed, **lengths, **judges)
    before = run.cached_json("before", lambda: report(splits, samples_of, None))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.restore(model, optimizer)
    first_seed = 1_000_003 * args.seed  # of sampling

    for step, rows_of_step in run.steps(plan):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(step)
        # Each process samples for its share of the prompts, with random numbers of this step alone.
        sample_step = partial(sample, seed=first_seed + 1009 * step)
        how = (tokenizer, sample_step, generate.text_after, rewards["reward"], seconds)
        groups = gather(rollout(shard_items(rows_of_step), args.completions, *how))[: len(rows_of_step)]
        kept = [c for group in groups for c in group if c.completion_ids]  # at least one token
        with timed(seconds, "training"):
            lines = lines_of(groups, most, max_length)
            longest_line = max((len(line["completions"]) for line in lines), default=1)  # in completions
            cut = run.micro_batches(lines, args.micro_batch_size // longest_line)
            parts = [(with_rewards(batch_of(rows), rows), weight) for rows, weight in cut]
            add_token_rewards(parts, policy_of, ref_of, run.autocast, args.kl)
            add_advantages(parts, gather, args.gamma, args.gae_lambda)
            for _ in range(args.ppo_epochs):
                grad_norm = update(parts, compute, model, optimizer, kept, args.max_grad_norm, run)
            logratios = values_of_step(parts, "logratios", gather).tolist()  # [completions of the step]
            run.accumulate(rollout_metrics(kept, logratios, similarity, step, run.device), 1.0)
            run.end_step(len(kept), batches.count_tokens(lines), grad_norm)
        if run.is_time(args.eval_every):
            held_out = samples_of(ref_model, splits["held_out"])
            run.log("held_out", {name: value for name, value in held_out.items() if name != "samples"})
        if run.is_time_to_save():
            run.save(model, optimizer, tokenizer)

    run.save_model(model, tokenizer, args.merge)
    del optimizer
    columns = {"before": before, "after": report(splits, samples_of, ref_model)}
    shares = {name: spent / max(1e-9, sum(seconds.values())) for name, spent in seconds.items()}
    run.finish(columns, {"time_shares": shares, "meteor": meteor_form()})
    print0("Time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)  # tyro would join its lines
    main(tyro.cli(Args))
