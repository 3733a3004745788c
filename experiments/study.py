"""What the experiments share: training runs as processes, result files, tables and figures.

An experiment starts scripts the way a user would, and reads what they leave in their run folders. A
finished run is never made again: its folder, or its line in a result file, is looked up first.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from common import InputError
from common.files import append_json_line, read_json, write_text
from report.facts import device_name, git_commit

ROOT = Path(__file__).resolve().parent.parent

# -- processes and runs


def run_program(program: str | Path, words: list[str]) -> str:
    """Runs a program of the repository in a process of its own, on one thread; returns its output.

    Args: program, a path below the repository's root or an absolute one; words, the command line.
    Raises InputError with the end of what it printed where it fails.
    """
    command = [sys.executable, str(ROOT / program), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise InputError(f"{Path(program).name} {' '.join(words)} failed: {process.stderr.strip()[-500:]}")
    return process.stdout


def words_of(flags: dict) -> list[str]:
    """Flags as words of a command line: {"max_steps": 2} becomes --max-steps 2; True and False
    become --flag and --no-flag.
    """
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def train(script: str, folder: str | Path, flags: dict, more: str = "") -> dict:
    """The summary of a script's run in `folder`: made, or gone on with, where it is not finished.

    Args: flags, the script's arguments by name; more, further words of its command line.
    Raises InputError where the script fails.
    """
    folder = Path(folder)
    if not (folder / "summary.json").exists():
        words = words_of(flags | {"name": folder.name, "output_dir": folder.parent}) + more.split()
        if (folder / "args.json").exists():
            words = ["--resume", str(folder)]
        run_program(script, words)
    return read_json(folder / "summary.json")


def side_by_side(work, items: list, jobs: int) -> None:
    """Calls `work(item)`, which waits for a process, for all items, `jobs` at a time."""
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        list(pool.map(work, items))


# -- result files


def facts() -> dict:
    """What every result says of its making: commit, machine, versions."""
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"git_commit": git_commit(), "device": device_name(torch.device("cpu")), "versions": versions}


def read_lines(path: Path) -> list[dict]:
    """The lines of a .jsonl file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_lines(path: Path, lines: list[dict]) -> None:
    """A .jsonl file, replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_result(path: Path, result: dict) -> None:
    """A .json file, replaced as a whole: the result with the facts of its making, a line a key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in (result | facts()).items()]
    write_text(path, "{\n" + ",\n".join(entries) + "\n}\n")


def complete(path: Path, grid: list[tuple], key_of, program: str, flags: list[str], jobs: int, describe) -> list[dict]:
    """The lines of all runs of a grid, in the file's order; those that have none yet are made.

    Args:
        path: the .jsonl file that keeps a line for each finished run.
        grid: what tells runs apart, a tuple each, as JSON has it.
        key_of: line -> the tuple that it belongs to, or None for a line that does not count.
        program: is started as `python PROGRAM --work TUPLE FLAGS`, and the last line that it prints
            becomes the run's. A run that fails is reported and left out.
        jobs: processes side by side, one thread each.
        describe: line -> the words printed when a run has ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read_lines(path)
    finished = {key_of(line) for line in lines}

    def work(run: tuple) -> None:
        try:
            output = run_program(program, ["--work", json.dumps(run), *flags])
        except InputError as error:
            print(f"{run}: {error}", flush=True)
            return
        line = json.loads(output.strip().splitlines()[-1])
        append_json_line(path, line)  # one short write: lines of parallel runs do not mix
        lines.append(line)
        print(describe(line), flush=True)

    side_by_side(work, [run for run in grid if run not in finished], jobs)
    return [line for line in lines if key_of(line) in set(grid)]


# -- tables


def mean_and_std(values: list[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (over n - 1) of the values that are not None; None where too few
    are left.
    """
    numbers = [value for value in values if value is not None]
    mean = statistics.mean(numbers) if numbers else None
    return mean, statistics.stdev(numbers) if len(numbers) > 1 else None


def plus_minus(values: list[float | None], digits: int = 2) -> str:
    """A cell of a table: "mean +- standard deviation" over runs, "-" where there is no value."""
    mean, std = mean_and_std(values)
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if std is None else f" +- {std:.{digits}f}")


def mean_and_interval(values: list[float | None]) -> tuple[float | None, float | None]:
    """Mean of the values that are not None, and half the width of its 95% interval by Student's t:
    t(.975, n - 1) * s / sqrt(n). None where too few are left.

    The interval says where the mean over all seeds lies, if their values are normal.
    """
    mean, std = mean_and_std(values)
    n = sum(value is not None for value in values)
    return mean, None if std is None else t_quantile(n - 1) * std / math.sqrt(n)


@cache
def t_quantile(degrees: float, level: float = 0.95) -> float:
    """The t with P(|T| <= t) = level of Student's T, for 1 degree of freedom or more, whole or not.

    With T = sqrt(degrees) tan(angle) the density of the angle is proportional to
    cos(angle)^(degrees - 1): Simpson's rule, and bisection over the angle.
    """
    log_constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(math.pi)
    weights = torch.tensor([2.0, 4.0], dtype=torch.float64).repeat(1000)
    weights = torch.cat([weights, weights[:1] / 2])  # 1 4 2 4 ... 4 1 over 2,001 points
    weights[0] = 1.0

    def probability(angle: float) -> float:
        angles = torch.linspace(0, angle, 2001, dtype=torch.float64)
        integral = (weights * angles.cos() ** (degrees - 1)).sum().item() * angle / 6000
        return 2 * math.exp(log_constant) * integral

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def interval_cell(values: list[float | None], digits: int = 2) -> str:
    """A cell of a table: "mean ± half width of the 95% interval", "-" where there is no value."""
    mean, half = mean_and_interval(values)
    return "-" if mean is None else f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def print_table(heads: list[str], rows: list[list], title: str = "") -> None:
    """Prints a table as wide as its cells, the first column on the left and the others on the
    right.
    """
    cells = [[str(cell) for cell in row] for row in [heads, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}" if title else "")
    for first, *others in cells:
        line = first.ljust(widths[0]) + "".join(f"   {cell:>{width}}" for cell, width in zip(others, widths[1:]))
        print(line.rstrip())


# -- figures

# Okabe and Ito's colours and some of Paul Tol's, which colour-blind readers tell apart; mark and
# dashes do it in grey.
LOOKS = [
    {"color": colour, "marker": mark, "linestyle": dashes}
    for colour, mark, dashes in (
        ("#0072B2", "o", "-"),
        ("#D55E00", "s", "--"),
        ("#009E73", "D", "-."),
        ("#CC79A7", "^", ":"),
        ("#E69F00", "v", (0, (5, 1))),
        ("#56B4E9", "P", (0, (3, 1, 1, 1))),
        ("#000000", "X", (0, (1, 1))),
        ("#8C564B", "*", (0, (7, 2, 2, 2))),
        ("#332288", "<", (0, (4, 2))),
        ("#882255", ">", (0, (6, 2, 1, 2))),
        ("#117733", (4, 1), (0, (2, 1))),
        ("#999933", "p", (0, (8, 1))),
        ("#AA4499", "d", (0, (5, 2, 1, 2, 1, 2))),
    )
]
# The place of each method's look; a method has the same one in all figures.
METHODS = {
    **{"DPO": 0, "TYPO": 1, "cDPO": 2, "DPH's LM": 3, "DPH's pick": 12, "IPO": 4, "f-DPO": 5},
    **{"SFT": 7, "point-wise DPO": 10, "ULMA": 11, "SuperHF": 8, "PPO": 9, "best of n": 6},
    **{"MLE": 0, "filtering": 1, "conditional": 2, "unlikelihood": 3, "RWR": 4, "AWR": 6, "conditional, not asked": 7},
    # Other settings of the same method, drawn small
    **{"conditional, d .1": 2, "conditional, d .3": 2, "RWR, beta 1": 4, "RWR, beta 10": 4},
    **{"AWR, beta 1": 6, "AWR, beta 10": 6},
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "lines.markersize": 5,
    "lines.linewidth": 1.3,
    "savefig.dpi": 110,
}


def look_of(method: str) -> dict:
    """Colour, mark and dashes of a method's line, for matplotlib's plot."""
    return LOOKS[METHODS[method]]


def points_of(method: str) -> dict:
    """Colour and mark of a method's points, for matplotlib's scatter."""
    return {name: look_of(method)[name] for name in ("color", "marker")}


def draw_figure(path: Path, draw, panels: int = 1, size: tuple[float, float] = (7.2, 4.6), share_y=False) -> None:
    """Writes a figure of panels side by side, which `draw(axes)` fills; says so where matplotlib is
    not installed.

    Raises ValueError where a panel is left without the names of its axes.
    """
    try:
        import matplotlib
    except ImportError:
        print("\nNo figure: pip install matplotlib (see requirements-optional.txt)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, panels, figsize=size, sharey=share_y, squeeze=False)
        try:
            axes = list(grid[0])
            draw(axes)
            for axis in axes:
                if not axis.get_xlabel() or not (axis.get_ylabel() or (share_y and axis is not axes[0])):
                    raise ValueError(f"{path.name}: a panel does not say what its axes show")
            figure.tight_layout()
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        finally:
            plt.close(figure)
    print(f"\nFigure: {path}")
