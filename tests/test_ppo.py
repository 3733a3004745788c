"""ppo.py: advantages, losses, and the identities that hold on the first step.

What it shares with superhf.py is in test_superhf.py.
"""

import json
import math

import pytest
import safetensors.torch
import torch

import ppo
from common import batches, generate, oracle
from common import models as model_loading
from rewards import models as reward_models
from tests import models
from tests.runs import canned_sample, lines_of, model_of, recorded, toy_reward_anywhere, train, write_pairs

QUICK = {"max_new_tokens": 5, "completions": 2, "eval_every": 1000, "epochs": 1.0, "batch_size": 6}


@pytest.fixture(autouse=True)
def toy_reward(monkeypatch):
    monkeypatch.setattr(reward_models, "load_reward", toy_reward_anywhere(reward_models.load_reward))


@pytest.fixture(scope="module")
def file11(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("prompts") / "pairs.jsonl", 11)


@pytest.fixture
def llama(tiny_llama) -> str:
    return str(tiny_llama)


def numbers(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.5, 1e-9)])
def test_advantages_are_the_written_out_sum(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    r, v = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = [5, 3, 1]
    mask = torch.tensor([[1.0] * n + [0.0] * (5 - n) for n in lengths], dtype=torch.float64)
    advantages, returns = ppo.gae(r, v, mask, gamma, lam)
    for b, n in enumerate(lengths):
        deltas = [r[b, t] + gamma * (v[b, t + 1] if t + 1 < n else 0.0) - v[b, t] for t in range(n)]
        for t in range(5):
            expected = sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n)) if t < n else 0.0
            assert advantages[b, t].item() == pytest.approx(float(expected), abs=1e-12)
            assert returns[b, t].item() == pytest.approx(float(expected + v[b, t]) if t < n else 0.0, abs=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        ppo.gae(r, v, mask[:1], gamma, lam)


def test_with_lambda_and_gamma_1_the_return_is_the_sum_of_what_is_to_come():
    r = torch.tensor([[0.5, -1.0, 2.0, 9.0]])
    _, returns = ppo.gae(r, torch.tensor([[3.0, -2.0, 1.0, 7.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]]), 1.0, 1.0)
    torch.testing.assert_close(returns, torch.tensor([[1.5, 1.0, 2.0, 0.0]]))


def test_losses_and_gradients_in_closed_form():
    """Ratios and values on both sides of both clips, with advantages of both signs."""
    logps, old_logps, advantages, values, old_values, returns = numbers(6)
    logps, values = (0.5 * logps).requires_grad_(), values.requires_grad_()
    old_logps = 0.5 * old_logps
    policy, value = ppo.ppo_loss(logps, old_logps, advantages, values, old_values, returns, 0.2, 0.3)
    policy_gradient, value_gradient = torch.autograd.grad(policy.sum() + value.sum(), (logps, values))
    kinds = set()
    for i in range(9):
        ratio, a = math.exp(logps[i].item() - old_logps[i].item()), advantages[i].item()
        assert policy[i].item() == pytest.approx(-min(a * ratio, a * min(max(ratio, 0.8), 1.2)))
        free = ratio < 1.2 if a > 0 else ratio > 0.8
        assert policy_gradient[i].item() == pytest.approx(-a * ratio if free else 0.0)
        v, old, target = values[i].item(), old_values[i].item(), returns[i].item()
        near = min(max(v, old - 0.3), old + 0.3)
        assert value[i].item() == pytest.approx(0.5 * max((v - target) ** 2, (near - target) ** 2))
        counts = abs(v - target) > abs(near - target) or near == v
        assert value_gradient[i].item() == pytest.approx(v - target if counts else 0.0)
        kinds |= {("policy", free), ("value", counts)}
    assert len(kinds) == 4  # every case was there


def test_first_step_identities_of_the_loss():
    logps, advantages, values, returns = numbers(4)
    logps.requires_grad_()
    policy, value = ppo.ppo_loss(logps, logps.detach(), advantages, values, values, returns, 0.2, 0.2)
    assert torch.equal(policy, -advantages)
    torch.testing.assert_close(torch.autograd.grad(policy.sum(), logps)[0], -advantages)
    torch.testing.assert_close(value, (values - returns) ** 2 / 2)
    for i in range(6):
        bad = [logps, logps, advantages, values, values, returns]
        bad[i] = bad[i][:, None]
        with pytest.raises(ValueError, match="one shape"):
            ppo.ppo_loss(*bad, 0.2, 0.2)


def test_rewards_of_tokens():
    logps, ref_logps = torch.tensor([-1.0, -2.0, -3.0, -1.0]), torch.tensor([-2.0, -2.0, -1.0, -1.5])
    found = ppo.token_rewards(torch.tensor([10.0, 20.0]), logps, ref_logps, torch.tensor([3, 1]), 0.5)
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.0, 1.0 + 10.0, -0.25 + 20.0]))


def test_whitened_rewards_pay_nothing_for_length():
    """Rewards 1 and 5 at the last of three tokens and of two, no penalty: each token's return is
    the completion's reward / std, however long it is.
    """
    token_rewards = torch.tensor([0.0, 0.0, 1.0, 0.0, 5.0])
    deviation = token_rewards.std(correction=0)
    for factor in (1.0, 10.0):  # and the scale of a reward is nothing
        batch = {"token_rewards": factor * token_rewards, "old_values": torch.zeros(5), "lengths": [3, 2]}
        ppo.add_advantages([(batch, 1.0)], lambda items: items, gamma=1.0, gae_lambda=1.0)
        torch.testing.assert_close(
            batch["returns"], torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0]) / deviation, rtol=1e-5, atol=0
        )
        assert batch["advantages"].mean().item() == pytest.approx(0, abs=1e-6)
        assert batch["advantages"].std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("chunk", [2, 4096])
@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_llama"])
def test_log_probabilities_and_values_are_those_of_one_sequence_at_a_time(kind, chunk, monkeypatch):
    monkeypatch.setattr(ppo, "CHUNK", chunk)
    model = getattr(models, kind)(20).double()
    saved = {
        "value.weight": torch.randn(1, 32, dtype=torch.float64),
        "value.bias": torch.tensor([0.3], dtype=torch.float64),
    }
    model = ppo.add_critic(model, saved).double()
    rows = [([5, 6, 7], [8, 9, 2]), ([10], [11, 12, 13, 14]), ([4, 5], [2])]
    logps, values = ppo.logps_and_values(
        model, batches.collate([{"prompt": p, "completions": [c]} for p, c in rows], 0, "rows", "cpu")
    )
    expected = []
    for p, c in rows:
        out = model(torch.tensor([p + c]), output_hidden_states=True, use_cache=False)
        for t, token in enumerate(c):
            state = out.hidden_states[-1][0, len(p) - 1 + t]
            expected.append(
                (out.logits[0, len(p) - 1 + t].log_softmax(-1)[token], state @ saved["value.weight"][0].double() + 0.3)
            )
    torch.testing.assert_close(logps, torch.stack([a for a, _ in expected]))
    torch.testing.assert_close(values, torch.stack([b for _, b in expected]))


# -- runs


def batches_of(tmp_path, llama, file11, monkeypatch, **changes):
    """Runs a step with known completions; what compute_loss was given and gave, the completions
    with their rewards, and the run's folder.
    """
    seen, scored = [], []
    compute_loss = ppo.compute_loss

    def computing(model, batch, **numbers):
        loss, metrics = compute_loss(model, batch, **numbers)
        seen.append(
            ({name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}, metrics)
        )
        return loss, metrics

    def sample(model, prompts, tokenizer, max_new_tokens, n, **shape):
        drawn = canned_sample(model, prompts, tokenizer, max_new_tokens, n)
        scored.extend(zip((prompt for prompt in prompts for _ in range(n)), drawn))
        return drawn

    def reward(prompts, answers):
        return torch.tensor([0.1 * len(answer) - 1.0 for answer in answers])

    monkeypatch.setattr(ppo, "compute_loss", computing)
    monkeypatch.setattr(generate, "sample", sample)
    monkeypatch.setattr(reward_models, "load_reward", lambda *rest: reward)
    folder = train("ppo", tmp_path / "run", model=llama, data=file11, **{**QUICK, "max_steps": 1, **changes})
    return seen, scored, folder


@pytest.mark.parametrize("micro_batch_size", [12, 5])
def test_the_first_ratio_is_exactly_1_and_later_ones_are_not(micro_batch_size, tmp_path, llama, file11, monkeypatch):
    seen, _, folder = batches_of(tmp_path, llama, file11, monkeypatch, micro_batch_size=micro_batch_size)
    passes = -(-12 // micro_batch_size)
    assert len(seen) == 4 * passes
    for i, (batch, metrics) in enumerate(seen):
        off = metrics["ratio"] != len(batch["targets"])
        assert bool(off) == (i >= passes)
        if i < passes:
            assert metrics["loss/policy"].item() == pytest.approx(-batch["advantages"].sum().item(), abs=1e-5)
            assert metrics["loss/value"].item() == pytest.approx(
                (batch["returns"] ** 2).sum().item() / 2, rel=1e-5
            )  # values are zero at first
            assert not batch["old_values"].any()
            assert metrics["clipped_share"] == 0
    (line,) = lines_of(folder)
    assert line["ratio"] != 1
    assert line["logratio"] == pytest.approx(0, abs=1e-5)  # the policy still was the reference


def test_advantages_of_a_run_by_a_second_road(tmp_path, llama, file11, monkeypatch):
    """From another reference than the policy, so that the KL penalty is not zero: penalty, reward
    at the last token, both whitenings, in plain loops.
    """
    other = models.save(
        models.tiny_llama(len(model_loading.load_tokenizer(llama)), seed=5),
        model_loading.load_tokenizer(llama),
        tmp_path / "other",
    )
    load_model, loaded = model_loading.load_model, []

    def load(folder, *rest):
        loaded.append(folder)
        return load_model(str(other) if len(loaded) == 2 else folder, *rest)

    monkeypatch.setattr(model_loading, "load_model", load)
    seen, scored, folder = batches_of(
        tmp_path, llama, file11, monkeypatch, micro_batch_size=5, kl=0.3, gamma=0.9, gae_lambda=0.8, ppo_epochs=1
    )
    monkeypatch.setattr(model_loading, "load_model", load_model)
    tokenizer, policy, reference = model_loading.load_tokenizer(llama), model_of(llama), model_of(other)
    token_rewards, logratios = {}, []
    for p, c in scored:
        answer = generate.text_after(tokenizer, p, c)
        sums = [oracle.plain_token_logps(m, [(p, c)], 0)[0][0, len(p) - 1 :].double() for m in (policy, reference)]
        r = -0.3 * (sums[0] - sums[1])
        logratios.append((sums[0] - sums[1]).sum().item())
        r[-1] += 0.1 * len(answer) - 1.0
        token_rewards[json.dumps([p, c])] = r
    assert lines_of(folder)[0]["logratio"] == pytest.approx(sum(logratios) / len(logratios), abs=1e-4)
    every = torch.cat([token_rewards[json.dumps([p, c])] for p, c in scored])
    deviation = ((every - every.mean()) ** 2).mean().sqrt()
    advantages = {}
    for key, r in token_rewards.items():
        r = r / deviation  # divided, no more; values are zero, so a delta is the reward itself
        advantages[key] = [sum((0.9 * 0.8) ** (u - t) * r[u].item() for u in range(t, len(r))) for t in range(len(r))]
    flat = torch.tensor([a for p, c in scored for a in advantages[json.dumps([p, c])]])
    mean, spread = flat.mean().item(), ((flat - flat.mean()) ** 2).mean().sqrt().item()
    found = torch.cat([batch["advantages"] for batch, _ in seen])
    assert found.mean().item() == pytest.approx(0, abs=1e-5)
    assert (found**2).mean().item() == pytest.approx(1, abs=1e-4)
    expected = [(a - mean) / spread for a in flat.tolist()]
    assert sorted(found.tolist()) == pytest.approx(sorted(expected), abs=1e-3)
    returns = torch.cat(
        [batch["returns"] for batch, _ in seen]
    )  # values are zero: returns are the advantages before they are whitened
    assert sorted(returns.tolist()) == pytest.approx(sorted(flat.tolist()), abs=1e-3)


def test_every_token_weighs_the_same_however_a_step_is_cut(tmp_path, llama, file11, monkeypatch):
    monkeypatch.setattr(generate, "sample", canned_sample)
    given = {"model": llama, "data": file11, **QUICK, "max_steps": 1, "ppo_epochs": 1}
    _, (whole,) = recorded("ppo", tmp_path / "whole", micro_batch_size=12, **given)
    _, (cut,) = recorded("ppo", tmp_path / "cut", micro_batch_size=5, **given)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-7)


def completion(prompt: list[int], length: int, reward: float) -> ppo.Completion:
    return ppo.Completion(prompt, "", [7] * length, "", reward)


def test_completions_of_a_prompt_share_lines_as_far_as_they_fit():
    groups = [
        [completion([1, 2], n, float(n)) for n in (3, 4, 0, 1, 5)],  # 2 + 3 + 4 fill nine tokens
        [completion([1] * 9, 3, 6.0), completion([1] * 9, 2, 7.0)],  # longer than a line, each
        [completion([3], 0, 8.0)],  # nothing to learn from
        [completion([3], 1, 9.0) for _ in range(4)],
    ]
    rows = ppo.lines_of(groups, most=3, max_length=9)
    lengths = [[len(ids) for ids in row["completions"]] for row in rows]
    assert lengths == [[3, 4], [1, 5], [3], [2], [1, 1, 1], [1]]
    assert [row["rewards"] for row in rows] == [[3.0, 4.0], [1.0, 5.0], [6.0], [7.0], [9.0] * 3, [9.0]]
    assert [len(row["prompt"]) for row in rows] == [2, 2, 9, 9, 1, 1]
    alone = [ppo.lines_of(groups[:1], 1, 9), ppo.lines_of(groups[:1], 5, 1)]
    assert [[len(row["completions"]) for row in rows] for rows in alone] == [[1] * 4] * 2


def test_a_shared_prompt_changes_no_gradient(tmp_path, llama, file11, monkeypatch):
    """Lines with one to three completions, beside a line for each."""

    def sample(model, prompts, tokenizer, max_new_tokens, n, **shape):
        drawn = canned_sample(model, prompts, tokenizer, max_new_tokens, n)
        return [[] if i in (1, 6, 7, 9, 10, 11) else ids for i, ids in enumerate(drawn)]

    shapes, collate = [], batches.collate

    def collating(rows, *args, **given):
        batch = collate(rows, *args, **given)
        shapes.append((len(batch["input_ids"]), len(batch["completion_tokens"])))
        return batch

    given = {"model": llama, "data": file11, **QUICK, "completions": 3, "max_steps": 1, "micro_batch_size": 8}
    given |= {"ppo_epochs": 1, "kl": 0.5}
    found, lines = [], []
    for share_prompt in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(generate, "sample", sample)
            patch.setattr(batches, "collate", collating)
            _, gradients = recorded("ppo", tmp_path / f"{share_prompt}", share_prompt=share_prompt, **given)
        found.append(gradients)
        lines.append(shapes[1:])  # the first one chose the layout
        shapes.clear()
    assert lines == [[(2, 5), (2, 4), (1, 3)], [(8, 8), (4, 4)]]  # six prompts, of which one has no completion
    ((shared,), (alone,)) = found
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-7)


def test_the_value_head_is_saved_and_goes_on(tmp_path, llama, file11, monkeypatch):
    monkeypatch.setattr(generate, "sample", canned_sample)
    first = train("ppo", tmp_path / "first", model=llama, data=file11, **QUICK)
    saved = safetensors.torch.load_file(first / "model.safetensors")
    assert saved["value.weight"].any()
    second = train("ppo", tmp_path / "second", model=str(first), data=file11, **{**QUICK, "max_steps": 1, "lr": 1e-12})
    torch.testing.assert_close(
        safetensors.torch.load_file(second / "model.safetensors")["value.weight"], saved["value.weight"]
    )


@pytest.mark.slow
def test_reward_rises(tmp_path, toy_base):
    """A short run on the toy: the reward of the last steps is well above that of the first."""
    folder = train(
        "ppo",
        tmp_path / "run",
        model="toy",
        batch_size=40,
        completions=1,
        max_new_tokens=24,
        epochs=10,
        micro_batch_size=64,
        lr=1e-3,
    )
    rewards_seen = [line["reward"] for line in lines_of(folder)]
    assert sum(rewards_seen[-4:]) / 4 > sum(rewards_seen[:4]) / 4 + 0.3
