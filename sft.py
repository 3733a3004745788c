"""SFT: supervised fine-tuning on answers that are to be imitated. The stage that preference learning starts from, and a baseline that it is judged against.

For a prompt x and an answer y the loss is the mean of -log pi over the answers' tokens:

    loss = -sum over rows and answer tokens of log pi(y_t | x, y_<t) / number of answer tokens in the optimiser step

The prompt's tokens are read and never trained on; the answer's EOS is. Demonstrations are rows with prompt and completion; of preference pairs the chosen answer is
taken, of labelled rows those with label 1.

    python sft.py                                                   the toy world: no network, no GPU, about a minute
    python sft.py --model gpt2 --data pairs.jsonl --lr 1e-5         any causal LM of the hub or a folder
    torchrun --nproc-per-node 8 sft.py --model gpt2 --data pairs.jsonl --lr 1e-5

The run's folder is a --model for every other script: python dpo.py --model runs/sft-gpt2-seed0 --data pairs.jsonl

Batch, as common.data.collate makes it of rows with one answer each:
    input_ids, position_ids, attention_mask [lines, length]     attention_mask is 1 where a token is, 0 at padding
    source, targets, sequence [tokens]          flat position that predicts a completion token; that token; the row it belongs to
    completion_tokens [batch]                   lengths of the completions, the rows one after another

Two things that other implementations get wrong:
1. Every token of an optimiser step weighs the same, however the step is cut into micro-batches and over processes. A mean per micro-batch, averaged, does not.
2. Padding is never told by token id, so the EOS is trained on where pad and EOS are the same token, and generation stops.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch.utils.checkpoint import checkpoint


@dataclass
class Args:
    model: str = "toy"
    """toy, a hub id, or a folder, a run among them: what the policy starts from."""
    data: str = "toy"
    """toy (the chosen answers of its pairs), a hub id or id:subset, or a file of rows."""
    eval_data: str | None = None
    """A file of held-out rows; None: the data's test split, or a share of the prompts."""
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
    epochs: float = 1.0
    """Passes over the training rows; may be a fraction."""
    max_steps: int = -1
    """Optimiser steps at most; -1: no limit."""
    batch_size: int = 64
    """Rows in one optimiser step, over all processes."""
    micro_batch_size: int = 64
    """Rows in one forward pass of a process; smaller saves memory and changes nothing else."""
    warmup: float = 0.1
    """Linear warm-up, then linear decay: below 1 a share of all steps, else their number."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; inf: never."""
    max_length: int | None = None
    """Tokens of prompt and one completion; None: the smaller of 1024 and the context."""
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
    """Length limit of those answers, in tokens."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics also go: none, tensorboard or wandb."""


# Logits exist for this many completion tokens at a time; with more of them, each chunk's logits are recomputed in the backward pass.
CHUNK = 4096
ROWS = 64  # rows of logits that are worked on together, so that they stay in the cache


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


def sft_loss(logps: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each answer, unreduced; its sum over rows divided by their number of answer tokens is the mean over tokens.

    Args: logps, log-probabilities summed over each answer's tokens in nats, [batch].
    Returns: -logps, [batch].
    Gradient: with respect to logps -1. Raises ValueError where the shape is not [batch].
    """
    if logps.dim() != 1:
        raise ValueError(f"expected log-probabilities [batch], got {tuple(logps.shape)}")
    return -logps


def compute_loss(model, batch: dict, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the answer tokens of a micro-batch, and its metrics; "count NAME": how many things NAME is the sum of."""
    logps, tokens = completion_logps(model, batch), batch["completion_tokens"]  # [batch] each
    losses = sft_loss(logps)  # [batch]
    metrics = {
        "loss": losses.detach().sum(),
        "count loss": tokens.sum(),
        "logps": logps.detach().sum(),
        "completion_tokens": tokens.sum(),
    }
    return losses.sum(), metrics


def main(args: Args) -> None:
    try:
        from common import data, evaluate, runtime
    except ImportError as error:
        raise SystemExit(
            f"Training needs the folder common/ beside this file; its functions alone do not. ({error})"
        ) from None
    run = runtime.start(args, __file__)
    args = run.args

    # The policy.
    base = runtime.resolve_model(args.model, args.seed)
    tokenizer = runtime.load_tokenizer(base)
    model = runtime.load_model(run.checkpoint or base, run.device, tokenizer)
    runtime.disable_dropout(model)
    run.prepare(model.train())
    logps, loss_and_metrics = runtime.as_forward(model, completion_logps), runtime.as_forward(model, compute_loss)

    # The rows, and the order in which training sees them.
    splits, data_sha256 = data.load_demonstrations(
        args, tokenizer, runtime.length_limit(args.max_length, model), run.say
    )
    plan = data.plan_batches(splits["train"], args.batch_size, args.epochs, args.max_steps, args.seed)
    splits["train"], plan = data.only_planned(splits["train"], plan)
    layout = evaluate.choose_layout(logps, model, splits, tokenizer.pad_token_id, run.device, False, run.say)

    def batch_of(split: str, rows: list[int]) -> dict:
        return data.collate([splits[split][i] for i in rows], tokenizer.pad_token_id, layout, run.device)

    def report(split: str, reference) -> dict:
        """The keys of the end table on one split, for the policy as it is now; `reference` None: the policy still is what it began as."""
        found = run.mean_metrics(lambda rows: loss_and_metrics(batch_of(split, rows), args)[1], splits[split])
        values = {"perplexity": math.exp(found["loss"]) if found else None}
        return values | evaluate.judge_samples(run, model, reference, base, tokenizer, splits[split])

    before = run.remember("before", lambda: {split: report(split, None) for split in splits if split != "train"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.restore(model, optimizer)

    for step in run.steps(len(plan)):
        lr = run.learning_rate(step, len(plan))
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens = sum(len(splits["train"][i]["completions"][0]) for i in plan[step])  # of all processes
        for rows, real in data.micro_batches(plan[step], args.micro_batch_size, run.rank, run.world_size):
            with run.autocast():
                loss, metrics = loss_and_metrics(batch_of("train", rows), args)
            # Every token of the step weighs the same, however it is cut; fully_shard averages gradients over processes.
            (loss * real * run.world_size / tokens).backward()
            run.add(metrics, real)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        run.log([splits["train"][i] for i in plan[step]], grad_norm, lr)
        if run.due(args.eval_every):
            run.write(
                "held_out",
                run.mean_metrics(
                    lambda rows: loss_and_metrics(batch_of("held_out", rows), args)[1], splits["held_out"]
                ),
            )
        if run.due(args.save_every) or run.stopping:
            run.save(model, optimizer, tokenizer)

    run.save_model(model, tokenizer, run.folder)
    del optimizer
    reference = run.prepare(runtime.load_model(base, run.device, tokenizer))
    columns = {"before": before, "after": {split: report(split, reference) for split in before}}
    run.finish(columns, base, data_sha256)
    evaluate.print_report(run, columns)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
