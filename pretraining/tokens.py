"""Tokens of a corpus: each segment tokenised by itself, by several processes, once, into files.

Kept inside the corpus's folder, under a name made of the tokenizer and this code:
ids, uint16 or int32, and scores, float32, of each token; ends, int64: tokens up to the end of each
document; counts, uint32: tokens of each segment.
"""

import hashlib
import json
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from common.processes import is_main_process
from pretraining import scorers
from pretraining.arrays import Column, emptied, make_once, mapped, read_range
from pretraining.documents import Listed, Stored, blocks_of

AT_A_TIME = 1 << 18  # bytes of text that are tokenised together


class Tokens:
    """Tokens of all documents of a source: of a folder that is not loaded, or in memory (None)."""

    def __init__(self, ids, scores, ends, counts, folder: Path | None):
        self.ids, self.scores, self.folder = ids, scores, folder
        self.ends = np.concatenate([np.zeros(1, np.int64), ends])
        self._counts = counts

    @classmethod
    def of_folder(cls, folder: Path) -> "Tokens":
        """What is kept in a folder."""
        (path,) = folder.glob("ids.*")
        ids, scores = mapped(path, path.suffix[1:]), mapped(folder / "scores", np.float32)
        return cls(ids, scores, mapped(folder / "ends", np.int64), (folder / "counts").open("rb"), folder)

    def counts(self, first: int, last: int) -> np.ndarray:
        """How many tokens each of the segments first to last - 1 has."""
        if isinstance(self._counts, np.ndarray):
            return self._counts[first:last]
        return read_range(self._counts, np.uint32, first, last)


def tokens_of(tokenizer, source: Listed | Stored) -> Tokens:
    """The tokens of all documents of a source: kept beside the texts for other runs, or with the
    source where that is in memory.

    The tokens of a text never depend on control tokens, so a tokenizer with them and one without
    share them.
    """
    key = key_of(tokenizer)
    if source.folder is None:
        if key not in source.tokens:
            columns = {name: Column(dtype, None) for name, dtype in types_of(tokenizer).items()}
            write_tokens(tokenizer, source, columns)
            arrays = {name.partition(".")[0]: column.array() for name, column in columns.items()}
            source.tokens[key] = Tokens(**arrays, folder=None)
        return source.tokens[key]

    def make(part: Path) -> None:
        emptied(part)
        columns = {name: Column(dtype, part / name) for name, dtype in types_of(tokenizer).items()}
        write_tokens(tokenizer, source, columns)
        for column in columns.values():
            column.close()

    return Tokens.of_folder(make_once(source.folder / f"tokens-{key}", make))


def types_of(tokenizer) -> dict[str, type]:
    """The columns and their types, two bytes for an id where the vocabulary has room in them."""
    ids = np.uint16 if largest_id(tokenizer) < 1 << 16 else np.int32
    return {f"ids.{np.dtype(ids).name}": ids, "scores": np.float32, "ends": np.int64, "counts": np.uint32}


def bare(tokenizer) -> dict:
    """What a text's tokens depend on: the tokenizer without special tokens, which it reads nowhere,
    and without padding and truncation, which are switched off.
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    added = [token for token in whole["added_tokens"] if not token["special"]]
    return whole | {"added_tokens": added, "padding": None, "truncation": None, "post_processor": None}


def largest_id(tokenizer) -> int:
    """The largest id that a text's token can have."""
    added = [token["id"] for token in bare(tokenizer)["added_tokens"]]
    return max([tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False), *added])


def key_of(tokenizer) -> str:
    """A name for what the tokens of a text depend on: the tokenizer, its package, this code."""
    import tokenizers

    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    facts = json.dumps([bare(tokenizer), tokenizers.__version__, code], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def write_tokens(tokenizer, source: Listed | Stored, columns: dict[str, Column]) -> None:
    """Tokenises all documents into the columns, in order."""
    from tqdm import tqdm

    ids_name = next(name for name in columns if name.startswith("ids."))
    blocks, sizes = blocks_of(source.text_ends, AT_A_TIME), source.text_ends
    total, tokens = int(sizes[-1]), 0
    shown = {"unit": "B", "unit_scale": True, "mininterval": 0.5 if sys.stderr.isatty() else 10.0}
    shown["disable"] = source.folder is None or not is_main_process()
    encode = partial(encode_block, tokenizer, source, columns[ids_name].dtype)
    with tqdm(total=total, desc="tokenising the corpus (once)", **shown) as bar:
        for (first, last), ids, counts in scorers.in_parallel(encode, blocks, 1 + total // 4_000_000, size_of_block):
            before = np.concatenate([[0], counts.cumsum(dtype=np.int64)])  # tokens before each segment
            columns[ids_name].append(ids)
            columns["scores"].append(np.repeat(source.scores(first, last).astype(np.float32), counts))
            columns["ends"].append(tokens + before[source.ends[first + 1 : last + 1] - source.ends[first]])
            columns["counts"].append(counts)
            tokens += len(ids)
            bar.update(int(sizes[last] - sizes[first]))


def size_of_block(block: tuple[int, int]) -> int:
    """Every block is work enough for a process by itself."""
    return AT_A_TIME


def encode_block(tokenizer, source, dtype, block: tuple[int, int]) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """(the block, ids of the tokens, how many each segment has) of documents first to last - 1."""
    segments = [segment for number in range(*block) for segment in source.document(number)["segments"]]
    lines = ids_of(tokenizer, segments)
    counts = np.fromiter(map(len, lines), np.uint32, len(lines))
    return block, np.fromiter(chain.from_iterable(lines), dtype, int(counts.sum())), counts


def ids_of(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text by itself, special tokens neither added nor read in it: "<|good|>" or
    EOS in a text stays text, and tokens of the vocabulary proper spell it.

    The tokenizer's own fast part is three times faster asked directly.
    """
    fast = tokenizer.backend_tokenizer
    fast.no_padding()
    fast.no_truncation()
    before, fast.encode_special_tokens = fast.encode_special_tokens, True
    try:
        return [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        fast.encode_special_tokens = before
