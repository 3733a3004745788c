"""Point-wise DPO: learns from a label on one answer (a thumb, a rating) where DPO needs a pair.

arXiv 2312.02554. With the reward that a policy stands for, r(x, y) = beta * log(pi(y|x) / ref(y|x))
+ beta log Z(x), and a label z:
    h    = beta * [log pi(y|x) - log ref(y|x)] + beta log Z(x)
    loss = -[z * log sigma(h) + (1 - z) * log(1 - sigma(h))]    binary labels: z is 0 or 1
    loss = (z - h)^2                                            continuous labels

log pi(y|x) is the sum over the answer's tokens, its EOS included. The paper's code takes beta log Z
to be 0 for all prompts; then how hard a prompt is, how many labels are good and on which scale leak
into the policy (docs/pointwise_dpo.md). --learn-partition learns one value for each prompt.

    python pointwise_dpo.py                             the toy world, about a minute on a CPU
    python pointwise_dpo.py --model gpt2 --data labelled.jsonl --lr 1e-5
    torchrun --nproc-per-node 8 pointwise_dpo.py --model gpt2 --data labelled.jsonl --lr 1e-5

A batch of rows with one answer each:
    input_ids, position_ids, attention_mask [batch, length]; the mask is 1 where a token is, else 0
    logit_index, targets, sequence_ids [tokens]: flat position that predicts a completion token;
    that token; the row it belongs to
    completion_tokens [batch]: lengths of the completions, the rows one after another
    labels, ref_logps [batch]: ref_logps is log ref(y|x), summed over the completion's tokens
    prompt_states [batch, hidden], with --learn-partition: of the reference, by `prompt_states`

Differences from the authors' code:
1. Log-probabilities are summed over tokens, as the derivation has it. Theirs are means here (and
   sums in their pair-wise DPO): sigma(h) then hardly moves.
2. Every row weighs the same, or as --positive-weight and --negative-weight say. Theirs averages
   each class by itself in every micro-batch.
3. The continuous loss is purely quadratic; theirs sends labels of exactly 1 to the likelihood.
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
def binary_pointwise_dpo_loss(
    policy_logps: torch.Tensor, ref_logps: torch.Tensor, labels: torch.Tensor, beta: float, beta_log_z=0.0
) -> torch.Tensor:
    """Point-wise DPO loss of each row with a binary label (arXiv 2312.02554), unreduced.

    Args: two summed log-probabilities in nats and labels, each [batch], labels float, 0 or 1; beta,
        a number; beta_log_z, beta * log Z(x), a number or [batch].
    Returns: -[z log sigma(h) + (1 - z) log(1 - sigma(h))], [batch],
        with h = beta * (policy - ref) + beta_log_z.
    Gradient: with respect to policy_logps -beta * (z - sigma(h)), to beta_log_z -(z - sigma(h)).
        At h = 0: log 2.
    Raises ValueError where the shapes are not all [batch].
    """
    check_shapes(policy_logps, ref_logps, labels, beta_log_z)
    h = beta * (policy_logps - ref_logps) + beta_log_z  # [batch]
    return -labels * F.logsigmoid(h) - (1 - labels) * F.logsigmoid(-h)


def continuous_pointwise_dpo_loss(
    policy_logps: torch.Tensor, ref_logps: torch.Tensor, labels: torch.Tensor, beta: float, beta_log_z=0.0
) -> torch.Tensor:
    """Point-wise DPO loss of each row with a continuous label, unreduced: (z - h)^2, [batch].

    Arguments as for the binary one, labels any numbers.
    Gradient: with respect to policy_logps -2 * beta * (z - h), to beta_log_z -2 * (z - h). At
        h = 0: z^2.
    Raises ValueError where the shapes are not all [batch].
    """
    check_shapes(policy_logps, ref_logps, labels, beta_log_z)
    return (labels - beta * (policy_logps - ref_logps) - beta_log_z) ** 2


LOSSES = {"binary": binary_pointwise_dpo_loss, "continuous": continuous_pointwise_dpo_loss}
LABEL_NEEDED = True  # by every row


# [/method]
def check_shapes(policy_logps: torch.Tensor, ref_logps: torch.Tensor, labels: torch.Tensor, beta_log_z) -> None:
    """Raises ValueError where a tensor is not [batch]; beta_log_z may be a number."""
    shapes = {tuple(x.shape) for x in (policy_logps, ref_logps, labels)}
    if torch.is_tensor(beta_log_z) and beta_log_z.dim():
        shapes.add(tuple(beta_log_z.shape))
    if len(shapes) > 1 or policy_logps.dim() != 1:
        raise ValueError(
            f"expected log-probabilities, labels and beta_log_z of one shape [batch], got {sorted(shapes)}"
        )


def compute_loss(
    model,
    batch: dict,
    label_kind: str,
    beta: float,
    beta_log_z: float = 0.0,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the rows of a micro-batch, and its metrics.

    label_kind: "binary" or "continuous". With `prompt_states` in the batch a head gives beta log Z.
    """
    logps, ref_logps, labels = completion_logps(model, batch), batch["ref_logps"], batch["labels"]  # [batch] each
    log_z = log_partition(model, batch, beta_log_z)  # [batch]
    losses = LOSSES[label_kind](logps, ref_logps, labels, beta, log_z)  # [batch]
    losses = losses * torch.where(labels == 1, positive_weight, negative_weight)
    return losses.sum(), label_metrics(losses, beta * (logps - ref_logps) + log_z, logps, labels)


def label_metrics(losses, rewards, logps, labels) -> dict[str, torch.Tensor]:
    """Metrics of a micro-batch, each summed over its rows, on the device. All arguments [batch].

    "count NAME": how many rows NAME is the sum of.
    """
    rewards, positive = rewards.detach(), (labels == 1).to(rewards.dtype)
    return {
        "loss": losses.detach().sum(),
        "rewards/positive": (rewards * positive).sum(),
        "count rewards/positive": positive.sum(),
        "rewards/negative": (rewards * (1 - positive)).sum(),
        "count rewards/negative": (1 - positive).sum(),
        "logps": logps.detach().sum(),
    }


def log_partition(model, batch: dict, beta_log_z: float) -> torch.Tensor:
    """beta log Z(x) of each row, [batch]: the constant, or by the head from `prompt_states`."""
    if "prompt_states" not in batch:
        return torch.full_like(batch["labels"], beta_log_z)
    head = model.partition
    states = (batch["prompt_states"] - head.centre) / head.spread  # [batch, hidden], float32
    return (states * head.weight[0]).sum(-1) + head.bias


def add_partition(model, saved: dict[str, torch.Tensor]):
    """Puts the linear head `model.partition`, hidden state -> beta log Z(x), on a causal LM.

    It is zero, or the one among the `saved` weights. States at the ends of prompts differ little
    beside what they have in common, so the head reads them centred and scaled by dimension.
    """
    size = model.config.get_text_config().hidden_size
    model.partition = torch.nn.Linear(size, 1, device=model.device)
    for name, start in (("centre", torch.zeros(size)), ("spread", torch.ones(size))):
        model.partition.register_buffer(name, saved.get(f"partition.{name}", start).to(model.device))
    with torch.no_grad():
        for name, parameter in model.partition.named_parameters():
            parameter.copy_(saved.get(f"partition.{name}", torch.zeros(())))
    return model


@torch.no_grad()
def standardise(head, states: torch.Tensor) -> None:
    """The head reads states so that those of the training rows have mean 0, deviation 1."""
    head.centre.copy_(states.mean(0))
    head.spread.copy_(states.std(0, correction=0).clamp_min(1e-6))


def prompt_states(model, batch: dict) -> torch.Tensor:
    """Hidden state after the final norm at the end of each row's prompt, [batch, hidden]."""
    lengths = batch["completion_tokens"]
    first = lengths.cumsum(0) - lengths  # [batch], where each completion begins among all tokens
    return hidden_states(model, batch)[batch["logit_index"][first]]


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
    """Strength of the pull to the reference, per nat. The authors use 0.1."""
    # [/method]
    beta_log_z: float = 0.0
    """beta log Z, a constant that is added to beta times the log-ratio. The authors have 0."""
    learn_partition: bool = False
    """Learn beta log Z(x) for each prompt instead: a linear head on the reference's state there."""
    partition_lr: float = 3e-2
    """Peak learning rate of that head."""
    positive_weight: float = 1.0
    """Weight of the rows whose label is 1."""
    negative_weight: float = 1.0
    """Weight of all other rows."""
    labels: Literal["auto", "binary", "continuous"] = "auto"
    """binary: 0 and 1; continuous: any numbers; auto: binary where all labels are 0 or 1."""
    label_scale: Literal["none", "minmax", "quantile"] = "none"
    """Brings continuous labels to [0, 1]: minmax linearly, quantile by rank. The map is printed."""
    from_pairs: bool = False
    """The data are preference pairs: chosen answers are labelled 1, rejected ones 0."""
    model: str = "toy"
    """toy, a hub id, or a folder, a run among them: the policy's start and the reference."""
    data: str = "toy"
    """toy (toy:hard; toy:0.2: a fifth of labels flipped), hub id, id:subset, or a file of rows."""
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

    def __post_init__(self) -> None:
        if not 0 < self.partition_lr < float("inf"):
            raise SystemExit(f"--partition-lr {self.partition_lr}: expected a positive number.")
        if self.learn_partition and self.beta_log_z:
            raise SystemExit(
                "--beta-log-z is a constant, --learn-partition learns one for each prompt: give one of them."
            )
        if not abs(self.beta_log_z) < float("inf"):
            raise SystemExit(f"--beta-log-z {self.beta_log_z}: expected a finite number.")
        for name in ("positive_weight", "negative_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise SystemExit(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 0.")


def main(args: Args) -> None:
    try:
        from adapters import lora
        from common import batches, evaluate, metrics, models, oracle
        from common.run import start_run
        from labelled.rows import load_labelled
        from toy.base import judge_of
    except ImportError as error:
        needs = "adapters/, attention/, chat/, choices/, common/, labelled/, report/, tokens/ and toy/"
        raise SystemExit(f"Training needs {needs} beside this file. ({error})") from None
    run, args = start_run(args, __file__)

    # The policy, which before its first step is also the reference.
    ref_folder = models.resolve_model(args.model, args.seed)
    tokenizer = models.load_tokenizer(ref_folder, args.chat_template)
    model = models.load_model(lora.start_of(run.checkpoint, ref_folder), run.device, tokenizer)
    if args.learn_partition:
        names = [f"partition.{name}" for name in ("weight", "bias", "centre", "spread")]
        # A run as --model is a new reference, whose beta log Z is learned anew.
        add_partition(model, models.load_weights(run.checkpoint, *names) if run.checkpoint else {})
    model = lora.add_adapter(model, args.lora_rank, args.model, ref_folder, run.checkpoint)

    # The rows, and the order in which training sees them.
    max_length = models.length_limit(args.max_length, model)
    rows_from = (args.data, args.eval_data, args.holdout, args.seed)
    label_options = {"labels": args.labels, "label_scale": args.label_scale, "from_pairs": args.from_pairs}
    splits, data_sha256, label_kind = load_labelled(
        *rows_from, tokenizer, max_length, unlabelled=not LABEL_NEEDED, chat=args.chat, **label_options
    )
    plan = batches.plan_batches(splits["train"], args.batch_size, args.epochs, args.max_steps, args.seed)
    splits["train"], plan = batches.planned_rows(splits["train"], plan)
    pad_id = tokenizer.pad_token_id
    plain = partial(completion_logps, model)
    layout = oracle.choose_layout(plain, model, splits, pad_id, run.device, share_prompt=False)
    run.prepare(model.train())
    run.pin_sources(ref_folder, data_sha256)
    batch_of = partial(batches.collate, pad_id=pad_id, layout=layout, device=run.device, dtype=run.dtype)

    # What the reference says of the rows becomes columns of them before the first step.
    numbers = {"beta": args.beta, "beta_log_z": args.beta_log_z, "label_kind": label_kind}
    numbers |= {"positive_weight": args.positive_weight, "negative_weight": args.negative_weight}
    compute = partial(models.bind_forward(model, compute_loss), **numbers)
    predict_logps = partial(run.predict, models.bind_forward(model, completion_logps), batch_of)  # rows -> [rows, 1]
    ref_logps = run.cached_tensors("reference", lambda: {name: predict_logps(rows) for name, rows in splits.items()})
    for name, rows in splits.items():
        rows.add_columns(("ref_logps",), ref_logps[name])
    if args.learn_partition:
        predict_states = partial(run.predict, models.bind_forward(model, prompt_states), batch_of)
        states = run.cached_tensors(
            "prompt_states", lambda: {name: predict_states(rows) for name, rows in splits.items()}
        )
        for name, rows in splits.items():
            for row, state in zip(rows, states[name], strict=True):
                row["prompt_states"] = state.squeeze(0)  # [hidden]
        standardise(model.partition, states["train"].squeeze(1))
    log_z_of = partial(models.bind_forward(model, log_partition), beta_log_z=args.beta_log_z)

    sampling = {"count": args.kl_samples, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    judge = judge_of(args.data, ref_folder, tokenizer, args.seed)
    samples_of = partial(evaluate.evaluate_samples, tokenizer=tokenizer, autocast=run.autocast, judge=judge, **sampling)

    def report(ref_model) -> dict:
        """The end table of the policy as it is now; ref_model None: it still is the reference."""
        table = {}
        for name, rows in splits.items():
            if name == "train":
                continue
            logps = predict_logps(rows)  # [rows, 1]
            rewards = args.beta * (logps - rows.columns("ref_logps")) + run.predict(log_z_of, batch_of, rows)
            columns = {"logps_auc": logps, "reward_auc": rewards}
            labels = rows.columns("labels")[:, 0]
            table[name] = {key: metrics.auc(values[:, 0], labels) for key, values in columns.items()}
            table[name] |= samples_of(model, ref_model, rows)
        return table

    before = run.cached_json("before", lambda: report(None))
    heads = [*model.partition.parameters()] if args.learn_partition else []
    trained = [p for p in model.parameters() if p.requires_grad]
    policy = [p for p in trained if not any(p is head for head in heads)]
    groups = [{"params": policy, "lr_scale": 1.0}]
    if heads:
        groups.append({"params": heads, "lr_scale": args.partition_lr / args.lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.restore(model, optimizer)

    for step, rows_of_step in run.steps(plan):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(step) * group.get("lr_scale", 1.0)
        for rows, weight in run.micro_batches(rows_of_step):
            with run.autocast():
                loss, sums = compute(batch_of(rows))
            # Every row of the step weighs the same, however the step is cut.
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
    run.finish(columns)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)  # tyro would join its lines
    main(tyro.cli(Args))
