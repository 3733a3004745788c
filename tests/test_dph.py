"""DPH: rewards by hand, both ways of loading a run, prior regularisation, the frozen backbone, head
dropout, best of n.
"""

import json
import math

import pytest
import safetensors.torch
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dph
from common import batches, oracle
from common import models as model_loading
from common.run import Run
from judging import command
from tests import models
from tests.runs import EXAMPLES, gpt2_like, lines_of, model_of, resume, toy_examples, train, weights

EPS = 0.1


def with_head(model, seed: int = 0):
    """A head that is not zero."""
    hidden = model.config.get_text_config().hidden_size
    return dph.add_head(model, {"score.weight": torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed))})


def load_with_head(folder: str):
    return with_head(model_loading.load_model(folder, "cpu")).train()


# -- rewards


@pytest.mark.parametrize("layout", ["shared", "rows", "model_head"])
def test_rewards_of_a_model_made_by_hand(layout):
    """The bigram model's hidden state is the last token's one-hot vector, so the reward is the
    head's weight at that token.
    """
    model = with_head(models.bigram_model(models.random_table(8)))
    weights = model.score.weight[0].tolist()
    with torch.no_grad():
        _, got = dph.logps_and_rewards(model, batches.collate(EXAMPLES, 0, layout, "cpu"))
    assert got.tolist() == pytest.approx([weights[e["completions"][j][-1]] for j in (0, 1) for e in EXAMPLES], abs=1e-5)


def test_a_new_head_is_zero_and_a_saved_one_is_kept():
    model = dph.add_head(models.tiny_llama(20), {})
    assert model.score.weight.shape == (1, 32)
    assert not model.score.weight.any()
    assert model.score.bias is None
    assert model.config.num_labels == 1
    saved = torch.randn(1, 32)
    assert torch.equal(dph.add_head(models.tiny_llama(20), {"score.weight": saved}).score.weight, saved)


@pytest.mark.parametrize("layout", ["shared", "rows"])
def test_rewards_and_gradients_of_separate_passes(layout, folder):
    """The reward is the head on the state after the final norm at the answer's last token; each
    answer alone with its prompt, unpadded.
    """
    model, examples = load_with_head(folder), toy_examples(folder)
    weights = torch.linspace(-1.0, 1.5, 2 * len(examples))
    logps, rewards = dph.logps_and_rewards(model, batches.collate(examples, 0, layout, "cpu"))
    got = torch.autograd.grad((weights * rewards).sum(), list(model.parameters()), allow_unused=True)
    states = [
        model.base_model(torch.tensor([p + c])).last_hidden_state[0, -1] for p, c in oracle.sequences_of(examples)
    ]
    expected = model.score(torch.stack(states)).squeeze(-1)
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logps, oracle.plain_logps(model, oracle.sequences_of(examples), 0), atol=1e-4, rtol=0)
    slow = torch.autograd.grad((weights * expected).sum(), list(model.parameters()), allow_unused=True)
    for a, b in zip(got, slow):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item() + 1e-6, rtol=1e-4)


def test_rewards_are_float32_under_autocast(llama):
    model, batch = load_with_head(llama), batches.collate(toy_examples(llama), 0, "shared", "cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logps, rewards = dph.logps_and_rewards(model, batch)
    assert logps.dtype == rewards.dtype == torch.float32


# -- the objective


@pytest.mark.parametrize("loss", ["separable", "contrastive"])
@pytest.mark.parametrize(("dph_weight", "dpo_weight"), [(1.0, 1.0), (0.5, 2.0), (1.5, 0.0), (0.0, 1.0)])
def test_the_joint_objective(loss, dph_weight, dpo_weight, llama):
    """A weighted sum of the head's loss and cDPO, both with the same label smoothing, written out
    with sigmoids.
    """
    model, examples = load_with_head(llama), toy_examples(llama)
    batch = batches.collate(examples, 0, "shared", "cpu")
    with torch.no_grad():
        (chosen, rejected), (r_w, r_l) = (values.chunk(2) for values in dph.logps_and_rewards(model, batch))
    generator = torch.Generator().manual_seed(0)
    ref_chosen, ref_rejected = (x + torch.randn(x.shape, generator=generator) for x in (chosen, rejected))
    batch |= {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    numbers = {
        "dph_loss": loss,
        "dph_weight": dph_weight,
        "dpo_weight": dpo_weight,
        "label_smoothing": 0.2,
        "beta": 0.4,
    }

    def smoothed(x, good):
        return -good * torch.sigmoid(x).log() - (1 - good) * torch.sigmoid(-x).log()

    head = smoothed(r_w, 0.8) + smoothed(r_l, 0.2) if loss == "separable" else smoothed(r_w - r_l, 0.8)
    cdpo = smoothed(0.4 * ((chosen - ref_chosen) - (rejected - ref_rejected)), 0.8)
    expected = dph_weight * head + dpo_weight * cdpo
    got, metrics = dph.compute_loss(model, batch, **numbers)
    assert got.item() == pytest.approx(expected.sum().item(), rel=1e-4)
    assert metrics["loss"].item() == pytest.approx(expected.sum().item(), rel=1e-4)
    assert metrics["rewards/margins"].item() == pytest.approx((r_w - r_l).sum().item(), rel=1e-3, abs=1e-3)
    got.backward()
    lm_head = model.get_output_embeddings().weight
    assert (lm_head.grad is not None and lm_head.grad.abs().max() > 0) == (dpo_weight > 0)
    assert (model.score.weight.grad.abs().max() > 0) == (dph_weight > 0)


@pytest.mark.parametrize(("loss", "expected"), [("separable", 2 * math.log(2)), ("contrastive", math.log(2))])
def test_the_first_loss_of_the_pure_head(loss, expected, tmp_path, file13, llama):
    run = train("dph", tmp_path / "run", model=llama, data=file13, dph_loss=loss, dpo_weight=0.0, max_steps=1)
    assert lines_of(run)[0]["loss"] == pytest.approx(expected, abs=1e-6)
    assert not (run / "reference.safetensors").exists()  # nothing needs it


def test_the_head_learns(tmp_path, file13, llama):
    run = train("dph", tmp_path / "run", model=llama, data=file13, dpo_weight=0.0, epochs=8, lr=1e-2)
    lines = lines_of(run)
    assert lines[-1]["rewards/accuracies"] > 0.9
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


@pytest.mark.parametrize("stopped", [False, True])
def test_the_head_has_its_own_learning_rate(stopped, tmp_path, file13, llama, monkeypatch):
    """AdamW's first step moves every weight by its learning rate; a stopped run goes on with both
    rates.
    """
    given = {
        "model": llama,
        "data": file13,
        "lr": 1e-4,
        "head_lr": 1e-2,
        "warmup": 0.0,
        "max_steps": 2,
        "epochs": 2,
        "save_every": 1,
    }
    whole = train("dph", tmp_path / "whole", **given)
    if stopped:
        saved = Run.save

        def save_and_die(self, *values):
            saved(self, *values)
            raise RuntimeError("killed")

        with monkeypatch.context() as patch:
            patch.setattr(Run, "save", save_and_die)
            with pytest.raises(RuntimeError, match="killed"):
                train("dph", tmp_path / "part", **given)
        assert weights(resume("dph", tmp_path / "part")) == weights(whole)
    else:
        one = train("dph", tmp_path / "one", **{**given, "max_steps": 1})
        head = model_loading.load_weights(one, "score.weight")["score.weight"]
        assert head.abs().max().item() == pytest.approx(1e-2, rel=1e-3)
        before, after = model_of(llama).state_dict(), model_of(one).state_dict()
        assert max((after[name] - before[name]).abs().max().item() for name in before) == pytest.approx(1e-4, rel=1e-2)


def test_the_heads_rate_and_the_prior_follow_the_schedule(tmp_path, file13, llama, monkeypatch):
    """Of three steps without warm-up the rates are 3/3, 2/3 and 1/3 of their peaks: the backbone's,
    the head's, and the share of the way that the prior pulls the weights back.
    """
    rates, pulls, pull = [], [], dph.pull_to_prior

    def stepping(optimizer, *_):
        rates.append([group["lr"] for group in optimizer.param_groups])

    def pulling(model, prior, rate):
        pulls.append(rate)
        return pull(model, prior, rate)

    monkeypatch.setattr(dph, "pull_to_prior", pulling)
    setup = {"model": llama, "data": file13, "batch_size": 4, "max_steps": 3, "warmup": 0.0}
    hook = register_optimizer_step_pre_hook(stepping)
    try:
        train("dph", tmp_path / "run", lr=3e-3, head_lr=3e-2, prior_decay=5.0, **setup)
    finally:
        hook.remove()
    assert [rate for pair in rates for rate in pair] == pytest.approx([3e-3, 3e-2, 2e-3, 2e-2, 1e-3, 1e-2])
    assert pulls == pytest.approx([15e-3, 10e-3, 5e-3])


# -- prior and dropout


def test_the_prior_pulls_back_and_decay_does_not():
    """One pull of a tenth goes a tenth of the way to the initial weights, not to zero, and only
    where `prior` holds a value.
    """
    model = models.tiny_llama(20)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    moved = {name: p.detach().clone() for name, p in model.named_parameters()}
    prior = {name: value for name, value in initial.items() if "mlp" in name}
    dph.pull_to_prior(model, prior, 0.1)
    for name, p in model.named_parameters():
        expected = moved[name] - 0.1 * (moved[name] - initial[name]) if "mlp" in name else moved[name]
        torch.testing.assert_close(p.detach(), expected)
        if "mlp" in name:
            assert (p - initial[name]).norm() < 0.95 * (moved[name] - initial[name]).norm()


@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_llama"])
def test_a_strong_prior_holds_the_matrices_and_nothing_else(kind, request, tmp_path, file13):
    """lr * prior_decay = 1 puts a matrix back to its initial value after each step. Norms, biases,
    embeddings and the head move freely. Ordinary decay of the same strength takes the weights to
    zero instead.
    """
    base = str(request.getfixturevalue(kind))
    setup = {"model": base, "data": file13, "batch_size": 13, "warmup": 0.0, "max_steps": 1, "lr": 0.01}
    run = train("dph", tmp_path / "prior", prior_decay=100.0, **setup)
    before, after = model_of(base).state_dict(), safetensors.torch.load_file(run / "model.safetensors")
    embeddings = ("wte", "wpe", "embed_tokens", "lm_head")
    for name, value in after.items():
        if name == "score.weight":
            assert value.abs().max() > 0.005
        elif value.dim() > 1 and not any(word in name for word in embeddings):
            torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-6)
        else:
            assert (value - before[name]).abs().max() > 0.005, name
    decayed = safetensors.torch.load_file(
        train("dph", tmp_path / "decay", weight_decay=100.0, **setup) / "model.safetensors"
    )
    name = next(name for name in after if name.endswith(("mlp.c_fc.weight", "mlp.up_proj.weight")))
    assert decayed[name].norm() < 0.2 * before[name].norm()


@pytest.mark.parametrize("dpo_weight", [1.0, 0.0])
def test_a_frozen_backbone_leaves_the_lm_untouched(dpo_weight, tmp_path, file13, folder):
    setup = {"model": folder, "data": file13, "batch_size": 13, "epochs": 4, "prior_decay": 0.5, "weight_decay": 0.5}
    run = train("dph", tmp_path / "run", freeze_backbone=True, dpo_weight=dpo_weight, **setup)
    before, after = model_of(folder), model_of(run)
    for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.tensor([[1, 5, 9, 4, 2]])
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)
    assert safetensors.torch.load_file(run / "model.safetensors")["score.weight"].abs().max() > 0
    assert lines_of(run)[-1]["loss"] < 2 * math.log(2)  # the head alone counts, and learns


def test_head_dropout_acts_in_training_and_not_in_evaluation(llama):
    model, batch = load_with_head(llama), batches.collate(toy_examples(llama), 0, "shared", "cpu")
    numbers = {"head_dropout": 0.5, "dpo_weight": 0.0}
    plain = dph.logps_and_rewards(model, batch)[1].detach()
    torch.manual_seed(0)
    trained = [dph.compute_loss(model, batch, **numbers)[0].item() for _ in range(2)]
    with torch.no_grad():
        evaluated = [dph.compute_loss(model, batch, **numbers)[0].item() for _ in range(2)]
        rewards = dph.logps_and_rewards(model, batch, head_dropout=0.5)[1]
    assert trained[0] != trained[1]
    assert evaluated[0] == evaluated[1]
    torch.testing.assert_close(rewards, plain)
    # Dropout keeps the expectation: the mean over many draws is the reward without it.
    draws = torch.stack([dph.logps_and_rewards(model, batch, 0.2)[1].detach() for _ in range(400)])
    assert ((draws.mean(0) - plain).abs() < 5 * draws.std(0) / 20 + 1e-5).all()


def test_head_dropout_needs_no_lm_dropout(llama):
    """The log-probabilities beside it are exact."""
    model, batch = load_with_head(llama), batches.collate(toy_examples(llama), 0, "shared", "cpu")
    torch.testing.assert_close(
        dph.logps_and_rewards(model, batch, 0.5)[0], dph.logps_and_rewards(model, batch)[0], rtol=0, atol=0
    )


# -- the run's folder


@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_llama", "pad would be eos"])
def test_a_run_is_a_causal_lm_and_a_reward_model(kind, request, tmp_path, file13):
    """The head's rewards through AutoModelForSequenceClassification, row by row and padded; the
    LM's log-probabilities through the other.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    base = gpt2_like(tmp_path / "base") if "eos" in kind else str(request.getfixturevalue(kind))
    run = train("dph", tmp_path / "run", model=base, data=file13, max_length=128)
    tokenizer = AutoTokenizer.from_pretrained(run)
    lm = AutoModelForCausalLM.from_pretrained(run).eval()
    pad_id = tokenizer.pad_token_id = lm.config.pad_token_id  # the tokenizer does not know of a word that pads
    judge = AutoModelForSequenceClassification.from_pretrained(run, num_labels=1).eval()
    assert AutoConfig.from_pretrained(run).num_labels == 1  # for those who do not say so when they load it
    examples = toy_examples(str(run))
    sequences = oracle.sequences_of(examples)
    head = safetensors.torch.load_file(run / "model.safetensors")["score.weight"]
    model = dph.add_head(model_loading.load_model(str(run), "cpu"), {"score.weight": head}).eval()
    with torch.no_grad():
        logps, rewards = dph.logps_and_rewards(model, batches.collate(examples, pad_id, "shared", "cpu"))
        alone = torch.cat([judge(torch.tensor([p + c])).logits[:, 0] for p, c in sequences])
        tokenizer.padding_side = "right"
        padded = tokenizer.pad({"input_ids": [p + c for p, c in sequences]}, return_tensors="pt")
        together = judge(**padded).logits[:, 0]
    assert rewards.abs().max() > 0.01
    assert {p[-1] for p in map(lambda s: s[0] + s[1], sequences)} == {tokenizer.eos_token_id}
    torch.testing.assert_close(alone, rewards, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, rewards, atol=1e-5, rtol=0)
    # Texts of bytes are long: at 500 nats, neighbouring float32 numbers are 3e-5 apart.
    torch.testing.assert_close(oracle.plain_logps(lm, sequences, pad_id), logps, atol=1e-4, rtol=1e-6)


def test_a_second_run_goes_on_with_the_head(tmp_path, file13, llama):
    first = train("dph", tmp_path / "first", model=llama, data=file13, dpo_weight=0.0)
    second = train("dph", tmp_path / "second", model=str(first), data=file13, dpo_weight=0.0, lr=1e-12, batch_size=13)
    assert lines_of(second)[0]["loss"] < lines_of(first)[0]["loss"] - 0.01


# -- best of n


def test_candidates_have_all_rewards_and_the_largest_is_picked(tmp_path, file13, tiny_llama):
    """Every reward in the file is the head's, computed anew from the answer's text; the best one is
    picked in both columns.
    """
    setup = {
        "model": str(tiny_llama),
        "data": file13,
        "holdout": 0.3,
        "kl_samples": 6,
        "n": 4,
        "max_new_tokens": 5,
        "seed": 3,
    }
    run = train("dph", tmp_path / "run", **setup)
    lines = [json.loads(line) for line in (run / "candidates.jsonl").read_text().splitlines()]
    assert [line["column"] for line in lines] == ["after_best_of_n"] * 6 + ["reference_best_of_n"] * 6
    for line in lines:
        assert len(line["answers"]) == len(line["rewards"]) == 4
        assert line["rewards"][line["picked"]] == max(line["rewards"])
    assert any(len(set(line["rewards"])) > 1 for line in lines)
    tokenizer, head = (
        model_loading.load_tokenizer(str(run)),
        safetensors.torch.load_file(run / "model.safetensors")["score.weight"][0],
    )
    policy, checked = model_of(run), 0
    for line in lines:
        for answer, reward in zip(line["answers"], line["rewards"]):
            words = answer.split()
            if len(words) == 5 and not any(
                word.startswith("<") for word in words
            ):  # cut answers without EOS can be read back exactly
                ids = tokenizer(line["prompt"] + " " + answer).input_ids
                with torch.no_grad():
                    state = policy.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
                assert reward == pytest.approx((state @ head).item(), abs=1e-4)
                checked += 1
    assert checked > 10
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after_best_of_n"]["kl"] <= math.log(4) - 3 / 4 + 10
    assert summary["args"]["n"] == 4


def test_the_best_of_n_costs_at_most_its_bound(tmp_path, file13, llama):
    """With a frozen LM, policy and reference are one, so the KL of the best of n is log n - (n - 1)
    / n.
    """
    run = train(
        "dph",
        tmp_path / "run",
        model=llama,
        data=file13,
        holdout=0.3,
        kl_samples=4,
        n=4,
        max_new_tokens=4,
        freeze_backbone=True,
    )
    summary = json.loads((run / "summary.json").read_text())
    for column in ("after_best_of_n", "reference_best_of_n"):
        assert summary[column]["kl"] == pytest.approx(math.log(4) - 3 / 4, abs=1e-6)
    assert summary["after"]["kl"] == pytest.approx(0, abs=1e-6)


def test_evaluate_writes_the_heads_rewards(toy_base, tmp_path):
    """`python -m common.evaluate` on a DPH run: the rewards that a sequence-classification loader
    gives, null where a row is unusable.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    dph.main(dph.Args(max_steps=5, kl_samples=0, output_dir=str(tmp_path), name="run"))
    pairs = [
        ("what is one plus two ?", " it is three .", " it is four , you fool ."),
        ("what is one plus two ?", " it is three .", ""),
    ]
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command.main(
        command.Args(
            model=str(tmp_path / "run"), data=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "scores.jsonl")
        )
    )
    good, bad = (json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines())
    assert (bad["chosen_reward"], bad["rejected_reward"], bad["chosen_logps"]) == (None, None, None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1).eval()
    for name in ("chosen", "rejected"):
        ids = tokenizer(rows[0]["prompt"] + rows[0][name]).input_ids + [tokenizer.eos_token_id]
        reward = model(torch.tensor([ids])).logits.item()
        assert abs(reward) > 1e-4
        assert good[f"{name}_reward"] == pytest.approx(reward, abs=1e-5)
