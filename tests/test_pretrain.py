"""Pretraining on a scored corpus: the forward pass against plain logits, new tokens, and main() of
the six scripts in short runs on the toy corpus.
"""

import copy
import importlib
import inspect
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch

from common import generate
from common import models as loading
from common import run as runs
from pretraining import baseline, corpus, evaluate, sampling, scorers
from pretraining import models as pretrained
from report import curves
from tests import models, packing
from tests.house import FAMILIES
from tests.runs import ROOT, lines_of, model_of, start_process, weights
from toy import documents as toy_documents
from toy import world

SCRIPTS = FAMILIES["scored corpus"]
every_script = pytest.mark.parametrize("script", SCRIPTS)
MODULES = {script: importlib.import_module(script) for script in SCRIPTS}


# -- the forward pass


def batch_of(vocabulary: int, rows: int = 3, context: int = 12, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, context), generator=generator)
    return {"input_ids": ids, "scores": torch.rand(rows, context, generator=generator)}


def numbers_of(script: str, threshold: float = 0.5, **changes) -> dict[str, float]:
    """The numbers that a script's compute_loss asks for, as its Args has them."""
    args = MODULES[script].Args(**changes)
    names = list(inspect.signature(MODULES[script].compute_loss).parameters)[2:]
    return {name: threshold if name == "threshold" else getattr(args, name) for name in names}


def plain_target_logps(model, batch: dict, hidden=None) -> torch.Tensor:
    """Log-probabilities of the targets by the plain road."""
    logps = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    return logps.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)


@every_script
@pytest.mark.parametrize("chunk", [5, 2048])
def test_target_logps_are_exact_on_a_bigram_table(script, chunk, bigram, monkeypatch):
    """Position t predicts the token at t + 1, whatever stands before, and in however many pieces
    the output layer runs.
    """
    module, batch = MODULES[script], batch_of(len(bigram.tokenizer))
    monkeypatch.setattr(module, "CHUNK", chunk)
    model, targets = bigram.load(), batch["input_ids"][:, 1:]
    with torch.no_grad():
        got = module.target_logps(model, batch)
    expected = bigram.table[batch["input_ids"][:, :-1], targets]
    assert got.shape == targets.shape
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


@every_script
def test_chunked_logits_change_no_gradient(script, toy_tokenizer, monkeypatch):
    """The loss as the script takes it, in pieces of 5 targets, against the same formula on the
    model's own full logits.
    """
    module, batch = MODULES[script], batch_of(len(toy_tokenizer))
    gradients = []
    for chunk in (5, 2048, None):
        model = models.tiny_gpt2(len(toy_tokenizer))
        model = module.add_value_head(model, {}) if script == "awr_pretrain" else model
        if chunk:
            monkeypatch.setattr(module, "CHUNK", chunk)
        else:  # the plain road
            monkeypatch.setattr(module, "target_logps", plain_target_logps)
        module.compute_loss(model, batch, **numbers_of(script))[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, value in gradients[0].items():
            torch.testing.assert_close(
                other[name],
                value,
                rtol=1e-4,
                atol=1e-5 * value.abs().max().item() + 1e-7,
                msg=lambda m, name=name: f"{name}: {m}",
            )


@every_script
def test_a_target_brings_its_own_score(script, toy_tokenizer):
    """Not that of the position that predicts it: the first token of a chunk is no target."""
    module, batch = MODULES[script], batch_of(len(toy_tokenizer))
    model = models.tiny_gpt2(len(toy_tokenizer))
    model = module.add_value_head(model, {}) if script == "awr_pretrain" else model
    batch["scores"] = torch.zeros_like(batch["scores"])
    batch["scores"][:, 0] = 1.0
    losses, metrics = module.compute_loss(model, batch, **numbers_of(script))
    assert metrics["bad_share"] == 0
    batch["scores"][:, 0] = 0.0
    assert module.compute_loss(model, batch, **numbers_of(script))[0] == losses
    batch["scores"][:, -1] = 1.0
    assert module.compute_loss(model, batch, **numbers_of(script))[1]["bad_share"] == 3


def test_the_value_is_trained_by_the_squared_error_alone_and_so_is_the_backbone_through_it(toy_tokenizer):
    module, batch = MODULES["awr_pretrain"], batch_of(len(toy_tokenizer))

    def gradients(alpha, moved=0.0, logps=True):
        model = module.add_value_head(models.tiny_gpt2(len(toy_tokenizer)), {})
        torch.nn.init.normal_(model.value.weight, std=moved, generator=torch.Generator().manual_seed(0))
        forward = module.target_logps if logps else lambda model, batch, hidden: torch.zeros(hidden.shape[:2])
        with mock.patch.object(module, "target_logps", forward):
            module.compute_loss(model, batch, **numbers_of("awr_pretrain", alpha=alpha))[0].backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}

    assert not gradients(1.0, moved=0.1)[
        "value.weight"
    ].any()  # nothing but the weighted likelihood: the value gets no gradient
    at_zero = gradients(0.5)
    model = module.add_value_head(models.tiny_gpt2(len(toy_tokenizer)), {})
    with torch.no_grad():
        hidden = module.states_before_targets(model, batch)
    advantages = 0.5 - batch["scores"][:, 1:]
    slope = -2 * 0.5 * advantages * -0.25  # dV/d(w . h) = -sigma (1 - sigma) = -1/4 at zero
    torch.testing.assert_close(
        at_zero["value.weight"][0], (slope[..., None] * hidden).sum((0, 1)), rtol=1e-4, atol=1e-4
    )
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


# -- new tokens


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
    # They are there already: nothing changes.
    assert module.new_tokens(model, tokenizer, (module.GOOD, module.BAD), seed=1) == ids
    torch.testing.assert_close(model.get_input_embeddings().weight, rows, rtol=0, atol=0)
    again = models.tiny_gpt2(n, tie_word_embeddings=tied)
    module.new_tokens(again, models.byte_tokenizer(), (module.GOOD, module.BAD), seed=0)
    # The same seed, the same rows.
    torch.testing.assert_close(again.get_input_embeddings().weight, rows, rtol=0, atol=0)


# -- short runs

# 16 tokens a chunk, 4 chunks a step, 7 steps; no samples: they are the slow part.
SHORT = {
    "context": 16,
    "batch_size": 4,
    "micro_batch_size": 4,
    "tokens": 7 * 64.0,
    "lr": 1e-2,
    "samples": 0,
    "baseline": "none",
}
SHORT |= {"log_every": 1, "eval_every": 1000, "save_every": 1000}


@pytest.fixture
def short_toy(monkeypatch):
    """The toy corpus with 60 documents."""
    whole = toy_documents.documents
    monkeypatch.setattr(toy_documents, "documents", lambda seed: whole(seed, 60))


def train(script: str, folder: Path, **changes) -> Path:
    """Runs a script's main() here and returns the run's folder."""
    module = MODULES[script]
    with (
        torch.random.fork_rng(devices=[]),
        mock.patch.object(curves, "draw_curves"),
    ):  # drawing takes longer than the run
        module.main(module.Args(**{**SHORT, "name": folder.name, "output_dir": str(folder.parent), **changes}))
    return folder


def resume(script: str, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]), mock.patch.object(curves, "draw_curves"):
        MODULES[script].main(MODULES[script].Args(resume=str(folder)))
    return folder


def recorded(script: str, folder: Path, **changes) -> tuple[list[dict], list[dict[str, torch.Tensor]]]:
    """Trains and returns the batches of all micro-steps in order, and the gradients of each step by
    parameter, before clipping.
    """
    module, batches, gradients, kept = MODULES[script], [], [], []
    compute_loss, clip = module.compute_loss, torch.nn.utils.clip_grad_norm_

    def recording(model, batch, **numbers):
        if torch.is_grad_enabled():  # not at an evaluation
            batches.append(copy.deepcopy(batch))
            kept[:] = [model]
        return compute_loss(model, batch, **numbers)

    def clipped(parameters, *args, **kwargs):
        gradients.append({name: p.grad.clone() for name, p in kept[0].named_parameters()})
        return clip(parameters, *args, **kwargs)

    with (
        mock.patch.object(module, "compute_loss", recording),
        mock.patch.object(torch.nn.utils, "clip_grad_norm_", clipped),
    ):
        train(script, folder, **changes)
    return batches, gradients


def toy_splits(holdout: float) -> dict[str, list]:
    """The toy's documents, as a run of seed 0 splits them."""
    return corpus.load_corpus("toy", "", "text", "", holdout, 0, "nowhere", say=lambda sentence: None)[0]


def numbers(line: dict) -> dict[str, float]:
    """A line of metrics.jsonl without its word."""
    return {name: value for name, value in line.items() if name != "split"}


def text_of(folder: Path, ids: torch.Tensor) -> str:
    return loading.load_tokenizer(str(folder)).decode(ids.flatten().tolist(), clean_up_tokenization_spaces=False)


@every_script
def test_the_run_folder(script, tmp_path, short_toy, capsys):
    folder = train(script, tmp_path / "run")
    summary = json.loads(
        (folder / "summary.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    assert summary["script"] == f"{script}.py"
    assert summary["steps"] == 7
    assert summary["model_sha256"] is None  # it began with a new model
    assert summary["peak_flops_share"] is None  # no GPU here
    assert summary["after"]["perplexity"] > 1
    kept = json.loads((folder / "corpus.json").read_text())
    assert kept["sha256"] == summary["data_sha256"]
    assert 0 < kept["good_share"] < 1
    assert {"args.json", "metrics.jsonl", "script.py", "config.json", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    said = capsys.readouterr().out
    assert "of the training segments are good" in said
    assert ("standard deviation" in said) == (script in {"rwr_pretrain", "awr_pretrain"})
    tokenizer, model = loading.load_tokenizer(str(folder)), model_of(folder)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) - len(world.build_tokenizer()) == 2 * (script == "conditional_pretrain")


@every_script
def test_the_first_loss_is_that_of_a_new_model_on_the_first_chunks(script, tmp_path, short_toy):
    """From the arguments to the first logged number, against the library's own loss and the paper's
    formulas.
    """
    changes = {
        "unlikelihood_pretrain": {"alpha": 0.5},
        "rwr_pretrain": {"beta": 0.3},
        "awr_pretrain": {"alpha": 0.5, "beta": 0.3},
    }.get(script, {})
    batches, _ = recorded(
        script, tmp_path / "run", tokens=512.0, batch_size=32, micro_batch_size=32, threshold=0.3, **changes
    )
    first = batches[0]
    tokenizer = world.build_tokenizer()
    model = pretrained.new_model("tiny", tokenizer, 16, 0).eval()
    if script == "conditional_pretrain":
        MODULES[script].new_tokens(model, tokenizer, (MODULES[script].GOOD, MODULES[script].BAD), 0)
    ids, scores = first["input_ids"], first["scores"][:, 1:].double()
    assert (scores > 0.3).any() or script == "filtered_pretrain"
    with torch.no_grad():
        logps = model(ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        plain = model(input_ids=ids, labels=ids).loss.item()
    expected = {
        "unlikelihood_pretrain": torch.where(scores > 0.3 + 1e-6, -0.5 * torch.log1p(-logps.exp()), -logps),
        "rwr_pretrain": -torch.exp(-scores / 0.3) * logps,
        "awr_pretrain": -0.5 * torch.exp((0.5 - scores) / 0.3) * logps + 0.5 * (0.5 - scores) ** 2,
    }.get(script, -logps)
    (line,) = lines_of(tmp_path / "run")
    assert line["loss"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert line["nll"] == pytest.approx(plain, rel=1e-4)
    assert line["bad_share"] == pytest.approx((scores > 0.3 + 1e-6).double().mean().item(), abs=1e-6)


def test_tokens_carry_the_scores_of_their_sentences(tmp_path, short_toy):
    """In the batches that training sees: a token's score is its sentence's, and an EOS has that of
    the sentence before it.
    """
    batches, _ = recorded("mle_pretrain", tmp_path / "run", context=64, tokens=64 * 4 * 8.0)
    tokenizer, checked = world.build_tokenizer(), 0
    for row, scores in ((row, scores) for batch in batches for row, scores in zip(batch["input_ids"], batch["scores"])):
        words, start = tokenizer.convert_ids_to_tokens(row.tolist()), None
        for i, word in enumerate(words):
            if word == tokenizer.eos_token:
                assert i == 0 or scores[i] == scores[i - 1]
                start = i + 1
            elif word == ".":
                if start is not None:  # a whole sentence, from a full stop or EOS to its own full stop
                    expected = toy_documents.rudeness(" ".join(words[start : i + 1]))
                    assert scores[start : i + 1].tolist() == pytest.approx([expected] * (i + 1 - start))
                    checked += expected > 0
                start = i + 1
    assert checked > 20


def test_control_tokens_stand_before_the_segments_that_they_judge(tmp_path, short_toy):
    module = MODULES["conditional_pretrain"]
    batches, _ = recorded(
        "conditional_pretrain",
        tmp_path / "run",
        context=128,
        batch_size=2,
        tokens=128 * 2 * 6.0,
        drop=0.2,
        threshold=0.3,
        micro_batch_size=1,
    )
    good, bad, bare = 0, 0, 0
    for batch in batches:
        text = text_of(tmp_path / "run", batch["input_ids"])
        for document in text.split("<eos>")[1:-1]:  # whole ones
            for sentence in filter(str.strip, document.replace(" .", " .\n").split("\n")):
                mark = next((m for m in (module.GOOD, module.BAD) if sentence.strip().startswith(m)), None)
                said = sentence.replace(module.GOOD, "").replace(module.BAD, "")
                if not said.strip():
                    continue
                if mark is None:
                    bare += 1
                else:
                    assert (mark == module.GOOD) == (toy_documents.rudeness(said) <= 0.3), sentence
                    good, bad = good + (mark == module.GOOD), bad + (mark == module.BAD)
    assert min(good, bad, bare) >= 3


def test_filtering_trains_on_kept_documents_only_and_repeats_them(tmp_path, short_toy):
    batches, _ = recorded("filtered_pretrain", tmp_path / "run", context=64, tokens=64 * 4 * 20.0, threshold=0.0)
    assert not any(batch["scores"].any() for batch in batches)
    assert len(batches) == 20  # the budget is spent though little is left
    seen = torch.cat([batch["input_ids"] for batch in batches])
    _, counts = seen.unique(dim=0, return_counts=True)
    assert counts.max() - counts.min() <= 1
    assert counts.max() > 3
    everything, _ = recorded("mle_pretrain", tmp_path / "all", context=64, tokens=64 * 4 * 20.0)
    assert len(everything) == 20
    assert torch.stack([batch["scores"] for batch in everything]).any()


@pytest.mark.parametrize(("tokens", "steps"), [(64.0, 1), (640.0, 10), (3.2e3, 50), (1.0, 1)])
def test_the_budget_of_tokens_is_spent(tokens, steps, tmp_path, short_toy):
    folder = train("mle_pretrain", tmp_path / "run", tokens=tokens, log_every=1)
    assert [line["step"] for line in lines_of(folder)] == list(range(1, steps + 1))


# -- accumulation, schedule


@every_script
def test_every_token_weighs_the_same_however_a_step_is_cut(script, tmp_path, short_toy):
    still = {"lr": 1e-12, "max_grad_norm": math.inf, "tokens": 128.0, "batch_size": 8}
    _, (whole,) = recorded(script, tmp_path / "whole", micro_batch_size=8, **still)
    for size in (1, 3):
        _, (cut,) = recorded(script, tmp_path / f"cut{size}", micro_batch_size=size, **still)
        for name, value in whole.items():
            torch.testing.assert_close(
                cut[name],
                value,
                rtol=1e-4,
                atol=1e-5 * value.abs().max().item() + 1e-7,
                msg=lambda m, name=name: f"{name}: {m}",
            )
        assert numbers(lines_of(tmp_path / f"cut{size}")[0]) == pytest.approx(
            numbers(lines_of(tmp_path / "whole")[0]), rel=1e-4
        )


@every_script
def test_optimiser_schedule_and_decay(script, tmp_path, short_toy, monkeypatch):
    """Betas .9 and .999, linear warm-up and decay, weight decay on matrices and embeddings but not
    on biases and norms.
    """
    seen, step = [], torch.optim.AdamW.step

    def stepping(optimizer, *args, **kwargs):
        seen.append(
            [
                (g["lr"], g["weight_decay"], g["betas"], {p.dim() > 1 for p in g["params"]})
                for g in optimizer.param_groups
            ]
        )
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    folder = train(script, tmp_path / "run", warmup=2.0, lr=0.01, weight_decay=0.3)
    expected = [0.01 / 3, 0.02 / 3, 0.01, 0.008, 0.006, 0.004, 0.002]
    for rate, groups in zip(expected, seen, strict=True):
        assert [(g[1], g[2], g[3]) for g in groups] == [(0.3, (0.9, 0.999), {True}), (0.0, (0.9, 0.999), {False})]
        assert [g[0] for g in groups] == pytest.approx([rate] * 2)
    assert [line["lr"] for line in lines_of(folder)] == pytest.approx(expected)


def test_filtering_leaves_held_out_documents_as_they_are(tmp_path, short_toy, capsys):
    """All six scripts are judged on the same held-out text, the bad documents in it included."""
    chunks_of = {}
    for script in ("mle_pretrain", "filtered_pretrain"):
        train(script, tmp_path / script, context=64, tokens=64 * 4, threshold=0.0)
        lines = capsys.readouterr().out.splitlines()
        chunks_of[script] = [line for line in lines if line.startswith("Held-out: ")]
    assert len(chunks_of["mle_pretrain"]) == 1
    assert chunks_of["filtered_pretrain"] == chunks_of["mle_pretrain"]


def test_held_out_lines_are_those_of_the_saved_model(tmp_path, short_toy):
    folder = train("mle_pretrain", tmp_path / "run", holdout=0.3, eval_every=7)
    (line,) = lines_of(folder, "held_out")
    documents = toy_splits(0.3)
    tokenizer = loading.load_tokenizer(str(folder))
    ids, scores, _ = packing.pack(tokenizer, documents["held_out"], 16)
    with torch.no_grad():
        assert (
            line["loss"]
            == line["nll"]
            == pytest.approx(model_of(folder)(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
        )
    assert line["bad_share"] == pytest.approx((scores[:, 1:] > 0).float().mean().item())


def test_gradient_checkpointing_changes_no_gradient(tmp_path, short_toy):
    _, plain = recorded("mle_pretrain", tmp_path / "plain", tokens=64.0)
    _, checkpointed = recorded("mle_pretrain", tmp_path / "checkpointed", tokens=64.0, gradient_checkpointing=True)
    for name, value in plain[0].items():
        torch.testing.assert_close(checkpointed[0][name], value, rtol=1e-4, atol=1e-6)


# -- resume

LONG = {"save_every": 3, "eval_every": 3, "log_every": 2, "holdout": 0.2}


class Killed(BaseException):
    """What a test raises where a process would be killed: nothing catches it."""


def at_step(monkeypatch, number, act):
    """Calls `act` when optimiser step `number` is about to be closed."""
    end_step, done = runs.Run.end_step, []

    def closing(run, *args):
        if run.step + 1 == number and not done:
            done.append(number)
            act()
        return end_step(run, *args)

    monkeypatch.setattr(runs.Run, "end_step", closing)


def killed():
    raise Killed


@every_script
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_an_interrupted_run_resumes_bit_for_bit(script, how, tmp_path, short_toy, monkeypatch):
    """With dropped control tokens, a value head and a threshold by quantile: all of it must come
    out the same the second time.
    """
    own = {"conditional_pretrain": {"drop": 0.3}, "filtered_pretrain": {"threshold_quantile": 0.7}}.get(script, {})
    whole = train(script, tmp_path / "whole", **LONG, **own)
    at_step(monkeypatch, 5, killed if how == "killed" else lambda: signal.raise_signal(signal.SIGINT))
    folder = tmp_path / "again"
    with pytest.raises(Killed if how == "killed" else SystemExit):
        train(script, folder, **LONG, **own)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [
        "step-00000003" if how == "killed" else "step-00000005"
    ]
    resume(script, folder)
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert weights(folder) == weights(whole)
    assert not (folder / "checkpoints").exists()


# -- starting elsewhere


@every_script
def test_an_objective_starts_from_a_run_with_a_fresh_schedule(script, tmp_path, short_toy):
    first = train("mle_pretrain", tmp_path / "first")
    tokenizer = loading.load_tokenizer(str(first))
    batches, _ = recorded(script, tmp_path / "second", init=str(first), warmup=0.0)
    lines = lines_of(tmp_path / "second")
    assert [line["lr"] for line in lines] == pytest.approx([1e-2 * (7 - i) / 7 for i in range(7)])
    ids = batches[0]["input_ids"]
    model = model_of(first)
    if script == "conditional_pretrain":
        MODULES[script].new_tokens(model, tokenizer, (MODULES[script].GOOD, MODULES[script].BAD), 0)
    with torch.no_grad():
        assert lines[0]["nll"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    assert summary["model_sha256"] == loading.sha256_of_model(str(first))


def test_a_value_head_goes_on_where_it_was(tmp_path, short_toy):
    first = train("awr_pretrain", tmp_path / "first")
    saved = loading.load_weights(first, "value.weight")["value.weight"]
    assert saved.abs().max() > 0
    train("awr_pretrain", tmp_path / "second", init=str(first), lr=1e-12, max_steps=1)
    torch.testing.assert_close(loading.load_weights(tmp_path / "second", "value.weight")["value.weight"], saved)


# -- inference's start


@pytest.mark.parametrize("task", ["toy", "pep8"])
def test_inference_starts_from_the_token_asked_for_and_bans_the_other(task, tmp_path, short_toy, monkeypatch):
    """On text as on code the model goes on to write the token that it was given; where it was
    given none, nothing is banned.
    """
    asked, module = [], MODULES["conditional_pretrain"]

    def evaluate_model(model, tokenizer, prefix=(), banned=(), control=(), **rest):
        asked.append([tokenizer.convert_ids_to_tokens(list(ids)) for ids in (prefix, banned, control)])
        return {"samples": []}

    monkeypatch.setattr(evaluate, "evaluate_model", evaluate_model)
    if task == "pep8":
        pytest.importorskip("pycodestyle")
        (tmp_path / "code").mkdir()
        for i in range(4):
            (tmp_path / "code" / f"{i}.py").write_text(f"x = {i}\ny=x\n" * 20)
    train(
        "conditional_pretrain",
        tmp_path / "run",
        task=task,
        data="" if task == "toy" else str(tmp_path / "code"),
        max_steps=1,
        vocabulary=300,
    )
    good, bad = module.GOOD, module.BAD
    assert asked == [[[good], [bad], [good, bad]], [[bad], [good], [good, bad]], [[], [], [good, bad]]]


def test_a_sample_asked_for_good_holds_good_tokens_alone_and_its_text_none(tmp_path, short_toy, monkeypatch):
    """The script's own samples: those asked for good never hold <|bad|>, those asked for bad never
    <|good|>, and those of which nothing was asked may hold both. Texts are scored without either.
    """
    module, drawn, scored = MODULES["conditional_pretrain"], [], []
    draw, rudeness = sampling.sample_unconditional, toy_documents.rudeness

    def keep(*args, **words):
        drawn.append(draw(*args, **words))
        return drawn[-1]

    monkeypatch.setattr(sampling, "sample_unconditional", keep)
    monkeypatch.setattr(toy_documents, "rudeness", lambda text: scored.append(text) or rudeness(text))
    train("conditional_pretrain", tmp_path / "run", max_steps=40, samples=50)
    tokenizer = loading.load_tokenizer(str(tmp_path / "run"))
    held = [{tokenizer.convert_ids_to_tokens(i) for ids in samples for i in ids} for samples in drawn]
    assert [(module.GOOD in tokens, module.BAD in tokens) for tokens in held] == [
        (True, False),
        (False, True),
        (True, True),
    ]
    assert len(scored) >= 150
    assert not any(module.GOOD in text or module.BAD in text for text in scored)


def test_a_control_token_in_a_text_stays_text(tmp_path):
    """A file that spells <|good|> trains on the letters; the token's id comes from the scores
    alone.
    """
    pytest.importorskip("pycodestyle")
    (tmp_path / "code").mkdir()
    for i in range(6):
        (tmp_path / "code" / f"{i}.py").write_text(f'a = "<|good|>{i}"\nb = "<|bad|>"\n' * 10)
    batches, _ = recorded(
        "conditional_pretrain",
        tmp_path / "run",
        task="pep8",
        data=str(tmp_path / "code"),
        drop=0.0,
        vocabulary=300,
        context=32,
        batch_size=1,
        holdout=0.0,
    )
    tokenizer = loading.load_tokenizer(str(tmp_path / "run"))
    good, bad = tokenizer.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    text = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    assert (ids == bad).sum() == 0  # no line is bad
    assert 0 < (ids == good).sum() < text.count("<|good|>")
    assert text.count("<|bad|>") > 0


# -- the end table


def column_of(bigram, teacher=None, prefix=(), banned=(), control=(), samples: int = 0) -> dict:
    """A column for the bigram model on the toy's held-out documents."""
    scorer = scorers.load_scorer("toy", samples=True)
    shape = {"task": "toy", "scorer": scorer, "documents": toy_splits(0.3)["held_out"], "context": 16}
    shape |= {"samples": samples, "max_new_tokens": 64, "seed": 0, "teacher": teacher}
    return evaluate.evaluate_model(bigram.load(), bigram.tokenizer, prefix, banned, control, **shape)


def test_the_end_tables_numbers_on_a_bigram_table(bigram, tmp_path, short_toy):
    """Perplexities by the table's own numbers; a control token is taken out of the distribution,
    and those of bad sentences out of the mean.
    """
    tokenizer, table = bigram.tokenizer, bigram.table
    documents = toy_splits(0.3)
    ids, scores, _ = packing.pack(tokenizer, documents["held_out"], 16)
    ids, scores = ids[:, :-2], scores[:, :-2]
    # The first token of a chunk is not counted, the last two make room for a prefix.
    logps = table[ids[:, :-1], ids[:, 1:]]
    column = column_of(bigram)
    assert column["perplexity"] == pytest.approx(logps.mean().neg().exp().item(), rel=1e-5)
    kept = (scores == 0)[:, 1:]
    assert 0 < kept.double().mean() < 1
    assert column["perplexity_good"] == pytest.approx(logps[kept].mean().neg().exp().item(), rel=1e-5)
    unused = next(i for i in range(3, len(tokenizer)) if not (ids == i).any())
    without = table.clone()
    without[:, unused] = float("-inf")
    without = without.log_softmax(-1)[ids[:, :-1], ids[:, 1:]]
    column = column_of(bigram, control=[unused])
    assert column["perplexity"] == pytest.approx(without.mean().neg().exp().item(), rel=1e-5)


def test_samples_begin_behind_the_prefix_without_banned_tokens_and_are_scored_without_control_tokens(
    bigram, tmp_path, short_toy, monkeypatch
):
    tokenizer, asked, scored = bigram.tokenizer, [], []
    fool, now, blue = tokenizer.convert_tokens_to_ids(["fool", "now", "blue"])

    def sample(model, prompts, tokenizer, *rest, banned_ids, **words):
        asked.extend((prompts, banned_ids))
        return [[blue, fool, blue, tokenizer.eos_token_id], [now, fool]]

    monkeypatch.setattr(generate, "sample", sample)
    monkeypatch.setattr(toy_documents, "rudeness", lambda text: scored.append(text) or 0.25)
    column = column_of(bigram, prefix=[fool], banned=[fool, now], control=[fool], samples=2)
    assert asked[0] == [[tokenizer.eos_token_id, fool]] * 2
    assert asked[1] == (fool, now)
    assert scored[-2:] == ["blue blue", "now"]
    assert column["misalignment"] == 0.25
    assert column["sample_tokens"] == 1.5
    assert column["samples"] == ["blue blue", "now"]


def test_a_teacher_is_no_way_from_itself_and_some_from_another(bigram, tmp_path, short_toy):
    own = bigram.load(), bigram.tokenizer, [[5, 6, 7, 2], [8, 9]]
    column = column_of(bigram, teacher=own)
    assert column["kl_to_teacher"] == pytest.approx(0, abs=1e-5)
    other = models.random_table(len(bigram.table), seed=1)
    column = column_of(bigram, teacher=(models.bigram_model(other), *own[1:]))
    kl = (other.exp() * (other - bigram.table)).sum(-1)  # from each token
    assert column["kl_to_teacher"] == pytest.approx((kl[[2, 5, 6, 7]].sum() + kl[[2, 8]].sum()).item() / 2, rel=1e-4)


# -- the plain model in the end table


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of cached plain models, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "preference-pretrain"


def runs_in(cache: Path) -> list[Path]:
    """The runs in that folder."""
    return [path for path in cache.iterdir() if path.is_dir()]


def test_the_plain_model_is_a_run_of_its_script(tmp_path, cache, capsys):
    """Bit for bit the one that mle_pretrain.py trains with the same arguments; the second time it
    is only read.
    """
    shape = {"tokens": 3 * 64.0, "micro_batch_size": 3, "warmup": 0.5, "weight_decay": 0.3, "seed": 1, "max_steps": 2}
    plain = train("mle_pretrain", tmp_path / "plain", **shape)
    first = train("unlikelihood_pretrain", tmp_path / "first", baseline="auto", **shape)
    assert "trained once" in capsys.readouterr().out
    (folder,) = runs_in(cache)
    assert weights(folder) == weights(plain)
    assert json.loads((folder / "args.json").read_text())["script"] == "mle_pretrain.py"
    end = json.loads((plain / "summary.json").read_text())["after"]
    assert json.loads((first / "summary.json").read_text())["mle"] == end
    with mock.patch.object(baseline, "train_plain", side_effect=AssertionError("trained again")):
        second = train("rwr_pretrain", tmp_path / "second", baseline="auto", **shape)
    assert json.loads((second / "summary.json").read_text())["mle"] == end
    assert "trained once" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"lr": 1e-3}, {"seed": 1}, {"tokens": 64.0}, {"init": "first"}, {"data_sha256": "other"}]
)
def test_whatever_the_plain_model_depends_on_makes_another_one(change, tmp_path, cache, monkeypatch, short_toy):
    """Also another text of its script; what it does not depend on makes none."""
    train("mle_pretrain", tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "mle_pretrain.py", tmp_path / "mle_pretrain.py")

    def train_plain(same, plain, folder):
        folder.mkdir()
        (folder / "summary.json").write_text("{}")

    monkeypatch.setattr(baseline, "train_plain", train_plain)

    def ask(script: str = "rwr_pretrain", data_sha256: str = "one", **changes) -> str:
        args = MODULES[script].Args(**{**SHORT, "baseline": "auto", **changes})
        return baseline.baseline_folder(args, tmp_path / f"{script}.py", data_sha256, "cpu", lambda sentence: None)

    folder = ask()
    assert ask() == ask("awr_pretrain", beta=3.0, samples=5, eval_every=7, name="other") == folder
    assert len(runs_in(cache)) == 1
    assert ask(**change) != folder
    assert len(runs_in(cache)) == 2
    with (tmp_path / "mle_pretrain.py").open("a") as file:
        file.write("# another text\n")
    assert ask() != folder


def test_two_runs_train_the_plain_model_once(tmp_path, cache, monkeypatch):
    def train_plain(same, plain, folder):
        with (tmp_path / "calls").open("ab") as file:
            file.write(b".")
        time.sleep(0.5)
        folder.mkdir()
        (folder / "summary.json").write_text("{}")

    monkeypatch.setattr(baseline, "train_plain", train_plain)
    args = MODULES["rwr_pretrain"].Args(**{**SHORT, "baseline": "auto"})
    fork = multiprocessing.get_context("fork")
    words = (args, ROOT / "rwr_pretrain.py", "one", "cpu")
    processes = [fork.Process(target=baseline.baseline_folder, args=words) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "calls").read_bytes() == b"."


def test_what_an_interrupted_plain_run_left_behind_is_made_anew(cache, monkeypatch):
    left = []

    def train_plain(same, plain, folder):
        left.append(folder.exists())
        folder.mkdir()
        (folder / "args.json").write_text("{}")

    monkeypatch.setattr(baseline, "train_plain", train_plain)  # it writes no summary.json: it never comes to its end
    args = MODULES["rwr_pretrain"].Args(**{**SHORT, "baseline": "auto"})
    for _ in range(2):
        baseline.baseline_folder(args, ROOT / "rwr_pretrain.py", "one", "cpu")
    assert left == [False, False]


def test_a_plain_run_that_fails_ends_the_run_in_one_sentence(tmp_path, cache, short_toy, capfd):
    shutil.copyfile(ROOT / "rwr_pretrain.py", tmp_path / "rwr_pretrain.py")
    (tmp_path / "mle_pretrain.py").write_text("raise SystemExit('no luck')\n")
    args = MODULES["rwr_pretrain"].Args(**{**SHORT, "baseline": "auto"})
    with pytest.raises(SystemExit, match=r"--baseline auto: mle_pretrain\.py ended with status 1") as refused:
        baseline.baseline_folder(args, tmp_path / "rwr_pretrain.py", "one", "cpu")
    assert "\n" not in str(refused.value.code)
    assert "no luck" in capfd.readouterr().err
    assert not runs_in(cache)


def test_without_the_plain_script_beside_it_a_copied_script_has_no_baseline(tmp_path, cache):
    """Copied alone, with the packages that it needs."""
    for package in "adapters chat choices common judging pretraining report rewards tokens toy".split():
        (tmp_path / package).symlink_to(ROOT / package)
    shutil.copyfile(ROOT / "rwr_pretrain.py", tmp_path / "rwr_pretrain.py")
    changes = {**SHORT, "baseline": "auto", "name": "run", "output_dir": str(tmp_path), "max_steps": 1}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in changes.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "rwr_pretrain.py", *words]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "Baseline: none, since mle_pretrain.py is not beside rwr_pretrain.py." in process.stdout.splitlines()
    assert "mle" not in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not cache.exists()


@pytest.mark.parametrize(
    ("choice", "task", "expected"), [("none", "toy", ""), ("auto", "pep8", ""), ("a/run", "pep8", "a/run")]
)
def test_a_baseline_by_name(choice, task, expected, cache):
    args = MODULES["rwr_pretrain"].Args(**{**SHORT, "baseline": choice, "task": task})
    assert baseline.baseline_folder(args, ROOT / "rwr_pretrain.py", "one", "cpu") == expected
    assert not cache.exists()


# -- models that scale or cap their logits


def changing_model(kind: str, vocabulary: int):
    """A small random model whose logits are not its output layer's product, and wide weights, so
    that it shows.
    """
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.5}
    own = {
        "Cohere": {"logit_scale": 0.25},
        "Granite": {"logits_scaling": 4.0},
        "Gemma2": {"final_logit_softcapping": 3.0},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=vocabulary, **shape, **models.ENDS, **own[kind])
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def plain_nll(model, ids: torch.Tensor) -> float:
    """Mean negative log-probability of the targets, from the model's own logits."""
    with torch.no_grad():
        logps = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return -logps.gather(-1, ids[:, 1:, None]).mean().item()


@every_script
@pytest.mark.parametrize("kind", ["Cohere", "Granite", "Gemma2"])
def test_a_model_that_changes_its_logits_trains_on_what_it_is_evaluated_on(script, kind, tmp_path, short_toy, capsys):
    """From --init; the nll of the first step is that of the model's own logits, and a bare product
    of states and weights is another.
    """
    tokenizer = world.build_tokenizer()
    model = changing_model(kind, len(tokenizer))
    start = str(models.save(model, tokenizer, tmp_path / "start"))
    batches, _ = recorded(script, tmp_path / "run", init=start, lr=1e-12, tokens=128.0, holdout=0.3, eval_every=2)
    assert "scales or caps its logits" in capsys.readouterr().out
    if script == "conditional_pretrain":
        MODULES[script].new_tokens(model, tokenizer, (MODULES[script].GOOD, MODULES[script].BAD), 0)
    lines = lines_of(tmp_path / "run")
    for line, batch in zip(lines, batches, strict=True):
        ids = batch["input_ids"]
        assert line["nll"] == pytest.approx(plain_nll(model, ids), rel=1e-4)
        with torch.no_grad():
            bare = MODULES[script].target_logps(model, {"input_ids": ids})
        assert abs(-bare.mean().item() - line["nll"]) > 0.1
    if (
        script == "mle_pretrain"
    ):  # the end table leaves out the last two tokens of each chunk, the held-out line does not
        (held_out,) = lines_of(tmp_path / "run", "held_out")
        after = json.loads((tmp_path / "run" / "summary.json").read_text())["after"]
        assert math.log(after["perplexity"]) == pytest.approx(held_out["nll"], rel=0.05)


@pytest.mark.parametrize("kind", ["Cohere", "Granite", "Gemma2"])
def test_a_new_model_of_such_a_type_too(kind, tmp_path, short_toy, capsys):
    """From a folder with a config.json as --model."""
    tokenizer = world.build_tokenizer()
    changing_model(kind, len(tokenizer)).config.save_pretrained(tmp_path / "config")
    shape = {"model": str(tmp_path / "config"), "context": 16, "lr": 1e-12, "tokens": 64.0}
    batches, _ = recorded("mle_pretrain", tmp_path / "run", **shape)
    assert "scales or caps its logits" in capsys.readouterr().out
    model = pretrained.new_model(str(tmp_path / "config"), tokenizer, 16, 0).eval()
    (line,) = lines_of(tmp_path / "run")
    assert line["nll"] == pytest.approx(plain_nll(model, batches[0]["input_ids"]), rel=1e-4)


@every_script
@pytest.mark.parametrize("kind", ["Cohere", "Granite", "Gemma2"])
def test_gradients_through_a_models_own_output_layer(script, kind):
    module, batch = MODULES[script], batch_of(40)
    gradients = []
    for forward in (module.target_logps, plain_target_logps):
        model = changing_model(kind, 40)
        model = module.add_value_head(model, {}) if script == "awr_pretrain" else model
        with mock.patch.object(module, "target_logps", forward):
            module.compute_loss(model, {**batch, "logits_to_keep": 12}, **numbers_of(script))[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, value in gradients[1].items():
        gap = 1e-5 * value.abs().max().item() + 1e-7
        torch.testing.assert_close(
            gradients[0][name], value, rtol=1e-3, atol=gap, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_an_output_layer_that_is_off_for_another_reason_is_found_out():
    """Whatever stands between `base_model` and logits: here the output layer alone gets other
    states.
    """
    model = models.tiny_gpt2(40)
    ids, sentences = batch_of(40)["input_ids"][0], []
    module = MODULES["mle_pretrain"]
    logps_of = partial(module.target_logps, model)
    assert pretrained.choose_output_layer(logps_of, model, ids, 0, sentences.append) == {}
    assert not sentences
    states = module.states_before_targets
    with mock.patch.object(module, "states_before_targets", lambda *words: 1.01 * states(*words)):
        assert pretrained.choose_output_layer(logps_of, model, ids, 0, sentences.append) == {"logits_to_keep": 12}
    assert "the gathered output layer is off by" in sentences[0]
    wrong = lambda batch: module.target_logps(model, batch) - 0.1  # noqa: E731
    with pytest.raises(SystemExit, match="cannot be trained here"):
        pretrained.choose_output_layer(wrong, model, ids, 0, sentences.append)


# -- bad ends


@pytest.mark.parametrize(
    ("script", "changes", "words"),
    [
        ("mle_pretrain", {"context": 1}, "--context 1: expected at least 2"),
        ("mle_pretrain", {"tokens": 0.0}, "--tokens"),
        ("mle_pretrain", {"tokens": math.nan}, "--tokens"),
        ("mle_pretrain", {"samples": -1}, "--samples"),
        ("mle_pretrain", {"max_steps": 0}, "--max-steps"),
        ("mle_pretrain", {"vocabulary": 10}, "--vocabulary"),
        ("mle_pretrain", {"data": "x.txt"}, "--data x.txt"),
        ("mle_pretrain", {"model": "huge"}, "--model huge"),
        ("mle_pretrain", {"teacher": "/no/such/folder"}, "--teacher"),
        ("mle_pretrain", {"baseline": "/no/such/folder"}, "--baseline"),
        ("mle_pretrain", {"attacker": "/no/such/folder"}, "/no/such/folder"),
        ("mle_pretrain", {"init": "/no/such/folder"}, "/no/such/folder"),
        ("mle_pretrain", {"context": 10_000}, "--context 10000"),
        ("mle_pretrain", {"threshold": 0.1, "threshold_quantile": 0.5}, "one of them"),
        ("mle_pretrain", {"threshold_quantile": 1.5}, "--threshold-quantile 1.5"),
        ("filtered_pretrain", {"threshold": -1.0}, "none is left"),
        ("conditional_pretrain", {"drop": 1.1}, "--drop"),
        ("unlikelihood_pretrain", {"alpha": -1.0}, "--alpha"),
        ("rwr_pretrain", {"beta": 0.0}, "--beta"),
        ("awr_pretrain", {"alpha": 1.5}, "--alpha"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence_before_training(script, changes, words, tmp_path, short_toy):
    with pytest.raises(SystemExit) as refused:
        train(script, tmp_path / "run", **changes)
    message = str(refused.value.code)
    assert words in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


# -- several processes


@pytest.mark.slow
@pytest.mark.parametrize("script", ["awr_pretrain", "conditional_pretrain"])
def test_two_processes_train_like_one(script, tmp_path):
    """Micro-batches of 2 in steps of 5 chunks: in the last pass of each, one process has nothing
    left.
    """
    setup = {
        "batch_size": 5,
        "micro_batch_size": 2,
        "tokens": 5 * 16 * 3,
        "lr": 1e-3,
        "eval_every": 2,
        "save_every": 1,
        "samples": 26,
        "max_new_tokens": 8,
    }
    train(script, tmp_path / "one", **setup)
    words = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in {**SHORT, **setup, "name": "two", "output_dir": str(tmp_path)}.items()
    ]
    process = start_process(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"{script}.py", *words]
    )
    assert process.returncode == 0, process.stderr[-3000:]
    a, b = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys()
    for name in a:
        gap = (a[name] - b[name]).abs()
        if name.endswith(
            "attn.c_attn.bias"
        ):  # attention does not depend on the keys' biases: their gradient is rounding alone
            query, _, value = gap.chunk(3)
            gap = torch.cat([query, value])
        assert gap.max() <= 0.1 * 1e-3 * 3, name
    for split in ("train", "held_out"):
        for x, y in zip(lines_of(tmp_path / "one", split), lines_of(tmp_path / "two", split), strict=True):
            assert numbers(x) == pytest.approx(numbers(y), rel=1e-3, abs=1e-4)
    x, y = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert (x["processes"], y["processes"]) == (1, 2)
    assert x["after"]["perplexity"] == pytest.approx(y["after"]["perplexity"], rel=1e-3)
    assert x["after"].keys() == y["after"].keys()


@pytest.mark.slow
def test_of_two_processes_one_trains_the_plain_model(tmp_path, cache):
    """In a process of its own, which is none of the two."""
    changes = {**SHORT, "baseline": "auto", "name": "run", "output_dir": str(tmp_path), "max_steps": 1}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in changes.items()]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "rwr_pretrain.py", *words]
    process = start_process(command)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("trained once") == 1
    (folder,) = runs_in(cache)
    plain, run = (json.loads((path / "summary.json").read_text()) for path in (folder, tmp_path / "run"))
    assert (plain["processes"], run["processes"]) == (1, 2)
    assert run["mle"]["perplexity"] == pytest.approx(plain["after"]["perplexity"], rel=1e-5)
