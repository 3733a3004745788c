"""Keeps the house in order: `python -m tests.house` prints what it finds as "file:line: sentence" and exits 1; with --fix it first copies the
trunk of each family's first script to the others.

A script is read as a trunk and parts of its own: its docstring and the regions between `# [method]` and `# [/method]`. Within a family the
trunks are the same line by line, marks included, so a diff of two scripts shows the method and nothing else. A region may be empty.
"""

import ast
import re
import sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Scripts that share a trunk; the first that exists is the one to change. The other scripts stand alone.
FAMILIES = {
    "pairs": ["dpo", "cdpo", "typo", "dph"],
    "labelled answers": ["pointwise_dpo", "ulma"],
    "scored corpus": ["mle_pretrain", "filtered_pretrain", "conditional_pretrain", "unlikelihood_pretrain", "rwr_pretrain", "awr_pretrain"],
}
OPEN, CLOSE = "# [method]", "# [/method]"
DIFFERENT_EVERYWHERE = {"Args", "main", "compute_loss"}  # names that every script has with another content
FOLDERS = ("common", "tests", "docs", "experiments", "benchmarks", ".ci")  # a path that a document names in one of these must exist
PROGRAMS = set("pip pip3 uv git torchrun accelerate venv pytest ruff curl hf docker conda".split())  # their flags are not ours
RUN_FILES = {"script.py"}  # found in run folders, not here


@dataclass
class Source:
    """A Python file; `trunk` holds the stretches between its own parts as (line number, line), `own` those parts: docstring, regions."""

    path: Path
    tree: ast.Module
    trunk: list[list[tuple[int, str]]]
    own: list[list[str]]

    @property
    def name(self) -> str:
        return self.path.name


def read(path: Path) -> Source:
    """Parses a script. Raises SyntaxError for what is not Python and for marks that do not pair up."""
    lines = path.read_text(encoding="utf-8").splitlines()
    tree = ast.parse("\n".join(lines))
    has_docstring = ast.get_docstring(tree) is not None
    docstring = range(tree.body[0].lineno, tree.body[0].end_lineno + 1) if has_docstring else range(0)
    trunk, own, opened = ([[]] if has_docstring else [[], []]), [[]], 0
    for number, line in enumerate(lines, 1):
        mark = line.strip() if number not in docstring else ""
        if mark == (OPEN if opened else CLOSE):
            raise SyntaxError("a method region begins inside another, or ends without a beginning", (path.name, number, 0, line))
        if mark == CLOSE:
            opened = 0
            trunk.append([])
        if number in docstring or opened:
            own[-1].append(line)
        else:
            trunk[-1].append((number, line))
        if mark == OPEN:
            opened = number
            own.append([])
        if docstring and number == docstring[-1]:
            trunk.append([])
    if opened:
        raise SyntaxError("a method region begins and never ends", (path.name, opened, 0, ""))
    return Source(path, tree, trunk, own)


# --------------------------------------------------------------------------------------------------------------- families


def families(sources: list[Source]) -> list[list[Source]]:
    """The scripts of each family that exist, the one that holds the trunk first."""
    by_stem = {source.path.stem: source for source in sources}
    found = [[by_stem[stem] for stem in stems if stem in by_stem] for stems in FAMILIES.values()]
    return [members for members in found if members]


def regions_differ(first: Source, other: Source) -> list[str]:
    """One finding where two scripts cannot be compared, because they do not have the same number of method regions."""
    if len(first.own) == len(other.own):
        return []
    return [f"{other.name}:1: {len(other.own) - 1} method regions, but {first.name} has {len(first.own) - 1}; an empty region is allowed."]


def check_trunk(first: Source, other: Source) -> list[str]:
    """Lines of `other`, outside of its own parts, that are not the trunk's."""
    found = []
    for expected, seen in zip(first.trunk, other.trunk):
        for kind, a, _, c, d in SequenceMatcher(None, [x for _, x in expected], [x for _, x in seen], autojunk=False).get_opcodes():
            if kind == "insert":
                found.append(f"{other.name}:{seen[c][0]}: {d - c} lines that the trunk in {first.name} does not have: {seen[c][1].strip()!r}")
            elif kind != "equal":
                line = (seen[c] if c < len(seen) else seen[-1] if seen else (1, ""))[0]
                found.append(f"{other.name}:{line}: differs from the trunk, {first.name}:{expected[a][0]}: {expected[a][1].strip()!r}")
    return found


def fix(root: Path) -> list[str]:
    """Copies each family's trunk to its other scripts, which keep their docstring and regions. Returns what could not be done."""
    sources, refused = read_all(root)
    for first, *others in families(sources):
        for other in others:
            differ = regions_differ(first, other)
            refused += differ
            if not differ and check_trunk(first, other):
                lines = [line for _, line in first.trunk[0]]
                for own, stretch in zip(other.own, first.trunk[1:]):
                    lines += own + [line for _, line in stretch]
                other.path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return refused


def check_method_names(first: Source, names: list[str]) -> list[str]:
    """The trunk serves every method of the family, so it names none of them."""
    pattern = re.compile(rf"(?<![a-z0-9])({'|'.join(names)})(?![a-z0-9])", re.IGNORECASE)
    hits = [(n, hit) for stretch in first.trunk for n, line in stretch if (hit := pattern.search(line))]
    return [f"{first.name}:{n}: the trunk names a method, {hit[0]}." for n, hit in hits]


# ------------------------------------------------------------------------------------------------------------- every script


def check_same_names(sources: list[Source]) -> list[str]:
    """Functions and classes of one name are one function, whichever scripts hold them."""
    earlier, found = {}, []
    for source in sources:
        for node in source.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in DIFFERENT_EVERYWHERE:
                other, text = earlier.setdefault(node.name, (source.name, ast.dump(node)))
                if text != ast.dump(node):
                    found.append(f"{source.name}:{node.lineno}: {node.name} is not the {node.name} of {other}.")
    return found


def fields_of(tree: ast.Module) -> list[tuple[ast.AnnAssign, ast.stmt | None]]:
    """The fields of the module's Args, each with the statement that follows it."""
    bodies = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    return [(field, below) for body in bodies for field, below in zip(body, [*body[1:], None]) if isinstance(field, ast.AnnAssign)]


def fields_read(tree: ast.Module) -> set[str]:
    """Every x that stands as args.x or something.args.x and is not assigned to. A range check through a shorter name does not count as use."""
    reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    return {node.attr for node in reads if "args" in (getattr(node.value, "id", None), getattr(node.value, "attr", None))}


def check_args(name: str, tree: ast.Module, read_in_common: set[str]) -> list[str]:
    """Each field of Args is read and has its sentence."""
    found, read_here = [], fields_read(tree)
    for field, below in fields_of(tree):
        where = f"{name}:{field.lineno}: the field {field.target.id} of Args"
        if field.target.id not in read_here | read_in_common:
            found.append(f"{where} is read nowhere.")
        if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)):
            found.append(f"{where} has no sentence under it.")
    return found


def imports_of(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, first name of the module) of every import under a node."""
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        found += [(node.lineno, (name or "").split(".")[0]) for name in names]
    return found


def check_imports(source: Source, stems: set[str]) -> list[str]:
    """A script alone in a folder still imports: `common` and `datasets` are imported in main only, other scripts never."""
    in_main = {hit for node in source.tree.body if getattr(node, "name", "") == "main" for hit in imports_of(node)}
    found = []
    for line, module in imports_of(source.tree):
        if module in stems:
            found.append(f"{source.name}:{line}: a script imports the script {module}.")
        elif module in {"common", "datasets"} and (line, module) not in in_main:
            found.append(f"{source.name}:{line}: {module} is imported outside of main, so the file alone cannot be imported.")
    return found


# -------------------------------------------------------------------------------------------------------------- documents


def flags_of(tree: ast.Module, tool: bool = False) -> set[str]:
    """The flags of a program: those of its Args, and in a tool without one the strings that look like flags."""
    found = {"--help"}
    for field, _ in fields_of(tree):
        flag = field.target.id.replace("_", "-")
        found |= {f"--{flag}", f"--no-{flag}"} if ast.unparse(field.annotation) == "bool" else {f"--{flag}"}
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)] if tool else []
    return found | {text for text in strings if re.fullmatch(r"--[a-z][a-z0-9-]*", text)}


def check_document(root: Path, path: Path, text: str, programs: dict[str, set[str]]) -> list[str]:
    """Flags and paths that a document names exist. After the name of a script or tool its own flags are meant, else those of any."""
    found, known, name = [], set().union(*programs.values()), path.relative_to(root)
    owner, goes_on = known, False
    for number, line in enumerate(text.splitlines(), 1):
        owner = owner if goes_on else known
        goes_on = line.endswith("\\")
        for word in re.findall(r"[`|;&]+|[^\s`|;&()\[\]<>,\"']+", line):
            word = re.sub(r"(#.*|:\d+)$", "", word).rstrip(".:")
            if re.fullmatch(r"[`|;&]*", word):
                owner = known
            elif re.match(r"--[a-z]", word):
                if owner is not None and word.split("=")[0] not in owner:
                    found.append(f"{name}:{number}: there is no flag {word.split('=')[0]}" + ("." if owner is known else " of that program."))
            elif word.rsplit("/")[-1] in PROGRAMS:
                owner = None
            else:
                module = re.match(r"(common|tests|benchmarks|experiments)\.(\w+)", word)
                file = f"{module[1]}/{module[2]}.py" if module else word
                inside = file.split("/")[0] in (*FOLDERS, "..") and "/" in file
                at_top = re.fullmatch(r"[\w-]+\.(py|md|toml|cff)|requirements[\w-]*\.txt|LICENSE", file) and file not in RUN_FILES
                if (inside or at_top) and not any(any(folder.glob(file)) if "*" in file else (folder / file).exists() for folder in (root, path.parent)):
                    found.append(f"{name}:{number}: there is no {word}.")
                owner = programs.get(file, owner)
    return found


# ------------------------------------------------------------------------------------------------------------------- all


def read_all(root: Path) -> tuple[list[Source], list[str]]:
    """The scripts at the top of the repository, and findings for those that cannot be read."""
    sources, found = [], []
    for path in sorted(root.glob("*.py")):
        try:
            sources.append(read(path))
        except SyntaxError as error:
            found.append(f"{path.name}:{error.lineno}: cannot be read: {error.msg}.")
    return sources, found


def check(root: Path) -> list[str]:
    """All findings in a repository, as "file:line: sentence"."""
    sources, found = read_all(root)
    common = {path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.glob("common/*.py"))}
    stems = {source.path.stem for source in sources} | {stem for names in FAMILIES.values() for stem in names}
    # What the command line of common.evaluate reads, it reads from Args of its own.
    read_in_common = {x for tree in common.values() for node in tree.body if getattr(node, "name", "") != "main" for x in fields_read(node)}
    for first, *others in families(sources):
        found += check_method_names(first, next(names for names in FAMILIES.values() if first.path.stem in names))
        found += [line for other in others for line in regions_differ(first, other) or check_trunk(first, other)]
    found += check_same_names(sources)
    programs, documents = {}, {path: path.read_text(encoding="utf-8") for path in [*root.glob("README.md"), *sorted(root.glob("docs/**/*.md"))]}
    for source in sources:
        found += check_args(source.name, source.tree, read_in_common) + check_imports(source, stems)
        found += [] if ast.get_docstring(source.tree) else [f"{source.name}:1: no docstring, so no --help either."]
        programs[source.name] = flags_of(source.tree)
        documents[source.path] = "\n".join(source.own[0])
    for name, tree in common.items():
        found += check_args(name, tree, set())
        found += [f"{name}:{line}: common imports the script {module}." for line, module in imports_of(tree) if module in stems]
        programs[name] = flags_of(tree)
    for path in (path for folder in ("experiments", "benchmarks", "tests") for path in root.glob(f"{folder}/*.py")):
        if not path.name.startswith("test_"):
            programs[path.relative_to(root).as_posix()] = flags_of(ast.parse(path.read_text(encoding="utf-8")), tool=True)
    return found + [line for path, text in documents.items() for line in check_document(root, path, text, programs)]


def main() -> int:
    """Prints findings; the exit status is 1 where there are any."""
    found = (fix(ROOT) if "--fix" in sys.argv[1:] else []) or check(ROOT)
    print("\n".join(found) or "The house is in order.")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
