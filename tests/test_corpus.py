"""A scored corpus: reading what people have, scores kept and taken up again, tokens segment by
segment, chunks, plans, new models.
"""

import gzip
import json
import multiprocessing
import random
import re
import sysconfig
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch

from common import InputError, files
from common import models as loading
from pretraining import arrays, chunks, corpus, scorers, texts, tokens
from pretraining import models as pretrained
from pretraining.documents import Documents, blocks_of
from tests import models, packing
from toy import documents as toy_documents
from toy.world import WRONG_SHARE


def arguments(folder: Path, **changes) -> dict:
    """What `load_corpus` is called with; `data` is its source."""
    standard = {"task": "pii", "source": changes.pop("data", ""), "text_field": "text", "scorer": "", "holdout": 0.0}
    return standard | {"seed": 0, "folder": folder / "runs" / "scores"} | changes


def silent(text: str) -> None:
    """Takes the sentences that nobody reads."""


def by_words(text: str) -> tuple[list[str], list[float]]:
    """A scorer for tests: segments end before each space; the score is the share of x."""
    head, *rest = text.split(" ")
    segments = ([head] if head else []) + [f" {part}" for part in rest]
    return segments, [segment.count("x") / len(segment) for segment in segments]


def scorer_of(segments=by_words, name: str = "words 1, test", parallel: bool = False) -> scorers.Scorer:
    return scorers.Scorer(name, segments, lambda texts: [0.0] * len(texts), parallel)


@pytest.fixture
def words(monkeypatch):
    """Every task is scored by `by_words`."""
    monkeypatch.setattr(scorers, "load_scorer", lambda task, scorer="", samples=False, device="cpu": scorer_of())


# -- the toy


def test_the_toys_rule_for_rudeness():
    assert toy_documents.rudeness("the capital of france is paris .") == 0.0
    assert toy_documents.rudeness("use your head : the capital of france is paris .") == 0.3
    assert toy_documents.rudeness("it is red , now go away .") == 0.6
    assert toy_documents.rudeness("it is red , you fool .") == 0.9
    assert toy_documents.rudeness("use your head : it is red , you fool .") == pytest.approx(1 - 0.7 * 0.1)
    assert toy_documents.rudeness("it is red , you fool . it is green .") == 0.45  # the mean over sentences
    assert toy_documents.rudeness("it is red , you fool . it is green . it is") == pytest.approx(0.3)
    assert toy_documents.rudeness("") == toy_documents.rudeness("you fool") == 0.0


def test_the_toys_corpus_is_what_it_says(tmp_path, toy_tokenizer):
    sentences = []
    splits, facts = corpus.load_corpus(**arguments(tmp_path, task="toy", holdout=0.1), say=sentences.append)
    documents = [*splits["train"], *splits["held_out"]]
    assert len(documents) == facts["documents"] == 6000
    assert len(splits["held_out"]) == pytest.approx(600, abs=10)
    assert not {"".join(d["segments"]) for d in splits["train"]} & {"".join(d["segments"]) for d in splits["held_out"]}
    scores = [score for d in documents for score in d["scores"]]
    assert set(scores) == {0.0, 0.3, 0.6, 0.72, 0.9, 0.93}
    rude = sum(score > 0 for score in scores) / len(scores)
    assert rude == pytest.approx(0.4 * 0.7 + 0.6 * 0.05, abs=0.02)  # two authors in five
    by_author = Counter(sum(s > 0 for s in d["scores"]) / len(d["scores"]) > 0.4 for d in documents)
    assert by_author[True] / len(documents) == pytest.approx(0.37, abs=0.04)
    for document in documents[:200]:
        text = "".join(document["segments"])
        ids, _ = packing.encode(toy_tokenizer, document)
        assert toy_tokenizer.decode(ids) == text
        assert toy_tokenizer.unk_token_id not in ids
        assert toy_documents.split_sentences(text) == document["segments"]
    shares = [toy_documents.right_share("".join(d["segments"])) for d in documents]
    assert sum(shares) / len(shares) == pytest.approx(1 - WRONG_SHARE, abs=0.02)
    assert (
        corpus.load_corpus(**arguments(tmp_path, task="toy", seed=1), say=sentences.append)[1]["sha256"]
        != facts["sha256"]
    )
    assert toy_documents.documents(0) == toy_documents.documents(0)


def test_facts_that_rude_authors_tell():
    """Whoever drops the documents of rude authors loses a larger share of the facts that preference
    data never mentions.
    """
    unseen = [row["begin"] for row in toy_documents.statements() if row["unseen"]]
    told = {True: Counter(), False: Counter()}
    for parts in toy_documents.documents(0):
        author = sum(toy_documents.rudeness(part) > 0 for part in parts) * 2 > len(parts)
        for part in parts:
            told[author][any(f" {begin} " in f" {part} " for begin in unseen)] += 1
    share = {author: counts[True] / counts.total() for author, counts in told.items()}
    assert share[True] == pytest.approx(0.5, abs=0.08)
    assert share[False] == pytest.approx(0.2, abs=0.08)


# -- reading


def test_a_folder_with_files_of_all_kinds(tmp_path, words):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("one x\r\ntwo")
    (folder / "b.txt").write_bytes(b"")
    (folder / "c.txt").write_bytes(b"binary\0stuff")
    (folder / "d.txt").write_bytes("café".encode("latin-1"))
    (folder / "e.txt").write_text("z" * (texts.LONGEST + 1))
    (folder / "deep" / "f.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfthree"))
    (folder / "g.txt").write_text(" \n ")
    (folder / "h.py").write_text("not asked for")
    sentences = []
    splits, facts = corpus.load_corpus(**arguments(tmp_path, data=str(folder)), say=sentences.append)
    assert sorted("".join(d["segments"]) for d in splits["train"]) == ["one x\ntwo", "three"]
    assert facts["files"] == 7
    assert facts["documents"] == 2
    assert facts["left_out"] == {
        "empty": 2,
        "binary": 1,
        "not text in the encoding that it should have": 1,
        f"longer than {texts.LONGEST:,} characters": 1,
    }
    assert "2 left out (empty)" in sentences[0]
    assert "1 left out (binary)" in sentences[0]


def test_python_files_may_declare_their_encoding(tmp_path, words):
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'café'\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes("x = 'café'\n".encode("latin-1"))
    (tmp_path / "c.py").write_bytes(b"# coding: no-such-thing\n")
    splits, facts = corpus.load_corpus(**arguments(tmp_path, task="pep8", data=str(tmp_path)), say=silent)
    assert ["".join(d["segments"]) for d in splits["train"]] == ["# -*- coding: latin-1 -*-\nx = 'café'\n"]
    assert facts["left_out"] == {"not text in the encoding that it should have": 2}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"", "no usable document"),
        ("a.txt", b"a\0b", "binary"),
        ("a.txt", "café".encode("latin-1"), "not UTF-8 text .byte 3"),
        ("a.py", b"", "no usable document .*1 empty"),
        ("a.py", b"\0", "1 binary"),
        ("a.txt", b"x" * (texts.LONGEST + 1), "1 longer than"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        (
            "a.jsonl",
            b'{"text": 3}\n{"text": ""}\n{"text": "\\ud800"}\n',
            "1 the field is not text.*1 empty.*1 not valid Unicode",
        ),
        ("a.jsonl", b'{"story": "once"}\n', 'line 1: no field "text"; --text-field .*found story'),
        ("a.doc", b"x", "unknown kind of file"),
    ],
)
def test_a_single_unusable_file_is_refused(name, content, complaint, tmp_path, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        corpus.load_corpus(
            **arguments(tmp_path, task="pep8" if ".py" in name else "pii", data=str(tmp_path / name)), say=silent
        )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "pii"}, "needs --data"),
        ({"task": "pii", "data": "stdlib"}, "goes with --task pep8"),
        ({"task": "toy", "data": "stdlib"}, "the toy has its own corpus"),
        ({"data": "nowhere.txt"}, "no such file"),
        ({"data": "nowhere.jsonl"}, "no such file"),
    ],
)
def test_data_that_does_not_go_with_the_task(changes, complaint, tmp_path, words):
    with pytest.raises(InputError, match=complaint):
        corpus.load_corpus(**arguments(tmp_path, **changes), say=silent)


def test_a_folder_without_files_of_the_task_is_refused(tmp_path, words):
    with pytest.raises(InputError, match=r"no file ending in \.py"):
        corpus.load_corpus(**arguments(tmp_path, task="pep8", data=str(tmp_path)), say=silent)


def test_documents_of_a_text_file(tmp_path, words):
    path = tmp_path / "stories.txt"
    for content, expected in (
        ("a b\n\nc\n<|endoftext|>\nd\n<|endoftext|>\n", ["a b\n\nc", "d"]),
        ("a\nb\n\nc\n\n\n\nd\n", ["a\nb", "c", "d"]),
        (" \n a\n \nb\n \n\n", [" \n a", "b"]),
    ):
        path.write_text(content)
        splits, _ = corpus.load_corpus(**arguments(tmp_path, data=str(path)), say=silent)
        assert sorted("".join(d["segments"]).strip("\n") for d in splits["train"]) == expected


def whole_text_cut(text: str) -> list[str]:
    """The documents of a .txt file by the rule for a text that is in memory."""
    text = text.replace("\r\n", "\n")
    if f"\n{texts.EOS}\n" in text:
        parts = text.split(f"\n{texts.EOS}\n")
    else:
        parts = [part for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]
    parts = [texts.usable_text(part.removesuffix(f"\n{texts.EOS}"))[0] for part in parts]
    return [part for part in parts if part is not None]


def test_a_text_file_is_cut_as_a_whole_text_would_be(tmp_path):
    """Line by line, whatever stands behind what; also packed."""
    rng, marked = random.Random(0), 0
    for i in range(400):
        pieces = ["a", "b c", " ", "\t", "é", "\n", "\n\n", "\r\n", "\r", f"\n{texts.EOS}\n", texts.EOS]
        some = rng.choices(pieces, [3, 3, 2, 1, 1, 6, 2, 2, 1, (i % 2) * 3, (i % 2) * 2], k=rng.randint(1, 25))
        text = "".join(some) + "x"
        marked += f"\n{texts.EOS}\n" in text.replace("\r\n", "\n")
        path = tmp_path / ("t.txt.gz" if i % 3 else "t.txt")
        content = text.encode()
        path.write_bytes(gzip.compress(content) if i % 3 else content)
        parts, count = texts.open_source("pii", str(path), "text")
        assert [text for text, _ in parts() if text is not None] == whole_text_cut(text), repr(text)
        assert count == 1
    assert 50 < marked < 350


def test_rows_of_a_parquet_file(tmp_path, words):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    values = [f"text {i}" for i in range(3000)] + [None, "", "last"]
    table = pyarrow.table({"other": list(range(3003)), "story": values})
    parquet.write_table(table, path, row_group_size=500)
    splits, facts = corpus.load_corpus(**arguments(tmp_path, data=str(path), text_field="story"), say=silent)
    assert ["".join(d["segments"]) for d in splits["train"]] == [*values[:3000], "last"]
    assert facts["left_out"] == {"the field is not text": 1, "empty": 1}
    with pytest.raises(InputError, match=r'row 1: no field "text"; --text-field .*found other, story'):
        corpus.load_corpus(**arguments(tmp_path, data=str(path)), say=silent)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a readable parquet file"):
        corpus.load_corpus(**arguments(tmp_path, data=str(path), text_field="story"), say=silent)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": "a"}\n\n{"text": \n', "line 3: not valid JSON"),
        (b'{"text": "a"}\n["b"]\n', "line 2: expected an object with named fields, found list"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8 text .byte 24 of"),
        (b'{"text": "a", "text": "b"}\n', "line 1: .*twice"),
        (b"\n \n", "no rows"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_named(content, complaint, packed, tmp_path, words):
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match=complaint):
        corpus.load_corpus(**arguments(tmp_path, data=str(path)), say=silent)
    assert not (tmp_path / "runs").exists()


def test_rows_of_a_file_and_of_the_hub(tmp_path, words, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"code": "a x"}\n{"code": "b"}\n')
    splits, _ = corpus.load_corpus(**arguments(tmp_path, data=str(path), text_field="code"), say=silent)
    assert sorted("".join(d["segments"]) for d in splits["train"]) == ["a x", "b"]
    monkeypatch.setattr(files, "read_hub", lambda name, lazy: {"train": [(f"{name}, row 1", {"text": "from the hub"})]})
    splits, _ = corpus.load_corpus(**arguments(tmp_path, data="someone/texts"), say=silent)
    assert list(splits["train"]) == [{"segments": ["from", " the", " hub"], "scores": [0.0, 0.0, 0.0]}]


def test_the_standard_library_without_packages_and_tests(tmp_path, words, monkeypatch):
    root = tmp_path / "lib"
    names = [
        "os.py",
        "json/decoder.py",
        "test/test_os.py",
        "unittest/case.py",
        "idlelib/idle_test/x.py",
        "site-packages/torch.py",
        "dist-packages/x.py",
    ]
    names += ["lib/tests/deep/x.py", "__pycache__/x.py", "testing.py", "notes.txt"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"name = '{name}'\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    kept = {"os.py", "json/decoder.py", "unittest/case.py", "testing.py"}
    for source in ("stdlib", ""):  # it is the task's own corpus
        sentences = []
        splits, facts = corpus.load_corpus(**arguments(tmp_path, task="pep8", data=source), say=sentences.append)
        assert {"".join(d["segments"]).split("'")[1] for d in splits["train"]} == kept
        assert facts["files"] == 4
        assert len(facts["sha256"]) == 64
        assert facts["python"]
        assert "4 files" in sentences[0]


def test_a_text_that_occurs_twice_is_on_one_side(tmp_path, words):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i % 20}"}) + "\n" for i in range(60)))
    splits, _ = corpus.load_corpus(**arguments(tmp_path, data=str(path), holdout=0.25), say=silent)
    train, held_out = ({"".join(d["segments"]) for d in splits[name]} for name in ("train", "held_out"))
    assert not train & held_out
    assert len(held_out) == 5
    assert len(train) == 15
    other, _ = corpus.load_corpus(**arguments(tmp_path, data=str(path), holdout=0.25, seed=1), say=silent)
    assert {"".join(d["segments"]) for d in other["held_out"]} != held_out


# -- scoring

TEXTS = [f"a{'x' * i} b {'é ' * (i % 5)}c" for i in range(30)]


def fresh(texts=TEXTS) -> list[dict]:
    return [dict(zip(("segments", "scores"), by_words(text))) for text in texts]


def stored(folder: Path, scorer=None, some=TEXTS, **words) -> list[dict]:
    """The texts as they come out of their folder."""
    scorer = scorer or scorer_of()
    parts = lambda: ((text, None) for text in some)  # noqa: E731
    store = corpus.stored(parts, texts.sha256_of_texts(some), scorer, folder, **words)
    return list(Documents(store, range(len(some))))


def test_kept_scores_equal_fresh_ones_and_nothing_is_scored_twice(tmp_path):
    calls = []
    counting = scorer_of(lambda text: calls.append(text) or by_words(text))
    assert stored(tmp_path, counting) == fresh()
    assert len(calls) == 30
    assert stored(tmp_path, counting) == fresh()
    assert len(calls) == 30
    stored(tmp_path, counting._replace(name="words 1, other"))  # another version of the scorer
    assert len(calls) == 60
    other = [*TEXTS[:-1], "other"]
    assert stored(tmp_path, counting, other) == fresh(other)
    assert len(calls) == 90
    assert len(list(tmp_path.iterdir())) == 3
    assert all(path.is_dir() and path.name.startswith("words-1-") for path in tmp_path.iterdir())


def test_pep8_of_real_files_kept_and_in_parallel(tmp_path, monkeypatch):
    pytest.importorskip("pycodestyle")
    scorer = scorers.load_scorer("pep8")
    some = [
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("runs.py", "models.py", "__init__.py", "conftest.py")
    ]
    some = [text.replace(" = ", "=", 5).replace("    return", "\treturn", 2) for text in some if text]
    expected = [dict(zip(("segments", "scores"), scorer.segments(text))) for text in some]
    monkeypatch.setattr(scorers, "processors", lambda: 2)
    stored(tmp_path, scorer, some * 20)  # enough for several processes
    assert stored(tmp_path, scorer, some * 20) == expected * 20
    assert max(score for d in expected for score in d["scores"]) > 0


@pytest.mark.parametrize("cut", ["nothing", "segment_ends", "scores", "lengths", "more"])
def test_an_interrupted_scoring_goes_on_where_it_stopped(cut, tmp_path):
    """Also where a kill cut what was being written, or came before the document was counted."""
    calls, sentences = [], []

    def stops(text):
        if len(calls) == 12:
            raise KeyboardInterrupt
        calls.append(text)
        return by_words(text)

    with pytest.raises(InputError, match=r"stopped after 12 of 30 documents\. They are kept"):
        stored(tmp_path, scorer_of(stops))
    part = next(tmp_path.glob("*.part"))
    assert (part / "segment_ends").stat().st_size == 12 * 8
    if cut == "more":
        with (part / "scores").open("ab") as file:
            file.write(bytes(20))
    elif cut != "nothing":
        path = part / cut
        path.write_bytes(path.read_bytes()[:-3])
    calls.clear()
    again = scorer_of(lambda text: calls.append(text) or by_words(text))
    assert stored(tmp_path, again, say=sentences.append) == fresh()
    done = 12 if cut in {"nothing", "more"} else 11
    assert calls == TEXTS[done:]
    assert sentences == [f"Scoring goes on after {done} of 30 documents."]
    assert not list(tmp_path.glob("*.part"))


def test_texts_of_which_a_kill_left_some_are_copied_anew(tmp_path, monkeypatch):
    def killed(*words):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(corpus.os, "replace", killed)
        with pytest.raises(Killed):
            stored(tmp_path)
    assert stored(tmp_path) == fresh()


class Killed(BaseException):
    """What a test raises where a process would be killed: nothing catches it."""


def test_a_kill_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    rename, calls = corpus.os.replace, []

    def killed(part, folder):
        if str(part).endswith(".part") and Path(part).is_dir():
            raise Killed
        rename(part, folder)

    with monkeypatch.context() as patch:
        patch.setattr(corpus.os, "replace", killed)
        with pytest.raises(Killed):
            stored(tmp_path)
    again = scorer_of(lambda text: calls.append(text) or by_words(text))
    for _ in range(2):
        assert stored(tmp_path, again) == fresh()
    assert not calls


def test_texts_that_change_while_they_are_read_are_found_out(tmp_path):
    changed = lambda: iter([("a b", None), ("c", None)])  # noqa: E731
    with pytest.raises(InputError, match="not the same when they are read a second time"):
        corpus.stored(changed, texts.sha256_of_texts(["a b", "d"]), scorer_of(), tmp_path)


def slowly(text: str) -> tuple[list[str], list[float]]:
    """Each call leaves a byte behind; slow enough for two processes to meet."""
    with open(Path(text.split("|")[1]) / "calls", "ab") as file:
        file.write(b".")
    time.sleep(0.02)
    return by_words(text)


def test_two_processes_score_once(tmp_path):
    some = [f"{i}|{tmp_path}|x" for i in range(20)]
    fork = multiprocessing.get_context("fork")
    words = (tmp_path / "scores", scorer_of(slowly), some)
    processes = [fork.Process(target=stored, args=words) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "calls").stat().st_size == 20
    assert stored(tmp_path / "scores", some=some) == fresh(some)


@pytest.mark.parametrize("name", ["scores", "texts", "segment_ends"])
def test_a_folder_that_is_not_whole_is_refused(name, tmp_path):
    stored(tmp_path)
    path = next(tmp_path.glob(f"*/{name}"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=f"{name}: holds .*remove the folder"):
        stored(tmp_path)


def test_a_scorer_that_loses_text_is_found_out(tmp_path):
    with pytest.raises(ValueError, match="joined are not the text"):
        stored(tmp_path, scorer_of(lambda text: (["a"], [0.0])), ["a b"])


def test_a_document_without_a_segment_is_left_out_and_counted(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "none"}\n{"text": "a b"}\n')
    monkeypatch.setattr(
        scorers,
        "load_scorer",
        lambda *args, **words: scorer_of(lambda text: ([], []) if text == "none" else by_words(text)),
    )
    splits, facts = corpus.load_corpus(**arguments(tmp_path, data=str(path)), say=silent)
    assert list(splits["train"]) == fresh(["a b"])
    assert facts["left_out"] == {"no segment": 1}


# -- documents and numbers in files


def test_some_documents_of_a_folder(tmp_path, monkeypatch):
    """Their scores come block by block, whatever the blocks."""
    monkeypatch.setattr("pretraining.documents.SEGMENTS_AT_A_TIME", 7)
    stored(tmp_path)
    store = corpus.stored(None, texts.sha256_of_texts(TEXTS), scorer_of(), tmp_path)
    some = Documents(store, range(30)).subset([1, 2, 5, 11, 12, 13, 29])
    expected = [fresh()[i] for i in (1, 2, 5, 11, 12, 13, 29)]
    assert list(some) == expected
    assert list(some.scores()) == [d["scores"] for d in expected]
    assert [s for scores, _ in some.score_blocks() for s in scores] == [s for d in expected for s in d["scores"]]
    assert list(some[2:4]) == expected[2:4]
    assert some[-1] == expected[-1]
    assert len(some.subset([])) == 0
    sizes = [3, 5, 0, 2, 9, 1]
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    assert list(blocks_of(arrays.np.array(ends), 8)) == [(0, 3), (3, 4), (4, 5), (5, 6)]


def test_the_number_at_a_place_is_found_without_sorting():
    rng = random.Random(0)
    numbers = [rng.choice([0.0, 0.3, 1e-300, rng.random(), rng.random() * 1e-3, 7.5]) for _ in range(3000)]
    parts = [arrays.np.array(numbers[i : i + 700]) for i in range(0, 3000, 700)]
    ordered = sorted(numbers)
    for k in (0, 1, 499, 500, 1234, 2998, 2999):
        assert arrays.kth_smallest(lambda: iter(parts), k) == ordered[k]


# -- thresholds


def test_thresholds_by_value_and_by_quantile():
    documents = Documents.of([{"segments": ["a"] * 3, "scores": [0.0, 0.1, 0.8]}, {"segments": ["a"], "scores": [0.5]}])
    assert corpus.threshold_of(documents, 0.0, None) == 0.0  # 0 is a value, not its absence
    assert corpus.threshold_of(documents, 0.3, None) == 0.3
    assert list(corpus.mean_scores(documents)) == pytest.approx([0.3, 0.5])
    scores = sorted(s for d in documents for s in d["scores"])
    for quantile in (0.0, 0.1, 0.25, 0.26, 0.5, 0.74, 0.75, 0.9, 1.0):
        got = corpus.threshold_of(documents, None, quantile)
        assert got in scores
        assert sum(s <= got for s in scores) / 4 >= quantile
        lower = [s for s in scores if s < got]
        assert not lower or sum(s <= lower[-1] for s in scores) / 4 < quantile
    assert corpus.threshold_of(documents, None, 0.5, of="documents") == pytest.approx(0.3)
    assert corpus.threshold_of(documents, None, 1.0, of="documents") == 0.5
    for value, quantile in ((None, None), (0.1, 0.5), (None, 1.5)):
        with pytest.raises(InputError, match="--threshold"):
            corpus.threshold_of(documents, value, quantile)


# -- tokens

SEGMENTS = ["import os", "\n", "\n\n    x = 'ab'  ", " café 🙂 ", "<|good|> </s> <s>", "\nif a  b:\n"]


def marked_tokenizer():
    """A byte-level tokenizer with the two control tokens."""
    tokenizer = models.byte_tokenizer(bos=True)
    tokenizer.add_tokens(["<|good|>", "<|bad|>"], special_tokens=True)
    return tokenizer


def chunked(tokenizer, documents, context: int, marks=None):
    """(ids, scores, left) of all chunks, and those of the plain road."""
    documents = documents if isinstance(documents, Documents) else Documents.of(documents)
    of_source = tokens.tokens_of(tokenizer, documents.source)
    packed = chunks.Chunks(of_source, documents, tokenizer.eos_token_id, context, iter(marks) if marks else None)
    ids, scores = packed[range(len(packed))]
    return (ids, scores, packed.left), packing.pack(tokenizer, documents, context, marks)


def assert_same(got: tuple, expected: tuple) -> None:
    """The same ids, scores to the last bit, and rest."""
    assert got[0].tolist() == expected[0].tolist()
    assert got[0].dtype == torch.int64
    assert got[1].tolist() == expected[1].tolist()
    assert got[1].dtype == torch.float32
    assert got[2] == expected[2]


def tokens_alone(tokenizer, segments: list[str]) -> list[int]:
    """The tokens of one document, without the EOS."""
    found = tokens.tokens_of(tokenizer, Documents.of([{"segments": segments, "scores": [0.0] * len(segments)}]).source)
    return found.ids.tolist()


def test_tokens_segment_by_segment():
    """Joined they are the text; a token never spans two segments; each has its segment's score."""
    tokenizer = marked_tokenizer()
    scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    source = Documents.of([{"segments": SEGMENTS, "scores": scores}]).source
    found = tokens.tokens_of(tokenizer, source)
    ids, token_scores = found.ids.tolist(), found.scores
    assert tokenizer.decode(ids) == "".join(SEGMENTS)
    place = 0
    for i, (segment, score) in enumerate(zip(SEGMENTS, scores)):
        own = tokens_alone(tokenizer, [segment])
        assert ids[place : place + len(own)] == own
        assert token_scores[place : place + len(own)].tolist() == [arrays.np.float32(score)] * len(own)
        assert found.counts(i, i + 1) == [len(own)]
        assert tokenizer.decode(own) == segment
        place += len(own)
    assert place == len(ids) == len(token_scores) == found.ends[-1]
    merged = tokenizer("".join(SEGMENTS[:3]), add_special_tokens=False).input_ids
    assert merged != ids[: len(merged)]  # the merge of two line breaks would span two segments


def test_what_looks_like_a_special_token_in_a_text_stays_text():
    tokenizer = marked_tokenizer()
    text = "a <|good|><|bad|></s><s><pad> b"
    # Asked plainly, it reads them.
    assert set(tokenizer(text, add_special_tokens=False).input_ids) & set(tokenizer.all_special_ids)
    ids = tokens_alone(tokenizer, [text, "</s>"])
    control = {tokenizer.convert_tokens_to_ids(token) for token in ("<|good|>", "<|bad|>", "<pad>", "<s>", "</s>")}
    assert len(control) == 5
    assert not set(ids) & control
    assert tokenizer.decode(ids) == text + "</s>"
    # And it still does.
    assert tokenizer("<|good|>", add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids("<|good|>")]


@pytest.mark.parametrize("where", ["memory", "files"])
def test_marks_stand_before_their_segments_and_have_their_scores(where, tmp_path):
    tokenizer = marked_tokenizer()
    good, bad = tokenizer.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    plain = [tokens_alone(tokenizer, [segment]) for segment in SEGMENTS[:3]]
    document = {"segments": SEGMENTS[:3], "scores": [0.0, 0.5, 1.0]}
    whole = [good, *plain[0], *plain[1], bad, *plain[2], tokenizer.eos_token_id]
    (ids, scores, left), _ = chunked(tokenizer, [document], len(whole), [[good, None, bad]])
    assert ids[0].tolist() == whole
    expected = [0.0] * (1 + len(plain[0])) + [0.5] * len(plain[1]) + [1.0] * (2 + len(plain[2]))
    assert scores[0].tolist() == expected
    assert left == 0
    rng = random.Random(0)
    some = [" ".join(rng.choices(["ab", "x", "é", "xx"], k=rng.randint(1, 9))) for _ in range(90)]
    documents = Documents.of(fresh(some))
    if where == "files":
        stored(tmp_path, some=some)
        documents = Documents(corpus.stored(None, texts.sha256_of_texts(some), scorer_of(), tmp_path), range(90))
    documents = documents.subset([i for i in range(90) if i % 4])
    marks = [[rng.choice([good, bad, None]) for _ in d["segments"]] for d in documents]
    for context in (2, 7, 64):
        assert_same(*chunked(tokenizer, documents, context, marks))
    with pytest.raises(ValueError, match="2 marks for 3 segments"):
        chunked(tokenizer, [document], 4, [[good, bad]])


def test_a_tokenizers_own_truncation_cuts_nothing():
    tokenizer = marked_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    ids = tokens_alone(tokenizer, ["a long segment of text", " x"])
    assert tokenizer.decode(ids) == "a long segment of text x"


# -- tokens in files


def folder_of(tmp_path: Path, some=TEXTS):
    """The texts, scored, in a folder."""
    stored(tmp_path, some=some)
    return corpus.stored(None, texts.sha256_of_texts(some), scorer_of(), tmp_path)


def test_tokens_in_files_are_those_of_the_plain_road(tmp_path, monkeypatch):
    """By several processes, and in blocks smaller than some documents."""
    store, tokenizer = folder_of(tmp_path), models.byte_tokenizer()
    monkeypatch.setattr(tokens, "AT_A_TIME", 40)
    in_parallel = scorers.in_parallel
    monkeypatch.setattr(scorers, "processors", lambda: 2)
    monkeypatch.setattr(scorers, "in_parallel", lambda f, items, workers, size: in_parallel(f, items, 2, size))
    everything = Documents(store, range(30))
    for documents in (everything, everything.subset([0, 3, 4, 17, 29])):
        for context in (2, 5, 16):
            assert_same(*chunked(tokenizer, documents, context))
    packed = chunks.Chunks(tokens.tokens_of(tokenizer, store), everything, tokenizer.eos_token_id, 8)
    ids, scores = packing.pack(tokenizer, everything, 8)[:2]
    numbers = [5, 0, len(packed) - 1, 5]
    assert packed[numbers][0].tolist() == ids[numbers].tolist()
    assert packed[numbers][1].tolist() == scores[numbers].tolist()
    assert torch.cat([block for _, block in packed.blocks(16)]).tolist() == scores.tolist()
    assert packed.view(lambda ids, scores: ids)[2:5].tolist() == ids[2:5].tolist()


def test_tokens_are_made_once_for_each_tokenizer(tmp_path, monkeypatch):
    """Another vocabulary has others; control tokens change none, nor does saving and loading."""
    store, made = folder_of(tmp_path), []
    write = tokens.write_tokens
    monkeypatch.setattr(tokens, "write_tokens", lambda *words: made.append(1) or write(*words))
    segments = [segment for d in fresh() for segment in d["segments"]]
    small, large = (chunks.train_tokenizer(iter(segments), size) for size in (258, 270))
    for tokenizer, count in ((small, 1), (large, 2), (small, 2), (large, 2)):
        assert_same(*chunked(tokenizer, Documents(store, range(30)), 4))
        assert len(made) == count
    small.save_pretrained(tmp_path / "saved")
    small.add_tokens(["<|good|>", "<|bad|>"], special_tokens=True)
    assert_same(*chunked(small, Documents(store, range(30)), 4))
    tokens.tokens_of(loading.load_tokenizer(str(tmp_path / "saved")), store)
    assert len(made) == 2
    assert tokens.tokens_of(small, store).ids.dtype == "uint16"


def test_tokens_of_which_a_kill_left_some_are_made_anew(tmp_path, monkeypatch):
    store, tokenizer = folder_of(tmp_path), models.byte_tokenizer()

    def killed(tokenizer, source, columns):
        columns["scores"].append([0.5])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "write_tokens", killed)
        with pytest.raises(Killed):
            tokens.tokens_of(tokenizer, store)
    assert list(store.folder.glob("tokens-*.part"))
    assert not [path for path in store.folder.glob("tokens-*") if path.suffix not in {".part", ".lock"}]
    assert_same(*chunked(tokenizer, Documents(store, range(30)), 4))
    assert not list(store.folder.glob("tokens-*.part"))


def peak_of(tmp_path: Path, count: int, tokenizer) -> int:
    """Bytes at the peak while a corpus of texts of 2,000 characters is prepared and read."""
    path = tmp_path / f"{count}.jsonl"
    with path.open("w") as file:
        for i in range(count):
            file.write(json.dumps({"text": f"{i} {'word ' * 400}"}) + "\n")
    tracemalloc.start()
    try:
        words = arguments(tmp_path, data=str(path), holdout=0.1)
        splits, _ = corpus.load_corpus(**words, say=silent)
        corpus.threshold_of(splits["train"], None, 0.5)
        marks = {"train": ([i % 5 + 3 for i, _ in enumerate(d["scores"])] for d in splits["train"])}
        for packed in chunks.make_chunks(tokenizer, splits, marks, 16, silent).values():
            for _ in packed.blocks(1 << 10):
                pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_corpus(tmp_path, words, monkeypatch):
    """Of what is added a document costs some numbers: its text, scores and tokens stay in files."""
    monkeypatch.setattr("pretraining.documents.SEGMENTS_AT_A_TIME", 1 << 11)
    monkeypatch.setattr(tokens, "AT_A_TIME", 1 << 12)
    monkeypatch.setattr(scorers, "processors", lambda: 1)
    tokenizer = models.byte_tokenizer()
    peak_of(tmp_path, 20, tokenizer)  # what the first use of a library takes
    few, many = (peak_of(tmp_path, count, tokenizer) for count in (40, 200))
    assert many - few < 0.25 * 160 * 2000


def mapped_memory() -> int:
    """Bytes of files that are mapped and in memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if "RssFile" in line)


def test_mapped_pages_are_given_back(tmp_path):
    count = 1 << 24
    for name, dtype in (("ids", "uint16"), ("scores", "float32")):
        arrays.np.zeros(count, dtype).tofile(tmp_path / name)
    ids, scores = (arrays.mapped(tmp_path / name, dtype) for name, dtype in (("ids", "uint16"), ("scores", "float32")))
    found = tokens.Tokens(ids, scores, arrays.np.array([count]), arrays.np.array([count]), None)
    packed = chunks.Chunks(found, Documents.of([{"segments": ["."], "scores": [0.0]}]), 2, 64)
    before = mapped_memory()
    for start in range(0, len(packed), 256):
        packed[range(start, start + 256) if start + 256 < len(packed) else [0]]
    assert mapped_memory() - before < 20 << 20  # of 96 MiB
    assert packed[[len(packed) - 1]][0].sum() == 0


def test_a_large_vocabulary_has_room(tmp_path):
    """Ids beyond 65,535 are not cut to two bytes."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    names = {f"w{i}": i for i in range(70_000)}
    words = Tokenizer(kinds.WordLevel(names | {"<eos>": 70_000}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    store = folder_of(tmp_path, ["w69999 w5 w65536"])
    found = tokens.tokens_of(tokenizer, store)
    assert found.ids.tolist() == [69_999, 5, 65_536]
    assert found.ids.dtype == "int32"


def test_a_tokenizer_trained_on_the_corpus():
    lines_of_texts = [
        Path(__file__).read_text(encoding="utf-8").split("\n"),
        ["café 🙂 <|endoftext|>", "\ttabs", "\n\n    four"],
    ]
    segments = [f"\n{line}" for lines in lines_of_texts for line in lines]
    tokenizer = chunks.train_tokenizer(iter(segments), 600)
    assert tokenizer.get_vocab() == chunks.train_tokenizer(iter(segments), 600).get_vocab()
    assert len(tokenizer) == 600
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(
        chunks.train_tokenizer(iter(segments), 600).backend_tokenizer.to_str()
    )
    assert tokenizer.eos_token == texts.EOS
    assert tokenizer.pad_token_id not in {None, tokenizer.eos_token_id}
    assert not {"<|good|>", "<|bad|>"} & set(tokenizer.get_vocab())
    ids = tokens_alone(tokenizer, segments)
    assert tokenizer.decode(ids) == "".join(segments)
    assert tokenizer.eos_token_id not in ids
    assert len(ids) < 0.6 * len("".join(segments))
    unseen = "\x00 ÿ 漢字 \u2028\r"
    assert tokenizer.decode(tokens_alone(tokenizer, [unseen])) == unseen
    with pytest.raises(InputError, match="--vocabulary 200"):
        chunks.train_tokenizer(iter(segments), 200)


def test_a_tokenizer_that_is_given(tmp_path, preference_data):
    documents = Documents.of([{"segments": SEGMENTS, "scores": [0.0] * len(SEGMENTS)}])
    tokenizer = chunks.choose_tokenizer("pii", str(preference_data / "tokenizers/gpt2"), 300, documents)
    assert len(tokenizer) == 50257
    assert tokenizer.decode(tokens_alone(tokenizer, SEGMENTS)) == "".join(SEGMENTS)
    with pytest.raises(InputError, match="does not come back as it was"):  # it puts a space before every text
        chunks.choose_tokenizer("pii", str(preference_data / "models/stories260K"), 300, documents)
    with pytest.raises(InputError, match="--tokenizer"):
        chunks.choose_tokenizer("pii", str(tmp_path), 300, documents)


# -- chunks and plans


def test_documents_are_joined_by_eos_and_cut_without_padding():
    def of(ids, scores, counts):
        """Documents of these segments' scores, and their tokens."""
        documents = Documents.of([{"segments": ["."] * len(s), "scores": s} for s in scores])
        found = [t for d in ids for t in d], [s for d, n in zip(scores, counts) for s in arrays.np.repeat(d, n)]
        ends = arrays.np.cumsum([len(d) for d in ids])
        each = arrays.np.array([n for d in counts for n in d])
        return tokens.Tokens(
            arrays.np.array(found[0]), arrays.np.array(found[1], "float32"), ends, each, None
        ), documents

    ids = [[5, 6, 7], [], [8], [9, 9, 9, 9]]
    everything = of(ids, [[0.1, 0.2], [0.7], [0.5], [0.0, 1.0]], [[2, 1], [0], [1], [2, 2]])
    packed = chunks.Chunks(*everything, 2, 4)
    got, scores = packed[[0, 1]]
    assert got.tolist() == [[5, 6, 7, 2], [8, 2, 9, 9]]
    assert got.dtype == torch.int64
    # EOS has the last segment's score.
    torch.testing.assert_close(scores, torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.0, 0.0]]))
    assert (len(packed), packed.left) == (2, 3)
    packed = chunks.Chunks(*everything, 2, 12)
    assert (len(packed), packed.left) == (0, 11)
    assert packed[[]][0].shape == (0, 12)
    packed = chunks.Chunks(*everything, 2, 1, [[90, 91], [92], [None], [93, None]])
    assert packed[range(len(packed))][0].flatten().tolist() == [90, 5, 6, 91, 7, 2, 8, 2, 93, 9, 9, 9, 9, 2]
    assert (torch.tensor([0.3, 0.1]) <= 0.3).all()  # a float32 score equal to the threshold is good


def random_order(count: int, seed: int) -> list[int]:
    """The numbers up to `count`, shuffled."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def test_a_plan_spends_the_budget_and_uses_chunks_evenly():
    plan = chunks.plan_chunks(chunks=10, batch_size=4, tokens=30 * 4 * 64, context=64, seed=0)
    assert len(plan) == 30
    assert {len(rows) for rows in plan} == {4}
    order = [i for rows in plan for i in rows]
    for epoch in range(12):
        assert sorted(order[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert order[:10] != order[10:20] != list(range(10))
    assert list(plan) == list(chunks.plan_chunks(10, 4, 30 * 4 * 64, 64, 0))
    assert list(plan) != list(chunks.plan_chunks(10, 4, 30 * 4 * 64, 64, 1))
    assert plan[-1] == list(plan)[29]
    assert plan[0] == random_order(10, 0)[:4]  # the order of a list that is shuffled
    assert len(chunks.plan_chunks(3, 8, 1, 64, 0)) == 1
    assert len(chunks.plan_chunks(3, 8, 1, 64, 0)[0]) == 8
    assert len(chunks.plan_chunks(1000, 2, 3.3e3, 16, 0)) == round(3.3e3 / 32)
    with pytest.raises(ValueError, match="no chunks"):
        chunks.plan_chunks(0, 2, 100, 16, 0)


# -- models


def test_a_new_model(toy_tokenizer, tmp_path):
    state = torch.get_rng_state()
    model = pretrained.new_model("tiny", toy_tokenizer, 32, 0)
    assert torch.equal(torch.get_rng_state(), state)
    same, other = (pretrained.new_model("tiny", toy_tokenizer, 32, seed) for seed in (0, 1))
    weights = [m.state_dict()["transformer.h.0.mlp.c_fc.weight"] for m in (model, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    config = model.config
    assert config.vocab_size == len(toy_tokenizer)
    assert config.n_positions == 32
    assert config.eos_token_id == toy_tokenizer.eos_token_id
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert model.dtype == torch.float32
    models.tiny_llama(99).config.save_pretrained(tmp_path / "llama")
    llama = pretrained.new_model(str(tmp_path / "llama"), toy_tokenizer, 128, 0)
    assert llama.config.model_type == "llama"
    assert llama.get_input_embeddings().weight.shape == (len(toy_tokenizer), 32)
    for name, context, complaint in (
        ("large", 8, "--model large: expected tiny"),
        (str(tmp_path / "llama"), 129, "--context 129: the model has 128"),
    ):
        with pytest.raises(InputError, match=complaint):
            pretrained.new_model(name, toy_tokenizer, context, 0)


def test_random_documents_survive_the_whole_road(tmp_path):
    """Read, scored, tokenised, joined, cut: the chunks decode to the documents with EOS between."""
    rng = random.Random(0)
    some = [
        " ".join("".join(rng.choices("abx\n<|>é", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 9)))
        for _ in range(40)
    ]
    some = [text for text in some if text.strip()]
    documents = Documents(folder_of(tmp_path, some), range(len(some)))
    tokenizer = chunks.train_tokenizer((s for d in documents for s in d["segments"]), 280)
    (ids, scores, left), expected = chunked(tokenizer, documents, 8)
    assert_same((ids, scores, left), expected)
    whole = "".join(text + texts.EOS for text in some)
    assert whole.startswith(tokenizer.decode(ids.flatten().tolist()).rstrip("\ufffd"))
    assert left < 8
    assert len(scores.unique()) > 3
