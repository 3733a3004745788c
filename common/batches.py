"""Rows of token ids, the order in which training sees them, and batches of tensors."""

import random
from collections import Counter

import torch

MOST_STEPS = 10_000_000  # of a plan
MASKED = -1e9  # added to attention scores; finite: a row of padding gives no nan, and its exponential is exactly 0


class Rows(list):
    """Encoded rows, each {"prompt": ids, "completions": [ids, ...], "texts": the row as read, and
    further columns}.

    `seen` is how many rows were read, `dropped` counts the unusable ones by reason, `moved` the
    boundaries between prompt and completion that had to be moved."""

    def __init__(self, rows=(), seen: int = 0, dropped: dict | None = None, moved: int = 0):
        super().__init__(rows)
        self.seen, self.dropped, self.moved = seen, Counter(dropped or {}), moved

    def subset(self, indices) -> "Rows":
        """The rows of these numbers."""
        return Rows([self[i] for i in indices], self.seen, self.dropped, self.moved)

    def add_columns(self, names: tuple[str, ...], values: torch.Tensor) -> None:
        """Gives every row the numbers of `values` [rows, names] under these names."""
        for row, numbers in zip(self, values.tolist(), strict=True):
            row.update(zip(names, numbers))

    def columns(self, *names: str) -> torch.Tensor:
        """Columns of numbers side by side, [rows, names], float32."""
        return torch.tensor([[row[name] for name in names] for row in self]).view(len(self), len(names))

    def describe(self, name: str) -> str:
        """The sentence printed at the start of a run."""
        parts = [f"{name}: {self.seen:,} rows read, {len(self):,} used"]
        if self.dropped:
            parts.append("dropped " + ", ".join(f"{n:,} ({reason})" for reason, n in self.dropped.most_common()))
        if self.moved:
            reasons = "a token spans prompt and answer, or the template's generation prompt is not kept"
            parts.append(f"in {self.moved:,} the boundary moved left ({reasons})")
        if tokens := count_tokens(self):
            parts.append(f"{tokens:,} tokens")
        return "; ".join(parts) + "."


def row_length(row) -> int:
    """Tokens of a row in the shared-prompt layout; 0 for a number, which stands for a chunk."""
    return len(row["prompt"]) + sum(map(len, row["completions"])) if isinstance(row, dict) else 0


def count_tokens(rows: list[dict]) -> int:
    """Real tokens of rows, answers read one by one: prompt + completion for each, no padding."""
    return sum(len(row["prompt"]) + len(ids) for row in rows for ids in row["completions"])


def plan_batches(rows: list[dict], batch_size: int, epochs: float, max_steps: int, seed: int) -> list[list[int]]:
    """The order of training: the numbers of the rows of each optimiser step. A pure function, so a
    resumed run finds it again.

    Each epoch is shuffled anew. Rows of similar length are put into the same step, within windows
    of 16 steps, and the order of those steps is shuffled again: little padding, and what a step
    sees stays random across the data. The last step of an epoch may be smaller; its rows are random
    ones, since always the longest would otherwise be left for it and weigh more."""
    if not rows:
        raise ValueError("no rows to plan")
    rng, lengths = random.Random(seed), [row_length(row) for row in rows]
    plan, total = [], max(1, round(epochs * len(rows)))
    most = max_steps if max_steps >= 0 else MOST_STEPS
    while total > 0 and len(plan) < most:
        order = list(range(len(rows)))
        rng.shuffle(order)
        order = order[: min(total, len(order))]
        total -= len(order)
        window, full = 16 * batch_size, len(order) - len(order) % batch_size
        steps = []
        for start in range(0, full, window):
            by_length = sorted(order[start : min(start + window, full)], key=lambda i: lengths[i])
            cut = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
            rng.shuffle(cut)
            steps += cut
        plan += steps + ([order[full:]] if full < len(order) else [])
    if len(plan) >= MOST_STEPS > max_steps:
        raise ValueError(f"{epochs:g} epochs are more than {MOST_STEPS:,} steps")
    return plan[:most]


def planned_rows(rows: Rows, plan: list[list[int]]) -> tuple[Rows, list[list[dict]]]:
    """The rows that a plan uses, and the plan with rows in place of their numbers.

    With few steps on much data nothing is then computed for the other rows."""
    used = sorted({i for step in plan for i in step})
    return rows.subset(used), [[rows[i] for i in step] for step in plan]


def micro_batches(rows: list, size: int, rank: int = 0, world_size: int = 1) -> list[tuple[list, float]]:
    """This process's share of a step as [(rows, weight)], the same number of micro-batches on every
    process.

    Weights are `world_size`, since gradients are averaged over processes. A process with no row
    left gets the step's first row with weight 0: it must run forward and backward like the others,
    and its loss must count nothing."""
    chunks = []
    for start in range(0, len(rows), size * world_size):
        share = rows[start : start + size * world_size][rank::world_size]
        chunks.append((share, float(world_size)) if share else (rows[:1], 0.0))
    return chunks


def lines_of(rows: list[dict], layout: str) -> list[tuple[list[int], list[tuple[int, list[int]]]]]:
    """The lines of a batch as (prompt, [(number of the sequence, its completion), ...])."""
    most = max(len(row["completions"]) for row in rows)
    order = [(i, j) for j in range(most) for i, row in enumerate(rows) if j < len(row["completions"])]
    if layout != "shared":
        return [(rows[i]["prompt"], [(s, rows[i]["completions"][j])]) for s, (i, j) in enumerate(order)]
    parts: list[list] = [[] for _ in rows]
    for s, (i, j) in enumerate(order):
        parts[i].append((s, rows[i]["completions"][j]))
    return list(zip([row["prompt"] for row in rows], parts))


def collate(rows: list[dict], pad_id: int, layout: str, device, dtype=torch.float32) -> dict:
    """A batch of rows with one or more completions each.

    Sequences are numbered answer by answer: of n rows with two answers, sequence i is the chosen
    answer of row i and n + i its rejected one; rows may differ in how many they have. layout
    "shared": one line `[prompt | first | second]` a row; positions restart after the prompt for
    each answer, and the float mask lets a token see the prompt and its own answer only. layout
    "rows": one line `[prompt | answer]` a sequence. layout "model_head": the same, and
    `logits_to_keep` tells the model's own output layer how many last positions are asked for.

    Returns a dict of tensors on `device`:
        input_ids, position_ids   [lines, length] int64
        attention_mask            [lines, 1, length, length] of `dtype`, 0 or -1e9 ("shared");
                                  [lines, length] int64, 1 or 0
        logit_index               [tokens] int64: index into the flattened lines * length of the
                                  position that predicts a token
        targets                   [tokens] int64: the completion tokens
        sequence_ids              [tokens] int64: the sequence that each completion token belongs to
        completion_tokens         [sequences] int64: completion length
        last                      [sequences] int64: flat index of each sequence's last token
    and each further column of the rows under its name: numbers as [rows] float32, tensors stacked.
    """
    lines = lines_of(rows, layout)
    sequences = sum(len(row["completions"]) for row in rows)
    length = max(len(prompt) + sum(len(ids) for _, ids in parts) for prompt, parts in lines)
    input_ids, position_ids, segments, logit_index, targets, sequence_ids = [], [], [], [], [], []
    completion_tokens, last = [0] * sequences, [0] * sequences
    for line, (prompt, parts) in enumerate(lines):
        ids, positions, segment, start = list(prompt), list(range(len(prompt))), [0] * len(prompt), line * length
        for number, (s, completion) in enumerate(parts, start=1):
            k, begin = len(completion), start + len(ids)
            # The first token is predicted by the prompt's last.
            logit_index += [start + len(prompt) - 1, *range(begin, begin + k - 1)]
            targets += completion
            sequence_ids += [s] * k
            completion_tokens[s], last[s] = k, begin + k - 1
            ids += completion
            positions += range(len(prompt), len(prompt) + k)
            segment += [number] * k
        padding = length - len(ids)
        input_ids.append(ids + [pad_id] * padding)
        position_ids.append(positions + [0] * padding)
        segments.append(segment + [-1] * padding)

    batch = {"input_ids": input_ids, "position_ids": position_ids, "logit_index": logit_index, "targets": targets}
    batch |= {"sequence_ids": sequence_ids, "completion_tokens": completion_tokens, "last": last}
    batch = {name: to_device(torch.tensor(values, dtype=torch.int64), device) for name, values in batch.items()}
    batch["attention_mask"] = attention_mask(to_device(torch.tensor(segments), device), layout, dtype)
    if layout == "model_head":
        batch["logits_to_keep"] = length - min(i % length for i in logit_index)
    for name in rows[0].keys() - {"prompt", "completions", "texts"}:
        values = [row[name] for row in rows]
        if isinstance(values[0], torch.Tensor):
            batch[name] = to_device(torch.stack(values), device)
        elif isinstance(values[0], float):
            batch[name] = to_device(torch.tensor(values, dtype=torch.float32), device)
    return batch


def attention_mask(segments: torch.Tensor, layout: str, dtype=torch.float32) -> torch.Tensor:
    """The mask of lines from `segments` [lines, length]: 0 prompt, 1.. an answer, -1 padding.

    Of another dtype than the scores each layer would keep a copy of it for the backward pass."""
    if layout != "shared":
        return (segments >= 0).long()
    key, query, length = segments[:, None, :], segments[:, :, None], segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    visible = causal & ((key == query) | (key == 0))
    zero, masked = torch.tensor([0.0, MASKED], dtype=dtype, device=segments.device)
    return torch.where(visible, zero, masked)[:, None]


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """The tensor on a device, copied while a GPU computes."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
