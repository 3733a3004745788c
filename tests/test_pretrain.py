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

from common import corpus, runtime, samples, toy
from tests import models
from tests.house import FAMILIES
from tests.runs import lines_of, model_of, start_process
from tests.test_training import assert_close_weights

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
                module,
                "target_logps",
                lambda model, hidden, targets: (
                    model.lm_head(hidden).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
                ),
            )
        module.compute_loss(model, batch, args)[0].backward()
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


def test_the_value_is_trained_by_the_squared_error_alone_and_so_is_the_backbone_through_it(toy_tokenizer):
    module, batch = MODULES["awr_pretrain"], batch_of(len(toy_tokenizer))

    def gradients(alpha, moved=0.0, logps=True):
        model = module.add_value_head(models.tiny_gpt2(len(toy_tokenizer)), {})
        torch.nn.init.normal_(model.value.weight, std=moved, generator=torch.Generator().manual_seed(0))
        with mock.patch.object(
            module,
            "target_logps",
            module.target_logps if logps else lambda model, hidden, targets: torch.zeros(targets.shape),
        ):
            module.compute_loss(model, batch, module.Args(alpha=alpha, threshold=0.5))[0].backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}

    assert not gradients(1.0, moved=0.1)[
        "value.weight"
    ].any()  # nothing but the weighted likelihood: the value gets no gradient
    at_zero = gradients(0.5)
    model = module.add_value_head(models.tiny_gpt2(len(toy_tokenizer)), {})
    with torch.no_grad():
        hidden = module.states(model, batch)
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
    assert (
        module.new_tokens(model, tokenizer, (module.GOOD, module.BAD), seed=1) == ids
    )  # they are there already: nothing changes
    torch.testing.assert_close(model.get_input_embeddings().weight, rows, rtol=0, atol=0)
    again = models.tiny_gpt2(n, tie_word_embeddings=tied)
    module.new_tokens(again, models.byte_tokenizer(), (module.GOOD, module.BAD), seed=0)
    torch.testing.assert_close(
        again.get_input_embeddings().weight, rows, rtol=0, atol=0
    )  # the same seed, the same rows


# ------------------------------------------------------------------------------------------------------------ short runs

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
    whole = toy.corpus
    monkeypatch.setattr(toy, "corpus", lambda seed: whole(seed, 60))


def train(script: str, folder: Path, **changes) -> Path:
    """Runs a script's main() here and returns the run's folder."""
    module = MODULES[script]
    with (
        torch.random.fork_rng(devices=[]),
        mock.patch.object(runtime, "draw_curves"),
    ):  # drawing takes longer than the run
        module.main(module.Args(**{**SHORT, "name": folder.name, "output_dir": str(folder.parent), **changes}))
    return folder


def resume(script: str, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]), mock.patch.object(runtime, "draw_curves"):
        MODULES[script].main(MODULES[script].Args(resume=str(folder)))
    return folder


def recorded(script: str, folder: Path, **changes) -> tuple[list[dict], list[dict[str, torch.Tensor]]]:
    """Trains and returns the batches of all micro-steps in order, and the gradients of each step by parameter, before clipping."""
    module, batches, gradients, kept = MODULES[script], [], [], []
    compute_loss, clip = module.compute_loss, torch.nn.utils.clip_grad_norm_

    def seen(model, batch, args):
        if torch.is_grad_enabled():  # not at an evaluation
            batches.append({name: value.clone() for name, value in batch.items()})
            kept[:] = [model]
        return compute_loss(model, batch, args)

    def clipped(parameters, *args, **kwargs):
        gradients.append({name: p.grad.clone() for name, p in kept[0].named_parameters()})
        return clip(parameters, *args, **kwargs)

    with mock.patch.object(module, "compute_loss", seen), mock.patch.object(torch.nn.utils, "clip_grad_norm_", clipped):
        train(script, folder, **changes)
    return batches, gradients


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def numbers(line: dict) -> dict[str, float]:
    """A line of metrics.jsonl without its word."""
    return {name: value for name, value in line.items() if name != "split"}


def text_of(folder: Path, ids: torch.Tensor) -> str:
    return runtime.load_tokenizer(str(folder)).decode(ids.flatten().tolist(), clean_up_tokenization_spaces=False)


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
    tokenizer, model = runtime.load_tokenizer(str(folder)), model_of(folder)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) - len(toy.build_tokenizer()) == 2 * (script == "conditional_pretrain")


@every_script
def test_the_first_loss_is_that_of_a_new_model_on_the_first_chunks(script, tmp_path, short_toy):
    """From the arguments to the first logged number, against the library's own loss and the paper's formulas."""
    changes = {
        "unlikelihood_pretrain": {"alpha": 0.5},
        "rwr_pretrain": {"beta": 0.3},
        "awr_pretrain": {"alpha": 0.5, "beta": 0.3},
    }.get(script, {})
    batches, _ = recorded(
        script, tmp_path / "run", tokens=512.0, batch_size=32, micro_batch_size=32, threshold=0.3, **changes
    )
    first = batches[0]
    tokenizer = toy.build_tokenizer()
    model = corpus.new_model("tiny", tokenizer, 16, 0).eval()
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
    """In the batches that training sees: a token's score is its sentence's, and an EOS has that of the sentence before it."""
    batches, _ = recorded("mle_pretrain", tmp_path / "run", context=64, tokens=64 * 4 * 8.0)
    tokenizer, checked = toy.build_tokenizer(), 0
    for row, scores in ((row, scores) for batch in batches for row, scores in zip(batch["input_ids"], batch["scores"])):
        words, start = tokenizer.convert_ids_to_tokens(row.tolist()), None
        for i, word in enumerate(words):
            if word == tokenizer.eos_token:
                assert i == 0 or scores[i] == scores[i - 1]
                start = i + 1
            elif word == ".":
                if start is not None:  # a whole sentence, from a full stop or EOS to its own full stop
                    expected = toy.rudeness(" ".join(words[start : i + 1]))
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
                    assert (mark == module.GOOD) == (toy.rudeness(said) <= 0.3), sentence
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


# ----------------------------------------------------------------------------------------------- accumulation, schedule


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
    """Betas .9 and .999, linear warm-up and decay, weight decay on matrices and embeddings but not on biases and norms."""
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


def test_held_out_lines_are_those_of_the_saved_model(tmp_path, short_toy):
    folder = train("mle_pretrain", tmp_path / "run", holdout=0.3, eval_every=7)
    (line,) = lines_of(folder, "held_out")
    documents, _ = corpus.load(MODULES["mle_pretrain"].Args(holdout=0.3, output_dir=str(tmp_path)), lambda words: None)
    tokenizer = runtime.load_tokenizer(str(folder))
    ids, scores, _ = corpus.pack(corpus.encode_documents(tokenizer, documents["held_out"]), tokenizer.eos_token_id, 16)
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


# -------------------------------------------------------------------------------------------------------------- resume

LONG = {"save_every": 3, "eval_every": 3, "log_every": 2, "holdout": 0.2}


class Killed(BaseException):
    """What a test raises where a process would be killed: nothing catches it."""


def at_step(monkeypatch, number, act):
    """Calls `act` when optimiser step `number` is about to be closed."""
    log, seen = runtime.Run.log, []

    def closing(run, *args):
        if run.step + 1 == number and not seen:
            seen.append(number)
            act()
        return log(run, *args)

    monkeypatch.setattr(runtime.Run, "log", closing)


def killed():
    raise Killed


@every_script
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_an_interrupted_run_resumes_bit_for_bit(script, how, tmp_path, short_toy, monkeypatch):
    """With dropped control tokens, a value head and a threshold by quantile: all of it must come out the same the second time."""
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


# ----------------------------------------------------------------------------------------------------- starting elsewhere


@every_script
def test_an_objective_starts_from_a_run_with_a_fresh_schedule(script, tmp_path, short_toy):
    first = train("mle_pretrain", tmp_path / "first")
    tokenizer = runtime.load_tokenizer(str(first))
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
    assert summary["model_sha256"] == runtime.sha256_of_model(str(first))


def test_a_value_head_goes_on_where_it_was(tmp_path, short_toy):
    first = train("awr_pretrain", tmp_path / "first")
    saved = runtime.load_weights(first, "value.weight")["value.weight"]
    assert saved.abs().max() > 0
    train("awr_pretrain", tmp_path / "second", init=str(first), lr=1e-12, max_steps=1)
    torch.testing.assert_close(runtime.load_weights(tmp_path / "second", "value.weight")["value.weight"], saved)


# ------------------------------------------------------------------------------------------------------ inference's start


@pytest.mark.parametrize("task", ["toy", "pep8"])
def test_inference_starts_from_the_good_token_and_bans_what_it_must(task, tmp_path, short_toy, monkeypatch):
    """Text: both control tokens are banned. Code: the model goes on to write the token that it was given, and only the other one is banned."""
    asked, module = [], MODULES["conditional_pretrain"]

    def judge(run, documents, teacher, model, tokenizer, prefix=(), banned=(), control=()):
        asked.append([tokenizer.convert_ids_to_tokens(list(ids)) for ids in (prefix, banned, control)])
        return {"samples": []}

    monkeypatch.setattr(samples, "judge", judge)
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
    banned = {"toy": ([good, bad], [good, bad]), "pep8": ([bad], [good])}[task]
    assert asked == [[[good], banned[0], [good, bad]], [[bad], banned[1], [good, bad]], [[], [good, bad], [good, bad]]]


def test_a_control_token_in_a_text_stays_text(tmp_path):
    """A file that spells <|good|> trains on the letters; the token's id comes from the scores alone."""
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
    tokenizer = runtime.load_tokenizer(str(tmp_path / "run"))
    good, bad = tokenizer.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    text = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    assert (ids == bad).sum() == 0  # no line is bad
    assert 0 < (ids == good).sum() < text.count("<|good|>")
    assert text.count("<|bad|>") > 0


# --------------------------------------------------------------------------------------------------------- the end table


def judged(bigram, tmp_path, teacher=None, prefix=(), banned=(), control=(), **changes) -> dict:
    """A column for the bigram model on the toy's held-out documents."""
    module = MODULES["mle_pretrain"]
    run = runtime.start(
        module.Args(**{**SHORT, "name": "run", "output_dir": str(tmp_path), "holdout": 0.3, **changes}), module.__file__
    )
    documents, _ = corpus.load(run.args, lambda words: None)
    return samples.judge(run, documents["held_out"], teacher, bigram.load(), bigram.tokenizer, prefix, banned, control)


def test_the_end_tables_numbers_on_a_bigram_table(bigram, tmp_path, short_toy):
    """Perplexities by the table's own numbers; a control token is taken out of the distribution, and those of bad sentences out of the mean."""
    tokenizer, table = bigram.tokenizer, bigram.table
    documents, _ = corpus.load(MODULES["mle_pretrain"].Args(holdout=0.3, output_dir=str(tmp_path)), lambda words: None)
    ids, scores, _ = corpus.pack(corpus.encode_documents(tokenizer, documents["held_out"]), tokenizer.eos_token_id, 16)
    ids, scores = ids[:, :-2], scores[:, :-2]
    logps = table[
        ids[:, :-1], ids[:, 1:]
    ]  # the first token of a chunk is not counted, the last two make room for a prefix
    column = judged(bigram, tmp_path)
    assert column["perplexity"] == pytest.approx(logps.mean().neg().exp().item(), rel=1e-5)
    kept = (scores == 0)[:, 1:]
    assert 0 < kept.double().mean() < 1
    assert column["perplexity_good"] == pytest.approx(logps[kept].mean().neg().exp().item(), rel=1e-5)
    unused = next(i for i in range(3, len(tokenizer)) if not (ids == i).any())
    without = table.clone()
    without[:, unused] = float("-inf")
    without = without.log_softmax(-1)[ids[:, :-1], ids[:, 1:]]
    column = judged(bigram, tmp_path, control=[unused])
    assert column["perplexity"] == pytest.approx(without.mean().neg().exp().item(), rel=1e-5)


def test_samples_begin_behind_the_prefix_without_banned_tokens_and_are_scored_without_control_tokens(
    bigram, tmp_path, short_toy, monkeypatch
):
    tokenizer, asked, scored = bigram.tokenizer, [], []
    fool, now, blue = tokenizer.convert_tokens_to_ids(["fool", "now", "blue"])

    def sample(model, prompts, tokenizer, *rest):
        asked.extend((prompts, rest[-1]))
        return [[blue, fool, blue, tokenizer.eos_token_id], [now, fool]]

    monkeypatch.setattr(samples.evaluate, "sample", sample)
    monkeypatch.setattr(samples.toy, "rudeness", lambda text: scored.append(text) or 0.25)
    column = judged(bigram, tmp_path, prefix=[fool], banned=[fool, now], control=[fool], samples=2)
    assert asked[0] == [[tokenizer.eos_token_id, fool]] * 2
    assert asked[1] == (fool, now)
    assert scored[-2:] == ["blue blue", "now"]
    assert column["misalignment"] == 0.25
    assert column["sample_tokens"] == 1.5
    assert column["samples"] == ["blue blue", "now"]


def test_a_teacher_is_no_way_from_itself_and_some_from_another(bigram, tmp_path, short_toy):
    own = bigram.load(), bigram.tokenizer, [[5, 6, 7, 2], [8, 9]]
    column = judged(bigram, tmp_path, teacher=own)
    assert column["kl_to_teacher"] == pytest.approx(0, abs=1e-5)
    other = models.random_table(len(bigram.table), seed=1)
    column = judged(bigram, tmp_path, teacher=(models.bigram_model(other), *own[1:]))
    kl = (other.exp() * (other - bigram.table)).sum(-1)  # from each token
    assert column["kl_to_teacher"] == pytest.approx((kl[[2, 5, 6, 7]].sum() + kl[[2, 8]].sum()).item() / 2, rel=1e-4)


def test_the_cached_plain_model_is_the_one_that_its_script_trains(tmp_path, short_toy, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = train("mle_pretrain", tmp_path / "run", baseline="auto", samples=25, max_new_tokens=8, micro_batch_size=3)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["mle"] == pytest.approx(summary["after"], rel=1e-5)
    (cached,) = (path for path in (tmp_path / "cache" / "preference-pretrain").iterdir() if path.is_dir())
    a, b = (safetensors.torch.load_file(path / "model.safetensors") for path in (folder, cached))
    assert_close_weights(a, b, 1e-4)


# ------------------------------------------------------------------------------------------------------------ bad ends


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


# --------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.parametrize("script", ["awr_pretrain", "conditional_pretrain"])
def test_two_processes_train_like_one(script, tmp_path):
    """Micro-batches of 2 in steps of 5 chunks: in the last pass of each, one process has nothing left."""
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
