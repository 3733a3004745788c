"""The losses on pairs as functions: closed forms, known points, limits, minima, shapes."""

import math

import pytest
import torch

from cdpo import cdpo_loss
from dph import contrastive_dph_loss, separable_dph_loss
from dpo import dpo_loss

BETA, EPS = 0.3, 0.1


def points(columns: int, rows: int = 64, spread: float = 3.0) -> list[torch.Tensor]:
    """Random float64 columns [rows] that ask for gradients."""
    generator = torch.Generator().manual_seed(columns)
    return [
        (spread * torch.randn(rows, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(columns)
    ]


def log_sigma(x: torch.Tensor) -> torch.Tensor:
    """log sigma(x) from its definition; exact enough in float64 where |x| is small."""
    return -torch.log(1 + torch.exp(-x))


# Each loss as a function of its tensors alone, with how many it takes.
LOSSES = {
    "dpo": (4, lambda *x: dpo_loss(*x, BETA)),
    "cdpo": (4, lambda *x: cdpo_loss(*x, BETA, EPS)),
    "separable": (2, lambda *x: separable_dph_loss(*x, EPS)),
    "contrastive": (2, lambda *x: contrastive_dph_loss(*x, EPS)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


# -- closed forms


def test_dpo_loss_and_its_gradient_in_closed_form():
    chosen, rejected, ref_chosen, ref_rejected = x = points(4)
    loss = dpo_loss(*x, BETA)
    h = ((chosen - ref_chosen) - (rejected - ref_rejected)).detach()
    torch.testing.assert_close(loss, -log_sigma(BETA * h))
    slope = -BETA * torch.sigmoid(-BETA * h)
    for got, expected in zip(torch.autograd.grad(loss.sum(), x), (slope, -slope, -slope, slope)):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_cdpo_loss_and_its_gradient_in_closed_form(eps):
    chosen, rejected, ref_chosen, ref_rejected = x = points(4)
    loss = cdpo_loss(*x, BETA, eps)
    h = ((chosen - ref_chosen) - (rejected - ref_rejected)).detach()
    torch.testing.assert_close(loss, -(1 - eps) * log_sigma(BETA * h) - eps * log_sigma(-BETA * h))
    slope = BETA * (torch.sigmoid(BETA * h) - (1 - eps))
    for got, expected in zip(torch.autograd.grad(loss.sum(), x), (slope, -slope, -slope, slope)):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
def test_separable_dph_loss_and_its_gradient_in_closed_form(eps):
    chosen, rejected = x = points(2)
    loss = separable_dph_loss(*x, eps)
    first = -(1 - eps) * log_sigma(chosen) - eps * log_sigma(-chosen)
    second = -eps * log_sigma(rejected) - (1 - eps) * log_sigma(-rejected)
    torch.testing.assert_close(loss, first + second)
    of_chosen, of_rejected = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(of_chosen, torch.sigmoid(chosen) - (1 - eps))
    torch.testing.assert_close(of_rejected, torch.sigmoid(rejected) - eps)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
def test_contrastive_dph_loss_and_its_gradient_in_closed_form(eps):
    chosen, rejected = x = points(2)
    loss = contrastive_dph_loss(*x, eps)
    margin = (chosen - rejected).detach()
    torch.testing.assert_close(loss, -(1 - eps) * log_sigma(margin) - eps * log_sigma(-margin))
    of_chosen, of_rejected = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(of_chosen, torch.sigmoid(margin) - (1 - eps))
    torch.testing.assert_close(of_rejected, -of_chosen)


@every_loss
def test_gradients_are_those_of_finite_differences(name):
    columns, loss = LOSSES[name]
    assert torch.autograd.gradcheck(loss, points(columns, rows=8))


# -- known points and minima


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dpo", math.log(2)), ("cdpo", math.log(2)), ("separable", 2 * math.log(2)), ("contrastive", math.log(2))],
)
def test_where_nothing_is_preferred(name, expected):
    columns, loss = LOSSES[name]
    same = torch.full((3,), -17.25, dtype=torch.float64) if columns == 4 else torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(loss(*[same] * columns), torch.full((3,), expected, dtype=torch.float64))


def test_dpo_at_values_known_from_elsewhere():
    """torchtune's expected values: beta * h of 0, 1 and 2 by way of beta .1."""
    policy_chosen = torch.tensor([0.0, 10.0, 15.0], dtype=torch.float64)
    policy_rejected = torch.tensor([0.0, 0.0, -5.0], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    expected = torch.tensor([math.log(2), 0.31326169, 0.12692801], dtype=torch.float64)
    torch.testing.assert_close(dpo_loss(policy_chosen, policy_rejected, zero, zero, 0.1), expected, atol=1e-8, rtol=0)
    # The reference counts with the opposite sign.
    torch.testing.assert_close(dpo_loss(zero, zero, -policy_chosen, -policy_rejected, 0.1), expected, atol=1e-8, rtol=0)


def test_more_for_the_chosen_answer_is_less_loss():
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert (
        dpo_loss(one, zero, zero, zero, BETA)
        < dpo_loss(zero, zero, zero, zero, BETA)
        < dpo_loss(zero, one, zero, zero, BETA)
    )
    assert cdpo_loss(one, zero, zero, zero, BETA, EPS) < cdpo_loss(zero, one, zero, zero, BETA, EPS)
    for loss in (separable_dph_loss, contrastive_dph_loss):
        assert loss(one, zero, EPS) < loss(zero, zero, EPS) < loss(zero, one, EPS)


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_minima(eps):
    """The gradient vanishes where the probability of the label is 1 - eps, and any step from there
    costs.
    """
    at = torch.tensor([math.log((1 - eps) / eps)], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    cases = [
        (lambda h: cdpo_loss(h, zero, zero, zero, BETA, eps), at / BETA),
        (lambda m: contrastive_dph_loss(m, zero, eps), at),
        (lambda r: separable_dph_loss(r, -at, eps), at),
        (lambda r: separable_dph_loss(at, r, eps), -at),
    ]
    for loss, minimum in cases:
        minimum = minimum.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(minimum).sum(), minimum)
        assert abs(slope.item()) < 1e-12
        assert all(loss(minimum + d) > loss(minimum) for d in (-0.1, 0.1))


def test_cdpo_without_smoothing_is_dpo():
    x = points(4)
    torch.testing.assert_close(cdpo_loss(*x, BETA, 0.0), dpo_loss(*x, BETA), rtol=0, atol=0)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_contrastive_dph_is_cdpo_on_the_rewards_of_the_head(eps):
    chosen, rejected = points(2)
    zero = torch.zeros_like(chosen)
    torch.testing.assert_close(
        contrastive_dph_loss(chosen, rejected, eps), cdpo_loss(chosen, rejected, zero, zero, 1.0, eps), rtol=0, atol=0
    )


# -- dtype, limits, shapes


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unreduced_and_in_the_dtype_given(name, dtype):
    columns, loss = LOSSES[name]
    out = loss(*[x.detach().to(dtype) for x in points(columns, rows=5)])
    assert out.shape == (5,)
    assert out.dtype == dtype


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits_are_finite(name, dtype):
    columns, loss = LOSSES[name]
    huge = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype)
    x = [
        huge.clone().requires_grad_(),
        huge.roll(1).requires_grad_(),
        *[torch.zeros(4, dtype=dtype) for _ in range(columns - 2)],
    ]
    out = loss(*x)
    grads = torch.autograd.grad(out.sum(), x[:2])
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_far_off_the_loss_is_linear():
    x = torch.tensor([-1e4], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    assert dpo_loss(x, zero, zero, zero, 1.0).item() == pytest.approx(1e4)
    assert dpo_loss(-x, zero, zero, zero, 1.0).item() == pytest.approx(0.0)
    assert separable_dph_loss(x, -x, 0.0).item() == pytest.approx(2e4)


@every_loss
@pytest.mark.parametrize("position", range(4))
def test_shapes_that_would_broadcast_are_refused(name, position):
    columns, loss = LOSSES[name]
    x = [torch.zeros(3) for _ in range(columns)]
    x[position % columns] = torch.zeros(3, 1)
    with pytest.raises(ValueError, match="shape"):
        loss(*x)
    with pytest.raises(ValueError, match="shape"):
        loss(*[torch.zeros(3, 1)] * columns)
    with pytest.raises(ValueError, match="shape"):
        loss(*[torch.tensor(0.0)] * columns)


@pytest.mark.parametrize("eps", [-0.1, 0.6, 1.0])
def test_label_smoothing_out_of_range_is_refused(eps):
    x = torch.zeros(2)
    for loss in (separable_dph_loss, contrastive_dph_loss):
        with pytest.raises(ValueError, match="label_smoothing"):
            loss(x, x, eps)
    with pytest.raises(ValueError, match="label_smoothing"):
        cdpo_loss(x, x, x, x, BETA, eps)
