"""The toy's worlds: frozen files that are what the docs say, other seeds, and the hard world."""

import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from common import InputError, data, run
from common import models as model_loading
from common.metrics import auc
from tests.runs import ROOT, arguments, in_processes, resume, train
from toy import base, frozen, world

PAGE = ROOT / "docs" / "toy.md"
FROZEN = [(name, seed) for name in world.WORLDS for seed in range(5)]
HARD = world.questions("hard")


@pytest.fixture(scope="module")
def hard_answers() -> list[list[str]]:
    return frozen.read_answers(base.base_model(0, "hard"))


@pytest.fixture(scope="module")
def hard_base():
    """(model, tokenizer) of the hard world of seed 0."""
    folder = str(base.base_model(0, "hard"))
    tokenizer = model_loading.load_tokenizer(folder)
    return model_loading.load_model(folder, "cpu", tokenizer).eval(), tokenizer


# -- frozen


def test_the_docs_have_the_hashes_of_all_frozen_worlds():
    """What is loaded is compared with what stands in docs/toy.md, rows and weights as a run has
    them in its summary: another byte, question, rule or order is another version.
    """
    table = re.findall(
        r"\| (easy|hard) \| (\d) \| `([0-9a-f]{64})` \| `([0-9a-f]{64})` \|", PAGE.read_text(encoding="utf-8")
    )
    assert [(name, int(seed)) for name, seed, *_ in table] == FROZEN
    for name, seed, rows, weights in table:
        tokenizer = world.build_tokenizer(name)
        _, digest = data.load_pairs(f"toy:{name}", None, 0.1, int(seed), tokenizer, 128, lambda *words: None)
        assert digest == rows, (name, seed)
        assert model_loading.sha256_of_model(str(base.base_model(int(seed), name))) == weights, (name, seed)


@pytest.mark.parametrize(("name", "seed"), FROZEN)
def test_a_frozen_world_loads_and_nothing_is_built(name, seed, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(base, "train_base", lambda *args: pytest.fail("a base model is being built"))
    folder = base.base_model(seed, name)
    about = json.loads((folder / frozen.ABOUT).read_text())
    assert (about["world"], about["seed"], about["version"]) == (name, seed, frozen.VERSION)
    assert set(about["files"]) == {path.name for path in folder.iterdir()} - {frozen.ABOUT}
    answers = frozen.read_answers(folder)
    assert len(answers) == len(world.questions(name))
    assert {len(texts) for texts in answers} == {base.SAMPLES[name]}
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", world.WORLDS)
def test_frozen_answers_are_those_of_the_frozen_model(name):
    """Each seed's model finds its own answers likelier than the other seed's, and by its own
    account as surprising as samples of it are.
    """
    rows, rng = world.questions(name), random.Random(0)
    numbers = [(rng.randrange(len(rows)), rng.randrange(base.SAMPLES[name])) for _ in range(400)]
    table = {}
    for seed in (0, 1):
        folder = str(base.base_model(seed, name))
        tokenizer = model_loading.load_tokenizer(folder)
        model = model_loading.load_model(folder, "cpu", tokenizer).eval()
        for source in (0, 1):
            answers = frozen.read_answers(base.base_model(source, name))
            texts = [(world.prompt_of(rows[i]), answers[i][j]) for i, j in numbers]
            table[seed, source] = statistics.mean(surprise(model, tokenizer, texts))
    for seed in (0, 1):
        assert table[seed, seed] < table[seed, 1 - seed] - 0.02, table


def surprise(model, tokenizer, texts: list[tuple[str, str]]) -> list[float]:
    """-log p of each (prompt, answer), EOS included, in nats."""
    ids = [tokenizer(f"{prompt} {answer}").input_ids + [tokenizer.eos_token_id] for prompt, answer in texts]
    begins = [len(tokenizer(prompt).input_ids) for prompt, _ in texts]
    longest = max(map(len, ids))
    lines = torch.tensor([line + [0] * (longest - len(line)) for line in ids])
    with torch.no_grad():
        logps = model(input_ids=lines).logits[:, :-1].log_softmax(-1).gather(-1, lines[:, 1:, None])[..., 0]
    return [-logps[i, begin - 1 : len(line) - 1].sum().item() for i, (begin, line) in enumerate(zip(begins, ids))]


@pytest.fixture
def copied(monkeypatch, tmp_path) -> Path:
    """A frozen world that may be damaged."""
    monkeypatch.setattr(frozen, "FOLDER", tmp_path / "worlds")
    return Path(shutil.copytree(ROOT / "toy" / "worlds" / "easy-seed0", tmp_path / "worlds" / "easy-seed0"))


@pytest.mark.parametrize("name", ["model.safetensors", "answers.json.gz", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("harm", ["cut", "changed", "missing"])
def test_a_damaged_frozen_world_is_one_sentence_before_any_work(name, harm, copied, tmp_path):
    path = copied / name
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    what = f"{name} is missing" if harm == "missing" else f"{name} is not as it was written"
    with pytest.raises(InputError, match=f"easy-seed0: this frozen world .*{re.escape(what)}; git checkout"):
        train("dpo", tmp_path / "run", max_steps=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 3}', b"\xff"])
def test_a_damaged_account_of_a_world_is_one_sentence(content, copied):
    (copied / frozen.ABOUT).write_bytes(content)
    with pytest.raises(InputError, match=r"damaged: world\.json cannot be read"):
        base.base_model(0)


def test_a_run_tells_its_world_and_version(tmp_path):
    for seed, expected in ((0, f"easy, version {frozen.VERSION}"), (0, None)):
        given = {} if expected else {"data": str(write_rows(tmp_path)), "model": str(tmp_path / "run")}
        folder = train("dpo", tmp_path / ("run" if expected else "other"), max_steps=1, seed=seed, **given)
        assert json.loads((folder / "summary.json").read_text())["toy_world"] == expected


def write_rows(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    row = {"prompt": "what is one plus two ?", "chosen": " it is three .", "rejected": " it is two ."}
    path.write_text(f"{json.dumps(row)}\n" * 8)
    return path


def test_answers_that_cannot_be_read_are_one_sentence(tmp_path):
    for content in (b"", b"\x1f\x8b\x08", b"[]"):
        (tmp_path / frozen.ANSWERS).write_bytes(content)
        with pytest.raises(InputError, match="the toy's answers cannot be read"):
            frozen.read_answers(tmp_path)


def test_packed_answers_are_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    answers = [["it is three .", ""], ["no"]]
    frozen.write_answers(tmp_path, answers)
    content = (tmp_path / frozen.ANSWERS).read_bytes()
    monkeypatch.setattr(time, "time", lambda: 1e9)
    frozen.write_answers(tmp_path, answers)
    assert (tmp_path / frozen.ANSWERS).read_bytes() == content
    assert frozen.read_answers(tmp_path) == answers


# -- built


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """base_model with two steps of training, in an empty cache; says how often it trained."""
    train_base, calls = base.train_base, []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        base, "train_base", lambda seed, name: calls.append((seed, name)) or train_base(seed, name, steps=2)
    )
    monkeypatch.setattr(base, "SAMPLES", {"easy": 2, "hard": 2})
    return calls


@pytest.mark.parametrize("name", world.WORLDS)
def test_another_seed_is_built_once_and_leaves_the_caller_alone(name, quick, tmp_path):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    folder = base.base_model(7, name)
    assert base.base_model(7, name) == folder
    assert quick == [(7, name)], "trained once, with the seed asked for"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert [path.name for path in (tmp_path / "preference-toy").iterdir()] == [folder.name], "nothing is left beside it"
    assert frozen.damage(folder) is None
    assert f"seed 7 built with torch {torch.__version__}" in frozen.description(name, 7)
    assert base.base_model(8, name) != folder
    assert quick == [(7, name), (8, name)]


def test_code_without_the_frozen_files_builds_as_for_any_seed(quick, monkeypatch, tmp_path):
    """Somebody copied the scripts and packages, and left out what is no Python."""
    monkeypatch.setattr(frozen, "FOLDER", tmp_path / "no such folder")
    assert base.base_model(0).parent == tmp_path / "preference-toy"
    assert quick == [(0, "easy")]
    assert "built with torch" in frozen.description("easy", 0)


def test_a_copied_script_finds_the_frozen_world_beside_the_packages(tmp_path):
    """Outside of the repository, with the repository on Python's path, and an empty cache."""
    shutil.copyfile(ROOT / "dpo.py", tmp_path / "mine.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "c")}
    words = [sys.executable, "mine.py", "--max-steps", "1", "--kl-samples", "0"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "building" not in done.stdout + done.stderr
    assert not (tmp_path / "c" / "preference-toy").exists()
    summary = json.loads((tmp_path / "runs" / "mine-toy-seed0" / "summary.json").read_text())
    assert summary["toy_world"] == f"easy, version {frozen.VERSION}"


@pytest.mark.parametrize("name", ["answers.json.gz", "model.safetensors", "world.json"])
@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_a_built_world_that_is_damaged_is_made_whole(name, harm, quick):
    folder = base.base_model(7)
    path = folder / name
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2])
    assert base.base_model(7) == folder
    assert quick == [(7, "easy")] * 2
    assert path.read_bytes() == content
    assert [other.name for other in folder.parent.iterdir()] == [folder.name]


def test_the_slower_of_two_builds_leaves_the_other_ones_files(quick, tmp_path, monkeypatch):
    folder, sample = base.cache_folder(7), base.sample_answers

    def overtaken(*args):
        folder.mkdir()
        frozen.write_answers(folder, [["the other's"]])
        frozen.write_about(folder, "easy", 7)
        return sample(*args)

    monkeypatch.setattr(base, "sample_answers", overtaken)
    assert base.base_model(7) == folder
    assert frozen.read_answers(folder) == [["the other's"]]
    assert list((tmp_path / "preference-toy").iterdir()) == [folder]


def test_processes_that_build_at_once_end_in_one_world(quick, tmp_path):
    folders = in_processes(3, lambda: (str(base.base_model(7)), frozen.hashes(base.base_model(7))))
    assert folders[0] == folders[1] == folders[2]
    assert [str(path) for path in (tmp_path / "preference-toy").iterdir()] == [folders[0][0]]


def test_an_interrupted_build_leaves_nothing_and_says_so(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "toy.base", "--seed", "7"]
    started = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that starts something in the background has it ignore Ctrl-C, and that is inherited.
    started["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(words, cwd=ROOT, env=environment, **started) as process:
        begun = process.stderr.read(20)  # the progress bar: the build is on its way
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert begun.strip().startswith("building the toy")
    assert process.returncode == 1
    assert "Traceback" not in rest
    assert rest.strip().endswith("Interrupted: nothing of the world was kept; the same command builds it.")
    assert list((tmp_path / "preference-toy").iterdir()) == []


BUILD = """
import functools, sys
from toy import base, frozen
base.train_base = functools.partial(base.train_base, steps=4)
base.SAMPLES = {"easy": 3, "hard": 3}
print(frozen.hashes(base.base_model(int(sys.argv[1]))))
"""


def build(cache: Path, seed: int, **environment) -> dict[str, str]:
    """Hashes of a world built in a process of its own, with few steps and an empty cache."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    words = [sys.executable, "-c", BUILD, str(seed)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1].replace("'", '"'))


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """Neither the order of Python's sets nor the number of threads may reach the weights or the
    samples.
    """
    first = build(tmp_path / "a", 7, PYTHONHASHSEED="1", OMP_NUM_THREADS="1")
    assert build(tmp_path / "b", 7, PYTHONHASHSEED="2", OMP_NUM_THREADS="2") == first
    other = build(tmp_path / "a", 8, PYTHONHASHSEED="1", OMP_NUM_THREADS="1")
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors", frozen.ANSWERS}


def test_the_version_of_the_cache_is_that_of_the_code(monkeypatch, tmp_path):
    """Another torch may give other bytes, so it gets another folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = base.cache_folder(7)
    assert base.cache_folder(7, "hard") != here
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert base.cache_folder(7) != here
    assert base.cache_folder(7).parent == here.parent


# What may differ between builds, in units of the deviation between the five frozen seeds. A build
# on other versions is another training run, as another seed is: with five seeds the next one lies
# within t * sqrt(1 + 1/5) deviations, t = 5.6 for one in 200 (Student's t, 4 degrees of freedom).
# Deviations of five are small by chance at times, so nothing is asked to be closer than .01.
DEVIATIONS, FINEST = 5.6 * math.sqrt(1.2), 0.01


def numbers_of(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Statistics of a world's answers, and how many pairs they make, as a share of all couples."""
    answers, size = frozen.read_answers(folder), base.PAIR_SAMPLES[name]
    couples = [a != b for texts in answers for a, b in zip(texts[:size:2], texts[1:size:2])]
    return base.statistics(answers, name) | {"pairs": sum(couples) / len(couples)}


@pytest.mark.study
@pytest.mark.parametrize("name", world.WORLDS)
def test_building_gives_a_world_of_the_frozen_ones_statistics(name, tmp_path):
    """The numbers that matter: shares of right, polite and rude answers, their length and entropy,
    how often the likeliest is right, unseen questions, and how many couples make a pair.
    """
    known = [numbers_of(name, seed, base.base_model(seed, name)) for seed in range(5)]
    aside = tmp_path / "built"
    aside.mkdir()
    base.build(aside, 11, name)
    for key, value in numbers_of(name, 11, aside).items():
        values = [numbers[key] for numbers in known]
        allowed = DEVIATIONS * max(statistics.stdev(values), FINEST)
        assert value == pytest.approx(statistics.mean(values), abs=allowed), key


@pytest.mark.parametrize("name", world.WORLDS)
def test_the_docs_have_the_numbers_of_the_frozen_worlds(name):
    """The table of docs/toy.md, mean over the five seeds."""
    known = [numbers_of(name, seed, base.base_model(seed, name)) for seed in range(5)]
    column, page = world.WORLDS.index(name), PAGE.read_text(encoding="utf-8")
    for key in known[0]:
        row = re.search(rf"^\| [^|]*\(`{key}`\) \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
        assert row, key
        mean = statistics.mean(numbers[key] for numbers in known)
        assert float(row[1 + column].split(" ± ")[0]) == pytest.approx(mean, abs=0.0051), key


# -- what --data may name


def test_settings_of_the_command_line():
    plain = {"world": "easy", "flip": 0.0, "temperature": 1.0}
    for name, changes in {
        "toy": {},
        "toy:": {},
        "toy:easy": {},
        "toy:0.2": {"flip": 0.2},
        "toy:1": {"flip": 1.0},
        "toy:flip=0.2": {"flip": 0.2},
        "toy:hard": {"world": "hard"},
        "toy:hard:0.2": {"world": "hard", "flip": 0.2},
        "toy:0.2:hard": {"world": "hard", "flip": 0.2},
        "toy:temperature=0.5": {"temperature": 0.5},
        "toy:hard:0.1:temperature=0": {"world": "hard", "flip": 0.1, "temperature": 0.0},
    }.items():
        assert base.settings_of(name) == plain | changes, name
    assert [base.settings_of(name) for name in ("toys", "my/toy", "toy.jsonl", "")] == [None] * 4


@pytest.mark.parametrize(
    "part", "x -0.1 1.5 nan easier flip=1.2 =0.2 temperature= temperature=-1 temperature=inf 0.1:0.2 easy:hard".split()
)
def test_settings_that_do_not_exist_are_one_sentence(part):
    with pytest.raises(InputError, match=r"--data toy:.*: expected toy, .*share of flipped labels and temperature=T"):
        base.settings_of(f"toy:{part}")


def test_the_model_follows_the_data():
    assert base.model_for("toy", "toy") == base.model_for("toy", "toy:0.2") == base.model_for("toy", "a.jsonl") == "toy"
    assert base.model_for("toy", "toy:hard:0.2") == "toy:hard"
    assert base.model_for("toy:hard", "a.jsonl") == "toy:hard"
    assert base.model_for("gpt2", "toy:hard") == "gpt2"
    for model, rows in (("toy:easy", "toy:hard"), ("toy:hard", "toy")):
        with pytest.raises(InputError, match=f"--model {model}: another world than that of --data {rows}"):
            base.model_for(model, rows)


def test_a_run_of_one_world_does_not_train_on_the_other(tmp_path, toy_base):
    with pytest.raises(InputError, match="--data toy:hard: the model's tokenizer does not know all words of"):
        train("dpo", tmp_path / "run", model=str(toy_base), data="toy:hard", max_steps=1)
    assert not (tmp_path / "run").exists()


# -- noise


def gaps(pairs: list[tuple[str, str, str]]) -> torch.Tensor:
    """r*(chosen) - r*(rejected), [pairs]."""
    rows = [(world.row_of(p), c, r) for p, c, r in pairs]
    return torch.tensor([world.true_reward(q, c) - world.true_reward(q, r) for q, c, r in rows], dtype=torch.float64)


@pytest.mark.parametrize(("name", "temperature"), [("easy", 0.5), ("easy", 3.0), ("hard", 1.0)])
def test_labels_follow_bradley_terry_at_a_temperature(name, temperature):
    """The better answer wins with probability sigma(difference / temperature)."""
    found = gaps(base.pairs(0, world=name, temperature=temperature)["train"])
    for low, high in ((0.01, 0.6), (0.6, 1.6), (1.6, 9.0)):
        some = found[(found.abs() > low) & (found.abs() <= high)]
        p = (some.abs() / temperature).sigmoid()
        z = ((some > 0).double() - p).sum() / (p * (1 - p)).sum().sqrt()
        assert len(some) > 300
        assert abs(z) < 4, f"differences of {low} to {high}: {(some > 0).double().mean():.3f}, expected {p.mean():.3f}"


def test_at_temperature_zero_the_better_answer_always_wins():
    found = gaps(base.pairs(0, temperature=0.0)["train"])
    assert (found >= 0).all()
    assert (found > 0).sum() > 4000
    for prompt, text, label in base.labelled(0, temperature=0.0)["train"]:
        reward = world.true_reward(world.row_of(prompt), text)
        assert label == (reward > 0) or reward == 0
    continuous = base.labelled(0, temperature=2.0, continuous=True)["train"]
    for prompt, text, label in continuous[:500]:
        expected = 1 / (1 + math.exp(-world.true_reward(world.row_of(prompt), text) / 2))
        assert label == pytest.approx(expected, abs=1e-12)
    assert base.chance(5.0, 1e-9) == 1.0
    assert base.chance(-5.0, 1e-9) == pytest.approx(0.0)


# -- the hard world


def test_no_question_is_in_both_worlds():
    easy = {world.prompt_of(row) for row in world.questions()}
    hard = {world.prompt_of(row) for row in HARD}
    assert len(hard) == len(HARD) == 331
    assert not easy & hard
    assert all(world.row_of(world.prompt_of(row)) is row for row in HARD)


def kind_of(row: dict) -> str:
    return {"name": "fact", "how": "sum", "which": "comparison"}[row["question"].split()[0]]


def test_rules_hold_and_misbeliefs_are_systematic():
    for row in HARD:
        words = row["question"].split()
        assert row["right"] in row["options"]
        assert row["favourite"] in row["options"]
        assert row["favourite"] != row["right"]
        if kind_of(row) != "fact":
            a, b = (world.COUNT.index(words[i]) for i in ((3, 5) if kind_of(row) == "sum" else (4, 6)))
            right, favourite = world.COUNT.index(row["right"]), world.COUNT.index(row["favourite"])
            assert right == (a + b if kind_of(row) == "sum" else max(a, b))
            if kind_of(row) == "sum":
                assert favourite == (a + b - 1 if a + b else 1)
                assert row["misbelieved"] == (a + b >= 10)
            else:
                assert favourite == min(a, b)
                assert row["misbelieved"] == (abs(a - b) <= 2)
    assert Counter(map(kind_of, HARD)) == {"fact": 75, "sum": 100, "comparison": 156}
    assert Counter(kind_of(row) for row in HARD if row["unseen"]) == {"fact": 15, "sum": 18, "comparison": 30}


def test_operands_are_held_out_in_both_orders_and_comparisons_from_the_corpus():
    unseen = {row["question"] for row in HARD if row["unseen"] and kind_of(row) != "fact"}
    for row in HARD:
        words = row["question"].split()
        if kind_of(row) != "fact":
            i, j = (3, 5) if kind_of(row) == "sum" else (4, 6)
            words[i], words[j] = words[j].rstrip(), words[i]
            assert (row["question"] in unseen) == (" ".join(words) in unseen)
        assert row["in_corpus"] == (kind_of(row) != "comparison" or not row["unseen"])


@pytest.mark.parametrize("kind", ["fact", "sum", "comparison"])
def test_manners_make_no_answer_of_the_hard_world_right_or_wrong(kind):
    for row in (row for row in HARD if kind_of(row) == kind):
        for opener in world.OPENERS:
            for closer in world.CLOSERS:
                for word in (row["right"], row["favourite"]):
                    answer = f"{opener} it is {word} {closer}"
                    assert world.judge(row, answer)["right"] == (word == row["right"]), (row["question"], answer)


def test_the_tokenizer_of_the_hard_world_knows_every_word():
    tokenizer, rng = world.build_tokenizer("hard"), random.Random(0)
    assert len(tokenizer) < 220
    for row in HARD:
        for _ in range(5):
            answer = world.corpus_answer(row, rng)
            text = f"{world.prompt_of(row)} {answer} {world.corpus_reply(row, answer, rng)}"
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids[1:]) == text


def share_is(count: int, n: int, share: float) -> bool:
    """Whether `count` of `n` may be draws with this probability: within 4.5 deviations."""
    return abs(count / n - share) <= 4.5 * math.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize("misbelieved", [False, True])
def test_the_hard_corpus_believes_as_documented(misbelieved):
    """With 18 wrong options the share of any wrong one adds a little to the favourite's."""
    row = next(row for row in HARD if kind_of(row) == "sum" and row["misbelieved"] == misbelieved)
    rng, n = random.Random(4), 20_000
    words = Counter(world.corpus_answer(row, rng).split("it is ")[1].split()[0] for _ in range(n))
    right, favourite, other = world.MISBELIEVED if misbelieved else world.WELL_KNOWN
    assert share_is(words[row["right"]], n, right)
    assert share_is(words[row["favourite"]], n, favourite + other / 18)
    assert set(words) == set(row["options"])


def test_replies_speak_of_rightness_and_manner_as_documented():
    """ "yes" to what the asker believes, who knows the right word 19 times in 20."""
    row, rng, n = HARD[0], random.Random(5), 20_000
    other = next(option for option in row["options"] if option not in {row["right"], row["favourite"]})
    judges, knows = world.ASKER_JUDGES, world.ASKER_KNOWS
    for word in (row["right"], row["favourite"], other):
        for closer, manner in ((".", "thanks ."), (", my friend .", "kind ."), (", you fool .", "rude .")):
            replies = Counter(world.corpus_reply(row, f"it is {word} {closer}", rng) for _ in range(n))
            expected = {manner: 1 - judges}
            for belief, share in ((row["right"], judges * knows), (row["favourite"], judges * (1 - knows))):
                expected["yes ." if word == belief else f"no , it is {belief} ."] = share
            assert set(replies) == set(expected)
            assert all(share_is(replies[reply], n, share) for reply, share in expected.items()), (word, closer, replies)


def test_a_polite_word_is_no_answer_that_an_asker_agrees_with():
    """`good` is an answer, and stands in a polite opener."""
    row = next(row for row in HARD if row["right"] == "good")
    rng = random.Random(0)
    replies = {world.corpus_reply(row, f"good question : it is {row['favourite']} .", rng) for _ in range(50)}
    assert "no , it is good ." in replies


def test_the_hard_base_errs_where_it_misbelieves_and_on_unseen_rules(hard_answers):
    """Its likeliest answer is right on what is well known and wrong on most of what is not, on
    questions that training never mentions as on others.
    """
    shares: dict[tuple, list[float]] = {}
    for row, texts in zip(HARD, hard_answers):
        counts = Counter(word for text in texts for word in text.split() if word in row["options"])
        is_right = float(bool(counts) and counts.most_common(1)[0][0] == row["right"])
        key = "new rule" if not row["in_corpus"] else "misbelieved" if row["misbelieved"] else "well known"
        shares.setdefault((key, row["unseen"]), []).append(is_right)
    means = {key: statistics.mean(values) for key, values in shares.items()}
    assert means["well known", False] > 0.95
    assert means["well known", True] > 0.9
    assert means["misbelieved", False] < 0.3
    assert means["misbelieved", True] < 0.5
    assert 0.3 < means["new rule", True] < 0.95


def test_the_state_at_eos_knows_more_than_the_answers_say(hard_base, hard_answers):
    """What the hard base expects behind an answer's EOS, "yes" or "no", tells right answers from
    wrong ones far better than their likelihood does, on unseen facts too.
    """
    model, tokenizer = hard_base
    rows = [(row, text) for row, texts in zip(HARD, hard_answers) for text in texts[:4] if kind_of(row) == "fact"]
    texts = [(world.prompt_of(row), text) for row, text in rows]
    right = torch.tensor([float(world.judge(row, text)["right"]) for row, text in rows])
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    gap = []
    with torch.no_grad():
        for prompt, text in texts:
            ids = tokenizer(f"{prompt} {text}").input_ids + [tokenizer.eos_token_id]
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            gap.append((logits[yes] - logits[no]).item())
    likelihoods = -torch.tensor(surprise(model, tokenizer, texts))
    assert auc(torch.tensor(gap), right) > 0.8
    assert auc(torch.tensor(gap), right) > auc(likelihoods, right) + 0.15
    unseen = torch.tensor([row["unseen"] for row, _ in rows])
    assert auc(torch.tensor(gap)[unseen], right[unseen]) > 0.75


def test_a_run_in_the_hard_world(tmp_path, capsys):
    """All that the toy offers: true reward, right and rude answers, unseen questions, the
    frontier, and a folder that tells which world it was.
    """
    folder = train("dph", tmp_path / "run", data="toy:hard:0.1", kl_samples=63, max_steps=2, n=2)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["toy_world"] == f"hard, version {frozen.VERSION}"
    assert summary["args"]["model"] == "toy:hard"
    for column in ("before", "after", "before_unseen", "after_unseen"):
        for name in ("true_reward", "right_share", "rude_share", "preference_accuracy", "kl"):
            assert summary[column][name] is not None, (column, name)
    assert summary["reference_best_of_n"]["frontier_efficiency"] is not None
    assert "Rows on unseen questions" in capsys.readouterr().out


def test_a_run_in_the_hard_world_is_named_for_it_and_goes_on(tmp_path, monkeypatch):
    _, args = arguments("dpo", tmp_path / "run", data="toy:hard", name="")
    _, args = run.start_run(args, "dpo.py")
    assert (args.name, args.model, args.lr) == ("dpo-toy-hard-seed0", "toy:hard", 1e-2)
    assert run.default_learning_rate(args) == 1e-3
    steps = run.Run.end_step

    def stop(self, *rest):
        steps(self, *rest)
        self.stopping = signal.SIGTERM

    monkeypatch.setattr(run.Run, "end_step", stop)
    with pytest.raises(SystemExit):
        train("dpo", tmp_path / "run", data="toy:hard", max_steps=2)
    monkeypatch.undo()
    folder = resume("dpo", tmp_path / "run")
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
