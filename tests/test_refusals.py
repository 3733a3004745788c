"""Cases in which a run once ended well and its numbers were wrong: now a sentence, or right."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import mle_pretrain
import typo
from common import InputError, batches, evaluate
from common import models as model_loading
from common.run import default_learning_rate
from report import table
from rewards.models import load_classifier
from tests import models
from tests.runs import ROOT, arguments, lines_of, resume, start_process, train, write_pairs
from toy import base, world


@pytest.fixture
def pairs13(tmp_path) -> str:
    return write_pairs(tmp_path / "pairs.jsonl", 13)


@pytest.fixture
def copy_of_llama(tmp_path, tiny_llama) -> Path:
    """A copy of the tiny Llama's folder that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def change_weights(folder: Path, change) -> None:
    """Rewrites a folder's weights as `change(weights)` leaves them."""
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


# -- models


@pytest.mark.parametrize("script", ["dpo", "dph", "sft", "pointwise_dpo"])
def test_a_bidirectional_model_is_refused(script, tmp_path, pairs13, toy_tokenizer):
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(toy_tokenizer), max_position_embeddings=128, initializer_range=0.2, **shape)
    folder = models.save(BertLMHeadModel(config).eval(), toy_tokenizer, tmp_path / "bert")
    given = {"from_pairs": True} if script == "pointwise_dpo" else {}
    with pytest.raises(InputError, match="bidirectional"):
        train(script, tmp_path / "run", model=str(folder), data=pairs13, **given)
    assert not (tmp_path / "run").exists()


def test_missing_weights_are_refused_by_name(copy_of_llama, tmp_path, pairs13):
    gone = "model.layers.1.mlp.up_proj.weight"
    change_weights(copy_of_llama, lambda weights: weights.pop(gone))
    with pytest.raises(InputError, match=re.escape(f"weights are missing in the folder ({gone})")):
        train("dpo", tmp_path / "run", model=str(copy_of_llama), data=pairs13)


def test_a_classifier_without_its_output_layer_is_no_policy(tmp_path, pairs13, tiny_gpt2):
    from transformers import GPT2ForSequenceClassification

    folder = Path(shutil.copytree(tiny_gpt2, tmp_path / "classifier"))
    GPT2ForSequenceClassification.from_pretrained(tiny_gpt2, num_labels=1).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        train("dpo", tmp_path / "run", model=str(folder), data=pairs13)


def test_of_a_classifier_the_new_head_alone_may_be_missing(copy_of_llama, toy_tokenizer):
    model = load_classifier(str(copy_of_llama), "cpu", toy_tokenizer)
    assert model.score.weight.abs().sum() == 0
    change_weights(copy_of_llama, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        load_classifier(str(copy_of_llama), "cpu", toy_tokenizer)


def test_weights_that_are_not_finite_are_named(copy_of_llama, tmp_path, pairs13):
    change_weights(copy_of_llama, lambda weights: weights["model.norm.weight"].fill_(math.nan))
    with pytest.raises(InputError, match=r"model\.norm\.weight holds values that are not finite"):
        train("dpo", tmp_path / "run", model=str(copy_of_llama), data=pairs13)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(copy_of_llama, tmp_path, pairs13):
    tokenizer = model_loading.load_tokenizer(str(copy_of_llama))
    tokenizer.add_tokens(["zyx"])
    tokenizer.save_pretrained(copy_of_llama)
    with pytest.raises(InputError, match="the tokenizer has ids up to"):
        train("dpo", tmp_path / "run", model=str(copy_of_llama), data=pairs13)


def test_code_that_comes_with_a_model_is_not_run(tmp_path, pairs13, copy_of_llama):
    """Even where somebody says yes on standard input."""
    ran = tmp_path / "ran"
    config = json.loads((copy_of_llama / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (copy_of_llama / "config.json").write_text(json.dumps(config))
    (copy_of_llama / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
    words = ["dpo.py", "--model", str(copy_of_llama), "--data", pairs13, "--output-dir", str(tmp_path / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, input="y\ny\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(copy_of_llama) in done.stderr
    assert not ran.exists()


@pytest.mark.parametrize("script", ["dpo", "dph", "ulma"])
def test_llama_4_types_train(script, tmp_path, pairs13, toy_tokenizer):
    """They name a body that they do not have: `base_model` is the model itself."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2}
    config = Llama4TextConfig(vocab_size=len(toy_tokenizer), max_position_embeddings=128, **shape, **models.ENDS)
    folder = models.save(Llama4ForCausalLM(config).eval(), toy_tokenizer, tmp_path / "llama4")
    given = {"from_pairs": True} if script == "ulma" else {}
    run = train(script, tmp_path / "run", model=str(folder), data=pairs13, max_steps=1, **given)
    assert math.isfinite(lines_of(run)[0]["loss"])
    if script == "dpo":
        assert lines_of(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_entries_that_are_masked_in_both_models_count_nothing(bigram):
    logits, ref_logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True), torch.randn(4, 7).double()
    mask = torch.zeros(7).bool()
    mask[2] = True
    values = typo.forward_kl(logits.masked_fill(mask, -math.inf), ref_logits.masked_fill(mask, -math.inf))
    keep = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(values, typo.forward_kl(logits[:, keep], ref_logits[:, keep]))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert bool(gradient.isfinite().all())
    policy, ref = bigram.load(), models.bigram_model(models.random_table(len(bigram.table), seed=1))

    def hide(module, inputs, output):
        return output.index_fill(-1, torch.tensor([6]), -math.inf)

    for model in (policy, ref):
        model.lm_head.register_forward_hook(hide)
    kl = evaluate.kl_of_samples(policy, ref, [[5, 4]], [[7, 8, 2]], 0)
    assert bool(kl.isfinite().all())
    assert kl.item() > 0


# -- runs that are taken up again


def cut_short(folder: Path, monkeypatch, **given) -> None:
    """A run of dpo.py that dies after its second step, with a checkpoint."""
    from common.run import Run

    logged = Run.log

    def dying(self, split, metrics):
        logged(self, split, metrics)
        if self.step == 2:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", dying)
        with pytest.raises(RuntimeError, match="killed"):
            train("dpo", folder, batch_size=4, save_every=1, **given)


def test_resuming_on_rows_in_another_order_is_refused(tmp_path, pairs13, tiny_llama, monkeypatch):
    cut_short(tmp_path / "run", monkeypatch, model=str(tiny_llama), data=pairs13)
    lines = Path(pairs13).read_text().splitlines(True)
    Path(pairs13).write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(InputError, match="rows of the data are not those that the run began with"):
        resume("dpo", tmp_path / "run")
    Path(pairs13).write_text("".join(lines))
    resume("dpo", tmp_path / "run")


def test_resuming_on_other_weights_is_refused(tmp_path, pairs13, copy_of_llama, monkeypatch):
    cut_short(tmp_path / "run", monkeypatch, model=str(copy_of_llama), data=pairs13)
    change_weights(copy_of_llama, lambda weights: weights["model.norm.weight"].mul_(1.01))
    with pytest.raises(InputError, match="weights of the model are not those that the run began with"):
        resume("dpo", tmp_path / "run")


@pytest.mark.parametrize("change", ["one missing", "one unknown"])
def test_arguments_that_do_not_fit_the_script_are_refused(change, tmp_path, pairs13, tiny_llama, monkeypatch):
    cut_short(tmp_path / "run", monkeypatch, model=str(tiny_llama), data=pairs13)
    path = tmp_path / "run" / "args.json"
    saved = json.loads(path.read_text())
    if change == "one missing":
        del saved["beta"]
    else:
        saved["gamma"] = 1.0
    path.write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"do not have the same arguments .(beta|gamma)"):
        resume("dpo", tmp_path / "run")


def test_what_a_kill_leaves_of_a_folder_is_in_nobodys_way(tmp_path, pairs13, tiny_llama):
    """A kill while the folder is made leaves only its part, under another name."""
    (tmp_path / ".run.part").mkdir()
    (tmp_path / ".run.part" / "script.py").write_text("")
    folder = train("dpo", tmp_path / "run", model=str(tiny_llama), data=pairs13, max_steps=1)
    assert (folder / "args.json").exists()
    assert not (tmp_path / ".run.part").exists()


def test_a_resumed_run_takes_the_revision_of_the_hub_that_it_began_with(tmp_path, pairs13, tiny_llama, monkeypatch):
    """A cache of the hub with two revisions, "main" moving on from the first to the second."""
    hub, ref = tmp_path / "hub", tmp_path / "hub" / "models--some--model" / "refs" / "main"
    revisions = ["1" * 40, "2" * 40]
    for revision in revisions:
        shutil.copytree(tiny_llama, ref.parent.parent / "snapshots" / revision)
    change_weights(ref.parent.parent / "snapshots" / revisions[1], lambda weights: weights["model.norm.weight"].mul_(2))
    ref.parent.mkdir()
    ref.write_text(revisions[0])
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **given: download(name, cache_dir=hub, **given)
    )
    cut_short(tmp_path / "run", monkeypatch, model="some/model", data=pairs13)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["model_revision"] == revisions[0]
    ref.write_text(revisions[1])
    folder = resume("dpo", tmp_path / "run")
    assert json.loads((folder / "summary.json").read_text())["model_revision"] == revisions[0]
    model_loading.PINNED.clear()


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="XDG_CACHE_HOME names another folder"):
        base.base_model(99)


def test_candidates_are_written_once(tmp_path, pairs13, tiny_llama):
    given = {"model": str(tiny_llama), "data": pairs13, "holdout": 0.3, "kl_samples": 3, "max_new_tokens": 4, "n": 2}
    folder = train("dph", tmp_path / "run", max_steps=1, **given)
    lines = [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]
    assert [line["column"] for line in lines] == ["after_best_of_n"] * 3 + ["reference_best_of_n"] * 3
    assert all(len(line["answers"]) == len(line["rewards"]) == 2 for line in lines)


# -- numbers


def test_the_default_learning_rate_depends_on_the_model(tmp_path, pairs13, tiny_llama, capsys):
    folder = train("dpo", tmp_path / "run", model=str(tiny_llama), data=pairs13, max_steps=1, lr=None)
    assert json.loads((folder / "args.json").read_text())["lr"] == 1e-5
    assert "learning rate 1e-05" in capsys.readouterr().out.splitlines()[0]
    _, toy = arguments("dpo", tmp_path / "toy", model="toy", lr=None)
    assert default_learning_rate(toy) == 1e-3
    assert default_learning_rate(mle_pretrain.Args()) == 1e-2
    assert default_learning_rate(mle_pretrain.Args(model="gpt2-small")) == 1e-3


@pytest.mark.parametrize("lr", [1e30, 1.5, math.nan, 0.0])
def test_learning_rates_that_destroy_a_model_are_refused(lr, tmp_path, pairs13, tiny_llama):
    with pytest.raises(InputError, match=r"--lr .*: expected above 0 and at most 1"):
        train("dpo", tmp_path / "run", model=str(tiny_llama), data=pairs13, max_steps=1, lr=lr)


@pytest.mark.parametrize("holdout", [0.3, 0.0])
def test_a_model_that_the_last_step_destroyed_ends_in_a_sentence(holdout, tmp_path, pairs13, tiny_llama, monkeypatch):
    """The step's own loss was finite; what comes after it is not."""
    step = torch.optim.AdamW.step

    def destroying(self, *rest):
        step(self, *rest)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", destroying)
    with pytest.raises(InputError, match="is not finite"):
        train("dpo", tmp_path / "run", model=str(tiny_llama), data=pairs13, max_steps=1, holdout=holdout)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_means_of_samples_have_their_standard_errors(toy_base, tmp_path, capsys):
    folder = train("dpo", tmp_path / "run", model="toy", kl_samples=60, max_steps=2)
    after = json.loads((folder / "summary.json").read_text())["after"]
    for name in ("preference_accuracy", "reward_accuracy", "kl", "true_reward", "right_share", "rude_share"):
        assert after[f"{name}_se"] > 0, name
    words = table.cell(after, "true_reward")
    assert re.fullmatch(r"-?[\d.]+ ± [\d.]+", words)
    assert words in capsys.readouterr().out
    row = world.questions()[0]
    answers = [(world.prompt_of(row), f"it is {row['right']} ."), (world.prompt_of(world.questions()[1]), "it is x .")]
    judged = world.judge_answers(answers)
    assert judged["true_reward"] == 0.0
    assert judged["true_reward_se"] == pytest.approx(1.0)  # two questions, 1 and -1: deviation sqrt 2 over sqrt 2


def test_the_last_line_averages_a_whole_window(tmp_path, pairs13, tiny_llama):
    given = {"model": str(tiny_llama), "data": pairs13, "batch_size": 2, "epochs": 1.0}
    single = lines_of(train("dpo", tmp_path / "single", log_every=1, **given))
    threes = lines_of(train("dpo", tmp_path / "threes", log_every=3, **given))
    assert [line["step"] for line in threes] == [3, 6, 7]
    pairs = [2, 2, 2, 2, 2, 2, 1]
    losses = [line["loss"] for line in single]
    for line in threes:
        window = range(line["step"] - 3, line["step"])
        expected = sum(pairs[i] * losses[i] for i in window) / sum(pairs[i] for i in window)
        assert line["loss"] == pytest.approx(expected, rel=1e-6)


def test_plans_end_where_the_steps_do():
    rows = [{"prompt": [1], "completions": [[2]]} for _ in range(10)]
    assert len(batches.plan_batches(rows, 2, 1e12, 3, seed=0)) == 3
    with pytest.raises(ValueError, match="more than"):
        batches.plan_batches(rows, 10, 1e12, -1, seed=0)


# -- messages


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"name": ".."}, r"--name \.\.: expected one folder name"),
        ({"epochs": math.inf}, "--epochs inf: expected a positive number"),
        ({"beta": math.nan}, "--beta nan: expected a positive number"),
    ],
)
def test_arguments_out_of_range(given, sentence, tmp_path, pairs13, tiny_llama):
    with pytest.raises(InputError, match=sentence):
        train("dpo", tmp_path / "run", **({"model": str(tiny_llama), "data": pairs13} | given))


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(model_loading, "resolve_model", lambda *rest: pytest.fail("a model was looked for"))
    with pytest.raises(InputError, match="nothing can be written"):
        train("dpo", tmp_path / "file" / "run")


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path, pairs13, tiny_llama):
    """As with "| head -1"."""
    words = ["dpo.py", "--model", str(tiny_llama), "--data", pairs13, "--max-steps", "2", "--kl-samples", "0"]
    command = (
        f"{sys.executable} {' '.join(words)} --name run --output-dir {tmp_path} | head -1; exit ${{PIPESTATUS[0]}}"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert (tmp_path / "run" / "summary.json").exists()


def test_ctrl_c_outside_of_the_loop_is_one_sentence(tmp_path):
    program = "import dpo\nfrom common.run import start_run\n"
    program += f"start_run(dpo.Args(output_dir={str(tmp_path)!r}), 'dpo.py')\nraise KeyboardInterrupt"
    done = start_process(["-c", program])
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "Interrupted" in done.stderr


@pytest.mark.parametrize("script", ["dpo", "ulma", "ppo"])
def test_a_missing_file_of_rows_is_refused_before_the_toys_base_model_is_built(script, tmp_path, pairs13, monkeypatch):
    def asked(*_args, **_more):
        raise InputError("the base model was asked for")

    monkeypatch.setattr(base, "base_model", asked)
    gone = str(tmp_path / "gone.jsonl.gz")
    for given in ({"data": gone}, {"data": pairs13, "eval_data": gone}):
        with pytest.raises(InputError, match=rf"^{re.escape(gone)}: no such file\.$"):
            train(script, tmp_path / "run", model="toy", **given)
    assert not (tmp_path / "run").exists()
