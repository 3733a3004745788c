"""A scored corpus to pretrain on: read as a stream, cut in segments and scored once, split.

A document is {"segments": [str], "scores": [float]}: the segments joined are the text, white space
belonging to the segment that follows it; a score is at least 0 and low is good.
docs/pretraining_data.md tells this to users.
"""

import array
import hashlib
import json
import math
import os
import platform
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from common import InputError
from common.processes import gather, is_main_process, print0
from pretraining import scorers, texts
from pretraining.arrays import Column, emptied, kth_smallest, make_once
from pretraining.documents import Documents, Listed, Stored
from toy import documents as toy_documents


def load_corpus(
    task: str,
    source: str,
    text_field: str,
    scorer: str,
    holdout: float,
    seed: int,
    folder: Path | str,
    device="cpu",
    say=print0,
) -> tuple[dict[str, Documents], dict]:
    """The scored documents of a task as ({"train": documents, "held_out": documents}, facts about
    them).

    Args:
        task, source, text_field, scorer, holdout, seed: as --task, --data, ... of a script.
        folder: where texts and scores are kept, under a name made of scorer, versions and texts; a
            scoring that was interrupted goes on where it stopped.
        device: where a toxicity model scores. say: gets the sentences for the user.

    Returns:
        documents of each split; a text that occurs twice is on one side only. The facts: sha256 of
        the texts, scorer with versions, python, files, documents, segments, characters, left_out
        (reason -> count).

    Raises InputError for what cannot be read or scored, before any training.
    """
    of_task = scorers.load_scorer(task, scorer, device=device)
    source = source or {"toy": "toy", "pep8": "stdlib"}.get(task, "")
    if task == "toy" and source != "toy":
        raise InputError(f"--data {source}: the toy has its own corpus; --task pep8, pii or toxicity takes data.")
    if task == "toy":
        toy = ["".join(parts) for parts in toy_documents.documents(seed)]
        store, left_out, count = Listed(scored_document(of_task.segments, text) for text in toy), Counter(), 0
        digest, characters = texts.sha256_of_texts(toy), sum(map(len, toy))
        digests = np.frombuffer(b"".join(map(digest_of, toy)), ">u8").reshape(-1, 4)
    else:
        parts, count = texts.open_source(task, source, text_field)
        # One process reads; the others wait for what it found, and then for the folder.
        found = gather([texts.read(parts, source) if is_main_process() else None])[0]
        digest, characters, left_out = found
        store = stored(parts, digest, of_task, Path(folder), say)
        digests = np.fromfile(store.folder / "digests", ">u8").reshape(-1, 4)
    usable = np.flatnonzero(np.diff(store.ends))
    left_out = left_out + Counter({"no segment": len(store.ends) - 1 - len(usable)})
    facts = {"task": task, "data": source, "sha256": digest, "scorer": of_task.name}
    facts |= {"python": platform.python_version(), "files": count, "documents": len(usable)}
    facts |= {"segments": int(store.ends[-1]), "characters": characters, "left_out": dict(+left_out)}
    describe(facts, say)
    is_held_out = held_out(digests[usable], holdout, seed)
    if is_held_out.all():
        raise InputError(f"--holdout {holdout}: no document is left to train on ({len(usable):,} in all).")
    return {"train": Documents(store, usable[~is_held_out]), "held_out": Documents(store, usable[is_held_out])}, facts


def digest_of(text: str) -> bytes:
    """The SHA-256 of a text."""
    return hashlib.sha256(text.encode()).digest()


def held_out(digests: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which documents are held out, [documents]: all that have one of a `share` of the distinct
    texts, by their digests [documents, 4].
    """
    order = np.lexsort(digests.T[::-1])
    is_first = np.ones(len(order), bool)
    is_first[1:] = (digests[order[1:]] != digests[order[:-1]]).any(1)
    distinct = np.empty(len(order), np.int64)  # the place of each document's text among the distinct ones
    distinct[order] = is_first.cumsum() - 1
    shuffled = array.array("q", range(int(is_first.sum())))
    random.Random(seed).shuffle(shuffled)
    is_held = np.zeros(len(shuffled), bool)
    is_held[shuffled[: round(share * len(shuffled))]] = True
    return is_held[distinct]


def describe(facts: dict, say) -> None:
    """The sentences about a corpus that a run begins with."""
    ordered = sorted(facts["left_out"].items(), key=lambda item: -item[1])
    dropped = "".join(f", {n:,} left out ({reason})" for reason, n in ordered)
    origin = facts["data"]
    if origin == "stdlib":
        origin = f"the standard library of Python {facts['python']}, {facts['files']:,} files"
    counts = f"{facts['documents']:,} documents of {facts['segments']:,} segments, {facts['characters']:,} characters"
    say(f"Corpus: {counts} ({origin}){dropped}.")
    say(f"Scores: {facts['scorer']}; sha256 of the texts {facts['sha256'][:16]}.")


# -- scoring


def scored_text(segments_of, text: str) -> tuple[np.ndarray, np.ndarray]:
    """(lengths of a document's segments in bytes, their scores)."""
    segments, scores = segments_of(text)
    if "".join(segments) != (text if segments else ""):
        raise ValueError("the segments joined are not the text")
    if len(segments) != len(scores):
        raise ValueError(f"{len(segments)} segments and {len(scores)} scores")
    lengths = [len(segment.encode()) for segment in segments]
    return np.array(lengths, np.uint32), np.array(scores, np.float64)


def scored_document(segments_of, text: str) -> dict:
    """A document of the toy."""
    segments, scores = segments_of(text)
    return {"segments": segments, "scores": scores}


def stored(parts, digest: str, scorer: scorers.Scorer, folder: Path, say=print0) -> Stored:
    """The documents of texts, in a folder named after scorer and texts: made the first time, found
    there the next.

    Args:
        parts: a function that begins to read them, as `texts.open_source` returns it. digest: the
            hash of the texts.
    """
    key = hashlib.sha256(json.dumps([scorer.name, digest, 2]).encode()).hexdigest()[:16]
    name = "".join(c if c.isalnum() or c in ".-" else "-" for c in scorer.name.split(",")[0]).lower()

    def make(part: Path) -> None:
        if not (part / "text_ends").exists():  # what comes last of the texts
            write_texts(parts(), digest, emptied(part))
        score_rest(part, scorer, say)

    return Stored(make_once(folder / f"{name}-{key}", make))


def write_texts(parts: Iterable[texts.Part], digest: str, part: Path) -> None:
    """Copies the texts, with their ends and digests; InputError where they are not those of the
    digest.
    """
    ends = Column(np.int64, part / "text_ends.new")

    def copied() -> Iterator[str]:
        size = 0
        for text, _ in parts:
            if text is not None:
                content = text.encode()
                size += len(content)
                file.write(content)
                digests.write(digest_of(text))
                ends.append([size])
                yield text

    with (part / "texts").open("wb") as file, (part / "digests").open("wb") as digests:
        again = texts.sha256_of_texts(copied())
    ends.close()
    if again != digest:
        raise InputError("--data: the texts are not the same when they are read a second time.")
    os.replace(part / "text_ends.new", part / "text_ends")


def score_rest(part: Path, scorer: scorers.Scorer, say=print0) -> None:
    """Scores the texts that have no scores in the folder yet, in parallel where the scorer allows
    it and the work is worth it.
    """
    from tqdm import tqdm

    text_ends = np.fromfile(part / "text_ends", np.int64)
    done, segments = take_up(part)
    if done:
        say(f"Scoring goes on after {done:,} of {len(text_ends):,} documents.")
    size = int(text_ends[-1] - (text_ends[done - 1] if done else 0))
    interval = 0.5 if sys.stderr.isatty() else 10.0
    bar = tqdm(total=size, desc="scoring the corpus (once)", unit="B", unit_scale=True, mininterval=interval)
    columns = [Column(np.uint32, part / "lengths"), Column(np.float64, part / "scores")]
    ends, score = Column(np.int64, part / "segment_ends"), partial(scored_text, scorer.segments)
    with (part / "texts").open("rb") as file, bar:
        rest = texts_between(file, np.concatenate([[0], text_ends])[done:])
        rows = scorers.in_parallel(score, rest, 1 + size // 200_000 if scorer.parallel else 1)
        try:
            for row in rows:
                for column, values in zip(columns, row):
                    column.append(values)
                segments += len(row[0])
                ends.append([segments])  # last: only then the document counts
                bar.update(int(row[0].sum()))
        except KeyboardInterrupt:
            counts = f"{ends.size:,} of {len(text_ends):,} documents"
            raise InputError(
                f"\nScoring stopped after {counts}. They are kept: the same command goes on from there."
            ) from None
    for column in (*columns, ends):
        column.close()
    if ends.size != len(text_ends):
        raise InputError(f"{part}: scores of {ends.size:,} documents, not of {len(text_ends):,}.")


def texts_between(file, ends: np.ndarray) -> Iterator[str]:
    """The texts of an open file that end at these places; the first begins at the first of them."""
    for begin, end in pairwise(ends):
        yield os.pread(file.fileno(), int(end - begin), int(begin)).decode()


def take_up(part: Path) -> tuple[int, int]:
    """(documents, segments) that have their scores; what a kill cut is taken away."""
    sizes = {"lengths": 4, "scores": 8, "segment_ends": 8}
    for name in sizes:
        (part / name).touch()
    held = min((part / name).stat().st_size // sizes[name] for name in ("lengths", "scores"))
    ends = np.fromfile(part / "segment_ends", np.int64)
    done = int(np.searchsorted(ends, held, "right"))
    segments = int(ends[done - 1]) if done else 0
    for name, size in sizes.items():
        os.truncate(part / name, size * (done if name == "segment_ends" else segments))
    return done, segments


# -- thresholds


def threshold_of(documents: Documents, value: float | None, quantile: float | None, of: str = "segments") -> float:
    """The threshold given as a value, or as a quantile of the scores: the smallest score with at
    least that share at or below it.

    Args:
        of: "segments", or "documents" for the mean scores of documents (filtering).

    Raises InputError where both or neither are given, or the quantile is no share.
    """
    if (value is None) == (quantile is None):
        raise InputError("Give --threshold or --threshold-quantile, one of them.")
    if value is not None:
        return value
    if not 0 <= quantile <= 1:
        raise InputError(f"--threshold-quantile {quantile}: expected a number between 0 and 1.")

    def blocks() -> Iterator[np.ndarray]:
        if of == "documents":
            return iter([means])
        return (scores for scores, _ in documents.score_blocks())

    means = np.fromiter(mean_scores(documents), np.float64) if of == "documents" else None
    count = sum(map(len, blocks()))
    return kth_smallest(blocks, max(0, math.ceil(quantile * count) - 1))


def choose_threshold(
    documents: Documents,
    value: float | None,
    quantile: float | None,
    default: tuple[float | None, float | None],
    of: str = "segments",
    say=print0,
) -> tuple[float, float]:
    """(threshold, share of the segments with a score up to it), which is said.

    Args:
        value, quantile, of: as in `threshold_of`.
        default: value and quantile where neither is given.
    """
    value, quantile = default if value is None and quantile is None else (value, quantile)
    threshold = threshold_of(documents, value, quantile, of)
    good = count = 0
    for scores, _ in documents.score_blocks():
        good, count = good + int((scores <= threshold).sum()), count + len(scores)
    good = good / count
    say(f"Threshold {threshold:.6g}: {good:.1%} of the training segments are good, {1 - good:.1%} bad.")
    return threshold, good


def mean_scores(documents: Documents) -> Iterator[float]:
    """The mean score of each document, every segment weighing the same."""
    return (sum(scores) / len(scores) for scores in documents.scores())
