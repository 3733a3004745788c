"""A scored corpus: reading what people have, scores kept and taken up again, tokens segment by
segment, chunks, plans, new models.
"""

import gzip
import json
import multiprocessing
import random
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from common import InputError, files
from pretraining import chunks, corpus, scorers
from pretraining import models as pretrained
from tests import models
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
    documents = splits["train"] + splits["held_out"]
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
        ids, _ = chunks.encode_document(toy_tokenizer, document["segments"], document["scores"])
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
    (folder / "e.txt").write_text("z" * (corpus.LONGEST + 1))
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
        f"longer than {corpus.LONGEST:,} characters": 1,
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
        ("a.txt", b"x" * (corpus.LONGEST + 1), "1 longer than"),
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


def test_rows_of_a_file_and_of_the_hub(tmp_path, words, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"code": "a x"}\n{"code": "b"}\n')
    splits, _ = corpus.load_corpus(**arguments(tmp_path, data=str(path), text_field="code"), say=silent)
    assert sorted("".join(d["segments"]) for d in splits["train"]) == ["a x", "b"]
    monkeypatch.setattr(files, "read_hub", lambda name: {"train": [(f"{name}, row 1", {"text": "from the hub"})]})
    splits, _ = corpus.load_corpus(**arguments(tmp_path, data="someone/texts"), say=silent)
    assert splits["train"] == [{"segments": ["from", " the", " hub"], "scores": [0.0, 0.0, 0.0]}]


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

TEXTS = [f"a{'x' * i} b {'x ' * (i % 5)}c" for i in range(30)]


def fresh(texts=TEXTS) -> list[dict]:
    return [dict(zip(("segments", "scores"), by_words(text))) for text in texts]


def test_cached_scores_equal_fresh_ones_and_nothing_is_scored_twice(tmp_path):
    calls = []
    counting = scorer_of(lambda text: calls.append(text) or by_words(text))
    digest = corpus.sha256_of_texts(TEXTS)
    assert corpus.scored(TEXTS, digest, counting, tmp_path) == fresh()
    assert len(calls) == 30
    assert corpus.scored(TEXTS, digest, counting, tmp_path) == fresh()
    assert len(calls) == 30
    corpus.scored(TEXTS, digest, counting._replace(name="words 1, other"), tmp_path)  # another version of the scorer
    assert len(calls) == 60
    other = [*TEXTS[:-1], "other"]
    assert corpus.scored(other, corpus.sha256_of_texts(other), counting, tmp_path) == fresh(other)
    assert len(calls) == 90
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl"}
    assert len(list(tmp_path.iterdir())) == 3
    assert all(path.name.startswith("words-1-") for path in tmp_path.iterdir())


def test_pep8_of_real_files_cached_and_in_parallel(tmp_path):
    pytest.importorskip("pycodestyle")
    scorer = scorers.load_scorer("pep8")
    texts = [
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("runs.py", "models.py", "__init__.py", "conftest.py")
    ]
    texts = [text.replace(" = ", "=", 5).replace("    return", "\treturn", 2) for text in texts if text]
    expected = [dict(zip(("segments", "scores"), scorer.segments(text))) for text in texts]
    corpus.scored(texts * 20, "many", scorer, tmp_path)  # enough for several processes
    assert corpus.scored(texts * 20, "many", scorer, tmp_path) == expected * 20
    assert max(score for d in expected for score in d["scores"]) > 0


@pytest.mark.parametrize("cut", [0, 7])
def test_an_interrupted_scoring_goes_on_where_it_stopped(cut, tmp_path):
    """Also where a kill cut the last line of the part file."""
    calls, sentences = [], []

    def stops(text):
        if len(calls) == 12:
            raise KeyboardInterrupt
        calls.append(text)
        return by_words(text)

    with pytest.raises(InputError, match=r"stopped after 12 of 30 documents\. They are kept"):
        corpus.scored(TEXTS, "digest", scorer_of(stops), tmp_path)
    part = next(tmp_path.glob("*.part"))
    assert part.read_bytes().count(b"\n") == 12
    if cut:
        part.write_bytes(part.read_bytes()[:-cut])
    calls.clear()
    documents = corpus.scored(
        TEXTS, "digest", scorer_of(lambda text: calls.append(text) or by_words(text)), tmp_path, say=sentences.append
    )
    assert documents == fresh()
    done = 11 if cut else 12
    assert calls == TEXTS[done:]
    assert sentences == [f"Scoring goes on after {done} of 30 documents."]
    assert not list(tmp_path.glob("*.part"))


def slowly(text: str) -> tuple[list[str], list[float]]:
    """Each call leaves a byte behind; slow enough for two processes to meet."""
    with open(Path(text.split("|")[1]) / "calls", "ab") as file:
        file.write(b".")
    time.sleep(0.02)
    return by_words(text)


def test_two_processes_score_once(tmp_path):
    texts = [f"{i}|{tmp_path}|x" for i in range(20)]
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=corpus.scored, args=(texts, "digest", scorer_of(slowly), tmp_path / "scores"))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "calls").stat().st_size == 20
    assert corpus.scored(texts, "digest", scorer_of(), tmp_path / "scores") == fresh(texts)


def test_a_file_of_scores_that_is_not_whole_is_refused(tmp_path):
    corpus.scored(TEXTS, "digest", scorer_of(), tmp_path)
    path = next(tmp_path.glob("*.jsonl"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="29 documents, not of 30"):
        corpus.scored(TEXTS, "digest", scorer_of(), tmp_path)


def test_a_scorer_that_loses_text_is_found_out(tmp_path):
    with pytest.raises(ValueError, match="joined are not the text"):
        corpus.scored(["a b"], "digest", scorer_of(lambda text: (["a"], [0.0])), tmp_path)


def test_a_document_without_a_segment_is_left_out_and_counted(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "none"}\n{"text": "a b"}\n')
    monkeypatch.setattr(
        scorers,
        "load_scorer",
        lambda *args, **words: scorer_of(lambda text: ([], []) if text == "none" else by_words(text)),
    )
    splits, facts = corpus.load_corpus(**arguments(tmp_path, data=str(path)), say=silent)
    assert len(splits["train"]) == 1
    assert facts["left_out"] == {"no segment": 1}


# -- thresholds


def test_thresholds_by_value_and_by_quantile():
    documents = [{"segments": ["a"] * 3, "scores": [0.0, 0.1, 0.8]}, {"segments": ["a"], "scores": [0.5]}]
    assert corpus.threshold_of(documents, 0.0, None) == 0.0  # 0 is a value, not its absence
    assert corpus.threshold_of(documents, 0.3, None) == 0.3
    assert corpus.mean_scores(documents) == pytest.approx([0.3, 0.5])
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


def test_tokens_segment_by_segment():
    """Joined they are the text; a token never spans two segments; each has its segment's score."""
    tokenizer = marked_tokenizer()
    scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    ids, token_scores = chunks.encode_document(tokenizer, SEGMENTS, scores)
    assert tokenizer.decode(ids) == "".join(SEGMENTS)
    place = 0
    for segment, score in zip(SEGMENTS, scores):
        own, _ = chunks.encode_document(tokenizer, [segment], [score])
        assert ids[place : place + len(own)] == own
        assert token_scores[place : place + len(own)] == [score] * len(own)
        assert tokenizer.decode(own) == segment
        place += len(own)
    assert place == len(ids) == len(token_scores)
    merged = tokenizer("".join(SEGMENTS[:3]), add_special_tokens=False).input_ids
    assert merged != ids[: len(merged)]  # the merge of two line breaks would span two segments


def test_what_looks_like_a_special_token_in_a_text_stays_text():
    tokenizer = marked_tokenizer()
    text = "a <|good|><|bad|></s><s><pad> b"
    # Asked plainly, it reads them.
    assert set(tokenizer(text, add_special_tokens=False).input_ids) & set(tokenizer.all_special_ids)
    ids, _ = chunks.encode_document(tokenizer, [text, "</s>"], [0.0, 1.0])
    control = {tokenizer.convert_tokens_to_ids(token) for token in ("<|good|>", "<|bad|>", "<pad>", "<s>", "</s>")}
    assert len(control) == 5
    assert not set(ids) & control
    assert tokenizer.decode(ids) == text + "</s>"
    # And it still does.
    assert tokenizer("<|good|>", add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids("<|good|>")]


def test_marks_stand_before_their_segments_and_have_their_scores():
    tokenizer = marked_tokenizer()
    good, bad = tokenizer.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    plain = [chunks.encode_document(tokenizer, [segment], [0.0])[0] for segment in SEGMENTS[:3]]
    ids, scores = chunks.encode_document(tokenizer, SEGMENTS[:3], [0.0, 0.5, 1.0], [good, None, bad])
    assert ids == [good, *plain[0], *plain[1], bad, *plain[2]]
    assert scores == [0.0] * (1 + len(plain[0])) + [0.5] * len(plain[1]) + [1.0] * (1 + len(plain[2]))
    documents = [
        {"segments": SEGMENTS[i : i + 2], "scores": [0.0, 1.0]} for i in range(4)
    ] * 200  # more than one batch of documents
    marks = [[good if i % 2 else None, bad] for i in range(len(documents))]
    got = list(chunks.encode_documents(tokenizer, documents, iter(marks)))
    assert got == [chunks.encode_document(tokenizer, d["segments"], d["scores"], m) for d, m in zip(documents, marks)]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        chunks.encode_document(tokenizer, ["a", "b"], [0.0])


def test_a_tokenizers_own_truncation_cuts_nothing():
    tokenizer = marked_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    ids, _ = chunks.encode_document(tokenizer, ["a long segment of text", " x"], [0.0, 0.0])
    assert tokenizer.decode(ids) == "a long segment of text x"


def test_a_tokenizer_trained_on_the_corpus():
    texts = [
        Path(__file__).read_text(encoding="utf-8").split("\n"),
        ["café 🙂 <|endoftext|>", "\ttabs", "\n\n    four"],
    ]
    segments = [f"\n{line}" for lines in texts for line in lines]
    tokenizer = chunks.train_tokenizer(iter(segments), 600)
    assert tokenizer.get_vocab() == chunks.train_tokenizer(iter(segments), 600).get_vocab()
    assert len(tokenizer) == 600
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(
        chunks.train_tokenizer(iter(segments), 600).backend_tokenizer.to_str()
    )
    assert tokenizer.eos_token == corpus.EOS
    assert tokenizer.pad_token_id not in {None, tokenizer.eos_token_id}
    assert not {"<|good|>", "<|bad|>"} & set(tokenizer.get_vocab())
    ids, _ = chunks.encode_document(tokenizer, segments, [0.0] * len(segments))
    assert tokenizer.decode(ids) == "".join(segments)
    assert tokenizer.eos_token_id not in ids
    assert len(ids) < 0.6 * len("".join(segments))
    unseen = "\x00 ÿ 漢字 \u2028\r"
    assert tokenizer.decode(chunks.encode_document(tokenizer, [unseen], [0.0])[0]) == unseen
    with pytest.raises(InputError, match="--vocabulary 200"):
        chunks.train_tokenizer(iter(segments), 200)


def test_a_tokenizer_that_is_given(tmp_path, preference_data):
    documents = [{"segments": SEGMENTS, "scores": [0.0] * len(SEGMENTS)}]
    tokenizer = chunks.choose_tokenizer("pii", str(preference_data / "tokenizers/gpt2"), 300, documents)
    assert len(tokenizer) == 50257
    assert tokenizer.decode(chunks.encode_document(tokenizer, SEGMENTS, [0.0] * len(SEGMENTS))[0]) == "".join(SEGMENTS)
    with pytest.raises(InputError, match="does not come back as it was"):  # it puts a space before every text
        chunks.choose_tokenizer("pii", str(preference_data / "models/stories260K"), 300, documents)
    with pytest.raises(InputError, match="--tokenizer"):
        chunks.choose_tokenizer("pii", str(tmp_path), 300, documents)


# -- chunks and plans


def test_documents_are_joined_by_eos_and_cut_without_padding():
    encoded = [([5, 6, 7], [0.1, 0.1, 0.2]), ([], []), ([8], [0.5]), ([9, 9, 9, 9], [0.0, 0.0, 1.0, 1.0])]
    ids, scores, left = chunks.pack(iter(encoded), 2, 4)
    assert ids.tolist() == [[5, 6, 7, 2], [8, 2, 9, 9]]
    assert ids.dtype == torch.int64
    # EOS has the last segment's score.
    torch.testing.assert_close(scores, torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.0, 0.0]]))
    assert left == 3
    ids, scores, left = chunks.pack(iter(encoded), 2, 12)
    assert ids.shape == scores.shape == (0, 12)
    assert left == 11
    assert (torch.tensor([0.3, 0.1]) <= 0.3).all()  # a float32 score equal to the threshold is good


def test_a_plan_spends_the_budget_and_uses_chunks_evenly():
    plan = chunks.plan_chunks(chunks=10, batch_size=4, tokens=30 * 4 * 64, context=64, seed=0)
    assert len(plan) == 30
    assert {len(rows) for rows in plan} == {4}
    order = [i for rows in plan for i in rows]
    for epoch in range(12):
        assert sorted(order[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert order[:10] != order[10:20] != list(range(10))
    assert plan == chunks.plan_chunks(10, 4, 30 * 4 * 64, 64, 0) != chunks.plan_chunks(10, 4, 30 * 4 * 64, 64, 1)
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
    texts = [
        " ".join("".join(rng.choices("abx\n<|>é", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 9)))
        for _ in range(40)
    ]
    texts = [text for text in texts if text.strip()]
    documents = corpus.scored(texts, "digest", scorer_of(), tmp_path)
    tokenizer = chunks.train_tokenizer((s for d in documents for s in d["segments"]), 280)
    ids, scores, left = chunks.pack(chunks.encode_documents(tokenizer, documents), tokenizer.eos_token_id, 8)
    whole = "".join(text + corpus.EOS for text in texts)
    assert whole.startswith(tokenizer.decode(ids.flatten().tolist()).rstrip("\ufffd"))
    assert left < 8
    by_token = [
        s
        for d in documents
        for segment, score in zip(d["segments"], d["scores"])
        for s in [score] * len(chunks.ids_of(tokenizer, [segment])[0])
    ]
    no_eos = ids.flatten() != tokenizer.eos_token_id
    torch.testing.assert_close(scores.flatten()[no_eos], torch.tensor(by_token)[: int(no_eos.sum())])
    assert len(set(by_token)) > 3
