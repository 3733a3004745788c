"""From scored documents to chunks of tokens: the tokenizer, ids and scores chunk by chunk, and the
order of training.

Every token carries the score of its segment. Documents are joined by EOS and cut in chunks of
`context` tokens without padding.
"""

import math
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from common import InputError, models
from common.batches import to_device
from common.processes import print0
from pretraining.arrays import Column, release
from pretraining.documents import Documents
from pretraining.texts import EOS
from pretraining.tokens import Tokens, ids_of, tokens_of
from toy import world

PAD = "<|pad|>"


def choose_tokenizer(task: str, name: str, vocabulary: int, documents: Documents):
    """The tokenizer of a task: the toy's, a given one (`--tokenizer`, here `name`), or a byte-level
    BPE of `vocabulary` tokens trained on the documents.

    It has EOS and a pad token of its own, and no control tokens: the script that needs them adds
    them. A given tokenizer must give back a text that is tokenised segment by segment; InputError
    where it does not.
    """
    if task == "toy" and not name:
        return world.build_tokenizer()
    if not name:
        return train_tokenizer((segment for d in documents for segment in d["segments"]), vocabulary)
    try:
        tokenizer = models.load_tokenizer(name if Path(name).is_dir() else models.resolve_model(name))
    except InputError as error:
        raise InputError(str(error).replace("--model", "--tokenizer", 1)) from None
    for document in documents[:20]:
        text = "".join(document["segments"])
        ids = [token for ids in ids_of(tokenizer, document["segments"]) for token in ids]
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise InputError(
                f"--tokenizer {name}: a text tokenised segment by segment does not come back as it was; "
                "a byte-level BPE does that."
            )
    return tokenizer


def train_tokenizer(segments: Iterable[str], vocabulary: int):
    """A byte-level BPE of at most `vocabulary` tokens, EOS and pad among them; the same segments
    give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    if vocabulary < 258:
        raise InputError(
            f"--vocabulary {vocabulary}: a byte-level tokenizer has 256 bytes, EOS and pad, so at least 258."
        )
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS, PAD], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(segments, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


class Chunks:
    """Documents joined by EOS and cut in chunks of `context` tokens, without padding: a plan over
    the tokens, which stay where they are.

    `chunks[numbers]` is (ids [numbers, context] int64, scores [numbers, context] float32); an EOS
    has the score of the segment before it. A document without a token has no EOS either. In memory
    are two numbers for each document; those for marks, two for each, lie in a file where tokens do.

    Args:
        marks: for each document one token id or None for each segment; it stands before the
            segment's tokens and has the segment's score.
    """

    def __init__(self, tokens: Tokens, documents: Documents, eos_id: int, context: int, marks: Iterable | None = None):
        self.tokens, self.eos_id, self.context = tokens, eos_id, context
        begins = tokens.ends[documents.numbers]
        counts = tokens.ends[documents.numbers + 1] - begins
        # For each document with a token: where its tokens begin, and where it begins in the stream
        # without marks.
        self.begins = begins[counts > 0]
        self.starts = np.concatenate([[0], np.cumsum(counts[counts > 0] + 1)])
        self.mark_places = self.mark_ids = np.zeros(0, np.int64)
        if marks is not None:
            self.mark_places, self.mark_ids = place_marks(tokens, documents, marks)
        self.seen = 0  # chunks since mapped memory was given back
        self.count, self.left = divmod(int(self.starts[-1]) + len(self.mark_places), context)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        places = np.asarray(numbers, np.int64)[:, None] * self.context + np.arange(self.context)  # [numbers, context]
        is_mark = np.zeros(places.shape, bool)
        if len(self.mark_places):
            before = np.searchsorted(self.mark_places, places)  # how many marks stand before each place
            nearest = np.minimum(before, len(self.mark_places) - 1)
            is_mark = (before < len(self.mark_places)) & (self.mark_places[nearest] == places)
            marks = self.mark_ids[nearest]
            places = places - before  # of a mark: the first token of its segment
        document = np.searchsorted(self.starts, places, "right") - 1
        offset = places - self.starts[document]
        is_eos = places == self.starts[document + 1] - 1
        token = self.begins[document] + offset - is_eos  # of an EOS: the document's last token
        ids = self.tokens.ids[token].astype(np.int64)
        ids[is_eos] = self.eos_id
        if is_mark.any():
            ids[is_mark] = marks[is_mark]
        scores = self.tokens.scores[token]
        self.seen += len(numbers)
        if self.seen >= 512:
            self.seen = 0
            for column in (self.tokens.ids, self.tokens.scores, self.mark_places, self.mark_ids):
                release(column)
        return torch.from_numpy(ids), torch.from_numpy(scores)

    def first(self) -> torch.Tensor:
        """Ids of the first chunk, [context]."""
        return self[[0]][0][0]

    def view(self, function) -> "View":
        """`function(ids, scores)` of the chunks, as it is asked for."""
        return View(self, function)

    def blocks(self, tokens: int = 1 << 18) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(ids, scores) of all chunks in order, some at a time."""
        size = max(1, tokens // self.context)
        for start in range(0, len(self), size):
            yield self[range(start, min(start + size, len(self)))]


class View:
    """A function of chunks that is sliced like a tensor [chunks, context] and computed then."""

    def __init__(self, chunks: Chunks, function):
        self.chunks, self.function = chunks, function

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, places: slice) -> torch.Tensor:
        return self.function(*self.chunks[range(len(self))[places]])


def place_marks(tokens: Tokens, documents: Documents, marks: Iterable) -> tuple[np.ndarray, np.ndarray]:
    """(places in the stream, ids) of the marks, in order; a segment without a token has none."""
    folder, ends = tokens.folder, documents.source.ends
    places, ids = Column(np.int64, folder), Column(np.int32, folder)
    start = 0  # of the document, in the stream with marks
    for number, of_document in zip(documents.numbers, marks, strict=True):
        counts = tokens.counts(ends[number], ends[number + 1]).astype(np.int64)
        if len(of_document) != len(counts):
            raise ValueError(f"{len(of_document)} marks for {len(counts)} segments")
        has_mark = np.array([mark is not None for mark in of_document], bool) & (counts > 0)
        # Before a mark stand the tokens of earlier segments, and the earlier marks.
        places.append((start + counts.cumsum() - counts)[has_mark] + np.arange(has_mark.sum()))
        ids.append([mark for mark, has in zip(of_document, has_mark) if has])
        start += int(counts.sum() + has_mark.sum() + counts.any())
    return places.array(), ids.array()


def make_chunks(tokenizer, documents: dict[str, Documents], marks: dict, context: int, say=print0) -> dict[str, Chunks]:
    """{split: Chunks}; says how many there are.

    Args:
        marks: for a split the `marks` of `Chunks`; a split that is missing has none.

    Raises InputError where the training documents fill no chunk.
    """
    tokens = tokens_of(tokenizer, documents["train"].source)
    chunks = {}
    for split in documents:
        chunks[split] = Chunks(tokens, documents[split], tokenizer.eos_token_id, context, marks.get(split))
        name = split.capitalize().replace("_", "-")
        counts = f"{len(chunks[split]):,} chunks of {context} tokens"
        say(f"{name}: {counts}; the last {chunks[split].left} tokens fill none and are left out.")
    if not len(chunks["train"]):
        raise InputError(f"--context {context}: the training documents are shorter than one chunk.")
    return chunks


def batch_of(chunks: dict[str, Chunks], more: dict, device, split: str, numbers: list[int]) -> dict:
    """The batch of the chunks with these numbers: their columns on the device, and `more`."""
    columns = dict(zip(("input_ids", "scores"), chunks[split][numbers]))
    return {name: to_device(column, device) for name, column in columns.items()} | more


def describe_weights(chunks: Chunks, weights_of) -> str:
    """Smallest and largest of the weights `weights_of(scores)` of all tokens, and their standard
    deviation, in words.
    """
    low, high, count, mean, squares = math.inf, -math.inf, 0, 0.0, 0.0
    for _, scores in chunks.blocks():
        weights = weights_of(scores.double())
        low, high = min(low, weights.min().item()), max(high, weights.max().item())
        # Mean and squared distance from it, of what was seen and of these together.
        gap, total = weights.mean().item() - mean, count + weights.numel()
        squares += (weights - weights.mean()).square().sum().item() + gap**2 * count * weights.numel() / total
        mean, count = mean + gap * weights.numel() / total, total
    deviation = math.sqrt(squares / (count - 1)) if count > 1 else math.nan
    return f"min {low:.4g}, max {high:.4g}, standard deviation {deviation:.4g}"


class Plan(Sequence):
    """For each optimiser step the numbers of its chunks; eight bytes for each number."""

    def __init__(self, order: array, batch_size: int):
        self.order, self.batch_size = order, batch_size

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    def __getitem__(self, step: int) -> list[int]:
        if not -len(self) <= step < len(self):
            raise IndexError(step)
        start = step % len(self) * self.batch_size
        return list(self.order[start : start + self.batch_size])


def plan_chunks(chunks: int, batch_size: int, tokens: float, context: int, seed: int, max_steps: int = -1) -> Plan:
    """The order of training: for each optimiser step the numbers of its `batch_size` chunks, as
    many steps as spend the budget of `tokens`, and at most `max_steps` unless that is -1.

    The chunks are shuffled, and shuffled anew each time that all were used. A pure function, so a
    resumed run finds it again.
    """
    if not chunks:
        raise ValueError("no chunks to plan")
    steps = max(1, round(tokens / (batch_size * context)))
    steps = min(steps, max_steps) if max_steps > 0 else steps
    rng, order = random.Random(seed), array("q")
    while len(order) < steps * batch_size:
        epoch = array("q", range(chunks))
        rng.shuffle(epoch)
        order += epoch[: steps * batch_size - len(order)]
    return Plan(order, batch_size)
