"""Scored documents to pretrain on: read, cut in segments, scored once.

A document is {"segments": [str], "scores": [float]}: the segments joined are the text, white space
belonging to the segment that follows it; a score is at least 0 and low is good.
docs/pretraining_data.md tells this to users.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import sys
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TypedDict

from common import InputError, data, files
from common.processes import print0
from pretraining import scorers
from toy import documents as toy_documents

EOS = "<|endoftext|>"  # of a trained tokenizer, and between the documents of a text file
LONGEST = 1_000_000  # characters of a document; what is longer is no source file and no text that a person wrote
NOT_OURS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}  # left out of stdlib


class Document(TypedDict):
    segments: list[str]
    scores: list[float]


def clean(content: bytes, python: bool) -> tuple[str | None, str | None]:
    """(text, None) of a file's bytes, line breaks as \\n, or (None, reason) for one to leave out.

    Python files may declare their encoding.
    """
    if b"\0" in content:
        return None, "binary"
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(content).readline)[0] if python else "utf-8-sig"
        text = content.decode(encoding)
    except (UnicodeDecodeError, SyntaxError, LookupError):
        return None, "not text in the encoding that it should have"
    return usable_text(text)


def usable_text(text: object) -> tuple[str | None, str | None]:
    """(text, None), or (None, reason) for what is no text, empty, or too long."""
    if not isinstance(text, str):
        return None, "the field is not text"
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        return None, "empty"
    if len(text) > LONGEST:
        return None, f"longer than {LONGEST:,} characters"
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair, which no tokenizer takes
        return None, "not valid Unicode text"
    return text, None


def read_documents(task: str, source: str, text_field: str) -> tuple[list[str], Counter, int]:
    """(texts, how many were left out for which reason, files read) of `--data`, here `source`.

    stdlib: the running interpreter's standard library. A folder: its .py files (pep8) or .txt
    files, one document each, in order of name. A .txt or .py file: a .txt is cut at lines
    "<|endoftext|>" where it has any, else at blank lines. A file of rows or a hub data set: the
    field `text_field` of each row. Raises InputError where nothing usable is left.
    """
    python, path = task == "pep8", Path(source)
    if not source:
        raise InputError(f"--task {task} needs --data: a folder or file of text, or a data set of the hub.")
    if source == "stdlib" and not python:
        raise InputError("--data stdlib is Python source; it goes with --task pep8.")
    count = 1
    if source == "stdlib" or path.is_dir():
        paths = files_of(source, python)
        parts, count = [clean(files.read_bytes(path, "--data "), python) for path in paths], len(paths)
    elif files.format_of(path) in {".txt", ".py"}:
        if not path.is_file():
            raise InputError(f"--data {source}: no such file.")
        content = files.read_bytes(path, "--data ")
        parts = [clean(content, python)] if files.format_of(path) == ".py" else parts_of_text(source, content)
    else:
        parts = fields_of_rows(source, text_field)
    left_out = Counter(reason for _, reason in parts if reason)
    texts = [text for text, _ in parts if text is not None]
    if not texts:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.most_common())
        raise InputError(f"--data {source}: no usable document ({reasons or 'it is empty'}).")
    return texts, left_out, count


def files_of(source: str, python: bool) -> list[Path]:
    """The files of a folder, or of the standard library, that hold documents, in order of name."""
    root = Path(sysconfig.get_paths()["stdlib"]) if source == "stdlib" else Path(source)
    endings = (".py",) if python else (".txt", ".txt.gz")
    paths = sorted(path for path in root.rglob("*") if path.name.endswith(endings) and path.is_file())
    if source == "stdlib":
        paths = [path for path in paths if not NOT_OURS & set(path.relative_to(root).parts[:-1])]
    if not paths:
        raise InputError(f"--data {source}: no file ending in {' or '.join(endings)} in that folder.")
    return paths


def parts_of_text(source: str, content: bytes) -> list[tuple[str | None, str | None]]:
    """(text, None) or (None, reason) of each document in a .txt file."""
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"--data {source}: not UTF-8 text (byte {error.start} of the file).") from None
    if "\0" in text:
        raise InputError(f"--data {source}: a binary file.")
    if f"\n{EOS}\n" in text:
        parts = text.split(f"\n{EOS}\n")
    else:
        parts = [part for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]
    return [usable_text(part.removesuffix(f"\n{EOS}")) for part in parts]


def fields_of_rows(source: str, text_field: str) -> list[tuple[str | None, str | None]]:
    """(text, None) or (None, reason) of each row of a file or of a hub data set."""
    rows = files.read_rows(source) if files.is_row_file(source) else files.read_hub(source)["train"]
    for where, row in rows:
        if text_field not in row:
            names = ", ".join(map(str, row))
            raise InputError(
                f'{where}: no field "{text_field}"; --text-field names the one with the text (found {names}).'
            )
    return [usable_text(row[text_field]) for _, row in rows]


def sha256_of_texts(texts: Iterable[str]) -> str:
    """Hash of texts in order, each with its length before it."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


# -- scoring


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
) -> tuple[dict[str, list[Document]], dict]:
    """The scored documents of a task as ({"train": documents, "held_out": documents}, facts about
    them).

    Args:
        task, source, text_field, scorer, holdout, seed: as --task, --data, ... of a script.
        folder: where scores are kept, under a name made of scorer, versions and texts; a scoring
            that was interrupted goes on where it stopped.
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
        texts, left_out, count = ["".join(parts) for parts in toy_documents.documents(seed)], Counter(), 0
        documents = [dict(zip(("segments", "scores"), of_task.segments(text))) for text in texts]
        digest = sha256_of_texts(texts)
    else:
        texts, left_out, count = read_documents(task, source, text_field)
        digest = sha256_of_texts(texts)
        documents = scored(texts, digest, of_task, Path(folder), say)
        left_out += Counter({"no segment": documents.count(None)})
        documents = [document for document in documents if document is not None]
    facts = {"task": task, "data": source, "sha256": digest, "scorer": of_task.name}
    facts |= {"python": platform.python_version(), "files": count, "documents": len(documents)}
    facts["segments"] = sum(len(document["scores"]) for document in documents)
    facts |= {"characters": sum(map(len, texts)), "left_out": dict(+left_out)}
    describe(facts, say)
    keyed = [(hashlib.sha256("".join(d["segments"]).encode()).hexdigest(), d) for d in documents]
    train, held_out = data.split_by_prompt(keyed, holdout, seed)
    if not train:
        raise InputError(f"--holdout {holdout}: no document is left to train on ({len(documents):,} in all).")
    return {"train": [d for _, d in train], "held_out": [d for _, d in held_out]}, facts


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


def line_of(segments_of, text: str) -> str:
    """A document's line in the file of scores: lengths of its segments in characters, and their
    scores.
    """
    segments, scores = segments_of(text)
    if "".join(segments) != (text if segments else ""):
        raise ValueError("the segments joined are not the text")
    return json.dumps({"lengths": list(map(len, segments)), "scores": scores}) + "\n"


def document_of(text: str, line: str) -> Document | None:
    """A document from its text and its line; None where it has no segment."""
    kept, segments, start = json.loads(line), [], 0
    for length in kept["lengths"]:
        segments.append(text[start : start + length])
        start += length
    return {"segments": segments, "scores": kept["scores"]} if segments else None


def scored(texts: list[str], digest: str, scorer: scorers.Scorer, folder: Path, say=print0) -> list[Document | None]:
    """Documents of texts, scored once: kept in a file of `folder` named after scorer and texts, and
    read from there the next time.

    Lines are added to a .part file in the order of the texts; an interrupted scoring goes on after
    the last whole line. A lock lets one process score while others of the same run, or of another,
    wait for its file.
    """
    key = hashlib.sha256(json.dumps([scorer.name, digest, 1]).encode()).hexdigest()[:16]
    name = "".join(c if c.isalnum() or c in ".-" else "-" for c in scorer.name.split(",")[0]).lower()
    path = folder / f"{name}-{key}.jsonl"
    part = path.with_name(path.name + ".part")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with path.with_name(path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back by the system when the process ends, however it ends
            if not path.exists():
                score_rest(texts, scorer, part, say)
                os.replace(part, path)
        path.with_name(path.name + ".lock").unlink(missing_ok=True)
    with path.open(encoding="utf-8") as file:
        lines = file.readlines()
    if len(lines) != len(texts):
        counts = f"{len(lines):,} documents, not of {len(texts):,}"
        raise InputError(f"{path}: holds the scores of {counts}; remove it to score again.")
    return [document_of(text, line) for text, line in zip(texts, lines)]


def score_rest(texts: list[str], scorer: scorers.Scorer, part: Path, say=print0) -> None:
    """Scores the texts whose lines `part` does not have yet, in parallel where the scorer allows it
    and the work is worth it.
    """
    from tqdm import tqdm

    # What follows the last line break was cut by a kill.
    done = part.read_bytes().split(b"\n")[:-1] if part.exists() else []
    part.write_bytes(b"".join(line + b"\n" for line in done))
    rest = texts[len(done) :]
    if done:
        say(f"Scoring goes on after {len(done):,} of {len(texts):,} documents.")
    size = sum(map(len, rest))
    interval = 0.5 if sys.stderr.isatty() else 10.0
    bar = tqdm(total=size, desc="scoring the corpus (once)", unit="B", unit_scale=True, mininterval=interval)
    with part.open("a", encoding="utf-8") as file, bar:
        score = partial(line_of, scorer.segments)
        lines = scorers.in_parallel(score, rest, 1 + size // 200_000) if scorer.parallel else map(score, rest)
        count = len(done)
        try:
            for text, line in zip(rest, lines):
                file.write(line)
                file.flush()
                bar.update(len(text))
                count += 1
        except KeyboardInterrupt:
            counts = f"{count:,} of {len(texts):,} documents"
            raise InputError(
                f"\nScoring stopped after {counts}. They are kept: the same command goes on from there."
            ) from None


def threshold_of(documents: list[Document], value: float | None, quantile: float | None, of: str = "segments") -> float:
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
    scores = mean_scores(documents) if of == "documents" else [s for d in documents for s in d["scores"]]
    scores = sorted(scores)
    return scores[max(0, math.ceil(quantile * len(scores)) - 1)]


def choose_threshold(
    documents: list[Document],
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
    scores = [score for document in documents for score in document["scores"]]
    good = sum(score <= threshold for score in scores) / len(scores)
    say(f"Threshold {threshold:.6g}: {good:.1%} of the training segments are good, {1 - good:.1%} bad.")
    return threshold, good


def mean_scores(documents: list[Document]) -> list[float]:
    """The mean score of each document, every segment weighing the same."""
    return [sum(d["scores"]) / len(d["scores"]) for d in documents]
