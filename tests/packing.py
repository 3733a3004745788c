"""The plain road from scored documents to chunks, all in memory: what pretraining/chunks.py is
compared with.
"""

import torch

from pretraining.tokens import ids_of


def encode(tokenizer, document: dict, marks: list | None = None) -> tuple[list[int], list[float]]:
    """Token ids of one document, segment by segment, and the score of each."""
    ids, scores = [], []
    marks = marks or [None] * len(document["segments"])
    for segment, score, mark in zip(document["segments"], document["scores"], marks, strict=True):
        of_segment = [] if mark is None else [mark]
        of_segment += ids_of(tokenizer, [segment])[0]
        ids += of_segment
        scores += [score] * len(of_segment)
    return ids, scores


def pack(tokenizer, documents, context: int, marks=None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(ids [chunks, context], scores [chunks, context], tokens left over) of documents joined by
    EOS.
    """
    ids, scores = [], []
    for document, of_document in zip(documents, marks or [None] * len(documents), strict=True):
        own_ids, own_scores = encode(tokenizer, document, of_document)
        if own_ids:
            ids += [*own_ids, tokenizer.eos_token_id]
            scores += [*own_scores, own_scores[-1]]
    chunks, left = divmod(len(ids), context)
    cut = [torch.tensor(values[: chunks * context], dtype=dtype) for values, dtype in ((ids, int), (scores, float))]
    return cut[0].view(chunks, context), cut[1].float().view(chunks, context), left
