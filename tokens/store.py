"""Encoded rows on disk: large files are tokenised once, in parallel, and later read from memory
maps.

What is kept depends on everything that shapes it: the bytes of the files, the tokenizer with its
template, the settings and the code. A folder gets its name when it is complete.
"""

import datetime
import functools
import hashlib
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from common import InputError, first_line
from common.batches import Rows
from common.files import format_of, hub_splits, is_row_file, write_json
from common.processes import gather, print0
from tokens.encode import encode_row, encode_rows

LARGE_BYTES, LARGE_ROWS = 4 << 20, 4000  # below these a pool of processes costs more than it saves
PACKED = 4  # a .gz file is about so many times as large once unpacked
ARRAYS = ("ids", "ends", "texts", "text_ends")
CODE = ("chat", "choices", "tokens", "common", "labelled", "rewards")  # packages that shape encoded rows


class StoredRow(dict):
    """A row whose token ids and text stay on disk until they are asked for; columns that are added
    to it are held in memory."""

    __slots__ = ("_arrays", "_number")

    def __init__(self, arrays: "Arrays", number: int, columns: dict):
        super().__init__(columns)
        self._arrays, self._number = arrays, number

    def __missing__(self, name: str):
        return self._arrays.value(self._number, name)


class Arrays:
    """The memory-mapped arrays of a split: `ids`, all token ids, int32; `ends`, where prompts and
    completions end in them; `texts`, the rows as read, as JSON; `text_ends`."""

    def __init__(self, folder: Path, split: str, parts: int):
        arrays = [np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in ARRAYS]
        self.ids, self.ends, self.texts, self.text_ends = map(np.asarray, arrays)
        self.parts = parts  # of a row: the prompt and its completions

    def value(self, number: int, name: str):
        """A field of a row: "prompt", "completions" or "texts"."""
        if name == "texts":
            begin, end = self.text_ends[number : number + 2].tolist()
            return tuple(json.loads(self.texts[begin:end].tobytes()))
        first = number * self.parts
        ends = self.ends[first : first + self.parts + 1].tolist()
        if name == "prompt":
            return self.ids[ends[0] : ends[1]].tolist()
        if name == "completions":
            return [self.ids[a:b].tolist() for a, b in itertools.pairwise(ends[1:])]
        raise KeyError(name)


def load_encoded(sources: list[str], settings: dict, tokenizer, max_length: int, read, **options):
    """({split: Rows}, facts): rows are encoded here, or, where they are many, once for all runs.

    Args:
        sources: names of row files, or of data sets of the hub; none of rows made in the program.
        settings: what else decides which rows come out.
        read: () -> ({split: (rows, how many were dropped for which reason)}, facts), facts fit for
            JSON.
        options: of `encode_rows`.
    """
    if not is_large(sources):
        return encode_all(tokenizer, max_length, read, options)
    settings = settings | options | {"max_length": max_length}
    folder = cache_folder() / key_of(sources, settings, tokenizer)
    refusal = None
    if not folder.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            make_folder(folder, tokenizer, max_length, read, options)
        except InputError as error:
            refusal = error.code
        except OSError as error:
            print0(f"Token ids are not kept for later runs: {folder.parent} cannot be written ({first_line(error)}).")
    if refusals := [words for words in gather([refusal]) if words]:  # the others waited here
        raise InputError(refusals[0])
    return open_folder(folder) if folder.exists() else encode_all(tokenizer, max_length, read, options)


def encode_all(tokenizer, max_length: int, read, options: dict):
    """The same in this process's memory."""
    texts, facts = read()
    encode = functools.partial(encode_rows, tokenizer, max_length=max_length, **options)
    return {name: encode(rows, dropped=dropped) for name, (rows, dropped) in texts.items()}, facts


def is_large(sources: list[str]) -> bool:
    """Whether the sources have so many rows that keeping their token ids pays."""
    size = rows = 0
    for source in sources:
        if not is_row_file(source):
            rows += sum(len(split) for _, split in hub_splits(source).values())
        elif not (path := Path(source)).is_file():
            return False  # reading it says what is wrong
        else:
            size += path.stat().st_size * (PACKED if path.suffix == ".gz" else 1)
    return size >= LARGE_BYTES or rows >= LARGE_ROWS


def cache_folder() -> Path:
    """Where token ids are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preference-rows"


def key_of(sources: list[str], settings: dict, tokenizer) -> str:
    """The name of a folder: a hash of all that shapes what is in it."""
    import tokenizers
    import transformers

    root = Path(__file__).parent.parent
    code = [path.read_bytes() for name in CODE for path in sorted((root / name).glob("*.py"))]
    template = str(tokenizer.chat_template)
    words = {
        "sources": [source_hash(source) for source in sources],
        "settings": settings,
        "code": hashlib.sha256(b"\0".join(code)).hexdigest(),
        "versions": [transformers.__version__, tokenizers.__version__, sys.version],
        "tokenizer": tokenizer_text(tokenizer),
        "template": template,
        # Some templates write today's date into the system message.
        "date": str(datetime.date.today()) if "strftime_now" in template else None,
    }
    return hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_text(tokenizer) -> list:
    """What decides a tokenizer's ids, the template left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else [sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs]
    return [type(tokenizer).__name__, tokenizer.bos_token_id, tokenizer.eos_token_id, body]


def source_hash(source: str) -> list:
    """What tells the content of a file, or of the splits of a data set of the hub."""
    if not is_row_file(source):
        return [[key, len(split), split._fingerprint] for key, (_, split) in hub_splits(source).items()]
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return [format_of(Path(source)), digest.hexdigest()]


def make_folder(folder: Path, tokenizer, max_length: int, read, options: dict) -> None:
    """Encodes all splits into a new folder: made aside and renamed, so an interruption leaves no
    half of one, and of two runs that make it at once the second finds it made."""
    texts, facts = read()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-", ignore_cleanup_errors=True) as aside:
        aside = Path(aside)
        (aside / "rows").mkdir()
        splits = {}
        for name, (rows, dropped) in texts.items():
            results = encode_in_parallel(tokenizer, rows, max_length, options, aside / name)
            splits[name] = write_split(aside / "rows", name, rows, results, dropped, options)
        parts = 1 + options.get("answers", 2)
        about = {"facts": facts, "splits": splits, "parts": parts, "columns": options.get("columns", ())}
        write_json(aside / "rows" / "about.json", about)
        try:
            os.rename(aside / "rows", folder)
        except OSError:
            if not folder.exists():
                raise


def encode_batch(batch: dict, tokenizer, max_length: int, answers: int = 2, chat: bool = False, columns=()) -> dict:
    """Columns of JSON rows to columns of what `encode_row` says of them, the ids of a row in one
    list."""
    made: dict[str, list] = {"ids": [], "lengths": [], "reason": [], "moved": []}
    for line in batch["texts"]:
        prompt, *rest = json.loads(line)
        row, reason, moved = encode_row(tokenizer, prompt, rest[:answers], max_length, chat)
        parts = [row["prompt"], *row["completions"]] if row else []
        made["ids"].append([i for part in parts for i in part])
        made["lengths"].append([len(part) for part in parts])
        made["reason"].append(reason or "")
        made["moved"].append(moved)
    return made


def encode_in_parallel(tokenizer, texts: list[tuple], max_length: int, options: dict, folder: Path):
    """An arrow table of what `encode_batch` makes of rows; None of no rows."""
    import datasets

    if not texts:
        return None
    folder.mkdir()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are parallel enough
    (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()
    print0(f"Tokenising {len(texts):,} rows.")
    lists = {"ids": datasets.List(datasets.Value("int32")), "lengths": datasets.List(datasets.Value("int32"))}
    features = lists | {"reason": datasets.Value("string"), "moved": datasets.Value("bool")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores, len(texts) // LARGE_ROWS)
    rows = datasets.Dataset.from_dict({"texts": [json.dumps(row, ensure_ascii=False, default=str) for row in texts]})
    return rows.map(
        functools.partial(encode_batch, tokenizer=tokenizer, max_length=max_length, **options),
        batched=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=["texts"],
        features=datasets.Features(features),
        cache_file_name=str(folder / "encoded.arrow"),
        new_fingerprint="encoded",  # the folder is new: nothing of an earlier call can be in it
        desc="tokenising",
    )


def write_split(folder: Path, split: str, texts: list[tuple], table, dropped, options: dict) -> dict:
    """Writes the arrays of a split; returns what `Rows` counts."""
    ids, lengths, kept, moved, dropped = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)], [], 0, dict(dropped)
    number = 0
    for batch in table.with_format("arrow").iter(10_000) if table is not None else ():
        for name, values in (("ids", ids), ("lengths", lengths)):
            values.append(batch[name].combine_chunks().flatten().to_numpy())
        moved += sum(batch["moved"].to_pylist())
        for reason in batch["reason"].to_pylist():
            if reason:
                dropped[reason] = dropped.get(reason, 0) + 1
            else:
                kept.append(number)
            number += 1
    lines = [json.dumps(texts[i], ensure_ascii=False, default=str).encode() for i in kept]
    arrays = {"ids": np.concatenate([*ids, np.zeros(1, np.int32)])}  # one more: a memory map cannot be empty
    arrays["ends"] = np.concatenate(lengths).cumsum()
    arrays["texts"] = np.frombuffer(b"".join(lines) + b"\n", np.uint8)
    arrays["text_ends"] = np.array([0, *map(len, lines)], np.int64).cumsum()
    for place, name in enumerate(options.get("columns", ()), 1 + options.get("answers", 2)):
        arrays[name] = np.array([texts[i][place] for i in kept], np.float64)
    for name, values in arrays.items():
        np.save(folder / f"{split}.{name}.npy", values)
    return {"seen": len(texts) + sum(dropped.values()) - (len(texts) - len(kept)), "dropped": dropped, "moved": moved}


def open_folder(folder: Path):
    """({split: Rows}, facts) of a folder that is complete."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        splits = {}
        for name, counts in about["splits"].items():
            arrays = Arrays(folder, name, about["parts"])
            columns = {column: np.load(folder / f"{name}.{column}.npy").tolist() for column in about["columns"]}
            rows = range(len(arrays.text_ends) - 1)
            stored = (StoredRow(arrays, i, {key: values[i] for key, values in columns.items()}) for i in rows)
            splits[name] = Rows(stored, **counts)
        return splits, about["facts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: kept token ids cannot be read ({first_line(error)}); remove the folder.") from None
