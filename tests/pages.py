"""Keeps what pages quote true: `python -m tests.pages [docs/dpo.md ...]` prints each block that is
not what it says it is, and exits 1; with --fix it writes the blocks.

A block stands between `<!-- generated: KIND ARGUMENTS -->` and `<!-- /generated -->`. Kinds:
    diff dpo.py cdpo.py               what sets two scripts apart
    diff dpo.py cdpo.py dpo_loss cdpo_loss    the changed lines of two functions alone
    code dpo.py dpo_loss              a function without its docstring
    code dpo.py main "for rows" "x"   of it the lines from that which begins with "for rows" to the
                                      next that begins with "x", or to the end where "x" is left out
    reading NAME                      a block of experiments/reading.py
    chat_model table polite_...       what results/chat_model.jsonl says: experiments/chat_pages.py
    pareto pretraining                a table of results/pareto_toy.jsonl: experiments/pareto.py
    claims table 1 4                  claims 1 to 4, from the result files: experiments/claims.py
    claims verdicts                   the claims of each verdict
    toy toy_pairs trained "dpo.py"    a table of toy runs: experiments/toy_pages.py
    frontier best                     what results/frontier.jsonl says: frontier_pages.py there
    sentiment table MODEL             of results/sentiment_MODEL.jsonl: sentiment_pages.py there
"""

import ast
import importlib
import re
import shlex
import sys
import textwrap
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

from tests.house import FAMILIES, OPEN

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"^(<!-- generated: (.*?) -->\n)(.*?)^(<!-- /generated -->)", re.DOTALL | re.MULTILINE)
LONGEST = 64  # changed lines of a diff that is shown whole
LOSS = 1  # of the sections of a script: the losses and compute_loss


MADE = {  # kind -> (module of experiments/ that makes its blocks, what lacks one, whether it is told where results are)
    "chat_model": ("chat_pages", "results/chat_model.jsonl", False),
    "claims": ("claims", "experiments/claims.py", True),
    "frontier": ("frontier_pages", "experiments/frontier_pages.py", False),
    "pareto": ("pareto", "results/pareto_toy.jsonl", True),
    "sentiment": ("sentiment_pages", "experiments/sentiment_pages.py", False),
    "toy": ("toy_pages", "results/{}.json", True),
}


class Unknown(Exception):
    """A block asks for something that is not there."""


# -- code


def tree_of(root: Path, file: str) -> tuple[list[str], ast.Module]:
    """The lines of a Python file, and what they mean."""
    if not (root / file).is_file():
        raise Unknown(f"there is no {file}")
    text = (root / file).read_text(encoding="utf-8")
    return text.splitlines(), ast.parse(text)


def code(root: Path, file: str, name: str, first: str = "", last: str = "") -> str:
    """Lines of the function or method `name` of a file, as a fenced block."""
    lines, node = tree_of(root, file)
    for part in name.split("."):
        node = next((child for child in node.body if getattr(child, "name", "") == part), None)
        if node is None:
            raise Unknown(f"{file} has no {name}")
    inside = lines[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        inside[docstring.lineno - node.lineno : docstring.end_lineno - node.lineno + 1] = []
    if first:
        inside = inside[place_of(inside, first, file) :]
    if last:
        inside = inside[: place_of(inside, last, file) + 1]
    return "\n".join(["```python", *textwrap.dedent("\n".join(inside)).splitlines(), "```"])


def place_of(lines: list[str], words: str, file: str) -> int:
    """The number of the first line that begins with these words."""
    for number, line in enumerate(lines):
        if line.strip().startswith(words):
            return number
    raise Unknown(f"{file} has no line there that begins with {words!r}")


# -- diffs


def owners_of(lines: list[str], tree: ast.Module) -> list[str]:
    """The part of the file that each line belongs to: the docstring, a function, a class, or the
    lines between them.
    """
    owners = [""] * len(lines)
    for node in tree.body:
        is_docstring = node is tree.body[0] and ast.get_docstring(tree) is not None
        name = "docstring" if is_docstring else getattr(node, "name", "")
        begin = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))])
        owners[begin - 1 : node.end_lineno] = [name] * (node.end_lineno - begin + 1)
    return owners


def sections_of(lines: list[str], tree: ast.Module) -> list[int]:
    """Where a script's parts begin and end: what stands above its first method region, from there
    to the end of `compute_loss`, and the rest.
    """
    begin = next((i for i, line in enumerate(lines) if line.strip() == OPEN), 0)
    ends = [node.end_lineno for node in tree.body if getattr(node, "name", "") == "compute_loss"]
    return [0, begin, *(ends or [begin]), len(lines)]


def hunks_of(root: Path, a: str, b: str) -> list[tuple[int, str, list[str]]]:
    """(section, part, lines with - or + before them) of each stretch where two scripts differ."""
    (old, old_tree), (new, new_tree) = tree_of(root, a), tree_of(root, b)
    old_owners, new_owners = owners_of(old, old_tree), owners_of(new, new_tree)
    (i0, *old_ends), (k0, *new_ends) = sections_of(old, old_tree), sections_of(new, new_tree)
    hunks = []
    for section, (i1, k1) in enumerate(zip(old_ends, new_ends)):
        for kind, i, j, k, m in SequenceMatcher(None, old[i0:i1], new[k0:k1], autojunk=False).get_opcodes():
            if kind != "equal":
                owners = [*new_owners[k0 + k : k0 + m], *old_owners[i0 + i : i0 + j]]
                lines = [f"-{line}" for line in old[i0 + i : i0 + j]] + [f"+{line}" for line in new[k0 + k : k0 + m]]
                hunks.append((section, next(filter(None, owners), ""), lines))
        i0, k0 = i1, k1
    return hunks


def changed_lines(old: list[str], new: list[str]) -> list[str]:
    """Lines that were taken away, with - before them, and those that came, with +."""
    lines = []
    for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "equal":
            lines += [f"-{line}" for line in old[i:j]] + [f"+{line}" for line in new[k:m]]
    return lines


def diff(root: Path, a: str, b: str, *functions: str) -> str:
    """What sets two scripts apart, as a fenced block; of a long diff the losses and compute_loss,
    with a sentence that names the command for the rest. With the names of a function in each, the
    changed lines of those alone, docstrings left out.
    """
    if functions:
        old, new = (code(root, file, name).splitlines()[1:-1] for file, name in zip((a, b), functions, strict=True))
        return "\n".join(["```diff", *changed_lines(old, new), "```"])
    hunks = hunks_of(root, a, b)
    count = sum(len(lines) for _, _, lines in hunks)
    text, part = ["```diff"], None
    for section, name, lines in hunks:
        if section == LOSS or count <= LONGEST:
            text += [f"@@ {name or 'between functions'} @@"] * (name != part) + lines
            part = name
    text.append("```")
    if count > LONGEST:
        text += ["", f"This is the first method region up to `compute_loss`; `diff {a} {b}` shows the rest."]
    return "\n".join(text)


# -- pages


@cache
def reading() -> dict[str, str]:
    """The blocks of docs/reading.md: a model is trained for them."""
    from experiments.reading import blocks

    return blocks()


def block(root: Path, words: str) -> str:
    """What a mark asks for; Unknown where there is no such thing."""
    kind, *arguments = shlex.split(words)
    if kind == "reading":
        (name,) = [" ".join(arguments)]
        if name not in reading():
            raise Unknown(f"experiments/reading.py has no block {name!r}")
        return reading()[name]
    if kind in MADE:
        module, lacking, takes_results = MADE[kind]
        made = importlib.import_module(f"experiments.{module}").block
        try:
            return made(*[root / "results"] * takes_results, *arguments)
        except KeyError as error:
            raise Unknown(f"{lacking.format(*arguments)} has no {error.args[0]}") from None
    if kind not in {"diff", "code"}:
        raise Unknown(f"{kind!r} is none of diff, code, reading, {', '.join(MADE)}")
    return {"diff": diff, "code": code}[kind](root, *arguments)


def filled(root: Path, text: str) -> str:
    """A page with its blocks as they should be."""
    return MARK.sub(lambda found: f"{found[1]}{block(root, found[2])}\n{found[4]}", text)


def pages_of(root: Path, names: tuple[str, ...]) -> list[Path]:
    """The documents that may hold blocks, or those with these names."""
    return [root / name for name in names] or [*sorted(root.glob("*.md")), *sorted(root.glob("docs/*.md"))]


def check(root: Path, names: tuple[str, ...] = ()) -> list[str]:
    """All findings in a repository's pages, or in those with these names, as "file:line:
    sentence".
    """
    found = []
    for path in pages_of(root, names):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        blocks = list(MARK.finditer(text))
        if len(re.findall(r"^<!-- /?generated", text, re.MULTILINE)) != 2 * len(blocks):
            found.append(f"{name}:1: a mark of a generated block stands alone.")
        for one in blocks:
            where = f"{name}:{text[: one.start()].count(chr(10)) + 1}"
            try:
                if one[3] != block(root, one[2]) + "\n":
                    found.append(f"{where}: {one[2]} has changed; python -m tests.pages --fix writes it anew.")
            except Unknown as error:
                found.append(f"{where}: {error}.")
    return found + check_diffs_are_shown(root)


def check_diffs_are_shown(root: Path) -> list[str]:
    """The page of every script of a family shows what sets it apart from the family's first."""
    found = []
    for first, *others in FAMILIES.values():
        for script in (name for name in others if (root / f"{name}.py").exists()):
            page, mark = root / "docs" / f"{script}.md", f"<!-- generated: diff {first}.py {script}.py -->"
            if not page.exists():
                found.append(f"docs/{script}.md:1: {script}.py has no page.")
            elif mark not in page.read_text(encoding="utf-8"):
                found.append(f"docs/{script}.md:1: the page does not show its diff; it needs {mark}.")
    return found


def fix(root: Path, names: tuple[str, ...] = ()) -> None:
    """Writes the blocks; a page that asks for what is not there stays."""
    for path in pages_of(root, names):
        text = path.read_text(encoding="utf-8")
        try:
            new = filled(root, text)
        except Unknown:
            continue
        if new != text:
            path.write_text(new, encoding="utf-8")


def main() -> int:
    """Prints findings; the exit status is 1 where there are any."""
    names = tuple(word for word in sys.argv[1:] if word != "--fix")
    if gone := [name for name in names if not (ROOT / name).is_file()]:
        raise SystemExit(f"{gone[0]}: there is no such page.")
    if "--fix" in sys.argv[1:]:
        fix(ROOT, names)
    found = check(ROOT, names)
    print("\n".join(found) or "The pages say what is so.")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
