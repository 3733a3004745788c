"""TYPO: learn the preferences' own probabilities and stay near the reference by a forward KL ("New Desiderata for DPO").

arXiv 2407.09072. For a prompt x with a chosen answer y_w and a rejected one y_l:

    loss = -log sigma(log pi(y_w|x) - log pi(y_l|x)) + lambda * KL[ref(.|x) || pi(.|x)]

The first term fits p(y_w > y_l) = pi(y_w) / (pi(y_w) + pi(y_l)): no reference ratio, no temperature, no length normalisation. The second is
estimated on answers that the reference sampled before training: the sum over their tokens of the KL between the two next-token distributions over the
whole vocabulary. log pi(y|x) is the sum over the answer's tokens, its EOS included. As lambda goes to 0 the minimiser goes to the policy that
explains the preferences, as it goes to infinity to the reference; where the reference is already that policy, it stays.

    python typo.py                                                      the toy world: no network, no GPU, about a minute
    python typo.py --model gpt2 --data pairs.jsonl --lr 1e-5            any causal LM of the hub or a folder, any preference pairs
    torchrun --nproc-per-node 8 typo.py --model gpt2 --data pairs.jsonl --lr 1e-5

Batch, as common.data.collate makes it (sequence i < batch is row i's chosen answer, batch + i its rejected one). A line holds one or both answers:
    input_ids, position_ids [lines, length]     attention_mask [lines, length] of 0 and 1, or float [lines, 1, length, length] to add
    source, targets, sequence [tokens]          flat position that predicts a completion token; that token; the sequence it belongs to
    completion_tokens [2 * batch]               lengths; their number says how many sequences there are
    ref_sample                                  a batch of the same kind: the reference's answers, sequence j * batch + i is row i's sample j,
                                                and ref_logits [its tokens, vocabulary]; not needed with --ref-term pairs

Differences from the authors' code:
1. The KL is the true sum over the vocabulary; their toy code averages over the responses, which divides lambda by their number.
2. How they estimate the KL for a language model is not known; the way taken here is our own. It keeps a second model, the reference's weights, while
   training.
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
    lam: float = 0.3
    """lambda: weight of KL(ref || pi) in nats per answer. 0: preferences only; large: stay at the reference."""
    ref_samples: int = 1
    """Answers sampled from the reference for each row's prompt before training, at temperature 1, of at most --max-new-tokens tokens."""
    ref_term: Literal["samples", "pairs"] = "samples"
    """pairs: -(lambda / 2) * (log pi(y_w) + log pi(y_l)) instead, without samples and second model. Valid only if the pairs themselves were sampled
    from the reference, identical answers included."""
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
def typo_loss(policy_chosen_logps: torch.Tensor, policy_rejected_logps: torch.Tensor) -> torch.Tensor:
    """The supervised term of each pair (arXiv 2407.09072), unreduced.

    Args: two summed log-probabilities in nats, each [batch].
    Returns: -log sigma(log pi(y_w) - log pi(y_l)), [batch].
    Gradient: with respect to policy_chosen_logps -sigma(-(log pi(y_w) - log pi(y_l))), to policy_rejected_logps the opposite. At equal ones: log 2.
    Raises ValueError where the shapes are not both [batch].
    """
    if policy_chosen_logps.shape != policy_rejected_logps.shape or policy_chosen_logps.dim() != 1:
        raise ValueError(f"expected two tensors of one shape [batch], got {tuple(policy_chosen_logps.shape)} and {tuple(policy_rejected_logps.shape)}")
    return -F.logsigmoid(policy_chosen_logps - policy_rejected_logps)


def forward_kl(policy_logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """KL(ref || pi) = sum_v ref_v * (log ref_v - log pi_v) in nats, over the last dimension (the vocabulary): [..., vocabulary] -> [...].

    Gradient: with respect to policy_logits pi - ref. Zero where both are equal. Raises ValueError where the shapes differ.
    """
    if policy_logits.shape != ref_logits.shape:
        raise ValueError(f"expected two tensors of one shape [..., vocabulary], got {tuple(policy_logits.shape)} and {tuple(ref_logits.shape)}")
    policy_logits, ref_logits = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (policy_logits, ref_logits))
    log_ref = ref_logits.log_softmax(-1)
    return (log_ref.exp() * (log_ref - policy_logits.log_softmax(-1))).sum(-1)


def completion_logits(model, batch: dict) -> torch.Tensor:
    """Logits at the positions that predict a completion token, [tokens, vocabulary]."""
    if "logits_to_keep" in batch:
        keep, length, source = batch["logits_to_keep"], batch["input_ids"].shape[1], batch["source"]
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=keep).logits[:, -keep:]
        return logits[source // length, source % length - (length - keep)]
    return model.get_output_embeddings()(body(model, batch)[batch["source"]])


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
    chosen_logps, rejected_logps = completion_logps(model, batch).chunk(2)  # [batch] each
    losses = typo_loss(chosen_logps, rejected_logps)  # [batch]
    if args.ref_term == "pairs":
        losses = losses - args.lam / 2 * (chosen_logps + rejected_logps)
    elif args.lam > 0:
        sample = batch["ref_sample"]
        token_kl = forward_kl(completion_logits(model, sample), sample["ref_logits"])  # [sample tokens]
        kl = token_kl.new_zeros(len(sample["completion_tokens"])).index_add(0, sample["sequence"], token_kl)  # [samples * batch]
        losses = losses + args.lam * kl.view(-1, len(losses)).mean(0)
    return losses.sum(), pair_metrics(losses, chosen_logps, rejected_logps, chosen_logps, rejected_logps)
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
    model = runtime.load_model(run.checkpoint or base, run.device, tokenizer)
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
        if split in drawn:
            answers = [{"prompt": splits[split][i]["prompt"], "completions": drawn[split][i]} for i in rows]
            sample = data.collate(answers, tokenizer.pad_token_id, layout, run.device)
            with torch.no_grad():
                batch["ref_sample"] = sample | {"ref_logits": ref_logits(sample)}
        # [/method]
        return batch

    def score(split: str) -> torch.Tensor:
        # [method]
        """Summed log-probabilities of chosen and rejected answers under the policy as it is now, [rows, 2]."""
        return run.map_rows(lambda rows: logps(batch_of(split, rows)).view(2, -1).T, splits[split])
        # [/method]

    def report(split: str, reference) -> dict:
        """The keys of the end table on one split, for the policy as it is now; `reference` None: the policy still is the reference."""
        # [method]
        scores = score(split)  # [rows, 2]
        rewards = scores  # log pi itself: the preferences' probabilities are to be pi(y_w) / (pi(y_w) + pi(y_l))
        # [/method]
        values = {"preference_accuracy": evaluate.accuracy(scores), "reward_accuracy": evaluate.accuracy(rewards, ties_say_nothing=True)}
        return values | evaluate.judge_samples(run, model, reference, base, tokenizer, splits[split])

    # [method]
    drawn: dict[str, list] = {}  # the reference's answers, [rows][ref_samples] lists of ids for each split
    if args.ref_term == "samples" and args.lam > 0:
        anchor = run.prepare(runtime.load_model(base, run.device, tokenizer))  # the reference's weights, kept while training
        ref_logits = runtime.as_forward(anchor, completion_logits)
        drawn |= run.remember("ref_samples", lambda: {s: evaluate.sample_rows(run, anchor, tokenizer, splits[s], args.ref_samples) for s in splits})
    # [/method]
    before = run.remember("before", lambda: {split: report(split, None) for split in splits if split != "train"})
    # [method]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    # [/method]
    run.restore(model, optimizer)

    for step in run.steps(len(plan)):
        lr = run.learning_rate(step, len(plan))
        # [method]
        for group in optimizer.param_groups:
            group["lr"] = lr
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
    # [/method]
    run.finish(columns, base, data_sha256)
    evaluate.print_report(run, columns)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
