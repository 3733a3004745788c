"""A run's folder loads elsewhere with the same numbers: in this version of transformers, and in
4.57 where the environment variable PREFERENCE_TRANSFORMERS4 names the python of one with it.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch

from common import checkpoints
from common import models as model_loading
from report import folders
from tests import models, reader
from tests.runs import SHORT, gpt2_like, train, write_pairs

IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0)).tolist()
TEXTS = ["Is it so ?", "The sky is blue ; it is, isn't it .", "a"]
TOY_TEXTS = ["question : which animal lives in the forest ?", "the answer is the fox .", "the"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 500000.0, "original_max_position_embeddings": 16}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2}
WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}


def gemma(vocabulary: int):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    shape = {**SHAPE, **WINDOWED, "query_pre_attn_scalar": 8, "rope_parameters": BY_KIND}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=vocabulary, **shape, **models.ENDS)).eval()


def qwen(vocabulary: int):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = {**SHAPE, **WINDOWED, "use_sliding_window": True, "tie_word_embeddings": True}
    shape["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **shape, **models.ENDS)).eval()


def neox(vocabulary: int):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    shape = {name: value for name, value in SHAPE.items() if name not in {"num_key_value_heads", "head_dim"}}
    shape["rope_parameters"] = {"rope_type": "default", "rope_theta": 30000.0, "partial_rotary_factor": 0.5}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocabulary, **shape, **models.ENDS)).eval()


def theta(value: float) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


def with_pad_token(run: Path, copy: Path) -> str:
    """A copy of a run's folder for programs that pad with EOS where a tokenizer has no pad token,
    as README.md says.
    """
    from transformers import AutoConfig, AutoTokenizer

    shutil.copytree(run, copy)
    path = copy / "tokenizer_config.json"
    about, pad_id = json.loads(path.read_text()), AutoConfig.from_pretrained(run).pad_token_id
    assert about["pad_token"] is None
    about["pad_token"] = AutoTokenizer.from_pretrained(run).convert_ids_to_tokens(pad_id)
    path.write_text(json.dumps(about))
    assert AutoTokenizer.from_pretrained(copy).pad_token_id == pad_id
    return str(copy)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, toy_base) -> dict[str, tuple]:
    """Folders as runs save them, by name: (folder, kind, texts, ids)."""
    root = tmp_path_factory.mktemp("folders")
    tokenizer = models.byte_tokenizer(bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    size = len(tokenizer)
    made = {
        "llama": models.tiny_llama(size, **theta(500000.0)),
        "llama3": models.tiny_llama(size, tie_word_embeddings=True, rope_parameters=LLAMA3),
        "gemma": gemma(size),
        "qwen": qwen(size),
        "neox": neox(size),
    }
    found = {}
    for name, model in made.items():
        (root / name).mkdir()
        checkpoints.save_model(model, tokenizer, root / name)
        with torch.no_grad():
            safetensors.torch.save_file(
                {"logits": model(input_ids=torch.tensor(IDS)).logits.contiguous()}, root / name / "expected.safetensors"
            )
        found[name] = (str(root / name), "lm", [*TEXTS, "a<|turn|> b"], IDS)
    file = write_pairs(root / "pairs.jsonl", 13)
    base = gpt2_like(root / "base")
    start = models.save(models.tiny_llama(size, **theta(200000.0)), tokenizer, root / "start")
    short = {"data": file, "max_steps": 2}
    found["gpt2"] = (str(train("dpo", root / "dpo", model=base, **short)), "lm", TEXTS, IDS)
    found["gpt2 with a head"] = (str(train("dph", root / "dph2", model=base, **short)), "both", TEXTS, IDS)
    found["llama with a head"] = (str(train("dph", root / "dph", model=str(start), **short)), "both", TEXTS, IDS)
    with mock.patch.dict(SHORT):
        del SHORT["kl_samples"]  # which reward_model.py does not have
        found["reward model"] = (str(train("reward_model", root / "rm", model=base, **short)), "reward", TEXTS, IDS)
    found["reward model that names its pad token"] = (
        with_pad_token(root / "rm", root / "padded"),
        *found["reward model"][1:],
    )
    found["toy"] = (str(train("dpo", root / "toy", model="toy", **short)), "lm", TOY_TEXTS, IDS)
    return found


NAMES = ["llama", "llama3", "gemma", "qwen", "neox", "gpt2", "gpt2 with a head", "llama with a head", "reward model"]
NAMES += ["reward model that names its pad token", "toy"]


@pytest.fixture(scope="module")
def read_now(saved) -> dict[str, dict]:
    """What this version reads in the folders."""
    return {name: reader.read(*request) for name, request in saved.items()}


@pytest.fixture(scope="module")
def read_in_version_4(saved, tmp_path_factory) -> dict[str, dict]:
    """What transformers 4.57 reads in the same folders, all in one process."""
    python = os.environ.get("PREFERENCE_TRANSFORMERS4")
    if not python:
        pytest.skip("PREFERENCE_TRANSFORMERS4 names no python of an environment with transformers 4.57")
    folder = tmp_path_factory.mktemp("answers")
    (folder / "request.json").write_text(json.dumps(list(saved.values())))
    words = [python, str(Path(reader.__file__)), str(folder / "request.json"), str(folder / "answer.safetensors")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict[str, dict] = {name: {} for name in saved}
    for key, value in safetensors.torch.load_file(folder / "answer.safetensors").items():
        number, _, name = key.partition("|")
        answers[list(saved)[int(number)]][name] = value
    return answers


@pytest.mark.parametrize("name", NAMES)
def test_version_4_reads_the_same_numbers(name, read_now, read_in_version_4):
    now, then = read_now[name], read_in_version_4[name]
    assert now.keys() == then.keys()
    for what, value in now.items():
        torch.testing.assert_close(then[what], value, atol=1e-5, rtol=1e-5, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("name", ["llama", "llama3", "gemma", "qwen", "neox"])
def test_a_saved_folder_is_the_model(name, saved, read_now):
    expected = safetensors.torch.load_file(Path(saved[name][0]) / "expected.safetensors")["logits"]
    torch.testing.assert_close(read_now[name]["logits"], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["gpt2 with a head", "llama with a head", *NAMES[8:10]])
def test_padding_never_changes_a_reward(name, read_now):
    """Also with the pad id of the configuration alone, and texts that end in EOS."""
    rewards, alone = read_now[name]["rewards"], read_now[name]["rewards alone"]
    assert alone.std() > 1e-6
    torch.testing.assert_close(rewards, alone, atol=1e-6, rtol=1e-5)


def test_a_head_s_reward_is_the_one_trained(saved):
    """The reward that transformers reads is w . h at the EOS."""
    from common.oracle import plain_rewards

    folder = saved["gpt2 with a head"][0]
    model, tokenizer = model_loading.load_model(folder, "cpu").eval(), model_loading.load_tokenizer(folder)
    head = model_loading.load_weights(folder, "score.weight")["score.weight"]
    sequences = [(tokenizer(text).input_ids, [tokenizer.eos_token_id]) for text in TEXTS]
    expected = torch.tensor(plain_rewards(model, head, sequences))
    torch.testing.assert_close(reader.read(folder, "both", TEXTS, IDS)["rewards"], expected, atol=1e-5, rtol=1e-5)


# -- what is written


def old_config(**rope) -> dict:
    return folders.with_old_names({"model_type": "llama", "rope_parameters": rope})


def test_the_rotary_base_stands_at_the_top_too():
    assert old_config(rope_type="default", rope_theta=5e5).get("rope_theta") == 5e5
    assert "rope_scaling" not in old_config(rope_type="default", rope_theta=5e5)
    scaled = old_config(rope_type="linear", factor=2.0, rope_theta=7.0)
    assert scaled.get("rope_scaling") == {"rope_type": "linear", "factor": 2.0}
    assert scaled["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}  # as it was
    assert folders.with_old_names({"model_type": "gpt2"}) == {"model_type": "gpt2"}


def test_models_within_models_too():
    inner = {"model_type": "gemma3_text", "rope_parameters": BY_KIND}
    config = folders.with_old_names({"model_type": "gemma3", "text_config": inner})["text_config"]
    assert config["rope_theta"] == 300000.0
    assert config["rope_local_base_freq"] == 5000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_tokenizer_classes_that_version_4_knows_stay():
    for name, expected in (("TokenizersBackend", "PreTrainedTokenizerFast"), ("GPT2Tokenizer", "GPT2Tokenizer")):
        config = folders.old_tokenizer_config({"tokenizer_class": name, "pad_token": "<p>"}, {"<p>"})
        assert config == {"tokenizer_class": expected, "pad_token": "<p>"}
    assert folders.old_tokenizer_config({"pad_token": {"content": "word"}}, set())["pad_token"] is None
    assert folders.old_tokenizer_config({"pad_token": {"content": "<p>"}}, {"<p>"})["pad_token"] == {"content": "<p>"}


def test_checkpoints_too(tmp_path, file13, monkeypatch):
    """A checkpoint is a folder like the run's."""
    from common import run as runs_module

    monkeypatch.setattr(runs_module.shutil, "rmtree", lambda *args, **kwargs: None)  # finish would remove it
    start = models.save(models.tiny_llama(300, **theta(3e5)), models.byte_tokenizer(), tmp_path / "start")
    run = train("dpo", tmp_path / "run", model=str(start), data=file13, max_steps=2, save_every=2)
    for folder in (run, run / "checkpoints/step-00000002"):
        config = json.loads((folder / "config.json").read_text())
        assert config.get("rope_theta") == 3e5
        assert (
            json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
        )


# -- the pad id


def test_the_word_that_pads_stays_a_word(preference_data, tmp_path, file13):
    """GPT-2's tokenizer has no pad token: an ordinary word's id is chosen."""
    from transformers import AutoConfig, AutoTokenizer

    gpt2 = str(preference_data / "tokenizers/gpt2")
    ends = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": None}
    start = models.save(models.tiny_gpt2(50257, **ends), AutoTokenizer.from_pretrained(gpt2), tmp_path / "start")
    first = train("dpo", tmp_path / "first", model=str(start), data=file13, max_steps=1)
    second = train("dpo", tmp_path / "second", model=str(first), data=file13, max_steps=1)
    pad_id = model_loading.load_tokenizer(str(start)).pad_token_id
    for folder in (first, second):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        word = tokenizer.decode([pad_id])
        assert word.strip().isalpha()
        sentence = f"He{word} at the sky{word} ."
        ids = tokenizer(sentence).input_ids
        assert pad_id in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == sentence
        assert tokenizer.pad_token is None
        config = AutoConfig.from_pretrained(folder)
        saved_ids = {config.pad_token_id, json.loads((folder / "generation_config.json").read_text())["pad_token_id"]}
        assert saved_ids == {pad_id} == {model_loading.load_tokenizer(str(folder)).pad_token_id}
