"""SuperHF: samples several completions of each prompt, keeps those that a reward model likes best, and takes one supervised step on them.

arXiv 2310.16763. For each of P prompts sample N completions y, keep the k with the largest reward, and with pi the policy and ref what it began as:

    loss = mean of -log pi(y_t | x, y_<t) + kl * mean of KL[ref(. | x, y_<t) || pi(. | x, y_<t)]          means over the tokens of the kept completions

The KL runs over the whole vocabulary in the forward direction: it keeps alive what the reference may say. It is what stands between the reward and a policy
that says the same to every prompt; kl 0 is RAFT. Both means are over tokens. The reference is a second model, kept while training.

    python superhf.py                                                     the toy world and its true reward: no network, no GPU, a minute
    python superhf.py --reward toy:flawed --test-reward toy --kl 0         watch a flawed reward being exploited
    python superhf.py --model gpt2 --data prompts.jsonl --reward runs/reward_model-gpt2-seed0 --lr 2e-5 --batch-size 2 --max-new-tokens 64
    torchrun --nproc-per-node 8 superhf.py --model gpt2 --data prompts.jsonl --reward runs/reward_model-gpt2-seed0 --lr 2e-5 --batch-size 16

A completion is cut before "\\n\\nHuman:" or "\\n\\nAssistant:", where a dialogue would go on, and an empty one is never kept. What is trained on is the very tokens that were
sampled, with their EOS where they had one, never a text tokenised again.

Batch, as common.data.collate makes it of rows with one completion each:
    input_ids, position_ids, attention_mask [lines, length]     attention_mask is 1 where a token is, 0 at padding
    source, targets, sequence [tokens]          flat position that predicts a completion token; that token; the row it belongs to
    completion_tokens [batch]                   lengths of the completions
    ref_logits [tokens, vocabulary]             the reference's logits at `source`

Differences from the authors' code:
1. Both terms are means over completion tokens. Theirs sums the KL over the examples of a minibatch of 2: their kl .35 is .70 here.
2. The KL's mask is that of the cross-entropy; theirs is off by one. Prompts and padding are never trained on; theirs pads on the left and trains on prompts.
3. No dropout, so the policy that is trained is the one that sampled. Completions are cut at whole markers only, never inside a word.
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
    kl: float = 0.35
    """Weight of the mean KL(ref || pi) per completion token, in nats; 0: none, which is RAFT."""
    completions: int = 16
    """N: completions sampled for each prompt of a step."""
    top_k: int = 1
    """k: of these, how many are kept, those with the largest reward."""
    temperature: float = 1.0
    """Of the sampled completions; the end table's are always drawn at temperature 1."""
    top_p: float = 0.95
    """Tokens are sampled from the smallest set of likeliest ones that has this probability."""
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


def superhf_loss(
    policy_logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor,
    completion_mask: torch.Tensor,
    kl: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """SuperHF loss of a batch of completions (arXiv 2310.16763), the plain form that the training step is tested against.

    Args: two logits, each [batch, length, vocabulary]; labels, token ids [batch, length]; completion_mask [batch, length], 1 where the token is one of the
        completion. All stand at token positions: logits at t are compared with the token at t + 1 in here.
    Returns: mean of -log pi + kl * mean of KL(ref || pi), means over the masked tokens, a scalar; and "ce" and "kl", its parts.
    Gradient: with respect to policy_logits at t, (pi - 1[label at t + 1] + kl * (pi - ref)) / tokens where the token at t + 1 is masked 1, else 0.
    Raises ValueError where shapes do not fit, or no token is masked 1.
    """
    if (
        policy_logits.shape != ref_logits.shape
        or policy_logits.shape[:-1] != labels.shape
        or labels.shape != completion_mask.shape
        or labels.dim() != 2
    ):
        shapes = [tuple(x.shape) for x in (policy_logits, ref_logits, labels, completion_mask)]
        raise ValueError(
            f"expected two logits [batch, length, vocabulary], labels and completion_mask [batch, length], got {shapes}"
        )
    mask = completion_mask[:, 1:].bool()
    if not mask.any():
        raise ValueError("no completion token: the mean over tokens is undefined")
    terms = token_terms(policy_logits[:, :-1][mask], ref_logits[:, :-1][mask], labels[:, 1:][mask])  # [tokens, 2]
    ce, forward_kl = terms.mean(0)
    return ce + kl * forward_kl, {"ce": ce.detach(), "kl": forward_kl.detach()}


def token_terms(policy_logits: torch.Tensor, ref_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log pi(target) and KL(ref || pi) of each token in nats, [tokens, 2], from logits [tokens, vocabulary]; at least float32."""
    policy, ref = (
        x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (policy_logits, ref_logits)
    )
    return torch.stack([-policy.gather(-1, targets[:, None]).squeeze(-1), (ref.exp() * (ref - policy)).sum(-1)], 1)


def completion_logits(model, batch: dict) -> torch.Tensor:
    """Logits at the positions that predict a completion token, [tokens, vocabulary]."""
    if "logits_to_keep" in batch:
        keep, length, source = batch["logits_to_keep"], batch["input_ids"].shape[1], batch["source"]
        logits = model(
            batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=keep
        ).logits[:, -keep:]
        return logits[source // length, source % length - (length - keep)]
    return model.get_output_embeddings()(body(model, batch)[batch["source"]])


def compute_loss(model, batch: dict, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the completion tokens of a micro-batch, and its metrics; "count NAME": how many things NAME is the sum of."""
    if "logits_to_keep" in batch:
        terms = token_terms(completion_logits(model, batch), batch["ref_logits"], batch["targets"])
    else:
        head = model.get_output_embeddings()
        chunks = zip(
            *(x.split(CHUNK) for x in (body(model, batch)[batch["source"]], batch["ref_logits"], batch["targets"]))
        )
        parts = [
            checkpoint(lambda h, r, t: token_terms(head(h), r, t), *chunk, use_reentrant=False) for chunk in chunks
        ]
        terms = torch.cat(parts)  # [tokens, 2]
    ce, kl = terms.sum(0)
    tokens = batch["completion_tokens"].sum()
    loss = ce + args.kl * kl
    metrics = {"loss": loss, "ce": ce, "kl": kl}
    return loss, {name: value.detach() for name, value in metrics.items()} | {
        f"count {name}": tokens for name in metrics
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
    model = runtime.load_model(run.checkpoint or base, run.device, tokenizer)
    runtime.disable_dropout(model)
    run.prepare(model.train())
    reference = run.prepare(runtime.load_model(base, run.device, tokenizer).eval().requires_grad_(False))
    logps, loss_and_metrics = runtime.as_forward(model, completion_logps), runtime.as_forward(model, compute_loss)
    ref_logits = runtime.as_forward(reference, completion_logits)

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
        shape = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "seed": seed,
            "batch_size": size,
            "autocast": run.autocast,
        }
        drawn = evaluate.sample(model, [ids for ids, _ in many], tokenizer, args.max_new_tokens, **shape)
        drawn = [trimmed(tokenizer, ids) for ids in drawn]
        answers = [evaluate.text_behind(tokenizer, prompt, ids) for (prompt, _), ids in zip(many, drawn)]
        seconds["generation"] += time.perf_counter() - started
        started = time.perf_counter()
        scores = reward([text for _, text in many], answers).tolist()
        seconds["scoring"] += time.perf_counter() - started
        return [(ids, text, *rest) for (ids, text), *rest in zip(many, drawn, answers, scores)]

    def best_of(candidates: list[tuple]) -> list[tuple]:
        """The `top_k` of each prompt's completions with the largest rewards; empty ones never, and a prompt that has no other is left out."""
        groups = [candidates[i : i + args.completions] for i in range(0, len(candidates), args.completions)]
        return [
            c for group in groups for c in sorted((c for c in group if c[3].strip()), key=lambda c: -c[4])[: args.top_k]
        ]

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
        candidates = [c for group in run.gather(per_prompt)[: len(plan[step])] for c in group]  # of all processes
        kept = best_of(candidates)
        started = time.perf_counter()
        said = {
            "loss": [],
            "ce": [],
            "kl": [],
            "reward/sampled": [c[4] for c in candidates],
            "reward/kept": [c[4] for c in kept],
        }
        same = evaluate.sameness([c[1] for c in kept], [c[3] for c in kept], step, pairs=16)
        said |= {name: [] if value is None else [value] for name, value in same.items()}
        sums = {name: torch.tensor(float(sum(values)), device=run.device) for name, values in said.items()}
        run.add(
            sums
            | {f"count {name}": torch.tensor(float(len(values)), device=run.device) for name, values in said.items()},
            run.main,
        )
        tokens = sum(len(ids) for _, _, ids, _, _ in kept)
        examples = [{"prompt": prompt, "completions": [ids]} for prompt, _, ids, _, _ in kept]
        for rows, real in data.micro_batches(list(range(len(kept))), args.micro_batch_size, run.rank, run.world_size):
            batch = data.collate([examples[i] for i in rows], tokenizer.pad_token_id, layout, run.device)
            with run.autocast():
                with torch.no_grad():
                    batch["ref_logits"] = ref_logits(batch)
                loss, metrics = loss_and_metrics(batch, args)
            # Every token of the step weighs the same, however it is cut; fully_shard averages gradients over processes.
            (loss * real * run.world_size / tokens).backward()
            run.add(metrics, real)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
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
