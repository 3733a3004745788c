"""What pages quote is so: diffs, code, the walk through one pair, and the worked example of
CONTRIBUTING.md, which is carried out.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from common import InputError
from experiments import reading
from tests import house, pages

ROOT = house.ROOT


@pytest.fixture(scope="module")
def numbers():
    """What the walk's blocks are, and every number that stands in them as (value, digits)."""
    shown, plain = [], reading.number

    def recorded(value: float, digits: int = 3, sign: bool = False) -> str:
        shown.append((value, digits))
        return plain(value, digits, sign)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "number", recorded)
        pages.reading.cache_clear()
        pages.reading()
    return shown


@pytest.fixture(scope="module")
def walk():
    return reading.walk_of(reading.Args())


@pytest.fixture(scope="module")
def looks(walk):
    """Each method's passes after 0, 1 and 100 steps."""
    return {
        name: {steps: now for steps, (now, _) in reading.train_on_pair(script, walk, *given).items()}
        for name, (script, *given) in reading.methods_of(walk).items()
    }


# -- this repository


def test_the_pages_of_this_repository_say_what_is_so(numbers):
    assert pages.check(ROOT) == []


def test_every_digit_of_the_walk_is_far_from_being_another(numbers):
    """Other versions and processors change numbers by 1e-9 and less: no shown one may stand nearer
    than 1e-4 of its last digit to where it would be rounded to another.
    """
    assert len(numbers) > 100
    for value, digits in numbers:
        in_last_digits = abs(value) * 10**digits
        assert abs(in_last_digits % 1 - 0.5) > 1e-4, (value, digits)


# -- what the walk's page says of its numbers


def test_the_model_is_as_large_as_the_page_says(walk):
    size = sum(parameter.numel() for parameter in walk.reference.parameters())
    assert f"({size:,} weights)" in (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    assert all(parameter.dtype.itemsize == 8 for parameter in walk.reference.parameters())


def test_pushes_are_half_of_beta_times_one_minus_p_and_cancel_where_contexts_are_shared(walk, looks):
    start, beta = looks["DPO"][0], reading.dpo.Args.beta
    n = len(walk.chosen)
    for sign, side, ids, logps in zip(
        (1, -1),
        (start.pushes[:n], start.pushes[n:]),
        (walk.chosen, walk.rejected),
        reading.token_logps(walk, walk.reference),
    ):
        own = [side[i, token].item() for i, token in enumerate(ids)]
        assert own == pytest.approx([sign * beta / 2 * (1 - math.exp(logp)) for logp in logps], abs=1e-12)
    both = start.pushes[:n] + start.pushes[n:]
    assert walk.fork == 2
    assert both[:2].abs().max() < 1e-12
    parting = both[2].clone()
    assert parting[walk.chosen[2]].item() == pytest.approx(beta / 2)
    assert parting[walk.rejected[2]].item() == pytest.approx(-beta / 2)
    parting[[walk.chosen[2], walk.rejected[2]]] = 0
    assert parting.abs().max() < 1e-12
    ulma = looks["ULMA"][0].pushes
    assert (ulma[:n] + ulma[n:])[:2].abs().max() > 0.1  # imitation and its opposite do not


def test_the_first_steps_of_the_methods(looks):
    start = {name: look[0] for name, look in looks.items()}
    assert start["DPO"].loss == pytest.approx(math.log(2))
    assert start["cDPO"].loss == pytest.approx(math.log(2))
    assert start["DPH"].loss == pytest.approx(3 * math.log(2))
    assert start["ULMA"].slopes == pytest.approx([-1.0, reading.ulma.Args.beta / 2])
    for name in ("cDPO", "DPH", "TYPO"):
        assert looks[name][1].logps == pytest.approx(looks["DPO"][1].logps, abs=5e-4)
    assert all(look[1].loss < look[0].loss for look in looks.values())


def test_what_a_hundred_steps_on_one_pair_do(looks):
    last = max(reading.STEPS)
    ratios = {name: [b - a for a, b in zip(look[0].logps, look[last].logps)] for name, look in looks.items()}
    assert max(ratios["DPO"]) < -10  # both answers fall
    margin = 0.3 * (ratios["cDPO"][0] - ratios["cDPO"][1])
    assert margin == pytest.approx(math.log(9), abs=0.05)
    assert looks["ULMA"][last].logps[0] > -0.05  # by heart
    nearest = {name: max(map(abs, pair)) for name, pair in ratios.items()}
    assert min(nearest, key=nearest.get) == "TYPO"
    rewards = [looks["DPH"][last].metrics[f"rewards/{side}"] for side in ("chosen", "rejected")]
    assert rewards == pytest.approx([math.log(9), -math.log(9)], abs=0.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": "what ?"}, "expected a question of the toy world"),
        ({"chosen": " it is xyz ."}, "--chosen ' it is xyz .': holds a word that the toy's language does not have"),
        ({"rejected": reading.Args.chosen}, "both answers are the same"),
    ],
)
def test_pairs_that_the_toy_does_not_know_are_refused(given, words):
    with pytest.raises(InputError, match=re.escape(words)):
        reading.walk_of(reading.Args(**given))


# -- blocks


FIRST = '''"""One."""

import math


# [method]
def one_loss(x):
    """Of x."""
    return x * 1


def compute_loss(x):
    return one_loss(x)


# [/method]
def main():
    for i in range(3):
        print(i)
    print("end")
'''


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A repository of two scripts of a family and a page."""
    monkeypatch.setattr(pages, "FAMILIES", {"small": ["one", "two"]})
    (tmp_path / "docs").mkdir()
    (tmp_path / "one.py").write_text(FIRST)
    (tmp_path / "two.py").write_text(FIRST.replace('"""One."""', '"""Two."""').replace("x * 1", "x * 2"))
    (tmp_path / "docs" / "two.md").write_text("# Two\n\n<!-- generated: diff one.py two.py -->\n<!-- /generated -->\n")
    return tmp_path


def test_a_diff_is_shown_by_part_and_goes_stale(small):
    page = small / "docs" / "two.md"
    assert pages.check(small) == [
        "docs/two.md:3: diff one.py two.py has changed; python -m tests.pages --fix writes it anew."
    ]
    pages.fix(small)
    expected = '@@ docstring @@\n-"""One."""\n+"""Two."""\n@@ one_loss @@\n-    return x * 1\n+    return x * 2\n'
    assert f"```diff\n{expected}```\n<!-- /generated -->" in page.read_text()
    assert pages.check(small) == []
    (small / "two.py").write_text((small / "two.py").read_text().replace("x * 2", "x * 3"))
    assert len(pages.check(small)) == 1
    assert pages.check(small, ("docs/two.md",)) == pages.check(small)


def test_of_a_long_diff_the_loss_is_shown_and_the_command_named(small):
    more = "".join(f"    print({i})\n" for i in range(pages.LONGEST))
    (small / "two.py").write_text((small / "two.py").read_text() + more)
    pages.fix(small)
    text = (small / "docs" / "two.md").read_text()
    assert "+    return x * 2\n" in text
    assert "docstring" not in text
    assert "print" not in text
    assert "`diff one.py two.py` shows the rest" in text


def test_code_is_shown_without_its_docstring_or_from_line_to_line(small):
    assert pages.code(small, "one.py", "one_loss") == "```python\ndef one_loss(x):\n    return x * 1\n```"
    assert pages.code(small, "one.py", "main", "for i", "print(i") == (
        "```python\nfor i in range(3):\n    print(i)\n```"
    )
    assert pages.code(small, "one.py", "main", 'print("end').count("\n") == 2


def test_of_two_functions_the_changed_lines_alone_are_shown(small):
    shown = pages.block(small, "diff one.py two.py one_loss one_loss")
    assert shown == "```diff\n-    return x * 1\n+    return x * 2\n```"
    assert pages.block(small, "diff one.py two.py main main") == "```diff\n```"
    with pytest.raises(pages.Unknown, match=r"two\.py has no two_loss"):
        pages.block(small, "diff one.py two.py one_loss two_loss")


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ("code one.py two_loss", "one.py has no two_loss"),
        ("code three.py main", "there is no three.py"),
        ('code one.py main "while"', "one.py has no line there that begins with 'while'"),
        ("toy toy_pairs facts", "results/toy_pairs.json has no toy_pairs.json"),
        ("pareto teacher", "results/pareto_toy.jsonl has no teacher"),
        (
            "quote one.py",
            "'quote' is none of diff, code, reading, chat_model, claims, frontier, pareto, sentiment, toy",
        ),
    ],
)
def test_what_is_not_there_is_named(small, mark, words):
    (small / "docs" / "one.md").write_text(f"\n<!-- generated: {mark} -->\nas it was\n<!-- /generated -->\n")
    pages.fix(small)
    assert f"docs/one.md:2: {words}." in pages.check(small)
    assert "as it was" in (small / "docs" / "one.md").read_text()


def test_a_table_of_toy_runs(small):
    """Numbers of a made file; a command is found without the defaults that its line names."""
    facts = {"seeds": [0, 1], "git_commit": ["a" * 40, "b" * 40], "device": "cpu", "seconds": 1.0}
    facts["versions"] = {"torch": "2", "transformers": "5"}
    reports = {
        "before": {"kl": [0.0, 0.0, [0.0, 0.0]], "true_reward": [-0.1, 0.02, [-0.12, -0.08]]},
        "after": {
            "kl": [1.234, 0.1, [1.2, 1.3]],
            "true_reward": [0.5, None, [0.5, None]],
            "rude_share": [0.1, 0.0, []],
        },
        "after_best_of_n": {"kl": [2.0, 0.0, [2.0, 2.0]]},
    }
    (small / "results").mkdir()
    command = "python dph.py --lr 0.001 --model toy --kl-samples 400 --dph-loss contrastive"
    text = json.dumps([{"command": command, **facts, **reports}])
    (small / "results" / "toy_x.json").write_text(text)
    page = small / "docs" / "one.md"
    page.write_text('<!-- generated: toy toy_x trained "dph.py --dph-loss contrastive" -->\n<!-- /generated -->\n')
    pages.fix(small)
    assert page.read_text().splitlines()[1:-1] == [
        "| trained questions | KL, nats | true reward | rude |",
        "| --- | --- | --- | --- |",
        "| before | 0.00 ± 0.00 | -0.10 ± 0.02 | - |",
        "| `dph.py --dph-loss contrastive` | 1.23 ± 0.10 | 0.50 | 0.10 ± 0.00 |",
        "| `dph.py --dph-loss contrastive`, best of 8 | 2.00 ± 0.00 | - | - |",
    ]
    page.write_text("<!-- generated: toy toy_x facts -->\n<!-- /generated -->\n")
    pages.fix(small)
    assert "commit aaaaaaa, bbbbbbb; torch 2, transformers 5; cpu," in page.read_text()
    page.write_text('<!-- generated: toy toy_x trained "dph.py" -->\n<!-- /generated -->\n')
    assert "docs/one.md:1: results/toy_x.json has no dph.py." in pages.check(small)


def test_marks_that_stand_alone_and_pages_that_are_missing_are_found(small):
    page = small / "docs" / "two.md"
    page.write_text(page.read_text().replace("<!-- /generated -->\n", ""))
    assert "docs/two.md:1: a mark of a generated block stands alone." in pages.check(small)
    page.write_text("# Two\n")
    (found,) = pages.check(small)
    assert found == "docs/two.md:1: the page does not show its diff; it needs <!-- generated: diff one.py two.py -->."
    page.unlink()
    assert pages.check(small) == ["docs/two.md:1: two.py has no page."]


# -- the worked example


def example_steps(text: str) -> list[tuple[str, str]]:
    """(what, text) of each block of the worked example, in order: the path of a file to write, or
    "bash".
    """
    example = text.split("## A worked example")[1]
    found = re.findall(r"(?:`([\w./]+)`:\n\n)?^ *```(\w+)\n(.*?)^ *```$", example, re.DOTALL | re.MULTILINE)
    return [("bash" if kind == "bash" else path, textwrap.dedent(block)) for path, kind, block in found]


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.study)])
def test_the_worked_example_works_as_it_stands(whole, tmp_path):
    """Without --all the tests for the whole family are those of one file, and no fault is made."""
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns(".git", ".*cache*", ".venv*", "__pycache__", "runs", "shared")
    shutil.copytree(ROOT, copy, ignore=left_out)
    steps = example_steps((copy / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert [what for what, _ in steps if what != "bash"] == [
        "hinge.patch", "tests/test_hinge.py", "tests/faults/hinge.py", "docs/hinge.md"
    ]  # fmt: skip
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": programs, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "-n 0 -p no:cacheprovider"}
    printed = []
    for what, text in steps:
        if what != "bash":
            (copy / what).write_text(text, encoding="utf-8")
            continue
        for line in text.splitlines():
            if not whole and "tests.mutants" in line:
                continue
            command = line if whole else line.replace("-k hinge", "-k hinge tests/test_logps.py")
            done = subprocess.run(command, shell=True, cwd=copy, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            printed.append(done.stdout)
    assert "+    return F.relu(1 - logits)" in (copy / "docs" / "hinge.md").read_text(encoding="utf-8")
    assert re.search(r"^[1-9]\d* passed", printed[-2 if whole else -1], re.MULTILINE)
    changed = {path.relative_to(copy) for path in copy.rglob("*.py") if not_as_here(path, copy)}
    assert changed == {
        Path(name) for name in ("hinge.py", "tests/house.py", "tests/test_hinge.py", "tests/faults/hinge.py")
    }


def not_as_here(path: Path, copy: Path) -> bool:
    """Whether a file of the copy is not the one here."""
    here = ROOT / path.relative_to(copy)
    return not here.exists() or here.read_bytes() != path.read_bytes()
