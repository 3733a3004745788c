"""SuperHF: samples completions, keeps those that a reward likes best, and fine-tunes on them.

arXiv 2310.16763. For each of P prompts sample N completions y, keep the k with the largest reward,
and with pi the policy and ref what it began as take one step on
    loss = mean of -log pi(y_t|x, y_<t) + kl * mean of KL[ref(.|x, y_<t) || pi(.|x, y_<t)]

Both means are over the tokens of the kept completions. The KL runs over the whole vocabulary in the
forward direction: it keeps alive what the reference may say. It is what stands between the reward
and a policy that says the same to every prompt; kl 0 is RAFT.

    python superhf.py                                   the toy world, a minute on a CPU
    python superhf.py --reward toy:flawed --test-reward toy --kl 0      a flawed reward, exploited
    python superhf.py --model gpt2 --data prompts.jsonl --reward runs/reward_model-gpt2-seed0 \\
        --lr 2e-5 --batch-size 2 --max-new-tokens 64
    torchrun --nproc-per-node 8 superhf.py --model gpt2 --data prompts.jsonl --batch-size 16 \\
        --reward runs/reward_model-gpt2-seed0 --lr 2e-5

A batch (line i is row i's prompt and completion):
    input_ids, position_ids, attention_mask [lines, length]: attention_mask is 0 at padding, else 1
    logit_index, targets, sequence_ids [tokens]: flat position that predicts a completion token;
    that token; the row it belongs to
    completion_tokens [batch]: lengths of the completions
    ref_states [tokens, hidden], ref_head [weight, bias if there is one]: of the reference, a second
    model, the hidden states at logit_index and the output layer; or ref_logits [tokens, vocabulary]

Differences from the authors' code:
1. Both terms are means over tokens. Theirs sums the KL over minibatches of 2: their .35 is .7 here.
   --kl is .05: at .35 already the prior caps the reward below PPO's, however long it trains.
2. The KL's mask is that of the cross-entropy; theirs is off by one, and trains on prompts too.
3. No dropout: the policy that is trained is the one that sampled, and on its very tokens, with the
   EOS where they had one. Completions are cut before whole markers only ("\\n\\nHuman:" or
   "\\n\\nAssistant:", where a dialogue would go on), never inside a word; none is kept empty.
"""

import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch.utils.checkpoint import checkpoint


def superhf_loss(
    policy_logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor,
    completion_mask: torch.Tensor,
    kl: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """SuperHF loss of a batch of completions (arXiv 2310.16763).

    The plain form: the training step, which gathers positions, is tested against it.

    Args: two logits, each [batch, length, vocabulary]; labels, token ids [batch, length];
        completion_mask [batch, length], 1 where the token is one of the completion. All stand at
        token positions: logits at t are compared with the token at t + 1 in here.
    Returns: mean of -log pi + kl * mean of KL(ref || pi), means over the masked tokens, a scalar;
        and "ce" and "kl", its parts.
    Gradient: with respect to policy_logits at t, (pi - 1[label at t + 1] + kl * (pi - ref)) /
        tokens where the token at t + 1 is masked 1, else 0.
    Raises ValueError where shapes do not fit, or no token is masked 1.
    """
    same_logits = policy_logits.shape == ref_logits.shape
    same_tokens = policy_logits.shape[:-1] == labels.shape == completion_mask.shape
    if not (same_logits and same_tokens and labels.dim() == 2):
        shapes = [tuple(x.shape) for x in (policy_logits, ref_logits, labels, completion_mask)]
        expected = "two logits [batch, length, vocabulary], labels and completion_mask [batch, length]"
        raise ValueError(f"expected {expected}, got {shapes}")
    mask = completion_mask[:, 1:].bool()  # [batch, length - 1]
    if not mask.any():
        raise ValueError("no completion token: the mean over tokens is undefined")
    terms = token_terms(policy_logits[:, :-1][mask], ref_logits[:, :-1][mask], labels[:, 1:][mask])  # [tokens, 2]
    ce, forward_kl = terms.mean(0)
    return ce + kl * forward_kl, {"ce": ce.detach(), "kl": forward_kl.detach()}


def token_terms(policy_logits: torch.Tensor, ref_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log pi(target) and KL(ref || pi) of each token in nats, [tokens, 2], at least float32.

    Args: two logits [tokens, vocabulary]; targets [tokens]. Entries of the vocabulary that are
        masked in both, -inf, count nothing.
    """
    wide = torch.promote_types(policy_logits.dtype, torch.float32)
    log_policy, log_ref = policy_logits.to(wide).log_softmax(-1), ref_logits.to(wide).log_softmax(-1)
    ce = -log_policy.gather(-1, targets[:, None]).squeeze(-1)  # [tokens]
    masked = log_ref == float("-inf")
    log_policy = log_policy.masked_fill(masked, 0.0)  # 0 * (-inf + inf) would be nan, in the gradient too
    kl = (log_ref.exp() * (log_ref.masked_fill(masked, 0.0) - log_policy)).sum(-1)  # [tokens]
    return torch.stack([ce, kl], 1)


def compute_loss(model, batch: dict, kl: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the completion tokens of a micro-batch, and its metrics.

    "count NAME" is how many things the metric NAME is the sum of.
    """
    if "logits_to_keep" in batch:
        terms = token_terms(model_logits(model, batch), batch["ref_logits"], batch["targets"])  # [tokens, 2]
    else:
        head, ref_head = model.get_output_embeddings(), batch["ref_head"]

        def chunk_terms(states, ref_states, targets):
            return token_terms(head(states), F.linear(ref_states, *ref_head), targets)

        states = hidden_states(model, batch)[batch["logit_index"]]  # [tokens, hidden]
        # Several tensors as large as the logits exist at once: fewer tokens in a chunk.
        chunks = zip(*(x.split(CHUNK // 8) for x in (states, batch["ref_states"], batch["targets"])))
        terms = torch.cat([checkpoint(chunk_terms, *chunk, use_reentrant=False) for chunk in chunks])  # [tokens, 2]
    ce, forward_kl = terms.sum(0)
    loss = ce + kl * forward_kl
    tokens = batch["completion_tokens"].sum()
    sums = {"loss": loss.detach(), "ce": ce.detach(), "kl": forward_kl.detach()}
    return loss, sums | {f"count {name}": tokens for name in sums}


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


def ref_columns(model, batch: dict) -> dict[str, torch.Tensor]:
    """What a batch holds of the reference besides its output layer: no logits, where it can be."""
    if "logits_to_keep" in batch:
        return {"ref_logits": model_logits(model, batch)}
    return {"ref_states": hidden_states(model, batch)[batch["logit_index"]]}


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


def best_completions(groups: list[list[Completion]], k: int) -> list[Completion]:
    """The k of each prompt's completions with the largest rewards; never an empty one."""
    kept = []
    for group in groups:
        candidates = [completion for completion in group if completion.answer.strip()]
        candidates.sort(key=lambda completion: completion.reward, reverse=True)
        kept += candidates[:k]
    return kept


def parts_with_reference(micro_batches, batch_of, ref_of, ref_head, autocast):
    """(batch, weight) of each (rows, weight), the reference's columns too, one at a time."""
    for rows, weight in micro_batches:
        batch = batch_of(rows)
        with torch.no_grad(), autocast():
            columns = ref_of(batch)
        yield batch | columns | {"ref_head": ref_head}, weight


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


def choice_metrics(groups: list[list[Completion]], kept: list[Completion], similarity, step: int, device) -> dict:
    """What is logged of a step besides its loss. A step without completions has the same names."""
    values = {"loss": [], "ce": [], "kl": []}
    values["reward/sampled"] = [completion.reward for group in groups for completion in group]
    values["reward/kept"] = [completion.reward for completion in kept]
    prompts, answers = [completion.prompt for completion in kept], [completion.answer for completion in kept]
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
    kl: float = 0.05
    """Weight of KL(ref || pi) in nats per token; 0: none, which is RAFT. The paper has .35."""
    completions: int = 16
    """N: completions sampled for each prompt of a step."""
    top_k: int = 1
    """k: of these, how many are kept, those with the largest reward."""
    temperature: float = 1.0
    """Of the sampled completions; the end table's are always drawn at temperature 1."""
    top_p: float = 0.95
    """Tokens are sampled from the smallest set of likeliest ones that has this probability."""
    reward: str = "toy"
    """What is raised: toy, toy:flawed, vader, or a sequence classifier, folder or hub id."""
    test_reward: str = ""
    """A second reward that only judges, named in the same way; empty: none."""

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("kl", 0 <= self.kl < float("inf"), "at least 0"),
            ("completions", self.completions >= 1, "at least 1"),
            ("top_k", self.top_k >= 1, "at least 1"),
            ("temperature", 0 < self.temperature < float("inf"), "a positive number"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
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
    epochs: float = 8.0
    """Passes over the training prompts; may be a fraction."""
    max_steps: int = -1
    """Optimiser steps at most; -1: no limit."""
    batch_size: int = 8
    """Prompts in one step, over all processes. The paper has 2."""
    micro_batch_size: int = 64
    """Completions in one forward pass of a process; smaller only saves memory."""
    warmup: float = 0.1
    """Linear warm-up, then linear decay: below 1 a share of all steps, else their number."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; inf: never."""
    max_length: int | None = None
    """Tokens of prompt and completion; None: the smaller of 1024 and the context."""
    chat: bool = False
    """Put rows of plain text through the model's chat template."""
    chat_template: str | None = None
    """A Jinja file with a chat template in place of the model's own."""
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
    model = models.load_model(lora.start_of(run.checkpoint, ref_folder), run.device, tokenizer)
    model = lora.add_adapter(model, args.lora_rank, args.model, ref_folder, run.checkpoint)

    # The prompts, and the order in which training sees them.
    max_length = models.length_limit(args.max_length, model)
    rows_from = (args.data, args.eval_data, args.holdout, args.seed)
    splits, data_sha256 = load_prompts(*rows_from, tokenizer, max_length, args.max_new_tokens, chat=args.chat)
    plan = batches.plan_batches(splits["train"], args.batch_size, args.epochs, args.max_steps, args.seed)
    longest = {"longest": [longest_row(splits, tokenizer.eos_token_id)]}
    splits["train"], plan = batches.planned_rows(splits["train"], plan)
    pad_id = tokenizer.pad_token_id
    plain = partial(completion_logps, model)
    layout = oracle.choose_layout(plain, model, longest, pad_id, run.device, share_prompt=False)
    run.prepare(model.train())
    ref_model = lora.without_adapter(model) or models.load_model(ref_folder, run.device, tokenizer)
    ref_model = run.prepare(ref_model.eval().requires_grad_(False))
    compute = partial(models.bind_forward(model, compute_loss), kl=args.kl)
    ref_of = models.bind_forward(ref_model, ref_columns)
    ref_head = [models.full_tensor(p) for p in ref_model.get_output_embeddings().parameters()]
    run.pin_sources(ref_folder, data_sha256)
    batch_of = partial(batches.collate, pad_id=pad_id, layout=layout, device=run.device, dtype=run.dtype)
    names = "; test reward: ".join(filter(None, [args.reward, args.test_reward]))
    print0(f"Reward: {names}. METEOR: {meteor_form() or 'needs nltk'}.")

    # What is sampled, in training and for the end table, and what it took.
    seconds = {"generation": 0.0, "scoring": 0.0, "training": 0.0}
    lengths = {"tokenizer": tokenizer, "max_new_tokens": args.max_new_tokens, "autocast": run.autocast}
    sample = partial(generate.sample, model, temperature=args.temperature, top_p=args.top_p, **lengths)
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
        kept = best_completions(groups, args.top_k)
        with timed(seconds, "training"):
            run.accumulate(choice_metrics(groups, kept, similarity, step, run.device), 1.0)
            examples = [{"prompt": c.prompt_ids, "completions": [c.completion_ids]} for c in kept]
            parts = parts_with_reference(run.micro_batches(examples), batch_of, ref_of, ref_head, run.autocast)
            grad_norm = update(parts, compute, model, optimizer, kept, args.max_grad_norm, run)
            run.end_step(len(examples), batches.count_tokens(examples), grad_norm)
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
