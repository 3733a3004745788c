"""A grid of runs whose results are the lines of a file: a finished run adds its line, and a run that has its line is not made again."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def complete(path: Path, grid: list[tuple], key, module: str, flags: list[str], jobs: int, say) -> list[dict]:
    """The lines of all runs of a grid, in the file's order; those that have none yet are made, `jobs` side by side, one thread each.

    Args:
        path: the .jsonl file.
        grid: what tells runs apart, a tuple each, as JSON has it.
        key: line -> the tuple that it belongs to, or None for a line that does not count.
        module: is started as `python -m MODULE --work TUPLE FLAGS`, and the last line that it prints is the run's. A run that fails is said and left out.
        say: line -> words printed when a run has ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    have = set(map(key, lines))

    def work(run: tuple) -> None:
        words = [sys.executable, "-m", module, "--work", json.dumps(run), *flags]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            print(f"{run}: {done.stderr.strip()[-300:]}")
            return
        line = json.loads(done.stdout.strip().splitlines()[-1])
        with path.open("a", encoding="utf-8") as file:  # one short write: lines of parallel runs do not mix
            file.write(json.dumps(line) + "\n")
        lines.append(line)
        print(say(line), flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, [run for run in grid if run not in have]))
    wanted = set(grid)
    return [line for line in lines if key(line) in wanted]
