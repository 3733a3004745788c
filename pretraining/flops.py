"""Floating-point operations of training, and what a device could do of them."""

import torch

from common.processes import world_size

PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device, dtype) -> float | None:
    """Peak of dense bfloat16 products of a GPU in FLOP/s, float32 sums, as its maker states it.

    None for other devices and for float32.
    """
    if torch.device(device).type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def training_flops(model, context: int) -> float:
    """Floating-point operations of training on one token, forward and backward: 6 for each weight
    that multiplies, and attention over `context`.

    Embeddings are looked up and count only where they are the output layer too. Attention counts
    all of the context, as is usual, though half of it is masked; recomputed activations are not
    counted.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    looked_up = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.weight is not head.weight
    )
    weights = sum(p.numel() for p in model.parameters()) - looked_up
    return 6.0 * weights + 12.0 * config.num_hidden_layers * config.hidden_size * context


def peak_share(flops_per_token: float, tokens: int, seconds: float, device, dtype) -> float | None:
    """Share of the peak of all devices that training reached; None where the peak is not known."""
    peak = peak_flops(device, dtype)
    if not peak or not seconds:
        return None
    return tokens / seconds * flops_per_token / (peak * world_size())
