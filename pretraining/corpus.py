"""Scored documents to pretrain on: read, score, tokenise, cut in chunks, and models that start from nothing.

A document is {"segments": [str], "scores": [float]}: the segments joined are the text, white space belonging to the segment that follows it;
a score is at least 0 and low is good. Every token carries the score of its segment. Documents are joined by EOS and cut in chunks of
`context` tokens without padding. (docs/pretraining_data.md tells this to users.)
"""

import array
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
import tempfile
import tokenize
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch

from common import data, scorers
from common.data import InputError

EOS, PAD = "<|endoftext|>", "<|pad|>"
LONGEST = 1_000_000  # characters of a document; what is longer is no source file and no text that a person wrote in one piece
NOT_OURS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}  # folders of the standard library that are left out


class Document(TypedDict):
    segments: list[str]
    scores: list[float]


# ---------------------------------------------------------------------------------------------------------------- reading


def clean(content: bytes, python: bool) -> tuple[str | None, str | None]:
    """(text, None) of a file's bytes, line breaks as \\n, or (None, reason) for one to leave out. Python files may declare their encoding."""
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


def content_of(path: Path) -> bytes:
    """The bytes of a file, .gz unpacked."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"--data {path}: cannot be read ({error}).") from None


def read_documents(args) -> tuple[list[str], Counter, int]:
    """(texts, how many were left out for which reason, files read) of `--data`.

    stdlib: the running interpreter's standard library. A folder: its .py files (pep8) or .txt files, one document each, in order of name. A
    .txt or .py file: a .txt is cut at lines "<|endoftext|>" where it has any, else at blank lines. A file of rows or a hub data set: the field
    `--text-field` of each row. Raises InputError where nothing usable is left.
    """
    source, path, python = args.data or ("stdlib" if args.task == "pep8" else ""), Path(args.data), args.task == "pep8"
    suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if not source:
        raise InputError(f"--task {args.task} needs --data: a folder or file of text, or a data set of the hub.")
    if source == "stdlib" and not python:
        raise InputError("--data stdlib is Python source; it goes with --task pep8.")
    found: list[tuple[str | None, str | None]] = []
    files = 1
    if source == "stdlib" or path.is_dir():
        root = Path(sysconfig.get_paths()["stdlib"]) if source == "stdlib" else path
        endings = (".py",) if python else (".txt", ".txt.gz")
        paths = sorted(p for p in root.rglob("*") if p.name.endswith(endings) and p.is_file())
        if source == "stdlib":
            paths = [p for p in paths if not NOT_OURS & set(p.relative_to(root).parts[:-1])]
        if not paths:
            raise InputError(f"--data {source}: no file ending in {' or '.join(endings)} in that folder.")
        found, files = [clean(content_of(p), python) for p in paths], len(paths)
    elif suffix in {".txt", ".py"}:
        if not path.is_file():
            raise InputError(f"--data {source}: no such file.")
        text, reason = (None, None) if suffix == ".txt" else clean(content_of(path), python)
        if suffix == ".txt":
            try:
                text = content_of(path).decode("utf-8-sig").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise InputError(f"--data {source}: not UTF-8 text (byte {error.start} of the file).") from None
            if "\0" in text:
                raise InputError(f"--data {source}: a binary file.")
            parts = text.split(f"\n{EOS}\n") if f"\n{EOS}\n" in text else [p for p in re.split(r"\n[^\S\n]*\n", text) if p.strip()]
            found = [usable_text(part.removesuffix(f"\n{EOS}")) for part in parts]
        else:
            found = [(text, reason)]
    else:
        is_file = path.exists() or suffix in {".jsonl", ".json", ".csv", ".parquet"}
        rows = data.read_rows(source) if is_file else data.read_hub(source)["train"]
        for where, row in rows:
            if args.text_field not in row:
                raise InputError(f'{where}: no field "{args.text_field}"; --text-field names the one with the text (found {", ".join(map(str, row))}).')
        found = [usable_text(row[args.text_field]) for _, row in rows]
    left_out = Counter(reason for _, reason in found if reason)
    texts = [text for text, _ in found if text is not None]
    if not texts:
        raise InputError(f"--data {source}: no usable document ({', '.join(f'{n:,} {reason}' for reason, n in left_out.most_common()) or 'it is empty'}).")
    return texts, left_out, files


def sha256_of_texts(texts: Iterable[str]) -> str:
    """Hash of texts in order, each with its length before it."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- scoring


def load(args, say=print) -> tuple[dict[str, list[Document]], dict]:
    """The scored documents of a task as ({"train": documents, "held_out": documents}, facts about them).

    Args:
        args: has task, data, text_field, holdout, seed, output_dir, and scorer where the script has it. The scores are kept in
            `<output_dir>/scores/`, under a name made of scorer, versions and texts; a scoring that was interrupted goes on where it stopped.
        say: gets the sentences for the user.

    Returns:
        documents of each split; a text that occurs twice is on one side only. The facts: sha256 of the texts, scorer with versions, python,
        files, documents, segments, characters, left_out (reason -> count).

    Raises InputError for what cannot be read or scored, before any training.
    """
    scorer = scorers.load(args.task, getattr(args, "scorer", ""), device=device_of())
    if args.task == "toy":
        if args.data not in {"", "toy"}:
            raise InputError(f"--data {args.data}: the toy has its own corpus; --task pep8, pii or toxicity takes data.")
        from common import toy

        texts, left_out, files = ["".join(parts) for parts in toy.corpus(args.seed)], Counter(), 0
        documents = [dict(zip(("segments", "scores"), scorer.segments(text))) for text in texts]
        digest = sha256_of_texts(texts)
    else:
        texts, left_out, files = read_documents(args)
        digest = sha256_of_texts(texts)
        documents = scored(texts, digest, scorer, Path(args.output_dir) / "scores", say)
        left_out += Counter({"no segment": documents.count(None)})
        documents = [document for document in documents if document is not None]
    facts = {
        "task": args.task,
        "data": args.data or {"toy": "toy", "pep8": "stdlib"}[args.task],
        "sha256": digest,
        "scorer": scorer.name,
        "python": platform.python_version(),
        "files": files,
    }
    facts |= {"documents": len(documents), "segments": sum(len(d["scores"]) for d in documents), "characters": sum(map(len, texts))}
    facts["left_out"] = dict(+left_out)
    dropped = "".join(f", {n:,} left out ({reason})" for reason, n in left_out.most_common() if n)
    origin = f"the standard library of Python {platform.python_version()}, {files:,} files" if facts["data"] == "stdlib" else facts["data"]
    say(f"Corpus: {len(documents):,} documents of {facts['segments']:,} segments, {facts['characters']:,} characters ({origin}){dropped}.")
    say(f"Scores: {scorer.name}; sha256 of the texts {digest[:16]}.")
    keyed = [(hashlib.sha256("".join(d["segments"]).encode()).hexdigest(), d) for d in documents]
    train, held_out = data.split_by_prompt(keyed, args.holdout, args.seed)
    if not train:
        raise InputError(f"--holdout {args.holdout}: no document is left to train on ({len(documents):,} in all).")
    return {"train": [d for _, d in train], "held_out": [d for _, d in held_out]}, facts


def device_of() -> str:
    """Where a toxicity model scores the corpus."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def line_of(segments_of, text: str) -> str:
    """A document's line in the file of scores: lengths of its segments in characters, and their scores."""
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


def scored(texts: list[str], digest: str, scorer: scorers.Scorer, folder: Path, say=print) -> list[Document | None]:
    """Documents of texts, scored once: kept in a file of `folder` named after scorer and texts, and read from there the next time.

    Lines are added to a .part file in the order of the texts; an interrupted scoring goes on after the last whole line. A lock lets one
    process score while others of the same run, or of another, wait for its file.
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
        raise InputError(f"{path}: holds the scores of {len(lines):,} documents, not of {len(texts):,}; remove it to score again.")
    return [document_of(text, line) for text, line in zip(texts, lines)]


def score_rest(texts: list[str], scorer: scorers.Scorer, part: Path, say=print) -> None:
    """Scores the texts whose lines `part` does not have yet, in parallel where the scorer allows it and the work is worth it."""
    from tqdm import tqdm

    done = part.read_bytes().split(b"\n")[:-1] if part.exists() else []  # what follows the last line break was cut by a kill
    part.write_bytes(b"".join(line + b"\n" for line in done))
    rest = texts[len(done) :]
    if done:
        say(f"Scoring goes on after {len(done):,} of {len(texts):,} documents.")
    size = sum(map(len, rest))
    bar = tqdm(total=size, desc="scoring the corpus (once)", unit="B", unit_scale=True, mininterval=0.5 if sys.stderr.isatty() else 10.0)
    with part.open("a", encoding="utf-8") as file, bar:
        lines = (
            scorers.in_parallel(partial(line_of, scorer.segments), rest, 1 + size // 200_000)
            if scorer.parallel
            else map(partial(line_of, scorer.segments), rest)
        )
        count = len(done)
        try:
            for text, line in zip(rest, lines):
                file.write(line)
                file.flush()
                bar.update(len(text))
                count += 1
        except KeyboardInterrupt:
            raise InputError(f"\nScoring stopped after {count:,} of {len(texts):,} documents. They are kept: the same command goes on from there.") from None


def threshold_of(documents: list[Document], value: float | None, quantile: float | None, of: str = "segments") -> float:
    """The threshold given as a value, or as a quantile of the scores: the smallest score with at least that share at or below it.

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
    scores = sorted(mean_scores(documents) if of == "documents" else (s for d in documents for s in d["scores"]))
    return scores[max(0, math.ceil(quantile * len(scores)) - 1)]


def mean_scores(documents: list[Document]) -> list[float]:
    """The mean score of each document, every segment weighing the same."""
    return [sum(d["scores"]) / len(d["scores"]) for d in documents]


# --------------------------------------------------------------------------------------------------------------- tokens


def load_tokenizer(args, documents: list[Document], say=print):
    """The tokenizer of a task: the toy's, a given one (`--tokenizer`), or a byte-level BPE of `--vocabulary` tokens trained on the documents.

    It has EOS and a pad token of its own, and no control tokens: the script that needs them adds them. A given tokenizer must give back a text
    that is tokenised segment by segment; InputError where it does not.
    """
    if args.task == "toy" and not args.tokenizer:
        from common import toy

        return toy.build_tokenizer()
    if not args.tokenizer:
        return train_tokenizer((segment for d in documents for segment in d["segments"]), args.vocabulary)
    from common import runtime

    try:
        tokenizer = runtime.load_tokenizer(args.tokenizer if Path(args.tokenizer).is_dir() else runtime.resolve_model(args.tokenizer))
    except InputError as error:
        raise InputError(str(error).replace("--model", "--tokenizer", 1)) from None
    for document in documents[:20]:
        text, (ids, _) = "".join(document["segments"]), encode(tokenizer, document["segments"], document["scores"])
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise InputError(f"--tokenizer {args.tokenizer}: a text tokenised segment by segment does not come back as it was; a byte-level BPE does that.")
    return tokenizer


def train_tokenizer(segments: Iterable[str], vocabulary: int):
    """A byte-level BPE of at most `vocabulary` tokens, EOS and pad among them; the same segments give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < 258:
        raise InputError(f"--vocabulary {vocabulary}: a byte-level tokenizer has 256 bytes, EOS and pad, so at least 258.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[EOS, PAD], initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(segments, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False)


def encode(tokenizer, segments: list[str], scores: list[float], marks: list[int | None] | None = None) -> tuple[list[int], list[float]]:
    """Token ids of one document and the score of each, segment by segment; see `encode_documents`."""
    return next(encode_documents(tokenizer, [{"segments": segments, "scores": scores}], [marks] if marks else None))


def encode_documents(tokenizer, documents: list[Document], marks: Iterable[list[int | None]] | None = None) -> Iterator[tuple[list[int], list[float]]]:
    """Token ids and scores of documents, one after the other. The ids joined are the text; nothing is put before or behind.

    A segment is tokenised by itself, so all objectives see the same tokens. What looks like a special token in a text, "<|good|>" or EOS, stays
    text: tokens of the vocabulary proper spell it.

    Args:
        marks: for each document one token id or None for each segment; it stands before the segment's tokens and has the segment's score.
    """
    marks = iter(marks) if marks is not None else None
    for start in range(0, len(documents), 256):
        some = documents[start : start + 256]
        segments = [segment for document in some for segment in document["segments"]]
        found = iter(ids_of(tokenizer, segments))
        for document in some:
            before = next(marks) if marks is not None else [None] * len(document["segments"])
            ids, token_scores = [], []
            for mark, score in zip(before, document["scores"], strict=True):
                of_segment = ([] if mark is None else [mark]) + next(found)
                ids += of_segment
                token_scores += [score] * len(of_segment)
            yield ids, token_scores


def ids_of(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text by itself, special tokens neither added nor read in it. The tokenizer's own fast part is three times faster asked directly."""
    fast = tokenizer.backend_tokenizer
    fast.no_padding()
    fast.no_truncation()
    before, fast.encode_special_tokens = fast.encode_special_tokens, True
    try:
        return [found.ids for found in fast.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        fast.encode_special_tokens = before


def pack(encoded: Iterable[tuple[list[int], list[float]]], eos_id: int, context: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Documents joined by EOS and cut in chunks of `context` tokens, without padding.

    Returns:
        ids [chunks, context] int64; scores [chunks, context] float32, EOS with the score of the segment before it; and how many tokens of the
        incomplete last chunk are left out.
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


def plan(chunks: int, batch_size: int, tokens: float, context: int, seed: int) -> list[list[int]]:
    """The order of training: for each optimiser step the indices of its `batch_size` chunks, as many steps as spend the budget of `tokens`.

    The chunks are shuffled, and shuffled anew each time that all were used. A pure function, so a resumed run finds it again.
    """
    if not chunks:
        raise ValueError("no chunks to plan")
    steps, rng, order = max(1, round(tokens / (batch_size * context))), random.Random(seed), []
    while len(order) < steps * batch_size:
        epoch = list(range(chunks))
        rng.shuffle(epoch)
        order += epoch[: steps * batch_size - len(order)]
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(steps)]


# --------------------------------------------------------------------------------------------------------------- models

SIZES = {"tiny": (2, 2, 64), "mini": (4, 4, 128), "small": (4, 4, 256), "gpt2-small": (12, 12, 768)}  # layers, heads, hidden size


def new_model(name: str, tokenizer, context: int, seed: int):
    """A model with random weights and no dropout: `tiny`, `mini`, `small` or `gpt2-small` (GPT-2 type), or what the config.json of a folder describes.

    Its vocabulary is the tokenizer's; its context at least `context`, of the named sizes exactly that. The same seed gives the same weights and
    leaves the caller's random numbers as they were.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if name in SIZES:
        layers, heads, width = SIZES[name]
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=context, n_layer=layers, n_head=heads, n_embd=width, **no_dropout, **ends)
    else:
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"--model {name}: expected {', '.join(SIZES)}, or a folder with a config.json.")
        try:
            config = AutoConfig.from_pretrained(name, vocab_size=len(tokenizer), **ends)
        except Exception as error:
            raise InputError(f"--model {name}: its config.json cannot be used ({str(error).splitlines()[0]}).") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:
            raise InputError(f"--model {name}: no causal language model can be made of its config.json ({str(error).splitlines()[0]}).") from None
    from common import runtime

    if runtime.context_length(model) < context:
        raise InputError(f"--context {context}: the model has {runtime.context_length(model)} positions.")
    runtime.fuse_gelu(model)  # as in a model that is loaded: a resumed run must compute the same to the last bit
    return model


def mle_model(run, tokenizer, documents: list[Document]) -> Path:
    """Folder of a plain MLE model of the run's task, data, size, budget and schedule, trained on first use and kept in the user's cache.

    `documents` are the training documents, without control tokens; `tokenizer` is as `load_tokenizer` gave it. Training is the library's own
    next-token loss, so that a table can be shown without a second script's run; an MLE model to study is made by its script.
    """
    from tqdm import tqdm

    from common import runtime

    like = run.args  # the run to compare with
    ids, _, _ = pack(encode_documents(tokenizer, documents), tokenizer.eos_token_id, like.context)
    if not len(ids):
        raise InputError(f"--context {like.context}: the documents are shorter than one chunk.")
    schedule = [like.model, like.context, like.tokens, like.batch_size, like.max_steps, like.lr, like.warmup, like.weight_decay, like.max_grad_norm, like.seed]
    schedule.append(like.micro_batch_size)
    version = [torch.__version__, hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), str(run.dtype), run.device.type]
    config = Path(like.model) / "config.json"
    version.append(config.read_text() if config.is_file() else "")
    key = hashlib.sha256(json.dumps([schedule, version]).encode() + ids.numpy().tobytes()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preference-pretrain"
    folder = root / f"mle-{like.task}-{key}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process trains, the others of this run or of another one wait for its folder
        if folder.exists():
            return folder
        model = new_model(like.model, tokenizer, like.context, like.seed).to(run.device)
        runtime.disable_dropout(model)
        model.train()
        matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=like.lr, weight_decay=like.weight_decay, fused=True)
        steps = plan(len(ids), like.batch_size, like.tokens, like.context, like.seed)
        steps = steps[: like.max_steps] if like.max_steps > 0 else steps
        for step, rows in enumerate(tqdm(steps, desc="training an MLE model to compare with (once)", unit="step", mininterval=1.0, disable=not run.main)):
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate(step, len(steps))
            for micro in torch.tensor(rows).split(like.micro_batch_size):
                chunk = ids[micro].to(run.device)
                with run.autocast():
                    loss = model(input_ids=chunk, labels=chunk, use_cache=False).loss
                (loss * len(micro) / len(rows)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), like.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        aside = Path(tempfile.mkdtemp(dir=root))
        try:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            aside.chmod(0o755)
            os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder
