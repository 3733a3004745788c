"""From scored documents to chunks of tokens: the tokenizer, ids and scores segment by segment, and
the order of training.

Every token carries the score of its segment. Documents are joined by EOS and cut in chunks of
`context` tokens without padding.
"""

import array
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from common import InputError, models
from common.batches import to_device
from common.processes import print0
from pretraining.corpus import EOS, Document
from toy import world

PAD = "<|pad|>"


def choose_tokenizer(task: str, name: str, vocabulary: int, documents: list[Document]):
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
        ids, _ = encode_document(tokenizer, document["segments"], document["scores"])
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


def encode_document(
    tokenizer, segments: list[str], scores: list[float], marks: list[int | None] | None = None
) -> tuple[list[int], list[float]]:
    """Token ids of one document and the score of each; see `encode_documents`."""
    document: Document = {"segments": segments, "scores": scores}
    return next(encode_documents(tokenizer, [document], [marks] if marks else None))


def encode_documents(
    tokenizer, documents: list[Document], marks: Iterable[list[int | None]] | None = None
) -> Iterator[tuple[list[int], list[float]]]:
    """Token ids and scores of documents, one after the other. The ids joined are the text; nothing
    is put before or behind.

    A segment is tokenised by itself, so all objectives see the same tokens. What looks like a
    special token in a text, "<|good|>" or EOS, stays text: tokens of the vocabulary proper spell
    it.

    Args:
        marks: for each document one token id or None for each segment; it stands before the
            segment's tokens and has the segment's score.
    """
    marks = iter(marks) if marks is not None else None
    for start in range(0, len(documents), 256):
        some = documents[start : start + 256]
        segments = [segment for document in some for segment in document["segments"]]
        ids_of_segments = iter(ids_of(tokenizer, segments))
        for document in some:
            before = next(marks) if marks is not None else [None] * len(document["segments"])
            ids, token_scores = [], []
            for mark, score in zip(before, document["scores"], strict=True):
                of_segment = ([] if mark is None else [mark]) + next(ids_of_segments)
                ids += of_segment
                token_scores += [score] * len(of_segment)
            yield ids, token_scores


def ids_of(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text by itself, special tokens neither added nor read in it.

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


def pack(
    encoded: Iterable[tuple[list[int], list[float]]], eos_id: int, context: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Documents joined by EOS and cut in chunks of `context` tokens, without padding.

    Returns:
        ids [chunks, context] int64; scores [chunks, context] float32, EOS with the score of the
        segment before it; and how many tokens of the incomplete last chunk are left out.
    """
    ids, scores = array.array("i"), array.array("f")
    for document, token_scores in encoded:
        if document:
            ids.extend([*document, eos_id])
            scores.extend([*token_scores, token_scores[-1]])
    chunks, left = divmod(len(ids), context)
    if not chunks:
        return torch.zeros(0, context, dtype=torch.int64), torch.zeros(0, context), left
    whole = chunks * context
    return (
        torch.frombuffer(ids, dtype=torch.int32)[:whole].view(chunks, context).long(),
        torch.frombuffer(scores, dtype=torch.float32)[:whole].view(chunks, context).clone(),
        left,
    )


def make_chunks(
    tokenizer, documents: dict[str, list[Document]], marks: dict, context: int, say=print0
) -> tuple[dict, dict]:
    """({split: ids}, {split: scores}), each [chunks, context]; says how many there are.

    Args:
        marks: for a split the `marks` of `encode_documents`; a split that is missing has none.

    Raises InputError where the training documents fill no chunk.
    """
    ids, scores = {}, {}
    for split in documents:
        encoded = encode_documents(tokenizer, documents[split], marks.get(split))
        ids[split], scores[split], left = pack(encoded, tokenizer.eos_token_id, context)
        name = split.capitalize().replace("_", "-")
        counts = f"{len(ids[split]):,} chunks of {context} tokens"
        say(f"{name}: {counts}; the last {left} tokens fill none and are left out.")
    if not len(ids["train"]):
        raise InputError(f"--context {context}: the training documents are shorter than one chunk.")
    return ids, scores


def batch_of(ids: dict, scores: dict, more: dict, device, split: str, numbers: list[int]) -> dict:
    """The batch of the chunks with these numbers: their columns on the device, and `more`."""
    columns = {"input_ids": ids[split][numbers], "scores": scores[split][numbers]}
    return {name: to_device(column, device) for name, column in columns.items()} | more


def plan_chunks(
    chunks: int, batch_size: int, tokens: float, context: int, seed: int, max_steps: int = -1
) -> list[list[int]]:
    """The order of training: for each optimiser step the numbers of its `batch_size` chunks, as
    many steps as spend the budget of `tokens`, and at most `max_steps` unless that is -1.

    The chunks are shuffled, and shuffled anew each time that all were used. A pure function, so a
    resumed run finds it again.
    """
    if not chunks:
        raise ValueError("no chunks to plan")
    steps = max(1, round(tokens / (batch_size * context)))
    steps = min(steps, max_steps) if max_steps > 0 else steps
    rng, order = random.Random(seed), []
    while len(order) < steps * batch_size:
        epoch = list(range(chunks))
        rng.shuffle(epoch)
        order += epoch[: steps * batch_size - len(order)]
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(steps)]
