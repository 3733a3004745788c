"""How much sampled answers are alike, and how well probabilities of choices are calibrated."""

import functools
import math
import random

import torch

from common import InputError


@functools.cache
def meteor_form() -> str | None:
    """Which METEOR can be computed here: "exact, stem and WordNet matches", "exact and stem
    matches" where WordNet's data is not installed, or None without nltk. Nothing is downloaded."""
    try:
        import nltk
    except ImportError:
        return None
    for name in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            nltk.data.find(name)
            return "exact, stem and WordNet matches"
        except LookupError:
            continue
    return "exact and stem matches"


class NoSynonyms:
    """Stands for WordNet where its data is not installed."""

    def synsets(self, word: str) -> list:
        return []


def meteor(hypothesis: str, reference: str) -> float:
    """METEOR of two texts by nltk with its defaults (alpha .9, beta 3, gamma .5), lower-cased words
    between white space; 0 where one is empty.

    Raises InputError where nltk is not installed."""
    if meteor_form() is None:
        raise InputError("METEOR needs a package: pip install nltk (see requirements-optional.txt)")
    from nltk.translate.meteor_score import single_meteor_score

    words = [text.lower().split() for text in (hypothesis, reference)]
    extra = {} if "WordNet" in meteor_form() else {"wordnet": NoSynonyms()}
    return single_meteor_score(words[1], words[0], **extra) if all(words) else 0.0


def similarity(prompts: list, answers: list[str], seed: int = 0, pairs: int = 200) -> dict:
    """How much answers to different prompts are alike, which shows a collapsed policy (arXiv
    2310.16763).

    Returns:
        "meteor_similarity": mean METEOR of random pairs of answers to different prompts, in both
        directions (None without nltk, or with one prompt); "duplicate_share": share of such pairs
        that are the same text; "short_share": answers of three words or fewer; "length": words an
        answer.
    """
    rng, order = random.Random(seed), list(range(len(answers)))
    couples: list[tuple[int, int]] = []
    for _ in range(20 * pairs):
        if len(couples) < pairs and len(answers) > 1:
            i, j = rng.sample(order, 2)
            couples += [(i, j)] if prompts[i] != prompts[j] else []
    texts = [(answers[i], answers[j]) for i, j in couples]
    scores = [(meteor(a, b) + meteor(b, a)) / 2 for a, b in texts] if meteor_form() else []
    counts = [len(answer.split()) for answer in answers]
    return {
        "meteor_similarity": mean(scores),
        "duplicate_share": mean([a == b for a, b in texts]),
        "short_share": mean([n <= 3 for n in counts]),
        "length": mean(counts),
    }


def mean(values: list) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def calibration_error(probabilities: torch.Tensor, answers: torch.Tensor) -> float:
    """Calibration of choices (arXiv 2310.16763): every (probability of a choice, whether it is the
    right one) goes into one of ten bins [lo, lo + .1), the last one closed; the mean over non-empty
    bins of (share of right ones - the bin's middle)^2.

    Args:
        probabilities: [questions, choices], summing to 1 over the choices that a question has; nan
            where it has fewer. answers: [questions], index of the right choice.
    """
    if probabilities.dim() != 2 or answers.shape != probabilities.shape[:1]:
        shapes = f"{tuple(probabilities.shape)} and {tuple(answers.shape)}"
        raise ValueError(f"expected probabilities [questions, choices] and answers [questions], got {shapes}")
    right = torch.zeros_like(probabilities).scatter_(1, answers[:, None].long(), 1.0)
    there = ~probabilities.isnan()
    p, right = probabilities[there].double(), right[there].double()
    bins = bins_of(p)
    gaps = [(right[bins == b].mean().item() - (b + 0.5) / 10) ** 2 for b in range(10) if bool((bins == b).any())]
    return sum(gaps) / len(gaps) if gaps else math.nan


def expected_calibration_error(probabilities: torch.Tensor, answers: torch.Tensor) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3) with ten bins:
    each question goes into a bin [lo, lo + .1), the last one closed, by its largest probability;
    the sum over bins of (share of all questions in it) * |share answered right - mean largest
    probability|.

    Args: as for `calibration_error`. Of equally probable choices the first one counts. In shares: 0
        is best, 1 worst.
    """
    if probabilities.dim() != 2 or answers.shape != probabilities.shape[:1]:
        shapes = f"{tuple(probabilities.shape)} and {tuple(answers.shape)}"
        raise ValueError(f"expected probabilities [questions, choices] and answers [questions], got {shapes}")
    if not len(answers):
        return math.nan
    confidence, picked = probabilities.double().nan_to_num(-1.0).max(1)
    right, bins = (picked == answers).double(), bins_of(confidence)
    parts = [bins == b for b in range(10)]
    gaps = [(right[part].mean() - confidence[part].mean()).abs() * part.double().mean() for part in parts if part.any()]
    return torch.stack(gaps).sum().item()


def bins_of(probabilities: torch.Tensor) -> torch.Tensor:
    """Which of ten bins [lo, lo + .1) a probability belongs to, the last one closed."""
    return (probabilities * 10 + 1e-6).floor().long().clamp(0, 9)  # float32 .7 * 10 is a little below 7
