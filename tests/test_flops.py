"""Floating-point operations of training against torch's own count, and the peaks of devices."""

import pytest
import torch

from pretraining import flops
from tests import models


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_floating_point_operations_of_training(kind):
    """Against torch's own count of products in a forward and a backward pass; norms and biases are
    the small difference.
    """
    from torch.utils.flop_counter import FlopCounterMode

    make = {"gpt2": models.tiny_gpt2, "llama": models.tiny_llama}[kind]
    shape = (
        {"n_embd": 64, "n_layer": 3}
        if kind == "gpt2"
        else {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "num_key_value_heads": 4}
    )
    model = make(500, **shape, attn_implementation="eager")
    ids = torch.zeros(2, 96, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert flops.training_flops(model, 96) == pytest.approx(counted.get_total_flops() / ids.numel(), rel=0.03)


def test_the_peak_of_a_gpu_by_its_name(monkeypatch):
    assert flops.peak_flops(torch.device("cpu"), torch.bfloat16) is None
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H200": 989e12,
        "Something Else": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_flops(torch.device("cuda", 0), torch.bfloat16) == peak
        assert flops.peak_flops(torch.device("cuda", 0), torch.float32) is None
