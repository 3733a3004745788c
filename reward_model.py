"""Reward model: learns which of two answers people prefer, as a score of one answer. What SuperHF and PPO are steered by, and judged by.

Bradley-Terry, as in Ouyang et al. 2022, arXiv 2203.02155, equation 1. With r(x, y) the score of answer y to prompt x:

    loss = -log sigma(r(x, y_w) - r(x, y_l))

r is the one logit of a sequence-classification model: of a causal LM a linear head without bias at the last token, the answer's EOS. A new head starts at zero, so
that the first loss is log 2.

    python reward_model.py                                                     the toy world: no network, no GPU, half a minute
    python reward_model.py --model gpt2 --data pairs.jsonl --lr 1e-5 --half first      a model to train with; --half second: one to judge with
    torchrun --nproc-per-node 8 reward_model.py --model gpt2 --data pairs.jsonl --lr 1e-5

The run's folder loads with AutoModelForSequenceClassification; python superhf.py --reward runs/reward_model-gpt2-seed0 samples against it.

Batch, as common.data.collate makes it (line i < batch is row i's prompt and chosen answer, batch + i its prompt and rejected one):
    input_ids, attention_mask [2 * batch, length]     padded on the right; attention_mask is 1 where a token is, 0 at padding

Differences from the SuperHF authors' code:
1. The reward is read at the last token. Theirs is a mean over all positions, padding included, so that a score depends on what else is in the batch.
2. The pad token is one that no answer ends in, and it is saved with the run: sequence-classification models find the last token by it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro


@dataclass
class Args:
    half: Literal["all", "first", "second"] = "all"
    """Train on all prompts or one half of them; the halves are the same for every seed."""
    model: str = "toy"
    """toy, a hub id, or a folder: a causal LM, an encoder, or a classifier with one label."""
    data: str = "toy"
    """toy (toy:0.2: a fifth of the labels flipped), a hub id or id:subset, or a file of rows."""
    eval_data: str | None = None
    """A file of held-out pairs; None: the data's test split, or a share of the prompts."""
    holdout: float = 0.1
    """Share of the prompts held out where the data has no test split."""
    name: str = ""
    """Name of the run's folder, a new one; empty: made from script, model and seed."""
    output_dir: str = "runs"
    """Where run folders go."""
    seed: int = 0
    """Seed of the order of the data."""
    resume: str = ""
    """Folder of an interrupted run to go on with; all other arguments come from it."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; 1e-3 suits the toy's tiny model, 1e-6 to 1e-5 real ones."""
    epochs: float = 1.0
    """Passes over the training pairs; may be a fraction."""
    max_steps: int = -1
    """Optimiser steps at most; -1: no limit."""
    batch_size: int = 32
    """Pairs in one optimiser step, over all processes."""
    micro_batch_size: int = 32
    """Pairs in one forward pass of a process; smaller saves memory and changes nothing else."""
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
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics also go: none, tensorboard or wandb."""


def rewards_of(model, batch: dict) -> torch.Tensor:
    """The model's one logit for each line, [lines], at least float32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def reward_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry loss of each pair (arXiv 2203.02155, equation 1), unreduced.

    Args: rewards of the chosen and the rejected answers, each [batch].
    Returns: -log sigma(r_w - r_l), [batch].
    Gradient: with respect to chosen_rewards -sigma(r_l - r_w), to rejected_rewards the opposite. At equal rewards: log 2.
    Raises ValueError where the shapes are not both [batch].
    """
    if chosen_rewards.shape != rejected_rewards.shape or chosen_rewards.dim() != 1:
        raise ValueError(
            f"expected two tensors of one shape [batch], got {tuple(chosen_rewards.shape)} and {tuple(rejected_rewards.shape)}"
        )
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def compute_loss(model, batch: dict, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the pairs of a micro-batch, and its metrics."""
    chosen_rewards, rejected_rewards = rewards_of(model, batch).chunk(2)  # [batch] each
    losses = reward_loss(chosen_rewards, rejected_rewards)  # [batch]
    margins = (chosen_rewards - rejected_rewards).detach()
    return losses.sum(), {
        "loss": losses.detach().sum(),
        "rewards/chosen": chosen_rewards.detach().sum(),
        "rewards/rejected": rejected_rewards.detach().sum(),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": ((margins > 0).float() + 0.5 * (margins == 0).float()).sum(),
    }


def main(args: Args) -> None:
    try:
        from common import data, evaluate, runtime
    except ImportError as error:
        raise SystemExit(
            f"Training needs the folder common/ beside this file; its functions alone do not. ({error})"
        ) from None
    run = runtime.start(args, __file__)
    args = run.args

    # The model: one with a head already goes on, any other gets a new one that is zero.
    base = runtime.resolve_model(args.model, args.seed)
    tokenizer = runtime.load_tokenizer(base)
    model = runtime.load_classifier(run.checkpoint or base, run.device, tokenizer)
    runtime.disable_dropout(model)
    run.prepare(model.train())
    scores, loss_and_metrics = runtime.as_forward(model, rewards_of), runtime.as_forward(model, compute_loss)

    # The rows, and the order in which training sees them.
    splits, data_sha256 = data.load_pairs(
        args, tokenizer, runtime.length_limit(args.max_length, model, tokenizer), run.say
    )
    splits["train"] = data.half_of(splits["train"], args.half)
    if args.half != "all":
        run.say(f"The {args.half} half of the prompts: {len(splits['train']):,} rows to train on.")
    plan = data.plan_batches(splits["train"], args.batch_size, args.epochs, args.max_steps, args.seed)
    splits["train"], plan = data.only_planned(splits["train"], plan)

    def batch_of(split: str, rows: list[int]) -> dict:
        return data.collate([splits[split][i] for i in rows], tokenizer.pad_token_id, "rows", run.device)

    def report(split: str) -> dict:
        """The keys of the end table on one split, for the model as it is now."""
        rewards = run.map_rows(lambda rows: scores(batch_of(split, rows)).view(2, -1).T, splits[split])  # [rows, 2]
        values = {"reward_accuracy": evaluate.accuracy(rewards, ties_say_nothing=True)}
        values["margin_calibration"] = (
            evaluate.calibration_error(rewards.softmax(1), torch.zeros(len(rewards))) if len(rewards) else None
        )
        return values | evaluate.judge_rewards(args, splits[split], rewards) | {"samples": []}

    before = run.remember("before", lambda: {split: report(split) for split in splits if split != "train"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.restore(model, optimizer)

    for step in run.steps(len(plan)):
        lr = run.learning_rate(step, len(plan))
        for group in optimizer.param_groups:
            group["lr"] = lr
        for rows, real in data.micro_batches(plan[step], args.micro_batch_size, run.rank, run.world_size):
            with run.autocast():
                loss, metrics = loss_and_metrics(batch_of("train", rows), args)
            # Every pair of the step weighs the same, however it is cut; fully_shard averages gradients over processes.
            (loss * real * run.world_size / len(plan[step])).backward()
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
    columns = {"before": before, "after": {split: report(split) for split in before}}
    run.finish(columns, base, data_sha256)
    evaluate.print_report(run, columns)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
