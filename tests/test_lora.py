"""LoRA: --lora-rank and --merge, what they train, keep, save and load."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from adapters import lora
from common import InputError, data, evaluate, oracle
from common import models as model_loading
from common.run import Run
from judging import command
from rewards import models as reward_models
from tests import models
from tests.runs import (
    SHORT,
    assert_close_weights,
    gpt2_like,
    lines_of,
    model_of,
    pairs,
    recorded,
    resume,
    start_process,
    toy_examples,
    toy_reward_anywhere,
    train,
    train_until_killed,
    write_pairs,
)

RANK = 3
IDS = torch.tensor([[1, 5, 6, 7, 9, 11, 4]])


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="LoRA needs the package peft")


@pytest.fixture(scope="module")
def held_file(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data") / "held.jsonl", 7, seed=1)


@pytest.fixture
def first(peft, tmp_path, file13, folder) -> Path:
    """A LoRA run of dpo.py, of three steps."""
    return train("dpo", tmp_path / "first", model=folder, data=file13, lora_rank=RANK, epochs=2)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def adapted(folder: str, rank: int = RANK):
    """The folder's causal LM with a new adapter."""
    return lora.add_adapter(model_of(folder), rank, folder, folder)


def with_random_adapter(folder: str):
    """The same with an adapter that matters, as after training."""
    model = adapted(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def words_of(arguments: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]


# -- the first step


def test_a_new_adapter_changes_nothing(peft, folder):
    torch.manual_seed(0)
    model = adapted(folder)
    assert torch.equal(logits(model), logits(model_of(folder)))
    downs = [p for name, p in model.named_parameters() if ".lora_A." in name]
    assert all(p.abs().max() > 0 for p in downs)  # with both matrices zero nothing would train
    assert not torch.equal(logits(with_random_adapter(folder)), logits(model_of(folder)))


def test_the_first_loss_is_log_2_and_the_reference_is_the_start(peft, first, folder):
    line = lines_of(first)[0]
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert line["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert lines_of(first)[-1]["rewards/margins"] > 0.01


def test_gradients_reach_the_adapter_and_the_head_alone(peft, tmp_path, file13, folder):
    _, gradients = recorded("dph", tmp_path / "run", model=folder, data=file13, lora_rank=RANK)
    names = {name for name in gradients[1] if gradients[1][name].abs().max() > 0}
    layers = adapted(folder).adapter.layers
    kinds = ("lora_A", "lora_B")
    assert names == {"score.weight"} | {f"{layer}.{kind}.default.weight" for layer in layers for kind in kinds}
    blocks = {"gpt2": ("c_attn", "c_proj", "c_fc"), "llama": ("q_proj", "o_proj", "gate_proj", "down_proj")}
    kind = "gpt2" if any("c_attn" in layer for layer in layers) else "llama"
    for end in blocks[kind]:
        assert any(layer.endswith(end) for layer in layers)
    assert not any("lm_head" in layer or "wte" in layer for layer in layers)


def test_rank_and_alpha_are_saved(first, folder):
    settings = settings_of(first)
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (RANK, 2 * RANK, 0)
    assert settings["base_model_name_or_path"] == str(Path(folder).resolve())
    assert settings["task_type"] == "CAUSAL_LM"
    assert not (first / "model.safetensors").exists()
    tensors = safetensors.torch.load_file(first / "adapter_model.safetensors")
    assert all(value.shape[0] == RANK for name, value in tensors.items() if ".lora_A." in name)
    assert (first / "tokenizer.json").is_file()


# -- what is saved


def test_merged_and_unmerged_folders_give_the_same_logits(peft, tmp_path, file13, folder, first):
    from transformers import AutoModelForCausalLM

    merged = train("dpo", tmp_path / "merged", model=folder, data=file13, lora_rank=RANK, epochs=2, merge=True)
    assert not (merged / "adapter_config.json").exists()
    trained = logits(AutoModelForCausalLM.from_pretrained(merged))
    assert (trained - logits(model_of(folder))).abs().max() > 0.01
    by_peft = peft.AutoPeftModelForCausalLM.from_pretrained(first)
    for model in (by_peft, AutoModelForCausalLM.from_pretrained(first), model_of(first), model_of(merged)):
        torch.testing.assert_close(logits(model), trained, rtol=0, atol=1e-5)
    assert {name for name, _ in model_of(merged).named_parameters()} == {
        name for name, _ in model_of(folder).named_parameters()
    }


def test_what_is_saved_is_what_was_trained(peft, tmp_path, toy_tokenizer, folder):
    """The logits of the policy at hand, adapter and merged, and of what its two folders hold."""
    from common import checkpoints

    model = with_random_adapter(folder)
    expected = logits(model)
    for merge in (False, True):
        checkpoints.save_model(model, toy_tokenizer, tmp_path / f"{merge}", merge=merge)
        torch.testing.assert_close(logits(model_of(tmp_path / f"{merge}")), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)  # saving changes nothing


def test_a_run_on_top_of_an_adapter(peft, tmp_path, file13, held_file, first, folder):
    """Its reference is the first run's policy; what it saves belongs to the first run's base."""
    given = {"model": str(first), "data": file13, "eval_data": held_file, "lora_rank": 2, "epochs": 2}
    second = train("dpo", tmp_path / "second", **given)
    merged = train("dpo", tmp_path / "merged", **given, merge=True)
    assert lines_of(second)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    settings = settings_of(second)
    assert (settings["r"], settings["lora_alpha"]) == (RANK + 2, 2 * (RANK + 2))
    assert settings["base_model_name_or_path"] == str(Path(folder).resolve())
    trained = logits(model_of(merged))
    assert (trained - logits(model_of(first))).abs().max() > 0.01
    for model in (peft.AutoPeftModelForCausalLM.from_pretrained(second), model_of(second)):
        torch.testing.assert_close(logits(model), trained, rtol=0, atol=1e-5)
    # The cached reference, row by row, against the plain road through the first run's folder.
    rows, _ = data.usable(model_rows(held_file), lambda where, row: row)
    sequences = oracle.sequences_of(data.encode_rows(model_loading.load_tokenizer(str(first)), rows, 64))
    ref = safetensors.torch.load_file(second / "reference.safetensors")["held_out"]
    expected = oracle.plain_logps(model_of(first), sequences, 0).view(2, -1).T
    torch.testing.assert_close(ref, expected, rtol=0, atol=1e-4)


def model_rows(file: str) -> list:
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    return [("", ((row["prompt"], row["chosen"], row["rejected"]), None)) for row in rows]


def test_all_weights_can_train_on_top_of_an_adapter(first, tmp_path, file13):
    whole = train("dpo", tmp_path / "whole", model=str(first), data=file13)
    assert (whole / "model.safetensors").exists()
    assert lines_of(whole)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    a, b = dict(model_of(whole).named_parameters()), dict(model_of(first).named_parameters())
    assert all(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("script", ["dpo", "dph", "reward_model", "sft", "superhf", "ppo", "ulma"])
def test_every_script_trains_saves_and_goes_on(script, peft, tmp_path, file13, llama, monkeypatch):
    """A killed run resumes bit for bit from a checkpoint without weights but the adapter's."""
    monkeypatch.setattr(reward_models, "load_reward", toy_reward_anywhere(reward_models.load_reward))
    given = {"model": llama, "data": file13, "lora_rank": RANK, "batch_size": 4, "epochs": 2, "save_every": 2}
    given |= {"superhf": {"completions": 2}, "ulma": {"from_pairs": True}}.get(script, {})
    given |= {} if script == "reward_model" else {"kl_samples": 4, "max_new_tokens": 5}
    if script == "reward_model":
        monkeypatch.delitem(SHORT, "kl_samples")
    given["holdout"] = 0.2
    whole = train(script, tmp_path / "whole", **given)
    train_until_killed(script, tmp_path / "part", **given)
    (kept,) = (tmp_path / "part" / "checkpoints").iterdir()
    assert kept.name == "step-00000002"
    assert not (kept / "model.safetensors").exists()
    part = resume(script, tmp_path / "part")
    a, b = (safetensors.torch.load_file(run / "adapter_model.safetensors") for run in (part, whole))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (part / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    x, y = (json.loads((run / "summary.json").read_text()) for run in (part, whole))
    assert (x["before"], x["after"]) == (y["before"], y["after"])
    head = {"dph": "score.weight", "reward_model": "score.weight", "ppo": "value.weight"}.get(script)
    assert ({f"base_model.model.{head}"} if head else set()) <= a.keys()


def test_a_run_on_top_of_an_adapter_resumes_bit_for_bit(first, tmp_path, file13, monkeypatch):
    given = {"model": str(first), "data": file13, "lora_rank": 2, "save_every": 1, "batch_size": 4}
    whole = train("dpo", tmp_path / "whole", **given)
    end_step = Run.end_step

    def stop(run, *rest):
        if run.step == 2:
            raise RuntimeError("killed")
        return end_step(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_step", stop)
        with pytest.raises(RuntimeError, match="killed"):
            train("dpo", tmp_path / "part", **given)
    part = resume("dpo", tmp_path / "part")
    a, b = (safetensors.torch.load_file(run / "adapter_model.safetensors") for run in (part, whole))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_the_optimiser_keeps_state_of_the_adapter_alone(peft, tmp_path, file13, llama, monkeypatch):
    sizes, restored = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)  # the checkpoint stays
    folder = train("dpo", tmp_path / "run", model=llama, data=file13, lora_rank=RANK, save_every=1, max_steps=1)
    monkeypatch.setattr(shutil, "rmtree", restored)
    tensors = safetensors.torch.load_file(folder / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    sizes = {kind: sum(v.nbytes for n, v in tensors.items() if n.endswith(kind)) for kind in ("exp_avg", "exp_avg_sq")}
    adapter = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    expected = sum(value.nbytes for value in adapter.values())
    assert sizes == {"exp_avg": expected, "exp_avg_sq": expected}
    assert expected < sum(p.nbytes for p in model_of(llama).parameters()) / 3


# -- the reference


def test_without_its_adapter_a_trained_model_is_the_start(peft, folder):
    model = with_random_adapter(folder)
    start = lora.without_adapter(model)
    assert torch.equal(logits(start), logits(model_of(folder)))
    assert not torch.equal(logits(model), logits(start))  # the policy kept its adapter
    assert type(start) is type(model_of(folder))
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own for p in start.parameters())  # no second copy of the weights
    assert {name for name, _ in start.named_parameters()} == {n for n, _ in model_of(folder).named_parameters()}


def test_whole_models_have_no_start_to_take_out(folder):
    assert lora.without_adapter(model_of(folder)) is None


def test_a_kl_to_the_start_is_zero_and_grows(peft, folder):
    model, prompts, answers = adapted(folder), [[1, 5, 6], [1, 7]], [[4, 9, 2], [8, 2]]
    start = lora.without_adapter(model)
    assert evaluate.kl_of_samples(model, start, prompts, answers, 0).abs().max() == 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    assert evaluate.kl_of_samples(model, start, prompts, answers, 0).min() > 1e-4


def test_typo_takes_its_kl_to_the_start(peft, tmp_path, file13, llama):
    given = {"model": llama, "data": file13, "lora_rank": RANK, "epochs": 2, "max_new_tokens": 5}
    without, with_kl = (train("typo", tmp_path / f"{lam}", lam=lam, **given) for lam in (0.0, 5.0))
    a, b = lines_of(without), lines_of(with_kl)
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], abs=1e-5)  # a KL of 0
    assert b[1]["loss"] > a[1]["loss"] + 1e-3
    assert b[-1]["loss"] > a[-1]["loss"] + 1e-3


@pytest.mark.parametrize(("script", "name"), [("superhf", "kl"), ("ppo", "logratio")])
def test_sampling_scripts_take_their_kl_to_the_start(script, name, peft, tmp_path, file13, llama, monkeypatch):
    monkeypatch.setattr(reward_models, "load_reward", toy_reward_anywhere(reward_models.load_reward))
    given = {"model": llama, "data": file13, "lora_rank": RANK, "completions": 2, "max_new_tokens": 5, "kl": 0.0}
    run = train(script, tmp_path / "run", epochs=3, **given)
    values = [abs(line[name]) for line in lines_of(run)]
    assert values[0] < 1e-7
    assert values[-1] > 1e-3


# -- heads


@pytest.mark.parametrize("merge", [False, True])
def test_the_head_of_dph_is_saved_and_scores_alike(merge, peft, tmp_path, file13, held_file, folder):
    from transformers import AutoModelForSequenceClassification

    run = train("dph", tmp_path / "run", model=folder, data=file13, lora_rank=RANK, epochs=4, merge=merge, n=2)
    output = tmp_path / "scores.jsonl"
    command.main(command.Args(model=str(run), data=held_file, output=str(output)))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert all("chosen_reward" in line for line in lines)  # the folder has a head
    chosen, rejected = ([line[f"{side}_reward"] for line in lines] for side in ("chosen", "rejected"))
    assert max(map(abs, chosen + rejected)) > 0.01
    if merge:
        classifier = AutoModelForSequenceClassification.from_pretrained(run)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        config = peft.PeftConfig.from_pretrained(run)
        config.task_type = None  # peft's class for causal models wants to generate
        classifier = peft.PeftModel.from_pretrained(base, run, config=config)
    classifier.eval()
    prompts = [row["prompt"] for row in pairs(7, seed=1)]
    tokenizer = model_loading.load_tokenizer(str(run))
    reward = reward_models.load_reward(str(run), "file", "cpu", torch.no_grad)
    for side, expected in (("chosen", chosen), ("rejected", rejected)):
        answers = [row[side] for row in pairs(7, seed=1)]
        torch.testing.assert_close(reward(prompts, answers), torch.tensor(expected), rtol=0, atol=1e-5)
        for prompt, answer, value in zip(prompts, answers, expected):
            ids = torch.tensor([tokenizer(prompt + answer).input_ids + [tokenizer.eos_token_id]])
            with torch.no_grad():
                assert classifier(input_ids=ids).logits.item() == pytest.approx(value, abs=1e-5)


def test_a_head_goes_on_where_it_was(peft, tmp_path, file13, llama):
    first = train("dph", tmp_path / "first", model=llama, data=file13, lora_rank=RANK, epochs=4, n=1)
    second = train("dph", tmp_path / "second", model=str(first), data=file13, lora_rank=2, max_steps=1, lr=1e-9, n=1)
    a, b = (model_loading.load_weights(run, "score.weight")["score.weight"] for run in (first, second))
    assert a.abs().max() > 0.001
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model_of(first)), logits(model_of(second)), rtol=0, atol=1e-4)


def test_a_reward_model_judges_other_runs(peft, tmp_path, file13, llama, monkeypatch):
    """In its folder with the adapter, merged, and by peft alone: the same rewards."""
    monkeypatch.delitem(SHORT, "kl_samples")
    given = {"model": llama, "data": file13, "lora_rank": RANK, "epochs": 4}
    alone, merged = (train("reward_model", tmp_path / f"{m}", merge=m, **given) for m in (False, True))
    by_peft = peft.AutoPeftModelForSequenceClassification.from_pretrained(alone, num_labels=1).eval()
    prompts, answers = zip(*((row["prompt"], row["chosen"]) for row in pairs(5, seed=2)))
    values = [
        reward_models.load_reward(str(f), "file", "cpu", torch.no_grad)(prompts, answers) for f in (alone, merged)
    ]
    assert values[1].abs().max() > 0.01
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-5)
    tokenizer = model_loading.load_tokenizer(str(alone))
    for prompt, answer, value in zip(prompts, answers, values[1]):
        ids = torch.tensor([tokenizer(prompt + answer).input_ids + [tokenizer.eos_token_id]])
        with torch.no_grad():
            assert by_peft(input_ids=ids).logits.item() == pytest.approx(value.item(), abs=1e-5)


# -- other people's adapters


def foreign(peft, base: str, folder: Path, **settings) -> str:
    """An adapter that peft makes and saves, with random B, beside the base's tokenizer."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model_of(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    saved = settings_of(folder) | {"base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(saved))
    model_loading.load_tokenizer(base).save_pretrained(folder)
    return str(folder)


def test_a_start_from_an_adapter_that_peft_made(peft, tmp_path, file13, llama):
    """On two kinds of layers and with another scaling: read, and saved together with ours."""
    start = foreign(peft, llama, tmp_path / "foreign", r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    expected = logits(peft.AutoPeftModelForCausalLM.from_pretrained(start))
    torch.testing.assert_close(logits(model_of(start)), expected, rtol=0, atol=1e-5)
    given = {"model": start, "data": file13, "lora_rank": RANK, "epochs": 2}
    run, merged = (train("dpo", tmp_path / f"{m}", merge=m, **given) for m in (False, True))
    by_peft = peft.AutoPeftModelForCausalLM.from_pretrained(run)
    torch.testing.assert_close(logits(by_peft), logits(model_of(merged)), rtol=0, atol=1e-5)
    assert (logits(by_peft) - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "use_dora"),
        ({"use_rslora": True, "target_modules": ["q_proj"]}, "use_rslora"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "bias"),
        ({"rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj"]}, "rank_pattern"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    ],
)
def test_adapters_of_other_kinds_are_refused(settings, word, peft, tmp_path, llama):
    start = foreign(peft, llama, tmp_path / "foreign", r=2, **settings)
    with pytest.raises(InputError, match=f"only plain LoRA adapters .*{word}"):
        model_of(start)


def test_an_adapter_beyond_the_blocks_is_refused_as_a_start_of_another(peft, tmp_path, file13, llama):
    start = foreign(peft, llama, tmp_path / "foreign", r=2, target_modules=["lm_head"])
    expected = logits(peft.AutoPeftModelForCausalLM.from_pretrained(start))
    torch.testing.assert_close(logits(model_of(start)), expected, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="its adapter changes lm_head"):
        train("dpo", tmp_path / "run", model=start, data=file13, lora_rank=RANK)
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_does_not_fit_or_has_no_base_is_refused(peft, tmp_path, llama, gpt2):
    start = Path(foreign(peft, llama, tmp_path / "foreign", r=2, target_modules=["q_proj"]))
    settings = settings_of(start)
    for base, words in ((gpt2, "does not fit its base"), (str(start), "is an adapter too"), (None, "expected r, ")):
        (start / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        with pytest.raises(InputError, match=words):
            model_of(start)
    (start / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": llama}))
    (start / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(InputError, match=r"adapter_model.safetensors: cannot be read"):
        model_of(start)


def test_the_base_is_taken_at_the_revision_that_was_trained_on(peft, tmp_path, llama):
    """As a download of the hub's lies in its cache, with the revision in its path."""
    snapshot = tmp_path / "models--org--base" / "snapshots" / "0a1b2c"
    shutil.copytree(llama, snapshot)
    model = lora.add_adapter(model_of(snapshot), RANK, "org/base", str(snapshot))
    lora.save_adapter(model, model.state_dict(), tmp_path / "adapter")
    asked = []

    def resolve(name, flag, revision):
        asked.append((name, revision))
        return str(snapshot)

    assert lora.base_folder(str(tmp_path / "adapter"), resolve) == str(snapshot)
    assert asked == [("org/base", "0a1b2c")]


def test_hashes_of_an_adapter_are_of_its_base_too(first, folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    before = model_loading.sha256_of_model(str(first))
    settings = settings_of(first)
    (first / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(other)}))
    assert model_loading.sha256_of_model(str(first)) == before
    weights = safetensors.torch.load_file(other / "model.safetensors")
    name = next(iter(weights))
    safetensors.torch.save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", {"format": "pt"})
    assert model_loading.sha256_of_model(str(first)) != before
    assert json.loads((first / "sources.json").read_text())["model_sha256"] == model_loading.sha256_of_model(folder)


# -- refusals


def test_a_missing_peft_says_what_to_install(tmp_path, file13, llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"--lora-rank 4: needs peft .*pip install peft"):
        train("dpo", tmp_path / "run", model=llama, data=file13, lora_rank=4)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_an_adapter_loads_without_peft(first, monkeypatch):
    expected = logits(model_of(first))
    monkeypatch.setitem(sys.modules, "peft", None)
    assert torch.equal(logits(model_of(first)), expected)


def test_arguments_that_do_not_go_together(tmp_path, file13, llama):
    import dph

    with pytest.raises(InputError, match="--merge: without an adapter"):
        train("dpo", tmp_path / "run", model=llama, data=file13, merge=True)
    with pytest.raises(InputError, match="--lora-rank -1: expected at least 0"):
        train("dpo", tmp_path / "run", model=llama, data=file13, lora_rank=-1)
    for given in ({"freeze_backbone": True}, {"prior_decay": 0.1}):
        with pytest.raises(SystemExit, match="--lora-rank keeps the LM's own weights"):
            dph.Args(lora_rank=4, **given)
    assert not (tmp_path / "run").exists()


# -- with other options


def same_run_with(option: str, base: str, file: str, tmp_path: Path) -> None:
    given = {"model": base, "data": file, "lora_rank": RANK, "max_steps": 2}
    a, b = (train("dpo", tmp_path / f"{on}", **given, **{option: on}) for on in (False, True))
    a, b = (safetensors.torch.load_file(run / "adapter_model.safetensors") for run in (a, b))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_run(peft, tmp_path, file13, folder):
    same_run_with("gradient_checkpointing", folder, file13, tmp_path)


@pytest.mark.study
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a compiler")
def test_compiling_gives_the_same_run(peft, tmp_path, file13, gpt2):
    same_run_with("compile", gpt2, file13, tmp_path)


def test_models_in_the_manner_of_gpt2_and_encoders(peft, tmp_path, file13, monkeypatch):
    """One special token, no pad token; and an encoder whose pooler and classifier are new."""
    from transformers import BertConfig, BertModel

    base = gpt2_like(tmp_path / "gpt2")
    run = train("dpo", tmp_path / "run", model=base, data=file13, lora_rank=RANK, epochs=2)
    assert not torch.equal(logits(model_of(run)), logits(model_of(base)))
    tokenizer = models.byte_tokenizer(bos=True, eos=True)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **shape), add_pooling_layer=False)
    base = models.save(encoder, tokenizer, tmp_path / "bert")
    monkeypatch.delitem(SHORT, "kl_samples")
    alone, merged = (
        train("reward_model", tmp_path / f"{m}", model=str(base), data=file13, lora_rank=RANK, epochs=2, merge=m)
        for m in (False, True)
    )
    prompts, answers = zip(*((row["prompt"], row["chosen"]) for row in pairs(5, seed=2)))
    values = [
        reward_models.load_reward(str(f), "file", "cpu", torch.no_grad)(prompts, answers) for f in (alone, merged)
    ]
    assert values[1].abs().max() > 1e-3
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-5)


def test_training_rows_of_many_lengths_agree_with_the_oracle(peft, folder):
    """The fast path with an adapter on: body, output layer and shared prompts are still found."""
    import dpo
    from common import batches

    model = with_random_adapter(folder)
    rows = toy_examples(folder)
    batch = batches.collate(rows, 0, "shared", "cpu")
    with torch.no_grad():
        fast = dpo.completion_logps(model, batch)
    torch.testing.assert_close(fast, oracle.plain_logps(model, oracle.sequences_of(rows), 0), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "kind"), [("dpo", "tiny_gpt2"), ("dph", "tiny_llama")])
def test_two_processes_train_like_one(script, kind, request, peft, tmp_path, file13, held_file):
    setup = {"model": str(request.getfixturevalue(kind)), "data": file13, "eval_data": held_file, "lora_rank": RANK}
    setup |= {"micro_batch_size": 2, "eval_every": 2, "lr": 1e-3, "save_every": 1, "kl_samples": 3, "max_new_tokens": 4}
    one = train(script, tmp_path / "one", **setup)
    words = words_of({**SHORT, **setup, "name": "two", "output_dir": str(tmp_path)})
    process = start_process(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"{script}.py", *words]
    )
    assert process.returncode == 0, process.stderr[-3000:]
    a, b = (safetensors.torch.load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", "two"))
    assert a.keys() == b.keys()
    assert_close_weights(a, b, 0.1 * 1e-3 * 2)
    for x, y in zip(lines_of(one), lines_of(tmp_path / "two"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
    x, y = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "two"))
    assert (x["processes"], y["processes"]) == (1, 2)
    assert y["after"]["kl"] > 0
