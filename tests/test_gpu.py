"""What a GPU could break. Each test runs on the CPU too, where it can, so that the test is tested;
those of a GPU are marked `gpu` and skip without one: python -m pytest -n 0 -m gpu
"""

import math
import os

import pytest
import torch
import torch.distributed as dist

import dpo
from common import batches, checkpoints, generate
from common import models as model_loading
from common.run import Run
from tests.runs import gpt2_like, lines_of, resume, toy_examples, train, weights

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch wants for sums in one order
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
gpu = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])
# Where there is a GPU a run would take it.
cpu = pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a run takes the GPU"))
every_device = pytest.mark.parametrize("device", [cpu, gpu])


def losses_of(folder: str, device: str, dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, dict]:
    """Log-probabilities and gradients of DPO's loss on a few pairs, on the CPU."""
    model = model_loading.load_model(folder, torch.device(device))
    batch = batches.collate(toy_examples(folder, 8), 0, layout, device)
    reference = torch.tensor([0.5, -0.5] * 4, device=device)
    batch |= {"ref_chosen_logps": reference - 40, "ref_rejected_logps": -reference - 40}
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        logps = dpo.completion_logps(model, batch)
        loss, _ = dpo.compute_loss(model, batch, 0.1)
    loss.backward()
    assert logps.dtype == loss.dtype == torch.float32  # the last softmax's sum is over a vocabulary
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    return logps.detach().cpu(), gradients


@every_device
@pytest.mark.parametrize("layout", ["shared", "rows"])
def test_float32_is_the_cpus(device, layout, folder):
    """A kernel that ignores the mask of a line with two answers would be off by tenths."""
    torch.set_float32_matmul_precision("highest")
    expected, expected_gradients = losses_of(folder, "cpu", torch.float32, "rows")
    logps, gradients = losses_of(folder, device, torch.float32, layout)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-3)
    for name, gradient in gradients.items():
        gap = (gradient - expected_gradients[name]).norm()
        assert gap <= 1e-3 * expected_gradients[name].norm() + 1e-4, name


@every_device
@pytest.mark.parametrize("layout", ["shared", "rows"])
def test_bfloat16_is_float32_but_for_its_rounding(device, layout, folder):
    expected, expected_gradients = losses_of(folder, "cpu", torch.float32, "rows")
    logps, gradients = losses_of(folder, device, torch.bfloat16, layout)
    assert 1e-4 < (logps - expected).abs().max() < 0.02 * expected.abs().max()  # it was bfloat16, and is right
    whole = torch.cat([g.flatten() for g in gradients.values()])
    expected_whole = torch.cat([g.flatten() for g in expected_gradients.values()])
    assert torch.cosine_similarity(whole, expected_whole, dim=0) > 0.995
    assert (whole - expected_whole).norm() < 0.1 * expected_whole.norm()


@every_device
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_run_goes_on_bit_for_bit(device, dtype, tmp_path, file13, llama, monkeypatch):
    """Weights, moments and the device's random numbers, where sums are made in one order."""
    setup = {"model": llama, "data": file13, "epochs": 2.0, "save_every": 2, "dtype": dtype, "eval_every": 100}
    torch.use_deterministic_algorithms(True)
    drawn, end_step = [], Run.end_step

    def drawing(run, *rest):  # dropout's numbers, so to say
        drawn.append(torch.rand(3, device=device).tolist())
        return end_step(run, *rest)

    monkeypatch.setattr(Run, "end_step", drawing)
    try:
        whole = train("dpo", tmp_path / "whole", **setup)
        numbers, drawn[:] = list(drawn), []

        def stopping(run, *rest):
            if run.step == 2:
                raise KeyboardInterrupt
            return drawing(run, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "end_step", stopping)
            with pytest.raises(KeyboardInterrupt):
                train("dpo", tmp_path / "again", **setup)
        torch.rand(5, device=device)  # what else the machine did
        resume("dpo", tmp_path / "again")
    finally:
        torch.use_deterministic_algorithms(False)
    assert drawn == numbers
    assert len({tuple(three) for three in numbers}) == 4
    assert weights(tmp_path / "again") == weights(whole)
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


@every_device
def test_one_process_with_its_groups_backend(device, tmp_path, llama, monkeypatch):
    """nccl (gloo on a CPU): sharding with its policy, a step, what a run says to others, and a
    checkpoint of all that."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = model_loading.load_model(llama, torch.device(device))
        model = model_loading.shard(model_loading.load_model(llama, torch.device(device)), torch.bfloat16)
        rows = toy_examples(llama, 4)
        batch = batches.collate(rows, 0, "shared", device)
        batch |= dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), torch.zeros(4, device=device))
        norms = []
        for one in (plain, model):
            with torch.autocast(device, torch.bfloat16):
                loss, _ = model_loading.bind_forward(one, dpo.compute_loss)(batch, 0.1)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(one.parameters(), math.inf)
            norms.append(model_loading.full_tensor(norm).item())
        assert norms[1] == pytest.approx(norms[0], rel=0.02)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        optimizer.step()
        flag = torch.tensor(15, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        assert int(flag) == 15
        parts: list = [None]
        dist.all_gather_object(parts, {"rows": 3})
        assert parts == [{"rows": 3}]
        state = {"step": 1, "seconds": 0.1, "tokens": 1, "window": []}
        tokenizer = model_loading.load_tokenizer(llama)
        before = [model_loading.full_tensor(p).clone() for p in model.parameters()]
        monkeypatch.setattr(checkpoints, "world_size", lambda: 2)  # as where weights are gathered
        saved = checkpoints.save(tmp_path / "run", model, optimizer, tokenizer, state, torch.device(device))
        checkpoints.restore(saved, model, optimizer, torch.device(device))
        for a, b in zip(before, model.parameters()):
            assert torch.equal(a, model_loading.full_tensor(b))
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@needs_gpu
def test_batches_are_copied_from_pinned_memory(monkeypatch):
    pinned, pin = [], torch.Tensor.pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(pin(tensor)) or pinned[-1])
    values = torch.arange(1000)
    copy = batches.to_device(values, "cuda")
    assert copy.device.type == "cuda"
    assert [tensor.is_pinned() for tensor in pinned] == [True]
    assert torch.equal(copy.cpu(), values)


@every_device
def test_sampling_leaves_the_random_numbers_as_they_were(device, llama):
    model, tokenizer = model_loading.load_model(llama, torch.device(device)), model_loading.load_tokenizer(llama)
    torch.manual_seed(3)
    expected = torch.rand(4, device=device)
    torch.manual_seed(3)
    first = generate.sample(model, [[1, 5], [1, 6, 7]], tokenizer, 8, seed=1)
    assert torch.equal(torch.rand(4, device=device), expected)
    assert first == generate.sample(model, [[1, 5], [1, 6, 7]], tokenizer, 8, seed=1)
    assert first != generate.sample(model, [[1, 5], [1, 6, 7]], tokenizer, 8, seed=2)


@every_device
def test_a_run_in_bfloat16_learns_as_in_float32(device, tmp_path, file13):
    base, setup = gpt2_like(tmp_path / "base"), {"data": file13, "epochs": 6.0, "log_every": 1}
    ends = []
    for dtype in ("float32", "bfloat16"):
        lines = lines_of(train("dpo", tmp_path / dtype, model=base, dtype=dtype, **setup))
        ends.append(lines[-1]["loss"])
        assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert ends[1] == pytest.approx(ends[0], abs=0.1)
