"""Keeps the house in order: `python -m tests.house` prints what it finds as "file:line: sentence"
and exits 1; with --fix it first copies the trunk of each family's first script to the others.

A script is read as a trunk and parts of its own: its docstring and the regions between `# [method]`
and `# [/method]`. Within a family the trunks are the same line by line, marks included, so a diff
of two scripts shows the method and nothing else. A region may be empty.
"""

import ast
import re
import sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Scripts that share a trunk; the first that exists is the one to change. The other scripts stand
# alone.
FAMILIES = {
    "pairs": ["dpo", "cdpo", "typo", "dph"],
    "labelled answers": ["pointwise_dpo", "ulma"],
    "scored corpus": [
        "mle_pretrain",
        "filtered_pretrain",
        "conditional_pretrain",
        "unlikelihood_pretrain",
        "rwr_pretrain",
        "awr_pretrain",
    ],
}
OPEN, CLOSE = "# [method]", "# [/method]"
DIFFERENT_EVERYWHERE = {"Args", "main", "compute_loss", "LOSSES"}  # names that every script has with another content
PACKAGES = (
    "common",
    "chat",
    "choices",
    "tokens",
    "toy",
    "rewards",
    "labelled",
    "report",
    "pretraining",
    "judging",
    "adapters",
    "attention",
)  # imported by scripts inside main only
FOLDERS = (
    *PACKAGES,
    "tests",
    "docs",
    "experiments",
    "benchmarks",
    ".ci",
)  # a path that a document names there must exist

# Imports run one way: a module may import those of the layers below its own, function-level imports
# included.
LAYERS = [
    [
        "common",
        "common.batches",
        "common.processes",
        "common.metrics",
        "attention",
        "attention.rooms",
        "chat",
        "chat.messages",
    ],
    ["report", "report.progress"],
    ["common.generate", "common.fields", "common.oracle", "chat.templates"],
    ["tokens", "tokens.encode", "choices", "choices.templates", "toy", "toy.world", "toy.frozen"],
    ["common.files", "report.table", "report.curves", "report.folders"],
    ["toy.base", "toy.documents", "tokens.store", "report.card", "adapters", "adapters.lora"],
    ["common.models", "common.data", "report.trackers", "rewards.sentiment"],
    ["common.checkpoints", "report.facts", "rewards", "rewards.prompts", "rewards.metrics", "rewards.models"],
    ["judging", "judging.heads", "judging.local_tasks", "judging.perplexity", "judging.reward_lm", "judging.win_rate"],
    ["judging.answers", "judging.choices", "judging.reward_bench", "judging.tasks"],
    ["judging.scores"],
    ["judging.command"],
    ["common.run", "common.evaluate", "labelled", "labelled.rows"],
    ["pretraining", "pretraining.flops", "pretraining.scorers", "pretraining.arrays"],
    ["pretraining.texts", "pretraining.documents"],
    ["pretraining.corpus", "pretraining.tokens"],
    ["pretraining.chunks", "pretraining.sampling", "pretraining.diversity"],
    ["pretraining.models", "pretraining.likelihood", "pretraining.red_team"],
    ["pretraining.evaluate", "pretraining.baseline"],
]
COMMON_LINES, FILE_LINES = 2200, 500  # common/ in all, and any file of a package
FUNCTION_LINES, MAIN_LINES = 45, 77  # of code: without docstring, comments and blank lines
SCRIPT_LINES = 350  # scripts that hold more than one loss, a head or a second model have a limit of their own
LONGER = {
    "awr_pretrain": 375,
    "conditional_pretrain": 375,
    "dph": 480,
    "pointwise_dpo": 455,
    "ulma": 455,
    "typo": 385,
    "ppo": 675,
    "superhf": 540,
}
LONGER_MAIN = {"ppo": 90, "dph": 95, "pointwise_dpo": 95, "ulma": 95}
PROGRAMS = set(
    "pip pip3 uv git torchrun accelerate venv pytest ruff curl hf docker conda".split()
)  # their flags are not ours
RUN_FILES = {"script.py"}  # found in run folders, not here
EXAMPLE_FILES = {"hinge.py", "docs/hinge.md", "tests/test_hinge.py", "tests/faults/hinge.py"}  # made by CONTRIBUTING.md


@dataclass
class Source:
    """A Python file; `trunk` holds the stretches between its own parts as (line number, line),
    `own` those parts: docstring, regions.
    """

    path: Path
    tree: ast.Module
    trunk: list[list[tuple[int, str]]]
    own: list[list[str]]

    @property
    def name(self) -> str:
        return self.path.name


def read(path: Path) -> Source:
    """Parses a script; SyntaxError for what is not Python and for marks that do not pair up."""
    lines = path.read_text(encoding="utf-8").splitlines()
    tree = ast.parse("\n".join(lines))
    has_docstring = ast.get_docstring(tree) is not None
    docstring = range(tree.body[0].lineno, tree.body[0].end_lineno + 1) if has_docstring else range(0)
    trunk, own, opened = ([[]] if has_docstring else [[], []]), [[]], 0
    for number, line in enumerate(lines, 1):
        mark = line.strip() if number not in docstring else ""
        if mark == (OPEN if opened else CLOSE):
            raise SyntaxError(
                "a method region begins inside another, or ends without a beginning", (path.name, number, 0, line)
            )
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


# -- families


def families(sources: list[Source]) -> list[list[Source]]:
    """The scripts of each family that exist, the one that holds the trunk first."""
    by_stem = {source.path.stem: source for source in sources}
    found = [[by_stem[stem] for stem in stems if stem in by_stem] for stems in FAMILIES.values()]
    return [members for members in found if members]


def regions_differ(first: Source, other: Source) -> list[str]:
    """One finding where two scripts cannot be compared, because they do not have the same number of
    method regions.
    """
    if len(first.own) == len(other.own):
        return []
    counts = f"{len(other.own) - 1} method regions, but {first.name} has {len(first.own) - 1}"
    return [f"{other.name}:1: {counts}; an empty region is allowed."]


def check_trunk(first: Source, other: Source) -> list[str]:
    """Lines of `other`, outside of its own parts, that are not the trunk's."""
    found = []
    for expected, seen in zip(first.trunk, other.trunk):
        for kind, a, _, c, d in SequenceMatcher(
            None, [x for _, x in expected], [x for _, x in seen], autojunk=False
        ).get_opcodes():
            if kind == "insert":
                what = f"{d - c} lines that the trunk in {first.name} does not have: {seen[c][1].strip()!r}"
                found.append(f"{other.name}:{seen[c][0]}: {what}")
            elif kind != "equal":
                line = (seen[c] if c < len(seen) else seen[-1] if seen else (1, ""))[0]
                trunk = f"{first.name}:{expected[a][0]}: {expected[a][1].strip()!r}"
                found.append(f"{other.name}:{line}: differs from the trunk, {trunk}")
    return found


def fix(root: Path) -> list[str]:
    """Copies each family's trunk to its other scripts, which keep their docstring and regions.

    Returns what could not be done.
    """
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


# -- every script


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
    return [
        (field, below)
        for body in bodies
        for field, below in zip(body, [*body[1:], None])
        if isinstance(field, ast.AnnAssign)
    ]


def fields_read(tree: ast.Module) -> set[str]:
    """Every x that stands as args.x or something.args.x and is not assigned to.

    A range check through a shorter name does not count as use.
    """
    reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    return {
        node.attr
        for node in reads
        if {"args", "_args"} & {getattr(node.value, "id", None), getattr(node.value, "attr", None)}
    }


def check_args(name: str, tree: ast.Module, read_in_common: set[str]) -> list[str]:
    """Each field of Args is read and has its sentence."""
    found, read_here = [], fields_read(tree)
    for field, below in fields_of(tree):
        where = f"{name}:{field.lineno}: the field {field.target.id} of Args"
        if field.target.id not in read_here | read_in_common:
            found.append(f"{where} is read nowhere.")
        if not (
            isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
        ):
            found.append(f"{where} has no sentence under it.")
    return found


def imports_of(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, first name of the module) of every import under a node."""
    found = []
    for node in ast.walk(tree):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        found += [(node.lineno, (name or "").split(".")[0]) for name in names]
    return found


def check_imports(source: Source, stems: set[str]) -> list[str]:
    """A script alone in a folder still imports: our packages and `datasets` are imported in main
    only, scripts never.
    """
    in_main = {hit for node in source.tree.body if getattr(node, "name", "") == "main" for hit in imports_of(node)}
    found = []
    for line, module in imports_of(source.tree):
        if module in stems:
            found.append(f"{source.name}:{line}: a script imports the script {module}.")
        elif module in {*PACKAGES, "datasets"} and (line, module) not in in_main:
            found.append(
                f"{source.name}:{line}: {module} is imported outside of main, so the file alone cannot be imported."
            )
    return found


# -- layers and lengths


def modules_of(root: Path) -> dict[str, tuple[Path, ast.Module]]:
    """The modules of our packages by dotted name."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in root.glob(f"{package}/*.py")):
        name = path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        found[name] = (path, ast.parse(path.read_text(encoding="utf-8")))
    return found


def imported_modules(tree: ast.Module, modules: dict) -> list[tuple[int, str]]:
    """(line, module) of every import of one of our modules, wherever it stands."""
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in inner if name in modules] or [node.module]
            # `from common import InputError, batches` takes from the package and from its module
            names += [node.module] if any(name not in modules for name in inner) else []
        found += [(node.lineno, name) for name in dict.fromkeys(names) if name in modules]
    return found


def check_layers(root: Path, modules: dict) -> list[str]:
    """Every module has a layer, and imports from lower ones only."""
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    found = []
    for name, (path, tree) in modules.items():
        where = path.relative_to(root).as_posix()
        if name not in layer:
            found.append(f"{where}:1: {name} has no layer; tests/house.py lists them.")
            continue
        for line, other in imported_modules(tree, modules):
            if other != name and layer.get(other, -1) >= layer[name]:
                found.append(f"{where}:{line}: {name} imports {other}, which is not in a layer below its own.")
    return found


def length_of(function: ast.FunctionDef, lines: list[str]) -> int:
    """Lines of code of a function: without its docstring, blank lines and comments."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    begin = first.end_lineno if is_docstring else function.lineno
    body = [line.strip() for line in lines[begin : function.end_lineno]]
    return sum(1 for line in body if line and not line.startswith("#")) + 1


def check_lengths(root: Path, sources: list[Source], modules: dict) -> list[str]:
    """Scripts, files, packages and functions are as short as the limits above say."""
    found, sizes = [], {path: len(path.read_text(encoding="utf-8").splitlines()) for path, _ in modules.values()}
    files = [(source.path, source.tree) for source in sources] + list(modules.values())
    for path, tree in files:
        where, stem = path.relative_to(root).as_posix(), path.stem
        is_script = path not in sizes
        limit = LONGER.get(stem, SCRIPT_LINES) if is_script else FILE_LINES
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > limit:
            found.append(f"{where}:1: {len(lines)} lines; the limit is {limit}.")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                is_main = is_script and node.name == "main"
                limit = LONGER_MAIN.get(stem, MAIN_LINES) if is_main else FUNCTION_LINES
                length = length_of(node, lines)
                if length > limit:
                    found.append(
                        f"{where}:{node.lineno}: {node.name} has {length} lines of code; the limit is {limit}."
                    )
    total = sum(lines for path, lines in sizes.items() if path.parent.name == "common")
    return found + ([f"common/: {total} lines in all; the limit is {COMMON_LINES}."] if total > COMMON_LINES else [])


def check_names(source: Source, modules: dict) -> list[str]:
    """What a script takes from one of our modules exists there: `models.load_model` is defined in
    common/models.py.
    """
    found, aliases = [], {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in modules:
                    aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif node.module in modules and alias.name not in defined_in(modules[node.module][1]):
                    found.append(f"{source.name}:{node.lineno}: there is no {alias.name} in {node.module}.")
    for node in ast.walk(source.tree):
        module = aliases.get(getattr(getattr(node, "value", None), "id", ""))
        if isinstance(node, ast.Attribute) and module and node.attr not in defined_in(modules[module][1]):
            found.append(f"{source.name}:{node.lineno}: there is no {node.attr} in {module}.")
    return found


def defined_in(tree: ast.Module) -> set[str]:
    """Names that a module binds at its top."""
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


# -- documents


def flags_of(tree: ast.Module, tool: bool = False) -> set[str]:
    """The flags of a program: those of its Args, and in a tool without one the strings that look
    like flags.
    """
    found = {"--help"}
    for field, _ in fields_of(tree):
        flag = field.target.id.replace("_", "-")
        found |= {f"--{flag}", f"--no-{flag}"} if ast.unparse(field.annotation) == "bool" else {f"--{flag}"}
    strings = (
        [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        if tool
        else []
    )
    return found | {text for text in strings if re.fullmatch(r"--[a-z][a-z0-9-]*", text)}


def check_document(root: Path, path: Path, text: str, programs: dict[str, set[str]]) -> list[str]:
    """Flags and paths that a document names exist.

    After the name of a script or tool its own flags are meant, else those of any.
    """
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
                    found.append(
                        f"{name}:{number}: there is no flag {word.split('=')[0]}"
                        + ("." if owner is known else " of that program.")
                    )
            elif word.rsplit("/")[-1] in PROGRAMS:
                owner = None
            else:
                module = re.match(r"(common|tests|benchmarks|experiments)\.(\w+)", word)
                file = f"{module[1]}/{module[2]}.py" if module else word
                file = file.removesuffix(".py") if module and (root / module[1] / module[2]).is_dir() else file
                folder_named = file.split("/")[0]
                # Metrics are called rewards/chosen, data labelled/x: here only code is meant.
                is_metric = folder_named in {"rewards", "labelled", "tokens"} and not file.endswith((".py", "/"))
                inside = "/" in file and folder_named in (*FOLDERS, "..") and not is_metric
                at_top = (
                    re.fullmatch(r"[\w-]+\.(py|md|toml|cff)|requirements[\w-]*\.txt|LICENSE", file)
                    and file not in RUN_FILES
                )
                if (
                    (inside or at_top)
                    and file not in EXAMPLE_FILES
                    and not any(
                        any(folder.glob(file)) if "*" in file else (folder / file).exists()
                        for folder in (root, path.parent)
                    )
                ):
                    found.append(f"{name}:{number}: there is no {word}.")
                owner = programs.get(file, owner)
    return found


# -- all


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
    modules = modules_of(root)
    stems = {source.path.stem for source in sources} | {stem for names in FAMILIES.values() for stem in names}
    # What the command line of common.evaluate reads, it reads from Args of its own.
    nodes = [node for _, tree in modules.values() for node in tree.body if getattr(node, "name", "") != "main"]
    read_in_packages = {name for node in nodes for name in fields_read(node)}
    for first, *others in families(sources):
        family = next(names for names in FAMILIES.values() if first.path.stem in names)
        found += check_method_names(first, family)
        found += [line for other in others for line in regions_differ(first, other) or check_trunk(first, other)]
    found += check_same_names(sources) + check_layers(root, modules) + check_lengths(root, sources, modules)
    programs: dict[str, set[str]] = {}
    documents = {
        path: path.read_text(encoding="utf-8") for path in [*root.glob("*.md"), *sorted(root.glob("docs/**/*.md"))]
    }
    for source in sources:
        found += check_args(source.name, source.tree, read_in_packages) + check_imports(source, stems)
        found += check_names(source, modules)
        found += [] if ast.get_docstring(source.tree) else [f"{source.name}:1: no docstring, so no --help either."]
        programs[source.name] = flags_of(source.tree)
        documents[source.path] = "\n".join(source.own[0])
    for path, tree in modules.values():
        name = path.relative_to(root).as_posix()
        found += check_args(name, tree, set())
        found += [
            f"{name}:{line}: a package imports the script {module}."
            for line, module in imports_of(tree)
            if module in stems
        ]
        programs[name] = flags_of(tree)
    if "judging.command" in modules:
        programs["common/evaluate.py"] = programs["judging/command.py"]  # its command line
    for path in (path for folder in ("experiments", "benchmarks", "tests") for path in root.glob(f"{folder}/*.py")):
        if not path.name.startswith("test_"):
            programs[path.relative_to(root).as_posix()] = flags_of(
                ast.parse(path.read_text(encoding="utf-8")), tool=True
            )
    return found + [line for path, text in documents.items() for line in check_document(root, path, text, programs)]


def main() -> int:
    """Prints findings; the exit status is 1 where there are any."""
    found = (fix(ROOT) if "--fix" in sys.argv[1:] else []) or check(ROOT)
    print("\n".join(found) or "The house is in order.")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
