"""Several processes of one run, forked from this one: what is sharded in which type, when they
stop, and that a checkpoint goes on with another number of them.
"""

import os
import signal

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from common import batches, checkpoints
from common import models as model_loading
from common.processes import rank, world_size
from common.run import Run
from tests.runs import assert_close_weights, in_processes, lines_of, resume, toy_examples, train

# -- types under sharding


def bf16_gradients(folder: str, rows: list[dict], sharded: bool) -> dict:
    """Gradients, types and losses of two micro-batches of DPO and a step, in bfloat16 autocast."""
    import dpo

    model = model_loading.load_model(folder, torch.device("cpu")).train()
    if sharded:
        dist.init_process_group("gloo")
        model_loading.shard(model, torch.bfloat16)
    compute, seen = model_loading.bind_forward(model, dpo.compute_loss), {}

    def note(name, module):
        def hook(_module, inputs, keywords, output):
            states = inputs[0] if inputs else keywords["hidden_states"]
            seen[name] = (module.weight.dtype, states.dtype)

        module.register_forward_hook(hook, with_kwargs=True)

    block = model.model.layers[1]
    note("matrix", block.mlp.up_proj)
    note("norm", block.input_layernorm)  # the second block's: what the first one gave
    note("embedding", model.get_input_embeddings())
    note("head", model.get_output_embeddings())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    for share, weight in batches.micro_batches(rows, 2, rank(), world_size()):
        with torch.autocast("cpu", torch.bfloat16):
            batch = batches.collate(share, 0, "shared", "cpu")
            batch["ref_chosen_logps"] = batch["ref_rejected_logps"] = torch.zeros(len(share))
            loss, _ = compute(batch, 0.3)
        losses.append(loss.detach())
        (loss * weight / len(rows)).backward()
    gradients = {name: model_loading.full_tensor(p.grad) for name, p in model.named_parameters()}
    optimizer.step()
    kept = [x for state in optimizer.state.values() for x in state.values()]
    kinds = {
        "weights": {p.dtype for p in model.parameters()},
        "gradients": {p.grad.dtype for p in model.parameters()},
        "moments": {x.dtype for x in kept},
        "losses": {loss.dtype for loss in losses},
        "shared out": {hasattr(p, "full_tensor") for p in model.parameters()},
    }
    if sharded:
        dist.destroy_process_group()
    return {"gradients": {name: g.clone() for name, g in gradients.items()}, "kinds": kinds, "seen": seen}


def test_blocks_are_gathered_in_bfloat16_and_all_that_is_kept_is_float32(llama):
    rows = toy_examples(llama, 8)
    one, (two, _) = bf16_gradients(llama, rows, False), in_processes(2, lambda: bf16_gradients(llama, rows, True))
    narrow, wide = torch.bfloat16, torch.float32
    assert two["kinds"].pop("shared out") == {True}
    assert two["kinds"] == {name: {wide} for name in ("weights", "gradients", "moments", "losses")}
    # The residual stream, embeddings and the output layer's weights are not rounded.
    assert {name: types[0] for name, types in two["seen"].items()} == {
        "matrix": narrow, "norm": narrow, "embedding": wide, "head": wide,
    }  # fmt: skip
    assert two["seen"]["norm"][1] == wide
    assert {types[0] for types in one["seen"].values()} == {wide}

    # No further from one process than bfloat16 itself is from float32.
    exact = float32_gradients(llama, rows)
    for name, gradient in exact.items():
        size = gradient.norm()
        noise, gap = ((one["gradients"][name] - x).norm() / size for x in (gradient, two["gradients"][name]))
        assert 1e-4 < noise < 0.05, name  # it was bfloat16
        assert gap < max(noise, 0.01), name


def float32_gradients(folder: str, rows: list[dict]) -> dict[str, torch.Tensor]:
    """The same gradients in float32, in one process."""
    import dpo

    model = model_loading.load_model(folder, torch.device("cpu"))
    batch = batches.collate(rows, 0, "shared", "cpu")
    batch["ref_chosen_logps"] = batch["ref_rejected_logps"] = torch.zeros(len(rows))
    (dpo.compute_loss(model, batch, 0.3)[0] / len(rows)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def sharded_in(folder: str, device: str, dtype: torch.dtype) -> torch.dtype:
    """The type that Run.prepare asks to gather blocks in."""
    asked = []

    class Prepared(Run):
        def __init__(self):
            self.device, self.dtype = torch.device(device), dtype
            self._args = type("Args", (), {"gradient_checkpointing": False, "compile": False})

    def shard(model, gathered):
        asked.append(gathered)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.run.shard", shard)
        patch.setattr("common.run.world_size", lambda: 2)
        Prepared().prepare(model_loading.load_model(folder, torch.device("cpu")))
    return asked[0]


def test_only_gpus_gather_in_bfloat16(gpt2):
    """On a CPU a layer norm takes no float32 states with bfloat16 weights."""
    assert sharded_in(gpt2, "cuda", torch.bfloat16) == torch.bfloat16
    assert sharded_in(gpt2, "cuda", torch.float32) == torch.float32
    assert sharded_in(gpt2, "cpu", torch.bfloat16) == torch.float32


# -- stops, and other numbers of processes

SETUP = {
    "micro_batch_size": 2,
    "lr": 1e-3,
    "epochs": 2.0,
    "log_every": 2,
    "save_every": 100,
}  # steps of 8, 5, 8, 5 rows


def stopped_run(folder, model: str, file: str, processes: int) -> list:
    """Exit codes of a run of which the last process gets SIGTERM in its first step."""

    def work():
        end_step = Run.end_step

        def signalled(run, *rest):
            if run.step == 0 and rank() == processes - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return end_step(run, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "end_step", signalled)
            return train("dpo", folder, model=model, data=file, **SETUP)

    return in_processes(processes, work)


def test_a_run_stops_where_metrics_are_read_and_goes_on_with_another_number_of_processes(tmp_path, file13, llama):
    """One process ends the step at hand. Of several one gets the signal: all end with step 2."""
    whole = train("dpo", tmp_path / "whole", model=llama, data=file13, **SETUP)
    assert len(lines_of(whole)) == 2
    expected = safetensors.torch.load_file(whole / "model.safetensors")
    for processes, then, step in ((1, 2, 1), (2, 3, 2), (3, 1, 2)):
        folder = tmp_path / f"{processes}-then-{then}"
        assert stopped_run(folder, llama, file13, processes) == [128 + signal.SIGTERM] * processes
        assert checkpoints.newest(folder).name == f"step-{step:08d}"
        assert (folder / "metrics.jsonl").exists() == (step == 2)
        in_processes(then, lambda folder=folder: resume("dpo", folder))
        got = safetensors.torch.load_file(folder / "model.safetensors")
        assert got.keys() == expected.keys()
        assert_close_weights(got, expected, 2e-5)
        for x, y in zip(lines_of(folder), lines_of(whole), strict=True):
            assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
