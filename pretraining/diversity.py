"""How different samples are from each other."""

import math
from collections import Counter


def ngrams(ids: list[int], n: int) -> Counter:
    """How often each run of `n` tokens occurs."""
    return Counter(zip(*(ids[i:] for i in range(n))))


def diversity(samples: list[list[int]], end_ids=()) -> dict:
    """How different samples are, on tokens; `end_ids` (EOS, control tokens) are left out.

    Returns:
        "distinct_1", "distinct_2", "distinct_3": different n-grams among all, over the n-grams of
        all samples together; "token_entropy" of the tokens' frequencies, in nats; "self_bleu", the
        mean BLEU-4 of a sample against all others. None where there is nothing to count.
    """
    lines = [line for ids in samples if (line := [i for i in ids if i not in set(end_ids)])]
    values: dict = {}
    for n in (1, 2, 3):
        counts = Counter()
        for line in lines:
            counts.update(ngrams(line, n))
        values[f"distinct_{n}"] = len(counts) / counts.total() if counts else None
    counts = Counter(token for line in lines for token in line)
    shares = [count / counts.total() for count in counts.values()]
    return values | {
        "token_entropy": -sum(p * math.log(p) for p in shares) if shares else None,
        "self_bleu": self_bleu(lines),
    }


def self_bleu(lines: list[list[int]], longest: int = 4) -> float | None:
    """Self-BLEU (arXiv 1802.01886) on token ids: the mean over samples of BLEU-4 with all other
    samples as references; None for fewer than two.

    BLEU with uniform weights, the brevity penalty of the closest length, and .1 in the place of a
    count of 0 (nltk's first smoothing). The largest and second largest count of each n-gram give
    the largest count among the others, so that the time grows with the number of samples and not
    with its square.
    """
    if len(lines) < 2:
        return None
    logs = [0.0] * len(lines)
    for n in range(1, longest + 1):
        counts = [ngrams(line, n) for line in lines]
        top: dict = {}  # n-gram -> (largest count, whose, second largest)
        for who, own in enumerate(counts):
            for gram, count in own.items():
                best, whose, second = top.get(gram, (0, -1, 0))
                top[gram] = (count, who, best) if count > best else (best, whose, max(second, count))
        for who, own in enumerate(counts):
            hits = sum(min(count, top[gram][2] if top[gram][1] == who else top[gram][0]) for gram, count in own.items())
            if n == 1 and not hits:
                logs[who] = float("-inf")
            logs[who] += math.log((hits or 0.1) / max(1, own.total())) / longest
    lengths, total = Counter(map(len, lines)), 0.0
    for line, log in zip(lines, logs):
        others = [length for length, count in lengths.items() if count > (length == len(line))]
        closest = min(others, key=lambda length: (abs(length - len(line)), length))
        total += math.exp(log + min(0.0, 1 - closest / len(line)))
    return total / len(lines)
