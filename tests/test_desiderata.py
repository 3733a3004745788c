"""The synthetic studies: population minimisers, the two criteria as theorems, and the losses they
judge.
"""

import pytest
import torch

from experiments import constraints, interpolation, preservation
from experiments.tabular import (
    METHODS,
    closed_form,
    f_dpo_loss,
    ipo_loss,
    label_weights,
    minimise,
    minimiser,
    population_loss,
    rlhf_objective,
    tensor,
)

TARGET, REF = interpolation.TARGET, interpolation.REF
# lambda -> method -> minimiser, as derived for pairs of two different answers drawn uniformly
TABLE = {
    0.01: ((0.596, 0.303, 0.101), (1, 0, 0), (1, 0, 0), (1, 0, 0)),
    0.1: ((0.567, 0.322, 0.111), (0.999, 0.001, 0), (0.805, 0.185, 0.009), (1, 0, 0)),
    1.0: ((0.471, 0.376, 0.153), (0.632, 0.316, 0.053), (0.453, 0.391, 0.155), (0.778, 0.197, 0.025)),
    10.0: ((0.411, 0.397, 0.192), (0.425, 0.397, 0.178), (0.405, 0.399, 0.195), (0.450, 0.391, 0.159)),
    100.0: ((0.401, 0.400, 0.199), (0.403, 0.400, 0.198), (0.401, 0.400, 0.200), (0.405, 0.400, 0.195)),
}


@pytest.mark.parametrize("lam", TABLE)
def test_population_minimisers(lam):
    for method, expected in zip(METHODS, TABLE[lam]):
        torch.testing.assert_close(minimiser(method, TARGET, REF, lam), tensor(expected), atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", ["DPO", "IPO", "f-DPO"])
@pytest.mark.parametrize("lam", [0.3, 1.0, 10.0])
def test_closed_forms_are_stationary_for_the_losses_of_the_scripts(method, lam):
    logits = closed_form(method, TARGET, REF, lam).requires_grad_()
    gradient = torch.autograd.grad(population_loss(method, logits, REF, label_weights(TARGET), lam), logits)[0]
    assert gradient.abs().max() < 1e-9
    moved = (logits.detach() + tensor([0.1, 0.0, -0.1])).requires_grad_()  # the check can fail
    gradient = torch.autograd.grad(population_loss(method, moved, REF, label_weights(TARGET), lam), moved)[0]
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("lam", [0.05, 1.0, 20.0])
def test_typo_satisfies_its_stationarity_condition(lam):
    """sum_j w_kj [p_theta(k > j) - p*(k > j)] + lambda (pi_k - ref_k) = 0, w the probability of the
    unordered pair.
    """
    policy = minimiser("TYPO", TARGET, REF, lam)
    model, wanted = (p[:, None] / (p[:, None] + p[None, :]) for p in (policy, TARGET))
    pairs = (1 - torch.eye(3, dtype=torch.float64)) / 3
    condition = (pairs * (model - wanted)).sum(1) + lam * (policy - REF)
    assert condition.abs().max() < 1e-10


def test_strong_interpolation_is_typos_alone():
    for method in METHODS:
        near_zero, far = minimiser(method, TARGET, REF, 1e-3), minimiser(method, TARGET, REF, 1e4)
        torch.testing.assert_close(far, REF, atol=1e-3, rtol=0)
        assert ((near_zero - TARGET).abs().max() < 1e-3) == (method == "TYPO")
        assert (near_zero[0] > 0.999) == (method != "TYPO")  # the others collapse to the mode


@pytest.mark.parametrize("from_ref", [False, True])
def test_preservation(from_ref):
    log_lambdas = torch.linspace(-5, 5, 11, dtype=torch.float64)
    for method in METHODS:
        errors = preservation.errors_of(method, log_lambdas, from_ref)
        improves = ~errors["ratio"].isnan()
        assert improves.any()
        if method == "TYPO":
            assert improves.all()
            assert errors["good_tv"].max() < 1e-9
            assert errors["good_kl"].max() < 1e-12
        else:
            assert (errors["ratio"][improves] >= 1).all()


def test_dpo_solves_the_rlhf_objective_unless_constrained():
    lam, args = 0.1, constraints.Args()
    exact = minimise(lambda logits: rlhf_objective(logits, TARGET, REF, 1.0), REF.log()).softmax(-1)
    torch.testing.assert_close(exact, closed_form("DPO", TARGET, REF, 1.0).exp(), atol=1e-8, rtol=0)
    dpo, rlhf = (constraints.policies(name, lam, args) for name in ("DPO", "RLHF"))
    gaps = {name: (dpo[name] - rlhf[name]).abs().sum().item() / 2 for name in constraints.CONSTRAINTS}
    assert gaps["none"] < 1e-12
    assert gaps["early stopping"] > 0.2
    assert gaps["L2 decay"] > 0.2


def test_small_lambda_is_a_learning_rate_for_dpo():
    """For small lambda DPO's gradient is -(lambda/2) E[grad h]: it scales with lambda and does not
    depend on where the policy is.
    """
    weights = label_weights(TARGET)

    def gradient(lam, logits):
        point = logits.clone().requires_grad_()
        return torch.autograd.grad(population_loss("DPO", point, REF, weights, lam), point)[0]

    torch.testing.assert_close(gradient(1e-4, REF.log()) / 1e-4, gradient(1e-5, REF.log()) / 1e-5, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gradient(1e-5, REF.log()), gradient(1e-5, TARGET.log()), rtol=1e-3, atol=1e-9)


def test_comparison_losses_at_known_points():
    chosen, rejected, ref = tensor([-1.0]), tensor([-2.0]), tensor([-1.5])
    torch.testing.assert_close(ipo_loss(chosen, rejected, ref, ref, 0.5), tensor([0.0]))  # h = 1 = 1/(2 tau)
    torch.testing.assert_close(f_dpo_loss(ref, ref, ref, ref, 0.7), tensor([2.0]).log())
    u_w, u_l = torch.exp(tensor([0.5])), torch.exp(tensor([-0.5]))
    expected = -torch.nn.functional.logsigmoid(0.7 * (torch.log(2 * u_w / (1 + u_w)) - torch.log(2 * u_l / (1 + u_l))))
    torch.testing.assert_close(f_dpo_loss(chosen, rejected, ref, ref, 0.7), expected)


def test_sampled_pairs_follow_bradley_terry():
    counts = interpolation.draw_counts(400, 213)
    torch.testing.assert_close(counts.mean(0), label_weights(TARGET), atol=4e-3, rtol=0)
    assert counts.diagonal(dim1=1, dim2=2).sum() == 0


def test_training_on_sampled_pairs_ends_at_their_minimiser():
    counts = interpolation.draw_counts(3, 213)
    policies = interpolation.train_on_sample("TYPO", 0.1, counts, 1500)
    for policy, weights in zip(policies, counts):

        def loss(logits, weights=weights):
            return population_loss("TYPO", logits, REF, weights, 0.1)

        exact = minimise(loss, REF.log()).softmax(-1)
        torch.testing.assert_close(policy, exact, atol=1e-3, rtol=0)
