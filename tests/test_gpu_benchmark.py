"""benchmarks/gpu.py, memory.py and growth.py run, and what they compute by themselves is right."""

import json
import math

import pytest
import torch
import transformers

from benchmarks import gpu_parts, growth, memory
from tests.runs import start_process

# -- memory

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"vocab_size": 512, "max_position_embeddings": 128}


def kept_by_a_real_model(config, args: memory.Args, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of dpo's loss, weights left out, on tensors that do exist."""
    import dpo
    from common import batches

    model = transformers.LlamaForCausalLM(config).train()
    row = {"prompt": [5] * args.prompt, "completions": [[6] * args.answer, [7] * args.answer]}
    batch = batches.collate([row] * args.pairs, 0, "shared", "cpu")
    batch |= dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), torch.zeros(args.pairs))
    kept, weights = {}, {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        dpo.compute_loss(model, batch, 0.1)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_model_are_those_of_a_real_one(dtype, tied):
    config = transformers.LlamaConfig(**TINY, num_hidden_layers=4, tie_word_embeddings=tied)
    args = memory.Args(pairs=2, prompt=16, answer=8)
    counts = memory.count(config, args, dtype)
    model = transformers.LlamaForCausalLM(config)
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    assert counts.block == sum(p.numel() for p in model.model.layers[0].parameters())
    assert counts.root == counts.parameters - 4 * counts.block
    looked_up = 0 if tied else 512 * 32
    assert counts.matrices == sum(p.numel() for p in model.parameters() if p.dim() > 1) - looked_up
    copies = 2 * counts.matrices * (dtype == torch.bfloat16)
    assert counts.activations + copies == kept_by_a_real_model(config, args, dtype)
    assert 0 < counts.recomputed < counts.activations


def test_memory_by_the_formula():
    """One GPU, and eight of them, of a model of a hundred parameters."""
    counts = memory.Counts(100, root=20, block=8, matrices=90, root_matrices=16, activations=1000, recomputed=10)
    one = memory.memory(counts, 1, second_model=False, recompute=False)
    assert one == {
        "state": 1600, "reference": 0, "copies": 180, "activations": 1000, "loading": 800, "total": 2780,
    }  # fmt: skip
    eight = memory.memory(counts, 8, second_model=True, recompute=True)
    assert eight == {
        "state": 200, "reference": 50, "copies": 160 + 32 + 80, "activations": 10, "loading": 450, "total": 532,
    }  # fmt: skip


# -- growth


def test_the_exponent_is_that_of_the_power():
    sizes = [64, 128, 256, 512, 1024]
    for power in (0.0, 1.0, 2.0):
        seconds = [3.0 * size**power for size in sizes]
        assert growth.exponent(sizes, seconds) == pytest.approx(power)
    assert growth.exponent(sizes, [1e9, *(size**2 for size in sizes[1:])]) == pytest.approx(2.0)  # the last four


def test_attention_left_out_keeps_all_weights_in_use():
    model = growth.build(512, "none")
    growth.step_of(model, growth.random_rows((8, 4, 4), 512, 2))()  # zeroes gradients at its end
    loss, _ = growth.dpo.compute_loss(model, growth.batch_of(growth.random_rows((8, 4, 4), 512, 2)), 0.1)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
def test_growth_runs(tmp_path):
    pytest.importorskip("matplotlib")
    process = start_process(["-m", "benchmarks.growth", "--quick", "--output", str(tmp_path / "growth.json")])
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads((tmp_path / "growth.json").read_text())
    assert report["growth"].keys() == growth.GROWTH.keys()
    for lines in report["growth"].values():
        assert lines["cpu_seconds"].keys() == lines["exponents"].keys()
        assert all(len(seconds) == len(lines["sizes"]) for seconds in lines["cpu_seconds"].values())
    assert (tmp_path / "growth.png").stat().st_size > 10_000


# -- the GPU's command


@pytest.mark.slow
@pytest.mark.parametrize("part", ["rate", "scripts", "pretrain", "sampling", "pairs"])
def test_parts_of_the_gpus_command_run_tiny_on_a_cpu(part, capsys):
    """In this process, since the libraries take longer to load; of the scripts one."""
    more = {"names": ["dpo"]} if part == "scripts" else {}
    getattr(gpu_parts, part)(True, **more)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert lines
    assert not [line for line in lines if "failed" in line]
    if part == "scripts":
        assert [line["script"] for line in lines] == ["dpo"]
        assert lines[0]["losses"] == pytest.approx([math.log(2)], abs=1e-3)
    if part in ("pretrain", "sampling"):
        assert all(line["tokens_per_second"] > 0 for line in lines)
    if part == "pairs":
        ours = [line["first_loss"] for line in lines if line.get("system") == "ours"]
        assert ours == pytest.approx([math.log(2)] * 2, abs=1e-4)


def test_a_part_that_hangs_or_dies_loses_nothing_of_the_others(tmp_path, monkeypatch, capsys):
    from benchmarks import gpu

    said = "import time; print('{\"a\": 1}', flush=True); "
    ends = {"rate": said + "time.sleep(60)", "pretrain": said + "1 / 0", "sampling": said + "print('{\"b')"}
    popen = gpu.subprocess.Popen
    monkeypatch.setattr(gpu, "git_commit", lambda: None)  # which starts a process, too
    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(ends, 1))
    monkeypatch.setattr(
        gpu.subprocess, "Popen", lambda command, **places: popen([command[0], "-c", ends[command[5]]], **places)
    )
    status = gpu.main(gpu.Args(parts=tuple(ends), tiny=True, output=tmp_path / "gpu.json"))
    assert status == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert all(part["lines"] == [{"a": 1}] for part in parts.values())
    assert "not finished in 3 s" in parts["rate"]["error"]
    assert "ZeroDivisionError" in parts["pretrain"]["error"]
    assert "error" not in parts["sampling"]
