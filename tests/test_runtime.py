"""common.runtime piece by piece: schedule, dropout, pad ids, kept values, passes without gradients, means of metrics."""

import json
import math

import pytest
import torch

from common import data, evaluate, runtime
from tests import models
from tests.runs import PAIRS, arguments, gpt2_like, lines_of, model_of, train, write_pairs


@pytest.fixture
def file13(tmp_path) -> str:
    return write_pairs(tmp_path / "pairs.jsonl", 13)


@pytest.fixture
def start(tmp_path):
    """Begins a run that trains nothing."""

    def begin(**changes):
        _, args = arguments("dpo", tmp_path / "run", **changes)
        return runtime.start(args, str(runtime.ROOT / "dpo.py"))

    return begin


def rows_of_lengths(*lengths: int) -> list[dict]:
    return [{"prompt": [1] * n, "completions": [[3, 2], [4, 2]]} for n in lengths]


# ------------------------------------------------------------------------------------------------------------ schedule


def test_learning_rate_rises_and_falls_in_straight_lines(start):
    run = start(lr=2.0, warmup=4.0)
    rates = [run.learning_rate(step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert rates[4] == max(rates) == 2.0
    assert [rates[i] - rates[i + 1] for i in range(4, 19)] == pytest.approx([2.0 / 16] * 15)
    assert rates[-1] == pytest.approx(2.0 / 16)  # 0 is reached after the last step, so no step is lost


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.99, 1.0, 50.0, 1000.0])
def test_learning_rate_is_positive_and_at_most_the_peak(steps, warmup, start):
    run = start(lr=3e-4, warmup=warmup)
    assert all(0 < run.learning_rate(step, steps) <= 3e-4 for step in range(steps))


def test_warmup_below_one_is_a_share(start):
    run = start(lr=1.0, warmup=0.1)
    assert run.learning_rate(9, 100) == pytest.approx(10 / 11)
    assert run.learning_rate(10, 100) == 1.0
    run.args.warmup = 0.0
    assert run.learning_rate(0, 100) == 1.0


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_disable_dropout(kind):
    """Modules and functional dropout, which attention has; in training mode two passes are then equal, and the configuration stays."""
    model = models.tiny_gpt2(20) if kind == "gpt2" else models.tiny_llama(20, attention_dropout=0.3)
    ids = torch.tensor([[1, 5, 9, 4, 2]])
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)  # it was on
        runtime.disable_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert torch.equal(model(ids).logits, model.eval()(ids).logits)
    assert (model.config.attn_pdrop if kind == "gpt2" else model.config.attention_dropout) > 0


def test_a_pad_id_is_found_among_the_existing_ones(tmp_path):
    like_gpt2 = runtime.load_tokenizer(gpt2_like(tmp_path / "gpt2"))
    assert like_gpt2.pad_token == "zq"  # the last ordinary token, the rarest merge
    assert like_gpt2.padding_side == "right"
    named = models.byte_tokenizer()
    named.pad_token = None
    assert runtime.choose_pad_id(named) == 0  # "<pad>" is there
    own = models.save(models.tiny_gpt2(300), models.byte_tokenizer(), tmp_path / "own")
    assert runtime.load_tokenizer(str(own)).pad_token_id == 0


def test_pad_equal_to_eos_is_replaced(tmp_path):
    tokenizer = models.byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    folder = models.save(models.tiny_gpt2(len(tokenizer)), tokenizer, tmp_path / "model")
    found = runtime.load_tokenizer(str(folder))
    assert found.pad_token_id != found.eos_token_id == 2
    model = runtime.load_model(str(folder), "cpu", found)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == found.pad_token_id


def test_weights_are_float32_whatever_the_folder_holds(tmp_path):
    folder = models.save(models.tiny_llama(20).bfloat16(), models.byte_tokenizer(), tmp_path / "model")
    assert {p.dtype for p in runtime.load_model(str(folder), "cpu").parameters()} == {torch.float32}


def test_context_length_and_size():
    model = models.tiny_llama(20)
    assert runtime.context_length(model) == 128
    assert runtime.is_tiny(model)


def test_one_weight_of_a_folder(tmp_path):
    model = models.tiny_llama(20)
    model.save_pretrained(tmp_path)
    found = runtime.load_weights(tmp_path, "lm_head.weight")
    torch.testing.assert_close(found["lm_head.weight"], model.lm_head.weight.detach(), rtol=0, atol=0)
    assert runtime.load_weights(tmp_path, "score.weight") == {}


# --------------------------------------------------------------------------------------------------------- kept values


def test_values_are_kept_and_random_numbers_left_alone(start, tmp_path):
    run = start()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    calls = []

    def compute():
        calls.append(torch.rand(10))
        return {"train": calls[-1]}

    first = run.keep("reference", compute)
    assert torch.equal(torch.rand(3), expected)
    assert run.remember("before", lambda: {"a": [1.5, math.nan]})["a"][0] == 1.5
    run.args.resume = str(run.folder)
    assert torch.equal(run.keep("reference", compute)["train"], first["train"])
    assert len(calls) == 1  # loaded, not computed again
    assert run.remember("before", lambda: pytest.fail("computed again")) == {"a": [1.5, None]}
    assert not list(run.folder.glob("*.part"))


def test_json_is_valid_whatever_is_measured(tmp_path):
    runtime.write_json(tmp_path / "x.json", {"a": math.nan, "b": [math.inf, 1], "c": {"d": -math.inf}})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word)) == {
        "a": None,
        "b": [None, 1],
        "c": {"d": None},
    }


# ------------------------------------------------------------------------------------------- passes without gradients


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_map_rows_keeps_the_order_of_the_rows(start, micro_batch_size):
    run = start(micro_batch_size=micro_batch_size)
    lengths = [9, 2, 7, 2, 5, 30, 1]
    seen = []

    def values(indices):
        assert not torch.is_grad_enabled()
        seen.extend(lengths[i] for i in indices)
        return torch.tensor([[float(i), 10.0 * i] for i in indices])

    got = run.map_rows(values, rows_of_lengths(*lengths))
    assert got.tolist() == [[float(i), 10.0 * i] for i in range(len(lengths))]
    assert seen == sorted(lengths)  # rows of similar length together


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_mean_metrics_weigh_every_row_alike(start, micro_batch_size):
    run = start(micro_batch_size=micro_batch_size)
    rows = rows_of_lengths(*range(1, 8))
    got = run.mean_metrics(lambda indices: {"loss": torch.tensor([float(i**2) for i in indices]).sum()}, rows)
    assert got == pytest.approx({"loss": sum(i**2 for i in range(7)) / 7})
    assert run.mean_metrics(lambda indices: {}, []) == {}


@pytest.mark.parametrize("script", PAIRS)
def test_logged_means_weigh_every_pair_alike_over_uneven_steps(script, tmp_path, file13, tiny_llama):
    """One line for two steps of 8 and 5 rows, in micro-batches of 3, while the weights stand still: the mean over the 13 pairs."""
    setup = {"model": str(tiny_llama), "data": file13, "lr": 1e-12, "log_every": 2, "micro_batch_size": 3}
    (line,) = lines_of(train(script, tmp_path / "run", **setup))
    tokenizer = runtime.load_tokenizer(str(tiny_llama))
    rows, _ = data.usable(data.read_rows(file13), data.pair_of_row)
    sequences = evaluate.sequences_of(data.encode_rows(tokenizer, rows, 64))
    chosen, rejected = evaluate.plain_logps(model_of(tiny_llama), sequences, 0).view(2, -1).mean(1).tolist()
    assert line["logps/chosen"] == pytest.approx(chosen, abs=1e-4)
    assert line["logps/rejected"] == pytest.approx(rejected, abs=1e-4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_over_all_processes_every_row_counts_once(world_size):
    for count in range(1, 14):
        shares = [data.micro_batches(list(range(count)), 2, rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1  # the same number of passes everywhere
        assert sorted(i for share in shares for rows, real in share if real for i in rows) == list(range(count))


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_accuracy_counts_ties_one_half():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 1.0]])
    assert evaluate.accuracy(scores) == 2.5 / 4
    assert evaluate.accuracy(torch.zeros(3, 2)) == 0.5
    assert evaluate.accuracy(torch.zeros(3, 2), ties_say_nothing=True) is None
    assert evaluate.accuracy(torch.zeros(0, 2)) is None
    with pytest.raises(ValueError, match=r"\[rows, 2\]"):
        evaluate.accuracy(torch.zeros(3))


def test_kl_of_samples_on_bigram_tables():
    """Along a completion the sum over its tokens of the exact KL between two rows of the tables; padding and prompt count nothing."""
    p, q = models.random_table(8, seed=1), models.random_table(8, seed=2)
    prompts, completions = [[1, 5], [1], [1, 3, 3, 4]], [[4, 3, 2], [2], [6, 6, 7, 5]]
    per_row = (p.exp() * (p - q)).sum(-1)
    expected = torch.stack([per_row[[a[-1], *b[:-1]]].sum() for a, b in zip(prompts, completions)])
    got = evaluate.kl_of_samples(models.bigram_model(p), models.bigram_model(q), prompts, completions, 0, batch_size=2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_fused_gelu_is_the_same_function(tiny_gpt2):
    """Logits of GPT-2 as transformers loads it, and of the same file here; what is saved names the activation as it was."""
    from transformers import AutoModelForCausalLM

    plain, fused = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval(), runtime.load_model(tiny_gpt2, "cpu").eval()
    kinds = [{type(module).__name__ for module in model.modules()} for model in (plain, fused)]
    assert ["NewGELUActivation" in k for k in kinds] == [True, False]
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)
    assert fused.config.activation_function == plain.config.activation_function == "gelu_new"


# ---------------------------------------------------------------------------------------------------------- work of a GPU


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_floating_point_operations_of_training(kind):
    """Against torch's own count of products in a forward and a backward pass; norms and biases are the small difference."""
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
    assert runtime.training_flops(model, 96) == pytest.approx(counted.get_total_flops() / ids.numel(), rel=0.03)


def test_the_peak_of_a_gpu_by_its_name(monkeypatch):
    assert runtime.peak_flops(torch.device("cpu"), torch.bfloat16) is None
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H200": 989e12,
        "Something Else": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert runtime.peak_flops(torch.device("cuda", 0), torch.bfloat16) == peak
        assert runtime.peak_flops(torch.device("cuda", 0), torch.float32) is None
