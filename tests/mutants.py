"""Tests of the tests: `python -m tests.mutants [--jobs 2] [--only NAME] [--part 1 --of 3]` applies
the faults of tests/faults one at a time and sees whether the tests notice.

Each fault is made in a copy of the tree, in every file named for it, and only the test that must
catch it is run there. It counts as caught only if, for every script that carries the fault, an
assertion of that test fails (or an exception that it waits for does not come): a crash, an import
error or a check of the code's form proves nothing. Before all, the copy without a fault must pass
all these tests.

The libraries are imported once; each test run is a fork of this process that imports the project
from its copy. Nothing else is shared.
"""

import argparse
import importlib
import os
import pkgutil
import re
import shutil
import signal
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from tests import faults
from tests.faults import Mutant

ROOT = Path(__file__).resolve().parent.parent
LATE = "not finished in time"
TIME_LIMIT = 240  # seconds for a test that takes a few, on a busy machine too
LEFT_OUT = (".git", ".*cache*", ".venv*", "__pycache__", "runs", "results", "docs", "shared")
LIBRARIES = (
    "pytest torch torch.distributed.checkpoint.state_dict torch.distributed.fsdp safetensors.torch tokenizers tqdm "
    "tyro transformers transformers.models.gpt2.modeling_gpt2 transformers.models.llama.modeling_llama "
    "transformers.models.auto.modeling_auto transformers.generation.utils"
).split()


def whole_table() -> list[Mutant]:
    """The faults of all modules of tests/faults, in order of the modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(faults.__path__))
    return [mutant for name in names for mutant in importlib.import_module(f"tests.faults.{name}").TABLE]


# -- tests in a copy of the tree


@dataclass
class Trial:
    """A process that runs tests in a copy of the tree, or ran them."""

    folder: tempfile.TemporaryDirectory
    tree: Path
    problem: str = ""  # why nothing could be run, or why it was ended
    pid: int = 0
    deadline: float = 0.0
    cases: list[ElementTree.Element] = field(default_factory=list)  # empty where pytest did not come to an end

    @property
    def end(self) -> str:
        """The last line of what pytest printed, or the problem."""
        path = self.tree / "output.txt"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return self.problem or (lines[-1] if lines else "pytest said nothing")


def copy_of_tree() -> Trial:
    """The project as it is here, without the runs and caches that lie about."""
    folder = tempfile.TemporaryDirectory()
    tree = Path(folder.name) / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return Trial(folder, tree)


def start(trial: Trial, words: list[str], limit: float) -> None:
    """Forks a process that runs pytest in the tree."""
    trial.deadline = time.monotonic() + limit
    trial.pid = os.fork()
    if trial.pid:
        return
    status = 1
    try:
        os.setsid()  # with all that it starts it can be ended as one
        output = os.open(trial.tree / "output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        forget_the_project()
        os.chdir(trial.tree)
        sys.path.insert(0, str(trial.tree))
        os.environ["PYTHONPATH"] = str(trial.tree)
        import pytest

        options = ["-p", "no:cacheprovider", "-n", "0", "-o", "junit_logging=no", "--junitxml=report.xml"]
        status = int(pytest.main([*options, *words]))
        sys.stdout.flush()
    finally:
        os._exit(status)


def forget_the_project() -> None:
    """Removes this tree from what Python has imported and from where it looks."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        ours = file and Path(file).is_relative_to(ROOT) and not Path(file).is_relative_to(sys.prefix)
        if name != "__main__" and ours:  # an environment may lie inside the tree
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    importlib.invalidate_caches()


def is_over(trial: Trial) -> bool:
    """Whether a trial has come to its end; one that takes too long is ended."""
    if trial.problem:
        return True
    late = time.monotonic() > trial.deadline
    if late:
        os.killpg(trial.pid, signal.SIGKILL)
        trial.problem = LATE
    if os.waitpid(trial.pid, 0 if late else os.WNOHANG)[0] == 0:
        return False
    report = trial.tree / "report.xml"
    trial.cases = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
    return True


def in_parallel(items: list, begin, jobs: int):
    """(item, the ended trial that `begin(item)` started) for each item, as they end."""
    waiting, running = list(items), []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append((waiting[0], begin(waiting.pop(0))))
        for item, trial in [pair for pair in running if is_over(pair[1])]:
            running.remove((item, trial))
            yield item, trial
            trial.folder.cleanup()
        time.sleep(0.02)


def without_fault(nodes: list[str]) -> Trial:
    """Starts these tests on the tree as it is."""
    trial = copy_of_tree()
    start(trial, nodes, 10 * TIME_LIMIT)
    return trial


def with_fault(mutant: Mutant) -> Trial:
    """Starts a mutant's test on a tree with its fault."""
    trial = copy_of_tree()
    for name in mutant.files:
        path = trial.tree / name
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            trial.problem = f"the text to replace is {text.count(mutant.old)} times in {name}, not once"
            return trial
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    # One failure is enough where one file has the fault.
    start(trial, [*(["--maxfail=1"] if len(mutant.files) == 1 else []), "tests/" + mutant.test], TIME_LIMIT)
    return trial


# -- what a run shows


def complaint(case: ElementTree.Element) -> str | None:
    """The first line of what a test case complains of, or None where it passed."""
    failure = case.find("failure") if case.find("failure") is not None else case.find("error")
    return None if failure is None else (failure.get("message") or "").split("\n")[0]


def is_assertion(case: ElementTree.Element) -> bool:
    """Whether a test failed through an assertion of its own, one of torch.testing, or an exception
    it waited for in vain.
    """
    failure = case.find("failure")
    if failure is None:
        return False
    message = failure.get("message") or ""
    return message.startswith(("AssertionError", "assert ", "Failed: DID NOT RAISE"))


def verdict(mutant: Mutant, trial: Trial) -> tuple[bool, str]:
    """(caught, what was seen) of a trial with a fault."""
    if not trial.cases:
        return False, trial.end
    asserted = [case for case in trial.cases if is_assertion(case)]
    if not asserted:
        other = next(filter(None, map(complaint, trial.cases)), None)
        return False, f"no assertion, but: {other}" if other else "survived"
    # A test that runs script by script must notice the fault in each script that carries it.
    words, noticed = (
        {word for case in cases for word in re.split(r"[\[\]-]", case.get("name", ""))}
        for cases in (trial.cases, asserted)
    )
    for stem in (Path(name).stem for name in mutant.files):
        if stem in words and stem not in noticed:
            return False, f"survived in {stem}.py"
    return True, complaint(asserted[0])


def check_without_faults(table: list[Mutant], jobs: int) -> None:
    """Ends the program where a test fails on the tree as it is: it could show nothing."""
    nodes = sorted({"tests/" + mutant.test for mutant in table})
    shares = [nodes[first::jobs] for first in range(min(jobs, len(nodes)))]
    for _, trial in in_parallel(shares, without_fault, jobs):
        wrong = [f"{case.get('name')}: {complaint(case)}" for case in trial.cases if complaint(case) is not None]
        if wrong or not trial.cases:
            sys.exit(
                "Without a fault these tests do not pass, so they can show nothing:\n" + ("\n".join(wrong) or trial.end)
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--only", nargs="+", default=[""], help="mutants whose name holds one of these")
    parser.add_argument("--part", type=int, default=0, help="with --of N: every Nth, from this one on (modulo N)")
    parser.add_argument("--of", type=int, default=1, help="see --part")
    parser.add_argument("--passed", action="store_true", help="all tests have just passed: not again without a fault")
    options = parser.parse_args()
    mutants = whole_table()
    table = [
        mutant
        for mutant in mutants[options.part % options.of :: options.of]
        if any(words in mutant.name for words in options.only)
    ]
    if not table or len({mutant.name for mutant in mutants}) < len(mutants):
        sys.exit("No mutant has that name." if not table else "Two mutants have the same name.")
    started = time.perf_counter()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ.pop("CI", None)  # there pytest shows whole what differs, and compares for minutes
    sys.dont_write_bytecode = True
    for name in LIBRARIES:
        importlib.import_module(name)
    if not options.passed:
        check_without_faults(table, options.jobs)
    passed, late = 0, []
    for again in (False, True):  # what did not end in time is tried once more, by itself
        some, jobs = (late, 1) if again else (table, options.jobs)
        for mutant, trial in in_parallel(some, with_fault, jobs):
            if trial.problem == LATE and not again:
                late.append(mutant)
                continue
            caught, reason = verdict(mutant, trial)
            passed += caught
            words = f"{'caught' if caught else 'MISSED':7} {mutant.name:42} {mutant.test.split('[')[0]}"
            print(f"{words}: {reason[:100]}", flush=True)
    print(f"{passed} passed, {len(table) - passed} failed ({time.perf_counter() - started:.0f} s)")
    return 0 if passed == len(table) else 1


if __name__ == "__main__":
    sys.exit(main())
