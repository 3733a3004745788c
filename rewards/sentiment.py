"""The sentiment of a text as a reward without a model: VADER, a lexicon and rules."""

import torch

from common import InputError, first_line


def vader_reward(flag: str = "--reward vader"):
    """The reward (prompts, answers) -> [n], float32: VADER's compound score of each answer alone,
    between -1, all bad, and 1, all good; 0 where no word of the lexicon is in it.

    Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
    Media Text". It counts words, so a policy can raise it without making sense.

    Raises InputError where the package is not installed."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        how = "pip install vaderSentiment (see requirements-optional.txt)"
        raise InputError(f"{flag}: needs vaderSentiment ({first_line(error)}); {how}") from None
    analyzer = SentimentIntensityAnalyzer()

    def reward(prompts: list, answers: list[str]) -> torch.Tensor:
        return torch.tensor([analyzer.polarity_scores(answer)["compound"] for answer in answers], dtype=torch.float32)

    return reward
