"""TYPO: learn the preferences' own probabilities and stay near the reference by a forward KL.

"New Desiderata for DPO", arXiv 2407.09072. For a prompt x, chosen answer y_w and rejected y_l:
    loss = -log sigma(log pi(y_w|x) - log pi(y_l|x)) + lambda * KL[ref(.|x) || pi(.|x)]

The first term fits p(y_w > y_l) = pi(y_w) / (pi(y_w) + pi(y_l)): no ratio, no temperature.
The second is estimated on answers that the reference sampled before training: the sum over their
tokens of the KL between the next-token distributions, over the whole vocabulary. log pi(y|x) is the
sum over the answer's tokens, its EOS included. As lambda goes to 0 the minimiser goes to the policy
that explains the preferences, as it goes to infinity to the reference; where the reference already
is that policy, it stays.

    python typo.py                                      the toy world, about a minute on a CPU
    python typo.py --model gpt2 --data pairs.jsonl --lr 1e-5
    torchrun --nproc-per-node 8 typo.py --model gpt2 --data pairs.jsonl --lr 1e-5

A batch (sequence i < batch is pair i's chosen answer, batch + i its rejected one):
    input_ids, position_ids [lines, length]; attention_mask: [lines, length] of 0 and 1, or a float
    [lines, 1, length, length] that is added, where a line holds both answers
    logit_index, targets, sequence_ids [tokens]: flat position that predicts a completion token;
    that token; the sequence it belongs to
    completion_tokens [2 * batch]: lengths of the completions
    ref_sample: a batch of the same kind of the reference's answers, sequence j * batch + i is pair
    i's sample j, and ref_logits [its tokens, vocabulary]; not needed with --ref-term pairs

Differences from the authors' code:
1. The KL is the true sum over the vocabulary; theirs averages over the responses, which divides
   lambda by their number.
2. How they estimate the KL for a language model is not known; the way taken here is our own. It
   keeps a second model, the reference's weights, while training.
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
def typo_loss(policy_chosen_logps: torch.Tensor, policy_rejected_logps: torch.Tensor) -> torch.Tensor:
    """The supervised term of each pair (arXiv 2407.09072), unreduced.

    Args: two summed log-probabilities in nats, each [batch].
    Returns: -log sigma(log pi(y_w) - log pi(y_l)), [batch].
    Gradient: with respect to policy_chosen_logps -sigma(log pi(y_l) - log pi(y_w)), to
        policy_rejected_logps the opposite. At equal ones: log 2.
    Raises ValueError where the shapes are not both [batch].
    """
    shapes = {tuple(x.shape) for x in (policy_chosen_logps, policy_rejected_logps)}
    if len(shapes) > 1 or policy_chosen_logps.dim() != 1:
        raise ValueError(f"expected two tensors of one shape [batch], got {sorted(shapes)}")
    return -F.logsigmoid(policy_chosen_logps - policy_rejected_logps)


def forward_kl(policy_logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """KL(ref || pi) = sum_v ref_v * (log ref_v - log pi_v) in nats: [..., vocabulary] -> [...].

    Gradient: with respect to policy_logits pi - ref. Zero where both are equal; entries that are
    masked in both, -inf, count nothing. Raises ValueError where the shapes differ.
    """
    if policy_logits.shape != ref_logits.shape:
        shapes = f"{tuple(policy_logits.shape)} and {tuple(ref_logits.shape)}"
        raise ValueError(f"expected two tensors of one shape [..., vocabulary], got {shapes}")
    wide = torch.promote_types(policy_logits.dtype, torch.float32)
    log_policy, log_ref = policy_logits.to(wide).log_softmax(-1), ref_logits.to(wide).log_softmax(-1)
    masked = log_ref == float("-inf")
    log_policy = log_policy.masked_fill(masked, 0.0)  # 0 * (-inf + inf) would be nan, in the gradient too
    return (log_ref.exp() * (log_ref.masked_fill(masked, 0.0) - log_policy)).sum(-1)


def compute_loss(model, batch: dict, lam: float, ref_term: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the pairs of a micro-batch, and its metrics."""
    chosen_logps, rejected_logps = completion_logps(model, batch).chunk(2)  # [batch] each
    losses = typo_loss(chosen_logps, rejected_logps)  # [batch]
    if ref_term == "pairs":
        losses = losses - lam / 2 * (chosen_logps + rejected_logps)
    elif lam > 0:
        sample = batch["ref_sample"]
        token_kl = forward_kl(completion_logits(model, sample), sample["ref_logits"])  # [sample tokens]
        sums = token_kl.new_zeros(len(sample["completion_tokens"]))
        kl = sums.index_add(0, sample["sequence_ids"], token_kl)  # [samples * batch]
        losses = losses + lam * kl.view(-1, len(losses)).mean(0)
    return losses.sum(), pair_metrics(losses, chosen_logps, rejected_logps, chosen_logps, rejected_logps)


def completion_logits(model, batch: dict) -> torch.Tensor:
    """Logits at the positions that predict a completion token, [tokens, vocabulary]."""
    if "logits_to_keep" in batch:
        return model_logits(model, batch)
    return model.get_output_embeddings()(hidden_states(model, batch)[batch["logit_index"]])


@torch.no_grad()
def with_ref_sample(rows: list[dict], collate, ref_logits_of) -> dict:
    """A batch of pairs with `ref_sample`: the reference's answers to the prompts, its logits."""
    answers = [{"prompt": row["prompt"], "completions": row["ref_samples"]} for row in rows]
    sample = collate(answers)
    return collate(rows) | {"ref_sample": sample | {"ref_logits": ref_logits_of(sample)}}


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
    lam: float = 0.3
    """lambda: weight of KL(ref || pi) in nats per answer; 0: preferences only."""
    ref_samples: int = 1
    """Answers of the reference to each prompt, --max-new-tokens long at most, sampled before."""
    ref_term: Literal["samples", "pairs"] = "samples"
    """pairs: the pairs' own likelihood instead; valid only if the reference sampled them all."""

    def __post_init__(self) -> None:
        if not 0 <= self.lam < float("inf"):
            raise SystemExit(f"--lam {self.lam}: expected at least 0.")
        if self.ref_samples < 1:
            raise SystemExit(f"--ref-samples {self.ref_samples}: expected at least 1.")

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
    numbers = {"lam": args.lam, "ref_term": args.ref_term}
    compute = partial(models.bind_forward(model, compute_loss), **numbers)
    predict_logps = partial(run.predict, models.bind_forward(model, completion_logps), batch_of)  # rows -> [rows, 2]
    if args.ref_term == "samples" and args.lam > 0:
        # The reference's weights are kept while training; its answers become a column of the rows.
        ref_model = run.prepare(lora.without_adapter(model) or models.load_model(ref_folder, run.device, tokenizer))
        shape = {"max_new_tokens": args.max_new_tokens, "seed": args.seed, "autocast": run.autocast}
        sampled = partial(evaluate.sample_rows, ref_model, tokenizer, n=args.ref_samples, **shape)
        ref_samples = run.cached_json("ref_samples", lambda: {name: sampled(rows) for name, rows in splits.items()})
        for name, rows in splits.items():
            for row, answers in zip(rows, ref_samples[name], strict=True):
                row["ref_samples"] = answers
        ref_logits_of = models.bind_forward(ref_model, completion_logits)
        batch_of = partial(with_ref_sample, collate=batch_of, ref_logits_of=ref_logits_of)

    def predict(rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and rewards of chosen and rejected answers, [rows, 2] each."""
        logps = predict_logps(rows)
        return logps, logps  # the preferences' probabilities are to be pi(y_w) / (pi(y_w) + pi(y_l))

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
