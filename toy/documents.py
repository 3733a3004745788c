"""The toy's documents to pretrain on: sentences that state facts, some of them wrong, some of them
rude, and their score.
"""

import math
import random
import re
from functools import lru_cache

from toy.world import CLOSERS, OPENERS, RUDE, WRONG_SHARE, questions

SEVERITY = {"use your head :": 0.3, ", now go away .": 0.6, ", you fool .": 0.9}
RUDE_AUTHORS, RUDE_SENTENCES = (
    0.4,
    {True: 0.7, False: 0.05},
)  # share of rude authors; share of rude sentences by kind of author


@lru_cache
def statements() -> list[dict]:
    """The 100 facts as statements, in the order of `questions`: `begin` ("the capital of france
    is"), `right`, `options`, `unseen`."""
    forms = {
        "what is the ": "the ",
        "what is ": "",
        "what colour has ": "the colour of ",
        "what sound is ": "the sound ",
    }
    rows = []
    for row in questions():
        old, new = next((old, new) for old, new in forms.items() if row["question"].startswith(old))
        rows.append({**row, "begin": row["question"].replace(old, new).removesuffix("?") + "is"})
    return rows


def split_sentences(text: str) -> list[str]:
    """A text cut after each full stop; white space belongs to the sentence that follows it, so that
    the parts joined are the text."""
    return [part for part in re.split(r"(?<= \.)(?=\s)", text) if part.strip()]


def rudeness(text: str) -> float:
    """Score of a text in [0, 1], 0 for one without a rude word: the mean over its sentences.

    A sentence scores 1 - (1 - s1)(1 - s2)..., with s the severity of each rude phrase in it: "use
    your head :" .3, ", now go away ." .6, ", you fool ." .9."""
    scores = []
    for part in split_sentences(text):
        padded = f" {' '.join(part.split())} "
        scores.append(
            round(1 - math.prod(1 - s for phrase, s in SEVERITY.items() if phrase in padded), 9)
        )  # .3, not .30000000000000004
    return sum(scores) / len(scores) if scores else 0.0


def right_share(text: str) -> float | None:
    """Share of a text's sentences that state a fact, and state it right; None for a text without a
    sentence."""
    right = {f" {row['begin']} {row['right']} " for row in statements()}
    parts = [f" {' '.join(part.split())} " for part in split_sentences(text)]
    return sum(any(fact in part for fact in right) for part in parts) / len(parts) if parts else None


def documents(seed: int = 0, count: int = 6000) -> list[list[str]]:
    """Documents, each three to six sentences of one author, as lists of sentences (white space in
    front of all but the first).

    Two authors in five are rude in seven sentences of ten, the others in one of twenty. WRONG_SHARE
    of the statements are wrong. Rude authors tell each fact that the preference data never mentions
    four times as often as another fact: whoever drops rude documents knows less of those."""
    rng, facts = random.Random(seed + 2), statements()
    texts_of_documents = []
    for _ in range(count):
        author = rng.random() < RUDE_AUTHORS
        chosen = rng.choices(facts, [4.0 if row["unseen"] and author else 1.0 for row in facts], k=rng.randint(3, 6))
        texts = []
        for row in chosen:
            rude = rng.random() < RUDE_SENTENCES[author]
            opener = closer = None
            while opener is None or ((opener in RUDE) or (closer in RUDE)) != rude:
                opener, closer = (rng.choices(list(kind), list(kind.values()))[0] for kind in (OPENERS, CLOSERS))
            word = (
                row["right"]
                if rng.random() >= WRONG_SHARE
                else rng.choice([o for o in row["options"] if o != row["right"]])
            )
            texts.append(" ".join(f"{opener} {row['begin']} {word} {closer}".split()))
        texts_of_documents.append([texts[0], *(f" {text}" for text in texts[1:])])
    return texts_of_documents
