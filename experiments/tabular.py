"""Tabular policies over three answers: population losses of four methods, their minimisers, and how
pairs are drawn.

A policy is softmax(logits) with one logit an answer. A population loss is the exact expectation
over pairs of two different answers and over Bradley-Terry labels,
p(i beats j) = target_i / (target_i + target_j). DPO's and TYPO's losses are those of the scripts;
IPO and f-DPO are here for comparison only.
"""

import torch
import torch.nn.functional as F

from dpo import dpo_loss
from typo import forward_kl, typo_loss

METHODS = ("TYPO", "DPO", "IPO", "f-DPO")


def tensor(values) -> torch.Tensor:
    """A float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def pair_weights(draw: torch.Tensor) -> torch.Tensor:
    """Probability of each ordered pair (i, j) of two different answers drawn independently with
    probabilities `draw`, [answers, answers].
    """
    weights = draw[:, None] * draw[None, :] * (1 - torch.eye(len(draw), dtype=draw.dtype))
    return weights / weights.sum()


def label_weights(target: torch.Tensor, draw: torch.Tensor | None = None) -> torch.Tensor:
    """Probability that a pair is drawn and i is preferred to j, [answers, answers]; `draw` None:
    uniform over answers.
    """
    draw = torch.ones_like(target) if draw is None else draw
    pairs = pair_weights(draw)
    return (pairs + pairs.T) * target[:, None] / (target[:, None] + target[None, :])


def ipo_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, tau: float
) -> torch.Tensor:
    """IPO (arXiv 2310.12036, equation 17): (h - 1/(2 tau))^2, [batch]."""
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return (h - 1 / (2 * tau)) ** 2


def f_dpo_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, lam: float
) -> torch.Tensor:
    """f-DPO with the Jensen-Shannon divergence: DPO with log(2u/(1 + u)) for log u, [batch].

    u = pi/ref.
    """
    chosen, rejected = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    return -F.logsigmoid(lam * ((chosen - F.softplus(chosen)) - (rejected - F.softplus(rejected))))


def population_loss(
    method: str, logits: torch.Tensor, ref: torch.Tensor, weights: torch.Tensor, lam: float
) -> torch.Tensor:
    """The exact loss of policies softmax(logits), [..., answers] -> [...]; `weights` [..., answers,
    answers] as from label_weights.
    """
    logps = logits.log_softmax(-1)
    chosen = logps[..., :, None].expand(weights.shape)
    rejected = logps[..., None, :].expand(weights.shape)
    ref_chosen, ref_rejected = (x.expand(weights.shape).reshape(-1) for x in (ref.log()[:, None], ref.log()[None, :]))
    pairs = (chosen.reshape(-1), rejected.reshape(-1))
    if method == "TYPO":
        losses = typo_loss(*pairs)
    else:
        losses = {"DPO": dpo_loss, "IPO": ipo_loss, "f-DPO": f_dpo_loss}[method](*pairs, ref_chosen, ref_rejected, lam)
    loss = (losses.view(weights.shape) * weights).sum((-2, -1))
    return loss + lam * forward_kl(logits, ref.log().expand(logits.shape)) if method == "TYPO" else loss


def rlhf_objective(logits: torch.Tensor, target: torch.Tensor, ref: torch.Tensor, lam: float) -> torch.Tensor:
    """sum_y pi(y) [-log pi*(y) + lambda log(pi(y)/ref(y))], the objective that DPO's unconstrained
    minimum solves; [..., answers] -> [...].
    """
    logps = logits.log_softmax(-1)
    return (logps.exp() * (-target.log() + lam * (logps - ref.log()))).sum(-1)


def closed_form(
    method: str, target: torch.Tensor, ref: torch.Tensor, lam: float, draw: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-probabilities of the population minimiser of DPO, f-DPO (however pairs are drawn) and IPO
    (pairs drawn uniformly).

    DPO: ref * target^(1/lambda). f-DPO: ref * u with u = e/(2 - e), e = exp(c) target^(1/lambda), c
    such that it sums to 1. IPO: ref * exp(mean over all answers of p(y beats y') / lambda), y
    itself with 1/2.
    """
    if method == "DPO":
        return (ref.log() + target.log() / lam).log_softmax(-1)
    if method == "IPO" and draw is None:
        wins = (target[:, None] / (target[:, None] + target[None, :])).mean(1)
        return (ref.log() + wins / lam).log_softmax(-1)
    if method == "f-DPO":
        scaled = (target.log() - target.log().max()) / lam  # log e up to a constant; log e must stay below log 2
        # Log of the distance log 2 - c, which may be tiny: bisect on its logarithm.
        gap_low, gap_high = tensor(-60.0), tensor(60.0)
        for _ in range(200):
            middle = (gap_low + gap_high) / 2
            log_e = torch.log(tensor(2.0)) - middle.exp() + scaled
            log_u = log_e - torch.log(tensor(2.0)) - torch.log(-torch.expm1(log_e - torch.log(tensor(2.0))))
            gap_low, gap_high = (middle, gap_high) if (ref * log_u.exp()).sum() > 1 else (gap_low, middle)
        return (ref.log() + log_u).log_softmax(-1)
    raise ValueError(f"no closed form for {method} with these pairs")


def minimise(loss, start: torch.Tensor, steps: int = 200) -> torch.Tensor:
    """Logits of a minimum of `loss(logits)`, by Newton's method with halved steps; `start` and the
    result [answers], centred.
    """

    def gradient_at(logits: torch.Tensor) -> torch.Tensor:
        point = logits.clone().requires_grad_()
        return torch.autograd.grad(loss(point), point)[0]

    def improves(logits: torch.Tensor, step: torch.Tensor, gradient: torch.Tensor) -> bool:
        # Near the minimum the loss no longer resolves a step that the gradient does.
        moved = logits + step
        return bool(loss(moved) < loss(logits) or gradient_at(moved).abs().max() < gradient.abs().max())

    logits = (start - start.mean()).detach()
    n = len(logits)
    for _ in range(steps):
        gradient = gradient_at(logits)
        if gradient.abs().max() < 1e-14:
            break
        hessian = torch.autograd.functional.hessian(loss, logits)
        # A constant added to all logits does nothing; this term makes the matrix invertible.
        hessian = hessian + torch.ones(n, n, dtype=logits.dtype) / n
        values, vectors = torch.linalg.eigh(hessian)
        step = -(vectors @ ((vectors.T @ gradient) / values.abs().clamp_min(1e-12)))
        step = step * min(1.0, 5.0 / step.abs().max().item())
        size = 1.0
        while size > 1e-10 and not improves(logits, size * step, gradient):
            size /= 2
        if size <= 1e-10:
            break
        logits = logits + size * step
    return logits - logits.mean()


def minimiser(
    method: str, target: torch.Tensor, ref: torch.Tensor, lam: float, draw: torch.Tensor | None = None
) -> torch.Tensor:
    """Probabilities of the population minimiser, [answers]: the closed form where there is one,
    else Newton's method from the reference.
    """
    if method in {"DPO", "f-DPO"} or (method == "IPO" and draw is None):
        return closed_form(method, target, ref, lam, draw).exp()
    weights = label_weights(target, draw)
    return minimise(lambda logits: population_loss(method, logits, ref, weights, lam), ref.log()).softmax(-1)


def total_variation(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Half the sum of absolute differences, over the last dimension."""
    return (p - q).abs().sum(-1) / 2


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, over the last dimension; terms with p = 0 count 0."""
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)


def in_words(probabilities: torch.Tensor) -> str:
    """Probabilities as a cell of a table."""
    return " ".join(f"{p:.3f}" for p in probabilities)
