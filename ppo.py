"""PPO from a reward model: the policy samples, a reward scores, and clipped policy gradients with a learned value raise it. The baseline of SuperHF.

Schulman et al. 2017, arXiv 1707.06347, with the settings that the SuperHF paper (arXiv 2310.16763) compares with. For a completion y of prompt x, token by token:

    r_t   = -kl * [log pi_old(y_t) - log ref(y_t)], and at the last token + reward(x, y); all divided by their standard deviation, the mean kept
    A_t   = sum over l of (gamma * gae_lambda)^l * [r_(t+l) + gamma * V_(t+l+1) - V_(t+l)]          whitened over the batch's tokens;  return_t = A_t + V_t
    loss  = mean of max(-A * ratio, -A * clamp(ratio, 1 - clip, 1 + clip))                        ratio = pi(y_t) / pi_old(y_t)
          + vf_coef * mean of 1/2 max((V - return)^2, (clamp(V, V_old - value_clip, V_old + value_clip) - return)^2)

Means are over completion tokens, and only they count: prompts are in no loss, no KL and no whitening. The value is a linear head on the policy's hidden states, zero
at first. The reference is a second model, kept while training.

    python ppo.py                                                     the toy world and its true reward: no network, no GPU, a minute
    python ppo.py --reward toy:flawed --test-reward toy --kl 0.02      watch a flawed reward being exploited
    python ppo.py --model gpt2 --data prompts.jsonl --reward runs/reward_model-gpt2-seed0 --lr 1e-5 --kl 0.2 --batch-size 16 --max-new-tokens 64
    torchrun --nproc-per-node 8 ppo.py --model gpt2 --data prompts.jsonl --reward runs/reward_model-gpt2-seed0 --lr 1e-5 --batch-size 16

Batch, as common.data.collate makes it of rows with one completion each:
    input_ids, position_ids, attention_mask [lines, length]     attention_mask is 1 where a token is, 0 at padding
    source, targets, sequence [tokens]          flat position that predicts a completion token; that token; the row it belongs to
    completion_tokens [batch]                   lengths of the completions
    old_logps, old_values, advantages, returns [tokens]         of the sampling policy, in the order of `targets`

What else it does, in numbered details with reasons: docs/ppo.md. Differences from the authors' code: their responses include the prompt, so that loss and KL run
over it; the old log-probabilities here come from the training pass in the same micro-batches, so that the first ratio is exactly 1.
"""

import re
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch.utils.checkpoint import checkpoint


@dataclass
class Args:
    kl: float = 0.2
    """Price per nat and token of log pi - log ref, taken off the reward. The paper's runs have 0.2."""
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
    """What is raised: toy, toy:flawed, or a sequence-classification model, folder or hub id."""
    test_reward: str = ""
    """A second reward that only judges, named in the same way; empty: none."""
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
    lr: float = 1e-3
    """Peak learning rate of AdamW; 1e-3 suits the toy's tiny model, 1e-6 to 1e-5 real ones."""
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
    """Tokens of prompt and completion; None: the smaller of 1024 and the context."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: bfloat16 on GPUs that have it. Weights stay float32."""
    compile: bool = False
    """Compile the model's body with torch.compile."""
    eval_every: int = 50
    """Steps between held-out evaluations."""
    save_every: int = 200
    """Steps between checkpoints; the newest is kept."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    kl_samples: int = 400
    """Answers sampled before and after training, for KL and true reward; 0: none."""
    max_new_tokens: int = 24
    """Length limit of every completion, in tokens."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics also go: none, tensorboard or wandb."""


# Logits exist for this many completion tokens at a time; with more of them, each chunk's logits are recomputed in the backward pass.
CHUNK = 4096
ROWS = 64  # rows of logits that are worked on together, so that they stay in the cache
MARKERS = ("\n\nHuman:", "\n\nAssistant:")  # where a dialogue would go on


class TokenLogps(torch.autograd.Function):
    """(logits [tokens, vocabulary], targets [tokens]) -> log softmax(logits)[target], [tokens], at least float32.

    Autograd would keep the log-softmax beside the logits and add a gradient as large again. Here the logits alone are kept, and the backward pass
    turns them into their gradient, grad * (1[target] - softmax), in place: nothing else may use them.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        wide = torch.promote_types(
            logits.dtype, torch.float32
        )  # in bfloat16 a sum over a vocabulary is off by tenths of a nat
        totals = torch.cat([rows.to(wide).logsumexp(-1, keepdim=True) for rows in logits.split(ROWS)])  # [tokens, 1]
        ctx.save_for_backward(logits, targets[:, None], totals)
        return (logits.gather(-1, targets[:, None]) - totals).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        logits, targets, totals = ctx.saved_tensors
        for rows, y, total, g in zip(*(x.split(ROWS) for x in (logits, targets, totals, grad[:, None]))):
            rows.copy_((rows - total).exp_().mul_(-g).scatter_add_(-1, y, g))
        return logits, None


def token_logps(head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target in nats, [tokens], from the hidden states [tokens, hidden] that predict them; at least float32."""
    return TokenLogps.apply(head(hidden), targets)


def body(model, batch: dict) -> torch.Tensor:
    """Hidden states after the final norm, [lines * length, hidden]."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)


def completion_logps(model, batch: dict, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Summed (not averaged) log-probability of every completion in nats, [sequences]; `hidden` is what `body` returns, where it is at hand.

    Only positions that predict a completion token reach the output layer: prompts and padding cost nothing at the vocabulary.
    """
    source, targets = batch["source"], batch["targets"]  # [tokens] each
    if (
        "logits_to_keep" in batch
    ):  # this model's output layer does more than a product with its weights: use it as it is
        keep, length = batch["logits_to_keep"], batch["input_ids"].shape[1]
        logits = model(
            batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=keep
        ).logits[:, -keep:]
        logps = token_logps(lambda x: x, logits[source // length, source % length - (length - keep)], targets)
    else:
        states, head = (
            (body(model, batch) if hidden is None else hidden)[source],
            model.get_output_embeddings(),
        )  # [tokens, hidden]
        if len(targets) <= CHUNK:
            logps = token_logps(head, states, targets)
        else:
            chunks = zip(states.split(CHUNK), targets.split(CHUNK))
            logps = torch.cat([checkpoint(token_logps, head, h, t, use_reentrant=False) for h, t in chunks])
    return logps.new_zeros(len(batch["completion_tokens"])).index_add(0, batch["sequence"], logps)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16): (advantages, returns), each [batch, length].

    Args: rewards and values at each token, mask 1 where there is one, each [batch, length], the tokens of a row one after another from its first position;
        the value behind the last token is 0.
    Returns: A_t = sum over l of (gamma * lam)^l * [r_(t+l) + gamma * V_(t+l+1) - V_(t+l)] and A_t + V_t, both 0 where mask is 0.
    Raises ValueError where the shapes are not all [batch, length].
    """
    if rewards.dim() != 2 or not rewards.shape == values.shape == mask.shape:
        raise ValueError(
            f"expected rewards, values and mask of one shape [batch, length], got {[tuple(x.shape) for x in (rewards, values, mask)]}"
        )
    rewards, values = rewards * mask, values * mask
    advantages, after, value_after = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        after = rewards[:, t] + gamma * value_after - values[:, t] + gamma * lam * after  # [batch]
        advantages[:, t], value_after = after, values[:, t]
    return advantages * mask, (advantages + values) * mask


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
    """Clipped losses of each token, (policy, value), unreduced, [tokens] each (arXiv 1707.06347, equation 7; the value's clipping is common practice).

    Args: log-probabilities of the sampled tokens now and while sampling, advantages, values now and while sampling, returns, each [tokens].
    Gradient: with respect to logps -advantage * ratio where the ratio is not clipped or clipping would raise the loss, else 0; to values V - return where
        the clipped value is not the worse one, else 0. At logps = old_logps: -advantage; at values = old_values: (V - return)^2 / 2.
    Raises ValueError where the shapes are not all [tokens].
    """
    shapes = {tuple(x.shape) for x in (logps, old_logps, advantages, values, old_values, returns)}
    if len(shapes) > 1 or logps.dim() != 1:
        raise ValueError(f"expected six tensors of one shape [tokens], got {sorted(shapes)}")
    ratio = (logps - old_logps).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return policy, 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def token_rewards(
    rewards: torch.Tensor, logps: torch.Tensor, ref_logps: torch.Tensor, completion_tokens: torch.Tensor, kl: float
) -> torch.Tensor:
    """-kl * (log pi - log ref) at each token, and the completion's reward at its last one; [tokens].

    Args: rewards [batch], logps and ref_logps [tokens], the completions one after another, completion_tokens [batch].
    """
    found = -kl * (logps - ref_logps)
    return found.index_add(0, completion_tokens.cumsum(0) - 1, rewards.to(found.dtype))


def deviation_of(values: torch.Tensor) -> float:
    """Standard deviation of values [tokens], never 0."""
    return (((values - values.mean()) ** 2).mean() + 1e-8).sqrt().item()


def rows_of(flat: torch.Tensor, completion_tokens: torch.Tensor) -> torch.Tensor:
    """[tokens], the completions one after another, as [batch, longest], padded with 0 on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(completion_tokens.tolist())), batch_first=True)


def add_critic(model, saved: dict[str, torch.Tensor]):
    """Puts the linear head `model.value`, hidden state -> expected return, on a causal LM: zero, or the one among the `saved` weights."""
    model.value = torch.nn.Linear(model.config.get_text_config().hidden_size, 1, device=model.device)
    with torch.no_grad():
        for name, parameter in model.value.named_parameters():
            parameter.copy_(saved.get(f"value.{name}", torch.zeros(())))
    return model


def logps_and_values(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every completion token in nats and the value before it, [tokens] each; a model without `model.value` has values 0."""
    states = body(model, batch)[batch["source"]]  # [tokens, hidden]
    head, chunks = model.get_output_embeddings(), zip(states.split(CHUNK), batch["targets"].split(CHUNK))
    if len(states) <= CHUNK:
        logps = token_logps(head, states, batch["targets"])
    else:
        logps = torch.cat([checkpoint(token_logps, head, h, t, use_reentrant=False) for h, t in chunks])
    if not hasattr(model, "value"):
        return logps, torch.zeros_like(logps)
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    return logps, (states * model.value.weight[0]).sum(-1) + model.value.bias


def compute_loss(model, batch: dict, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the completion tokens of a micro-batch, and its metrics; "count NAME": how many things NAME is the sum of."""
    logps, values = logps_and_values(model, batch)  # [tokens] each
    old_logps, advantages, old_values, returns = (
        batch[name] for name in ("old_logps", "advantages", "old_values", "returns")
    )
    policy, value = ppo_loss(
        logps, old_logps, advantages, values, old_values, returns, args.clip, args.value_clip
    )  # [tokens] each
    losses = policy + args.vf_coef * value
    ratio = (logps - old_logps).exp()
    found = {
        "loss": losses,
        "loss/policy": policy,
        "loss/value": value,
        "clipped_share": ((ratio - 1).abs() > args.clip).to(logps.dtype),
        "ratio": ratio,
    }
    return losses.sum(), {k: v.detach().sum() for k, v in found.items()} | {
        f"count {name}": batch["completion_tokens"].sum() for name in found
    }


def trimmed(tokenizer, ids: list[int]) -> list[int]:
    """A completion without what follows a marker of the next turn: the longest run of its first tokens whose text has none. It then ends without EOS."""

    def text_has_one(n: int) -> bool:
        text = tokenizer.decode(ids[:n], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(marker in text for marker in MARKERS)

    if not text_has_one(len(ids)):
        return ids
    end = next(n for n in range(1, len(ids) + 1) if text_has_one(n))  # the first tokens that hold a whole marker
    text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    before = min(text.index(marker) for marker in MARKERS if marker in text)
    while (
        end and len(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)) > before
    ):
        end -= 1
    return ids[:end]


def main(args: Args) -> None:
    try:
        from common import data, evaluate, rewards, runtime
    except ImportError as error:
        raise SystemExit(
            f"Training needs the folder common/ beside this file; its functions alone do not. ({error})"
        ) from None
    run = runtime.start(args, __file__)
    args = run.args

    # The policy, the reference that it began as, and what rewards them.
    base = runtime.resolve_model(args.model, args.seed)
    tokenizer = runtime.load_tokenizer(base)
    reward = rewards.load(args.reward, run)
    test_reward = rewards.load(args.test_reward, run, "--test-reward") if args.test_reward else None
    saved = [runtime.load_weights(run.checkpoint or base, name) for name in ("value.weight", "value.bias")]
    model = add_critic(runtime.load_model(run.checkpoint or base, run.device, tokenizer), saved[0] | saved[1])
    runtime.disable_dropout(model)
    run.prepare(model.train())
    reference = run.prepare(runtime.load_model(base, run.device, tokenizer).eval().requires_grad_(False))
    logps, loss_and_metrics = runtime.as_forward(model, completion_logps), runtime.as_forward(model, compute_loss)
    both, ref_both = runtime.as_forward(model, logps_and_values), runtime.as_forward(reference, logps_and_values)

    # The prompts, and the order in which training sees them.
    splits, data_sha256 = data.load_prompts(args, tokenizer, runtime.length_limit(args.max_length, model), run.say)
    plan = data.plan_batches(splits["train"], args.batch_size, args.epochs, args.max_steps, args.seed)
    longest = {
        "prompt": max((row["prompt"] for rows in splits.values() for row in rows), key=len),
        "completions": [[tokenizer.eos_token_id] * 2],
    }
    layout = evaluate.choose_layout(
        logps, model, {"train": [longest]}, tokenizer.pad_token_id, run.device, False, run.say
    )
    if layout == "model_head":
        raise data.InputError(
            f"--model {args.model}: its output layer scales or caps logits, which ppo.py does not do."
        )
    run.say(
        "Reward: "
        + args.reward
        + (f"; test reward: {args.test_reward}" if test_reward else "")
        + f". METEOR: {evaluate.meteor_form() or 'needs nltk'}."
    )

    def completions_of(rows: list[dict], texts: list, seed: int) -> list[tuple]:
        """(prompt ids, prompt, completion ids, answer, reward) of every completion sampled for these prompts on this process, prompt by prompt."""
        many = [(row["prompt"], text) for row, text in zip(rows, texts) for _ in range(args.completions)]
        started = time.perf_counter()
        size = 512 if runtime.is_tiny(model) else 64
        shape = {"seed": seed, "batch_size": size, "autocast": run.autocast}
        drawn = evaluate.sample(model, [ids for ids, _ in many], tokenizer, args.max_new_tokens, **shape)
        drawn = [trimmed(tokenizer, ids) for ids in drawn]
        answers = [evaluate.text_behind(tokenizer, prompt, ids) for (prompt, _), ids in zip(many, drawn)]
        seconds["generation"] += time.perf_counter() - started
        started = time.perf_counter()
        scores = reward([text for _, text in many], answers).tolist()
        seconds["scoring"] += time.perf_counter() - started
        return [(ids, text, *rest) for (ids, text), *rest in zip(many, drawn, answers, scores)]

    def look(prompts: list, answers: list[str]) -> dict:
        """What the end table says of sampled answers besides the common keys."""
        answers = [re.split("|".join(MARKERS), answer)[0] for answer in answers]
        found = {"reward": reward(prompts, answers).mean().item()}
        found |= {"test_reward": test_reward(prompts, answers).mean().item()} if test_reward else {}
        return found | evaluate.sameness(prompts, answers, args.seed)

    def report(split: str, anchor) -> dict:
        """The keys of the end table on one split, for the policy as it is now; `anchor` None: the policy still is the reference."""
        return evaluate.judge_samples(run, model, anchor, base, tokenizer, splits[split], look=look)

    seconds = {"generation": 0.0, "scoring": 0.0, "training": 0.0}
    before = run.remember("before", lambda: {split: report(split, None) for split in splits if split != "train"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.restore(model, optimizer)

    for step in run.steps(len(plan)):
        lr = run.learning_rate(step, len(plan))
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Every process samples for its share of the prompts, with random numbers of this step alone: a resumed run draws the same.
        mine = run.share_out(plan[step])
        found = completions_of(
            [splits["train"][i] for i in mine],
            [splits["train"].texts[i][0] for i in mine],
            1_000_003 * args.seed + 1009 * step + run.rank,
        )
        per_prompt = [found[i : i + args.completions] for i in range(0, len(found), args.completions)]
        candidates = [
            c for group in run.gather(per_prompt)[: len(plan[step])] for c in group if c[2]
        ]  # of all processes; without the empty ones
        started = time.perf_counter()
        examples = [{"prompt": prompt, "completions": [ids]} for prompt, _, ids, _, _ in candidates]
        micro = data.micro_batches(list(range(len(examples))), args.micro_batch_size, run.rank, run.world_size)
        batches = [
            data.collate([examples[i] for i in rows], tokenizer.pad_token_id, layout, run.device) for rows, _ in micro
        ]

        # What the sampling policy thought of its tokens, in the micro-batches that it is then trained in: the first ratio is exactly 1.
        kls = []  # log pi - log ref of each completion, by its number
        for batch, (rows, _) in zip(batches, micro):
            with torch.no_grad(), run.autocast():
                batch["old_logps"], batch["old_values"] = both(batch)
                ref_logps, _ = ref_both(batch)
            scores = torch.tensor([candidates[i][4] for i in rows], device=run.device)
            batch["rewards"] = token_rewards(scores, batch["old_logps"], ref_logps, batch["completion_tokens"], args.kl)
            gaps = torch.zeros_like(scores).index_add(0, batch["sequence"], (batch["old_logps"] - ref_logps).float())
            kls += list(zip(rows, gaps.tolist()))
        rewards_now = run.gathered([batch["rewards"] for batch, (_, real) in zip(batches, micro) if real])
        scale = 1.0 / deviation_of(rewards_now)  # whitened: divided by their deviation, the mean kept
        for batch in batches:
            lengths = batch["completion_tokens"]
            mask = rows_of(torch.ones_like(batch["rewards"]), lengths)
            advantages, returns = gae(
                rows_of(scale * batch["rewards"], lengths),
                rows_of(batch["old_values"], lengths),
                mask,
                args.gamma,
                args.gae_lambda,
            )
            batch["advantages"], batch["returns"] = advantages[mask.bool()], returns[mask.bool()]
        all_advantages = run.gathered([batch["advantages"] for batch, (_, real) in zip(batches, micro) if real])
        mean, deviation = all_advantages.mean().item(), deviation_of(all_advantages)
        for batch in batches:
            batch["advantages"] = (batch["advantages"] - mean) / deviation

        tokens = sum(len(ids) for _, _, ids, _, _ in candidates)
        for _ in range(args.ppo_epochs):
            for batch, (_, real) in zip(batches, micro):
                with run.autocast():
                    loss, metrics = loss_and_metrics(batch, args)
                # Every token of the step weighs the same, however it is cut; fully_shard averages gradients over processes.
                (loss * real * run.world_size / tokens).backward()
                run.add(metrics, real)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        gaps = dict(run.gather_all(kls))
        said = {name: [] for name in ("loss", "loss/policy", "loss/value", "clipped_share", "ratio")} | {
            "reward": [c[4] for c in candidates],
            "logratio": [gaps[i] for i in range(len(candidates))],
        }
        same = evaluate.sameness([c[1] for c in candidates], [c[3] for c in candidates], step, pairs=16)
        said |= {name: [] if value is None else [value] for name, value in same.items()}
        sums = {name: torch.tensor(float(sum(values)), device=run.device) for name, values in said.items()}
        run.add(
            sums
            | {f"count {name}": torch.tensor(float(len(values)), device=run.device) for name, values in said.items()},
            run.main,
        )
        run.log(examples, grad_norm, lr)
        seconds["training"] += time.perf_counter() - started
        if run.due(args.eval_every):
            held = evaluate.judge_samples(run, model, reference, base, tokenizer, splits["held_out"], look=look)
            run.write("held_out", {name: value for name, value in held.items() if name != "samples"})
        if run.due(args.save_every) or run.stopping:
            run.save(model, optimizer, tokenizer)

    run.save_model(model, tokenizer, run.folder)
    del optimizer
    columns = {"before": before, "after": {split: report(split, reference) for split in before}}
    shares = {name: spent / max(1e-9, sum(seconds.values())) for name, spent in seconds.items()}
    run.finish(columns, base, data_sha256, {"time_shares": shares, "meteor": evaluate.meteor_form()})
    evaluate.print_report(run, columns)
    run.say("Time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
