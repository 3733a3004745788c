"""SFT: supervised fine-tuning on answers to imitate; the first stage, and a baseline.

For a prompt x and an answer y the loss is the mean of -log pi over the answers' tokens:
    loss = -sum over rows and answer tokens of log pi(y_t | x, y_<t) / answer tokens of the step

The prompt's tokens are read and never trained on; the answer's EOS is. Demonstrations are rows with
prompt and completion; of preference pairs the chosen answer is taken, of labelled rows those with
label 1.

    python sft.py                                       the toy world, about a minute on a CPU
    python sft.py --model gpt2 --data pairs.jsonl --lr 1e-5
    torchrun --nproc-per-node 8 sft.py --model gpt2 --data pairs.jsonl --lr 1e-5

The run's folder is a --model for every other script:
    python dpo.py --model runs/sft-gpt2-seed0 --data pairs.jsonl

A batch of rows with one answer each:
    input_ids, position_ids, attention_mask [batch, length]; the mask is 1 where a token is, else 0
    logit_index, targets, sequence_ids [tokens]: flat position that predicts a completion token;
    that token; the row it belongs to
    completion_tokens [batch]: lengths of the completions, the rows one after another

Two things that other implementations get wrong:
1. Every token of an optimiser step weighs the same, however the step is cut into micro-batches and
   over processes. A mean per micro-batch, averaged, does not.
2. Padding is never told by token id, so the EOS is trained on where pad and EOS are the same token,
   and generation stops.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro
from torch.utils.checkpoint import checkpoint


def sft_loss(logps: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each answer, unreduced.

    Its sum over rows divided by their number of answer tokens is the mean over tokens.
    Args: logps, log-probabilities summed over each answer's tokens in nats, [batch].
    Returns: -logps, [batch].
    Gradient: with respect to logps -1. Raises ValueError where the shape is not [batch].
    """
    if logps.dim() != 1:
        raise ValueError(f"expected log-probabilities [batch], got {tuple(logps.shape)}")
    return -logps


def compute_loss(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the answer tokens of a micro-batch, and its metrics.

    "count NAME": how many things NAME is the sum of.
    """
    logps, tokens = completion_logps(model, batch), batch["completion_tokens"]  # [batch] each
    losses = sft_loss(logps)  # [batch]
    return losses.sum(), {
        "loss": losses.detach().sum(),
        "count loss": tokens.sum(),
        "logps": logps.detach().sum(),
        "completion_tokens": tokens.sum(),
    }


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
    lr: float | None = None
    """Peak learning rate of AdamW; None: 1e-3 for the toy's tiny model, 1e-5 for all others."""
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
    """Length limit of those answers, in tokens."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics also go: none, tensorboard or wandb."""


def main(args: Args) -> None:
    try:
        from adapters import lora
        from common import batches, evaluate, models, oracle
        from common.run import start_run
        from labelled.rows import load_demonstrations
        from toy.base import judge_of
    except ImportError as error:
        needs = "adapters/, attention/, chat/, choices/, common/, labelled/, report/, tokens/ and toy/"
        raise SystemExit(f"Training needs {needs} beside this file. ({error})") from None
    run, args = start_run(args, __file__)

    # The policy.
    ref_folder = models.resolve_model(args.model, args.seed)
    tokenizer = models.load_tokenizer(ref_folder, args.chat_template)
    model = models.load_model(lora.start_of(run.checkpoint, ref_folder), run.device, tokenizer)
    model = lora.add_adapter(model, args.lora_rank, args.model, ref_folder, run.checkpoint)

    # The rows, and the order in which training sees them.
    max_length = models.length_limit(args.max_length, model)
    rows_from = (args.data, args.eval_data, args.holdout, args.seed)
    splits, data_sha256 = load_demonstrations(*rows_from, tokenizer, max_length, chat=args.chat)
    plan = batches.plan_batches(splits["train"], args.batch_size, args.epochs, args.max_steps, args.seed)
    splits["train"], plan = batches.planned_rows(splits["train"], plan)
    pad_id = tokenizer.pad_token_id
    plain = partial(completion_logps, model)
    layout = oracle.choose_layout(plain, model, splits, pad_id, run.device, share_prompt=False)
    run.prepare(model.train())
    run.pin_sources(ref_folder, data_sha256)
    batch_of = partial(batches.collate, pad_id=pad_id, layout=layout, device=run.device, dtype=run.dtype)

    compute = models.bind_forward(model, compute_loss)

    sampling = {"count": args.kl_samples, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    judge = judge_of(args.data, ref_folder, tokenizer, args.seed)
    samples_of = partial(evaluate.evaluate_samples, tokenizer=tokenizer, autocast=run.autocast, judge=judge, **sampling)

    def report(ref_model) -> dict:
        """The end table of the policy as it is now; ref_model None: it is what it began as."""
        table = {}
        for name, rows in splits.items():
            if name != "train":
                losses = run.evaluate_loss(compute, batch_of, rows)
                table[name] = {"perplexity": math.exp(losses["loss"]) if losses else None}
                table[name] |= samples_of(model, ref_model, rows)
        return table

    before = run.cached_json("before", lambda: report(None))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.restore(model, optimizer)

    for step, rows_of_step in run.steps(plan):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(step) * group.get("lr_scale", 1.0)
        tokens = sum(len(row["completions"][0]) for row in rows_of_step)  # of all processes
        for rows, weight in run.micro_batches(rows_of_step):
            with run.autocast():
                loss, sums = compute(batch_of(rows))
            # Every token of the step weighs the same, however the step is cut.
            (loss * weight / tokens).backward()
            run.accumulate(sums, weight)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        run.end_step(len(rows_of_step), batches.count_tokens(rows_of_step), grad_norm)
        if run.is_time(args.eval_every):
            run.log("held_out", run.evaluate_loss(compute, batch_of, splits["held_out"]))
        if run.is_time_to_save():
            run.save(model, optimizer, tokenizer)

    run.save_model(model, tokenizer, args.merge)
    del optimizer
    ref_model = run.prepare(lora.without_adapter(model) or models.load_model(ref_folder, run.device, tokenizer))
    columns = {"before": before, "after": report(ref_model)}
    run.finish(columns)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)  # tyro would join its lines
    main(tyro.cli(Args))
