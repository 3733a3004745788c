"""The checking tool: silent on this repository, and on a copy that is broken on purpose it names
file and line.
"""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import house, mutants


def changed(path: Path, old: str, new: str) -> int:
    """Replaces the first `old` in a file, which must be there; returns the line of it."""
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return text[: text.index(old)].count("\n") + 1


@pytest.fixture
def copy(tmp_path) -> Path:
    """A repository with dpo.py, its packages, the tool, and a throw-away sibling with a docstring
    and regions of its own.
    """
    root = tmp_path / "copy"
    root.mkdir()
    shutil.copyfile(house.ROOT / "dpo.py", root / "dpo.py")
    for package in ("common", "toy", "report", "judging"):
        shutil.copytree(house.ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests").mkdir()
    shutil.copyfile(house.ROOT / "tests" / "house.py", root / "tests" / "house.py")
    shutil.copyfile(root / "dpo.py", root / "cdpo.py")
    changed(root / "cdpo.py", '"""DPO: ', '"""A throw-away sibling.\n\nDPO: ')
    path = root / "cdpo.py"
    path.write_text(path.read_text(encoding="utf-8").replace("dpo_loss(", "throw_away_loss("), encoding="utf-8")
    changed(root / "cdpo.py", "-F.logsigmoid(", "-0.9 * F.logsigmoid(")
    changed(
        root / "cdpo.py", "    beta: float = 0.3", '    beta: float = 0.3\n    """One more."""\n    eps: float = 0.1'
    )
    changed(root / "cdpo.py", "beta=args.beta)", "beta=args.beta - args.eps)")
    return root


def run_tool(root: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tests.house", *flags], cwd=root, capture_output=True, text=True, timeout=60
    )


def test_this_repository_is_in_order():
    assert house.check(house.ROOT) == []


def test_a_sibling_whose_regions_differ_is_in_order(copy):
    assert house.check(copy) == []
    before = (copy / "cdpo.py").read_text()
    done = run_tool(copy, "--fix")
    assert (done.returncode, done.stdout) == (0, "The house is in order.\n")
    assert (copy / "cdpo.py").read_text() == before


TRUNK_LINE = "        run.end_step(len(rows_of_step)"


@pytest.mark.parametrize("kind", ["changed", "dropped", "added", "first line", "last line", "indentation of a mark"])
def test_a_trunk_line_is_found_and_fixed(copy, kind):
    path = copy / "cdpo.py"
    before = path.read_text()
    if kind == "changed":
        line = changed(path, TRUNK_LINE, TRUNK_LINE.replace("rows_of_step", "rows"))
    elif kind == "dropped":
        line = changed(path, next(x for x in before.splitlines(True) if x.startswith(TRUNK_LINE)), "")
    elif kind == "added":
        line = changed(path, TRUNK_LINE, "        loss = 2 * loss\n" + TRUNK_LINE)
    elif kind == "first line":
        line = changed(path, "from dataclasses import dataclass\n", "import dataclasses\n")
    elif kind == "last line":
        line = changed(path, "main(tyro.cli(Args))", "main(Args())")
    else:
        line = changed(path, "    # [/method]\n", "        # [/method]\n")
    found = house.check(copy)
    assert len(found) == 1
    assert found[0].startswith(f"cdpo.py:{line}: ")
    assert run_tool(copy).returncode == 1
    assert run_tool(copy, "--fix").returncode == 0
    assert path.read_text() == before


def test_a_trunk_change_is_made_once(copy):
    changed(copy / "dpo.py", TRUNK_LINE, "        # a change for the whole family\n" + TRUNK_LINE)
    assert house.check(copy)
    assert run_tool(copy, "--fix").returncode == 0
    fixed = (copy / "cdpo.py").read_text()
    assert "# a change for the whole family" in fixed
    assert "-0.9 * F.logsigmoid(" in fixed
    assert fixed.startswith('"""A throw-away sibling.')


@pytest.mark.parametrize("kind", ["one region more", "one region less"])
def test_fix_refuses_another_number_of_regions(copy, kind):
    path = copy / "cdpo.py"
    if kind == "one region more":
        changed(path, TRUNK_LINE, "        # [method]\n        # [/method]\n" + TRUNK_LINE)
    else:
        changed(path, "    # [method]\n    # [/method]\n", "")
    before = path.read_text()
    done = run_tool(copy, "--fix")
    assert done.returncode == 1
    assert done.stdout.startswith("cdpo.py:1: ")
    assert "method regions, but dpo.py has" in done.stdout
    assert path.read_text() == before


@pytest.mark.parametrize("kind", ["never ends", "inside another", "without a beginning"])
def test_marks_pair_up(copy, kind):
    path = copy / "cdpo.py"
    if kind == "never ends":
        text = path.read_text()
        cut = text.rindex("    # [/method]\n")
        path.write_text(text[:cut] + text[cut + len("    # [/method]\n") :])
        line = text[: text.rindex("# [method]")].count("\n") + 1
    elif kind == "inside another":
        line = changed(path, "    # [/method]\n", "    # [method]\n    # [/method]\n")
    else:
        line = changed(path, TRUNK_LINE, "        # [/method]\n" + TRUNK_LINE)
    before = path.read_text()
    assert [x for x in house.check(copy) if x.startswith(f"cdpo.py:{line}: cannot be read: a method region")]
    assert run_tool(copy, "--fix").returncode == 1
    assert path.read_text() == before


BREAKS = {
    "an import from above": (
        "common/batches.py",
        "import torch\n",
        "import torch\n\nfrom common import run\n",
        "common/batches.py:{third}: common.batches imports common.run, which is not in a layer below its own.",
    ),
    "a circle inside a function": (
        "toy/world.py",
        "    names = {",
        "    from toy.base import base_model\n\n    names = {",
        "toy/world.py:{line}: toy.world imports toy.base, which is not in a layer below its own.",
    ),
    "a name that common does not have": (
        "dpo.py",
        "models.bind_forward(",
        "models.bind(",
        "dpo.py:{line}: there is no bind in common.models.",
    ),
    "a long function": (
        "common/batches.py",
        "    if not rows:\n",
        "    rows = list(rows)\n" * 45 + "    if not rows:\n",
        "common/batches.py:{plan}: plan_batches has",
    ),
    "a long script": ("dpo.py", "CHUNK, BLOCK", "_ = 0\n" * 345 + "CHUNK, BLOCK", "dpo.py:1: "),
    "a field that nothing reads": (
        "dpo.py",
        "    beta: float = 0.3",
        '    unread: float = 0.0\n    """Does nothing."""\n    beta: float = 0.3',
        "the field unread of Args is read",
    ),
    "a field that only its range check reads": (
        "common/run.py",
        "self._args.warmup",
        "0.1",
        "dpo.py:{warmup}: the field warmup of Args is read nowhere",
    ),
    "a field without a sentence": (
        "dpo.py",
        "    beta: float = 0.3",
        "    eps: float = 0.1\n    beta: float = 0.3",
        "the field eps of Args has no sentence",
    ),
    "a method's name in the trunk": (
        "dpo.py",
        TRUNK_LINE,
        "        # not so in cDPO\n" + TRUNK_LINE,
        "dpo.py:{line}: the trunk names a method, cDPO",
    ),
    "a method's name in a name of the trunk": (
        "dpo.py",
        TRUNK_LINE,
        "        dpo_lr = lr\n" + TRUNK_LINE,
        "dpo.py:{line}: the trunk names a method, dpo",
    ),
    "a renamed helper": ("cdpo.py", "def pair_metrics(", "def metrics_of(", "cdpo.py:{line}: differs from the trunk"),
    "common at the top": (
        "dpo.py",
        "import torch\n",
        "from common import data\nimport torch\n",
        "dpo.py:{line}: common is imported outside of main",
    ),
    "datasets in a function": (
        "dpo.py",
        "    return TokenLogps.apply(head(hidden), targets)",
        "    import datasets\n    return TokenLogps.apply(head(hidden), targets)",
        "datasets is imported outside of main",
    ),
    "a script imports a script": (
        "dpo.py",
        "import torch\n",
        "import cdpo\nimport torch\n",
        "dpo.py:{line}: a script imports the script cdpo",
    ),
    "common imports a script": (
        "common/data.py",
        "import random\n",
        "import random\nfrom dpo import dpo_loss\n",
        "common/data.py:{next}: a package imports the script dpo",
    ),
    "no docstring": ("dpo.py", '"""DPO: ', '_ = """DPO: ', "dpo.py:1: no docstring"),
    "a docstring's flag": (
        "dpo.py",
        "--lr 1e-5",
        "--learning-rate 1e-5",
        "dpo.py:{line}: there is no flag --learning-rate of that program",
    ),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_break_is_found(copy, kind):
    name, old, new, expected = BREAKS[kind]
    if name == "dpo.py":
        (copy / "cdpo.py").unlink()
    line = changed(copy / name, old, new)
    if kind == "a field that only its range check reads":
        (copy / name).write_text((copy / name).read_text().replace(old, new))
    warmup = 1 + next(
        i for i, text in enumerate((copy / "dpo.py").read_text().splitlines()) if text.startswith("    warmup:")
    )
    batches = (copy / "common" / "batches.py").read_text().splitlines()
    plan = next(i for i, text in enumerate(batches, 1) if "def plan_batches" in text)
    places = {"line": line, "next": line + 1, "third": line + 2, "warmup": warmup, "plan": plan}
    found = house.check(copy)
    assert any(expected.format(**places) in text for text in found), found


def test_helpers_of_one_name_are_identical_across_families(copy):
    shutil.copyfile(copy / "dpo.py", copy / "sft.py")
    assert house.check(copy) == []
    line = changed(
        copy / "sft.py",
        "def token_logps(head, hidden: torch.Tensor, targets: torch.Tensor)",
        "def token_logps(head, hidden, targets)",
    )
    assert house.check(copy) == [f"sft.py:{line}: token_logps is not the token_logps of cdpo.py."]
    changed(copy / "cdpo.py", "throw_away_loss(", "dpo_loss(")
    assert any("dpo_loss is not the dpo_loss of cdpo.py" in text for text in house.check(copy))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Pass `--no-such-flag` to it.", "there is no flag --no-such-flag."),
        ("```\npython cdpo.py --eps 0.2 --no-share-prompt \\\n  --beta=0.1\n```", None),
        ("```\npython dpo.py --eps 0.2\n```", "there is no flag --eps of that program."),
        ("```\npython dpo.py --beta 0.2 \\\n    --eps 0.2\n```", "there is no flag --eps of that program."),
        (
            "```\n.venv/bin/pip install --upgrade x && .venv/bin/python dpo.py --bta 1\n```",
            "there is no flag --bta of that program.",
        ),
        ("```\ntorchrun --nproc-per-node 2 dpo.py --seed 1\n```", None),
        ("```\ntorchrun --nproc-per-node 2 dpo.py --sed 1\n```", "there is no flag --sed of that program."),
        (
            "`uv pip install --torch-backend cpu -r requirements.txt` or `--torch-backend`",
            "docs/page.md:3: there is no requirements.txt.",
        ),
        ("python -m common.evaluate --output scores.jsonl", None),
        ("python -m common.evaluate --beta 1", "there is no flag --beta of that program."),
        ("python -m common.evaluation --model toy", "there is no common.evaluation."),
        ("python -m tests.house --fix", None),
        ("See [the page](metrics.md).", "there is no metrics.md."),
        ("See [the file](../dpo.py) and `common/*.py`; a run's `script.py`, `runs/x/args.json`.", None),
        ("See `common/absent.py`.", "there is no common/absent.py."),
        ("See `ppo.py`.", "there is no ppo.py."),
    ],
)
def test_documents(copy, text, expected):
    (copy / "docs").mkdir()
    (copy / "docs" / "page.md").write_text("# A page\n\n" + text + "\n")
    found = house.check(copy)
    if expected is None:
        assert found == []
    else:
        assert any(line.startswith("docs/page.md:") and expected in line for line in found), found


@pytest.mark.parametrize("script", sorted(path.stem for path in house.ROOT.glob("*.py")))
def test_help_fits_a_terminal_of_100_columns(script, capsys, monkeypatch):
    """The docstring is printed as it stands (ruff checks its width); the options are tyro's."""
    import tyro

    module = importlib.import_module(script)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(SystemExit):
        tyro.cli(module.Args, args=["--help"])
    text = module.__doc__ + capsys.readouterr().out
    assert max(map(len, text.split("\n"))) <= 100
    assert "\n\n\n" not in text
    for name in vars(module.Args()):
        assert f"--{name.replace('_', '-')}" in text


# What the packages of requirements.txt bring with them.
BROUGHT = "torch transformers datasets tyro numpy tqdm pyarrow jinja2 safetensors tokenizers".split()
BROUGHT += ["huggingface_hub", "packaging"]


def test_optional_packages_stand_in_one_file_and_messages_name_no_others():
    lines = (house.ROOT / "requirements-optional.txt").read_text(encoding="utf-8").splitlines()
    listed = {line.split(">")[0] for line in lines if line and not line.startswith("#")}
    folders = ("", *(f"{name}/" for name in (*house.PACKAGES, "experiments", "benchmarks")))
    sources = [path.read_text(encoding="utf-8") for name in folders for path in house.ROOT.glob(f"{name}*.py")]
    ours = {path.stem for path in house.ROOT.glob("*.py")} | set(house.FOLDERS)
    imported = {module for source in sources for _, module in house.imports_of(ast.parse(source))}
    imported -= ours | set(BROUGHT) | set(sys.stdlib_module_names)
    assert imported | {"tensorboard", "accelerate"} == listed  # imported by torch and lm_eval
    named = {name for source in sources for name in re.findall(r"pip install (\w+)", source)}
    assert named
    assert named <= listed
    for source in sources:
        assert source.count("pip install ") == source.count("requirements-optional.txt)")


def test_every_fault_still_fits_the_code():
    """A fault whose text is gone is made nowhere, and tells nothing; the run of all faults, which
    says so too, takes minutes.
    """
    found = []
    for mutant in mutants.whole_table():
        for name in mutant.files:
            count = (house.ROOT / name).read_text(encoding="utf-8").count(mutant.old)
            if count != 1:
                found.append(f"{mutant.name}: its text is {count} times in {name}, not once")
    assert found == []
