"""Point-wise DPO: learns from a label on one answer (a thumb up or down, a rating) where DPO needs a pair of answers.

arXiv 2312.02554. With the reward that a policy stands for, r(x, y) = beta * log(pi(y|x) / ref(y|x)) + beta log Z(x), and a label z:

    h    = beta * [log pi(y|x) - log ref(y|x)] + beta log Z(x)
    loss = -[z * log sigma(h) + (1 - z) * log(1 - sigma(h))]        binary labels: z is 0 or 1
    loss = (z - h)^2                                                continuous labels

log pi(y|x) is the sum over the answer's tokens, its EOS included. The paper's code takes beta log Z(x) to be 0 for all prompts; then how hard a prompt is, how
many labels are good and on which scale leak into the policy (docs/pointwise_dpo.md). --learn-partition learns one value for each prompt.

    python pointwise_dpo.py                                                    the toy world: no network, no GPU, about a minute
    python pointwise_dpo.py --model gpt2 --data labelled.jsonl --lr 1e-5       rows with prompt, completion and label
    torchrun --nproc-per-node 8 pointwise_dpo.py --model gpt2 --data labelled.jsonl --lr 1e-5

Batch, as common.data.collate makes it of rows with one answer each:
    input_ids, position_ids, attention_mask [lines, length]     attention_mask is 1 where a token is, 0 at padding
    source, targets, sequence [tokens]          flat position that predicts a completion token; that token; the row it belongs to
    completion_tokens [batch]                   lengths of the completions, the rows one after another
    labels, ref_logps [batch]                   float; ref_logps: log ref(y|x), summed over the completion's tokens
    prompt_states [batch, hidden]               with --learn-partition: what `prompt_states` returned for the reference

Differences from the authors' code:
1. Log-probabilities are summed over tokens, as the derivation has it. Theirs are means here (and sums in their pair-wise DPO): sigma(h) then hardly moves.
2. Every row weighs the same, or as --positive-weight and --negative-weight say. Theirs averages each class by itself in every micro-batch.
3. The continuous loss is purely quadratic; theirs sends labels of exactly 1 to the likelihood, which is ULMA's (ulma.py).
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch.utils.checkpoint import checkpoint


@dataclass
class Args:
    # [method]
    beta: float = 0.3
    """Strength of the pull to the reference, per nat. The authors use 0.1."""
    beta_log_z: float = 0.0
    """beta log Z, the constant that is added to beta times the log-ratio. The authors' code has 0."""
    # [/method]
    learn_partition: bool = False
    """Learn beta log Z(x) for each prompt instead: a linear head on the reference's hidden state at the prompt's last token, starting from zero."""
    partition_lr: float = 3e-2
    """Peak learning rate of that head."""
    positive_weight: float = 1.0
    """Weight of the rows whose label is 1."""
    negative_weight: float = 1.0
    """Weight of all other rows."""
    model: str = "toy"
    """toy, a hub id, or a folder, a run among them: the policy's start and the reference."""
    data: str = "toy"
    """toy (toy:0.2: a fifth of the labels flipped), a hub id or id:subset, or a file of rows."""
    labels: Literal["auto", "binary", "continuous"] = "auto"
    """binary: 0 and 1, or false and true; continuous: any numbers; auto: binary where all training labels are 0 or 1. On the toy continuous labels
    are the probabilities of the binary ones."""
    label_scale: Literal["none", "minmax", "quantile"] = "none"
    """Brings continuous labels to [0, 1]: minmax linearly, quantile by their rank among the training labels. The map is printed."""
    from_pairs: bool = False
    """The data are preference pairs: each becomes two rows, the chosen answer with label 1 and the rejected one with label 0."""
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


def prompt_states(model, batch: dict) -> torch.Tensor:
    """Hidden state after the final norm at the last token of each row's prompt, [batch, hidden]: the position that predicts the first answer token."""
    first = batch["completion_tokens"].cumsum(0) - batch["completion_tokens"]  # [batch]
    return body(model, batch)[batch["source"][first]]


def add_partition(model, saved: dict[str, torch.Tensor]):
    """Puts the linear head `model.partition`, hidden state -> beta log Z(x), on a causal LM: zero, or the one among the `saved` weights.

    States at the ends of prompts differ little beside what they have in common, so the head reads them centred and scaled by dimension.
    """
    size = model.config.get_text_config().hidden_size
    model.partition = torch.nn.Linear(size, 1, device=model.device)
    for name, start in (("centre", torch.zeros(size)), ("spread", torch.ones(size))):
        model.partition.register_buffer(name, saved.get(f"partition.{name}", start).to(model.device))
    with torch.no_grad():
        for name, parameter in model.partition.named_parameters():
            parameter.copy_(saved.get(f"partition.{name}", torch.zeros(())))
    return model


def log_partition(model, batch: dict, args: Args) -> torch.Tensor:
    """beta log Z(x) of each row, [batch]: the constant, or what the head says of the reference's `prompt_states`."""
    if args.learn_partition:
        states = (batch["prompt_states"] - model.partition.centre) / model.partition.spread  # [batch, hidden], float32
        return (states * model.partition.weight[0]).sum(-1) + model.partition.bias
    return torch.full_like(batch["labels"], args.beta_log_z)


def check_shapes(policy_logps: torch.Tensor, ref_logps: torch.Tensor, labels: torch.Tensor, beta_log_z) -> None:
    """Raises ValueError where the log-probabilities and labels are not all [batch], or beta_log_z is neither a number nor [batch]."""
    shapes = {tuple(x.shape) for x in (policy_logps, ref_logps, labels)} | (
        {tuple(beta_log_z.shape)} if torch.is_tensor(beta_log_z) and beta_log_z.dim() else set()
    )
    if len(shapes) > 1 or policy_logps.dim() != 1:
        raise ValueError(
            f"expected log-probabilities, labels and beta_log_z of one shape [batch], got {sorted(shapes)}"
        )


# [method]
def binary_pointwise_dpo_loss(
    policy_logps: torch.Tensor, ref_logps: torch.Tensor, labels: torch.Tensor, beta: float, beta_log_z=0.0
) -> torch.Tensor:
    """Point-wise DPO loss of each row with a binary label (arXiv 2312.02554), unreduced.

    Args: two summed log-probabilities in nats and labels, each [batch], labels float, 0 or 1; beta, a number; beta_log_z, beta * log Z(x), a number or [batch].
    Returns: -[z log sigma(h) + (1 - z) log(1 - sigma(h))], [batch], with h = beta * (policy - ref) + beta_log_z.
    Gradient: with respect to policy_logps -beta * (z - sigma(h)), to beta_log_z -(z - sigma(h)). At h = 0: log 2.
    Raises ValueError where the shapes are not all [batch].
    """
    check_shapes(policy_logps, ref_logps, labels, beta_log_z)
    h = beta * (policy_logps - ref_logps) + beta_log_z  # [batch]
    return -labels * F.logsigmoid(h) - (1 - labels) * F.logsigmoid(-h)


def continuous_pointwise_dpo_loss(
    policy_logps: torch.Tensor, ref_logps: torch.Tensor, labels: torch.Tensor, beta: float, beta_log_z=0.0
) -> torch.Tensor:
    """Point-wise DPO loss of each row with a continuous label, unreduced: (z - h)^2, [batch]. Arguments as for the binary one, labels any numbers.

    Gradient: with respect to policy_logps -2 * beta * (z - h), to beta_log_z -2 * (z - h). At h = 0: z^2.
    Raises ValueError where the shapes are not all [batch].
    """
    check_shapes(policy_logps, ref_logps, labels, beta_log_z)
    return (labels - beta * (policy_logps - ref_logps) - beta_log_z) ** 2


# [/method]
def label_metrics(losses, rewards, logps, labels) -> dict[str, torch.Tensor]:
    """Metrics of a micro-batch, each summed over its rows, on the device; "count NAME": how many rows NAME is the sum of. All arguments [batch]."""
    rewards, positive = rewards.detach(), (labels == 1).to(rewards.dtype)
    return {
        "loss": losses.detach().sum(),
        "rewards/positive": (rewards * positive).sum(),
        "count rewards/positive": positive.sum(),
        "rewards/negative": (rewards * (1 - positive)).sum(),
        "count rewards/negative": (1 - positive).sum(),
        "logps": logps.detach().sum(),
    }


def compute_loss(model, batch: dict, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the rows of a micro-batch, and its metrics."""
    logps, ref_logps, labels = completion_logps(model, batch), batch["ref_logps"], batch["labels"]  # [batch] each
    beta_log_z = log_partition(model, batch, args)  # [batch]
    # [method]
    loss_of = continuous_pointwise_dpo_loss if args.labels == "continuous" else binary_pointwise_dpo_loss
    # [/method]
    losses = loss_of(logps, ref_logps, labels, args.beta, beta_log_z)  # [batch]
    losses = losses * torch.where(labels == 1, args.positive_weight, args.negative_weight)
    return losses.sum(), label_metrics(losses, args.beta * (logps - ref_logps) + beta_log_z, logps, labels)


def main(args: Args) -> None:
    try:
        from common import data, evaluate, runtime
    except ImportError as error:
        raise SystemExit(
            f"Training needs the folder common/ beside this file; its functions alone do not. ({error})"
        ) from None
    run = runtime.start(args, __file__)

    # The policy, which before its first step is also the reference.
    base = runtime.resolve_model(run.args.model, run.args.seed)
    tokenizer = runtime.load_tokenizer(base)
    model = runtime.load_model(run.checkpoint or base, run.device, tokenizer)
    if run.args.learn_partition:
        saved = [
            runtime.load_weights(run.checkpoint or base, f"partition.{name}")
            for name in ("weight", "bias", "centre", "spread")
        ]
        model = add_partition(model, {name: value for found in saved for name, value in found.items()})
    runtime.disable_dropout(model)
    run.prepare(model.train())
    logps, loss_and_metrics = runtime.as_forward(model, completion_logps), runtime.as_forward(model, compute_loss)
    states, partition = runtime.as_forward(model, prompt_states), runtime.as_forward(model, log_partition)

    # The rows, and the order in which training sees them.
    # [method]
    unlabelled = False  # every row needs its label
    # [/method]
    max_length = runtime.length_limit(run.args.max_length, model)
    splits, data_sha256, labels = data.load_labelled(run.args, tokenizer, max_length, run.say, unlabelled)
    args = dataclasses.replace(run.args, labels=labels)
    plan = data.plan_batches(splits["train"], args.batch_size, args.epochs, args.max_steps, args.seed)
    splits["train"], plan = data.only_planned(splits["train"], plan)
    layout = evaluate.choose_layout(logps, model, splits, tokenizer.pad_token_id, run.device, False, run.say)

    def batch_of(split: str, rows: list[int]) -> dict:
        batch = data.collate([splits[split][i] for i in rows], tokenizer.pad_token_id, layout, run.device)
        batch["labels"] = torch.tensor(
            [splits[split][i]["label"] for i in rows], dtype=torch.float32, device=run.device
        )
        if split in ref:
            batch["ref_logps"] = ref[split][rows].to(run.device).squeeze(-1)
        if split in prompts:
            batch["prompt_states"] = prompts[split][rows].to(run.device)
        return batch

    def score(split: str) -> torch.Tensor:
        """Summed log-probability of each answer under the policy as it is now, [rows, 1]."""
        return run.map_rows(lambda rows: logps(batch_of(split, rows))[:, None], splits[split])[:, :1]

    def seen_at_prompts(split: str) -> torch.Tensor:
        """The model's hidden states at the prompts' last tokens, [rows, hidden]."""
        return run.map_rows(lambda rows: states(batch_of(split, rows)), splits[split])

    def report(split: str, reference) -> dict:
        """The keys of the end table on one split, for the policy as it is now; `reference` None: the policy still is the reference."""
        scores = score(split)  # [rows, 1]
        rewards = args.beta * (scores - ref[split])  # [rows, 1]
        rewards = (
            rewards + run.map_rows(lambda rows: partition(batch_of(split, rows), args)[:, None], splits[split])[:, :1]
        )
        targets = torch.tensor([row["label"] for row in splits[split]])
        values = {
            name: evaluate.concordance(found.squeeze(-1), targets)
            for name, found in (("logps_auc", scores), ("reward_auc", rewards))
        }
        return values | evaluate.judge_samples(run, model, reference, base, tokenizer, splits[split])

    ref: dict[
        str, torch.Tensor
    ] = {}  # the reference's log-probabilities, [rows, 1] for each split, taken before the first step
    prompts: dict[str, torch.Tensor] = {}  # its hidden states at the prompts' last tokens, [rows, hidden]
    ref |= run.keep("reference", lambda: {split: score(split) for split in splits})
    if args.learn_partition:
        prompts |= run.keep("prompt_states", lambda: {split: seen_at_prompts(split) for split in splits})
        model.partition.centre.copy_(prompts["train"].mean(0))
        model.partition.spread.copy_(prompts["train"].std(0, correction=0).clamp_min(1e-6))
    before = run.remember("before", lambda: {split: report(split, None) for split in splits if split != "train"})
    heads = list(model.partition.parameters()) if args.learn_partition else []
    policy = [p for p in model.parameters() if not any(p is q for q in heads)]
    groups = [{"params": policy, "share": 1.0}] + (
        [{"params": heads, "share": args.partition_lr / args.lr, "weight_decay": 0.0}] if heads else []
    )
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.restore(model, optimizer)

    for step in run.steps(len(plan)):
        lr = run.learning_rate(step, len(plan))
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]  # of the learning rate at hand
        for rows, real in data.micro_batches(plan[step], args.micro_batch_size, run.rank, run.world_size):
            with run.autocast():
                loss, metrics = loss_and_metrics(batch_of("train", rows), args)
            # Every row of the step weighs the same, however it is cut; fully_shard averages gradients over processes.
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
    reference = run.prepare(runtime.load_model(base, run.device, tokenizer))
    columns = {"before": before, "after": {split: report(split, reference) for split in before}}
    run.finish(columns, base, data_sha256)
    evaluate.print_report(run, columns)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
