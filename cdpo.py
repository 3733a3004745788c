"""cDPO: conservative DPO, for labels of which a share is wrong: training stops at a finite margin.

Mitchell 2023, "A note on DPO with noisy preferences", equation 3. For a prompt x, a chosen answer
y_w and a rejected one y_l:
    h    = [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]
    loss = -(1 - eps) * log sigma(beta * h) - eps * log sigma(-beta * h)

pi is the policy, ref the frozen model it started from; log pi(y|x) is the sum over the answer's
tokens, its EOS included. eps, the share of labels taken to be flipped, is --label-smoothing. The
gradient vanishes where sigma(beta * h) = 1 - eps; eps = 0 is DPO.

    python cdpo.py                                      the toy world, about a minute on a CPU
    python cdpo.py --model gpt2 --data pairs.jsonl --lr 1e-5
    torchrun --nproc-per-node 8 cdpo.py --model gpt2 --data pairs.jsonl --lr 1e-5

A batch (sequence i < batch is pair i's chosen answer, batch + i its rejected one):
    input_ids, position_ids [lines, length]; attention_mask: [lines, length] of 0 and 1, or a float
    [lines, 1, length, length] that is added, where a line holds both answers
    logit_index, targets, sequence_ids [tokens]: flat position that predicts a completion token;
    that token; the sequence it belongs to
    completion_tokens [2 * batch]: lengths of the completions
    ref_chosen_logps, ref_rejected_logps [batch]

Differences from the authors' code:
1. The reference's log-probabilities are computed once, before the first step: no second model.
2. The prompt is computed once for both answers; logits exist only for completion tokens.
3. AdamW with linear decay and clipping at 1, not RMSprop at a constant rate and clipping at 10.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch.utils.checkpoint import checkpoint


# [method]
def cdpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    beta: float,
    label_smoothing: float,
) -> torch.Tensor:
    """Conservative DPO loss of each pair (Mitchell 2023, equation 3), unreduced.

    Args: four summed log-probabilities in nats, each [batch]; beta, a number; label_smoothing, eps.
    Returns: -(1 - eps) * log sigma(beta * h) - eps * log sigma(-beta * h), [batch], with h the
        chosen minus the rejected log-ratio.
    Gradient: with respect to policy_chosen_logps beta * (sigma(beta * h) - (1 - eps)), to
        policy_rejected_logps the opposite; zero at beta * h = log((1 - eps) / eps), the minimum.
        At policy = ref: log 2.
    Raises ValueError where the shapes are not all [batch] or eps is not in [0, 0.5).
    """
    logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    shapes = {tuple(x.shape) for x in logps}
    if len(shapes) > 1 or policy_chosen_logps.dim() != 1:
        raise ValueError(f"expected four tensors of one shape [batch], got {sorted(shapes)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"expected label_smoothing at least 0 and below 0.5, got {label_smoothing}")
    chosen_logratios = policy_chosen_logps - ref_chosen_logps  # [batch]
    rejected_logratios = policy_rejected_logps - ref_rejected_logps  # [batch]
    logits = beta * (chosen_logratios - rejected_logratios)  # [batch]
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def compute_loss(
    model, batch: dict, beta: float, label_smoothing: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the pairs of a micro-batch, and its metrics."""
    chosen_logps, rejected_logps = completion_logps(model, batch).chunk(2)  # [batch] each
    ref_chosen_logps, ref_rejected_logps = batch["ref_chosen_logps"], batch["ref_rejected_logps"]  # [batch] each
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    losses = cdpo_loss(*logps, beta, label_smoothing)  # [batch]
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)  # [batch]
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)  # [batch]
    return losses.sum(), pair_metrics(losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps)


# [/method]
def pair_metrics(losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps) -> dict[str, torch.Tensor]:
    """Metrics of a micro-batch, each summed over its pairs, on the device.

    All arguments [batch].
    """
    margins = (chosen_rewards - rejected_rewards).detach()
    return {
        "loss": losses.detach().sum(),
        "rewards/chosen": chosen_rewards.detach().sum(),
        "rewards/rejected": rejected_rewards.detach().sum(),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": ((margins > 0).float() + 0.5 * (margins == 0).float()).sum(),
        "logps/chosen": chosen_logps.detach().sum(),
        "logps/rejected": rejected_logps.detach().sum(),
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
    # [method]
    beta: float = 0.3
    """Strength of the pull to the reference, per nat. DPO's paper uses 0.1 to 0.5."""
    label_smoothing: float = 0.1
    """Share of the labels taken to be wrong, at least 0 and below 0.5; 0: DPO."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise SystemExit(f"--label-smoothing {self.label_smoothing}: expected at least 0 and below 0.5.")

    # [/method]
    model: str = "toy"
    """toy, a hub id, or a folder, a run among them: the policy's start and the reference."""
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
    """Seed of the order of the data and of all sampling."""
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
    share_prompt: bool = True
    """Compute a prompt once for both answers; otherwise twice."""
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
        from common import batches, data, evaluate, metrics, models, oracle
        from common.run import start_run
        from toy.base import judge_of
    except ImportError as error:
        needs = "adapters/, attention/, chat/, choices/, common/, report/, tokens/ and toy/"
        raise SystemExit(f"Training needs {needs} beside this file. ({error})") from None
    run, args = start_run(args, __file__)

    # The policy, which before its first step is also the reference.
    ref_folder = models.resolve_model(args.model, args.seed)
    tokenizer = models.load_tokenizer(ref_folder, args.chat_template)
    model = models.load_model(lora.start_of(run.checkpoint, ref_folder), run.device, tokenizer)
    # [method]
    # [/method]
    model = lora.add_adapter(model, args.lora_rank, args.model, ref_folder, run.checkpoint)

    # The rows, and the order in which training sees them.
    max_length = models.length_limit(args.max_length, model)
    rows_from = (args.data, args.eval_data, args.holdout, args.seed)
    splits, data_sha256 = data.load_pairs(*rows_from, tokenizer, max_length, chat=args.chat)
    plan = batches.plan_batches(splits["train"], args.batch_size, args.epochs, args.max_steps, args.seed)
    splits["train"], plan = batches.planned_rows(splits["train"], plan)
    pad_id = tokenizer.pad_token_id
    plain = partial(completion_logps, model)
    layout = oracle.choose_layout(plain, model, splits, pad_id, run.device, args.share_prompt)
    run.prepare(model.train())
    run.pin_sources(ref_folder, data_sha256)
    batch_of = partial(batches.collate, pad_id=pad_id, layout=layout, device=run.device, dtype=run.dtype)

    # [method]
    # The reference's log-probabilities become columns of the rows before the first step.
    compute = partial(models.bind_forward(model, compute_loss), beta=args.beta, label_smoothing=args.label_smoothing)
    predict_logps = partial(run.predict, models.bind_forward(model, completion_logps), batch_of)  # rows -> [rows, 2]
    ref_logps = run.cached_tensors("reference", lambda: {name: predict_logps(rows) for name, rows in splits.items()})
    for name, rows in splits.items():
        rows.add_columns(("ref_chosen_logps", "ref_rejected_logps"), ref_logps[name])

    def predict(rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and rewards of chosen and rejected answers, [rows, 2] each."""
        logps = predict_logps(rows)
        return logps, args.beta * (logps - rows.columns("ref_chosen_logps", "ref_rejected_logps"))

    # [/method]
    sampling = {"count": args.kl_samples, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    judge = judge_of(args.data, ref_folder, tokenizer, args.seed)
    samples_of = partial(evaluate.evaluate_samples, tokenizer=tokenizer, autocast=run.autocast, judge=judge, **sampling)

    def report(ref_model) -> dict:
        """The end table of the policy as it is now; ref_model None: it still is the reference."""
        table = {}
        for name, rows in splits.items():
            if name != "train":
                table[name] = metrics.pair_accuracies(*predict(rows)) | samples_of(model, ref_model, rows)
        return table

    before = run.cached_json("before", lambda: report(None))
    # [method]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    # [/method]
    run.restore(model, optimizer)

    for step, rows_of_step in run.steps(plan):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(step) * group.get("lr_scale", 1.0)
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
    ref_model = run.prepare(lora.without_adapter(model) or models.load_model(ref_folder, run.device, tokenizer))
    columns = {"before": before, "after": report(ref_model)}
    # [method]
    # [/method]
    run.finish(columns)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)  # tyro would join its lines
    main(tyro.cli(Args))
