"""The plain log-probabilities and rewards that every fast path is tested against, and the choice of
layout.

Deliberately plain: two lines per pair, full logits, float32, nothing gathered and nothing shared.
"""

import torch

from common import InputError, batches
from common.processes import print0
from report import progress


@torch.no_grad()
def plain_token_logps(model, sequences: list[tuple], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of completion tokens by the shortest road: full logits of right-padded
    lines, float32.

    Args:
        sequences: (prompt ids, completion ids) of each sequence.

    Returns:
        token log-probabilities [batch, length - 1] in nats, zero where mask is, and the mask
        [batch, length - 1] of completion tokens.
    """
    device = next(model.parameters()).device
    length = max(len(p) + len(c) for p, c in sequences)
    lines = [p + c + [pad_id] * (length - len(p) - len(c)) for p, c in sequences]
    ids = torch.tensor(lines, device=device)  # [batch, length]
    position = torch.arange(length, device=device)
    prompt = torch.tensor([len(p) for p, _ in sequences], device=device)[:, None]
    end = torch.tensor([len(p) + len(c) for p, c in sequences], device=device)[:, None]
    logits = model(input_ids=ids, attention_mask=(position < end).long(), use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Position t scores the token at t + 1.
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    mask = ((position >= prompt) & (position < end))[:, 1:]
    return logps.masked_fill(~mask, 0.0), mask


def plain_logps(model, sequences, pad_id: int, batch_size: int = 8) -> torch.Tensor:
    """Summed completion log-probabilities in nats, [sequences], float32, on the CPU: the oracle."""
    chunks = [sequences[i : i + batch_size] for i in range(0, len(sequences), batch_size)]
    passes = progress.track(chunks, f"log-probabilities of {len(sequences):,} answers")
    return torch.cat([plain_token_logps(model, chunk, pad_id)[0].sum(-1).cpu() for chunk in passes])


@torch.no_grad()
def plain_rewards(model, head: torch.Tensor, sequences: list[tuple[list[int], list[int]]]) -> list[float]:
    """Rewards of a head [1, hidden] at each sequence's last token, one at a time, float32."""
    device, rewards = next(model.parameters()).device, []
    for prompt, completion in sequences:
        ids = torch.tensor([prompt + completion], device=device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        rewards.append((hidden.float() @ head[0].float().to(device)).item())
    return rewards


def sequences_of(rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) answer by answer, in the order of `collate`."""
    return [(row["prompt"], row["completions"][j]) for j in range(len(rows[0]["completions"])) for row in rows]


@torch.no_grad()
def changes_logits(model, ids: list[int]) -> bool:
    """Whether the model does something to its output layer's product, as soft-capping or scaling of
    logits does.

    Measured with a product a thousand times too large: a cap is nearly invisible on the small
    logits that training may begin with."""
    enlarged = []

    def enlarge(module, inputs, output):
        enlarged.append(output * 1e3)
        return enlarged[-1]

    hook = model.get_output_embeddings().register_forward_hook(enlarge)
    try:
        logits = model(input_ids=torch.tensor([ids], device=next(model.parameters()).device), use_cache=False).logits
    finally:
        hook.remove()
    return not enlarged or not torch.equal(logits.float(), enlarged[-1].float())


def longest_rows(splits: dict) -> list[dict]:
    """The longest row, and that with the longest prompt and answer, which a window cuts first."""
    rows = [row for rows in splits.values() for row in rows]
    longest = max(rows, key=batches.row_length)
    reach = max(rows, key=lambda row: len(row["prompt"]) + max(map(len, row["completions"])))
    if reach is longest or len(reach["completions"]) != len(longest["completions"]):
        return [longest]
    return [longest, reach]


@torch.no_grad()
def sees_the_future(model, ids: list[int]) -> bool:
    """Whether a change of the last token moves earlier logits, as in bidirectional models."""
    changed = [*ids[:-1], ids[-1] - 1 if ids[-1] else 1]
    inputs = torch.tensor([ids, changed], device=next(model.parameters()).device)
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
    return not torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def choose_layout(logps_of, model, splits: dict, pad_id: int, device, share_prompt: bool, say=print0) -> str:
    """The fastest layout of `collate` whose log-probabilities agree with the plain ones on the
    longest rows.

    Masks that a model ignores (sliding windows, ALiBi) and output layers with scaling or
    soft-capping would be wrong without a word, so this is measured before the first step.
    `logps_of(batch)` returns summed log-probabilities [sequences]. A change of layout is said.

    Raises InputError where no layout agrees, or where the model is no causal one."""
    rows = longest_rows(splits)
    if sees_the_future(model, rows[0]["prompt"] + rows[0]["completions"][0]):
        raise InputError(
            "This model's logits depend on later tokens: it is bidirectional, not a causal language model."
        )
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    expected = plain_logps(model, sequences_of(rows), pad_id)
    tolerance = 1e-3 + 1e-6 * expected.abs().max().item()
    features = {"shared": "sharing the prompt", "rows": "the gathered output layer"}
    layouts = (["shared"] if share_prompt else []) + ["rows", "model_head"]
    if changes_logits(model, rows[0]["prompt"]):
        layouts = ["model_head"]
        say("This model scales or caps its logits, so its own output layer is used: slower, and right.")
    try:
        for layout in layouts:
            try:
                logps = logps_of(batches.collate(rows, pad_id, layout, device)).float().cpu()
                gap, reason = (logps - expected).abs().max().item(), ""
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
                gap, reason = float("inf"), f"fails ({type(error).__name__})"
            if gap <= tolerance:
                return layout
            if layout in features:
                reason = reason or f"is off by {gap:.2g} nats"
                say(f"With this model {features[layout]} {reason} on the longest rows: not used; slower, and right.")
    finally:
        torch.set_float32_matmul_precision(precision)
    raise InputError("This model's log-probabilities in a plain pass and in every layout differ; it cannot be trained.")
