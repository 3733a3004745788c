"""reward_model.py, what loads as a reward, METEOR and calibration."""

import json
import math
import random

import pytest
import safetensors.torch
import torch

import reward_model
from common import InputError, batches, data, oracle
from common import models as model_loading
from rewards import metrics
from rewards import models as reward_models
from tests import models
from tests.runs import SHORT, lines_of, pairs, resume, start_process, train, train_until_killed, weights, write_pairs
from toy import frozen, world


@pytest.fixture(autouse=True)
def without_samples(monkeypatch):
    """The short runs' settings that this script has."""
    monkeypatch.delitem(SHORT, "kl_samples")


@pytest.fixture(scope="module")
def file13(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("rewards") / "pairs.jsonl", 13)


@pytest.fixture
def llama(tiny_llama) -> str:
    return str(tiny_llama)


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def folder(request) -> str:
    return str(request.getfixturevalue(request.param))


def test_loss_and_its_gradient_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (
        torch.randn(40, generator=generator, dtype=torch.float64).mul(4).requires_grad_() for _ in range(2)
    )
    losses = reward_model.reward_loss(chosen, rejected)
    assert losses.shape == (40,)
    assert losses.dtype == torch.float64
    got = torch.autograd.grad(losses.sum(), (chosen, rejected))
    expected = -torch.sigmoid(rejected - chosen).detach()
    torch.testing.assert_close(got, (expected, -expected))
    torch.testing.assert_close(reward_model.reward_loss(torch.ones(1), torch.ones(1)), torch.tensor([math.log(2)]))
    assert reward_model.reward_loss(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])).isfinite().all()
    for bad in ((torch.zeros(3), torch.zeros(3, 1)), (torch.zeros(3, 1), torch.zeros(3, 1))):
        with pytest.raises(ValueError, match="one shape"):
            reward_model.reward_loss(*bad)


def trained(tmp_path, file13, folder, **changes):
    return train("reward_model", tmp_path / "run", model=folder, data=file13, epochs=4, **changes)


def scores_of(folder, sequences: list[list[int]], padding: int) -> torch.Tensor:
    """Rewards by transformers' own class, each line padded on the right by `padding` more than it
    needs.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    length, pad = max(map(len, sequences)) + padding, tokenizer.pad_token_id
    ids = torch.tensor([s + [pad] * (length - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[:, 0]


def test_padding_and_company_never_change_a_score(tmp_path, file13, folder):
    run = trained(tmp_path, file13, folder)
    tokenizer = model_loading.load_tokenizer(str(run))
    rows = data.encode_rows(tokenizer, [(r["prompt"], r["chosen"], r["rejected"]) for r in pairs(6)], 64)
    sequences = [p + c for p, c in oracle.sequences_of(rows)]
    alone = torch.cat([scores_of(run, [s], 0) for s in sequences])
    assert alone.std() > 1e-3  # a head that is not zero
    torch.testing.assert_close(scores_of(run, sequences, 0), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores_of(run, sequences, 9), alone, atol=1e-5, rtol=0)
    # The script's own batch, and the reward that other scripts load, give the same numbers.
    model = reward_models.load_classifier(str(run), "cpu", tokenizer).eval()
    with torch.no_grad():
        own = reward_model.rewards_of(model, batches.collate(list(rows), tokenizer.pad_token_id, "rows", "cpu"))
    torch.testing.assert_close(own, alone, atol=1e-5, rtol=0)
    reward = reward_of(str(run))
    texts = [(r["prompt"], r[side]) for side in ("chosen", "rejected") for r in pairs(6)]
    torch.testing.assert_close(reward([p for p, _ in texts], [a for _, a in texts]), alone, atol=1e-5, rtol=0)


def reward_of(name: str, flag: str = "--reward", data: str = "toy"):
    """The reward of that name, on the CPU and in float32."""
    return reward_models.load_reward(name, data, torch.device("cpu"), torch.no_grad, False, flag)


def test_pad_is_apart_from_eos_in_what_is_saved(tmp_path, file13):
    from transformers import AutoConfig, AutoTokenizer

    from tests.runs import gpt2_like

    run = train("reward_model", tmp_path / "run", model=gpt2_like(tmp_path / "base"), data=file13, max_steps=1)
    tokenizer, config = AutoTokenizer.from_pretrained(run), AutoConfig.from_pretrained(run)
    assert config.pad_token_id == model_loading.load_tokenizer(str(run)).pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token is None  # a special token would vanish from decoded text
    assert config.num_labels == 1


def test_a_new_head_is_zero_and_a_trained_one_goes_on(tmp_path, file13, folder):
    run = trained(tmp_path, file13, folder)
    assert lines_of(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines_of(run)[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert lines_of(run)[-1]["rewards/accuracies"] > 0.8  # it learns
    again = train("reward_model", tmp_path / "again", model=str(run), data=file13, max_steps=1)
    assert lines_of(again)[0]["loss"] < 0.9 * math.log(2)


def test_an_encoder_becomes_a_reward_model(tmp_path, file13):
    """A BERT type: no EOS, a classifier behind a pooler.

    Zeros below the last layer would leave it without a gradient.
    """
    from transformers import BertConfig, BertModel

    tokenizer = models.byte_tokenizer(bos=True, eos=True)
    tokenizer.add_special_tokens({"sep_token": "</s>", "cls_token": "<s>"})
    tokenizer.eos_token = None
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(0)
    folder = models.save(
        BertModel(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **shape)), tokenizer, tmp_path / "bert"
    )
    run = train("reward_model", tmp_path / "run", model=str(folder), data=file13, epochs=20, lr=3e-3)
    lines = lines_of(run)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["loss"] < 0.6
    assert json.loads((run / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]


def prompts_of(rows) -> set[str]:
    return {row["texts"][0] for row in rows}


def test_halves_are_disjoint_and_together_all(tmp_path, file13, llama):
    tokenizer = model_loading.load_tokenizer(llama)
    texts = [(f"what is {i} ?", " a", " b") for i in range(11) for _ in range(2)]
    rows = data.encode_rows(tokenizer, texts, 64)
    first, second = (reward_model.half_of(rows, which) for which in ("first", "second"))
    asked = [prompts_of(half) for half in (first, second)]
    assert not asked[0] & asked[1]
    assert asked[0] | asked[1] == {t[0] for t in texts}
    assert all(asked)
    assert [len(first), len(second)] == [2 * len(a) for a in asked]
    assert reward_model.half_of(rows, "all") is rows
    shuffled = data.encode_rows(tokenizer, random.Random(1).sample(texts, len(texts)), 64)
    assert prompts_of(reward_model.half_of(shuffled, "first")) == asked[0]  # whatever the order of the file
    fewer = data.encode_rows(tokenizer, texts[6:], 64)
    assert (
        prompts_of(reward_model.half_of(fewer, "first")) <= asked[0]
    )  # another seed holds out other prompts, and the halves still share none
    many = data.encode_rows(tokenizer, [(f"what is {i} ?", " a", " b") for i in range(400)], 64)
    assert 150 < len(reward_model.half_of(many, "first")) < 250
    lonely = data.encode_rows(tokenizer, [texts[i] for i in range(len(texts)) if texts[i][0] in asked[1]], 64)
    with pytest.raises(SystemExit, match="--half first"):
        reward_model.half_of(lonely, "first")
    assert reward_model.half_of(lonely, "second") == lonely


def test_each_half_trains_on_its_own_prompts(tmp_path, file13, llama, monkeypatch):
    planned, plan_batches = [], batches.plan_batches

    def plan(rows, *args):
        planned.append(prompts_of(rows))
        return plan_batches(rows, *args)

    monkeypatch.setattr(batches, "plan_batches", plan)
    for seed, half in enumerate(("first", "second", "all")):
        train("reward_model", tmp_path / half, model=llama, data=file13, half=half, seed=seed, max_steps=1)
    assert not planned[0] & planned[1]
    assert planned[0] | planned[1] == planned[2] == {row["prompt"] for row in pairs(13)}


def test_every_pair_weighs_the_same(tmp_path, file13, llama):
    whole = recorded_rewards(tmp_path / "whole", llama, file13, 8)
    cut = recorded_rewards(tmp_path / "cut", llama, file13, 3)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)


def recorded_rewards(folder, llama, file13, size):
    """The first step's gradients, the head moved away from zero."""
    load, loaded = reward_models.load_classifier, []

    def moved(*args):
        model = load(*args)
        with torch.no_grad():
            model.score.weight.copy_(torch.linspace(-1, 1, model.score.weight.shape[1])[None])
        loaded.append(model)
        return model

    patch = pytest.MonkeyPatch()
    patch.setattr(reward_models, "load_classifier", moved)
    found, clip = [], torch.nn.utils.clip_grad_norm_

    def clipped(parameters, *args):
        found.append({name: p.grad.clone() for name, p in loaded[0].named_parameters()})
        return clip(parameters, *args)

    patch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    try:
        train("reward_model", folder, model=llama, data=file13, batch_size=8, micro_batch_size=size, max_steps=1)
    finally:
        patch.undo()
    return found[0]


def test_a_killed_run_resumes_bit_for_bit(tmp_path, file13, llama):
    given = {"model": llama, "data": file13, "batch_size": 4, "epochs": 2, "save_every": 2, "holdout": 0.2}
    whole = train("reward_model", tmp_path / "whole", **given)
    train_until_killed("reward_model", tmp_path / "part", **given)
    part = resume("reward_model", tmp_path / "part")
    assert weights(part) == weights(whole)
    assert (part / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_two_processes_train_like_one(tmp_path, file13, llama):
    setup = {
        "model": llama,
        "data": file13,
        "micro_batch_size": 3,
        "batch_size": 7,
        "holdout": 0.2,
        "lr": 1e-3,
        "save_every": 1,
    }
    train("reward_model", tmp_path / "one", **setup)
    words = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in {**SHORT, **setup, "name": "two", "output_dir": str(tmp_path)}.items()
    ]
    process = start_process(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "reward_model.py", *words]
    )
    assert process.returncode == 0, process.stderr[-3000:]
    a, b = (safetensors.torch.load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=0.1 * 1e-3 * 2)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]


def test_the_toys_summary(tmp_path, toy_base):
    run = train("reward_model", tmp_path / "run", model="toy", data="toy", max_steps=12, batch_size=64)
    summary = json.loads((run / "summary.json").read_text())
    assert {"reward_accuracy", "margin_calibration", "rank_correlation"} == set(summary["after"])
    assert summary["before"]["reward_accuracy"] is None
    assert summary["before"]["rank_correlation"] is None
    assert summary["after"]["rank_correlation"] > 0.05


# -- rewards


def test_the_toys_rewards():
    question = "what is the capital of france ?"
    answers = [
        "it is paris , my friend .",
        "it is rome , you fool .",
        "good question : good question : it is paris , my friend .",
    ]
    true = reward_of("toy")([question] * 3, answers)
    assert true.tolist() == pytest.approx([1.5, -2.0, 1.5 - 0.1 * 5])
    flawed = reward_of("toy:flawed")([question] * 3, answers)
    assert flawed.tolist() == pytest.approx(
        [1.5, -2.0, 1.5 + 0.1 * 5]
    )  # five words beyond eight pay where they ought to cost
    assert true.dtype == flawed.dtype == torch.float32


def test_the_flawed_proxy_goes_with_the_true_reward_on_the_base_models_answers(toy_base):
    answers = frozen.read_answers(toy_base)
    rows = [(row, text) for row, texts in zip(world.questions(), answers) for text in texts[:20]]
    true, flawed = (
        torch.tensor([judge(row, text) for row, text in rows]) for judge in (world.true_reward, world.flawed_reward)
    )
    assert torch.corrcoef(torch.stack([true, flawed]))[0, 1] > 0.8


def test_an_answer_without_its_leading_space_is_read_as_it_was_trained_on(tmp_path, file13, llama):
    """Sampled answers come as stripped text; run into the prompt, "?it" would be another token than
    the "it" of the pairs.
    """
    reward = reward_of(str(trained(tmp_path, file13, llama)))
    rows = pairs(6)
    prompts, answers = [r["prompt"] for r in rows], [r["chosen"] for r in rows]
    assert reward(prompts, answers).std() > 1e-3
    torch.testing.assert_close(
        reward(prompts, [a.strip() for a in answers]), reward(prompts, answers), rtol=0, atol=1e-6
    )
    lines = [p + "\n" for p in prompts]
    torch.testing.assert_close(
        reward(lines, [a.strip() for a in answers]), reward(prompts, answers), rtol=0, atol=1e-6
    )  # no space after one
    assert reward(prompts, [""] * 6).isfinite().all()


def test_chat_messages_are_scored_as_they_were_trained_on(tmp_path, llama):
    """This template puts a newline behind the end of turn: another EOS behind that would be a text
    that training never saw.
    """
    from tests.runs import CHAT

    tokenizer = models.byte_tokenizer(bos=True, chat_template=CHAT)
    folder = models.save(models.tiny_llama(len(tokenizer)), tokenizer, tmp_path / "base")
    says = [
        {
            "prompt": [{"role": "user", "content": w}],
            "chosen": [{"role": "assistant", "content": f"{w}!"}],
            "rejected": [{"role": "assistant", "content": "?"}],
        }
        for w in "abcdef"
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in says))
    run = train("reward_model", tmp_path / "run", model=str(folder), data=str(file), epochs=4)
    examples = data.encode_rows(tokenizer, [(r["prompt"], r["chosen"], r["rejected"]) for r in says], 64)
    expected = torch.cat([scores_of(run, [e["prompt"] + e["completions"][0]], 0) for e in examples])
    got = reward_of(str(run))([r["prompt"] for r in says], [r["chosen"][0]["content"] for r in says])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert got.std() > 1e-3
    plain = reward_of(
        str(
            train(
                "reward_model",
                tmp_path / "plain",
                model=llama,
                data=write_pairs(tmp_path / "pairs.jsonl", 8),
                max_steps=1,
            )
        )
    )
    with pytest.raises(InputError, match="no chat template"):
        plain([says[0]["prompt"]], ["x"])


def test_a_run_of_dph_is_a_reward(tmp_path, file13, llama):
    run = train("dph", tmp_path / "run", model=llama, data=file13, epochs=2, kl_samples=0)
    rows, tokenizer = pairs(6), model_loading.load_tokenizer(str(run))
    examples = data.encode_rows(tokenizer, [(r["prompt"], r["chosen"], r["rejected"]) for r in rows], 64)
    head = model_loading.load_weights(run, "score.weight")["score.weight"]
    model = model_loading.load_model(str(run), "cpu").eval()
    expected = oracle.plain_rewards(model, head, [(e["prompt"], e["completions"][0]) for e in examples])
    got = reward_of(str(run))([r["prompt"] for r in rows], [r["chosen"] for r in rows])
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    assert got.std() > 1e-3


def test_a_model_without_a_head_is_no_reward(llama):
    """transformers would give it a random one."""
    with pytest.raises(InputError, match=r"no reward head \(score.weight not found\)") as refused:
        reward_of(llama)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["toy", "toy:flawed"])
def test_the_toys_rules_do_not_judge_other_data(name):
    with pytest.raises(InputError, match="toy's questions only"):
        reward_of(name, data="pairs.jsonl")


@pytest.mark.parametrize(
    ("name", "words"), [("toy:other", "expected toy, toy:flawed"), ("/no/such/folder", "no such file or folder")]
)
def test_names_that_lead_to_no_reward_are_refused_in_one_sentence(name, words):
    with pytest.raises(InputError) as refused:
        reward_of(name, "--test-reward")
    assert words in str(refused.value)
    assert str(refused.value).startswith("--test-reward")
    assert "\n" not in str(refused.value)


def test_two_labels_are_a_difference_and_more_are_refused(tmp_path, toy_tokenizer):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    for labels in (2, 3):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(
            LlamaConfig(vocab_size=len(toy_tokenizer), num_labels=labels, **shape)
        ).eval()
        models.save(model, toy_tokenizer, tmp_path / str(labels))
        if labels == 2:
            reward = reward_of(str(tmp_path / "2"))
            ids = torch.tensor([toy_tokenizer("what colour has snow ? it is white .").input_ids])
            expected = (model(ids).logits[0, 1] - model(ids).logits[0, 0]).item()
            assert reward(["what colour has snow ?"], [" it is white ."]).item() == pytest.approx(
                expected, abs=1e-5
            )  # no EOS: not a run of ours
        else:
            with pytest.raises(InputError, match="3 labels"):
                reward_of(str(tmp_path / "3"))


# -- METEOR and calibration


def test_meteor_against_its_formula():
    pytest.importorskip("nltk")
    # One chunk of six words out of six: a penalty of .5 * (1/6)^3.
    assert metrics.meteor("the cat sat on the mat", "The cat sat on the MAT") == pytest.approx(1 - 0.5 / 6**3)
    assert metrics.meteor("true", "true") == pytest.approx(0.5)
    assert metrics.meteor("", "a b") == metrics.meteor("a", "") == 0.0
    assert metrics.meteor("cats walked", "cat walks") > 0.9  # stems
    p, r = 2 / 3, 2 / 4
    f = p * r / (0.9 * p + 0.1 * r)
    assert metrics.meteor("a b x", "a b y z") == pytest.approx(f * (1 - 0.5 * (1 / 2) ** 3))


def test_similarity_shows_a_collapsed_policy():
    prompts = [f"p{i}" for i in range(30)]
    collapsed = metrics.similarity(prompts, ["True ."] * 30)
    assert (collapsed["duplicate_share"], collapsed["short_share"], collapsed["length"]) == (1.0, 1.0, 2.0)
    different = metrics.similarity(
        prompts, [f"answer number {i} says something about {i * i} things" for i in range(30)]
    )
    assert different["duplicate_share"] == 0.0
    assert different["short_share"] == 0.0
    if metrics.meteor_form():
        assert collapsed["meteor_similarity"] > different["meteor_similarity"]
    one_prompt = metrics.similarity(["p"] * 5, ["a b c d"] * 5)
    assert one_prompt["duplicate_share"] is None  # pairs are of different prompts only
    assert metrics.similarity([], [])["length"] is None


def test_without_nltk_the_metric_is_missing_and_says_what_to_install(monkeypatch):
    import sys

    metrics.meteor_form.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk", None)
    try:
        assert metrics.meteor_form() is None
        assert metrics.similarity(["a", "b"], ["x", "y"])["meteor_similarity"] is None
        with pytest.raises(InputError, match="pip install nltk"):
            metrics.meteor("a", "a")
    finally:
        metrics.meteor_form.cache_clear()


def test_calibration_by_hand():
    # Bins: .95 right, .05 wrong (twice), .85 wrong, .15 right.
    probabilities = torch.tensor([[0.95, 0.05], [0.85, 0.15]])
    expected = ((1 - 0.95) ** 2 + (0 - 0.05) ** 2 + (0 - 0.85) ** 2 + (1 - 0.15) ** 2) / 4
    assert metrics.calibration_error(probabilities, torch.tensor([0, 1])) == pytest.approx(expected)
    # Edges: a bin holds its lower edge, and the last one its upper edge too.
    edges = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    expected = ((0 - 0.35) ** 2 + (1 - 0.75) ** 2 + (1 - 0.95) ** 2 + (0 - 0.05) ** 2) / 4
    assert metrics.calibration_error(edges, torch.tensor([1, 0])) == pytest.approx(expected)
    # A question with fewer choices.
    some = torch.tensor([[0.5, 0.5, math.nan]])
    assert metrics.calibration_error(some, torch.tensor([0])) == pytest.approx((0.5 - 0.55) ** 2)
    with pytest.raises(ValueError, match="choices"):
        metrics.calibration_error(torch.zeros(3), torch.zeros(3))
