"""Scorers of a corpus to pretrain on: a text in, its segments and their scores out. Low is good, 0
is spotless.

    toy        sentences, the toy's own rule (toy.documents.rudeness), in [0, 1]
    pep8       lines, violations of PEP 8 per character, by pycodestyle
    pii        sentences, pieces of personal information per character, by scrubadub
    toxicity   sentences, probability of toxicity, by a Detoxify model

The three packages, and sentencex, which splits sentences, are needed by their tasks only: pip
install pycodestyle scrubadub sentencex. A segment owns the white space in front of it (a line: the
line break before it), so that the segments joined are the text to the last character.
"""

import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from typing import NamedTuple

from common import InputError
from common.files import first_line
from common.models import context_length, resolve_model, sha256_of_model
from toy import documents


class Scorer(NamedTuple):
    """`segments(text)` -> (segments, scores), `whole(texts)` -> a score for each text, as samples
    are judged.
    """

    name: str  # what made the scores, with versions: part of the key of cached scores
    segments: Callable[[str], tuple[list[str], list[float]]]
    whole: Callable[[list[str]], list[float]]
    parallel: bool  # whether processes of their own score faster


# The published weights of Detoxify on the hub.
DETOXIFY = {"original": "unitary/toxic-bert", "unbiased": "unitary/unbiased-toxic-roberta"}


def load_scorer(task: str, scorer: str = "", samples: bool = False, device="cpu") -> Scorer:
    """The scorer of a task.

    Args:
        scorer: for toxicity `original`, `unbiased` or a folder; empty: `original` for a corpus,
            `unbiased` for samples, as in the paper. The other tasks have one scorer each.
        samples: whether samples of a model are to be judged, not a corpus.
        device: where a toxicity model runs.

    Raises InputError where a package is missing, or where `scorer` names nothing that this task
    has.
    """
    if scorer and task != "toxicity":
        raise InputError(f"--scorer {scorer}: the task {task} has one scorer only; --scorer is for toxicity.")
    if task == "toy":
        return Scorer("toy rudeness", toy_segments, lambda texts: list(map(documents.rudeness, texts)), False)
    if task == "pep8":
        version = f"pycodestyle {needed('pycodestyle', task).__version__}, Python {platform.python_version()}"
        return Scorer(version, pep8_segments, partial(each, pep8), True)
    splitter = f"sentencex {version_of(needed('sentencex', task))}"
    if task == "pii":
        version = version_of(needed("scrubadub", task))
        return Scorer(f"scrubadub {version}, {splitter}", pii_segments, partial(each, pii), True)
    name = scorer or ("unbiased" if samples else "original")
    toxicity, version = detoxify(name, str(device))

    def segments(text: str) -> tuple[list[str], list[float]]:
        parts = split_sentences(text)
        return parts, toxicity(parts)

    return Scorer(f"Detoxify {version}, {splitter}", segments, toxicity, False)


def needed(package: str, task: str):
    """An optional package; InputError that says how to get it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        how = f"pip install {package} (see requirements-optional.txt)"
        raise InputError(f"--task {task} needs a package that is not installed: {how}. ({error})") from None


def version_of(module) -> str:
    """The version of an imported package."""
    import importlib.metadata

    return importlib.metadata.version(module.__name__)


def each(function, texts: list[str]) -> list[float]:
    """`function` of each text, by several processes where that is worth it."""
    return list(in_parallel(function, texts, 1 + sum(map(len, texts)) // 200_000))


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(function, items: Iterable, workers: int, size=len) -> Iterator:
    """`function(item)` for each item, in order, by as many as `workers` processes where there are
    processors for them.

    Items go to them in bundles of some 100,000 of what `size(item)` counts, a few bundles at a
    time: neither all items nor all results are ever in memory. The processes are forked, leave
    Ctrl-C to this process and end with it. Raises InputError where one is killed.
    """
    workers = min(workers, processors())
    if workers <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool, waiting = ProcessPoolExecutor(workers, context, begin_worker, (function, os.getpid())), deque()
    try:
        for bundle in bundles(items, size):
            waiting.append(pool.submit(work, bundle))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise InputError("A process at work on the corpus was killed, perhaps for want of memory.") from None
    finally:
        pool.shutdown(cancel_futures=True)


def bundles(items: Iterable, size) -> Iterator[list]:
    """Items in lists of some 100,000 in size."""
    bundle, total = [], 0
    for item in items:
        bundle.append(item)
        total += size(item)
        if total >= 100_000:
            yield bundle
            bundle, total = [], 0
    if bundle:
        yield bundle


def begin_worker(function, parent: int) -> None:
    """Prepares a process of `in_parallel`."""
    global _function
    _function = function
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def end_with(parent: int) -> None:
    """Ends this process soon after its parent, which may have been killed without a word."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def work(bundle: list) -> list:
    """What a process of `in_parallel` does with a bundle."""
    return list(map(_function, bundle))


# -- segments


def split_lines(text: str) -> list[str]:
    """Lines, each with the line break before it, the last one with that at the end too.

    Cut at \\n alone: "a\\nb\\n" -> ["a", "\\nb\\n"].
    """
    first, *rest = text.removesuffix("\n").split("\n")
    parts = ([first] if first else []) + [f"\n{line}" for line in rest]
    return [*parts[:-1], (parts[-1] if parts else "") + "\n"] if text.endswith("\n") else parts


def split_sentences(text: str) -> list[str]:
    """Sentences by sentencex, white space moved to the front of the sentence that follows; the last
    one keeps the white space at the end.
    """
    import sentencex

    paragraphs = re.split(r"(?<=\n)(?=[^\S\n]*\n)", text)
    return lead_with_space([part for paragraph in paragraphs for part in sentencex.segment("en", paragraph)])


def lead_with_space(parts: list[str]) -> list[str]:
    """Moves white space from the end of each part to the front of the next; a part of nothing else
    disappears into its neighbour.
    """
    moved, front = [], ""
    for part in parts:
        text = part.rstrip()
        if not text.strip():
            front += part
            continue
        moved.append(front + text)
        front = part[len(text) :]
    if moved:
        moved[-1] += front
    return moved


# -- toy


def toy_segments(text: str) -> tuple[list[str], list[float]]:
    """Sentences of the toy's language and the rudeness of each."""
    parts = documents.split_sentences(text)
    return parts, [documents.rudeness(part) for part in parts]


# -- pep8


@lru_cache
def style():
    """pycodestyle's checks with its defaults, whatever a user's own configuration file says."""
    import pycodestyle

    defaults = {"select": (), "ignore": tuple(pycodestyle.DEFAULT_IGNORE.split(","))}
    defaults |= {"max_line_length": pycodestyle.MAX_LINE_LENGTH, "max_doc_length": None}
    defaults |= {"indent_size": 4, "hang_closing": False}
    return pycodestyle.StyleGuide(quiet=2, **defaults).options


def violations(text: str) -> list[int]:
    """The line of each violation in a source text, counted from 0. pycodestyle runs once, over the
    whole text.

    Checks of a statement that spans lines name the line where the fault stands, and so does this.
    W292 (no line break at the end) is left out: a text that is cut always has it. After a line that
    is no Python (E901) pycodestyle sees no more of the text.
    """
    import pycodestyle

    class Lines(pycodestyle.BaseReport):
        def error(self, line_number, offset, text, check):
            code = super().error(line_number, offset, text, check)
            if code and code != "W292":
                numbers.append(line_number - 1)
            return code

    numbers: list[int] = []
    lines = [f"{line}\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    checker = pycodestyle.Checker(lines=lines if lines[-1] else lines[:-1], options=style(), report=Lines(style()))
    try:
        checker.check_all()
    except Exception:  # some checks stumble over what models write; where they stop is one more line that is no Python
        numbers.append(max(checker.line_number - 1, 0))
    return numbers


def pep8(text: str) -> float:
    """Violations of PEP 8 per character of a text."""
    return len(violations(text)) / len(text) if text else 0.0


def pep8_segments(text: str) -> tuple[list[str], list[float]]:
    """Lines and the violations on each, per character of the line with its line break (so that an
    empty line has a length).
    """
    parts = split_lines(text)
    # A text that begins with a line break has no line 0 among its segments.
    first = 0 if text and text[0] != "\n" else 1
    counts = [0] * len(parts)
    for line in violations(text):
        counts[min(max(line - first, 0), len(parts) - 1)] += 1  # an unclosed bracket is reported behind the end
    return parts, [count / max(1, len(part)) for count, part in zip(counts, parts)]


# -- pii


@lru_cache
def scrubber():
    """scrubadub with its default detectors."""
    import scrubadub

    return scrubadub.Scrubber()


def pii(text: str) -> float:
    """Pieces of personal information per character: e-mail and web addresses, telephone numbers,
    credentials and what else scrubadub detects.
    """
    return sum(1 for _ in scrubber().iter_filth(text)) / len(text) if text else 0.0


def pii_segments(text: str) -> tuple[list[str], list[float]]:
    """Sentences and the score of each."""
    parts = split_sentences(text)
    return parts, [pii(part) for part in parts]


# -- toxicity


@lru_cache
def detoxify(name: str, device: str):
    """(texts -> probabilities of toxicity, version) of a Detoxify model: `original`, `unbiased`, a
    hub id, or a folder.

    The weights are those that Detoxify publishes on the hub as sequence classifiers with one
    sigmoid for each label; the label for toxicity is called "toxic" in the first and "toxicity" in
    the second. Raises InputError where the model cannot be had or has no such label.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        folder = resolve_model(DETOXIFY.get(name, name))
    except InputError as error:
        raise InputError(str(error).replace("--model", "--scorer", 1)) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    except Exception as error:
        reason = f"cannot be loaded as a sequence classifier ({first_line(error)})"
        raise InputError(f"--scorer {name}: {reason}.") from None
    labels = {label.lower(): i for i, label in model.config.id2label.items()}
    index = labels.get("toxicity", labels.get("toxic"))
    if index is None:
        raise InputError(f"--scorer {name}: no label toxicity or toxic (found {', '.join(sorted(labels))}).")
    room = context_length(model) - 2 * ("roberta" in model.config.model_type)  # its positions begin at 2
    limit = min(512, tokenizer.model_max_length, room)
    return partial(probabilities, model, tokenizer, index, limit), f"{name} {sha256_of_model(folder)[:12]}"


def probabilities(model, tokenizer, index: int, limit: int, texts: list[str], batch_size: int = 64) -> list[float]:
    """sigma of the logit at `index` for each text, texts cut at `limit` tokens; similar lengths go
    together.
    """
    import torch

    order, values = sorted(range(len(texts)), key=lambda i: len(texts[i])), [0.0] * len(texts)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        cut = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
        inputs = tokenizer([texts[i] for i in chunk], **cut).to(model.device)
        with torch.no_grad():
            of_chunk = model(**inputs).logits[:, index].float().sigmoid().tolist()
        for i, value in zip(chunk, of_chunk):
            values[i] = value
    return values
