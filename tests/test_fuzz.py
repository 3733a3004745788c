"""Files as nobody should write them, read the way a run reads them.

Each generated file must end in rows that are used or counted, or in one sentence: no stack trace,
no hang, no row that is lost. `--fuzz 10000` reads that many files of each format.
"""

import contextlib
import csv
import gzip
import io
import json
import signal
from collections import Counter
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal

import pytest

from common import InputError
from common.data import load_pairs
from common.files import read_rows
from labelled.rows import load_demonstrations, load_labelled
from rewards.prompts import load_prompts
from tests.models import byte_tokenizer
from tests.runs import CHAT

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FILES = 400  # of each format, half of them as .gz
LIMIT = 10  # seconds for one file
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('\nfirst the user') }}{% endif %}" + CHAT
TOKENIZERS = [byte_tokenizer(), byte_tokenizer(bos=True, chat_template=CHAT), byte_tokenizer(True, True)]
TOKENIZERS.append(byte_tokenizer(eos=True, chat_template=STRICT))

# -- values

ODD_TEXTS = ["", " ", "\n\nAssistant:", "Human: a\n\nAssistant: b", "a\u2028b", "\ufeffa", "\x00", "e\u0301", "</s>"]
ODD_TEXTS += [
    "\ud800",
    "\udfff b",
    "a\tb\r",
    "1_000",
    "1e400",
    "1.7e308",
    "nan",
    "true",
    " 0.5 ",
    "1" * 100_000 + "x",
    "é" * 300,
]
TEXTS = st.one_of(st.sampled_from(["ab", "ab ab", "ab t", "yes"]), st.sampled_from(ODD_TEXTS), st.text(max_size=12))
NUMBERS = st.one_of(st.sampled_from([0, 1, True, False, 0.5, -3, 10**400]), st.integers(), st.floats())
SCALARS = st.one_of(st.none(), NUMBERS, TEXTS)
NESTED = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=5)
MESSAGE = {"role": st.sampled_from(["user", "assistant", "system", "tool", "", "\ud800"]), "content": TEXTS}
MORE = {"name": NESTED, "tool_calls": NESTED, "weight": NUMBERS}
ODD_MESSAGE = st.fixed_dictionaries({"role": TEXTS, "content": NESTED})
TURNS = st.one_of(st.fixed_dictionaries(MESSAGE), st.fixed_dictionaries(MESSAGE, optional=MORE), ODD_MESSAGE)
MESSAGES = st.lists(TURNS, max_size=4)
VALUES = st.one_of(TEXTS, TEXTS, MESSAGES, NUMBERS, NESTED)
EVERYTHING = ["prompt", "chosen", "rejected", "completion", "label"]
SHAPES = [EVERYTHING] * 4 + [
    ["prompt", "chosen", "rejected"],
    ["chosen", "rejected"],
    ["prompt", "completion", "label"],
    ["text", "score"],
]
SHAPES += [["prompt", "response"], ["prompt"], ["text"], []]
NAMES = st.sampled_from(["prompt", "chosen", "label", "", "a\nb", "\ud800", "text"])
MORE_NAMES = st.one_of(*[st.just([])] * 5, st.lists(NAMES, max_size=1))

# What Python would not write, as it may stand in JSON.
ODD_JSON = [
    "NaN",
    "-Infinity",
    "1e999",
    "-0.0",
    "9" * 5000,
    '"\\ud83d"',
    '"\\ud83d\\ude00"',
    "{}",
    "[]",
    "",
    "'a'",
    "01",
]
ODD_JSON += ["[" * depth + "]" * depth for depth in (300, 480, 900, 100_000)] + ['{"a": 1, "a": 2}', '"\\x"', "1_000"]
ODD_JSON += [
    '[{"role": "user", "content": "a", "x": ' + "[" * depth + "]" * depth + "}]" for depth in (150, 320, 480, 950)
]


@st.composite
def json_rows(draw) -> list[str]:
    """Rows as JSON objects; a name may come twice, and a value may be none."""
    names = draw(st.sampled_from(SHAPES)) + draw(MORE_NAMES)
    value = st.one_of(*[VALUES.map(json.dumps)] * 6, st.sampled_from(ODD_JSON))
    usual = st.sampled_from(["ab", "ab t", "ab ab", 1, 0]).map(json.dumps)
    rows = []
    for is_odd in draw(st.lists(st.sampled_from([True, False, False]), max_size=5)):
        fields = [(json.dumps(name), draw(value if is_odd else usual)) for name in names]
        rows.append("{" + ", ".join(f"{name}: {text}" for name, text in fields) + "}")
    return rows + draw(st.sampled_from([[]] * 20 + [["[1]"], ["3"], ["null"], ["{"]]))


@st.composite
def csv_file(draw) -> bytes:
    """A header and rows, some too short or too long, with or without quotes."""
    names = draw(st.sampled_from(SHAPES)) + draw(MORE_NAMES)
    file = io.StringIO(newline="")
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    plain, quoted = csv.writer(file, lineterminator=end), csv.writer(file, csv.QUOTE_ALL, lineterminator=end)
    quoted.writerow(names)
    for width in draw(st.lists(st.sampled_from([len(names)] * 20 + [1, len(names) + 1]), max_size=5)):
        values = [draw(st.one_of(TEXTS, TEXTS, NUMBERS)) for _ in range(width)]
        draw(st.sampled_from([plain, quoted])).writerow(values)
    text = file.getvalue() + draw(st.sampled_from([""] * 15 + ['"', 'a"b\n', "\n\n", ",,\n", "\x00\n"]))
    return text.encode("utf-8", draw(st.sampled_from(["surrogatepass", "replace"])))


MOMENT = datetime(2024, 2, 29, 12, 30, 1, 999_999)
COLUMNS = [  # values of one parquet column
    TEXTS.map(lambda text: text.encode("utf-8", "replace").decode()),
    TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.floats(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([MOMENT, datetime(1, 1, 1), datetime(9999, 12, 31)]),
    st.just(MOMENT.replace(tzinfo=timezone(timedelta(hours=5)))),
    st.sampled_from([date(2024, 2, 29), date(1, 1, 1)]),
    st.just(time(23, 59, 59, 1)),
    st.sampled_from([timedelta(days=-3, microseconds=7), timedelta.max]),
    st.just(Decimal("1.000000000000000000000001")),
    st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.sampled_from(["ab", "ab t"])}), max_size=3),
    st.just([{"role": "user", "content": "ab", "at": MOMENT, "raw": b"\xff", "score": Decimal("1.5")}]),
    st.just([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ab", "at": MOMENT}]),
    st.just({"a": [MOMENT, None]}),
    st.none(),
]


@st.composite
def parquet_file(draw) -> bytes:
    """Columns of all types, each with holes; two may have one name."""
    import pyarrow
    from pyarrow import parquet

    names = draw(st.sampled_from(SHAPES)) + [name for name in draw(MORE_NAMES) if name != "\ud800"]
    count, arrays = draw(st.integers(0, 4)), []
    for _ in names:
        column = draw(st.sampled_from(COLUMNS[:1] * 8 + COLUMNS))
        values = [draw(st.one_of(column, column, column, st.none())) for _ in range(count)]
        with contextlib.suppress(pyarrow.ArrowException, OverflowError):
            values = pyarrow.array(values)
        arrays.append(values if isinstance(values, pyarrow.Array) else pyarrow.nulls(count))
        kind = draw(st.sampled_from([None, None, "s", "ns", "large", "dictionary"]))
        with contextlib.suppress(pyarrow.ArrowException):
            if kind == "dictionary" and not pyarrow.types.is_null(arrays[-1].type):
                arrays[-1] = arrays[-1].dictionary_encode()
            elif pyarrow.types.is_timestamp(arrays[-1].type) and kind in {"s", "ns"}:
                arrays[-1] = arrays[-1].cast(pyarrow.timestamp(kind), safe=False)
            elif pyarrow.types.is_date32(arrays[-1].type) and kind == "large":  # past the year 9999
                arrays[-1] = pyarrow.array([2**31 - 1] * count, pyarrow.int32()).cast(pyarrow.date32())
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays, names=names), file)
    return file.getvalue()


# -- files


@st.composite
def json_lines(draw) -> bytes:
    """A .jsonl file, perhaps with empty lines between."""
    end = draw(st.sampled_from(["\n", "\n", "\r\n", "\n\n"]))
    return end.join(draw(json_rows())).encode() + draw(st.sampled_from([b"", b"\n", b"\r"] * 4 + [b"\xff", b"\x00"]))


@st.composite
def json_file(draw) -> bytes:
    """A .json file: a list of objects, in most cases."""
    begin, middle, end = draw(
        st.sampled_from([("[", ",\n", "]")] * 6 + [("\ufeff[", ",", "]"), ("[", "\n", ""), ("", "\n", "")])
    )
    return (begin + middle.join(draw(json_rows())) + end).encode()


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The same bytes, or some of them lost, changed, or put between."""
    place = draw(st.integers(0, len(content)))
    change = draw(st.sampled_from(["none"] * 15 + ["cut", "changed", "inserted", "lost", "twice"]))
    some = draw(st.binary(min_size=1, max_size=4))
    return {
        "none": content,
        "cut": content[:place],
        "changed": content[:place] + some + content[place + len(some) :],
        "inserted": content[:place] + some + content[place:],
        "lost": content[:place] + content[place + len(some) :],
        "twice": content + content,
    }[change]


@st.composite
def files(draw, ending: str) -> tuple[str, bytes]:
    """(file name, bytes) of one format, plain or packed."""
    content = draw(FORMATS[ending])
    if draw(st.booleans()):
        return f"rows{ending}", draw(damaged(content))
    if draw(st.booleans()):
        return f"rows{ending}.gz", draw(damaged(gzip.compress(content)))
    return f"rows{ending}.gz", gzip.compress(draw(damaged(content)))


FORMATS = {".jsonl": json_lines(), ".json": json_file(), ".csv": csv_file(), ".parquet": parquet_file()}


# -- reading


class Hang(BaseException):
    """Raised where a file takes longer than it may."""


@contextlib.contextmanager
def time_limit(seconds: int):
    """Raises Hang after so many seconds."""

    def stop(*_):
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def say(words: str) -> None:
    """Stands for print, which refuses what is no Unicode text."""
    words.encode()


def loaders(name: str, holdout: float, tokenizer):
    """(what is loaded, a function that returns its splits) for everything that reads rows."""
    where, sizes = (name, None, holdout, 0, tokenizer), {"max_length": 64, "say": say}
    yield "pairs", lambda: load_pairs(*where, **sizes)[0]
    for labels, scale in (("auto", "none"), ("continuous", "minmax"), ("auto", "quantile")):
        options = {"labels": labels, "label_scale": scale}
        yield f"labelled {labels} {scale}", lambda options=options: load_labelled(*where, **sizes, **options)[0]
    yield "unlabelled", lambda: load_labelled(*where, **sizes, unlabelled=True)[0]
    yield "demonstrations", lambda: load_demonstrations(*where, **sizes)[0]
    yield "prompts", lambda: load_prompts(*where, **sizes, max_new_tokens=8)[0]


def read_every_way(name: str, holdout: float, tokenizer, counts: Counter) -> None:
    """Reads a file as every kind of data, and checks that each of its rows is used or counted."""
    counts["files"] += 1
    try:
        rows = read_rows(name)
    except InputError as error:
        check_sentence(error, name)
        counts["files refused"] += 1
        return
    for kind, load in loaders(name, holdout, tokenizer):
        try:
            splits = load()
        except InputError as error:
            check_sentence(error, "" if "--label-scale" in str(error) else name)
            counts["loads refused"] += 1
            continue
        counts["loads"] += 1
        for split in splits.values():
            assert split.seen == len(split) + sum(split.dropped.values()), (kind, split.describe(kind))
            counts["rows used"] += len(split)
            counts["rows dropped"] += sum(split.dropped.values())
        assert sum(split.seen for split in splits.values()) == len(rows), kind


def check_sentence(error: InputError, name: str) -> None:
    """The message is one line that names the file, and exits with 1."""
    assert name in str(error)
    assert len(str(error).splitlines()) == 1, str(error)
    assert isinstance(error.code, str)


@pytest.mark.parametrize("ending", FORMATS)
def test_every_row_is_used_or_counted_or_the_file_refused(ending, tmp_path, pytestconfig, capsys):
    wanted = pytestconfig.getoption("--fuzz")
    counts: Counter = Counter()

    @settings(
        max_examples=wanted or FILES,
        derandomize=not wanted,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(files(ending), st.sampled_from([0.0, 0.0, 0.5]), st.sampled_from(TOKENIZERS))
    def check(file, holdout, tokenizer):
        path = tmp_path / file[0]
        path.write_bytes(file[1])
        with time_limit(LIMIT):
            read_every_way(str(path), holdout, tokenizer, counts)
        path.unlink()

    check()
    assert counts["rows used"] > counts["files"] / 10  # most of the work is behind the reading
    if wanted:
        with capsys.disabled():
            print(f"\n{ending}: " + ", ".join(f"{number:,} {name}" for name, number in counts.items()))
