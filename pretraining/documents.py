"""Scored documents, one by one: of a folder of files, which are not loaded, or of a list.

A document is {"segments": [str], "scores": [float]}.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import numpy as np

from pretraining.arrays import mapped, read_range

SEGMENTS_AT_A_TIME = 1 << 18  # whose scores are in memory in a pass over all


class Document(TypedDict):
    segments: list[str]
    scores: list[float]


class Listed:
    """Documents of a list, all in memory; the same methods as `Stored`."""

    folder = None

    def __init__(self, documents: Iterable[Document]):
        self.documents, self.tokens = list(documents), {}  # tokens: by tokenizer
        counts = [len(document["scores"]) for document in self.documents]
        self.ends = np.cumsum([0, *counts])  # [documents + 1]: segments before each document
        self.text_ends = np.cumsum([0, *(sum(map(len, document["segments"])) for document in self.documents)])

    def scores(self, first: int, last: int) -> np.ndarray:
        """Scores of the segments of the documents first to last - 1, float64."""
        return np.array([score for d in self.documents[first:last] for score in d["scores"]], np.float64)

    def document(self, number: int) -> Document:
        return self.documents[number]


class Stored:
    """Documents in a folder that `corpus.stored` made.

    texts: UTF-8, one behind the other. text_ends, int64: bytes up to the end of each. segment_ends,
    int64: segments up to the end of each. lengths, uint32, and scores, float64, of each segment in
    bytes. digests: the SHA-256 of each text.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):  # another process opens the files anew
        return Stored, (self.folder,)

    @cached_property
    def ends(self) -> np.ndarray:
        return np.concatenate([np.zeros(1, np.int64), mapped(self.folder / "segment_ends", np.int64)])

    @cached_property
    def text_ends(self) -> np.ndarray:
        return np.concatenate([np.zeros(1, np.int64), mapped(self.folder / "text_ends", np.int64)])

    @cached_property
    def files(self) -> dict:
        return {name: (self.folder / name).open("rb") for name in ("texts", "lengths", "scores")}

    def scores(self, first: int, last: int) -> np.ndarray:
        """Scores of the segments of the documents first to last - 1, float64."""
        return read_range(self.files["scores"], np.float64, self.ends[first], self.ends[last])

    def document(self, number: int) -> Document:
        first, last = self.ends[number : number + 2]
        lengths = read_range(self.files["lengths"], np.uint32, first, last)
        begin, end = (int(place) for place in self.text_ends[number : number + 2])
        text = os.pread(self.files["texts"].fileno(), end - begin, begin)
        cuts = [0, *np.cumsum(lengths).tolist()]
        return {
            "segments": [text[a:b].decode() for a, b in pairwise(cuts)],
            "scores": self.scores(number, number + 1).tolist(),
        }


class Documents(Sequence):
    """Some documents of a source, in its order; `numbers` says which."""

    def __init__(self, source: Listed | Stored, numbers: np.ndarray):
        self.source, self.numbers = source, np.asarray(numbers, np.int64)

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Documents":
        """All documents of a list."""
        source = Listed(documents)
        return cls(source, np.arange(len(source.documents)))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return Documents(self.source, self.numbers[place])
        return self.source.document(int(self.numbers[place]))

    def subset(self, places) -> "Documents":
        """The documents at these places."""
        return self[slice(0, 0)] if not len(places) else Documents(self.source, self.numbers[np.asarray(places)])

    def score_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(scores of the segments of some documents, segments of each), block by block."""
        ends = self.source.ends
        for first, last in blocks_of(ends, SEGMENTS_AT_A_TIME):
            a, b = np.searchsorted(self.numbers, (first, last))
            if a < b:
                counts, chosen = np.diff(ends[first : last + 1]), np.zeros(last - first, bool)
                chosen[self.numbers[a:b] - first] = True
                yield self.source.scores(first, last)[np.repeat(chosen, counts)], counts[chosen]

    def scores(self) -> Iterator[list[float]]:
        """The scores of each document, without its text."""
        for scores, counts in self.score_blocks():
            cuts = [0, *np.cumsum(counts).tolist()]
            yield from (scores[a:b].tolist() for a, b in pairwise(cuts))


def blocks_of(ends: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """(first, last) numbers of documents that have together no more than `size` of what `ends`
    [documents + 1] counts, or are one document.
    """
    first = 0
    while first < len(ends) - 1:
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + size, "right")) - 1)
        yield first, last
        first = last
