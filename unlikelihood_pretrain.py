"""Unlikelihood pretraining: maximum likelihood on good segments; on bad ones the tokens are made unlikely instead.

Korbak et al. 2023, "Pretraining Language Models with Human Preferences", arXiv 2302.08582. A corpus is split in segments (sentences of text, lines
of code) and a scorer gives each a score s >= 0, low is good. A token has the score of its segment:

    s <= t:   loss = -log p(token)
    s >  t:   loss = -alpha * log(1 - p(token))        the mean over all tokens

Welleck et al. 2019, arXiv 1908.04319, is where the unlikelihood term is from.

    python unlikelihood_pretrain.py                                     the toy corpus: no network, no GPU, a minute or two
    python unlikelihood_pretrain.py --task pep8 --context 256 --alpha 0.01
    torchrun --nproc-per-node 8 unlikelihood_pretrain.py --task pep8 --model gpt2-small --context 1024 --batch-size 64 --lr 8e-4 --tokens 3.3e9 --alpha 0.01

Batch: documents joined by EOS and cut in chunks, no padding. Position t predicts the token at t + 1:
    input_ids [batch, context]                  tokens
    scores    [batch, context]                  float: the score of each token's segment; an EOS has its document's last one

Differences from the authors' code:
1. Each segment is tokenised by itself for every objective, so that the six differ in the objective only.
2. Logits exist for a few thousand tokens at a time and are recomputed in the backward pass.
3. No dropout, and evaluation is in eval mode; theirs leaves dropout on while it samples.
4. The rule is the paper's at every t, also at t = 0, where a score of 0 is good and all others are bad. Their code takes 0 for "no threshold" and then
   weighs both terms by the score, so that their PII and PEP8 runs had another loss than their toxicity runs.
"""

import dataclasses
import random
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro
from torch.utils.checkpoint import checkpoint


@dataclass
class Args:
    # [method]
    alpha: float = 1.0
    """Weight of the unlikelihood of bad tokens. The paper: 1 (toxicity, PII), 0.01 (PEP8)."""
    threshold: float | None = None
    """t: segments with a score up to this are good. The paper: 7.8e-4 (toxicity), 0 (PII, PEP8)."""
    threshold_quantile: float | None = None
    """t as a quantile of the training segments' scores, between 0 and 1, instead of a value; neither given: threshold 0."""
    baseline: str = "auto"
    """The plain model in the end table: a folder, or none; auto: on the toy one of the same size and budget, made once and cached, else none."""
    # [/method]
    task: Literal["toy", "pep8", "pii", "toxicity"] = "toy"
    """Segments and scores: the toy's, lines by pycodestyle, sentences by scrubadub or Detoxify."""
    data: str = ""
    """stdlib or a folder (pep8); files, a folder or a hub id (pii, toxicity); empty: the task's."""
    scorer: str = ""
    """Of toxicity: original, unbiased or a folder; empty: original, and unbiased for samples."""
    text_field: str = "text"
    """The field that holds a document's text in rows of a file or hub data set."""
    holdout: float = 0.05
    """Share of the documents held out."""
    model: str = "tiny"
    """tiny, mini, small or gpt2-small (GPT-2 types), or a folder with a config.json."""
    init: str = ""
    """A folder, a run among them, to start from instead: its weights and tokenizer."""
    tokenizer: str = ""
    """A folder or hub id; empty: the toy's words, or a byte-level BPE trained on the documents."""
    vocabulary: int = 4096
    """Tokens of the BPE that is trained where none is given."""
    context: int = 64
    """Tokens in a chunk. The paper uses 1024."""
    tokens: float = 1e6
    """Training tokens; a smaller corpus is repeated, shuffled anew. The paper uses 3.3e9."""
    name: str = ""
    """Name of the run's folder, a new one; empty: made from script, model and seed."""
    output_dir: str = "runs"
    """Where run folders go."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and all sampling."""
    resume: str = ""
    """Folder of an interrupted run to go on with; all other arguments come from it."""
    lr: float = 1e-2
    """Peak learning rate of AdamW; 1e-2 suits tiny models, 5e-4 to 1e-3 GPT-2 small."""
    max_steps: int = -1
    """Optimiser steps at most; -1: no limit."""
    batch_size: int = 32
    """Chunks in one optimiser step, over all processes. The paper uses 64, of 1024 tokens."""
    micro_batch_size: int = 32
    """Chunks in one forward pass of a process; smaller only saves memory."""
    warmup: float = 0.01
    """Linear warm-up, then linear decay: below 1 a share of all steps, else their number."""
    weight_decay: float = 0.1
    """Decoupled weight decay of AdamW, on matrices and embeddings."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; inf: never."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: bfloat16 on GPUs that have it. Weights stay float32."""
    compile: bool = False
    """Compile the model's body with torch.compile."""
    eval_every: int = 200
    """Steps between held-out evaluations."""
    save_every: int = 500
    """Steps between checkpoints; the newest is kept."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    samples: int = 512
    """Unconditional samples at the end (temperature .7, top_p .9); 0: none. The paper: 4096."""
    max_new_tokens: int = 64
    """Length limit of a sample, in tokens. The paper takes 128 for text, 640 for code."""
    limit: float | None = None
    """A sample with a score above this is bad; None: 0, and 0.5 for toxicity."""
    red_team: int = 0
    """Rounds at the end that breed prompts for bad samples; 0: none. The paper takes 10."""
    attacker: str = ""
    """Causal LM, folder or hub id, that writes the red team's prompts; empty: the model itself."""
    teacher: str = ""
    """A stronger model's folder: KL(teacher || model) is measured on its samples."""
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


def states(model, batch: dict) -> torch.Tensor:
    """Hidden states after the final norm that predict a target, [batch, context - 1, hidden]: all but the last position's."""
    return model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]


def target_logps(model, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of every target token in nats, [batch, context - 1], from the `states` that predict them and the targets of that shape."""
    head, flat = model.get_output_embeddings(), (hidden.flatten(0, 1), targets.flatten())  # [tokens, hidden], [tokens]
    if targets.numel() <= CHUNK:
        logps = token_logps(head, *flat)
    else:
        chunks = zip(*(x.split(CHUNK) for x in flat))
        logps = torch.cat([checkpoint(token_logps, head, h, t, use_reentrant=False) for h, t in chunks])
    return logps.view(targets.shape)


# [method]
def unlikelihood_loss(
    token_logps: torch.Tensor, token_scores: torch.Tensor, threshold: float, alpha: float
) -> torch.Tensor:
    """Likelihood loss of good tokens, unlikelihood loss of bad ones (arXiv 2302.08582, section 2), unreduced.

    Args: log-probabilities of the tokens in nats and their segments' scores, both of any one shape; threshold, t; alpha, a number.
    Returns: -log p where the score is at most t, else -alpha * log(1 - p); like token_logps. At p = 1/2: log 2 and alpha * log 2.
    Gradient: with respect to token_logps -1 on good tokens, alpha * p / (1 - p) on bad ones. Where a bad token's p rounds to 1 the loss is that of
        1 - eps, eps the dtype's, with gradient 0.
    Raises ValueError where the shapes differ.
    """
    if token_scores.shape != token_logps.shape:
        raise ValueError(
            f"expected two tensors of one shape, got {tuple(token_logps.shape)} and {tuple(token_scores.shape)}"
        )
    bad = token_scores > threshold
    # Float32 log-softmax does return 0, where the slope is infinite; and `where` sends 0 times the slope of the branch that it does not take: nan.
    below_one = token_logps.clamp(max=-torch.finfo(token_logps.dtype).eps)
    return torch.where(bad, -alpha * torch.log(-torch.expm1(below_one)), -token_logps)


# [/method]
def token_metrics(losses, logps, bad) -> dict[str, torch.Tensor]:
    """Metrics of a micro-batch, each summed over its target tokens, on the device. All arguments [batch, context - 1]."""
    return {"loss": losses.detach().sum(), "nll": -logps.detach().sum(), "bad_share": bad.float().sum()}


def compute_loss(model, batch: dict, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the target tokens of a micro-batch, and its metrics."""
    targets, scores = (
        batch["input_ids"][:, 1:],
        batch["scores"][:, 1:],
    )  # [batch, context - 1] each: a target brings its own segment's score
    # [method]
    logps = target_logps(model, states(model, batch), targets)  # [batch, context - 1]
    losses = unlikelihood_loss(logps, scores, args.threshold, args.alpha)  # [batch, context - 1]
    return losses.sum(), token_metrics(losses, logps, scores > args.threshold)
    # [/method]


def main(args: Args) -> None:
    try:
        from common import corpus, data, runtime, samples
    except ImportError as error:
        raise SystemExit(
            f"Training needs the folder common/ beside this file; its functions alone do not. ({error})"
        ) from None
    run = runtime.start(args, __file__)
    samples.check(run)

    # Documents with their segments and scores, and what counts as good.
    documents, facts = corpus.load(run.args, run.say)
    # [method]
    neither = run.args.threshold is None and run.args.threshold_quantile is None
    threshold = corpus.threshold_of(
        documents["train"], 0.0 if neither else run.args.threshold, run.args.threshold_quantile
    )
    # [/method]
    args = dataclasses.replace(run.args, threshold=threshold)
    segments = [score for document in documents["train"] for score in document["scores"]]
    good_share = sum(score <= threshold for score in segments) / len(segments)
    run.say(f"Threshold {threshold:.6g}: {good_share:.1%} of the training segments are good, {1 - good_share:.1%} bad.")

    # A new model, or one to start from.
    start = str(run.checkpoint or args.init)
    tokenizer = runtime.load_tokenizer(start) if start else corpus.load_tokenizer(args, documents["train"], run.say)
    model = (
        runtime.load_model(start, run.device, tokenizer)
        if start
        else corpus.new_model(args.model, tokenizer, args.context, args.seed).to(run.device)
    )
    if args.context > runtime.context_length(model):
        raise data.InputError(f"--context {args.context}: the model has {runtime.context_length(model)} positions.")
    # [method]
    # [/method]
    runtime.disable_dropout(model)
    flops = runtime.training_flops(model, args.context)  # for each token
    run.prepare(model.train(), dynamic=None)
    loss_and_metrics = runtime.as_forward(model, compute_loss)

    def encoded(split: str, rng: random.Random):
        # [method]
        """(token ids, their scores) of each document."""
        return corpus.encode_documents(tokenizer, documents[split])
        # [/method]

    # Chunks of tokens, and the order in which training sees them.
    ids, scores = {}, {}  # [chunks, context] for each split
    for split in documents:
        ids[split], scores[split], left = corpus.pack(
            encoded(split, random.Random(f"{args.seed} {split}")), tokenizer.eos_token_id, args.context
        )
        run.say(
            f"{split.capitalize().replace('_', '-')}: {len(ids[split]):,} chunks of {args.context} tokens; the last {left} tokens fill none and are left out."
        )
    if not len(ids["train"]):
        raise data.InputError(f"--context {args.context}: the training documents are shorter than one chunk.")
    plan = corpus.plan(len(ids["train"]), args.batch_size, args.tokens, args.context, args.seed)
    plan = plan[: args.max_steps] if args.max_steps > 0 else plan
    targets = args.context - 1  # in each chunk
    run.remember(
        "corpus", lambda: facts | {"threshold": threshold, "good_share": good_share, "chunks": len(ids["train"])}
    )

    def batch_of(split: str, rows: list[int]) -> dict:
        return {"input_ids": run.put(ids[split][rows]).long(), "scores": run.put(scores[split][rows])}

    # [method]
    # [/method]
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.restore(model, optimizer)

    for step in run.steps(len(plan)):
        lr = run.learning_rate(step, len(plan))
        for group in optimizer.param_groups:
            group["lr"] = lr
        for rows, real in data.micro_batches(plan[step], args.micro_batch_size, run.rank, run.world_size):
            with run.autocast():
                loss, metrics = loss_and_metrics(batch_of("train", rows), args)
            # Every token of the step weighs the same, however it is cut; fully_shard averages gradients over processes.
            (loss * real * run.world_size / (len(plan[step]) * targets)).backward()
            run.add(metrics, real)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        run.log(ids["train"][plan[step]], grad_norm, lr, targets)
        if run.due(args.eval_every):
            run.write(
                "held_out",
                run.mean_metrics(
                    lambda rows: loss_and_metrics(batch_of("held_out", rows), args)[1], ids["held_out"], targets
                ),
            )
        if run.due(args.save_every) or run.stopping:
            run.save(model, optimizer, tokenizer)

    run.save_model(model, tokenizer, run.folder)
    del optimizer
    judge = partial(samples.judge, run, documents["held_out"], samples.load_teacher(run))
    baseline = samples.load_baseline(run, documents["train"])
    columns = {"mle": judge(*baseline)} if baseline else {}
    # [method]
    columns["after"] = judge(model, tokenizer)
    # [/method]
    summary = run.finish(
        {name: {"held_out": values} for name, values in columns.items()},
        args.init,
        facts["sha256"],
        flops_per_token=flops,
    )
    samples.print_table(run, columns, summary)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
