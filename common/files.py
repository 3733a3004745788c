"""Files: rows read with the place where each stands, JSON written whole or not at all."""

import contextlib
import csv
import gzip
import io
import json
import math
import os
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

from common import InputError, first_line

ROW_FORMATS = {".jsonl", ".json", ".csv", ".parquet"}
LARGEST = 1 << 31  # bytes of a file once unpacked: a small .gz can hold more than the memory


def format_of(path: Path) -> str:
    """The ending that tells a file's format, .gz left out."""
    return path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix


def is_row_file(source: str) -> bool:
    """Whether a name is meant as a file of rows rather than as a data set of the hub."""
    return Path(source).exists() or Path(source).suffix in ROW_FORMATS | {".gz"}


def read_bytes(path: Path, flag: str = "") -> bytes:
    """The bytes of a file, .gz unpacked; InputError where they cannot be had."""
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{flag}{path}: cannot be read ({error}).") from None
    if len(content) > LARGEST:
        raise InputError(f"{flag}{path}: unpacks to more than {LARGEST >> 30} GiB; expected a smaller file.")
    return content


def read_rows(source: str) -> list[tuple[str, dict]]:
    """Rows of a local file as (where, row), `where` naming file and line for messages.

    Formats by ending: .jsonl, .json (a list of objects, or lines), .csv, .parquet, each also with
    .gz. Values keep the types they have in the file. Raises InputError for a missing, empty or
    unreadable file, naming the line."""
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{source}: no such file.")
    kind = format_of(path)
    if kind not in ROW_FORMATS:
        raise InputError(f"{source}: unknown kind of file; expected .jsonl, .json, .csv or .parquet, also with .gz.")
    content = read_bytes(path)
    if kind == ".parquet":
        rows = read_parquet(source, content)
    else:
        text = decode_text(source, content)
        if kind == ".csv":
            rows = read_csv(source, text)
        elif kind == ".json" and text.lstrip().startswith("["):
            rows = read_json_list(source, text)
        else:
            lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
            rows = [(f"{source}, line {number}", parse_line(source, number, line)) for number, line in lines]
    if not rows:
        raise InputError(f"{source}: the file has no rows.")
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with named fields, found {type(row).__name__}.")
        if is_deep(row):
            raise InputError(f"{where}: lists or objects stand in one another more than 100 deep.")
    return rows


def is_deep(value, limit: int = 100) -> bool:
    """Whether lists and objects stand in one another so deep that json could not write them."""
    inner = value.values() if isinstance(value, dict) else value
    return limit < 0 or any(is_deep(v, limit - 1) for v in inner if isinstance(v, (dict, list)))


def decode_text(source: str, content: bytes) -> str:
    """UTF-8 text; InputError names the line of the first byte that is none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{source}, line {line}: not UTF-8 text (byte {error.start} of the file).") from None


def read_parquet(source: str, content: bytes) -> list[tuple[str, dict]]:
    """Rows of a parquet file; times and dates come as text."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
        for i, field in enumerate(table.schema):
            if pyarrow.types.is_temporal(field.type):
                table = table.set_column(i, field.name, table.column(i).cast(pyarrow.string()))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"{source}: not a readable parquet file ({first_line(error)}).") from None
    return [(f"{source}, row {i}", row) for i, row in enumerate(rows, 1)]


def read_csv(source: str, text: str) -> list[tuple[str, dict]]:
    """Rows of a CSV file with a header."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses answers of 128 KiB
    # strict: a quote that never closes swallows no rows
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(f"{source}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:  # in the line after the last good row
        raise InputError(f"{source}, line {reader.line_num + 1}: not valid CSV ({error}).") from None
    names = reader.fieldnames or []
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{source}, line 1: the header has the field {json.dumps(name)} twice.")
    for where, row in rows:
        if None in row:
            raise InputError(f"{where}: more values than the header has names ({len(row) - 1}).")
    return rows


def unique_fields(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError where a field comes twice: json would silently take the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the field {json.dumps(name)} comes twice in one object")
    return fields


def read_json_list(source: str, text: str) -> list[tuple[str, dict]]:
    """Rows of a JSON file that holds one list."""
    try:
        rows = json.loads(text, object_pairs_hook=unique_fields)
    except json.JSONDecodeError as error:
        raise InputError(f"{source}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    except (ValueError, RecursionError) as error:
        line = line_of_bad_row(text)
        raise InputError(f"{source}{f', line {line}' if line else ''}: not readable JSON ({error}).") from None
    return [(f"{source}, row {i}", row) for i, row in enumerate(rows, 1)]


def line_of_bad_row(text: str) -> int | None:
    """The line where the first unreadable element of a JSON list begins; None: unknown."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_fields)
    place = text.index("[") + 1
    while place < len(text):
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        try:
            _, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return text.count("\n", 0, place) + 1
    return None


def parse_line(source: str, number: int, line: str) -> object:
    """One line of a JSON-lines file; InputError names file and line."""
    try:
        return json.loads(line, object_pairs_hook=unique_fields)
    except json.JSONDecodeError as error:
        message = f"not valid JSON ({error.msg} at character {error.pos + 1})"
    except (ValueError, RecursionError) as error:  # a field twice, lists nested without end
        message = f"not readable JSON ({error})"
    raise InputError(f"{source}, line {number}: {message}.")


def check_hub_id(name: str, kind: str, flag: str = "") -> None:
    """Raises InputError at once where a hub id (kind: model or dataset) is not to be had."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    missing = f"{flag or {'model': '--model', 'dataset': '--data'}[kind]} {name}: no such file or folder"
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except HFValidationError:
        raise InputError(f"{missing}, and not the form of a hub id.") from None
    with contextlib.suppress(Exception):
        if os.environ.get("HF_HUB_OFFLINE") not in {"1", "true", "TRUE", "True", "ON", "YES", "yes"}:
            try:
                huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=5)
                return
            except RepositoryNotFoundError:
                raise InputError(f"{missing} here, and no such {kind} on the hub, or it is private.") from None
    try:
        huggingface_hub.snapshot_download(name, repo_type=kind, local_files_only=True)
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # the cached copy, no retries
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    except Exception:
        raise InputError(f"{missing} here, and the hub cannot be reached for a {kind} of that name.") from None


def read_hub(name: str, lazy: bool = False) -> dict:
    """The rows of `hub_splits`, each with the place where it stands; `lazy`: iterators that read
    from the disk."""
    splits = {}
    for key, (hub_name, split) in hub_splits(name).items():
        where = f"{name.partition(':')[0]}, {hub_name} row"
        rows = ((f"{where} {i}", row) for i, row in enumerate(split, 1))
        splits[key] = rows if lazy else list(rows)
    return splits


def hub_splits(name: str) -> dict:
    """Splits of a data set of the hub, `name` or `name:subset` (a configuration or a data folder),
    as {"train": (its name there, a data set), "test": the same or absent}."""
    import datasets

    name, _, subset = name.partition(":")
    check_hub_id(name, "dataset")
    datasets.disable_progress_bars()
    try:
        try:
            loaded = datasets.load_dataset(name, subset or None)
        except ValueError:
            if not subset:
                raise
            loaded = datasets.load_dataset(name, data_dir=subset)
    except Exception as error:
        raise InputError(f"--data {name}: the data set cannot be loaded ({first_line(error)}).") from None
    if "train" not in loaded:
        raise InputError(f"--data {name}: no train split (found {', '.join(loaded)}).")
    names = {"train": "train", "test": "test" if "test" in loaded else "validation"}
    return {split: (hub_name, loaded[hub_name]) for split, hub_name in names.items() if hub_name in loaded}


def plain(value):
    """A value fit for JSON: nan and infinities become None, times and bytes become text."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, bytes) or type(value).__module__ in {"datetime", "decimal"}:
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, flag: str = "", expected: str = "expected JSON"):
    """The JSON object of a file; InputError where it cannot be read."""
    try:
        if isinstance(value := json.loads(path.read_text(encoding="utf-8")), dict):
            return value
        raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{flag}{path} cannot be read ({first_line(error)}); {expected}.") from None


def write_text(path: Path, text: str) -> None:
    """Writes aside and renames, so that the file is whole at any moment."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_json(path: Path, value) -> None:
    """A JSON file, whole at any moment; nan and infinities become null."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def append_json_line(path: Path, value) -> None:
    """Adds a line to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(value), allow_nan=False) + "\n")


def refuse_read_only(folder: Path) -> None:
    """Raises InputError where nothing can be written in a folder, or in the one that it would be
    made in."""
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--output-dir: nothing can be written in {folder} ({first_line(error)}).") from None


def drop_later_lines(path: Path, step: int) -> None:
    """Takes lines after a step out of metrics.jsonl: a resumed run writes them again."""
    if not path.exists():
        return
    *lines, _ = decode_text(str(path), path.read_bytes()).split("\n")  # a kill may have cut the last one
    kept = []
    for number, line in enumerate(lines, 1):
        metrics = parse_line(str(path), number, line)
        if not isinstance(metrics, dict) or not isinstance(metrics.get("step"), int):
            raise InputError(f"{path}, line {number}: not a line of metrics; remove it to go on.")
        kept += [line + "\n"] * (metrics["step"] <= step)
    write_text(path, "".join(kept))
