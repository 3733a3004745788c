"""superhf.py, and what it shares with ppo.py: prompts, sampling inside a run, resume, several
processes.
"""

import json
import math
import traceback

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import superhf
import typo
from common import InputError, batches, generate
from common import models as model_loading
from rewards import models as reward_models
from rewards import prompts as rewards_prompts
from tests import models
from tests.runs import (
    ROOT,
    SHORT,
    canned_sample,
    lines_of,
    model_of,
    pairs,
    recorded,
    resume,
    start_process,
    toy_reward_anywhere,
    train,
    train_until_killed,
    weights,
    write_pairs,
)
from toy import base, world

both_scripts = pytest.mark.parametrize("script", ["superhf", "ppo"])
QUICK = {"max_new_tokens": 5, "completions": 3, "eval_every": 1000, "epochs": 1.0}


@pytest.fixture(autouse=True)
def toy_reward(monkeypatch):
    monkeypatch.setattr(reward_models, "load_reward", toy_reward_anywhere(reward_models.load_reward))


@pytest.fixture(scope="module")
def file11(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("prompts") / "pairs.jsonl", 11)


@pytest.fixture
def llama(tiny_llama) -> str:
    return str(tiny_llama)


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def folder(request) -> str:
    return str(request.getfixturevalue(request.param))


def random_case(seed: int = 0):
    """Logits of policy and reference, labels and a mask with holes at both ends, float64: [3, 6,
    7].
    """
    generator = torch.Generator().manual_seed(seed)
    policy, ref = (torch.randn(3, 6, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(7, (3, 6), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    return policy.requires_grad_(), ref, labels, mask


# -- loss


@pytest.mark.parametrize("kl", [0.0, 0.35, 3.0])
def test_loss_and_its_gradient_in_closed_form(kl):
    policy, ref, labels, mask = random_case()
    loss, metrics = superhf.superhf_loss(policy, ref, labels, mask, kl)
    (gradient,) = torch.autograd.grad(loss, policy)
    ce, forward_kl, expected = 0.0, 0.0, torch.zeros_like(policy)
    for b in range(3):
        for t in range(1, 6):
            if mask[b, t]:
                pi, q, y = policy[b, t - 1].detach().softmax(-1), ref[b, t - 1].softmax(-1), labels[b, t]
                ce -= pi[y].log() / 8
                forward_kl += sum(q[v] * (q[v] / pi[v]).log() for v in range(7)) / 8
                expected[b, t - 1] = (pi - torch.nn.functional.one_hot(y, 7) + kl * (pi - q)) / 8
    torch.testing.assert_close(loss.detach(), ce + kl * forward_kl)
    torch.testing.assert_close((metrics["ce"], metrics["kl"]), (ce, forward_kl))
    torch.testing.assert_close(gradient, expected)


def test_the_kl_is_that_of_the_reference_to_the_policy():
    """ref = (.9, .1), pi = (.5, .5): KL(ref || pi) = .368, KL(pi || ref) = .511."""
    policy, ref = (
        torch.zeros(1, 2, 2, dtype=torch.float64),
        torch.tensor([0.9, 0.1], dtype=torch.float64).log().expand(1, 2, 2),
    )
    _, metrics = superhf.superhf_loss(policy, ref, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[0, 1]]), 1.0)
    assert metrics["kl"].item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-12)


def test_the_mask_stands_at_the_token_that_is_predicted():
    """The logits at t are read for the token at t + 1 exactly where the mask of t + 1 is 1."""
    policy, ref, labels, mask = random_case()
    (gradient,) = torch.autograd.grad(superhf.superhf_loss(policy, ref, labels, mask, 1.0)[0], policy)
    assert torch.equal(gradient.abs().sum(-1)[:, :-1] > 0, mask[:, 1:].bool())
    assert not gradient[:, -1].any()


def test_shapes_that_do_not_fit_are_refused():
    policy, ref, labels, mask = random_case()
    for bad in (
        (policy, ref[:, 1:], labels, mask),
        (policy, ref, labels[:, 1:], mask),
        (policy, ref, labels, mask[:1]),
        (policy[0], ref[0], labels[0], mask[0]),
    ):
        with pytest.raises(ValueError, match="expected two logits"):
            superhf.superhf_loss(*bad, 1.0)
    with pytest.raises(ValueError, match="no completion token"):
        superhf.superhf_loss(policy, ref, labels, mask * 0, 1.0)


def test_vocabulary_entries_that_both_models_mask_count_nothing():
    """Loss and gradient are those of the other entries alone; what only the policy masks costs
    infinitely much.
    """
    policy, ref, labels, mask = random_case()
    loss, _ = superhf.superhf_loss(policy, ref, labels, mask, 0.7)
    (expected,) = torch.autograd.grad(loss, policy)
    never = torch.full((3, 6, 2), -math.inf, dtype=torch.float64)
    wider, wider_ref = torch.cat([policy.detach(), never], -1).requires_grad_(), torch.cat([ref, never], -1)
    wider_loss, _ = superhf.superhf_loss(wider, wider_ref, labels, mask, 0.7)
    (gradient,) = torch.autograd.grad(wider_loss, wider)
    torch.testing.assert_close(wider_loss, loss)
    torch.testing.assert_close(gradient[..., :7], expected)
    assert torch.equal(gradient[..., 7:], torch.zeros(3, 6, 2, dtype=torch.float64))
    wider_ref = torch.cat([ref, torch.zeros(3, 6, 2, dtype=torch.float64)], -1)
    _, parts = superhf.superhf_loss(wider, wider_ref, labels, mask, 0.7)
    assert parts["kl"] == math.inf


ROWS = [([5, 6, 7], [8, 9, 2]), ([10], [11, 12, 13, 14]), ([4, 5], [2])]


@pytest.mark.parametrize("layout", ["rows", "model_head"])
@pytest.mark.parametrize("chunk", [16, 4096])
@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_llama"])
def test_the_training_step_is_superhf_loss(layout, chunk, kind, monkeypatch):
    """Gathered positions in chunks, logits recomputed, against full logits: loss, parts and every
    parameter's gradient, in float64.
    """
    monkeypatch.setattr(superhf, "CHUNK", chunk)
    policy, reference = (getattr(models, kind)(20, seed).double() for seed in (0, 1))
    batch = batches.collate([{"prompt": p, "completions": [c]} for p, c in ROWS], 0, layout, "cpu")
    with torch.no_grad():
        batch |= superhf.ref_columns(reference, batch)
    batch["ref_head"] = list(reference.get_output_embeddings().parameters())
    loss, metrics = superhf.compute_loss(policy, batch, kl=0.7)
    assert metrics["count loss"] == 8
    got = torch.autograd.grad(loss / 8, list(policy.parameters()))

    ids, mask = torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.int64)
    seen = torch.zeros(3, 6, dtype=torch.int64)
    for i, (p, c) in enumerate(ROWS):
        ids[i, : len(p) + len(c)] = torch.tensor(p + c)
        mask[i, len(p) : len(p) + len(c)] = 1
        seen[i, : len(p) + len(c)] = 1
    logits = [model(ids, attention_mask=seen, use_cache=False).logits for model in (policy, reference)]
    expected, parts = superhf.superhf_loss(logits[0], logits[1].detach(), ids, mask, 0.7)
    torch.testing.assert_close(loss / 8, expected)
    torch.testing.assert_close((metrics["ce"] / 8, metrics["kl"] / 8), (parts["ce"], parts["kl"]))
    for a, b in zip(got, torch.autograd.grad(expected, list(policy.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# -- sampling


def test_log_probabilities_of_generation_are_those_of_training(folder):
    """Raw logits of every sampled token, from generation with a KV cache and left padding, against
    the training pass, padded on the right.
    """
    model, tokenizer = model_of(folder), model_loading.load_tokenizer(folder)
    prompts = [[1, 20, 21, 22, 23, 24], [1, 30], [1, 40, 41]]
    ids = torch.tensor([[0] * (6 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (6 - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(0)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=8,
        eos_token_id=2,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, 1).log_softmax(-1)  # [3, 8, vocabulary]
    rows, expected = [], []
    for i, new in enumerate(out.sequences[:, 6:].tolist()):
        new = new[: new.index(2) + 1] if 2 in new else new
        rows.append({"prompt": prompts[i], "completions": [new]})
        expected.append(sum(logits[i, t, token].item() for t, token in enumerate(new)))
    got = superhf.completion_logps(model, batches.collate(rows, tokenizer.pad_token_id, "rows", "cpu"))
    assert got.tolist() == pytest.approx(expected, abs=1e-4)


def test_left_padding_changes_nothing(folder):
    """Nearly greedy answers to prompts of different length, together and one by one."""
    model, tokenizer = model_of(folder), model_loading.load_tokenizer(folder)
    prompts = [[1, 20, 21, 22, 23, 24], [1, 30], [1, 40, 41]]
    shape = {"temperature": 1e-4, "top_p": 0.95, "seed": 0}
    together = generate.sample(model, prompts, tokenizer, 8, **shape)
    assert together == [generate.sample(model, [p], tokenizer, 8, **shape)[0] for p in prompts]


@both_scripts
def test_sampling_is_asked_for_in_full(script, tmp_path, file11, llama, monkeypatch):
    """Distribution, seeds of each step and the model's mode; in training the prompt of each of the
    step's rows, `completions` times.
    """
    calls = []

    def sample(model, prompts, tokenizer, max_new_tokens, **shape):
        calls.append({**shape, "prompts": prompts, "max_new_tokens": max_new_tokens})
        return canned_sample(model, prompts, tokenizer, max_new_tokens, shape["n"])

    monkeypatch.setattr(generate, "sample", sample)
    given = {"temperature": 0.8, "top_p": 0.7} if script == "superhf" else {}
    train(script, tmp_path / "run", model=llama, data=file11, batch_size=4, max_steps=3, seed=3, **{**QUICK, **given})
    assert len({call["seed"] for call in calls}) == len(calls) == 3
    for call in calls:
        assert (call.get("temperature", 1.0), call.get("top_p", 1.0)) == ((0.8, 0.7) if given else (1.0, 1.0))
        assert call["max_new_tokens"] == 5
        assert call["n"] == 3
        assert [call["prompts"].count(p) for p in call["prompts"]] == [1] * len(call["prompts"])
    assert len({json.dumps(p) for call in calls for p in call["prompts"]}) == 11


def test_only_the_best_are_trained_on_with_exactly_their_tokens(tmp_path, file11, llama, monkeypatch):
    """The gradient of a run's step is that of superhf_loss over the top 2 of 4 by the reward, empty
    ones left out, EOS where one was sampled.
    """
    sampled = []

    def sample(model, prompts, tokenizer, max_new_tokens, n, **shape):
        drawn = canned_sample(model, prompts, tokenizer, max_new_tokens, n)
        drawn[0] = drawn[5] = [tokenizer.eos_token_id]  # empty, and to be the best by the reward below
        sampled.extend(zip((prompt for prompt in prompts for _ in range(n)), drawn))
        return drawn

    def reward(prompts, answers):
        return torch.tensor([-float(len(answer)) for answer in answers])

    monkeypatch.setattr(generate, "sample", sample)
    monkeypatch.setattr(reward_models, "load_reward", lambda *rest: reward)
    given = {
        "model": llama,
        "data": file11,
        "batch_size": 4,
        "max_steps": 1,
        "kl": 0.5,
        "completions": 4,
        "top_k": 2,
        "max_new_tokens": 5,
    }
    _, ((gradient), *_) = recorded("superhf", tmp_path / "run", **given, micro_batch_size=3)
    tokenizer, model, kept = model_loading.load_tokenizer(llama), model_of(llama), []
    for i in range(0, 16, 4):
        group = [(p, c) for p, c in sampled[i : i + 4] if c != [2]]
        kept += sorted(group, key=lambda pair: len(generate.text_after(tokenizer, *pair)))[:2]
    batch = batches.collate([{"prompt": p, "completions": [c]} for p, c in kept], 0, "rows", "cpu")
    logits = typo.completion_logits(model, batch)
    loss = superhf.token_terms(logits, logits.detach(), batch["targets"]).mean(0) @ torch.tensor([1.0, 0.5])
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-4, atol=1e-6)
    (line,) = lines_of(tmp_path / "run")
    texts = [generate.text_after(tokenizer, *pair) for pair in sampled]
    assert line["reward/sampled"] == pytest.approx(-sum(map(len, texts)) / 16)
    assert line["reward/kept"] == pytest.approx(-sum(len(generate.text_after(tokenizer, *pair)) for pair in kept) / 8)
    assert line["kl"] == pytest.approx(0, abs=1e-6)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_reference_stays_what_the_policy_began_as(tmp_path, file11, llama, monkeypatch):
    """In the second step the policy has moved: the KL is no longer 0, and it still is to the model
    that the run began with.
    """
    batches_seen, compute_loss = [], superhf.compute_loss

    def computing(model, batch, **numbers):
        ref_logits = F.linear(batch["ref_states"], *batch["ref_head"])
        batches_seen.append((batch, typo.completion_logits(model, batch).detach(), ref_logits))
        return compute_loss(model, batch, **numbers)

    monkeypatch.setattr(generate, "sample", canned_sample)
    monkeypatch.setattr(superhf, "compute_loss", computing)
    folder = train("superhf", tmp_path / "run", model=llama, data=file11, max_steps=2, warmup=0.0, **QUICK)
    first, second = lines_of(folder)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-3
    reference = model_of(llama)
    for batch, _, ref_logits in batches_seen:
        with torch.no_grad():
            expected = typo.completion_logits(reference, batch)
        torch.testing.assert_close(ref_logits, expected, rtol=0, atol=1e-5)
    _, policy_logits, ref_logits = batches_seen[-1]
    assert (policy_logits - ref_logits).abs().max() > 1e-2
    log_policy, log_ref = policy_logits.log_softmax(-1), ref_logits.log_softmax(-1)
    assert second["kl"] == pytest.approx((log_ref.exp() * (log_ref - log_policy)).sum(-1).mean().item(), rel=1e-4)


class DeviceReads(TorchDispatchMode):
    """Counts how often a number is read out of a tensor: a GPU then waits for all work so far.

    transformers looks at each mask once to see whether it pads; that is not counted."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            files = [frame.filename for frame in traceback.extract_stack()]
            self.count += not any(name.endswith("masking_utils.py") for name in files)
        return function(*args, **(kwargs or {}))


@both_scripts
def test_no_number_is_read_for_each_micro_batch(script, tmp_path, file11, llama, monkeypatch):
    """A step in many micro-batches reads as many numbers from the device as a step in one."""
    module, counts = __import__(script), []
    update = module.update

    def counted(*args):
        with DeviceReads() as reads:
            norm = update(*args)
        counts.append(reads.count)
        return norm

    monkeypatch.setattr(generate, "sample", canned_sample)
    monkeypatch.setattr(module, "update", counted)
    for name, size in (("one", 64), ("many", 2)):
        given = {"model": llama, "data": file11, "max_steps": 1, "batch_size": 8, "micro_batch_size": size}
        train(script, tmp_path / name, **{**QUICK, **given})
    assert len(set(counts)) == 1
    with DeviceReads() as reads:  # it does see one
        torch.ones(1).item()
    assert reads.count == 1


@both_scripts
def test_a_step_without_any_completion_moves_nothing(script, tmp_path, file11, llama, monkeypatch):
    monkeypatch.setattr(__import__(script), "truncate_at_turn", lambda tokenizer, ids: [])
    folder = train(script, tmp_path / "run", model=llama, data=file11, max_steps=2, **QUICK)
    assert [line["loss"] for line in lines_of(folder)] == [None, None]
    a, b = (safetensors.torch.load_file(f"{path}/model.safetensors") for path in (folder, llama))
    assert all(torch.equal(a[name], b[name]) for name in b)


@both_scripts
def test_completions_end_where_the_dialogue_would_go_on(script):
    truncate_at_turn = __import__(script).truncate_at_turn
    tokenizer = models.byte_tokenizer()

    def cut(text: str, ended: bool = True) -> tuple[str, bool]:
        ids = tokenizer(text).input_ids + [tokenizer.eos_token_id] * ended
        kept = truncate_at_turn(tokenizer, ids)
        assert kept == ids[: len(kept)]  # the very tokens
        return generate.decode_completion(tokenizer, kept) if kept else "", kept[-1:] == [tokenizer.eos_token_id]

    assert cut(" Yes.\n\nHuman: and then?") == ("Yes.", False)
    assert cut(" Yes.\n\nAssistant: No.\n\nHuman: why?") == ("Yes.", False)
    assert cut(" Yes.") == ("Yes.", True)
    assert cut(" Yes.", ended=False) == ("Yes.", False)
    assert cut("\n\nHuman: hello") == ("", False)
    assert cut(" Humane.\n\nHumane: it is", ended=False) == ("Humane.\n\nHumane: it is", False)


def test_what_a_reward_model_reads_is_what_stands_behind_the_prompt(toy_tokenizer):
    """A word-level or sentence-piece tokenizer loses the space in front of a completion that is
    decoded alone.
    """
    prompt, answer = "what is one plus one ?", " it is two ."
    ids = toy_tokenizer(prompt).input_ids
    completion = toy_tokenizer(prompt + answer).input_ids[len(ids) :]
    assert generate.text_after(toy_tokenizer, ids, completion) == answer
    assert generate.text_after(toy_tokenizer, ids, [*completion, toy_tokenizer.eos_token_id]) == answer
    tokenizer = models.byte_tokenizer()
    assert generate.text_after(tokenizer, tokenizer("Is it?").input_ids, tokenizer("\n Yes").input_ids) == "\n Yes"
    assert generate.text_after(tokenizer, [5], []) == ""


# -- prompts


def prompts_of(path, llama):
    lines: list[str] = []
    splits, _ = rewards_prompts.load_prompts(
        str(path), None, 0.0, 0, model_loading.load_tokenizer(llama), 40, max_new_tokens=4, say=lines.append
    )
    return splits, " ".join(lines)


def texts_of(rows) -> list[tuple]:
    return [row["texts"] for row in rows]


def test_prompts_come_from_prompts_pairs_and_dialogues(tmp_path, llama):
    rows = pairs(5)
    alone = tmp_path / "alone.jsonl"
    alone.write_text(
        "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in [*rows, rows[0]])
        + '{"prompt": 3}\n{"prompt": " "}\n'
    )
    splits, said = prompts_of(alone, llama)
    assert [texts[0] for texts in texts_of(splits["train"])] == [row["prompt"] for row in rows]
    assert "8 rows read, 5 used" in said
    for reason in ("the prompt comes again", "the prompt is empty", "neither text nor chat"):
        assert reason in said
    tokenizer = model_loading.load_tokenizer(llama)
    assert splits["train"][0] == {
        "prompt": tokenizer(rows[0]["prompt"]).input_ids,
        "completions": [],
        "texts": (rows[0]["prompt"],),
    }
    both = tmp_path / "pairs.jsonl"
    both.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts_of(prompts_of(both, llama)[0]["train"]) == texts_of(splits["train"])
    dialogue = tmp_path / "dialogue.jsonl"
    turn = "\n\nHuman: what is one ?\n\nAssistant: it is one .\n\nHuman: two ?\n\nAssistant:"
    dialogue.write_text(json.dumps({"chosen": turn + " it is two .", "rejected": turn + " no ."}) + "\n")
    assert texts_of(prompts_of(dialogue, llama)[0]["train"]) == [(turn,)]


def test_prompts_that_cannot_be_used(tmp_path, llama):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "what ?"}\n')
    with pytest.raises(InputError, match='line 1: no field "prompt"'):
        prompts_of(path, llama)
    path.write_text(json.dumps({"prompt": "what is " * 30}) + "\n")
    with pytest.raises(InputError, match="no usable row"):
        prompts_of(path, llama)
    tokenizer = model_loading.load_tokenizer(llama)
    prompt = "one two three four"  # 5 tokens with BOS, so a limit of 9 leaves room for 4 and one of 8 does not
    path.write_text(json.dumps({"prompt": prompt}) + "\n")
    assert len(rewards_prompts.load_prompts(str(path), None, 0.0, 0, tokenizer, 9, max_new_tokens=3)[0]["train"]) == 1
    with pytest.raises(InputError, match="fills max_length"):
        rewards_prompts.load_prompts(str(path), None, 0.0, 0, tokenizer, 8, max_new_tokens=3)


def test_prompts_of_the_toy_are_its_questions():
    splits = base.prompts()
    assert len(splits["train"]) == 80
    assert len(splits["unseen"]) == 20
    assert not set(splits["train"]) & set(splits["unseen"])


def test_the_flawed_reward_differs_in_the_price_of_length_alone():
    row = world.questions()[0]
    short = f"it is {row['right']} ."
    assert world.flawed_reward(row, short) == world.true_reward(row, short) == 1.0
    long = "well , let me think about that for a while : " + short  # 15 words
    assert world.true_reward(row, long) == pytest.approx(1 - 0.7)
    assert world.flawed_reward(row, long) == pytest.approx(1 + 0.7)


# -- runs


@both_scripts
@pytest.mark.parametrize(
    "changes",
    [
        {"reward": "toy:bad"},
        {"test_reward": "no/such folder"},
        {"kl": -1.0},
        {"completions": 0},
        {"max_new_tokens": 1000},
    ],
)
def test_bad_arguments_stop_the_run_in_one_sentence(script, changes, tmp_path, file11, llama):
    with pytest.raises(SystemExit) as stopped:
        train(script, tmp_path / "run", model=llama, data=file11, **{**QUICK, **changes})
    assert isinstance(stopped.value.code, str)
    assert not (tmp_path / "run").exists()


RANGES = {
    "superhf": {
        "kl": (-0.1, math.inf),
        "completions": (0,),
        "top_k": (0,),
        "temperature": (0.0, math.inf),
        "top_p": (0.0, 1.1),
    },
    "ppo": {
        "kl": (-0.1, math.inf),
        "gamma": (0.0, 1.1),
        "gae_lambda": (0.0, 1.1),
        "clip": (0.0, math.inf),
        "value_clip": (0.0, math.inf),
        "vf_coef": (-0.1, math.inf),
        "ppo_epochs": (0,),
        "completions": (0,),
    },
}


@both_scripts
def test_numbers_out_of_range_are_refused_by_their_flag(script):
    args = __import__(script).Args
    for name, values in RANGES[script].items():
        for value in (*values, math.nan) if isinstance(values[0], float) else values:
            with pytest.raises(SystemExit, match=f"^--{name.replace('_', '-')} {value}: expected "):
                args(**{name: value})


@both_scripts
def test_a_killed_run_resumes_bit_for_bit_its_sampling_included(script, tmp_path, file11, llama):
    given = {
        "model": llama,
        "data": file11,
        "batch_size": 4,
        "epochs": 2,
        "save_every": 2,
        "eval_every": 2,
        "kl_samples": 4,
        "holdout": 0.2,
        "test_reward": "toy",
    }
    given = {**QUICK, **given}
    whole = train(script, tmp_path / "whole", **given)
    train_until_killed(script, tmp_path / "part", **given)
    assert [path.name for path in (tmp_path / "part" / "checkpoints").iterdir()] == ["step-00000002"]
    part = resume(script, tmp_path / "part")
    assert weights(part) == weights(whole)
    assert (part / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    a, b = (json.loads((run / "summary.json").read_text()) for run in (part, whole))
    assert (a["before"], a["after"]) == (b["before"], b["after"])
    assert {"reward", "test_reward", "length", "duplicate_share", "short_share", "meteor_similarity", "kl"} <= set(
        lines_of(whole, "held_out")[0]
    )


@both_scripts
@pytest.mark.slow
def test_two_processes_train_like_one(script, tmp_path, file11, llama, monkeypatch):
    """The prompts are split over the processes, which choose among the same completions; 4, 4 and 3
    prompts a step.
    """
    setup = {
        **QUICK,
        "model": llama,
        "data": file11,
        "batch_size": 4,
        "micro_batch_size": 2,
        "lr": 1e-3,
        "save_every": 2,
    }
    with monkeypatch.context() as patch:
        patch.setattr(generate, "sample", canned_sample)
        one = train(script, tmp_path / "one", **setup)
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport {script}, tyro\n"
        "from common import generate\nfrom rewards import models\n"
        "from tests.runs import canned_sample, toy_reward_anywhere\n"
        "models.load_reward = toy_reward_anywhere(models.load_reward)\n"
        f"generate.sample = canned_sample\n{script}.main(tyro.cli({script}.Args))\n"
    )
    words = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in {**SHORT, **setup, "name": "two", "output_dir": str(tmp_path)}.items()
    ]
    process = start_process(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program), *words]
    )
    assert process.returncode == 0, process.stderr[-3000:]
    a, b = (safetensors.torch.load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    assert a.keys() == b.keys()
    steps = 3 * (4 if script == "ppo" else 1)
    for name in a:
        torch.testing.assert_close(
            b[name], a[name], rtol=0, atol=0.1 * 1e-3 * steps, msg=lambda words, name=name: f"{name}: {words}"
        )
    for x, y in zip(lines_of(one), lines_of(tmp_path / "two"), strict=True):
        x, y = ({k: v for k, v in line.items() if k != "split" and v is not None} for line in (x, y))
        assert x == pytest.approx(y, rel=2e-3, abs=2e-3)


@both_scripts
def test_the_end_table_and_summary_of_the_toy(script, tmp_path, toy_base, capsys):
    folder = train(
        script,
        tmp_path / "run",
        model="toy",
        kl_samples=8,
        max_steps=2,
        completions=2,
        reward="toy:flawed",
        test_reward="toy",
    )
    summary = json.loads(
        (folder / "summary.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    keys = {
        "reward",
        "test_reward",
        "meteor_similarity",
        "duplicate_share",
        "short_share",
        "length",
        "kl",
        "true_reward",
        "right_share",
        "rude_share",
    }
    for column in ("before", "after", "before_unseen", "after_unseen"):
        assert keys <= set(summary[column])
        assert summary[column]["test_reward"] <= summary[column]["reward"]  # they differ in the price of length alone
    assert summary["before"]["kl"] == 0
    assert set(summary["time_shares"]) == {"generation", "scoring", "training"}
    assert sum(summary["time_shares"].values()) == pytest.approx(1)
    said = capsys.readouterr().out
    assert "Time: generation" in said
    assert "METEOR: " in said
    assert model_of(folder) is not None  # a causal LM, also with a value head beside it
