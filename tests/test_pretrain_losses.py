"""The losses on a scored corpus as functions: closed forms, probabilities of 1, thresholds, clipped
weights, shapes; control tokens among segments.
"""

import math
import random

import pytest
import torch

from awr_pretrain import awr_loss, awr_weights
from conditional_pretrain import BAD, GOOD, add_control_tokens
from filtered_pretrain import mean_score
from rwr_pretrain import rwr_loss, rwr_weights
from unlikelihood_pretrain import unlikelihood_loss

ALPHA, BETA, THRESHOLD = 0.3, 0.4, 0.25


def points(shape=(4, 16), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 log-probabilities, scores and values; log-probabilities and values ask for gradients.
    Half of the scores are above the threshold.
    """
    generator = torch.Generator().manual_seed(seed)
    logps = (torch.rand(shape, generator=generator, dtype=torch.float64) * 0.98 + 0.01).log().requires_grad_()
    scores = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 * THRESHOLD
    values = (-torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    return logps, scores, values


# Each loss as a function of log-probabilities, scores and values alone.
LOSSES = {
    "unlikelihood": lambda logps, scores, values: unlikelihood_loss(logps, scores, THRESHOLD, ALPHA),
    "rwr": lambda logps, scores, values: rwr_loss(logps, -scores, BETA),
    "awr": lambda logps, scores, values: awr_loss(logps, -scores, values, ALPHA, BETA),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


# -- closed forms


@pytest.mark.parametrize("alpha", [1.0, 0.01])
def test_unlikelihood_loss_and_its_gradient_in_closed_form(alpha):
    logps, scores, _ = points()
    loss = unlikelihood_loss(logps, scores, THRESHOLD, alpha)
    p, bad = logps.detach().exp(), scores > THRESHOLD
    assert bad.any()
    assert not bad.all()
    torch.testing.assert_close(loss, torch.where(bad, -alpha * torch.log(1 - p), -torch.log(p)))
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    torch.testing.assert_close(slope, torch.where(bad, alpha * p / (1 - p), torch.tensor(-1.0, dtype=torch.float64)))


def test_rwr_loss_and_its_gradient_in_closed_form():
    logps, scores, _ = points()
    loss = rwr_loss(logps, -scores, BETA)
    weights = math.e ** (-scores / BETA)
    torch.testing.assert_close(loss, -weights * logps)
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    torch.testing.assert_close(slope, -weights)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_awr_loss_and_its_gradients_in_closed_form(alpha):
    """The value is a constant in the weight: its gradient is the squared error's alone."""
    logps, scores, values = points()
    loss = awr_loss(logps, -scores, values, alpha, BETA)
    advantages = (-scores - values).detach()
    weights = math.e ** (advantages / BETA)
    torch.testing.assert_close(loss, -alpha * weights * logps + (1 - alpha) * advantages**2)
    of_logps, of_values = torch.autograd.grad(loss.sum(), (logps, values))
    torch.testing.assert_close(of_logps, -alpha * weights)
    torch.testing.assert_close(of_values, -2 * (1 - alpha) * advantages)


@pytest.mark.parametrize("name", ["unlikelihood", "rwr"])
def test_gradients_are_those_of_finite_differences(name):
    logps, scores, values = points((3, 4))
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, scores, values), logps)


# -- known points, limits


def test_known_points():
    half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    scores = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        unlikelihood_loss(half, scores, 0.5, 0.1), torch.tensor([math.log(2), 0.1 * math.log(2)], dtype=torch.float64)
    )
    torch.testing.assert_close(
        rwr_loss(half, -scores, 1.0), torch.tensor([math.log(2), math.log(2) / math.e], dtype=torch.float64)
    )
    torch.testing.assert_close(
        awr_loss(half, -scores, -scores, 0.25, 1.0), torch.full((2,), 0.25 * math.log(2), dtype=torch.float64)
    )
    advantage_of_one = awr_loss(half, torch.zeros_like(half), torch.full_like(half, -1.0), 0.25, 2.0)
    torch.testing.assert_close(
        advantage_of_one, torch.full((2,), 0.25 * math.exp(0.5) * math.log(2) + 0.75, dtype=torch.float64)
    )


def test_at_the_papers_beta_rwr_is_nearly_mle():
    logps, _, _ = points()
    for score, weight in ((0.0, 1.0), (1.0, 0.905)):
        loss = rwr_loss(logps, torch.full_like(logps, -score), 10.0)
        torch.testing.assert_close(loss, -weight * logps, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_probabilities_of_one_give_no_nan_on_either_branch(score, dtype):
    """A log-softmax does return exactly 0.

    On a good token the bad tokens' branch has an infinite slope there, times 0.
    """
    logps = torch.tensor(
        [0.0, -torch.finfo(dtype).tiny, -torch.finfo(dtype).eps / 4, -1e-6, -3.0, -80.0],
        dtype=dtype,
        requires_grad=True,
    )
    loss = unlikelihood_loss(logps, torch.full_like(logps, score), 0.5, 1.0)
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.isfinite().all()
    assert slope.isfinite().all()
    if score == 0.0:
        assert (slope == -1).all()
    else:
        # A large number, and the largest.
        assert loss[:3].tolist() == pytest.approx([-math.log(torch.finfo(dtype).eps)] * 3, rel=1e-6)
        assert loss[3] < loss[0]
        expected = (p := math.exp(-3.0)) / (1 - p)
        assert slope[4].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("p", [1e-4, 0.5, 0.999, 1 - 1e-6, 1 - 1e-9])
def test_log_of_one_minus_p_is_exact_near_one(p):
    """1 - exp(log p), taken as it stands, has no digit left there."""
    logp = torch.tensor([math.log1p(-(1 - p))], dtype=torch.float64)
    loss = unlikelihood_loss(logp, torch.ones(1, dtype=torch.float64), 0.0, 1.0)
    assert loss.item() == pytest.approx(-math.log(1 - p), rel=1e-6)
    single = unlikelihood_loss(torch.tensor([-1e-5]), torch.ones(1), 0.0, 1.0)
    assert single.item() == pytest.approx(-math.log(-math.expm1(-1e-5)), rel=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_score_equal_to_the_threshold_is_good(threshold, dtype):
    """A hard rule, at threshold 0 too, and for scores in float32 of which the threshold is the
    float64 value.
    """
    logps = torch.full((3,), -2.0, dtype=dtype)
    scores = torch.tensor([max(0.0, threshold - 0.01), threshold, threshold + 1e-3]).float()
    alpha = 0.5
    bad = -alpha * math.log(-math.expm1(-2.0))
    assert unlikelihood_loss(logps, scores, threshold, alpha).tolist() == pytest.approx([2.0, 2.0, bad], rel=1e-6)
    marked = add_control_tokens(
        ["a", "b", "c"], [max(0.0, threshold - 0.01), threshold, threshold + 1e-3], threshold, 0.0, random.Random(0)
    )
    assert marked == [GOOD + "a", GOOD + "b", BAD + "c"]


def test_at_threshold_zero_the_size_of_a_score_plays_no_part():
    logps = torch.full((3,), -1.0, dtype=torch.float64)
    losses = unlikelihood_loss(logps, torch.tensor([1e-6, 0.5, 30.0], dtype=torch.float64), 0.0, 1.0)
    assert losses[0] == losses[1] == losses[2] == pytest.approx(-math.log(1 - math.exp(-1)))


def test_weights_are_clipped_at_1000():
    logps = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    rewards = torch.tensor([math.log(999.0), math.log(1001.0), 1e6], dtype=torch.float64)
    expected = torch.tensor([999.0, 1000.0, 1000.0], dtype=torch.float64)
    torch.testing.assert_close(rwr_weights(rewards, 1.0), expected)
    torch.testing.assert_close(rwr_loss(logps, rewards, 1.0), expected)
    values = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(awr_weights(rewards, values, 1.0), expected)
    torch.testing.assert_close(awr_loss(logps, rewards, values, 1.0, 1.0), expected)
    torch.testing.assert_close(
        awr_weights(torch.zeros(3), torch.tensor([-0.69, -0.7, -1.0]), 0.1),
        torch.tensor([992.2747, 1000.0, 1000.0]),
        rtol=1e-4,
        atol=0,
    )


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_unreduced_in_the_shape_and_dtype_given(name, dtype, shape):
    logps, scores, values = (x.detach().to(dtype) for x in points(shape))
    for seen in (scores, scores.float()):  # scores are kept in float32
        out = LOSSES[name](logps, seen, values)
        assert out.shape == shape
        assert out.dtype == dtype
    torch.testing.assert_close(
        out.flatten()[0], LOSSES[name](logps.flatten()[:1], scores.flatten()[:1], values.flatten()[:1])[0]
    )


@every_loss
def test_shapes_that_would_broadcast_are_refused(name):
    logps, scores, values = (x.detach() for x in points((3, 4)))
    for other in (scores[:, :1], scores[0], scores[0, 0], scores.flatten()):
        with pytest.raises(ValueError, match="shape"):
            LOSSES[name](logps, other, values)
        with pytest.raises(ValueError, match="shape"):
            LOSSES[name](other, scores, values)
    if name == "awr":
        with pytest.raises(ValueError, match="shape"):
            awr_loss(logps, -scores, values[:, :1], ALPHA, BETA)


# -- control tokens, documents


def test_control_tokens_among_segments():
    segments, scores = ["one", " two", "\n three", ""], [0.0, 0.5, 0.2, 1.0]
    marked = add_control_tokens(segments, scores, 0.2, 0.0, random.Random(0))
    assert marked == ["<|good|>one", "<|bad|> two", "<|good|>\n three", "<|bad|>"]
    assert add_control_tokens(segments, scores, 0.2, 1.0, random.Random(0)) == segments
    assert add_control_tokens([], [], 0.2, 0.5, random.Random(0)) == []


def test_control_tokens_are_left_out_at_the_rate_asked_for():
    n, drop = 20_000, 0.1
    scores = [float(i % 2) for i in range(n)]
    marked = add_control_tokens(["x"] * n, scores, 0.5, drop, random.Random(0))
    for mark, rest in ((GOOD, marked[::2]), (BAD, marked[1::2])):
        assert {*rest} == {mark + "x", "x"}
        assert abs(rest.count("x") / len(rest) - drop) < 5 * math.sqrt(drop * (1 - drop) / len(rest))
    assert marked == add_control_tokens(["x"] * n, scores, 0.5, drop, random.Random(0))
    same = add_control_tokens(["x"] * n, [0.0] * n, 0.5, drop, random.Random(0))
    # Which ones are left out does not depend on the scores.
    assert [s == "x" for s in same] == [s == "x" for s in marked]


def test_control_tokens_of_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="2 segments and 1 scores"):
        add_control_tokens(["a", "b"], [0.0], 0.0, 0.0, random.Random(0))
    for drop in (-0.1, 1.1):
        with pytest.raises(ValueError, match="drop"):
            add_control_tokens(["a"], [0.0], 0.0, drop, random.Random(0))


def test_the_mean_score_of_a_document_weighs_segments_alike():
    assert mean_score([0.0, 0.0, 0.3]) == pytest.approx(0.1)
