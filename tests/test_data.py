"""Rows in, batches out: formats, text to tokens, bad input, the order of training, collation."""

import csv
import datetime
import gzip
import io
import json
import random
from collections import Counter

import pytest
import torch

from common import InputError, batches, data, fields, files
from tests import models
from tests.runs import CHAT, lines_file

BOS, EOS = 1, 2
SEVERAL = "several answers on a side, which only common.evaluate reads"
# Thoughts of earlier turns vanish, and every turn is earlier once another follows: what reasoning
# models' templates do.
FORGETFUL = (
    "{% for m in messages %}{{ '[' + m.role + ']' }}"
    "{{ m.content if loop.last else m.content.split('!')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="module")
def plain():
    """A tokenizer without BOS."""
    return models.byte_tokenizer()


@pytest.fixture(scope="module")
def with_bos():
    return models.byte_tokenizer(bos=True)


@pytest.fixture(scope="module")
def chat():
    return models.byte_tokenizer(bos=True, chat_template=CHAT)


@pytest.fixture(scope="module")
def gpt2_tokenizer(preference_data):
    """The real GPT-2 tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(preference_data / "tokenizers" / "gpt2")


def load(path, tokenizer, max_length=64, eval_data=None, holdout=0.0, say=lambda words: None):
    """Pairs of a file."""
    return data.load_pairs(str(path), eval_data, holdout, 0, tokenizer, max_length, say)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pair(row):
    """The pair of a row that must be usable."""
    texts, reason = fields.pair_of_row("file, line 1", row)
    assert reason is None, reason
    return texts


def reason_of(row):
    """The reason for which a row is dropped."""
    texts, reason = fields.pair_of_row("file, line 1", row)
    assert texts is None
    return reason


# -- row formats


def test_plain_rows_are_taken_as_they_are():
    assert pair({"prompt": "Say hi.", "chosen": " hi", "rejected": "no ", "votes": 3}) == ("Say hi.", " hi", "no ")


def test_dialogues_with_an_implicit_prompt_are_cut_after_the_last_common_turn():
    start = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"
    assert pair({"chosen": start + " yes", "rejected": start + " yes, no"}) == (start, " yes", " yes, no")
    # turns that come after the first difference belong to the answers
    chosen, rejected = start + " d\n\nHuman: e\n\nAssistant: f", start + " g\n\nHuman: e\n\nAssistant: f"
    assert pair({"chosen": chosen, "rejected": rejected}) == (start, chosen[len(start) :], rejected[len(start) :])
    # the dialogues part inside a human turn: the last *common* assistant turn is the first one
    chosen, rejected = (
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: x\n\nAssistant: d",
    )
    assert pair({"chosen": chosen, "rejected": rejected})[0] == "\n\nHuman: a\n\nAssistant:"
    # a marker that is common only in part is not a turn
    assert pair({"chosen": "one two\n\nAssistant: x", "rejected": "one two\n\nAssistant, y"})[0] == "one two\n"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky", "The sky is blue", "The"),
        ("The sky is blue", "The sky", "The"),
        ("The sky is blue", "The sky was blue", "The sky"),
        ("The sky is red", "The sky is rust", "The sky is"),
        ("one\ttwo", "one\tthree", "one"),
        ("two words ", "two words", "two"),
    ],
)
def test_other_implicit_prompts_are_cut_at_whitespace(chosen, rejected, prompt):
    assert pair({"chosen": chosen, "rejected": rejected}) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("yes", "no"), ("The", "A word"), ("aa bb", "ab bb"), (" yes", " no"), ("word", "words")]
)
def test_without_a_common_prompt_a_row_is_dropped(chosen, rejected):
    assert reason_of({"chosen": chosen, "rejected": rejected}) == "no common prompt"


def test_chat_messages():
    question, yes, no = user("q"), assistant("yes"), assistant("no")
    expected = ([question], [yes], [no])
    assert pair({"prompt": [question], "chosen": [yes], "rejected": [no]}) == expected
    assert (
        pair({"prompt": [question], "chosen": [question, yes], "rejected": [question, no]}) == expected
    )  # whole dialogues beside their prompt
    assert pair({"chosen": [question, yes], "rejected": [question, no]}) == expected
    assert (
        pair({"prompt": "q", "chosen": [question, yes], "rejected": [question, no]}) == expected
    )  # as UltraFeedback has it
    assert pair({"prompt": "q", "chosen": [yes], "rejected": [no]}) == expected
    turns = [user("a"), assistant("b"), user("c")]
    assert pair({"chosen": [*turns, yes], "rejected": [*turns, no]}) == (turns, [yes], [no])
    # the same prompt, and answers of different length
    assert pair({"chosen": [question, yes], "rejected": [question, no, user("why"), yes]}) == (
        [question],
        [yes],
        [no, user("why"), yes],
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "both answers are identical"),
        ({"chosen": "p a", "rejected": "p a"}, "both answers are identical"),
        ({"prompt": "p", "chosen": "", "rejected": "a"}, "an answer is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "an answer is empty"),
        ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "an answer is empty"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "a field is neither text nor chat messages"),
        ({"prompt": 7, "chosen": "a", "rejected": "b"}, "a field is neither text nor chat messages"),
        ({"prompt": "p", "chosen": 7, "rejected": 8}, "a field is neither text nor chat messages"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "a field is neither text nor chat messages"),
        ({"prompt": "p", "chosen": True, "rejected": "b"}, "a field is neither text nor chat messages"),
        ({"prompt": "p", "chosen": [], "rejected": []}, "a field is neither text nor chat messages"),
        ({"prompt": "p", "chosen": [7], "rejected": ["b", "c"]}, SEVERAL),
        ({"prompt": "p", "chosen": ["a"], "rejected": ["b"]}, SEVERAL),
        (
            {"prompt": "p", "chosen": [{"role": "user"}], "rejected": [{"role": "user"}]},
            "a field is neither text nor chat messages",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "half \ud800"}, "a field is not valid Unicode text"),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]},
            "both answers are identical",
        ),
        ({"chosen": [user("q"), assistant(" ")], "rejected": [user("q"), assistant("a")]}, "an answer is empty"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no common prompt"),
        ({"prompt": [user("q")], "chosen": [user("q")], "rejected": [user("q"), assistant("b")]}, "an answer is empty"),
    ],
)
def test_unusable_rows_are_dropped_with_a_reason(row, reason):
    assert reason_of(row) == reason


# -- text to tokens


def test_a_token_across_the_boundary_moves_it_left_in_both_answers(plain):
    ids = plain.convert_tokens_to_ids
    example, reason, moved = data.encode_row(plain, "xa", ["bc", "d"], 64)
    assert reason is None
    assert moved
    assert example == {"prompt": ids(["x"]), "completions": [[*ids(["ab", "c"]), EOS], [*ids(["a", "d"]), EOS]]}
    example, _, moved = data.encode_row(plain, "xa", ["cb", "d"], 64)  # nothing merges: nothing moves
    assert not moved
    assert example == {"prompt": ids(["x", "a"]), "completions": [[*ids(["c", "b"]), EOS], [*ids(["d"]), EOS]]}


def test_a_merge_with_the_first_token_leaves_no_prompt(plain, with_bos):
    assert data.encode_row(plain, "a", ["b", "c"], 64) == (None, "prompt and answers share no token", False)
    example, _, moved = data.encode_row(with_bos, "a", ["b", "c"], 64)
    assert moved
    assert example["prompt"] == [BOS]  # where there is a BOS, it is the prompt


def test_the_real_gpt2_tokenizer_merges_across_the_boundary(gpt2_tokenizer):
    example, _, moved = data.encode_row(gpt2_tokenizer, "Is it? Answer: ", ["yes", "no way"], 64)
    assert moved
    assert example["prompt"] == gpt2_tokenizer("Is it? Answer:").input_ids
    assert example["completions"] == [
        gpt2_tokenizer(" yes").input_ids + [50256],
        gpt2_tokenizer(" no way").input_ids + [50256],
    ]
    assert (
        gpt2_tokenizer("Is it? Answer: yes").input_ids == example["prompt"] + example["completions"][0][:-1]
    )  # no separate tokenisation
    # only one answer merges with the prompt, and the boundary moves for both
    example, _, moved = data.encode_row(gpt2_tokenizer, "go in", ["side", ", out"], 64)
    assert moved
    assert example["prompt"] == gpt2_tokenizer("go").input_ids
    assert example["completions"] == [
        gpt2_tokenizer(" inside").input_ids + [50256],
        gpt2_tokenizer(" in, out").input_ids + [50256],
    ]


@pytest.mark.parametrize("prompt", ["Hello there", "x\n\n", "tab\t", "a b "])
@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_completion_are_the_reading_of_the_whole_text(prompt, bos):
    tokenizer = models.byte_tokenizer(bos=bos)
    answers = [" the table", "\n\nb", "ab", "t"]
    example, _, _ = data.encode_row(tokenizer, prompt, answers, 99)
    for answer, completion in zip(answers, example["completions"]):
        assert example["prompt"] + completion == [*tokenizer(prompt + answer).input_ids, EOS]
    ids = [*example["prompt"], *(i for completion in example["completions"] for i in completion)]
    assert ids.count(BOS) == bos  # once before the prompt, never in a completion


def test_eos_exactly_once_and_none_where_cut(with_bos):
    def completion(answer, max_length=64, tokenizer=with_bos):
        return data.encode_row(tokenizer, "x", [answer, "zz"], max_length)[0]["completions"][0]

    c, d = with_bos.convert_tokens_to_ids(["c", "d"])
    assert completion("cd") == [c, d, EOS]
    assert completion("cd</s>") == [c, d, EOS]  # the text ends in it already
    assert completion("cd", max_length=5) == [c, d, EOS]  # <s> x c d </s> fits exactly
    assert completion("cd", max_length=4) == [c, d]  # cut: EOS is lost with the end, and none is put in its place
    assert completion("cd", max_length=3) == [c]
    # a tokenizer that ends every text in EOS
    assert completion("cd", tokenizer=models.byte_tokenizer(bos=True, eos=True)) == [c, d, EOS]


def test_a_tokenizer_that_appends_eos_moves_no_boundary():
    tokenizer = models.byte_tokenizer(bos=True, eos=True)
    example, _, moved = data.encode_row(tokenizer, "x", ["c", "d"], 64)
    assert not moved
    assert example["prompt"] == [BOS, *tokenizer.convert_tokens_to_ids(["x"])]
    assert data.encode_row(tokenizer, "xa", ["b", "d"], 64)[2]  # a merge still is one


def test_a_prompt_that_fills_max_length_is_refused_and_never_cut(with_bos):
    assert data.encode_row(with_bos, "12345", ["c", "d"], 6) == (None, "the prompt alone fills max_length", False)
    assert data.encode_row(with_bos, "12345", ["c", "d"], 3)[1] == "the prompt alone fills max_length"
    example, reason, _ = data.encode_row(with_bos, "12345", ["c", "dd"], 7)
    assert reason is None
    assert [len(example["prompt"]), *map(len, example["completions"])] == [
        6,
        1,
        1,
    ]  # one token of each answer is left, never none


def test_chat_template_ids_have_one_bos_one_eos_and_keep_the_prompt(chat):
    prompt, answer, other = [user("hi")], [assistant("yo")], [assistant("no, bye")]
    example, reason, moved = data.encode_row(chat, prompt, [answer, other], 99)
    assert (reason, moved) == (None, False)
    assert chat.decode(example["prompt"]) == "<s>[user]hi</s>\n[assistant]"
    assert [chat.decode(ids) for ids in example["completions"]] == [
        "yo</s>\n",
        "no, bye</s>\n",
    ]  # the end of turn is learned, no EOS is added
    assert example["prompt"].count(BOS) == 1
    assert all(ids.count(EOS) == 1 and BOS not in ids for ids in example["completions"])
    assert len(example["prompt"]) > 2  # transformers 5 returns a dict of two entries where text is not asked for


def test_a_template_without_eos_gets_one():
    tokenizer = models.byte_tokenizer(chat_template=CHAT.replace("</s>", ".").replace("{{ '<s>' }}", ""))
    example, _, _ = data.encode_row(tokenizer, [user("hi")], [[assistant("yo")], [assistant("no")]], 99)
    assert [tokenizer.decode(ids) for ids in example["completions"]] == ["yo.\n</s>", "no.\n</s>"]


def test_cut_chat_answers_have_no_eos(chat):
    example, _, _ = data.encode_row(
        chat, [user("hi")], [[assistant("yo yo")], [assistant("no")]], len("<[user]hi<\n[assistant]") + 3
    )
    assert [chat.decode(ids) for ids in example["completions"]] == ["yo ", "no</s>"]


def test_a_template_that_rewrites_the_past_is_refused():
    tokenizer = models.byte_tokenizer(chat_template=FORGETFUL)
    kept = data.encode_row(tokenizer, [user("hi")], [[assistant("yo")], [assistant("no")]], 99)
    assert kept[1] is None
    refused = data.encode_row(tokenizer, [user("think! hi")], [[assistant("yo")], [assistant("no")]], 99)
    assert refused == (None, "the chat template does not keep the prompt's tokens when an answer follows", False)


def test_templates_that_are_missing_or_raise_refuse_the_row(plain):
    messages = ([user("hi")], [[assistant("yo")], [assistant("no")]])
    assert data.encode_row(plain, *messages, 99)[1] == "chat messages, but the tokenizer has no chat template"
    strict = models.byte_tokenizer(chat_template="{{ raise_exception('System role not supported') }}")
    assert data.encode_row(strict, *messages, 99) == (
        None,
        "the chat template refuses the messages: System role not supported",
        False,
    )


def test_real_dialogues_are_cut_where_the_answers_begin(preference_data):
    for name in ("hh_harmless_base", "hh_helpful_base"):
        rows = files.read_rows(str(preference_data / "pairs" / f"{name}.jsonl.gz"))
        used = 0
        for where, row in rows:
            parts, reason = fields.pair_of_row(where, row)
            if reason:
                same = row["chosen"] == row["rejected"]
                assert reason == ("both answers are identical" if same else "an answer is empty"), (where, reason)
                continue
            used += 1
            prompt, chosen, rejected = parts
            assert prompt.endswith("\n\nAssistant:")
            assert (prompt + chosen, prompt + rejected) == (row["chosen"], row["rejected"])
            begin = next(i for i, (a, b) in enumerate(zip(chosen + "\0", rejected + "\0")) if a != b)
            assert "\n\nAssistant:" not in chosen[:begin]  # no later common turn
        assert used > 0.98 * len(rows)


# -- reading


ROWS = [
    {"prompt": "1", "chosen": 'a, "b"\nc', "rejected": "ü\u2028d"},
    {"prompt": "02", "chosen": "x", "rejected": "NaN"},
]


def csv_text(rows):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def parquet_bytes(rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "json lines", "csv", "parquet", "bom"])
def test_every_format_gives_the_same_rows(tmp_path, kind, zipped):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    name, content = {
        "jsonl": ("rows.jsonl", lines.replace(b"\n", b"\r\n") + b"\n"),
        "json": ("rows.json", json.dumps(ROWS, indent=1).encode()),
        "json lines": ("rows.json", lines),
        "csv": ("rows.csv", csv_text(ROWS).encode()),
        "parquet": ("rows.parquet", parquet_bytes(ROWS) if kind == "parquet" else b""),
        "bom": ("rows.jsonl", b"\xef\xbb\xbf" + lines),
    }[kind]
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert [row for _, row in files.read_rows(str(path))] == ROWS


def test_values_keep_their_types(tmp_path):
    row = {"chosen": "5", "rejected": 5, "a": 5.0, "b": None, "c": True, "d": "2020-01-01", "e": [], "f": {"g": 1}}
    ((where, loaded),) = files.read_rows(lines_file(tmp_path, [row]))
    assert loaded == row
    assert {k: type(v) for k, v in loaded.items()} == {k: type(v) for k, v in row.items()}
    assert where.endswith("rows.jsonl, line 1")


def test_chat_messages_survive_parquet(tmp_path):
    row = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet_bytes([row]))
    ((_, loaded),) = files.read_rows(str(path))
    assert pair(loaded) == ([user("q")], [assistant("a")], [assistant("b")])


GOOD = b'{"chosen": "p a", "rejected": "p b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.jsonl", None, ["no such file"]),
        ("rows.txt", b"hello", ["unknown kind of file", ".jsonl"]),
        ("rows.jsonl", b"", ["no rows"]),
        ("rows.jsonl", b"\n \n", ["no rows"]),
        ("rows.json", b"[]", ["no rows"]),
        ("rows.csv", b"prompt,chosen,rejected\n", ["no rows"]),
        ("rows.jsonl", GOOD * 2 + b'{"chosen": "x", \n' + GOOD, ["line 3", "not valid JSON"]),
        ("rows.jsonl", GOOD + b"{'chosen': 'x'}\n", ["line 2", "not valid JSON", "character 2"]),
        ("rows.jsonl", GOOD + b"[1, 2]\n", ["line 2", "expected an object", "list"]),
        ("rows.jsonl", GOOD + b'"words"\n', ["line 2", "expected an object", "str"]),
        ("rows.jsonl", GOOD + b"[" * 200_000, ["line 2", "not readable JSON"]),
        ("rows.json", b'[{"chosen": "a"},\n {"chosen"]\n', ["line 2", "not valid JSON"]),
        ("rows.json", b"[1]", ["row 1", "expected an object", "int"]),
        ("rows.jsonl", GOOD * 3 + b'{"chosen": "caf\xe9"}\n', ["line 4", "not UTF-8"]),
        ("rows.jsonl.gz", b"this is not gzip", ["cannot be read"]),
        ("rows.jsonl.gz", gzip.compress(GOOD * 999, mtime=0)[:-20], ["cannot be read"]),
        (
            "rows.jsonl.gz",
            gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 40,
            ["cannot be read"],
        ),  # a whole header, and no deflate stream behind it
        ("rows.parquet", b"PAR1 this is not parquet", ["not a readable parquet file"]),
        ("rows.parquet", b"", ["not a readable parquet file"]),
        ("rows.csv", b"prompt,chosen,rejected\np,a,b\np,a,b,c\n", ["line 3", "more values than the header"]),
        ("rows.csv", b'prompt,chosen,rejected\np,a,b\np,"a,b\n', ["line 3", "not valid CSV"]),
    ],
)
def test_unreadable_files_stop_with_file_and_line(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        files.read_rows(str(path))
    assert isinstance(caught.value.code, str)  # Python prints it and exits with status 1
    for word in [name, *words]:
        assert word in caught.value.code, caught.value.code
    assert "\n" not in caught.value.code


def test_a_column_that_comes_twice_in_parquet_is_refused(tmp_path):
    """A row would keep the last one alone."""
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"]), path)
    with pytest.raises(InputError, match=r"rows\.parquet: .*Multiple matches.*prompt"):
        files.read_rows(str(path))


def test_messages_may_hold_times(tmp_path, chat):
    """As chat logs in parquet do: they are compared, split by prompt and written like others."""
    import pyarrow
    from pyarrow import parquet

    at = datetime.datetime(2024, 2, 29)
    row = {"prompt": [user("a") | {"at": at}], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    splits, _ = load(path, chat)
    assert len(splits["train"]) == 1
    assert files.plain({"at": at, "raw": b"x"}) == {"at": str(at), "raw": "b'x'"}


@pytest.mark.parametrize("depth", [150, 950, 100_000])
def test_lists_without_end_are_refused(depth, tmp_path):
    deep = "[" * depth + "]" * depth
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ' + deep + "}\n")
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2"):
        files.read_rows(str(path))


def test_large_answers_fit_into_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\np," + "a" * 300_000 + ",b\n")
    assert len(files.read_rows(str(path))[0][1]["chosen"]) == 300_000


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_missing_column_names_line_and_field(tmp_path, plain, field):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = lines_file(tmp_path, [row, {k: v for k, v in row.items() if k != field}])
    with pytest.raises(InputError) as caught:
        load(path, plain)
    for word in ("rows.jsonl, line 2", f'no field "{field}"', "found prompt"):
        assert word in caught.value.code


def test_drops_are_counted_by_reason_and_said(tmp_path, plain):
    good = [{"prompt": f"q{i}", "chosen": " yes", "rejected": " no"} for i in range(5)]
    bad = [{"prompt": "p", "chosen": "a", "rejected": "a"}] * 3 + [{"prompt": "p", "chosen": "", "rejected": "a"}] * 2
    long = [{"prompt": "p" * 40, "chosen": "a", "rejected": "b"}]
    merged = [{"prompt": "xa", "chosen": "b", "rejected": "c"}]
    printed = []
    splits, _ = load(lines_file(tmp_path, bad + good + long + merged), plain, 32, say=printed.append)
    train = splits["train"]
    assert (train.seen, len(train), train.moved) == (12, 6, 1)
    assert train.dropped == Counter(
        {"both answers are identical": 3, "an answer is empty": 2, "the prompt alone fills max_length": 1}
    )
    assert [row["texts"][0] for row in train] == [f"q{i}" for i in range(5)] + [
        "xa"
    ]  # texts and examples stay side by side
    assert printed[0] == (
        "Training rows: 12 rows read, 6 used; dropped 3 (both answers are identical), 2 (an answer is empty), "
        "1 (the prompt alone fills max_length); in 1 the boundary moved left (a token spans prompt and answer, or the "
        "template's generation prompt is not kept); "
        f"{sum(2 * len(row['prompt']) + sum(map(len, row['completions'])) for row in train)} tokens."
    )


def test_nothing_left_stops_the_run(tmp_path, plain):
    good = lines_file(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    bad = lines_file(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "a"}] * 2, "bad.jsonl")
    with pytest.raises(InputError, match=r"no usable row is left to train on \(2 both answers are identical\)"):
        load(bad, plain)
    with pytest.raises(InputError, match=r"--eval-data .*bad\.jsonl: no usable row is left to evaluate on"):
        load(good, plain, eval_data=bad)
    with pytest.raises(InputError, match="the prompt alone fills max_length"):
        load(good, plain, 1)


def test_eval_data_is_the_held_out_split(tmp_path, plain):
    train = lines_file(tmp_path, [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(10)])
    held_out = lines_file(
        tmp_path, [{"prompt": f"e{i}", "chosen": "a", "rejected": "b"} for i in range(3)], "eval.jsonl"
    )
    splits, digest = load(train, plain, eval_data=held_out, holdout=0.5)
    assert [len(splits["train"]), len(splits["held_out"])] == [10, 3]
    assert digest != load(train, plain)[1]  # the hash is of all rows read


def test_splits_of_the_hub(monkeypatch):
    import datasets

    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    served, asked = {}, []

    def load(name, subset=None, data_dir=None):
        asked.append((name, subset, data_dir))
        if subset == "folder":
            raise ValueError("BuilderConfig 'folder' not found.")
        return served

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(files, "check_hub_id", lambda name, kind: None)
    served.update(train=[row, row], validation=[row])
    splits = files.read_hub("owner/name")
    assert {k: len(v) for k, v in splits.items()} == {"train": 2, "test": 1}
    assert splits["test"][0][0] == "owner/name, validation row 1"
    assert (
        files.read_hub("owner/name:folder")["train"][1][1] == row
    )  # no configuration of that name: a folder of the data
    assert asked == [("owner/name", None, None), ("owner/name", "folder", None), ("owner/name", None, "folder")]
    served.clear()
    served.update(extra=[row])
    with pytest.raises(InputError, match=r"no train split \(found extra\)"):
        files.read_hub("owner/name")


def test_the_hash_is_of_the_rows_and_not_of_the_file(tmp_path, plain):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    digests = set()
    for name, text in (
        ("a.jsonl", json.dumps(row)),
        ("b.json", json.dumps([dict(reversed(row.items()))], indent=2)),
        ("c.csv", csv_text([row])),
    ):
        (tmp_path / name).write_text(text)
        digests.add(load(tmp_path / name, plain)[1])
    assert len(digests) == 1
    assert data.sha256_of([row | {"rejected": "c"}]) not in digests


# -- the split


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5])
def test_the_split_is_by_prompt_and_its_share_exact(share):
    rng = random.Random(0)
    rows = [(prompt, f"c{i}", "r") for i in range(400) for prompt in [f"p{rng.randrange(40)}"]]
    prompts = {row[0] for row in rows}
    assert len(prompts) == 40
    train, held_out = data.split_by_prompt(rows, share, seed=3)
    assert {row[0] for row in train} & {row[0] for row in held_out} == set()
    assert len({row[0] for row in held_out}) == round(share * 40)
    assert sorted(train + held_out) == sorted(rows)
    assert train == [row for row in rows if row in set(train)]  # the rows' order stays
    assert data.split_by_prompt(rows, share, seed=3) == (train, held_out)
    shuffled = rng.sample(rows, len(rows))
    assert {row[0] for row in data.split_by_prompt(shuffled, share, seed=3)[1]} == {
        row[0] for row in held_out
    }  # whatever order the file has
    if share:
        assert {row[0] for row in data.split_by_prompt(rows, share, seed=4)[1]} != {row[0] for row in held_out}


def test_chat_prompts_are_split_by_prompt_too():
    rows = [([user(f"q{i % 10}")], [assistant(f"a{i}")], [assistant("b")]) for i in range(50)]
    train, held_out = data.split_by_prompt(rows, 0.3, seed=0)
    assert len(held_out) == 15
    assert not {row[0][0]["content"] for row in train} & {row[0][0]["content"] for row in held_out}


# -- order of training


def random_rows(count, seed=0, answers=2, longest=30):
    """Encoded rows with ids that say nothing, of random lengths."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, 60) for _ in range(rng.randint(low, high))]

    return [{"prompt": ids(1, longest), "completions": [ids(1, longest) for _ in range(answers)]} for _ in range(count)]


@pytest.mark.parametrize(("count", "size"), [(1, 4), (7, 8), (64, 8), (100, 8), (1000, 32), (1025, 32)])
def test_an_epoch_holds_every_row_once_and_only_the_last_step_is_smaller(count, size):
    rows = random_rows(count)
    plan = batches.plan_batches(rows, size, 1, -1, seed=0)
    assert sorted(i for step in plan for i in step) == list(range(count))
    assert [len(step) for step in plan] == [size] * (count // size) + ([count % size] if count % size else [])


def test_whole_and_fractional_epochs():
    rows = random_rows(100)
    one, two, half = (batches.plan_batches(rows, 8, epochs, -1, seed=5) for epochs in (1, 2, 0.5))
    assert two[:13] == one
    assert sorted(i for step in two[13:] for i in step) == list(range(100))
    assert two[13:] != one  # each epoch is shuffled anew
    assert sorted(map(sorted, two[13:])) != sorted(
        map(sorted, one)
    )  # other rows meet in a step, not the same steps in another order
    chosen = [i for step in half for i in step]
    assert len(chosen) == len(set(chosen)) == 50
    more = batches.plan_batches(rows, 8, 2.25, -1, seed=5)
    counts = Counter(i for step in more for i in step)
    assert sum(counts.values()) == 225
    assert set(counts.values()) == {2, 3}
    assert len(batches.plan_batches(rows, 8, 1e-9, -1, seed=5)) == 1  # at least one row


def test_max_steps_cuts_the_plan():
    rows = random_rows(100)
    whole = batches.plan_batches(rows, 8, 1, -1, seed=0)
    assert batches.plan_batches(rows, 8, 1, 5, seed=0) == whole[:5]
    assert batches.plan_batches(rows, 8, 1, 999, seed=0) == whole


def test_the_plan_is_a_pure_function_of_its_arguments():
    rows = random_rows(300)
    random.seed(1)
    torch.manual_seed(1)
    first = batches.plan_batches(rows, 8, 1.5, -1, seed=0)
    state = random.getstate()
    random.seed(2)
    torch.manual_seed(2)
    assert batches.plan_batches(rows, 8, 1.5, -1, seed=0) == first
    random.setstate(state)
    batches.plan_batches(rows, 8, 1.5, -1, seed=0)
    assert random.getstate() == state  # and it leaves the caller's random numbers alone
    assert batches.plan_batches(rows, 8, 1.5, -1, seed=1) != first


def test_steps_hold_rows_of_similar_length_in_random_order():
    rows = random_rows(1024)
    lengths = [batches.row_length(row) for row in rows]
    assert lengths[3] == len(rows[3]["prompt"]) + len(rows[3]["completions"][0]) + len(rows[3]["completions"][1])
    plan = batches.plan_batches(rows, 32, 1, -1, seed=0)

    def padding(steps):
        return 1 - sum(lengths) / sum(len(step) * max(lengths[i] for i in step) for step in steps)

    shuffled = random.Random(0).sample(range(1024), 1024)
    assert padding(plan) < 0.08 < 0.3 < padding([shuffled[i : i + 32] for i in range(0, 1024, 32)])
    means = [sum(lengths[i] for i in step) / 32 for step in plan]
    assert means[:16] != sorted(means[:16])  # no drift from short to long within a window


def test_the_short_last_step_holds_rows_of_every_length():
    rows = random_rows(36)
    longest = sorted(range(36), key=lambda i: -batches.row_length(rows[i]))[:4]
    last_steps = [set(batches.plan_batches(rows, 32, 1, -1, seed=seed)[-1]) for seed in range(20)]
    assert (
        sum(len(step & set(longest)) for step in last_steps) < 25
    )  # 20 * 4 * 4 / 36 = 9 by chance; 80 were the longest always left over


def test_rows_that_a_plan_never_uses_are_left_out():
    every = [row | {"texts": (f"text {i}",)} for i, row in enumerate(random_rows(50))]
    rows = batches.Rows(every, seen=60, dropped={"an answer is empty": 10}, moved=3)
    plan = batches.plan_batches(rows, 8, 3, 4, seed=0)
    kept, steps = batches.planned_rows(rows, plan)
    assert steps == [[every[i] for i in step] for step in plan]  # the same rows in the same order
    used = {i for step in plan for i in step}
    assert [row["texts"] for row in kept] == [every[i]["texts"] for i in sorted(used)]
    assert len(kept) == len(used) == 32
    assert (kept.seen, kept.dropped, kept.moved) == (60, Counter({"an answer is empty": 10}), 3)
    # A column given to the rows that are kept is one of the rows of the steps.
    kept.add_columns(("ref_logps",), torch.arange(32.0)[:, None])
    assert {row["ref_logps"] for step in steps for row in step} == set(map(float, range(32)))
    whole = batches.plan_batches(rows, 8, 1, -1, seed=0)
    kept, steps = batches.planned_rows(rows, whole)
    assert kept == every
    assert steps == [[every[i] for i in step] for step in whole]


@pytest.mark.parametrize(
    ("count", "size", "world"),
    [(32, 32, 1), (32, 8, 1), (33, 8, 1), (5, 8, 3), (1, 4, 4), (32, 4, 3), (31, 5, 2), (64, 8, 8)],
)
def test_micro_batches_hold_every_row_once_over_all_processes(count, size, world):
    rows = [10 * i + 3 for i in range(count)]
    shares = [batches.micro_batches(rows, size, rank, world) for rank in range(world)]
    assert sorted(i for share in shares for chunk, weight in share if weight for i in chunk) == rows
    assert len({len(share) for share in shares}) == 1  # else a process would wait for ever
    assert len(shares[0]) == -(-count // (size * world))
    for chunk, weight in (item for share in shares for item in share):
        assert 1 <= len(chunk) <= size
        assert weight == world or (weight == 0 and chunk == rows[:1])  # gradients are averaged over processes
    idle = sum(not weight for share in shares for _, weight in share)
    assert idle == sum(
        max(0, world - len(rows[i : i + size * world])) for i in range(0, count, size * world)
    )  # only where a pass has fewer rows than processes


# -- collation


def visible_from(batch, flat):
    """(position, token) of every place that the place `flat` can see, in order."""
    line, column = divmod(flat, batch["input_ids"].shape[1])
    mask = batch["attention_mask"]
    if mask.dim() == 4:
        visible = mask[line, 0, column] == 0
        assert set(mask.unique().tolist()) <= {0.0, batches.MASKED}
    else:
        visible = mask[line].bool() & (
            torch.arange(mask.shape[1]) <= column
        )  # a causal model with a mask of real tokens
    places = visible.nonzero().flatten().tolist()
    return sorted((batch["position_ids"][line, k].item(), batch["input_ids"][line, k].item()) for k in places)


def check_batch(rows, layout, pad_id):
    """Every completion token against what it is in the row: predicted once, by the token before,
    from the prompt and its own answer only.
    """
    batch = batches.collate(rows, pad_id, layout, "cpu")
    n, answers = len(rows), len(rows[0]["completions"])
    lines = n if layout == "shared" else n * answers
    assert len(batch["input_ids"]) == lines
    assert batch["completion_tokens"].tolist() == [len(row["completions"][j]) for j in range(answers) for row in rows]
    length = batch["input_ids"].shape[1]
    if layout == "shared":
        assert length == max(len(row["prompt"]) + sum(map(len, row["completions"])) for row in rows)
        assert batch["attention_mask"].shape == (lines, 1, length, length)
        assert batch["attention_mask"].dtype == torch.float32
        assert (batch["attention_mask"].amax(-1) == 0).all()  # a line of padding sees something: no nan
    else:
        assert length == max(len(row["prompt"]) + len(ids) for row in rows for ids in row["completions"])
        assert batch["attention_mask"].sum() == sum(
            len(row["prompt"]) + len(ids) for row in rows for ids in row["completions"]
        )
    assert batch["logit_index"].shape == batch["targets"].shape == batch["sequence_ids"].shape
    assert all(
        batch[name].dtype == torch.int64
        for name in ("input_ids", "position_ids", "logit_index", "targets", "sequence_ids", "last")
    )
    predicted = {s: [] for s in range(n * answers)}
    for index, target, s in zip(
        batch["logit_index"].tolist(), batch["targets"].tolist(), batch["sequence_ids"].tolist()
    ):
        predicted[s].append((index, target))
    for s, tokens in predicted.items():
        row, answer = rows[s % n], rows[s % n]["completions"][s // n]
        assert [target for _, target in tokens] == answer
        for t, (index, _) in enumerate(tokens):
            assert visible_from(batch, index) == list(enumerate(row["prompt"] + answer[:t]))
        assert visible_from(batch, batch["last"][s].item()) == list(enumerate(row["prompt"] + answer))
    filled = sum(
        len(row["prompt"]) * (1 if layout == "shared" else answers) + sum(map(len, row["completions"])) for row in rows
    )
    assert (batch["input_ids"] == pad_id).sum() == lines * length - filled  # these rows hold no token of that id
    if layout == "model_head":
        keep = batch["logits_to_keep"]
        assert (
            length - keep == min(len(row["prompt"]) for row in rows) - 1
        )  # the first position that predicts a completion token
    else:
        assert "logits_to_keep" not in batch


@pytest.mark.parametrize("layout", ["shared", "rows", "model_head"])
def test_a_batch_by_hand(layout):
    rows = [{"prompt": [1, 5], "completions": [[6, 2], [7]]}, {"prompt": [1], "completions": [[8], [9, 10, 2]]}]
    batch = {k: v.tolist() if torch.is_tensor(v) else v for k, v in batches.collate(rows, 0, layout, "cpu").items()}
    assert batch["targets"] == ([6, 2, 7, 8, 9, 10, 2] if layout == "shared" else [6, 2, 8, 7, 9, 10, 2])
    if layout == "shared":
        assert batch["input_ids"] == [[1, 5, 6, 2, 7], [1, 8, 9, 10, 2]]
        assert batch["position_ids"] == [[0, 1, 2, 3, 2], [0, 1, 1, 2, 3]]
        assert batch["logit_index"] == [1, 2, 1, 5, 5, 7, 8]
        assert batch["sequence_ids"] == [0, 0, 2, 1, 3, 3, 3]
        assert batch["last"] == [3, 6, 4, 9]
        allowed = [[[int(value == 0) for value in line] for line in mask[0]] for mask in batch["attention_mask"]]
        assert allowed[0] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
        assert allowed[1] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]
    else:
        assert batch["input_ids"] == [[1, 5, 6, 2], [1, 8, 0, 0], [1, 5, 7, 0], [1, 9, 10, 2]]
        assert batch["position_ids"] == [[0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3]]
        assert batch["attention_mask"] == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
        assert batch["logit_index"] == [1, 2, 4, 9, 12, 13, 14]
        assert batch["sequence_ids"] == [0, 0, 1, 2, 3, 3, 3]
        assert batch["last"] == [3, 5, 10, 15]
    assert batch["completion_tokens"] == [2, 1, 1, 3]
    assert batch.get("logits_to_keep") == (4 if layout == "model_head" else None)


@pytest.mark.parametrize("layout", ["shared", "rows", "model_head"])
@pytest.mark.parametrize("seed", range(12))
def test_random_batches_against_a_slow_reading(layout, seed):
    rng = random.Random(seed)
    rows = random_rows(rng.randint(1, 6), seed=seed, answers=rng.randint(1, 4), longest=rng.choice([1, 3, 12]))
    check_batch(rows, layout, pad_id=rng.choice([0, 2, 61]))


def test_padding_is_known_by_length_and_not_by_id():
    """Rows that hold the pad id as a word: they give the same batch, the ids aside, as rows that do
    not.
    """
    rows = [{"prompt": [1, 9, 5], "completions": [[9, 9], [9]]}, {"prompt": [9], "completions": [[4], [9, 9, 9]]}]
    for layout in ("shared", "rows", "model_head"):
        same, other = (batches.collate(rows, pad, layout, "cpu") for pad in (9, 0))
        for name in same:
            if name != "input_ids":
                assert torch.equal(torch.as_tensor(same[name]), torch.as_tensor(other[name])), name


def test_tokens_are_counted_answer_by_answer():
    row = {"prompt": [1, 2, 3], "completions": [[4], [5, 6]]}
    assert batches.count_tokens([row, row]) == 18  # the prompt counts with each answer, however the batch is laid out
    assert batches.row_length(row) == 6


# -- from end to end


@pytest.mark.parametrize("seed", range(5))
def test_random_texts_keep_every_promise_at_once(seed):
    """Random prompts and answers through encode: the text comes back, the limit holds, EOS stands
    where an answer ended.
    """
    rng = random.Random(seed)
    tokenizer = models.byte_tokenizer(bos=bool(seed % 2))

    def text(high):
        return "".join(
            rng.choices(
                ["a", "b", "c", " ", "t", "\n", "é", "</s>", "ab"],
                [6, 6, 6, 6, 3, 3, 1, 0.2, 2],
                k=rng.randint(1, high),
            )
        )

    for _ in range(100):
        prompt, answers, limit = text(12), [text(20), text(20)], rng.randint(2, 40)
        example, reason, _ = data.encode_row(tokenizer, prompt, answers, limit)
        whole = [tokenizer(prompt + answer).input_ids for answer in answers]
        if reason:
            assert reason in {"prompt and answers share no token", "the prompt alone fills max_length"}
            continue
        head = tokenizer(prompt).input_ids
        assert example["prompt"] == head[: len(example["prompt"])]
        if all(ids[: len(head)] == head for ids in whole):
            assert example["prompt"] == head  # where nothing merges, the boundary is where the prompt ends
        for ids, completion in zip(whole, example["completions"]):
            got = example["prompt"] + completion
            assert len(completion) >= 1
            assert len(got) <= limit
            expected = ids if ids[-1] == EOS else [*ids, EOS]
            assert got == expected[:limit]
            assert (len(got) == len(expected)) == (got == expected)
