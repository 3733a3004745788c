"""What it takes to read and tokenise many pairs: seconds and memory of one process.

    python -m benchmarks.rows --rows 100000 --tokenizer gpt2

writes made rows (questions and answers of random words, about 120 and 75 tokens) to a temporary
folder, then reads them in new processes: as rows in memory, as rows that are tokenised and kept,
and once more as rows that are there. Prints a line of JSON for each: CPU seconds, its children's
included, seconds, peak and remaining memory in MB (`Pss`: pages of the memory map count where they
were read), and a hash of all ids, which must be the same.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("memory", "kept", "there")


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """A .jsonl of pairs with distinct prompts."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    with path.open("w") as file:
        for i in range(count):
            row = {"prompt": f"{i}: {text(20, 60)}?", "chosen": f" {text(10, 40)}", "rejected": f" {text(10, 40)}"}
            file.write(json.dumps(row) + "\n")


def memory(name: str) -> float:
    """A number of /proc in MB."""
    file = "smaps_rollup" if name == "Pss" else "status"
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def measure(way: str, path: str, tokenizer_name: str) -> dict:
    """Reads the rows one way, in this process."""
    from transformers import AutoTokenizer

    from common.data import load_pairs
    from tokens import store

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    store.LARGE_BYTES = 1 << 60 if way == "memory" else 0
    base, start, cpu = memory("Pss"), time.perf_counter(), cpu_seconds()
    splits, _ = load_pairs(path, None, 0.05, 0, tokenizer, 1024, say=lambda words: None)
    seconds, cpu, remaining = time.perf_counter() - start, cpu_seconds() - cpu, memory("Pss") - base
    peak = memory("VmHWM")
    digest = hashlib.sha256()
    for rows in splits.values():
        for row in rows:
            digest.update(json.dumps([row["prompt"], row["completions"]]).encode())
    measured = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "rows": sum(map(len, splits.values()))}
    measured |= {"peak_mb": round(peak), "remaining_mb": round(remaining), "ids_sha256": digest.hexdigest()[:16]}
    return {"way": way} | measured


def cpu_seconds() -> float:
    """CPU time of this process and of those that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    """Measures each way in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tokenizer", default="gpt2", help="a hub id or a folder")
    parser.add_argument("--way", choices=WAYS, help="measure one alone, on --path")
    parser.add_argument("--path")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.path, args.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, args.rows)
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        for way in WAYS:
            words = ["--way", way, "--path", str(path), "--tokenizer", args.tokenizer]
            subprocess.run([sys.executable, "-m", "benchmarks.rows", *words], env=environment, check=True)


if __name__ == "__main__":
    main()
