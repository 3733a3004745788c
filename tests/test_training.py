"""The trunk of the scripts at work: main() in short runs on a file of pairs, its run folder,
accumulation, resume, kills, processes, refusals.
"""

import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import sys
import time

import pytest
import safetensors.torch
import torch
from torch.nn.functional import logsigmoid

import common.run
from common import checkpoints, data, fields, files, oracle
from common import models as model_loading
from common.run import Run
from report import curves
from tests.runs import (
    KNOWN,
    PAIRS,
    ROOT,
    SHORT,
    arguments,
    assert_close_weights,
    gpt2_like,
    lines_of,
    model_of,
    recorded,
    resume,
    start_of,
    start_process,
    train,
    weights,
    write_pairs,
)

every_script = pytest.mark.parametrize("script", PAIRS)


@pytest.fixture(scope="module")
def held_file(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data") / "held.jsonl", 7, seed=1)


class Killed(BaseException):
    """What a test raises where a process would be killed: nothing catches it."""


def numbers(line: dict) -> dict[str, float]:
    """A line of metrics.jsonl without its word, and without the accuracy: before the first step
    rounding alone decides between ties.
    """
    return {name: value for name, value in line.items() if name not in {"split", "rewards/accuracies"}}


# -- run folder

KEYS = (
    "script args steps seconds tokens_per_second peak_memory_bytes versions git_commit data_sha256 model_sha256 device "
    "threads before after"
).split()
JUDGED = {
    "preference_accuracy",
    "reward_accuracy",
    "kl",
    "true_reward",
    "right_share",
    "rude_share",
    "frontier_efficiency",
}


@pytest.mark.parametrize("script", ["dpo", "dph"])
def test_run_folder_on_the_toy(script, tmp_path, toy_base, capsys):
    folder = train(script, tmp_path / "run", kl_samples=8, max_steps=2)
    summary = json.loads(
        (folder / "summary.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    columns = ["after_best_of_n", "reference_best_of_n"] * (script == "dph")
    columns = ["before", "after", "before_unseen", "after_unseen", *columns]
    assert set(KEYS) | set(columns) <= set(summary)
    for column in columns:
        expected = JUDGED - ({"preference_accuracy", "reward_accuracy"} if "best_of_n" in column else set())
        assert expected <= set(summary[column]), column
    assert summary["steps"] == 2
    assert summary["before"]["reward_accuracy"] is None  # all ties
    assert summary["before"]["kl"] == 0
    assert summary["script"] == f"{script}.py"
    saved = {
        "args.json",
        "metrics.jsonl",
        "summary.json",
        "script.py",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert saved <= {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("*.part"))
    assert not (folder / "checkpoints").exists()
    assert (folder / "script.py").read_bytes() == (ROOT / f"{script}.py").read_bytes()
    printed = capsys.readouterr().out
    assert "rude answers" in printed
    assert str(folder) in printed
    assert str(tmp_path) not in (folder / "summary.json").read_text().replace(summary["args"]["output_dir"], "")


@pytest.mark.parametrize("script", ["cdpo", "typo"])
def test_run_folder_on_a_file(script, tmp_path, file13, llama):
    folder = train(script, tmp_path / "run", model=llama, data=file13, holdout=0.2, max_steps=2, kl_samples=4)
    summary = json.loads(
        (folder / "summary.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    assert set(KEYS) <= set(summary)
    assert not any("unseen" in key for key in summary)
    measured = {"preference_accuracy", "reward_accuracy", "kl"}
    assert set(summary["after"]) == measured | {f"{name}_se" for name in measured}
    assert summary["after"]["kl"] > 0


def test_tokens_are_counted_per_answer(tmp_path, file13, llama, monkeypatch):
    """Real tokens: prompt + completion of every row and answer, no padding."""
    counted, finish = [], Run.finish
    monkeypatch.setattr(
        Run, "finish", lambda run, *rest: counted.append((run.tokens, run.seconds)) or finish(run, *rest)
    )
    folder = train("dpo", tmp_path / "run", model=llama, data=file13)
    tokenizer = model_loading.load_tokenizer(llama)
    rows = [row for _, row in files.read_rows(file13)]
    ((tokens, seconds),) = counted
    assert tokens == sum(
        len(tokenizer(row["prompt"] + row[side]).input_ids) + 1 for row in rows for side in ("chosen", "rejected")
    )
    assert json.loads((folder / "summary.json").read_text())["tokens_per_second"] == pytest.approx(
        tokens / seconds, rel=1e-3
    )


def test_curves_are_drawn_where_matplotlib_is(tmp_path, file13, llama):
    pytest.importorskip("matplotlib")
    folder = train("dpo", tmp_path / "run", model=llama, data=file13, max_steps=2)
    curves.draw_curves(folder)
    assert (folder / "curves.png").stat().st_size > 5_000


# -- first numbers


@pytest.mark.parametrize("script", KNOWN)
def test_the_first_logged_loss_is_known_though_the_configuration_has_dropout(script, tmp_path, file13, gpt2):
    folder = train(script, tmp_path / "run", model=gpt2, data=file13, max_steps=1, kl_samples=0)
    first = lines_of(folder)[0]
    assert first["loss"] == pytest.approx(start_of(script), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert json.loads((folder / "config.json").read_text())["resid_pdrop"] == 0.1  # what is saved is as it was


def held_out_by_the_oracle(script: str, args, folder, base: str, file: str) -> dict[str, float]:
    """The held-out metrics of a finished run, from the saved folder alone: full logits, one line
    per answer, formulas as the papers write them.
    """
    tokenizer = model_loading.load_tokenizer(str(folder))
    rows, _ = data.usable(files.read_rows(file), fields.pair_of_row)
    sequences = oracle.sequences_of(data.encode_rows(tokenizer, rows, 64))
    policy, reference = model_of(folder), model_of(base)
    logps, ref = (oracle.plain_logps(m, sequences, tokenizer.pad_token_id).view(2, -1) for m in (policy, reference))
    h = args.beta * ((logps - ref)[0] - (logps - ref)[1])
    eps = getattr(args, "label_smoothing", 0.0)
    losses = -(1 - eps) * logsigmoid(h) - eps * logsigmoid(-h)
    rewards = args.beta * (logps - ref)
    if script == "dph":
        score = safetensors.torch.load_file(folder / "model.safetensors")["score.weight"][0]
        with torch.no_grad():
            states = [policy.base_model(torch.tensor([p + c])).last_hidden_state[0, -1] for p, c in sequences]
        rewards = (torch.stack(states) @ score).view(2, -1)
        labels = torch.tensor([[1 - eps], [eps]])  # the probability that an answer is good
        separable = -(labels * logsigmoid(rewards) + (1 - labels) * logsigmoid(-rewards)).sum(0)
        losses = args.dph_weight * separable + args.dpo_weight * losses
    accuracies = (rewards[0] > rewards[1]).float() + 0.5 * (rewards[0] == rewards[1]).float()
    metrics = {
        "loss": losses,
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
    }
    metrics |= {"rewards/accuracies": accuracies, "logps/chosen": logps[0], "logps/rejected": logps[1]}
    return {name: values.mean().item() for name, values in metrics.items()}


@pytest.mark.parametrize("script", ["dpo", "cdpo", "dph"])
def test_held_out_metrics_are_those_of_the_saved_model(script, tmp_path, file13, held_file, folder):
    """Everything between the arguments and the logged numbers, against the plain road; the
    reference is the model as it was before any step.
    """
    changes = {"dph": {"dph_weight": 0.75, "dpo_weight": 0.5}}.get(script, {})
    setup = {
        "model": folder,
        "data": file13,
        "eval_data": held_file,
        "epochs": 2,
        "micro_batch_size": 3,
        "eval_every": 1,
        "beta": 0.2,
        **changes,
    }
    run = train(script, tmp_path / "run", **setup)
    got = lines_of(run, "held_out")[-1]
    for name, value in held_out_by_the_oracle(
        script, arguments(script, run, **setup)[1], run, folder, held_file
    ).items():
        assert got[name] == pytest.approx(value, abs=2e-4), name


def test_held_out_lines_every_eval_every(tmp_path, file13, held_file, llama):
    folder = train(
        "dpo",
        tmp_path / "run",
        model=llama,
        data=file13,
        eval_data=held_file,
        epochs=2,
        batch_size=4,
        eval_every=3,
        log_every=2,
    )
    assert [line["step"] for line in lines_of(folder, "held_out")] == [3, 6, 8]
    assert [line["step"] for line in lines_of(folder)] == [2, 4, 6, 8]


# -- accumulation


def weighted(plan, gradients) -> dict[str, torch.Tensor]:
    """Sum over steps of rows times gradient: however an epoch is cut, the same where the weights
    stand still.
    """
    return {name: sum(len(rows) * g[name] for rows, g in zip(plan, gradients)) for name in gradients[0]}


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name],
            value,
            rtol=1e-4,
            atol=1e-5 * value.abs().max().item() + 1e-6,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@every_script
@pytest.mark.parametrize(("batch_size", "micro_batch_size"), [(13, 1), (13, 8), (8, 8), (8, 3)])
def test_every_pair_weighs_the_same(script, batch_size, micro_batch_size, tmp_path, file13, llama):
    """One step of 13 rows in one piece, against other cuts: in pieces of 1 and 8, and in steps of 8
    and 5 rows.
    """
    still = {"model": llama, "data": file13, "lr": 1e-12, "max_grad_norm": math.inf}
    plan, gradients = recorded(script, tmp_path / "whole", batch_size=13, micro_batch_size=13, **still)
    assert len(plan) == 1
    expected = weighted(plan, gradients)
    plan, gradients = recorded(
        script, tmp_path / "cut", batch_size=batch_size, micro_batch_size=micro_batch_size, **still
    )
    assert sorted(map(len, plan)) == ([13] if batch_size == 13 else [5, 8])
    assert_same(weighted(plan, gradients), expected)
    logged = lines_of(tmp_path / "cut")
    for line, step in zip(logged, gradients):
        assert line["grad_norm"] == pytest.approx(
            torch.stack([g.norm() for g in step.values()]).norm().item(), rel=1e-5
        )


def test_micro_batches_of_1_train_like_one_of_8(tmp_path, file13, folder):
    runs = [
        train("dpo", tmp_path / str(size), model=folder, data=file13, micro_batch_size=size, lr=1e-3) for size in (8, 1)
    ]
    a, b = (safetensors.torch.load_file(run / "model.safetensors") for run in runs)
    assert_close_weights(a, b, 0.1 * 1e-3 * 2)
    for x, y in zip(lines_of(runs[0]), lines_of(runs[1])):
        assert numbers(x) == pytest.approx(numbers(y), rel=1e-3, abs=1e-4)


@every_script
def test_placeholder_micro_batches_count_nothing(script, tmp_path, file13, llama, monkeypatch):
    """With several processes, one that has no row left runs a row that must not count.

    Here each step gets one more such row.
    """
    plain = train(script, tmp_path / "plain", model=llama, data=file13)
    micro_batches = common.run.micro_batches

    def with_placeholder(rows, *rest):
        return [*micro_batches(rows, *rest), *([(rows[:1], 0.0)] if rows else [])]

    monkeypatch.setattr(common.run, "micro_batches", with_placeholder)
    padded = train(script, tmp_path / "padded", model=llama, data=file13)
    assert lines_of(padded) == lines_of(plain)
    assert weights(padded) == weights(plain)


def test_gradient_checkpointing_changes_no_gradient(tmp_path, file13, folder):
    setup = {"model": folder, "data": file13, "max_steps": 1}
    _, plain = recorded("dpo", tmp_path / "plain", **setup)
    _, checkpointed = recorded("dpo", tmp_path / "checkpointed", gradient_checkpointing=True, **setup)
    assert_same(checkpointed[0], plain[0])


@every_script
def test_clipping_learning_rate_and_decay_reach_the_optimiser(script, tmp_path, file13, llama):
    """One step from a known gradient: Adam's first step is the sign of the gradient times the
    learning rate.
    """
    setup = {"model": llama, "data": file13, "max_steps": 1, "warmup": 0.0, "weight_decay": 0.5, "lr": 1e-3}
    _, (gradients,) = recorded(script, tmp_path / "run", **setup)
    before, after = model_of(llama).state_dict(), safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    clip = min(1.0, 1.0 / (torch.stack([g.norm() for g in gradients.values()]).norm().item() + 1e-6))
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        g = clip * gradients[name]
        torch.testing.assert_close(
            after[name], before[name] * (1 - 0.5e-3) - 1e-3 * g / (g.abs() + 1e-8), rtol=1e-4, atol=2e-6
        )


@every_script
def test_several_steps_are_adamw_with_its_usual_betas(script, tmp_path, file13, llama):
    """Three steps from known gradients, by the formulas of Adam with betas .9 and .999; where the
    moments are forgotten sooner, the third step is another one.
    """
    setup = {"model": llama, "data": file13, "batch_size": 4, "max_steps": 3, "warmup": 0.0, "lr": 1e-3}
    _, gradients = recorded(script, tmp_path / "run", **setup)
    before, after = model_of(llama).state_dict(), safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        expected, first, second = before[name].double(), 0.0, 0.0
        for step, of_all in enumerate(gradients, 1):
            norm = torch.stack([g.norm() for g in of_all.values()]).norm().item()
            g = min(1.0, 1.0 / (norm + 1e-6)) * of_all[name].double()
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
            expected = expected - 1e-3 * (1 - (step - 1) / 3) * mean / (square.sqrt() + 1e-8)
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-4, atol=2e-6)


@every_script
def test_the_learning_rate_of_each_step_is_the_schedules(script, tmp_path, file13, llama, monkeypatch):
    """What the optimiser steps with, as it is at the step, and what is logged beside it."""
    used, step = [], torch.optim.AdamW.step

    def stepping(optimizer, *args, **kwargs):
        used.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    folder = train(script, tmp_path / "run", model=llama, data=file13, batch_size=2, warmup=2.0, lr=0.01)
    expected = [0.01 / 3, 0.02 / 3, 0.01, 0.008, 0.006, 0.004, 0.002]
    for rates in zip(*used):  # dph.py has two groups, which have the same rate unless one is given for the head
        assert list(rates) == pytest.approx(expected)
    assert [line["lr"] for line in lines_of(folder)] == pytest.approx(expected)


# -- resume

LONG = {
    "batch_size": 4,
    "epochs": 2,
    "save_every": 3,
    "log_every": 2,
    "eval_every": 3,
    "holdout": 0.2,
}  # 11 rows to train on: 2 x (4 + 4 + 3)
METHOD = {"dph": {"head_dropout": 0.2, "prior_decay": 0.1}}


def long_run(script, folder, model, file):
    return train(script, folder, model=model, data=file, **LONG, **METHOD.get(script, {}))


def at_step(monkeypatch, number, act):
    """Calls `act` when optimiser step `number` is about to be closed; returns the patch to undo."""
    end_step, done = Run.end_step, []

    def closing(run, *args):
        if run.step + 1 == number and not done:
            done.append(number)
            act()
        return end_step(run, *args)

    monkeypatch.setattr(Run, "end_step", closing)


def killed():
    raise Killed


def assert_same_run(a, b):
    assert [line["step"] for line in lines_of(a)] == [2, 4, 6]
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    assert weights(a) == weights(b)


@every_script
def test_a_killed_run_resumes_bit_for_bit(script, tmp_path, file13, llama, monkeypatch):
    whole = long_run(script, tmp_path / "whole", llama, file13)
    at_step(monkeypatch, 5, killed)
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        long_run(script, folder, llama, file13)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "spl')  # a line cut by the kill
    assert_same_run(resume(script, folder), whole)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6


@every_script
def test_ctrl_c_saves_and_resumes_bit_for_bit(script, tmp_path, file13, gpt2, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    whole = long_run(script, tmp_path / "whole", gpt2, file13)
    at_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGINT))
    folder = tmp_path / "stopped"
    with pytest.raises(SystemExit) as stopped:
        long_run(script, folder, gpt2, file13)
    assert stopped.value.code == 130
    assert f"python {script}.py --resume {folder}" in capsys.readouterr().out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000005"]
    assert signal.getsignal(signal.SIGINT) is handler  # given back
    assert_same_run(resume(script, folder), whole)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, file13, llama, monkeypatch):
    whole = long_run("dpo", tmp_path / "whole", llama, file13)
    at_step(monkeypatch, 2, killed)
    with pytest.raises(Killed):
        long_run("dpo", tmp_path / "killed", llama, file13)
    assert_same_run(resume("dpo", tmp_path / "killed"), whole)


@pytest.mark.parametrize("moment", ["weights", "optimiser", "rename", "after"])
def test_a_kill_while_a_checkpoint_is_written_leaves_a_good_one(moment, tmp_path, file13, llama, monkeypatch):
    whole = long_run("dpo", tmp_path / "whole", llama, file13)
    folder, writing = tmp_path / "killed", lambda path: "-00000006" in str(path)

    def dying(function, hit):
        def call(*args, **kwargs):
            if hit(*args):
                raise Killed
            return function(*args, **kwargs)

        return call

    def cut_short(tensors, path, *rest):
        if writing(path) and "optimizer" in str(path):
            path.write_bytes(b"\0" * 100)
            raise Killed
        return save_file(tensors, path, *rest)

    save_file = safetensors.torch.save_file
    patches = {
        "weights": (
            checkpoints,
            "save_model",
            dying(checkpoints.save_model, lambda model, tokenizer, where: writing(where)),
        ),
        "optimiser": (safetensors.torch, "save_file", cut_short),
        "rename": (
            os,
            "replace",
            dying(os.replace, lambda source, target: writing(target) and target.name.startswith("step-")),
        ),
        "after": (shutil, "rmtree", dying(shutil.rmtree, lambda path, *rest: path.name == "step-00000003")),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*patches[moment])
        with pytest.raises(Killed):
            long_run("dpo", folder, llama, file13)
    whole_ones = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert whole_ones == ["step-00000003"] + ["step-00000006"] * (moment == "after")
    assert_same_run(resume("dpo", folder), whole)


@pytest.mark.slow
def test_a_process_killed_by_the_system_is_resumed_from_the_command_line(tmp_path, file13, llama):
    whole = long_run("dpo", tmp_path / "whole", llama, file13)
    folder = tmp_path / "killed"
    words = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in {**SHORT, **LONG, "model": llama, "data": file13}.items()
    ]
    dying = "import os, sys, dpo, tyro\nfrom common.run import Run\nend_step = Run.end_step\n"
    dying += "Run.end_step = lambda run, *a: os.kill(os.getpid(), 9) if run.step == 4 else end_step(run, *a)\n"
    dying += "dpo.main(tyro.cli(dpo.Args))"
    process = start_process(["-c", dying, "--name", folder.name, "--output-dir", str(tmp_path), *words])
    assert process.returncode == -9, process.stderr
    refused = start_process(["dpo.py", "--resume", str(folder), "--lr=0.5"])
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert "--lr" in refused.stderr
    process = start_process(["dpo.py", "--resume", str(folder)])
    assert process.returncode == 0, process.stderr
    assert_same_run(folder, whole)


@pytest.mark.parametrize(("here", "there"), [(True, False), (False, True)])
def test_a_run_resumed_on_another_processor_keeps_its_dtype(here, there, tmp_path, file13, llama, monkeypatch):
    """--dtype auto is decided once: where the run began."""

    def processor(has_tiles: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_tiles}, raising=False)

    monkeypatch.setattr(model_loading, "is_tiny", lambda model: False)
    processor(here)
    whole = long_run("dpo", tmp_path / "whole", llama, file13)
    at_step(monkeypatch, 5, killed)
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        long_run("dpo", folder, llama, file13)
    began_with = "bfloat16" if here else "float32"
    assert json.loads((folder / "args.json").read_text())["dtype"] == began_with
    processor(there)
    with pytest.raises(SystemExit, match=f"--dtype is {began_with} in that run and cannot become"):
        resume("dpo", folder, dtype="float32" if here else "bfloat16")
    assert_same_run(resume("dpo", folder), whole)
    assert json.loads((folder / "summary.json").read_text())["args"]["dtype"] == began_with
    other = long_run("dpo", tmp_path / "other", llama, file13)
    assert weights(other) != weights(whole)  # the dtype matters: the check can fail


def test_resume_refuses_what_it_cannot_do(tmp_path, file13, llama, monkeypatch):
    finished = train("dpo", tmp_path / "finished", model=llama, data=file13, max_steps=1)
    with pytest.raises(SystemExit, match="finished"):
        resume("dpo", finished)
    at_step(monkeypatch, 2, killed)
    with pytest.raises(Killed):
        train("dpo", tmp_path / "killed", model=llama, data=file13)
    for field, value in (("lr", 0.5), ("beta", 0.7), ("model", "toy2"), ("seed", 3), ("micro_batch_size", 4)):
        with pytest.raises(
            SystemExit, match=f"--{field.replace('_', '-')} is .* in that run and cannot become {value}"
        ):
            resume("dpo", tmp_path / "killed", **{field: value})
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--resume", "x", "--lr", "1e-3"])  # the default, but said
    with pytest.raises(SystemExit, match="--lr is"):
        resume("dpo", tmp_path / "killed")
    monkeypatch.setattr(sys, "argv", ["dpo.py"])
    with pytest.raises(SystemExit, match="another script"):
        resume("cdpo", tmp_path / "killed")
    with pytest.raises(SystemExit, match="cannot be read"):
        resume("dpo", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert resume("dpo", tmp_path / "killed", lr=SHORT["lr"]).is_dir()  # the same value is no contradiction


def test_an_existing_name_is_refused(tmp_path, file13, llama):
    folder = train("dpo", tmp_path / "run", model=llama, data=file13, max_steps=1)
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    with pytest.raises(SystemExit, match="exists already"):
        train("dpo", folder, model=llama, data=file13, max_steps=1)
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} == before


def test_without_a_name_each_run_gets_one(tmp_path, file13, llama):
    module, _ = arguments("dpo", tmp_path / "run")
    for _ in range(2):
        module.main(
            module.Args(**{**SHORT, "model": llama, "data": file13, "max_steps": 1, "output_dir": str(tmp_path)})
        )
    stem = f"dpo-{os.path.basename(llama)}-seed0"
    assert sorted(path.name for path in tmp_path.iterdir()) == [stem, f"{stem}-2"]


# -- several processes


@pytest.mark.slow
@pytest.mark.parametrize(("script", "kind"), [("dpo", "tiny_gpt2"), ("dph", "tiny_llama")])
def test_two_processes_train_like_one(script, kind, request, tmp_path, file13, held_file):
    """Micro-batches of 2 in steps of 8 and 5 rows: in the last pass of the second one, one process
    has nothing left.
    """
    setup = {
        "model": str(request.getfixturevalue(kind)),
        "data": file13,
        "eval_data": held_file,
        "micro_batch_size": 2,
        "eval_every": 2,
        "lr": 1e-3,
    }
    setup |= {"save_every": 1, "kl_samples": 3, "max_new_tokens": 4}
    one = train(script, tmp_path / "one", **setup)
    words = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in {**SHORT, **setup, "name": "two", "output_dir": str(tmp_path)}.items()
    ]
    process = start_process(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"{script}.py", *words]
    )
    assert process.returncode == 0, process.stderr[-3000:]
    two = tmp_path / "two"
    a, b = (safetensors.torch.load_file(run / "model.safetensors") for run in (one, two))
    assert a.keys() == b.keys()
    assert_close_weights(a, b, 0.1 * 1e-3 * 2)
    for split in ("train", "held_out"):
        for x, y in zip(lines_of(one, split), lines_of(two, split), strict=True):
            assert numbers(x) == pytest.approx(numbers(y), rel=1e-3, abs=1e-3)
    x, y = numbers(lines_of(one)[0]), numbers(lines_of(two)[0])  # before any step: rounding alone
    assert x == pytest.approx(y, rel=1e-4, abs=1e-5)
    x, y = (json.loads((run / "summary.json").read_text()) for run in (one, two))
    assert (x["processes"], y["processes"]) == (1, 2)
    assert x["before"]["preference_accuracy"] == y["before"]["preference_accuracy"]
    assert (
        json.loads((one / "config.json").read_text())["architectures"]
        == json.loads((two / "config.json").read_text())["architectures"]
    )
    assert x.keys() == y.keys()


# -- what is saved, and used again


@every_script
def test_a_run_is_a_model_for_another_run(script, tmp_path, file13, llama):
    first = train(script, tmp_path / "first", model=llama, data=file13)
    for other in KNOWN:
        second = train(other, tmp_path / f"then-{other}", model=str(first), data=file13, max_steps=1)
        margin = lines_of(second)[0]["rewards/margins"]
        if other != "dph" or script != "dph":
            assert margin == pytest.approx(0, abs=1e-5)  # the reference is the first run's policy, not its base
        else:
            assert margin != 0  # the head goes on where it was


@every_script
def test_pad_is_not_eos_in_what_is_saved(script, tmp_path, file13):
    from transformers import AutoConfig, AutoTokenizer

    base = gpt2_like(tmp_path / "base")
    folder = train(script, tmp_path / "run", model=base, data=file13, max_steps=1)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    assert config.pad_token_id == model_loading.load_tokenizer(str(folder)).pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token is None  # a special token would vanish from decoded text
    assert tokenizer.eos_token == "<|endoftext|>"
    assert (
        len(tokenizer)
        == config.vocab_size
        == model_of(folder).get_input_embeddings().weight.shape[0]
        == AutoConfig.from_pretrained(base).vocab_size
    )


# -- bad ends


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run(where, tmp_path, file13, llama, monkeypatch):
    module = importlib.import_module("dpo")
    compute_loss, calls = module.compute_loss, []

    def broken(model, batch, beta):
        loss, metrics = compute_loss(model, batch, beta)
        calls.append(1)
        if len(calls) == 3:
            loss = loss * math.nan
            metrics = metrics | ({"loss": loss.detach()} if where == "loss" else {})
        return loss, metrics

    monkeypatch.setattr(module, "compute_loss", broken)
    with pytest.raises(SystemExit) as stopped:
        train("dpo", tmp_path / "run", model=llama, data=file13, batch_size=2, save_every=2, log_every=1000)
    message = str(stopped.value.code).strip()
    assert message.startswith(f"The {where} of step 3 is not finite")
    assert "step-00000002 is kept" in message
    assert "\n" not in message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_last_line_of_a_diverging_run_is_one_sentence(tmp_path, file13, llama):
    """A learning rate far too high, as a user has it: status 1 and one sentence, no traceback."""
    given = {**SHORT, "model": llama, "data": file13, "batch_size": 2, "name": "run", "output_dir": str(tmp_path)}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (given | {"lr": 1e30}).items()]
    program = f"import sys; sys.argv = ['dpo.py', *{words!r}]\nimport dpo, tyro\nfrom common import run\n"
    program += "run.RANGES['lr'] = run.POSITIVE\ndpo.main(tyro.cli(dpo.Args))"
    for started in (["dpo.py", *words], ["-c", program]):
        process = start_process(started)
        assert process.returncode == 1
        assert "Traceback" not in process.stderr
    assert "not finite: the learning rate is likely too high" in process.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("batch_size", 0, "--batch-size 0: expected at least 1"),
        ("micro_batch_size", 0, "--micro-batch-size"),
        ("lr", 0.0, "--lr"),
        ("lr", math.nan, "--lr"),
        ("epochs", 0.0, "--epochs"),
        ("max_steps", 0, "--max-steps"),
        ("max_length", 1, "--max-length"),
        ("holdout", 1.0, "--holdout"),
        ("warmup", -1.0, "--warmup"),
        ("max_grad_norm", 0.0, "--max-grad-norm"),
        ("dtype", "float8", "--dtype"),
        ("name", "a/b", "--name"),
        ("eval_every", 0, "--eval-every"),
        ("save_every", 0, "--save-every"),
        ("log_every", 0, "--log-every"),
        ("beta", 0.0, "--beta"),
        ("label_smoothing", 0.5, "--label-smoothing"),
        ("kl_samples", -1, "--kl-samples"),
    ],
)
def test_values_out_of_range_are_refused_in_one_sentence(field, value, words, tmp_path):
    module, args = arguments("cdpo", tmp_path / "run")
    with pytest.raises(SystemExit) as refused:
        module.main(module.Args(**{**vars(args), field: value}))
    message = str(refused.value.code)
    assert words in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


def test_models_that_are_none_are_refused_in_one_sentence(tmp_path, file13, llama):
    (tmp_path / "empty").mkdir()
    shutil.copytree(llama, tmp_path / "no_tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(llama, tmp_path / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    cases = {"/no/such/folder": "no such file or folder", str(tmp_path / "empty"): "no config.json"}
    cases |= {str(tmp_path / "no_tokenizer"): "tokenizer", str(tmp_path / "no_weights"): "cannot be loaded"}
    for model, words in cases.items():
        with pytest.raises(SystemExit) as refused:
            train("dpo", tmp_path / "run", model=model, data=file13)
        assert words in str(refused.value.code)
        assert "\n" not in str(refused.value.code)
        assert not (tmp_path / "run").exists()  # a wrong path leaves nothing behind


def test_a_hub_that_cannot_be_reached_is_one_sentence_at_once(tmp_path, file13, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    started = time.perf_counter()
    with pytest.raises(SystemExit) as refused:
        train("dpo", tmp_path / "run", model="nobody/no-such-model", data=file13)
    assert time.perf_counter() - started < 10
    assert "nobody/no-such-model" in str(refused.value.code)
    assert "\n" not in str(refused.value.code)
    assert "retry" not in capsys.readouterr().err.lower()
