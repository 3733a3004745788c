"""Token ids kept on disk: the same rows as in memory, made once, whole or not at all."""

import json
import os

import numpy as np
import pytest

from common import InputError, batches, data
from common.data import load_pairs
from labelled.rows import load_labelled
from rewards.prompts import load_prompts
from tests import models
from tests.runs import CHAT, ROOT, lines_file, start_process, train, weights, write_pairs
from tokens import store


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and every file counts as large."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "LARGE_BYTES", 0)
    return tmp_path / "cache" / "preference-rows"


@pytest.fixture(scope="module")
def tokenizer():
    return models.byte_tokenizer(bos=True, chat_template=CHAT)


def user(text):
    return {"role": "user", "content": text}


def pairs(count: int) -> list[dict]:
    """Strings and chats, long ones, some that cannot be used, some whose boundary moves."""
    made = []
    for i in range(count):
        made.append({"prompt": f"q{i} é ✓", "chosen": " yes" * (i % 4 + 1), "rejected": " no" * (i % 3 + 1)})
        if i % 5 == 1:
            made.append({"prompt": [user(f"chat {i}")], "chosen": "A", "rejected": "B"})
        if i % 7 == 2:
            made.append({"prompt": f"q{i} a", "chosen": "b" * i, "rejected": "x"})  # ab is one token
        if i % 6 == 3:
            made.append({"prompt": "q", "chosen": "", "rejected": "x"})
        if i % 6 == 4:
            made.append({"prompt": "long" * 30, "chosen": "a", "rejected": "b"})
    return made


def plain_of(split) -> list[dict]:
    """All that a row holds."""
    return [dict(row) | {name: row[name] for name in ("prompt", "completions", "texts")} for row in split]


def both_ways(monkeypatch, load):
    """What `load(say)` gives from memory and from the disk, each with what was said."""
    results = []
    for limit in (1 << 40, 0):
        monkeypatch.setattr(store, "LARGE_BYTES", limit)
        said: list[str] = []
        results.append((load(said.append), said))
    return results


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["pairs", "chats", "labelled", "prompts"])
def test_rows_from_the_disk_are_those_of_memory(kind, processes, tmp_path, tokenizer, cache, monkeypatch):
    monkeypatch.setattr(store, "LARGE_ROWS", 4 if processes == 2 else 10**9)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(processes), raising=False)
    rows = pairs(40)
    if kind == "labelled":
        rows = [{"prompt": r["prompt"], "completion": r["chosen"], "score": i / 3} for i, r in enumerate(rows)]
    where = (lines_file(tmp_path, rows), None, 0.25, 3, tokenizer, 60)
    loads = {
        "pairs": lambda say: load_pairs(*where, say),
        "chats": lambda say: load_pairs(*where, say, chat=True),
        "labelled": lambda say: load_labelled(*where, label_scale="minmax", say=say),
        "prompts": lambda say: load_prompts(*where, 8, say),
    }
    (memory, said), (disk, said_then) = both_ways(monkeypatch, loads[kind])
    assert len(list(cache.iterdir())) == 1
    assert said_then == said
    assert disk[1:] == memory[1:]
    for name, split in memory[0].items():
        stored = disk[0][name]
        assert len(split) > 4
        assert plain_of(stored) == list(split)
        assert all(type(i) is int for i in stored[0]["prompt"])
        assert (stored.seen, stored.moved, list(stored.dropped.items())) == (
            split.seen,
            split.moved,
            list(split.dropped.items()),
        )
        assert batches.plan_batches(stored, 4, 2, -1, 0) == batches.plan_batches(split, 4, 2, -1, 0)
    again: list[str] = []
    assert plain_of(loads[kind](again.append)[0]["train"]) == list(memory[0]["train"])
    assert again == said


def test_rows_are_encoded_once(tmp_path, tokenizer, monkeypatch):
    path = lines_file(tmp_path, pairs(9))
    first = load_pairs(path, None, 0.0, 0, tokenizer, 60)[0]["train"]

    def refuse(*args, **options):
        raise AssertionError("read or encoded again")

    for module, name in ((store, "encode_row"), (store, "encode_rows"), (data, "read_rows")):
        monkeypatch.setattr(module, name, refuse)
    assert plain_of(load_pairs(path, None, 0.0, 0, tokenizer, 60)[0]["train"]) == plain_of(first)


def test_all_that_shapes_rows_is_in_their_key(tmp_path, tokenizer, cache, monkeypatch):
    path = lines_file(tmp_path, pairs(9))
    other = lines_file(tmp_path, pairs(8), "other.jsonl")
    retemplated = models.byte_tokenizer(bos=True, chat_template=CHAT.replace("[", "("))
    made = [
        ((path, None, 0.5, 0, tokenizer, 60), {}),
        ((path, None, 0.5, 1, tokenizer, 60), {}),
        ((path, None, 0.25, 0, tokenizer, 60), {}),
        ((path, other, 0.5, 0, tokenizer, 60), {}),
        ((other, None, 0.5, 0, tokenizer, 60), {}),
        ((path, None, 0.5, 0, retemplated, 60), {}),
        ((path, None, 0.5, 0, models.byte_tokenizer(chat_template=CHAT), 60), {}),
        ((path, None, 0.5, 0, tokenizer, 59), {}),
        ((path, None, 0.5, 0, tokenizer, 60), {"chat": True}),
    ]
    for where, options in made:
        load_pairs(*where, **options)
    load_prompts(*made[0][0], 8)
    assert len(list(cache.iterdir())) == len(made) + 1
    assert not list(cache.glob(".part-*"))
    monkeypatch.setattr(store, "CODE", ("chat",))  # stands for a change of the code
    load_pairs(*made[0][0])
    assert len(list(cache.iterdir())) == len(made) + 2


def test_a_template_with_todays_date_is_of_today(tokenizer):
    dated = models.byte_tokenizer(bos=True, chat_template="{{ strftime_now('%d') }}" + CHAT)

    class Tomorrow(store.datetime.date):
        @classmethod
        def today(cls):
            return cls(2099, 1, 1)

    for made, changes in ((tokenizer, False), (dated, True)):
        key = store.key_of([], {}, made)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store.datetime, "date", Tomorrow)
            assert (store.key_of([], {}, made) != key) == changes


def test_an_interruption_leaves_nothing(tmp_path, tokenizer, cache, monkeypatch):
    path = lines_file(tmp_path, pairs(9))
    write, calls = store.write_split, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(store, "write_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_pairs(path, None, 0.5, 0, tokenizer, 60)
    assert list(cache.iterdir()) == []
    assert len(load_pairs(path, None, 0.5, 0, tokenizer, 60)[0]["train"]) > 2


def test_two_runs_at_once_do_no_harm(tmp_path, tokenizer, cache, monkeypatch):
    path = lines_file(tmp_path, pairs(9))
    rename, others = os.rename, []

    def late(source, target):
        if not others:  # the other run is done just before
            others.append(True)
            others.append(load_pairs(path, None, 0.0, 0, tokenizer, 60)[0]["train"])
        return rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    mine = load_pairs(path, None, 0.0, 0, tokenizer, 60)[0]["train"]
    assert plain_of(mine) == plain_of(others[1])
    assert len(list(cache.iterdir())) == 1


def test_bad_files_are_refused_in_the_same_words_and_nothing_is_kept(tmp_path, tokenizer, cache, monkeypatch):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    for load in (load_pairs, load_labelled):
        words = []
        for limit in (1 << 40, 0):
            monkeypatch.setattr(store, "LARGE_BYTES", limit)
            with pytest.raises(InputError) as error:
                load(str(path), None, 0.0, 0, tokenizer, 60)
            words.append(str(error.value))
        assert words[0] == words[1]
        assert f"{path}, line 2" in words[0]
    assert not cache.exists() or not list(cache.iterdir())
    with pytest.raises(InputError, match="no such file"):
        load_pairs(str(tmp_path / "none.jsonl"), None, 0.0, 0, tokenizer, 60)


def test_without_a_place_to_keep_them_rows_stay_in_memory(tmp_path, tokenizer, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    rows = load_pairs(lines_file(tmp_path, pairs(9)), None, 0.0, 0, tokenizer, 60)[0]["train"]
    assert type(rows[0]) is dict
    assert "are not kept for later runs" in capsys.readouterr().out


def test_a_damaged_folder_is_named(tmp_path, tokenizer, cache):
    where = (lines_file(tmp_path, pairs(9)), None, 0.0, 0, tokenizer, 60)
    load_pairs(*where)
    (folder,) = cache.iterdir()
    (folder / "train.ids.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match="kept token ids cannot be read") as error:
        load_pairs(*where)
    assert str(folder) in str(error.value)


def test_small_files_are_left_alone(tmp_path, tokenizer, cache, monkeypatch):
    monkeypatch.setattr(store, "LARGE_BYTES", 4 << 20)
    load_pairs(lines_file(tmp_path, pairs(9)), None, 0.0, 0, tokenizer, 60)
    assert not cache.exists()


def test_data_of_the_hub_are_kept_by_what_they_hold(tmp_path, tokenizer, cache, monkeypatch):
    import datasets

    from common import files

    def load(name, *rest, **options):
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})

    rows = [{"prompt": f"q{i}", "chosen": " a", "rejected": " b"} for i in range(6)]
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(files, "check_hub_id", lambda *args: None)
    monkeypatch.setattr(store, "LARGE_ROWS", 6)
    for count in (1, 2):
        stored = load_pairs("owner/name", None, 0.0, 0, tokenizer, 60)[0]["train"]
        assert [row["texts"] for row in stored] == [(f"q{i}", " a", " b") for i in range(len(rows))]
        assert len(list(cache.iterdir())) == count
        rows = [*rows, {"prompt": "q6", "chosen": " a", "rejected": " b"}]


def test_ids_are_held_once_for_all_rows(tmp_path, tokenizer):
    """Four bytes a token, on the disk: a row in memory holds neither ids nor text."""
    rows = load_pairs(lines_file(tmp_path, pairs(9)), None, 0.0, 0, tokenizer, 60)[0]["train"]
    assert all(dict(row) == {} for row in rows)
    arrays = rows[0]._arrays
    assert arrays.ids.dtype == np.int32
    assert isinstance(arrays.ids.base, np.memmap)
    assert rows[1]._arrays is arrays


@pytest.mark.slow
def test_training_on_stored_rows_is_bit_for_bit_the_same(tmp_path, tmp_path_factory, monkeypatch):
    from toy import world

    tokenizer = world.build_tokenizer()
    model = models.save(models.tiny_llama(len(tokenizer)), tokenizer, tmp_path_factory.mktemp("llama"))
    path, hashes = write_pairs(tmp_path / "pairs.jsonl", 24), []
    for name, limit in (("memory", 1 << 40), ("disk", 0)):
        monkeypatch.setattr(store, "LARGE_BYTES", limit)
        folder = train("dpo", tmp_path / name, model=str(model), data=path, max_steps=3, holdout=0.25, kl_samples=4)
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        hashes.append((weights(folder), metrics))
    assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_the_first_process_makes_and_the_others_wait(tmp_path, cache):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys\n"
        "import torch.distributed as dist\n"
        "from common.data import load_pairs\n"
        "from tests import models\n"
        "from tokens import store\n"
        "dist.init_process_group('gloo')\n"
        "store.LARGE_BYTES, make, made = 0, store.make_folder, []\n"
        "store.make_folder = lambda *args: made.append(make(*args))\n"
        "splits, digest = load_pairs(sys.argv[1], None, 0.0, 0, models.byte_tokenizer(bos=True), 60)\n"
        "said = f\"made {len(made)} rows {len(splits['train'])} {splits['train'][3]['texts'][0]}\"\n"
        "open(f'{sys.argv[1]}.{dist.get_rank()}', 'w').write(said)\n"
        "dist.destroy_process_group()\n"
    )
    good = [{"prompt": f"q{i}", "chosen": " a", "rejected": " b"} for i in range(6)]
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29671", str(script)]
    result = start_process([*words, lines_file(tmp_path, good)], cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = sorted(path.read_text() for path in tmp_path.glob("*.jsonl.[01]"))  # their prints may mix
    assert lines == ["made 0 rows 6 q3", "made 1 rows 6 q3"]
    bad = start_process([*words, lines_file(tmp_path, [{"prompt": "a"}], "bad.jsonl")], cwd=ROOT)
    assert bad.returncode != 0
    assert 'no field "chosen"' in bad.stderr
