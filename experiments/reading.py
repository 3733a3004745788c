"""One pair of the toy world through dpo.py, from text to gradient: the numbers of docs/reading.md.

    python -m experiments.reading                                         prints them
    python -m experiments.reading --rejected " it is paris , you fool ."    for a pair of your own
    python -m tests.pages --fix                                           writes them into the page

Text and tokens are the toy's. The model is a smaller one, made here in seconds: float64, numbers of
Python's own generator, plain gradient steps. Another version of torch or another processor changes
its numbers by less than 1e-9, so the page shows the same digits everywhere.
"""

import copy
import math
import random
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/reading.py

import cdpo
import dph
import dpo
import typo
import ulma
from common import InputError, batches
from tokens.encode import encode_row
from toy import world

POSITIONS = 32  # that the model has
LR = 1e-3  # of the steps: the scripts' own for the toy
STEPS = (0, 1, 100)  # after so many a method is looked at
BETAS = (0.1, 0.3, 1.0)
MARGINS = (-2.0, 0.0, 1.0, math.log(9), 4.0)  # beta * h; log 9 is cDPO's minimum for eps .1


@dataclass
class Args:
    prompt: str = "what is the capital of france ?"
    """A question of the toy world."""
    chosen: str = " it is paris , my friend ."
    """The better answer, in the toy's words; it begins with a space."""
    rejected: str = " it is rome , you fool ."
    """The other one."""


# -- the model


def new_model(tokenizer):
    """A GPT-2 type of one layer of 16 in float64, its matrices uniform numbers of Python's own
    generator.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
    ends = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **ends, **no_dropout)).double()
    rng = random.Random(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 2:
                numbers = [0.34 * (2 * rng.random() - 1) for _ in range(parameter.numel())]
                parameter.copy_(torch.tensor(numbers, dtype=torch.float64).view(parameter.shape))
    return model


@cache
def trained_model(steps: int = 600, batch: int = 32, peak: float = 0.5):
    """(model, tokenizer) after `steps` of momentum on the toy's corpus, the loss on answers only.

    No Adam: where a gradient is rounding alone it would make steps as large as any other's.
    """
    tokenizer, rng, rows = world.build_tokenizer(), random.Random(1), world.questions()
    model = new_model(tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9)
    prompts = [tokenizer(world.prompt_of(row)).input_ids for row in rows]
    for step in range(steps):
        lines = []
        for i in (int(rng.random() * len(rows)) for _ in range(batch)):
            words = world.corpus_answer(rows[i], rng).split()
            lines.append((prompts[i], [*tokenizer.convert_tokens_to_ids(words), tokenizer.eos_token_id]))
        length = max(len(prompt) + len(answer) for prompt, answer in lines)
        padding = [length - len(prompt) - len(answer) for prompt, answer in lines]
        ids = torch.tensor([p + a + [tokenizer.pad_token_id] * n for (p, a), n in zip(lines, padding)])
        labels = torch.tensor([[-100] * len(p) + a + [-100] * n for (p, a), n in zip(lines, padding)])
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 20, 1 - 0.9 * step / steps)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


@torch.no_grad()
def sample(model, prompt: list[int], eos: int, rng: random.Random) -> list[int]:
    """An answer of the model at temperature 1, ids with EOS, by Python's own random numbers."""
    ids = list(prompt)
    while len(ids) < POSITIONS and (len(ids) == len(prompt) or ids[-1] != eos):
        line = torch.tensor([ids])
        probabilities = model(input_ids=line, attention_mask=torch.ones_like(line)).logits[0, -1].softmax(-1)
        ids += rng.choices(range(len(probabilities)), probabilities.tolist())
    return ids[len(prompt) :]


# -- what is measured


@dataclass
class Walk:
    """All that the blocks below are made of."""

    args: Args
    tokenizer: object
    reference: torch.nn.Module
    row: dict  # "prompt" and "completions", chosen and rejected

    def __post_init__(self) -> None:
        self.prompt, (self.chosen, self.rejected) = self.row["prompt"], self.row["completions"]
        self.pad = self.tokenizer.pad_token_id
        self.batch = self.collate([self.row], "shared")
        ref = dpo.completion_logps(self.reference, self.batch).detach()  # [2]
        self.batch |= {"ref_chosen_logps": ref[:1], "ref_rejected_logps": ref[1:]}
        self.fork = next(  # how many tokens both answers begin with
            (i for i, (a, b) in enumerate(zip(self.chosen, self.rejected)) if a != b), len(self.chosen)
        )

    def collate(self, rows: list[dict], layout: str) -> dict:
        return batches.collate(rows, self.pad, layout, "cpu", torch.float64)

    def words(self, ids: list[int]) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(ids)

    def labelled_batch(self) -> dict:
        """The two answers as rows of their own, the chosen one labelled 1, the other 0."""
        batch = self.collate([{"prompt": self.prompt, "completions": [ids]} for ids in self.row["completions"]], "rows")
        ref = torch.cat([self.batch["ref_chosen_logps"], self.batch["ref_rejected_logps"]])
        return batch | {"ref_logps": ref, "labels": torch.tensor([1.0, 0.0], dtype=torch.float64)}

    def typo_batch(self) -> dict:
        """The pair with one answer that the reference gave itself, and its logits there."""
        answer = sample(self.reference, self.prompt, self.tokenizer.eos_token_id, random.Random(0))
        rows, ref_logits_of = [self.row | {"ref_samples": [answer]}], partial(typo.completion_logits, self.reference)
        batch = typo.with_ref_sample(rows, partial(self.collate, layout="shared"), ref_logits_of)
        return batch | {name: values for name, values in self.batch.items() if name.startswith("ref_")}


def walk_of(args: Args) -> Walk:
    """The pair encoded, and the model; InputError where the toy does not know its words."""
    if args.prompt not in {world.prompt_of(row) for row in world.questions()}:
        raise InputError(f"--prompt {args.prompt!r}: expected a question of the toy world, such as {Args.prompt!r}.")
    model, tokenizer = trained_model()
    row, reason, _ = encode_row(tokenizer, args.prompt, [args.chosen, args.rejected], POSITIONS)
    if reason or args.chosen == args.rejected:
        raise InputError(f"The pair cannot be used: {reason or 'both answers are the same'}.")
    for flag, text, ids in zip(("--chosen", "--rejected"), (args.chosen, args.rejected), row["completions"]):
        if tokenizer.unk_token_id in ids:
            raise InputError(f"{flag} {text!r}: holds a word that the toy's language does not have.")
    return Walk(args, tokenizer, model, row)


@torch.no_grad()
def token_logps(walk: Walk, model) -> tuple[list[float], list[float]]:
    """Log-probabilities of the chosen and the rejected answer's tokens in nats."""
    states = dpo.hidden_states(model, walk.batch)[walk.batch["logit_index"]]  # [tokens, hidden]
    logps = dpo.token_logps(model.get_output_embeddings(), states, walk.batch["targets"])  # [tokens]
    return logps[: len(walk.chosen)].tolist(), logps[len(walk.chosen) :].tolist()


@dataclass
class Pass:
    """One forward and backward pass of a script's `compute_loss` over both answers."""

    loss: float
    logps: list[float]  # of chosen and rejected, summed over tokens
    slopes: list[float]  # d loss / d logps
    pushes: torch.Tensor  # - d loss / d logits, [tokens, vocabulary]
    metrics: dict[str, float]


def run_pass(script, model, batch: dict, numbers: dict) -> Pass:
    """Leaves gradients in the model's parameters."""
    logps, logits, plain = [], [], script.completion_logps

    def recorded_logps(*args):
        logps.append(plain(*args))
        logps[-1].retain_grad()
        return logps[-1]

    def record_gradient(head, inputs, output) -> None:
        output.register_hook(lambda gradient: logits.append(gradient.clone()))  # the loss works on it in place

    hook, script.completion_logps = model.get_output_embeddings().register_forward_hook(record_gradient), recorded_logps
    try:
        loss, metrics = script.compute_loss(model, batch, **numbers)
        loss.backward()
    finally:
        script.completion_logps = plain
        hook.remove()
    pushes = next(-gradient for gradient in logits if len(gradient) == len(batch["targets"]))
    values = {name: value.item() for name, value in metrics.items()}
    return Pass(loss.item(), logps[0].tolist(), logps[0].grad.tolist(), pushes, values)


def train_on_pair(script, walk: Walk, batch: dict, numbers: dict) -> dict[int, tuple[Pass, torch.nn.Module]]:
    """{steps: (pass, model)} after so many steps as a script makes them, from the reference on, all
    on this one pair.
    """
    model = copy.deepcopy(walk.reference)
    model = script.add_head(model, {}).double() if script is dph else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    looks = {}
    for step in range(max(STEPS) + 1):
        optimizer.zero_grad()
        now = run_pass(script, model, batch, numbers)
        if step in STEPS:
            looks[step] = (now, copy.deepcopy(model))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return looks


def methods_of(walk: Walk) -> dict[str, tuple]:
    """name -> (script, batch, the numbers that its `compute_loss` takes), each by its defaults."""
    return {
        "DPO": (dpo, walk.batch, {"beta": dpo.Args.beta}),
        "cDPO": (cdpo, walk.batch, {"beta": cdpo.Args.beta, "label_smoothing": cdpo.Args.label_smoothing}),
        "DPH": (dph, walk.batch, {}),
        "ULMA": (ulma, walk.labelled_batch(), {"label_kind": "binary", "beta": ulma.Args.beta}),
        "TYPO": (typo, walk.typo_batch(), {"lam": typo.Args.lam, "ref_term": typo.Args.ref_term}),
    }


# -- blocks of the page


def number(value: float, digits: int = 3, sign: bool = False) -> str:
    """A number as the page shows it; what rounds to zero has no sign."""
    value = 0.0 if abs(value) < 0.5 * 10**-digits else value
    return f"{value:+.{digits}f}" if sign and value else f"{value:.{digits}f}"


def counted(steps: int) -> str:
    """A number of steps in words."""
    return f"{steps} step{'s' * (steps != 1)}"


def table(heads: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def fenced(lines: list[str]) -> str:
    """Lines as they stand."""
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])


def pair_block(walk: Walk) -> str:
    args, row = walk.args, world.row_of(walk.args.prompt)
    rewards = [world.true_reward(row, answer) for answer in (args.chosen, args.rejected)]
    wins = 1 / (1 + math.exp(rewards[1] - rewards[0]))
    lines = [f"x    {args.prompt}"]
    for name, answer, reward in zip(("y_w", "y_l"), (args.chosen, args.rejected), rewards):
        lines.append(f"{name} {answer:<40} r*(x, {name}) = {number(reward, 1):>4}")
    return fenced([*lines, f"p(y_w beats y_l) = sigma(r*(x, y_w) - r*(x, y_l)) = {number(wins)}"])


def tokens_block(walk: Walk) -> str:
    lines = []
    for name, ids in (("prompt", walk.prompt), ("chosen", walk.chosen), ("rejected", walk.rejected)):
        words = walk.words(ids)
        widths = [max(len(word), len(str(i))) for word, i in zip(words, ids)]
        lines.append(f"{name:<10}" + "  ".join(f"{word:>{n}}" for word, n in zip(words, widths)))
        lines.append(" " * 10 + "  ".join(f"{i:>{n}}" for i, n in zip(ids, widths)))
    return fenced(lines)


def line_block(walk: Walk) -> str:
    """Each column of the pair's line: token, position, what its state predicts, which columns it
    sees.
    """
    batch, sides = walk.batch, ("chosen", "rejected")
    predicted: dict[int, list[str]] = {}
    for column, target, s in zip(*(batch[name].tolist() for name in ("logit_index", "targets", "sequence_ids"))):
        predicted.setdefault(column, []).append(f"{walk.words([target])[0]} ({sides[s]})")
    lines = ["column  token     position  predicts                       sees"]
    visible = (batch["attention_mask"][0, 0] == 0).tolist()
    positions = batch["position_ids"][0].tolist()
    for column, word in enumerate(walk.words(batch["input_ids"][0].tolist())):
        sees = "".join("#" if seen else "." for seen in visible[column])
        goal = ", ".join(predicted.get(column, ["-"]))
        lines.append(f"{column:>6}  {word:<8}  {positions[column]:>8}  {goal:<29}  {sees}")
    return fenced(lines)


def side_by_side(walk: Walk, heads: list[str], columns: list[tuple[list, list]], last: list) -> str:
    """A table with a line for each token of either answer."""
    rows = []
    for i in range(max(len(walk.chosen), len(walk.rejected))):
        row: list = [i + 1]
        for side, ids in enumerate((walk.chosen, walk.rejected)):
            row += [f"`{walk.words([ids[i]])[0]}`" if i < len(ids) else ""]
            row += [both[side][i] if i < len(ids) else "" for both in columns]
        rows.append(row)
    names = ["token", "chosen", *heads, "rejected", *heads]
    return table(names, [*rows, last] if last else rows)


def logps_block(walk: Walk) -> str:
    logps = token_logps(walk, walk.reference)
    cells = tuple([number(x) for x in side] for side in logps)
    sums = ["sum", "", number(sum(logps[0])), "", number(sum(logps[1]))]
    return side_by_side(walk, ["log pi"], [cells], sums)


def start_block(walk: Walk, before: Pass) -> str:
    lines = []
    for name, now in zip(("chosen", "rejected"), before.logps):
        ref = walk.batch[f"ref_{name}_logps"].item()
        lines.append(f"{name + ' log-ratio':<26}{number(now)} - ({number(ref)}) = {number(now - ref)}")
    h = before.metrics["rewards/margins"] / dpo.Args.beta
    lines.append(f"{'h':<26}{number(h)}")
    lines.append(f"{'loss':<26}-log sigma({dpo.Args.beta} * {number(h)}) = {number(before.loss, 4)}")
    for name, slope in zip(("y_w", "y_l"), before.slopes):
        lines.append(f"d loss / d log pi({name}|x)  {number(slope, sign=True)}")
    return fenced(lines)


def pushes_block(walk: Walk, before: Pass) -> str:
    """Of each token: its probability, and how hard its own logit is pushed."""
    logps, n = token_logps(walk, walk.reference), len(walk.chosen)
    own = before.pushes.gather(-1, walk.batch["targets"][:, None])[:, 0].tolist()
    probabilities = tuple([number(math.exp(x)) for x in side] for side in logps)
    pushes = tuple([number(x, sign=True) for x in side] for side in (own[:n], own[n:]))
    return side_by_side(walk, ["p", "push"], [probabilities, pushes], [])


def fork_block(walk: Walk, before: Pass) -> str:
    """What both answers together ask of the logits where they still are one text, and where they
    part.
    """
    k = min(walk.fork, len(walk.chosen) - 1, len(walk.rejected) - 1)
    pushes = before.pushes[: len(walk.chosen)][: k + 1] + before.pushes[len(walk.chosen) :][: k + 1]
    shared = pushes[:k].abs().max().item() if k else 0.0
    lines = [f"the {k} tokens that both begin with: largest push on any logit   {number(shared)}"]
    parting = pushes[k].clone()
    for ids in (walk.chosen, walk.rejected):
        lines.append(f"where they part: {walk.words([ids[k]])[0]:<12} {number(pushes[k, ids[k]].item(), sign=True)}")
        parting[ids[k]] = 0
    return fenced([*lines, f"where they part: the largest other {number(parting.abs().max().item())}"])


def step_block(before: Pass, after: Pass) -> str:
    names = {
        "log pi(y_w\\|x)": "logps/chosen",
        "log pi(y_l\\|x)": "logps/rejected",
        "reward of y_w, beta times its log-ratio": "rewards/chosen",
        "reward of y_l": "rewards/rejected",
        "margin, beta h": "rewards/margins",
        "loss": "loss",
    }
    rows = [[name, *(number(p.metrics[key], 4) for p in (before, after))] for name, key in names.items()]
    return table(["", "before", "after"], rows)


def moved_block(walk: Walk, model) -> str:
    """The tokens whose log-probability the step changed."""
    old, new, lines = token_logps(walk, walk.reference), token_logps(walk, model), []
    for name, ids, before, after in zip(("chosen", "rejected"), walk.row["completions"], old, new):
        changes = [number(b - a, sign=True) for a, b in zip(before, after)]
        moved = [f"{word} {change}" for word, change in zip(walk.words(ids), changes) if change != number(0.0)]
        lines.append(f"{name:<10}" + "   ".join(moved))
    return fenced(lines)


def slope_at(loss, margin: float, beta: float) -> float:
    """d loss / d log pi(y_w|x) of a loss on four log-probabilities where beta * h is `margin`."""
    zero = torch.zeros(1, dtype=torch.float64)
    logps = torch.tensor([margin / beta], dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(logps, zero, zero, zero, beta).sum(), logps)[0].item()


def beta_block() -> str:
    rows = []
    for beta in BETAS:
        start = slope_at(dpo.dpo_loss, 0.0, beta)
        margin = math.log(19)  # where sigma(-margin) is .05, a tenth of the half that it is at 0
        assert math.isclose(slope_at(dpo.dpo_loss, margin, beta), start / 10)
        rows.append([beta, number(-start), number(margin / beta, 2)])
    return table(["beta", "push at h = 0", "h at which a tenth of it is left, nats"], rows)


def methods_block(looks: dict[str, dict]) -> str:
    """Each method where the policy is the reference, and what its first step does."""
    rows = []
    for name, look in looks.items():
        (before, _), (after, _), _ = look.values()
        slopes = [number(x, sign=True) for x in before.slopes]
        changes = [number(b - a, sign=True) for a, b in zip(before.logps, after.logps)]
        rows.append([name, number(before.loss, 4), *slopes, number(after.loss, 4), *changes])
    slopes = [f"d loss / d log pi({name}\\|x)" for name in ("y_w", "y_l")]
    return table(["", "loss", *slopes, "loss after a step", "log-ratio of y_w", "of y_l"], rows)


def later_block(looks: dict[str, dict]) -> str:
    """The same after many steps on this pair."""
    rows = []
    for name, look in looks.items():
        start, now = look[0][0], look[max(STEPS)][0]
        changes = [b - a for a, b in zip(start.logps, now.logps)]
        margin = dpo.Args.beta * (changes[0] - changes[1])
        rows.append([name, *(number(x, 2, sign=True) for x in changes), number(margin, 2), number(now.loss)])
    return table(["", "log-ratio of y_w", "of y_l", f"{dpo.Args.beta} h", "loss"], rows)


def cdpo_block() -> str:
    def smoothed(*args):
        return cdpo.cdpo_loss(*args, cdpo.Args.label_smoothing)

    rows = []
    for name, loss in (("DPO", dpo.dpo_loss), ("cDPO", smoothed)):
        rows.append([name, *(number(slope_at(loss, margin, dpo.Args.beta), sign=True) for margin in MARGINS)])
    return table(["d loss / d log pi(y_w\\|x) at beta h =", *map(number, MARGINS)], rows)


def dph_block(look: dict[int, tuple]) -> str:
    names = {"reward of y_w": "rewards/chosen", "reward of y_l": "rewards/rejected", "loss": "loss"}
    passes = [now for now, _ in look.values()]
    rows = [[name, *(number(now.metrics[key], 4) for now in passes)] for name, key in names.items()]
    return table(["", *(f"after {counted(n)}" for n in look)], rows)


def typo_block(walk: Walk, batch: dict, look: dict[int, tuple]) -> str:
    sample = batch["ref_sample"]
    lines = [f"the reference's own answer    {walk.tokenizer.decode(sample['targets'].tolist())}"]
    for steps, (_, model) in look.items():
        with torch.no_grad():
            kl = typo.forward_kl(typo.completion_logits(model, sample), sample["ref_logits"]).sum().item()
        lines.append(f"{'KL along it, ' + counted(steps):<30}{number(kl, 4)}")
    return fenced(lines)


def blocks(args: Args | None = None) -> dict[str, str]:
    """name -> Markdown of each block of docs/reading.md."""
    walk = walk_of(args or Args())
    methods = methods_of(walk)
    looks = {name: train_on_pair(script, walk, *given) for name, (script, *given) in methods.items()}
    (before, _), (after, model), _ = looks["DPO"].values()
    return {
        "pair": pair_block(walk),
        "tokens": tokens_block(walk),
        "line": line_block(walk),
        "logps": logps_block(walk),
        "start": start_block(walk, before),
        "pushes": pushes_block(walk, before),
        "fork": fork_block(walk, before),
        "beta": beta_block(),
        "step": step_block(before, after),
        "moved": moved_block(walk, model),
        "methods": methods_block(looks),
        "later": later_block(looks),
        "cdpo": cdpo_block(),
        "dph": dph_block(looks["DPH"]),
        "ulma": fork_block(walk, looks["ULMA"][0][0]),
        "typo": typo_block(walk, methods["TYPO"][1], looks["TYPO"]),
    }


def main(args: Args) -> None:
    for name, text in blocks(args).items():
        print(f"\n{name}\n\n{text}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
