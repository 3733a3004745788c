"""DPH: Direct Preference Heads. A reward head on the language model learns the preferences and, at inference, picks the best of n answers.

arXiv 2405.20053 (NeurIPS 2024). For a prompt x with a chosen answer y_w and a rejected one y_l, eps the share of labels taken to be wrong:

    r(x, y)      = w . h      h: hidden state after the final norm at the answer's last token (its EOS), w the head, without bias
    separable    = -[(1 - eps) * log sigma(r_w) + eps * log sigma(-r_w)] - [eps * log sigma(r_l) + (1 - eps) * log sigma(-r_l)]
    contrastive  = -(1 - eps) * log sigma(r_w - r_l) - eps * log sigma(r_l - r_w)
    loss         = dph_weight * (separable or contrastive) + dpo_weight * cDPO

cDPO trains the LM itself from the same pairs; `--dpo-weight 0` gives the pure head, `--freeze-backbone` leaves the LM as it was.

    python dph.py                                                       the toy world: no network, no GPU, about a minute
    python dph.py --model gpt2 --lr 1e-5 --data pairs.jsonl             any causal LM of the hub or a folder, any preference pairs
    torchrun --nproc-per-node 8 dph.py --model gpt2 --lr 1e-5 --data pairs.jsonl

Batch, as common.data.collate makes it (sequence i < batch is row i's chosen answer, batch + i its rejected one). A line holds one or both answers:
    input_ids, position_ids [lines, length]     attention_mask [lines, length] of 0 and 1, or float [lines, 1, length, length] to add
    source, targets, sequence [tokens]          flat position that predicts a completion token; that token; the sequence it belongs to
    completion_tokens, last [2 * batch]         lengths of the completions; flat position of each one's last token
    ref_chosen_logps, ref_rejected_logps [batch]

The run's folder loads as a causal LM and, head included, with AutoModelForSequenceClassification. Differences from the authors' code:
1. The head starts at zero, so that every reward is 0 and the first loss is known; theirs starts at random.
2. No pooling layers between hidden state and head (their default, too), AdamW with linear decay instead of LaProp with cosine.
3. The prompt is computed once for both answers; the reference's log-probabilities once, before the first step.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch.utils.checkpoint import checkpoint


@dataclass
class Args:
    # [method]
    dph_loss: Literal["separable", "contrastive"] = "separable"
    """The head's loss. separable fixes the level of rewards too, so that one answer can be judged alone; contrastive only their difference."""
    label_smoothing: float = 0.1
    """Share of the labels taken to be wrong, at least 0 and below 0.5; in the head's loss and in cDPO."""
    dph_weight: float = 1.0
    """Weight of the head's loss."""
    dpo_weight: float = 1.0
    """Weight of the cDPO loss that trains the LM; 0: the pure head. With a frozen backbone there is nothing to train and it counts 0."""
    beta: float = 0.3
    """cDPO's pull to the reference, per nat. The authors use 0.1."""
    freeze_backbone: bool = False
    """Train the head alone; the LM stays as it was, to the last bit."""
    head_lr: float | None = None
    """Peak learning rate of the head; None: --lr. The head starts from zero, so where --lr suits a pretrained backbone it wants one 10 to 100 times larger."""
    head_dropout: float = 0.0
    """Dropout probability on the hidden state that goes into the head."""
    prior_decay: float = 0.0
    """Prior regularisation: each step moves the backbone's matrices back to their initial values by lr * prior_decay. The authors' decay is 0.1."""
    n: int = 8
    """Answers sampled for each prompt at the end, of which the head picks the best."""
    # [/method]
    model: str = "toy"
    """toy, a hub id, or a folder (also a run of another script). The policy starts from it and it is the reference."""
    data: str = "toy"
    """toy (toy:0.2: with a fifth of the labels flipped), a hub id (or id:subset), or a file: .jsonl .json .csv .parquet, each also with .gz."""
    eval_data: str | None = None
    """A file of held-out pairs. Without it the data's test split is used, or a share of the prompts is held out."""
    holdout: float = 0.1
    """Share of the prompts held out where the data has no test split."""
    name: str = ""
    """Name of the run's folder; empty: made from script, model and seed. An existing run is never overwritten."""
    output_dir: str = "runs"
    """Where run folders go."""
    seed: int = 0
    """Seed of the order of the data and of all sampling."""
    resume: str = ""
    """Folder of an interrupted run to go on with; all other arguments come from it."""
    lr: float = 1e-3
    """Peak learning rate of AdamW. The default suits the toy's tiny model; real models want 1e-6 to 1e-5."""
    epochs: float = 1.0
    """Passes over the training pairs; may be a fraction."""
    max_steps: int = -1
    """Optimiser steps at most; -1: no limit."""
    batch_size: int = 32
    """Pairs in one optimiser step, over all processes."""
    micro_batch_size: int = 32
    """Pairs in one forward pass of one process; smaller saves memory and changes nothing else."""
    warmup: float = 0.1
    """Linear warm-up: a share of all steps below 1, else a number of steps. Linear decay to 0 follows."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; inf: never."""
    max_length: int | None = None
    """Limit in tokens for prompt and one completion; None: the smaller of 1024 and the model's context."""
    share_prompt: bool = True
    """Compute a prompt once for both answers; --no-share-prompt computes it twice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Matrix products in bfloat16 or float32; auto: bfloat16 on GPUs that have it. Weights and log-probabilities stay float32."""
    compile: bool = False
    """Compile the model's body with torch.compile."""
    eval_every: int = 50
    """Steps between held-out evaluations."""
    save_every: int = 200
    """Steps between checkpoints; the newest is kept."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    kl_samples: int = 400
    """Answers sampled from the policy before and after training, for the KL and the toy's judgement; 0: none."""
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
        wide = torch.promote_types(logits.dtype, torch.float32)  # in bfloat16 a sum over a vocabulary is off by tenths of a nat
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
    if "logits_to_keep" in batch:  # this model's output layer does more than a product with its weights: use it as it is
        keep, length = batch["logits_to_keep"], batch["input_ids"].shape[1]
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=keep).logits[:, -keep:]
        logps = token_logps(lambda x: x, logits[source // length, source % length - (length - keep)], targets)
    else:
        states, head = (body(model, batch) if hidden is None else hidden)[source], model.get_output_embeddings()  # [tokens, hidden]
        if len(targets) <= CHUNK:
            logps = token_logps(head, states, targets)
        else:
            chunks = zip(states.split(CHUNK), targets.split(CHUNK))
            logps = torch.cat([checkpoint(token_logps, head, h, t, use_reentrant=False) for h, t in chunks])
    return logps.new_zeros(len(batch["completion_tokens"])).index_add(0, batch["sequence"], logps)


# [method]
def check_rewards(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, label_smoothing: float) -> None:
    """Raises ValueError where the rewards are not both [batch] or eps is not in [0, 0.5]."""
    if chosen_rewards.shape != rejected_rewards.shape or chosen_rewards.dim() != 1:
        raise ValueError(f"expected two tensors of one shape [batch], got {tuple(chosen_rewards.shape)} and {tuple(rejected_rewards.shape)}")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"expected label_smoothing between 0 and 0.5, got {label_smoothing}")


def separable_dph_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Separable DPH loss of each pair (arXiv 2405.20053): two binary cross-entropies with smoothed labels, summed; unreduced, [batch].

    Args: rewards of the head, each [batch]; label_smoothing, eps, in [0, 0.5].
    Gradient: sigma(r_w) - (1 - eps) and sigma(r_l) - eps; the minimum is at r_w = log((1 - eps) / eps) = -r_l. At rewards 0: 2 log 2.
    """
    check_rewards(chosen_rewards, rejected_rewards, label_smoothing)
    chosen = (1 - label_smoothing) * F.logsigmoid(chosen_rewards) + label_smoothing * F.logsigmoid(-chosen_rewards)
    rejected = label_smoothing * F.logsigmoid(rejected_rewards) + (1 - label_smoothing) * F.logsigmoid(-rejected_rewards)
    return -chosen - rejected


def contrastive_dph_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Contrastive DPH loss of each pair (arXiv 2405.20053): cDPO with the head's rewards; unreduced, [batch].

    Args: rewards of the head, each [batch]; label_smoothing, eps, in [0, 0.5].
    Gradient: sigma(r_w - r_l) - (1 - eps) for r_w, the opposite for r_l; minimum at r_w - r_l = log((1 - eps) / eps). At rewards 0: log 2.
    """
    check_rewards(chosen_rewards, rejected_rewards, label_smoothing)
    margins = chosen_rewards - rejected_rewards
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def add_head(model, saved: dict[str, torch.Tensor]):
    """Puts the reward head `model.score` on a causal LM: zero, or the one among the `saved` weights. The name is what
    sequence-classification models call theirs, so that the saved folder loads as one."""
    model.score = torch.nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False, device=model.device)
    with torch.no_grad():
        model.score.weight.copy_(saved.get("score.weight", torch.zeros(())))
    model.config.num_labels = 1
    return model


def logps_and_rewards(model, batch: dict, head_dropout: float = 0.0, train_lm: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probability and the head's reward of every completion, [sequences] each; the reward is read at the last token."""
    hidden = body(model, batch)
    with torch.set_grad_enabled(torch.is_grad_enabled() and train_lm):
        logps = completion_logps(model, batch, hidden)
    states = hidden[batch["last"]].to(torch.promote_types(hidden.dtype, torch.float32))  # [sequences, hidden]
    states = F.dropout(states, head_dropout, training=torch.is_grad_enabled())  # evaluation runs without gradients
    return logps, (states * model.score.weight[0]).sum(-1)


@torch.no_grad()
def pull_to_prior(model, prior: dict[str, torch.Tensor], rate: float) -> None:
    """Decay towards the initial weights: p <- p - rate * (p - p_init). `prior` holds the initial value of each weight that takes part."""
    for name, parameter in model.named_parameters():
        if name in prior:
            parameter.sub_(rate * (parameter - prior[name]))


# [/method]
def pair_metrics(losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps) -> dict[str, torch.Tensor]:
    """Metrics of a micro-batch, each summed over its pairs, on the device. All arguments [batch]."""
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


def compute_loss(model, batch: dict, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the pairs of a micro-batch, and its metrics."""
    # [method]
    dpo_weight = 0.0 if args.freeze_backbone else args.dpo_weight
    logps, rewards = logps_and_rewards(model, batch, args.head_dropout, train_lm=dpo_weight > 0)
    (chosen_logps, rejected_logps), (chosen_rewards, rejected_rewards) = logps.chunk(2), rewards.chunk(2)  # [batch] each
    head_loss = separable_dph_loss if args.dph_loss == "separable" else contrastive_dph_loss
    losses = args.dph_weight * head_loss(chosen_rewards, rejected_rewards, args.label_smoothing)  # [batch]
    if dpo_weight > 0:
        chosen_logratios = chosen_logps - batch["ref_chosen_logps"]  # [batch]
        rejected_logratios = rejected_logps - batch["ref_rejected_logps"]  # [batch]
        # cDPO is the contrastive loss with beta times the log-ratios as rewards.
        losses = losses + dpo_weight * contrastive_dph_loss(args.beta * chosen_logratios, args.beta * rejected_logratios, args.label_smoothing)
    return losses.sum(), pair_metrics(losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps)
    # [/method]


def main(args: Args) -> None:
    try:
        from common import data, evaluate, runtime
    except ImportError as error:
        raise SystemExit(f"Training needs the folder common/ beside this file; its functions alone do not. ({error})") from None
    run = runtime.start(args, __file__)
    args = run.args

    # The policy, which before its first step is also the reference.
    base = runtime.resolve_model(args.model, args.seed)
    tokenizer = runtime.load_tokenizer(base)
    # [method]
    model = add_head(runtime.load_model(run.checkpoint or base, run.device, tokenizer), runtime.load_weights(run.checkpoint or base, "score.weight"))
    if args.freeze_backbone:
        model.requires_grad_(False).score.requires_grad_(True)
    # [/method]
    runtime.disable_dropout(model)
    run.prepare(model.train())
    logps, loss_and_metrics = runtime.as_forward(model, completion_logps), runtime.as_forward(model, compute_loss)

    # The rows, and the order in which training sees them.
    splits, data_sha256 = data.load_pairs(args, tokenizer, runtime.length_limit(args.max_length, model), run.say)
    plan = data.plan_batches(splits["train"], args.batch_size, args.epochs, args.max_steps, args.seed)
    splits["train"], plan = data.only_planned(splits["train"], plan)
    layout = evaluate.choose_layout(logps, model, splits, tokenizer.pad_token_id, run.device, args.share_prompt, run.say)

    def batch_of(split: str, rows: list[int]) -> dict:
        batch = data.collate([splits[split][i] for i in rows], tokenizer.pad_token_id, layout, run.device)
        # [method]
        if split in ref:
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = ref[split][rows].to(run.device).unbind(1)
        # [/method]
        return batch

    def score(split: str) -> torch.Tensor:
        # [method]
        """Log-probabilities, then rewards, of chosen and rejected answers under the model as it is now, [rows, 4]."""
        found = run.map_rows(lambda rows: torch.cat(both(batch_of(split, rows))).view(4, -1).T, splits[split])
        return found.view(len(splits[split]), 4)  # a split may be empty
        # [/method]

    def report(split: str, reference) -> dict:
        """The keys of the end table on one split, for the policy as it is now; `reference` None: the policy still is the reference."""
        # [method]
        scores, rewards = score(split).split(2, dim=1)  # [rows, 2] each
        # [/method]
        values = {"preference_accuracy": evaluate.accuracy(scores), "reward_accuracy": evaluate.accuracy(rewards, ties_say_nothing=True)}
        return values | evaluate.judge_samples(run, model, reference, base, tokenizer, splits[split])

    # [method]
    both = runtime.as_forward(model, logps_and_rewards)
    ref: dict[str, torch.Tensor] = {}  # the reference's log-probabilities, [rows, 2] for each split, taken before the first step
    if args.dpo_weight > 0 and not args.freeze_backbone:
        ref |= run.keep("reference", lambda: {split: score(split)[:, :2] for split in splits})
    # [/method]
    before = run.remember("before", lambda: {split: report(split, None) for split in splits if split != "train"})
    # [method]
    head = {"params": [model.score.weight], "share": (args.head_lr or args.lr) / args.lr}  # "share": of the learning rate at hand
    backbone = {"params": [p for p in model.parameters() if p.requires_grad and p is not model.score.weight], "share": 1.0}
    groups = [group for group in (backbone, head) if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    prior: dict[str, torch.Tensor] = {}
    if args.prior_decay > 0 and not args.freeze_backbone:  # biases, norms and embeddings are exempt
        start = run.prepare(runtime.load_model(base, run.device, tokenizer))
        embeddings = {id(m.weight) for m in start.modules() if isinstance(m, torch.nn.Embedding)} | {id(start.get_output_embeddings().weight)}
        prior = {name: p.detach() for name, p in start.named_parameters() if p.dim() > 1 and id(p) not in embeddings}
    # [/method]
    run.restore(model, optimizer)

    for step in run.steps(len(plan)):
        lr = run.learning_rate(step, len(plan))
        # [method]
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        # [/method]
        for rows, real in data.micro_batches(plan[step], args.micro_batch_size, run.rank, run.world_size):
            with run.autocast():
                loss, metrics = loss_and_metrics(batch_of("train", rows), args)
            # Every pair of the step weighs the same, however it is cut; fully_shard averages gradients over processes.
            (loss * real * run.world_size / len(plan[step])).backward()
            run.add(metrics, real)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        # [method]
        optimizer.step()
        pull_to_prior(model, prior, lr * args.prior_decay)
        # [/method]
        optimizer.zero_grad()
        run.log([splits["train"][i] for i in plan[step]], grad_norm, lr)
        if run.due(args.eval_every):
            run.write("held_out", run.mean_metrics(lambda rows: loss_and_metrics(batch_of("held_out", rows), args)[1], splits["held_out"]))
        if run.due(args.save_every) or run.stopping:
            run.save(model, optimizer, tokenizer)

    run.save_model(model, tokenizer, run.folder)
    del optimizer
    reference = run.prepare(runtime.load_model(base, run.device, tokenizer))
    # [method]
    columns = {"before": before, "after": {split: report(split, reference) for split in before}}
    for name, sampled in (("after_best_of_n", model), ("reference_best_of_n", reference)):
        for split in before:
            record = {"column": name, "split": split}
            judged = evaluate.judge_samples(run, sampled, reference, base, tokenizer, splits[split], args.n, lambda batch: both(batch)[1], record)
            columns.setdefault(name, {})[split] = judged
    # [/method]
    run.finish(columns, base, data_sha256)
    evaluate.print_report(run, columns)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
