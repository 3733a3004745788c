"""Multiple choice: which choice a model takes, by its log-probabilities and by its reward head.

The texts and their split into tokens are lm-eval's (see choices/templates.py), so that accuracies
are the harness's own. One pass reads prompt, choice and EOS: the choice's log-probability is summed
before the EOS, as the harness does, and the head's reward is read at it, where dph.py trains it and
where the paper (arXiv 2405.20053) reads it: the end of turn.
"""

from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F

from choices.templates import DELIMITER, Question, question_of_row
from common.batches import collate, row_length
from common.files import read_rows
from common.models import context_length
from common.oracle import choose_layout
from report import progress
from tokens.encode import ids_of_text

TOKENS = 2048  # of a batch, padding and masked entries included
CHUNK = 256  # positions whose logits exist at a time
SCORERS = {  # what ranks the choices of a question
    "acc": "log-probability, summed: lm-eval's acc",
    "acc_norm": "log-probability per character: lm-eval's acc_norm",
    "acc_token": "log-probability per token: the paper's",
    "acc_implicit": "log-ratio to the base model, EOS included: DPO's implicit reward",
    "acc_head": "the reward head",
}


def read_questions(source: str) -> tuple[list[Question], Counter]:
    """The questions of a multiple-choice file, and how many rows were dropped for which reason."""
    questions, dropped = [], Counter()
    for where, row in read_rows(source):
        question, reason = question_of_row(source, where, row)
        if reason:
            dropped[reason] += 1
        else:
            questions.append(question)
    return questions, dropped


def encode_question(tokenizer, question: Question, limit: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, ids of choice and EOS) for each choice, as lm-eval splits the text: white space
    at the prompt's end belongs to the choice, whose tokens are those after as many as the prompt
    alone has.

    limit: of tokens in all; a longer prompt loses its beginning, as much for every choice."""
    sequences = []
    for prompt, choice in zip(question.prompts, question.choices):
        whole = ids_of_text(tokenizer, prompt + DELIMITER + choice)
        if whole[-1] == tokenizer.eos_token_id:  # as some tokenizers end every text
            whole = whole[:-1]
        begin = len(ids_of_text(tokenizer, prompt.rstrip()))
        sequences.append((whole[:begin], [*whole[begin:], tokenizer.eos_token_id]))
    excess = max(0, max(len(prompt) + len(ids) for prompt, ids in sequences) - limit)
    return [(prompt[excess:], ids) for prompt, ids in sequences]


def rows_of(sequences: list[tuple[list[int], list[int]]]) -> list[dict]:
    """Rows for `collate`: one with all choices where they share the prompt's tokens, else one for
    each."""
    prompts = [prompt for prompt, _ in sequences]
    if all(prompt == prompts[0] for prompt in prompts):
        return [{"prompt": prompts[0], "completions": [ids for _, ids in sequences]}]
    return [{"prompt": prompt, "completions": [ids]} for prompt, ids in sequences]


def completion_scores(model, batch: dict, head: torch.Tensor | None = None) -> torch.Tensor:
    """Of every completion its summed log-probability without its last token (EOS), that of EOS, in
    nats, and the head's reward at EOS (0 without a head), [sequences, 3], float32.

    head: [1, hidden]."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)  # [lines * length, hidden]
    ends = hidden[batch["last"]]  # [sequences, hidden]
    if "logits_to_keep" in batch:  # a model that scales or caps its logits
        mask = batch["attention_mask"]
        logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits.flatten(0, 1)
        states, logits_of = logits[batch["logit_index"]], torch.nn.Identity()
    else:
        states, logits_of = hidden[batch["logit_index"]], model.get_output_embeddings()
    chunks = zip(states.split(CHUNK), batch["targets"].split(CHUNK))
    logps = torch.cat([-F.cross_entropy(logits_of(x).float(), ids, reduction="none") for x, ids in chunks])  # [tokens]
    sequence, scores = batch["sequence_ids"], logps.new_zeros(len(ends), 3)
    is_eos = torch.ones_like(sequence, dtype=torch.bool)
    is_eos[:-1] = sequence[1:] != sequence[:-1]  # the tokens of a completion stand side by side
    scores[:, 0].index_add_(0, sequence[~is_eos], logps[~is_eos])
    scores[sequence[is_eos], 1] = logps[is_eos]
    if head is not None:
        scores[:, 2] = (ends.float() * head[0].to(ends.device).float()).sum(-1)
    return scores


def batches_of(rows: list[dict]) -> list[list[int]]:
    """Numbers of rows for each batch: as many choices each, similar lengths, at most TOKENS."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]["completions"]), row_length(rows[i])))
    cut: list[list[int]] = []
    for i in order:
        row, first = rows[i], rows[cut[-1][0]] if cut else None
        fits = first and len(first["completions"]) == len(row["completions"])
        if fits and (len(cut[-1]) + 1) * row_length(row) <= TOKENS:
            cut[-1].append(i)
        else:
            cut.append([i])
    return cut


@torch.no_grad()
def score_questions(
    model, tokenizer, questions: list[Question], head: torch.Tensor | None = None, dtype=torch.float32
) -> list[dict]:
    """What a model says of the choices of each question: {"logps", "eos", "tokens", "rewards"},
    each a list of a number for every choice; nats, EOS neither in logps nor in tokens.

    Args:
        head: [1, hidden] of a dph.py run; None: all rewards are 0.
        dtype: of matrix products; torch.bfloat16 is faster, and off by hundredths of a nat.
    """
    limit = context_length(model)
    encoded = [rows_of(encode_question(tokenizer, question, limit)) for question in questions]
    rows = [row for group in encoded for row in group]
    pad_id, device = tokenizer.pad_token_id, next(model.parameters()).device
    model.eval()

    def summed(batch: dict) -> torch.Tensor:
        return completion_scores(model, batch)[:, :2].sum(1)

    layout = choose_layout(summed, model, {"questions": rows}, pad_id, device, True)
    batch_of = partial(collate, pad_id=pad_id, layout=layout, device=device, dtype=dtype)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    scores: list[list] = [[] for _ in rows]
    for numbers in progress.track(batches_of(rows), f"scores of {len(questions):,} questions"):
        with autocast():
            values = completion_scores(model, batch_of([rows[i] for i in numbers]), head)
        by_row = values.unflatten(0, (-1, len(numbers))).transpose(0, 1).tolist()  # [rows, choices, 3]
        for i, numbers_of_row in zip(numbers, by_row):
            scores[i] = numbers_of_row
    remaining, lines = iter(zip(rows, scores)), []
    for group in encoded:
        mine = [next(remaining) for _ in group]
        tokens = [len(ids) - 1 for row, _ in mine for ids in row["completions"]]
        logps, eos, rewards = zip(*(values for _, choices in mine for values in choices))
        lines.append({"logps": list(logps), "eos": list(eos), "tokens": tokens, "rewards": list(rewards)})
    return lines


def right_by(
    questions: list[Question], scores: list[dict], base_scores: list[dict] | None = None
) -> dict[str, list[bool]]:
    """Whether each of SCORERS finds the right choice, for every question; of equal choices the
    first one is taken, as by lm-eval.

    base_scores: of the model that training began with, for acc_implicit. A scorer that is missing,
    or that gives all choices of all questions the same, is left out."""
    ranked: dict[str, list[list[float]]] = {name: [] for name in SCORERS}
    for number, (question, line) in enumerate(zip(questions, scores, strict=True)):
        logps = line["logps"]
        ranked["acc"].append(logps)
        ranked["acc_norm"].append([x / max(1, len(choice)) for x, choice in zip(logps, question.choices)])
        ranked["acc_token"].append([x / n for x, n in zip(logps, line["tokens"])])
        ranked["acc_head"].append(line["rewards"])
        if base_scores:
            sums, base = ([a + b for a, b in zip(s["logps"], s["eos"])] for s in (line, base_scores[number]))
            ranked["acc_implicit"].append([a - b for a, b in zip(sums, base, strict=True)])
    right = {}
    for name, values in ranked.items():
        if any(len(set(choices)) > 1 for choices in values):
            picks = [choices.index(max(choices)) for choices in values]
            right[name] = [pick == question.right for pick, question in zip(picks, questions)]
    return right
