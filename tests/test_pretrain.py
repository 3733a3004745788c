"""Pretraining on a scored corpus: the forward pass against plain logits, new tokens, and main() of the six scripts in short runs on the toy corpus."""

import importlib
import json
import math
import signal
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch

from common import runtime
from tests import models
from tests.house import FAMILIES
from tests.runs import lines_of, start_process

SCRIPTS = FAMILIES["scored corpus"]
every_script = pytest.mark.parametrize("script", SCRIPTS)
MODULES = {script: importlib.import_module(script) for script in SCRIPTS}


# ----------------------------------------------------------------------------------------------------- the forward pass


def batch_of(vocabulary: int, rows: int = 3, context: int = 12, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, context), generator=generator)
    return {"input_ids": ids, "scores": torch.rand(rows, context, generator=generator)}


@every_script
@pytest.mark.parametrize("chunk", [5, 2048])
def test_target_logps_are_exact_on_a_bigram_table(script, chunk, bigram, monkeypatch):
    """Position t predicts the token at t + 1, whatever stands before, and in however many pieces the output layer runs."""
    module, batch = MODULES[script], batch_of(len(bigram.tokenizer))
    monkeypatch.setattr(module, "CHUNK", chunk)
    model, targets = bigram.load(), batch["input_ids"][:, 1:]
    with torch.no_grad():
        got = module.target_logps(model, module.states(model, batch), targets)
    expected = bigram.table[batch["input_ids"][:, :-1], targets]
    assert got.shape == targets.shape
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


@every_script
def test_chunked_logits_change_no_gradient(script, toy_tokenizer, monkeypatch):
    """The loss as the script takes it, in pieces of 5 targets, against the same formula on the model's own full logits."""
    module, batch = MODULES[script], batch_of(len(toy_tokenizer))
    args = module.Args(threshold=0.5)
    gradients = []
    for chunk in (5, 2048, None):
        model = models.tiny_gpt2(len(toy_tokenizer))
        model = module.add_value_head(model, {}) if script == "awr_pretrain" else model
        if chunk:
            monkeypatch.setattr(module, "CHUNK", chunk)
        else:  # the plain road
            monkeypatch.setattr(
                module, "target_logps", lambda model, hidden, targets: model.lm_head(hidden).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
            )
        module.compute_loss(model, batch, args)[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, value in gradients[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item() + 1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_the_value_is_trained_by_the_squared_error_alone_and_so_is_the_backbone_through_it(toy_tokenizer):
    module, batch = MODULES["awr_pretrain"], batch_of(len(toy_tokenizer))

    def gradients(alpha, moved=0.0, logps=True):
        model = module.add_value_head(models.tiny_gpt2(len(toy_tokenizer)), {})
        torch.nn.init.constant_(model.value.weight, moved)
        with mock.patch.object(module, "target_logps", module.target_logps if logps else lambda model, hidden, targets: torch.zeros(targets.shape)):
            module.compute_loss(model, batch, module.Args(alpha=alpha))[0].backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}

    assert not gradients(1.0, moved=0.1)["value.weight"].any()  # nothing but the weighted likelihood: the value gets no gradient
    at_zero = gradients(0.5)
    model = module.add_value_head(models.tiny_gpt2(len(toy_tokenizer)), {})
    with torch.no_grad():
        hidden = module.states(model, batch)
    advantages = 0.5 - batch["scores"][:, 1:]
    slope = -2 * 0.5 * advantages * -0.25  # dV/d(w . h) = -sigma (1 - sigma) = -1/4 at zero
    torch.testing.assert_close(at_zero["value.weight"][0], (slope[..., None] * hidden).sum((0, 1)), rtol=1e-4, atol=1e-4)
    through_the_head = gradients(0.5, moved=0.1, logps=False)
    assert through_the_head["transformer.h.0.mlp.c_fc.weight"].abs().max() > 1e-4


def test_the_value_head_starts_at_minus_one_half_or_where_it_was_saved(toy_tokenizer):
    module = MODULES["awr_pretrain"]
    model = module.add_value_head(models.tiny_gpt2(len(toy_tokenizer)), {})
    hidden = torch.randn(2, 3, 32)
    assert (module.values_of(model, hidden) == -0.5).all()
    saved = torch.randn(1, 32)
    model = module.add_value_head(model, {"value.weight": saved})
    torch.testing.assert_close(module.values_of(model, hidden), -torch.sigmoid(hidden @ saved[0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.values_of(model, hidden.bfloat16()).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ new tokens


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_are_the_mean_of_the_old_ones_and_a_little_noise(tied):
    module = MODULES["conditional_pretrain"]
    tokenizer = models.byte_tokenizer()
    model = models.tiny_gpt2(len(tokenizer), tie_word_embeddings=tied)
    before = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    n = len(tokenizer)
    ids = module.new_tokens(model, tokenizer, (module.GOOD, module.BAD), seed=0)
    assert ids == [n, n + 1] == tokenizer.convert_tokens_to_ids([module.GOOD, module.BAD])
    assert len(tokenizer) == n + 2 == model.config.vocab_size
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    assert (layers[0].weight is layers[1].weight) == tied
    for layer, old in zip(layers, before):
        torch.testing.assert_close(layer.weight[:n], old, rtol=0, atol=0)
        noise = (layer.weight[n:] - old.mean(0)).detach()
        assert noise.std().item() == pytest.approx(0.01, rel=0.4)
        assert (noise[0] != noise[1]).all()
    rows = layers[0].weight.detach().clone()
    assert module.new_tokens(model, tokenizer, (module.GOOD, module.BAD), seed=1) == ids  # they are there already: nothing changes
    torch.testing.assert_close(model.get_input_embeddings().weight, rows, rtol=0, atol=0)
    again = models.tiny_gpt2(n, tie_word_embeddings=tied)
    module.new_tokens(again, models.byte_tokenizer(), (module.GOOD, module.BAD), seed=0)
    torch.testing.assert_close(again.get_input_embeddings().weight, rows, rtol=0, atol=0)  # the same seed, the same rows
