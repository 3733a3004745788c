"""Scorers of a corpus: segments that joined are the text, violations on their lines, each scorer
against its package asked directly.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from common import InputError
from pretraining import scorers
from tests import models

CODE = (
    "import os, sys\n"  # E401
    "x=1\n"  # E225
    "\n"
    "def f( a ):\n"  # E302, E201, E202
    "    return {'a':1,\n"  # E231
    "        'b': 2}   \n"  # W291 (E128 belongs to the continuation line)
    "y = [1,\n"
    "     2 ,3]\n"  # E203, E231
    "\n"
    "\n"
    "\n"
    "\n"
    # E501, E303, E305
    "z = 'a long line ....................................................................................'\n"
)


def pycodestyle_lines(text: str, tmp_path) -> list[int]:
    """Lines, from 1, of the violations that the program reports for a file."""
    pytest.importorskip("pycodestyle")
    (tmp_path / "code.py").write_text(text, encoding="utf-8")
    output = subprocess.run(
        [sys.executable, "-m", "pycodestyle", "code.py"], cwd=tmp_path, capture_output=True, text=True
    ).stdout
    return sorted(int(line.split(":")[1]) for line in output.splitlines() if " W292 " not in line)


# -- segments


def test_lines_joined_are_the_text_and_a_break_belongs_to_the_line_behind_it():
    assert scorers.split_lines("a\n\n  b\nc") == ["a", "\n", "\n  b", "\nc"]
    assert scorers.split_lines("a\nb\n") == ["a", "\nb\n"]
    assert scorers.split_lines("\na") == ["\na"]
    assert scorers.split_lines("a\n\n") == ["a", "\n\n"]
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab \n\t", k=rng.randint(1, 12)))
        assert "".join(scorers.split_lines(text)) == text
        assert all("\n" not in part[1:].removesuffix("\n") for part in scorers.split_lines(text))


def test_sentences_joined_are_the_text_and_white_space_leads():
    pytest.importorskip("sentencex")
    text = '  Mr. Smith went to Washington on Jan. 5th.  He said "Hello."\tWhat? Nothing!'
    text += "\n\n \nA new paragraph... it goes on.\n"
    parts = scorers.split_sentences(text)
    assert parts[:2] == ["  Mr. Smith went to Washington on Jan. 5th.", '  He said "Hello."']
    rng = random.Random(0)
    texts = [text, *("".join(rng.choices("aB.?! \n\t\"'“”…é。", k=rng.randint(1, 60))) for _ in range(300))]
    for text in texts:
        parts = scorers.split_sentences(text)
        assert "".join(parts) == (text if text.strip() else "")
        assert all(part.strip() and part == part.rstrip() for part in parts[:-1])


def test_sentences_are_cut_at_paragraphs_without_a_full_stop():
    pytest.importorskip("sentencex")
    assert scorers.split_sentences("A title\n\nThe text. More.") == ["A title", "\n\nThe text.", " More."]


# -- pep8


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        "\n" + CODE,
        "\n\n\n" + CODE,
        CODE + "f(",
        CODE + "\n\n\n",
        CODE.replace("\n", "\n\n"),
        "x = (1,\n",
        " x = 1\n",
        "if 1:\nx\n",
    ],
)
def test_violations_stand_on_the_lines_that_pycodestyle_names(text, tmp_path):
    expected = pycodestyle_lines(text, tmp_path)
    assert sorted(line + 1 for line in scorers.violations(text)) == expected
    segments, scores = scorers.pep8_segments(text)
    assert "".join(segments) == text
    counts = [round(score * len(segment)) for segment, score in zip(segments, scores)]
    assert sum(counts) == len(expected)  # none is lost where a break has no line of its own
    by_line = {}
    for line in expected:
        by_line[min(line, text.count("\n") + 1)] = by_line.get(min(line, text.count("\n") + 1), 0) + 1
    first = 2 if text[0] == "\n" else 1  # the line on which the first segment ends
    for place, count in enumerate(counts[1:-1], first + 1):
        assert count == by_line.get(place, 0)


def test_the_score_of_a_line_and_of_a_text():
    pytest.importorskip("pycodestyle")
    segments, scores = scorers.pep8_segments("x=1\ny = 2\nz = 3 \n")
    assert segments == ["x=1", "\ny = 2", "\nz = 3 \n"]
    # E225 on three characters; W291 on a line of six with the break before it and the one behind.
    assert scores == [1 / 3, 0.0, 1 / 8]
    assert scorers.pep8("x=1\ny = 2\n") == 1 / 10
    assert scorers.pep8("") == 0.0
    assert scorers.pep8("x = 1") == 0.0  # no line break at the end of a text that is cut


def test_a_users_configuration_of_pycodestyle_changes_nothing(tmp_path, monkeypatch):
    pycodestyle = pytest.importorskip("pycodestyle")
    (tmp_path / "setup.cfg").write_text("[pycodestyle]\nmax-line-length = 200\nignore = E225\n")
    expected = scorers.violations(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pycodestyle, "USER_CONFIG", str(tmp_path / "setup.cfg"))
    scorers.style.cache_clear()
    try:
        assert scorers.violations(CODE) == expected
        assert len(expected) > 5
    finally:
        scorers.style.cache_clear()


def test_whatever_a_model_writes_is_scored():
    pytest.importorskip("pycodestyle")
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            rng.choices(
                [
                    "x",
                    "=",
                    " ",
                    "\n",
                    "\t",
                    "(",
                    "]",
                    "'",
                    '"""',
                    "\\",
                    "#",
                    "def ",
                    ":",
                    "\0",
                    "\x0c",
                    "é",
                    "\u2028",
                    "1",
                    "lambda ",
                ],
                k=20,
            )
        )
        assert scorers.pep8(text) >= 0
        if text.strip():
            segments, scores = scorers.pep8_segments(text)
            assert "".join(segments) == text
            assert len(scores) == len(segments)


# -- pii


def test_personal_information_is_counted_per_character():
    pytest.importorskip("scrubadub")
    pytest.importorskip("sentencex")
    scorer = scorers.load_scorer("pii")
    text = "Write to joe@example.com or ann@example.org. There is nothing here. See http://example.com/x now."
    segments, scores = scorer.segments(text)
    assert segments == [
        "Write to joe@example.com or ann@example.org.",
        " There is nothing here.",
        " See http://example.com/x now.",
    ]
    assert scores == [2 / len(segments[0]), 0.0, 1 / len(segments[2])]
    assert scorer.whole([text, "", "nothing"]) == [3 / len(text), 0.0, 0.0]


# -- toxicity


def classifier(folder, tokenizer, labels=("obscene", "toxicity", "insult")):
    """A random BERT of two layers with a sigmoid for each label, as Detoxify's models are."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "initializer_range": 0.3,
    }
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return models.save(
        BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **shape, **names)).eval(),
        tokenizer,
        folder,
    )


def test_toxicity_is_the_sigmoid_of_its_label_and_company_changes_nothing(tmp_path, toy_tokenizer):
    pytest.importorskip("sentencex")
    from transformers import AutoModelForSequenceClassification

    folder = classifier(tmp_path / "detoxify", toy_tokenizer)
    scorer = scorers.load_scorer("toxicity", str(folder))
    texts = ["the capital of france is paris", "you fool", "it is red , you fool . now go away .", ""] + ["grass " * 60]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = [
            model(torch.tensor([toy_tokenizer(text).input_ids[:24]])).logits[0, 1].sigmoid().item() for text in texts
        ]
    assert scorer.whole(texts) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01
    segments, scores = scorer.segments("It is red. You fool.")
    assert segments == ["It is red.", " You fool."]
    assert scores == pytest.approx(scorer.whole(segments), abs=1e-6)


def test_a_classifier_without_a_label_for_toxicity_is_refused(tmp_path, toy_tokenizer):
    pytest.importorskip("sentencex")
    folder = classifier(tmp_path / "other", toy_tokenizer, ("joy", "anger", "fear"))
    with pytest.raises(InputError, match="no label toxicity or toxic"):
        scorers.load_scorer("toxicity", str(folder))
    with pytest.raises(InputError, match=r"--scorer .*no config.json"):
        scorers.load_scorer("toxicity", str(tmp_path))


def test_the_corpus_is_scored_by_original_and_samples_by_unbiased(monkeypatch):
    pytest.importorskip("sentencex")
    asked = []
    monkeypatch.setattr(
        scorers, "detoxify", lambda name, device: asked.append(name) or (lambda texts: [0.0] * len(texts), "1")
    )
    for words in ({}, {"samples": True}, {"scorer": "mine"}, {"scorer": "mine", "samples": True}):
        scorers.load_scorer("toxicity", **words)
    assert asked == ["original", "unbiased", "mine", "mine"]
    assert set(scorers.DETOXIFY) == {"original", "unbiased"}


# -- packages


@pytest.mark.parametrize(
    ("task", "package"),
    [("pep8", "pycodestyle"), ("pii", "scrubadub"), ("pii", "sentencex"), ("toxicity", "sentencex")],
)
def test_a_missing_package_is_named(task, package, monkeypatch):
    for other in {"pycodestyle", "scrubadub", "sentencex"} - {package}:
        if task == "pii":
            pytest.importorskip(other)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"--task {task} needs .*pip install {package}"):
        scorers.load_scorer(task)


def test_a_scorer_is_chosen_for_toxicity_only():
    with pytest.raises(InputError, match="--scorer original"):
        scorers.load_scorer("pep8", "original")


def test_the_name_of_a_scorer_has_its_version():
    pycodestyle = pytest.importorskip("pycodestyle")
    assert pycodestyle.__version__ in scorers.load_scorer("pep8").name
    assert sys.version.split()[0] in scorers.load_scorer("pep8").name


def test_several_processes_score_as_one_does():
    pytest.importorskip("pycodestyle")
    rng = random.Random(0)
    texts = ["\n".join(rng.choices(CODE.split("\n"), k=5)) for _ in range(50)]
    assert list(scorers.in_parallel(scorers.pep8_segments, texts, 2)) == list(map(scorers.pep8_segments, texts))
    many = texts * (1 + 400_000 // sum(map(len, texts)))
    assert scorers.load_scorer("pep8").whole(many) == list(map(scorers.pep8, texts)) * (len(many) // len(texts))


def test_many_items_wait_in_no_memory(monkeypatch):
    """They are asked for as the processes come to them, and come back in order."""
    monkeypatch.setattr(scorers, "processors", lambda: 2)
    asked = []
    items = (asked.append(i) or "x" * 60_000 for i in range(40))
    lengths = scorers.in_parallel(len, items, 2)
    assert next(lengths) == 60_000
    assert len(asked) <= 12  # five bundles of two, and what was begun
    assert list(lengths) == [60_000] * 39


def test_a_process_that_is_killed_ends_the_work_in_one_sentence(monkeypatch):
    monkeypatch.setattr(scorers, "processors", lambda: 2)
    with pytest.raises(InputError, match="was killed, perhaps for want of memory"):
        list(scorers.in_parallel(killed, ["x"] * 3, 2))


def killed(text: str) -> None:
    """Ends its process."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_end_with_the_one_that_started_them(tmp_path, monkeypatch):
    monkeypatch.setattr(scorers, "processors", lambda: 2)
    process = multiprocessing.get_context("fork").Process(target=work_for_long, args=(tmp_path,))
    process.start()
    wait_until(lambda: len(list(tmp_path.iterdir())) >= 1)
    process.kill()
    process.join()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    wait_until(lambda: not any(map(is_alive, workers)))
    left = [pid for pid in workers if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def work_for_long(folder) -> None:
    """Two processes that leave their numbers in a folder."""
    list(scorers.in_parallel(partial(leave_number, folder), ["x" * 100_000] * 600, 2))


def leave_number(folder, text: str) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().split()[2] != "Z"  # ended, and nobody has asked how


def wait_until(condition) -> None:
    """Waits for a condition, twenty seconds at most."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
