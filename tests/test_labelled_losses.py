"""The losses of labelled answers: closed-form gradients for every kind of label, known values,
shapes, extremes; and of demonstrations.
"""

import math

import pytest
import torch

import pointwise_dpo
import sft
import ulma

BETA = 0.37
BINARY = [pointwise_dpo.binary_pointwise_dpo_loss, ulma.binary_ulma_loss]
CONTINUOUS = [pointwise_dpo.continuous_pointwise_dpo_loss, ulma.continuous_ulma_loss]


def inputs(labels: list[float]):
    """(policy, ref, labels, beta_log_z), float64, every combination of signs among them."""
    generator = torch.Generator().manual_seed(len(labels))
    policy, ref, c = (
        torch.randn(len(labels), generator=generator, dtype=torch.float64).mul(s) for s in (20.0, 20.0, 2.0)
    )
    return policy.requires_grad_(), ref, torch.tensor(labels, dtype=torch.float64), c.requires_grad_()


@pytest.mark.parametrize("loss", BINARY)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_binary_gradients_in_closed_form(loss, label):
    policy, ref, labels, c = inputs([label] * 40)
    losses = loss(policy, ref, labels, BETA, c)
    assert losses.shape == (40,)
    assert losses.dtype == torch.float64
    got = torch.autograd.grad(losses.sum(), (policy, c), allow_unused=True, materialize_grads=True)
    residual = label - torch.sigmoid(BETA * (policy - ref) + c).detach()
    if loss is ulma.binary_ulma_loss and label == 1:
        expected = torch.full((40,), -1.0, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    else:
        expected = -BETA * residual, -residual
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("loss", CONTINUOUS)
@pytest.mark.parametrize("label", [-3.0, 0.0, 0.25, 1.0, 7.5])
def test_continuous_gradients_in_closed_form(loss, label):
    policy, ref, labels, c = inputs([label] * 40)
    losses = loss(policy, ref, labels, BETA, c)
    assert losses.shape == (40,)
    assert losses.dtype == torch.float64
    got = torch.autograd.grad(losses.sum(), (policy, c))
    residual = label - (BETA * (policy - ref) + c).detach()
    if loss is ulma.continuous_ulma_loss and label == 1:
        expected = torch.full((40,), -1.0, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    else:
        expected = -2 * BETA * residual, -2 * residual
    torch.testing.assert_close(got, expected)


def test_values_where_the_policy_is_the_reference():
    at = torch.tensor([-5.0, -9.0])
    for loss in BINARY:
        torch.testing.assert_close(loss(at, at, torch.zeros(2), BETA), torch.full((2,), math.log(2)))
    torch.testing.assert_close(
        pointwise_dpo.binary_pointwise_dpo_loss(at, at, torch.ones(2), BETA), torch.full((2,), math.log(2))
    )
    torch.testing.assert_close(ulma.binary_ulma_loss(at, at, torch.ones(2), BETA), -at)
    for loss in CONTINUOUS:
        torch.testing.assert_close(loss(at, at, torch.tensor([0.5, -2.0]), BETA), torch.tensor([0.25, 4.0]))
    torch.testing.assert_close(ulma.continuous_ulma_loss(at, at, torch.ones(2), BETA), -at)
    torch.testing.assert_close(pointwise_dpo.continuous_pointwise_dpo_loss(at, at, torch.ones(2), BETA), torch.ones(2))


@pytest.mark.parametrize("loss", BINARY + CONTINUOUS)
def test_the_constant_is_added_after_beta(loss):
    """It is beta log Z and not log Z: a shift of the log-ratio by c / beta does the same."""
    policy, ref, labels, _ = inputs([0.0, 0.0, 0.0])
    shifted = loss(policy, ref - 0.8 / BETA, labels, BETA)
    torch.testing.assert_close(loss(policy, ref, labels, BETA, 0.8), shifted)
    torch.testing.assert_close(loss(policy, ref, labels, BETA, torch.full((3,), 0.8, dtype=torch.float64)), shifted)
    torch.testing.assert_close(loss(policy, ref, labels, BETA, torch.tensor(0.8, dtype=torch.float64)), shifted)


@pytest.mark.parametrize("loss", BINARY + CONTINUOUS)
def test_extremes_stay_finite(loss):
    policy = torch.tensor([-1e4, 0.0, -1e4, 0.0], requires_grad=True)
    losses = loss(policy, torch.tensor([0.0, -1e4, 0.0, -1e4]), torch.tensor([0.0, 0.0, 1.0, 1.0]), 1.0)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", BINARY + CONTINUOUS)
def test_shapes_are_checked(loss):
    good = torch.zeros(3)
    for bad in (
        (torch.zeros(3, 1), good, good),
        (good, torch.zeros(3, 1), good),
        (good, good, torch.zeros(1)),
        (torch.zeros(()),) * 3,
    ):
        with pytest.raises(ValueError, match="one shape"):
            loss(*bad, BETA)
    with pytest.raises(ValueError, match="one shape"):
        loss(good, good, good, BETA, torch.zeros(3, 1))


@pytest.mark.parametrize("module", [pointwise_dpo, ulma])
@pytest.mark.parametrize("labels", ["binary", "continuous"])
def test_any_mix_of_labels_gives_a_finite_loss(module, labels, tiny_llama):
    """Also micro-batches without one of the classes, whose mean reward is then the mean of nothing,
    and whose loss is not.
    """
    from common import batches, data, models

    tokenizer = models.load_tokenizer(tiny_llama)
    model = models.load_model(tiny_llama, "cpu", tokenizer)
    rows = data.encode_rows(
        tokenizer,
        [("what colour has snow ?", " it is white ."), ("what colour has coal ?", " it is red , you fool .")],
        64,
        answers=1,
    )
    batch = batches.collate(list(rows), 0, "rows", "cpu") | {"ref_logps": torch.tensor([-9.0, -12.0])}
    for mix in ([0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.3, 0.7]):
        loss, metrics = module.compute_loss(model, batch | {"labels": torch.tensor(mix)}, labels, beta=0.3)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert [metrics[f"count rewards/{kind}"].item() for kind in ("positive", "negative")] == [
            mix.count(1.0),
            2 - mix.count(1.0),
        ]


def test_sft_loss():
    logps = torch.tensor([-3.0, -7.0], dtype=torch.float64, requires_grad=True)
    losses = sft.sft_loss(logps)
    assert losses.tolist() == [3.0, 7.0]
    assert torch.autograd.grad(losses.sum(), logps)[0].tolist() == [-1.0, -1.0]
    with pytest.raises(ValueError, match="batch"):
        sft.sft_loss(torch.zeros(2, 1))
