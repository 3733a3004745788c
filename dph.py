"""DPH: Direct Preference Heads. A reward head on the LM learns preferences and picks the best of n.

arXiv 2405.20053 (NeurIPS 2024). For a prompt x, a chosen answer y_w and a rejected one y_l, eps the
share of labels taken to be wrong:
    r(x, y)      = w . h    h: hidden state after the final norm at the answer's last token, its EOS
    separable    = -[(1 - eps) * log sigma(r_w) + eps * log sigma(-r_w)]
                   -[eps * log sigma(r_l) + (1 - eps) * log sigma(-r_l)]
    contrastive  = -(1 - eps) * log sigma(r_w - r_l) - eps * log sigma(r_l - r_w)
    loss         = dph_weight * (separable or contrastive) + dpo_weight * cDPO

cDPO trains the LM itself from the same pairs; --dpo-weight 0 gives the pure head, and
--freeze-backbone leaves the LM as it was. The run's folder loads as a causal LM and, head included,
with AutoModelForSequenceClassification.

    python dph.py                                       the toy world, about a minute on a CPU
    python dph.py --model gpt2 --lr 1e-5 --data pairs.jsonl
    torchrun --nproc-per-node 8 dph.py --model gpt2 --lr 1e-5 --data pairs.jsonl

A batch (sequence i < batch is pair i's chosen answer, batch + i its rejected one):
    input_ids, position_ids [lines, length]; attention_mask: [lines, length] of 0 and 1, or a float
    [lines, 1, length, length] that is added, where a line holds both answers
    logit_index, targets, sequence_ids [tokens]: flat position that predicts a completion token;
    that token; the sequence it belongs to
    completion_tokens, last [2 * batch]: lengths; flat position of each completion's last token
    ref_chosen_logps, ref_rejected_logps [batch]

Differences from the authors' code:
1. The head starts at zero, so that the first loss is known; theirs starts at random.
2. No pooling layers between hidden state and head (their default, too); AdamW with linear decay
   instead of LaProp with cosine.
3. The prompt is computed once for both answers; the reference's log-probabilities once.
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
def check_rewards(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, label_smoothing: float) -> None:
    """Raises ValueError where the rewards are not both [batch] or eps is not in [0, 0.5]."""
    shapes = {tuple(x.shape) for x in (chosen_rewards, rejected_rewards)}
    if len(shapes) > 1 or chosen_rewards.dim() != 1:
        raise ValueError(f"expected two tensors of one shape [batch], got {sorted(shapes)}")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"expected label_smoothing between 0 and 0.5, got {label_smoothing}")


def separable_dph_loss(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Separable DPH loss (arXiv 2405.20053): two cross-entropies of each pair, unreduced, [batch].

    Args: rewards of the head, each [batch]; label_smoothing, eps, in [0, 0.5].
    Gradient: sigma(r_w) - (1 - eps) and sigma(r_l) - eps; the minimum is at
        r_w = log((1 - eps) / eps) = -r_l. At rewards 0: 2 log 2.
    """
    check_rewards(chosen_rewards, rejected_rewards, label_smoothing)
    eps = label_smoothing
    chosen = (1 - eps) * F.logsigmoid(chosen_rewards) + eps * F.logsigmoid(-chosen_rewards)
    rejected = eps * F.logsigmoid(rejected_rewards) + (1 - eps) * F.logsigmoid(-rejected_rewards)
    return -chosen - rejected


def contrastive_dph_loss(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Contrastive DPH loss (arXiv 2405.20053): cDPO of each pair with the head's rewards, [batch].

    Args: rewards of the head, each [batch]; label_smoothing, eps, in [0, 0.5].
    Gradient: sigma(r_w - r_l) - (1 - eps) for r_w, the opposite for r_l; minimum at
        r_w - r_l = log((1 - eps) / eps). At rewards 0: log 2.
    """
    check_rewards(chosen_rewards, rejected_rewards, label_smoothing)
    margins = chosen_rewards - rejected_rewards
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


LOSSES = {"separable": separable_dph_loss, "contrastive": contrastive_dph_loss}


def compute_loss(
    model,
    batch: dict,
    dph_loss: str = "separable",
    label_smoothing: float = 0.1,
    dph_weight: float = 1.0,
    dpo_weight: float = 1.0,
    beta: float = 0.3,
    head_dropout: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the pairs of a micro-batch, and its metrics."""
    logps, rewards = logps_and_rewards(model, batch, head_dropout, train_lm=dpo_weight > 0)
    chosen_logps, rejected_logps = logps.chunk(2)  # [batch] each
    chosen_rewards, rejected_rewards = rewards.chunk(2)  # [batch] each
    losses = dph_weight * LOSSES[dph_loss](chosen_rewards, rejected_rewards, label_smoothing)  # [batch]
    if dpo_weight > 0:
        # cDPO is the contrastive loss with beta times the log-ratios as rewards.
        chosen_logratios = chosen_logps - batch["ref_chosen_logps"]  # [batch]
        rejected_logratios = rejected_logps - batch["ref_rejected_logps"]  # [batch]
        cdpo = contrastive_dph_loss(beta * chosen_logratios, beta * rejected_logratios, label_smoothing)
        losses = losses + dpo_weight * cdpo
    return losses.sum(), pair_metrics(losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps)


def logps_and_rewards(
    model, batch: dict, head_dropout: float = 0.0, train_lm: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probability and the head's reward of every completion, [sequences] each."""
    hidden = hidden_states(model, batch)
    with torch.set_grad_enabled(torch.is_grad_enabled() and train_lm):
        logps = completion_logps(model, batch, hidden)
    return logps, completion_rewards(model, batch, hidden, head_dropout)


def completion_rewards(model, batch: dict, hidden: torch.Tensor | None = None, dropout: float = 0.0) -> torch.Tensor:
    """The head's reward of every completion, [sequences]; no logits are computed for it."""
    hidden = hidden_states(model, batch) if hidden is None else hidden
    states = hidden[batch["last"]]  # [sequences, hidden]
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    states = F.dropout(states, dropout, training=torch.is_grad_enabled())  # evaluation has no gradients
    return (states * model.score.weight[0]).sum(-1)


def add_head(model, saved: dict[str, torch.Tensor]):
    """Puts the reward head `model.score` on a causal LM: zero, or that among the `saved` weights.

    The name is what sequence-classification models call theirs, so the saved folder loads as one.
    """
    size = model.config.get_text_config().hidden_size
    model.score = torch.nn.Linear(size, 1, bias=False, device=model.device)
    with torch.no_grad():
        model.score.weight.copy_(saved.get("score.weight", torch.zeros(())))
    model.config.num_labels = 1
    return model


@torch.no_grad()
def pull_to_prior(model, prior: dict[str, torch.Tensor], rate: float) -> None:
    """Decay of the weights in `prior` to their initial values: p <- p - rate * (p - p_init)."""
    for name, parameter in model.named_parameters():
        if name in prior:
            parameter.sub_(rate * (parameter - prior[name]))


def prior_weights(model) -> dict[str, torch.Tensor]:
    """The matrices that prior regularisation pulls back: no biases, norms or embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    embeddings.add(id(model.get_output_embeddings().weight))
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in embeddings}


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
    dph_loss: Literal["separable", "contrastive"] = "separable"
    """The head's loss: separable fixes the level of rewards too, contrastive their difference."""
    label_smoothing: float = 0.1
    """Share of the labels taken to be wrong, at least 0 and below 0.5; in both losses."""
    dph_weight: float = 1.0
    """Weight of the head's loss."""
    dpo_weight: float = 1.0
    """Weight of the cDPO loss that trains the LM; 0, or a frozen backbone: the head alone."""
    beta: float = 0.3
    """cDPO's pull to the reference, per nat. The authors use 0.1."""
    freeze_backbone: bool = False
    """Train the head alone; the LM stays as it was, to the last bit."""
    head_lr: float | None = None
    """Peak learning rate of the head; None: --lr. A pretrained LM's is too small."""
    head_dropout: float = 0.0
    """Dropout probability on the hidden state that goes into the head."""
    prior_decay: float = 0.0
    """Each step moves the LM's matrices back by lr * prior_decay; 0, as the authors: never."""
    n: int = 8
    """Answers sampled for each prompt at the end, of which the head picks the best."""

    def __post_init__(self) -> None:
        ranges = {"label_smoothing": 0.5, "head_dropout": 1.0, "dph_weight": float("inf")}
        ranges |= {"dpo_weight": float("inf"), "prior_decay": float("inf")}
        for name, limit in ranges.items():
            if not 0 <= getattr(self, name) < limit:
                flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise SystemExit(f"{flag}: expected at least 0 and below {limit:g}.")
        if self.head_lr is not None and not 0 < self.head_lr < float("inf"):
            raise SystemExit(f"--head-lr {self.head_lr}: expected a positive number.")
        if self.n < 1:
            raise SystemExit(f"--n {self.n}: expected at least 1.")
        if self.lora_rank and (self.freeze_backbone or self.prior_decay):
            raise SystemExit("--lora-rank keeps the LM's own weights: not with --freeze-backbone or --prior-decay.")

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
    model = add_head(model, models.load_weights(run.checkpoint or ref_folder, "score.weight"))
    if args.freeze_backbone:
        model.requires_grad_(False).score.requires_grad_(True)
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
    dpo_weight = 0.0 if args.freeze_backbone else args.dpo_weight  # a frozen backbone leaves nothing to train
    numbers = {"dph_loss": args.dph_loss, "label_smoothing": args.label_smoothing, "dph_weight": args.dph_weight}
    numbers |= {"dpo_weight": dpo_weight, "beta": args.beta, "head_dropout": args.head_dropout}
    compute = partial(models.bind_forward(model, compute_loss), **numbers)
    scores_of = models.bind_forward(model, logps_and_rewards)

    def predict(rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and rewards of chosen and rejected answers, [rows, 2] each."""
        scores = run.predict(scores_of, batch_of, rows)  # [rows, 4]
        return scores[:, :2], scores[:, 2:]

    if dpo_weight > 0:
        # The reference's log-probabilities become columns of the rows before the first step.
        ref_logps = run.cached_tensors("reference", lambda: {name: predict(rows)[0] for name, rows in splits.items()})
        for name, rows in splits.items():
            rows.add_columns(("ref_chosen_logps", "ref_rejected_logps"), ref_logps[name])
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
    backbone = [p for p in model.parameters() if p.requires_grad and p is not model.score.weight]
    head = {"params": [model.score.weight], "lr_scale": (args.head_lr or args.lr) / args.lr}
    groups = [{"params": backbone, "lr_scale": 1.0}, head] if backbone else [head]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    if args.prior_decay > 0 and backbone:
        prior = prior_weights(run.prepare(models.load_model(ref_folder, run.device, tokenizer)))

        def pull(optimizer, *_) -> None:
            pull_to_prior(model, prior, args.prior_decay * optimizer.param_groups[0]["lr"])

        optimizer.register_step_post_hook(pull)
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
    # Best of n: the head picks among answers of the trained and of the untouched LM.
    candidates, rewards_of = [], models.bind_forward(model, completion_rewards)
    for column, sampled_from in (("after_best_of_n", model), ("reference_best_of_n", ref_model)):
        columns[column] = {}
        for name in before:
            picked = samples_of(sampled_from, ref_model, splits[name], best_of=(args.n, rewards_of))
            lines = picked.pop("candidates", [])
            candidates += [{"column": column, "split": name, **line} for line in lines]
            columns[column][name] = picked
    run.write_lines("candidates.jsonl", candidates)
    # [/method]
    run.finish(columns)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)  # tyro would join its lines
    main(tyro.cli(Args))
