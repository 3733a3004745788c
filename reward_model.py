"""Reward model: learns which of two answers people prefer, as a score of one answer.

Bradley-Terry, as in Ouyang et al. 2022, arXiv 2203.02155, equation 1. With r(x, y) the score of
answer y to prompt x, y_w the chosen and y_l the rejected one:
    loss = -log sigma(r(x, y_w) - r(x, y_l))

r is the one logit of a sequence-classification model: of a causal LM a linear head without bias at
the last token, the answer's EOS. A new head starts at zero, so that the first loss is log 2.

    python reward_model.py                              the toy world, half a minute on a CPU
    python reward_model.py --model gpt2 --data pairs.jsonl --lr 1e-5 --half first
    torchrun --nproc-per-node 8 reward_model.py --model gpt2 --data pairs.jsonl --lr 1e-5

Train on --half first for a reward to raise, on --half second for one that only judges. The run's
folder loads with AutoModelForSequenceClassification, and in superhf.py and ppo.py as --reward
runs/reward_model-gpt2-seed0.

A batch (line i < batch is row i's prompt and chosen answer, batch + i its prompt and rejected one):
    input_ids, attention_mask [2 * batch, length]: padded on the right; attention_mask is 0 there

Differences from the SuperHF authors' code:
1. The reward is read at the last token. Theirs is a mean over all positions, padding included, so
   that a score depends on what else is in the batch.
2. The pad token is one that no answer ends in, and it is saved with the run:
   sequence-classification models find the last token by it.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
import tyro


def reward_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry loss of each pair (arXiv 2203.02155, equation 1), unreduced.

    Args: rewards of the chosen and the rejected answers, each [batch].
    Returns: -log sigma(r_w - r_l), [batch].
    Gradient: with respect to chosen_rewards -sigma(r_l - r_w), to rejected_rewards the opposite. At
        equal rewards: log 2.
    Raises ValueError where the shapes are not both [batch].
    """
    if chosen_rewards.shape != rejected_rewards.shape or chosen_rewards.dim() != 1:
        shapes = f"{tuple(chosen_rewards.shape)} and {tuple(rejected_rewards.shape)}"
        raise ValueError(f"expected two tensors of one shape [batch], got {shapes}")
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def compute_loss(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the pairs of a micro-batch, and its metrics."""
    chosen_rewards, rejected_rewards = rewards_of(model, batch).chunk(2)  # [batch] each
    losses = reward_loss(chosen_rewards, rejected_rewards)  # [batch]
    margins = (chosen_rewards - rejected_rewards).detach()  # [batch]
    return losses.sum(), {
        "loss": losses.detach().sum(),
        "rewards/chosen": chosen_rewards.detach().sum(),
        "rewards/rejected": rejected_rewards.detach().sum(),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": ((margins > 0).float() + 0.5 * (margins == 0).float()).sum(),
    }


def rewards_of(model, batch: dict) -> torch.Tensor:
    """The model's one logit for each line, [lines], at least float32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def half_of(rows, which: str):
    """The rows of one half of the prompts, "first" or "second", or "all".

    A hash decides for each prompt alone, whatever else is in the rows: two runs on different halves
    share no prompt, even where their seeds hold out different ones. A half has about half of the
    prompts.
    """
    if which == "all":
        return rows
    kept = []
    for i, row in enumerate(rows):
        prompt, answer = row["texts"][:2]
        is_first = hashlib.sha256(json.dumps(prompt or answer, default=str).encode()).digest()[0] < 128
        if is_first == (which == "first"):
            kept.append(i)
    if not kept:
        raise SystemExit(f"--half {which}: the {len(rows):,} training rows leave nothing in that half.")
    return rows.subset(kept)


@dataclass
class Args:
    half: Literal["all", "first", "second"] = "all"
    """Train on all prompts or one half of them; the halves are the same for every seed."""
    model: str = "toy"
    """toy, a hub id, or a folder: a causal LM, an encoder, or a classifier with one label."""
    data: str = "toy"
    """toy (toy:hard; toy:0.2: a fifth of labels flipped), hub id, id:subset, file, choices:FILE."""
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
    lr: float | None = None
    """Peak learning rate of AdamW; None: 1e-3 for the toy's tiny model, 1e-5 for all others."""
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
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics also go: none, tensorboard or wandb."""


def main(args: Args) -> None:
    try:
        from adapters import lora
        from common import batches, data, metrics, models
        from common.processes import print0
        from common.run import start_run
        from rewards.metrics import calibration_error
        from rewards.models import load_classifier
        from toy.base import rank_correlation, settings_of
    except ImportError as error:
        needs = "adapters/, attention/, chat/, choices/, common/, report/, rewards/, tokens/ and toy/"
        raise SystemExit(f"Training needs {needs} beside this file. ({error})") from None
    run, args = start_run(args, __file__)

    # The model: one with a head already goes on, any other gets a new one that is zero.
    model_folder = models.resolve_model(args.model, args.seed)
    tokenizer = models.load_tokenizer(model_folder, args.chat_template)
    model = load_classifier(lora.start_of(run.checkpoint, model_folder), run.device, tokenizer)
    model = lora.add_adapter(model, args.lora_rank, args.model, model_folder, run.checkpoint)
    run.prepare(model.train())
    compute = models.bind_forward(model, compute_loss)

    # The rows, and the order in which training sees them.
    max_length = models.length_limit(args.max_length, model, tokenizer)
    rows_from = (args.data, args.eval_data, args.holdout, args.seed)
    splits, data_sha256 = data.load_pairs(*rows_from, tokenizer, max_length, chat=args.chat)
    splits["train"] = half_of(splits["train"], args.half)
    if args.half != "all":
        print0(f"The {args.half} half of the prompts: {len(splits['train']):,} rows to train on.")
    plan = batches.plan_batches(splits["train"], args.batch_size, args.epochs, args.max_steps, args.seed)
    splits["train"], plan = batches.planned_rows(splits["train"], plan)
    run.pin_sources(model_folder, data_sha256)
    batch_of = partial(batches.collate, pad_id=tokenizer.pad_token_id, layout="rows", device=run.device)
    predict = partial(run.predict, models.bind_forward(model, rewards_of), batch_of)  # rows -> [rows, 2]

    def report() -> dict:
        """The end table of the model as it is now."""
        table = {}
        for name, rows in splits.items():
            if name == "train":
                continue
            rewards = predict(rows)  # [rows, 2]
            table[name] = {"reward_accuracy": metrics.accuracy(rewards, ties_say_nothing=True), "samples": []}
            chosen = torch.zeros(len(rows))  # the right choice of each pair is the first one
            table[name]["margin_calibration"] = calibration_error(rewards.softmax(1), chosen) if rows else None
            if rows and settings_of(args.data):
                table[name]["rank_correlation"] = rank_correlation(rows, rewards)
        return table

    before = run.cached_json("before", report)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.restore(model, optimizer)

    for step, rows_of_step in run.steps(plan):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(step)
        for rows, weight in run.micro_batches(rows_of_step):
            with run.autocast():
                loss, sums = compute(batch_of(rows))
            # Every pair of the step weighs the same, however the step is cut.
            (loss * weight / len(rows_of_step)).backward()
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
    run.finish({"before": before, "after": report()})


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)  # tyro would join its lines
    main(tyro.cli(Args))
