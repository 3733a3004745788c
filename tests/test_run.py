"""A run piece by piece: schedule, dropout, pad ids, kept values, passes without gradients,
means of metrics.
"""

import json
import math

import pytest
import torch

from common import batches, data, evaluate, fields, files, generate, metrics, oracle
from common import models as model_loading
from common.run import learning_rate, start_run
from tests import models
from tests.runs import PAIRS, ROOT, arguments, gpt2_like, lines_of, model_of, train


@pytest.fixture
def start(tmp_path):
    """Begins a run that trains nothing."""

    def begin(**changes):
        _, args = arguments("dpo", tmp_path / "run", **changes)
        return start_run(args, str(ROOT / "dpo.py"))[0]

    return begin


def rows_of_lengths(*lengths: int) -> list[dict]:
    return [{"prompt": [1] * n, "completions": [[3, 2], [4, 2]], "number": i} for i, n in enumerate(lengths)]


# -- schedule


def test_learning_rate_rises_and_falls_in_straight_lines(start):
    rates = [learning_rate(step, 20, peak=1.0, warmup=4.0) for step in range(20)]
    run = start(lr=1.0, warmup=4.0)
    run.total = 20
    assert [run.learning_rate(step) for step in range(20)] == rates
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == max(rates) == 1.0
    assert [rates[i] - rates[i + 1] for i in range(4, 19)] == pytest.approx([1.0 / 16] * 15)
    assert rates[-1] == pytest.approx(1.0 / 16)  # 0 is reached after the last step, so no step is lost


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.99, 1.0, 50.0, 1000.0])
def test_learning_rate_is_positive_and_at_most_the_peak(steps, warmup):
    assert all(0 < learning_rate(step, steps, 3e-4, warmup) <= 3e-4 for step in range(steps))


def test_warmup_below_one_is_a_share():
    assert learning_rate(9, 100, 1.0, warmup=0.1) == pytest.approx(10 / 11)
    assert learning_rate(10, 100, 1.0, warmup=0.1) == 1.0
    assert learning_rate(0, 100, 1.0, warmup=0.0) == 1.0


# -- models


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_disable_dropout(kind):
    """Modules and functional dropout, which attention has; in training mode two passes are then
    equal, and the configuration stays.
    """
    model = models.tiny_gpt2(20) if kind == "gpt2" else models.tiny_llama(20, attention_dropout=0.3)
    ids = torch.tensor([[1, 5, 9, 4, 2]])
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)  # it was on
        model_loading.disable_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert torch.equal(model(ids).logits, model.eval()(ids).logits)
    assert (model.config.attn_pdrop if kind == "gpt2" else model.config.attention_dropout) > 0


def test_a_loaded_model_has_no_dropout_and_its_configuration_stays(tiny_gpt2):
    model = model_loading.load_model(str(tiny_gpt2), "cpu").train()
    ids = torch.tensor([[1, 5, 9, 4, 2]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model.eval()(ids).logits)
    assert model.config.resid_pdrop == 0.1


def test_a_pad_id_is_found_among_the_existing_ones(tmp_path):
    like_gpt2 = model_loading.load_tokenizer(gpt2_like(tmp_path / "gpt2"))
    assert like_gpt2.pad_token == "zq"  # the last ordinary token, the rarest merge
    assert like_gpt2.padding_side == "right"
    named = models.byte_tokenizer()
    named.pad_token = None
    assert model_loading.choose_pad_id(named) == 0  # "<pad>" is there
    own = models.save(models.tiny_gpt2(300), models.byte_tokenizer(), tmp_path / "own")
    assert model_loading.load_tokenizer(str(own)).pad_token_id == 0


def test_pad_equal_to_eos_is_replaced(tmp_path):
    tokenizer = models.byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    folder = models.save(models.tiny_gpt2(len(tokenizer)), tokenizer, tmp_path / "model")
    loaded = model_loading.load_tokenizer(str(folder))
    assert loaded.pad_token_id != loaded.eos_token_id == 2
    model = model_loading.load_model(str(folder), "cpu", loaded)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == loaded.pad_token_id


def test_weights_are_float32_whatever_the_folder_holds(tmp_path):
    folder = models.save(models.tiny_llama(20).bfloat16(), models.byte_tokenizer(), tmp_path / "model")
    assert {p.dtype for p in model_loading.load_model(str(folder), "cpu").parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("asked", "tiles", "parameters", "chosen"),
    [
        ("auto", True, 5_000_000, "bfloat16"),
        ("auto", True, 4_999_999, "float32"),  # a tiny model's results stay what they are
        ("auto", False, 5_000_000, "float32"),
        ("float32", True, 5_000_000, "float32"),
        ("bfloat16", False, 10, "bfloat16"),
    ],
)
def test_dtype_by_processor_and_size(asked, tiles, parameters, chosen, start, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles}, raising=False)
    model, run = torch.nn.Embedding(parameters, 1, device="meta"), start(dtype=asked)
    assert model_loading.choose_dtype(asked, model, torch.device("cpu")) == chosen
    capsys.readouterr()
    run.prepare(model)
    words = f"Embedding of {parameters:,} parameters, weights float32, products {chosen}, on cpu"
    assert capsys.readouterr().out.startswith(words)
    with run.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert run.dtype == product.dtype == getattr(torch, chosen)
    run.prepare(torch.nn.Embedding(10, 1))  # a tiny model beside the policy changes nothing
    assert run.dtype == getattr(torch, chosen)


def test_dtype_where_torch_does_not_say_what_the_processor_has(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    model = torch.nn.Embedding(5_000_000, 1, device="meta")
    assert model_loading.choose_dtype("auto", model, torch.device("cpu")) == "float32"


@pytest.mark.parametrize(("supported", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_dtype_on_a_gpu_does_not_depend_on_the_size(supported, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    for parameters in (10, 5_000_000):
        model = torch.nn.Embedding(parameters, 1, device="meta")
        assert model_loading.choose_dtype("auto", model, torch.device("cuda")) == chosen


def test_context_length_and_size():
    model = models.tiny_llama(20)
    assert model_loading.context_length(model) == 128
    assert generate.is_tiny(model)


def test_one_weight_of_a_folder(tmp_path):
    model = models.tiny_llama(20)
    model.save_pretrained(tmp_path)
    weights = model_loading.load_weights(tmp_path, "lm_head.weight")
    torch.testing.assert_close(weights["lm_head.weight"], model.lm_head.weight.detach(), rtol=0, atol=0)
    assert model_loading.load_weights(tmp_path, "score.weight") == {}


# -- kept values


def test_values_are_kept_and_random_numbers_left_alone(start, tmp_path):
    run = start()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    calls = []

    def compute():
        calls.append(torch.rand(10))
        return {"train": calls[-1]}

    first = run.cached_tensors("reference", compute)
    assert torch.equal(torch.rand(3), expected)
    assert run.cached_json("before", lambda: {"a": [1.5, math.nan]})["a"][0] == 1.5
    run._args.resume = str(run.folder)
    assert torch.equal(run.cached_tensors("reference", compute)["train"], first["train"])
    assert len(calls) == 1  # loaded, not computed again
    assert run.cached_json("before", lambda: pytest.fail("computed again")) == {"a": [1.5, None]}
    assert not list(run.folder.glob("*.part"))


def test_json_is_valid_whatever_is_measured(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": math.nan, "b": [math.inf, 1], "c": {"d": -math.inf}})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word)) == {
        "a": None,
        "b": [None, 1],
        "c": {"d": None},
    }


# -- passes without gradients


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_predict_keeps_the_order_of_the_rows(start, micro_batch_size):
    """Values come answer by answer, as a batch numbers its sequences, and go to their rows."""
    run = start(micro_batch_size=micro_batch_size)
    lengths = [9, 2, 7, 2, 5, 30, 1]
    rows, passed = rows_of_lengths(*lengths), []

    def values(batch):
        assert not torch.is_grad_enabled()
        passed.extend(len(row["prompt"]) for row in batch)
        return torch.tensor([float(factor * row["number"]) for factor in (1, 10) for row in batch])

    expected = [[float(i), 10.0 * i] for i in range(len(lengths))]
    assert run.predict(values, list, rows).tolist() == expected
    assert passed == sorted(lengths)  # rows of similar length together
    two = run.predict(lambda batch: values(batch).chunk(2), list, rows)
    assert two.tolist() == expected


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_evaluate_loss_weighs_every_row_alike(start, micro_batch_size):
    run = start(micro_batch_size=micro_batch_size)
    rows = rows_of_lengths(*range(1, 8))

    def squares(batch):
        total = torch.tensor([float(row["number"] ** 2) for row in batch]).sum()
        return total, {"loss": total}

    mean = sum(i**2 for i in range(7)) / 7
    assert run.evaluate_loss(squares, list, rows) == pytest.approx({"loss": mean})
    assert run.evaluate_loss(squares, list, rows, per_row=4) == pytest.approx({"loss": mean / 4})
    assert run.evaluate_loss(squares, list, []) == {}


@pytest.mark.parametrize("script", PAIRS)
def test_logged_means_weigh_every_pair_alike_over_uneven_steps(script, tmp_path, file13, tiny_llama):
    """One line for two steps of 8 and 5 rows, in micro-batches of 3, while the weights stand still:
    the mean over the 13 pairs.
    """
    setup = {"model": str(tiny_llama), "data": file13, "lr": 1e-12, "log_every": 2, "micro_batch_size": 3}
    (line,) = lines_of(train(script, tmp_path / "run", **setup))
    tokenizer = model_loading.load_tokenizer(str(tiny_llama))
    rows, _ = data.usable(files.read_rows(file13), fields.pair_of_row)
    sequences = oracle.sequences_of(data.encode_rows(tokenizer, rows, 64))
    chosen, rejected = oracle.plain_logps(model_of(tiny_llama), sequences, 0).view(2, -1).mean(1).tolist()
    assert line["logps/chosen"] == pytest.approx(chosen, abs=1e-4)
    assert line["logps/rejected"] == pytest.approx(rejected, abs=1e-4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_over_all_processes_every_row_counts_once(world_size):
    for count in range(1, 14):
        shares = [batches.micro_batches(list(range(count)), 2, rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1  # the same number of passes everywhere
        assert sorted(i for share in shares for rows, weight in share if weight for i in rows) == list(range(count))


# -- evaluation


def test_accuracy_counts_ties_one_half():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 1.0]])
    assert metrics.accuracy(scores) == 2.5 / 4
    assert metrics.accuracy(torch.zeros(3, 2)) == 0.5
    assert metrics.accuracy(torch.zeros(3, 2), ties_say_nothing=True) is None
    assert metrics.accuracy(torch.zeros(0, 2)) is None
    with pytest.raises(ValueError, match=r"\[rows, 2\]"):
        metrics.accuracy(torch.zeros(3))


def test_kl_of_samples_on_bigram_tables():
    """Along a completion the sum over its tokens of the exact KL between two rows of the tables;
    padding and prompt count nothing.
    """
    p, q = models.random_table(8, seed=1), models.random_table(8, seed=2)
    prompts, completions = [[1, 5], [1], [1, 3, 3, 4]], [[4, 3, 2], [2], [6, 6, 7, 5]]
    per_row = (p.exp() * (p - q)).sum(-1)
    expected = torch.stack([per_row[[a[-1], *b[:-1]]].sum() for a, b in zip(prompts, completions)])
    got = evaluate.kl_of_samples(models.bigram_model(p), models.bigram_model(q), prompts, completions, 0, batch_size=2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_fused_gelu_is_the_same_function(tiny_gpt2):
    """Logits of GPT-2 as transformers loads it, and of the same file here; what is saved names the
    activation as it was.
    """
    from transformers import AutoModelForCausalLM

    plain, fused = (
        AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval(),
        model_loading.load_model(tiny_gpt2, "cpu").eval(),
    )
    kinds = [{type(module).__name__ for module in model.modules()} for model in (plain, fused)]
    assert ["NewGELUActivation" in k for k in kinds] == [True, False]
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)
    assert fused.config.activation_function == plain.config.activation_function == "gelu_new"
