"""Conditional pretraining: each segment is preceded by a control token that says whether it is good, and the model is asked for good text afterwards.

Korbak et al. 2023, "Pretraining Language Models with Human Preferences", arXiv 2302.08582. A corpus is split in segments (sentences of text, lines
of code) and a scorer gives each a score s >= 0, low is good. <|good|> is put before segments with s <= t, <|bad|>
before the others, each left out with probability d; then maximum likelihood, the control tokens being targets like all others:

    loss = -log p(token)        mean over all tokens

At inference the model starts from EOS <|good|>. On text both control tokens are banned; on code only <|bad|> is: the model itself writes <|good|> before
each line, and nothing is inserted. Control tokens are taken out before a sample is scored.

    python conditional_pretrain.py                                      the toy corpus: no network, no GPU, a minute or two
    python conditional_pretrain.py --task pep8 --context 256 --drop 0.1
    torchrun --nproc-per-node 8 conditional_pretrain.py --task pep8 --model gpt2-small --context 1024 --batch-size 64 --lr 8e-4 --tokens 3.3e9 --drop 0.1

Batch: documents joined by EOS and cut in chunks, no padding. Position t predicts the token at t + 1:
    input_ids [batch, context]                  tokens
    scores    [batch, context]                  float: the score of each token's segment; an EOS has its document's last one
    A control token is an ordinary position in both, with the score of the segment that it precedes.

Differences from the authors' code:
1. Each segment is tokenised by itself for every objective, so that the six differ in the objective only.
2. Logits exist for a few thousand tokens at a time and are recomputed in the backward pass.
3. No dropout, and evaluation is in eval mode; theirs leaves dropout on while it samples.
4. <|good|> and <|bad|> are the paper's names; their code says <|aligned|> and <|misaligned|>.
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
    drop: float = 0.01
    """d: probability with which a segment's control token is left out. The paper: 0.01 on text, 0.1 on code."""
    threshold: float | None = None
    """t: segments with a score up to this are good. The paper: 5.6e-4 (toxicity), 0 (PII, PEP8)."""
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
GOOD, BAD = "<|good|>", "<|bad|>"


def add_control_tokens(
    segments: list[str], scores: list[float], threshold: float, drop: float, rng: random.Random
) -> list[str]:
    """Segments with <|good|> before those whose score is at most the threshold and <|bad|> before the others (arXiv 2302.08582, section 2).

    Args: segments and their scores, one each; drop, the probability in [0, 1] with which a control token is left out; rng, from which one number
        is drawn for each segment, whatever its score.
    Returns: as many strings; each ends in its segment, so that what stands before it is the control token, or nothing.
    Raises ValueError where the numbers of segments and scores differ, or drop is no probability.
    """
    if len(segments) != len(scores):
        raise ValueError(f"expected a score for each segment, got {len(segments)} segments and {len(scores)} scores")
    if not 0 <= drop <= 1:
        raise ValueError(f"expected drop between 0 and 1, got {drop}")
    return [
        ("" if rng.random() < drop else GOOD if score <= threshold else BAD) + segment
        for segment, score in zip(segments, scores)
    ]


@torch.no_grad()
def new_tokens(model, tokenizer, names: tuple[str, ...], seed: int) -> list[int]:
    """Ids of special tokens, which are added to tokenizer and model where they are missing.

    A new row of the embedding and of the output layer is the mean of the old rows plus 0.01 * normal noise.
    """
    old = len(tokenizer)
    tokenizer.add_tokens(list(names), special_tokens=True)
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    if len(tokenizer) > len(layers[0].weight):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        layers = model.get_input_embeddings(), model.get_output_embeddings()
    generator = torch.Generator().manual_seed(seed)
    for weight in {id(layer.weight): layer.weight for layer in layers}.values():  # one where they are tied
        noise = torch.randn(len(tokenizer) - old, weight.shape[1], generator=generator).to(weight)
        weight[old : len(tokenizer)] = weight[:old].mean(0) + 0.01 * noise
    return tokenizer.convert_tokens_to_ids(list(names))


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
    losses = -logps  # [batch, context - 1]
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
    good, bad = new_tokens(model, tokenizer, (GOOD, BAD), args.seed)
    # [/method]
    runtime.disable_dropout(model)
    flops = runtime.training_flops(model, args.context)  # for each token
    run.prepare(model.train(), dynamic=None)
    loss_and_metrics = runtime.as_forward(model, compute_loss)

    def encoded(split: str, rng: random.Random):
        # [method]
        """(token ids, their scores) of each document, with control tokens."""
        ids_of = {GOOD: good, BAD: bad, "": None}

        def marks(document: dict) -> list[int | None]:
            marked = add_control_tokens(document["segments"], document["scores"], args.threshold, args.drop, rng)
            return [ids_of[text[: len(text) - len(segment)]] for text, segment in zip(marked, document["segments"])]

        return corpus.encode_documents(tokenizer, documents[split], map(marks, documents[split]))
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
    both = [good, bad]
    asked = {
        "after": ([good], both),
        "after_bad": ([bad], both),
        "after_no_token": ([], both),
    }  # what the samples begin with; what is banned
    if args.task == "pep8":  # on code the model goes on to write the control token that it was given
        asked |= {"after": ([good], [bad]), "after_bad": ([bad], [good])}
    for name, (prefix, banned) in asked.items():
        columns[name] = judge(model, tokenizer, prefix, banned, both)
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
