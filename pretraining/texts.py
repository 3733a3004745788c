"""Texts of a corpus as a stream: files, folders, rows and hub data sets, one document at a time.

Nothing here keeps more than one document, or one row group of a parquet file, in memory; .json and
.csv files alone are read whole. What cannot be used comes as a reason in place of a text.
"""

import gzip
import hashlib
import io
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from common import InputError, files
from common.fields import names_of

EOS = "<|endoftext|>"  # of a trained tokenizer, and between the documents of a text file
LONGEST = 1_000_000  # characters of a document; what is longer is no source file and no text that a person wrote
LONGEST_LINE = 1 << 28  # bytes: a small .gz can hold more than the memory
NOT_OURS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}  # left out of stdlib

Part = tuple[str | None, str | None]  # (text, None), or (None, reason) for what is left out


def clean(content: bytes, python: bool) -> Part:
    """The text of a file's bytes, line breaks as \\n.

    Python files may declare their encoding.
    """
    if b"\0" in content:
        return None, "binary"
    if len(content) > 4 * LONGEST:  # no encoding takes more bytes for a character
        return usable_text("x" * (LONGEST + 1))
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(content).readline)[0] if python else "utf-8-sig"
        text = content.decode(encoding)
    except (UnicodeDecodeError, SyntaxError, LookupError):
        return None, "not text in the encoding that it should have"
    return usable_text(text)


def usable_text(text: object) -> Part:
    """The text, or the reason why it is none: no text, empty, too long."""
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


def open_source(task: str, source: str, text_field: str) -> tuple[Callable[[], Iterator[Part]], int]:
    """(a function that begins to read `--data`, here `source`; how many files it reads).

    stdlib: the running interpreter's standard library. A folder: its .py files (pep8) or .txt
    files, one document each, in order of name. A .txt or .py file: a .txt is cut at lines
    "<|endoftext|>" where it has any, else at blank lines. A file of rows or a hub data set: the
    field `text_field` of each row.
    """
    python, path = task == "pep8", Path(source)
    if not source:
        raise InputError(f"--task {task} needs --data: a folder or file of text, or a data set of the hub.")
    if source == "stdlib" and not python:
        raise InputError("--data stdlib is Python source; it goes with --task pep8.")
    if source == "stdlib" or path.is_dir():
        paths = files_of(source, python)
        return lambda: (clean(head_of(path), python) for path in paths), len(paths)
    if files.format_of(path) in {".txt", ".py"}:
        if not path.is_file():
            raise InputError(f"--data {source}: no such file.")
        if files.format_of(path) == ".py":
            return lambda: iter([clean(head_of(path), python)]), 1
        marked = [number for number, line in text_lines(path, "--data ") if line == f"{EOS}\n" and number > 1]
        return partial(parts_of_text, path, bool(marked)), 1
    return partial(fields_of_rows, source, text_field), 1


def read(parts: Callable[[], Iterator[Part]], source: str) -> tuple[str, int, Counter]:
    """(sha256 of the texts, how many characters they have, how many were left out for which
    reason). Raises InputError where no usable text is left.
    """
    left_out, counts = Counter(), Counter()

    def texts() -> Iterator[str]:
        for text, reason in parts():
            if text is None:
                left_out[reason] += 1
            else:
                counts.update(texts=1, characters=len(text))
                yield text

    digest = sha256_of_texts(texts())
    if not counts["texts"]:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.most_common())
        raise InputError(f"--data {source}: no usable document ({reasons or 'it is empty'}).")
    return digest, counts["characters"], left_out


def sha256_of_texts(texts: Iterable[str]) -> str:
    """Hash of texts in order, each with its length before it."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


# -- files of text


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


def opened(path: Path):
    """A file of bytes, .gz unpacked."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def head_of(path: Path) -> bytes:
    """The bytes of a file, no more of them than tell that it is too long."""
    try:
        with opened(path) as file:
            return file.read(4 * LONGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"--data {path}: cannot be read ({error}).") from None


def text_lines(path: Path, flag: str = "") -> Iterator[tuple[int, str]]:
    """(number, line with its line break) of a UTF-8 file, read line by line."""
    offset, number = 0, 0
    try:
        with opened(path) as file:
            while content := file.readline(LONGEST_LINE):
                number += 1
                if len(content) == LONGEST_LINE:
                    raise InputError(f"{flag}{path}, line {number}: longer than {LONGEST_LINE >> 20} MiB.")
                yield number, content.decode("utf-8-sig" if number == 1 else "utf-8")
                offset += len(content)
    except UnicodeDecodeError as error:
        place = f"byte {offset + error.start} of the file"
        raise InputError(f"{flag}{path}, line {number}: not UTF-8 text ({place}).") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{flag}{path}: cannot be read ({error}).") from None


def parts_of_text(path: Path, marked: bool) -> Iterator[Part]:
    """The documents of a .txt file, cut at lines "<|endoftext|>" (`marked`) or at blank lines.

    The line breaks before and after such a line go with it, so that one behind another is no cut
    but the first line of a document.
    """
    part, size, lines = [], 0, 0

    def finished(text: str) -> list[Part]:
        return [usable_text(text.removesuffix(f"\n{EOS}"))] if marked or text.strip() else []

    for _, line in text_lines(path, "--data "):
        if "\0" in line:
            raise InputError(f"--data {path}: a binary file.")
        line = line.removesuffix("\r\n") + "\n" if line.endswith("\r\n") else line
        if lines and (line == f"{EOS}\n" if marked else line.endswith("\n") and not line.strip()):
            yield from finished("".join(part).removesuffix("\n"))
            part, size, lines = [], 0, 0
            continue
        if size <= 2 * LONGEST:  # it is too long already: the rest need not be kept
            part.append(line)
        size, lines = size + len(line), lines + 1
    yield from finished("".join(part))


# -- rows


def fields_of_rows(source: str, text_field: str) -> Iterator[Part]:
    """The field of each row of a file or of a hub data set."""
    path = Path(source)
    if path.is_file() and path.suffix == ".parquet":
        yield from map(usable_text, parquet_values(source, text_field))
        return
    if not files.is_row_file(source):
        rows = files.read_hub(source, lazy=True)["train"]
    else:
        rows = json_rows(source) if path.is_file() and files.format_of(path) == ".jsonl" else files.read_rows(source)
    for where, row in rows:
        if text_field not in row:
            raise missing_field(where, text_field, row)
        yield usable_text(row[text_field])


def missing_field(where: str, text_field: str, row: dict) -> InputError:
    """The sentence about a row without the field."""
    found = names_of(row)
    return InputError(f'{where}: no field "{text_field}"; --text-field names the one with the text (found {found}).')


def json_rows(source: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of each line of a .jsonl file that is not blank."""
    empty = True
    for number, line in text_lines(Path(source)):
        if not line.strip():
            continue
        row, empty = files.parse_line(source, number, line.removesuffix("\n")), False
        if not isinstance(row, dict):
            found = type(row).__name__
            raise InputError(f"{source}, line {number}: expected an object with named fields, found {found}.")
        yield f"{source}, line {number}", row
    if empty:
        raise InputError(f"{source}: the file has no rows.")


def parquet_values(source: str, text_field: str) -> Iterator[object]:
    """The values of one column of a parquet file, row group by row group; times and dates come as
    text.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            if not file.metadata.num_rows:
                raise InputError(f"{source}: the file has no rows.")
            if text_field not in file.schema_arrow.names:
                raise missing_field(f"{source}, row 1", text_field, dict.fromkeys(file.schema_arrow.names))
            for batch in file.iter_batches(1024, columns=[text_field]):
                column = batch.column(0)
                temporal = pyarrow.types.is_temporal(column.type)
                yield from (column.cast(pyarrow.string()) if temporal else column).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"{source}: not a readable parquet file ({files.first_line(error)}).") from None
