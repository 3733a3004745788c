"""A reward as a model of the evaluation harness: the log-likelihood that it answers with is the
reward of context + continuation.

Imported where lm_eval is known to be installed.
"""

from lm_eval.api.model import LM

from common import InputError


class RewardLM(LM):
    """Answers requests for log-likelihoods with rewards, so that the choice with the largest reward
    is the answer (arXiv 2405.20053)."""

    def __init__(self, reward):
        """reward: (contexts, continuations) -> [n], as `rewards.models.load_reward` makes it."""
        super().__init__()
        self.reward = reward

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """(reward, False) of each request, in order; nothing is ever "greedy"."""
        contexts, continuations = zip(*(request.args for request in requests))
        return [(value, False) for value in self.reward(list(contexts), list(continuations)).tolist()]

    def loglikelihood_rolling(self, requests):
        raise InputError("--score reward: a reward judges choices; it gives no likelihood of whole texts.")

    def generate_until(self, requests):
        raise InputError("--score reward: a reward judges choices; it writes no text.")
