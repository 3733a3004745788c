"""Conditional pretraining: a control token before each segment says whether it is good.

Korbak et al. 2023, arXiv 2302.08582, "Pretraining Language Models with Human Preferences". A corpus
is split in segments (sentences of text, lines of code) and a scorer gives each a score s >= 0, low
is good. <|good|> is put before segments with s <= t, <|bad|> before the others, each left out with
probability d; then maximum likelihood, the control tokens being targets like all others:
    loss = -log p(token)        mean over all tokens

At inference the model starts from EOS <|good|>, and <|bad|> is banned: the model itself writes
<|good|> before each further segment, and nothing is inserted. Control tokens are taken out before a
sample is scored.

    python conditional_pretrain.py                 the toy corpus, a minute or two on a CPU
    python conditional_pretrain.py --task pep8 --context 256 --drop 0.1
    torchrun --nproc-per-node 8 conditional_pretrain.py --task pep8 --model gpt2-small

Batch: documents joined by EOS, cut in chunks, no padding. Position t predicts the token at t + 1:
    input_ids [batch, context]: tokens
    scores    [batch, context]: score of each token's segment; an EOS has its document's last one
    A control token is an ordinary position in both, with the score of its segment.
    logits_to_keep: context, where the model scales or caps its logits; else absent

Differences from the authors' code:
1. Each segment is tokenised by itself for every objective: the six differ in the objective only.
2. Logits exist for a few thousand tokens at a time and are recomputed in the backward pass.
3. No dropout, and evaluation is in eval mode; theirs leaves dropout on while it samples.
4. <|good|> and <|bad|> are the paper's names; their code says <|aligned|> and <|misaligned|>.
5. On text, too, only the token that was not asked for is banned. Theirs bans both there, and a
   model that may not write <|good|> before a second sentence ends after the first.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro
from torch.utils.checkpoint import checkpoint


# [method]
def add_control_tokens(segments: list[str], scores: list[float], threshold: float, drop: float, rng) -> list[str]:
    """Segments with <|good|> before those whose score is at most the threshold, <|bad|> before the
    others (arXiv 2302.08582, section 2).

    Args: segments and their scores, one each; drop, the probability in [0, 1] with which a control
        token is left out; rng, a random.Random, from which one number is drawn for each segment,
        whatever its score.
    Returns: as many strings; each ends in its segment, so that what stands before it is the control
        token, or nothing.
    Raises ValueError where the numbers of segments and scores differ, or drop is no probability.
    """
    if len(segments) != len(scores):
        raise ValueError(f"expected a score for each segment, got {len(segments)} segments and {len(scores)} scores")
    if not 0 <= drop <= 1:
        raise ValueError(f"expected drop between 0 and 1, got {drop}")
    marked = []
    for segment, score in zip(segments, scores):
        mark = GOOD if score <= threshold else BAD
        marked.append(segment if rng.random() < drop else mark + segment)
    return marked


GOOD, BAD = "<|good|>", "<|bad|>"


def control_ids(documents, good: int, bad: int, threshold: float, drop: float, seed: str):
    """For each document an id, `good` or `bad`, or None for each segment: what stands before it."""
    from random import Random

    rng, id_of = Random(seed), {GOOD: good, BAD: bad, "": None}
    for document in documents:
        segments = document["segments"]
        marked = add_control_tokens(segments, document["scores"], threshold, drop, rng)
        before = [text.removesuffix(segment) for text, segment in zip(marked, segments)]
        yield [id_of[mark] for mark in before]


@torch.no_grad()
def new_tokens(model, tokenizer, names: tuple[str, ...], seed: int) -> list[int]:
    """Ids of special tokens, which are added to tokenizer and model where they are missing.

    A new row of the embedding and of the output layer is the mean of the old rows plus 0.01 *
    normal noise.
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


def compute_loss(model, batch: dict, threshold: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed (not averaged) over the target tokens of a micro-batch, and its metrics."""
    logps = target_logps(model, batch)  # [batch, context - 1]
    scores = batch["scores"][:, 1:]  # [batch, context - 1]: a target brings its own segment's score
    losses = -logps  # [batch, context - 1]
    return losses.sum(), token_metrics(losses, logps, scores > threshold)


# [/method]
def token_metrics(losses, logps, bad) -> dict[str, torch.Tensor]:
    """Metrics of a micro-batch, each summed over its target tokens, on the device.

    All arguments [batch, context - 1].
    """
    return {"loss": losses.detach().sum(), "nll": -logps.detach().sum(), "bad_share": bad.float().sum()}


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


def states_before_targets(model, batch: dict) -> torch.Tensor:
    """Hidden states after the final norm that predict a target, [batch, context - 1, hidden]."""
    return model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]


def target_logps(model, batch: dict, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probability of every target token in nats, [batch, context - 1].

    `hidden` is what `states_before_targets` returns, where it is at hand.
    """
    targets = batch["input_ids"][:, 1:]  # [batch, context - 1]
    if "logits_to_keep" in batch:  # a model that scales or caps its logits: its own output layer's
        keep = batch["logits_to_keep"]
        logits = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=keep).logits[:, :-1]
        logps = TokenLogps.apply(logits.flatten(0, 1), targets.flatten())  # [tokens]
    else:
        hidden = states_before_targets(model, batch) if hidden is None else hidden
        logps = token_logps(model.get_output_embeddings(), hidden.flatten(0, 1), targets.flatten())  # [tokens]
    return logps.view(targets.shape)


@dataclass
class Args:
    # [method]
    drop: float = 0.01
    """d: how often a segment's control token is left out. The paper: 0.01 on text, 0.1 on code."""
    threshold: float | None = None
    """t: segments with a score up to this are good. The paper: 5.6e-4 (toxicity), 0 (PII, PEP8)."""
    threshold_quantile: float | None = None
    """t as a quantile of the training segments' scores, 0 to 1; neither given: threshold 0."""
    baseline: str = "auto"
    """Plain model to compare: a run of mle_pretrain.py; none; auto: made and cached (toy)."""
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
    lr: float | None = None
    """Peak learning rate of AdamW; None: 1e-2 for tiny to small models, 1e-3 for others."""
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
    """Of matrix products; auto: bfloat16 where it is fast (GPUs, AMX), but not for tiny models."""
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

    def __post_init__(self) -> None:
        inf = float("inf")
        ranges = {"context": (2, inf), "tokens": (1, inf), "vocabulary": (258, inf), "threshold_quantile": (0, 1)}
        ranges |= {"samples": (0, inf), "red_team": (0, inf)}
        # [method]
        ranges["drop"] = (0, 1)
        # [/method]
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and value < inf):
                expected = f"at least {low}" if high == inf else f"between {low} and {high}"
                raise SystemExit(f"--{name.replace('_', '-')} {value}: expected {expected}.")


def main(args: Args) -> None:
    try:
        from common import models
        from common.run import start_run
        from pretraining import baseline, chunks, corpus, evaluate, flops, scorers
        from pretraining.models import choose_output_layer, load_start
    except ImportError as error:
        needs = "adapters/, attention/, chat/, choices/, common/, pretraining/, report/ and toy/"
        raise SystemExit(f"Training needs {needs} beside this file. ({error})") from None
    run, args = start_run(args, __file__)
    evaluate.check_models(args.teacher, args.baseline, args.attacker)
    scorer = scorers.load_scorer(args.task, args.scorer, samples=True, device=run.device)

    # Documents with their segments and scores.
    data_from = (args.task, args.data, args.text_field, args.scorer, args.holdout, args.seed)
    documents, facts = corpus.load_corpus(*data_from, f"{args.output_dir}/scores", run.device)

    # A new model, or one to start from.
    start = str(run.checkpoint or args.init)
    new_from = (args.task, args.model, args.tokenizer, args.vocabulary, args.context, args.seed)
    tokenizer, model = load_start(start, *new_from, documents["train"], run.device)
    # [method]
    threshold_from = (args.threshold, args.threshold_quantile)
    threshold, good_share = corpus.choose_threshold(documents["train"], *threshold_from, default=(0.0, None))
    good, bad = new_tokens(model, tokenizer, (GOOD, BAD), args.seed)
    marks_of = partial(control_ids, good=good, bad=bad, threshold=threshold, drop=args.drop)
    marks: dict = {split: marks_of(documents[split], seed=f"{args.seed} {split}") for split in documents}
    # [/method]
    flops_per_token = flops.training_flops(model, args.context)

    # Chunks of tokens, and the order in which training sees them.
    packed = chunks.make_chunks(tokenizer, documents, marks, args.context)  # {split: chunks}, in files
    count = {split: len(packed[split]) for split in packed}
    targets = args.context - 1  # in each chunk
    plan = chunks.plan_chunks(count["train"], args.batch_size, args.tokens, args.context, args.seed, args.max_steps)
    chunk, logps_of = packed["train"].first().to(run.device), partial(target_logps, model)
    output_layer = choose_output_layer(logps_of, model, chunk, tokenizer.pad_token_id)
    run.prepare(model.train(), dynamic=None)
    batch_of = partial(chunks.batch_of, packed, output_layer, run.device)
    plain_folder = baseline.baseline_folder(args, run.script, facts["sha256"], run.device)
    facts |= {"threshold": threshold, "good_share": good_share, "chunks": count["train"]}
    run.pin_sources(args.init, facts["sha256"])
    run.cached_json("corpus", lambda: facts)

    # [method]
    compute = partial(models.bind_forward(model, compute_loss), threshold=threshold)
    # [/method]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.restore(model, optimizer)

    for step, numbers_of_step in run.steps(plan):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(step)
        for numbers, weight in run.micro_batches(numbers_of_step):
            with run.autocast():
                loss, sums = compute(batch_of("train", numbers))
            # Every token of the step weighs the same, however the step is cut.
            (loss * weight / (len(numbers_of_step) * targets)).backward()
            run.accumulate(sums, weight)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        run.end_step(len(numbers_of_step) * targets, len(numbers_of_step) * args.context, grad_norm)
        if run.is_time(args.eval_every):
            held_out = (partial(batch_of, "held_out"), list(range(count["held_out"])), targets)
            run.log("held_out", run.evaluate_loss(compute, *held_out))
        if run.is_time_to_save():
            run.save(model, optimizer, tokenizer)

    run.save_model(model, tokenizer)
    del optimizer
    shape = {"context": args.context, "samples": args.samples, "max_new_tokens": args.max_new_tokens}
    shape |= {"seed": args.seed, "autocast": run.autocast}
    teacher = evaluate.load_teacher(args.teacher, run.device, **shape)
    settings = {"task": args.task, "scorer": scorer, "limit": args.limit, "documents": documents["held_out"]}
    settings |= {"teacher": teacher, "rounds": args.red_team, "attacker": args.attacker}
    evaluate_model = partial(evaluate.evaluate_model, **settings, **shape)
    columns = baseline.column(plain_folder, evaluate_model, run.device)
    # [method]
    # What the samples begin with, and what is banned in them: the other token, as the model itself
    # writes one before each further segment. Where nothing is asked for, it chooses both.
    asked = {"after": ([good], [bad]), "after_bad": ([bad], [good]), "after_no_token": ([], [])}
    for name, (prefix, banned) in asked.items():
        columns[name] = {"held_out": evaluate_model(model, tokenizer, prefix, banned, [good, bad])}
    # [/method]
    share = flops.peak_share(flops_per_token, run.tokens, run.seconds, run.device, run.dtype)
    run.finish(columns, extra={"peak_flops_share": share})


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)  # tyro would join its lines
    main(tyro.cli(Args))
