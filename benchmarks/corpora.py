"""What preparing a corpus to pretrain on costs as the corpus grows: processor seconds for each
megabyte, and the largest memory.

    python benchmarks/corpora.py                     1, 10 and 100 MB; needs pycodestyle
    python benchmarks/corpora.py --tiny              20 kB: does it run?
    python benchmarks/corpora.py --tree $BEFORE     another checkout of this repository beside it

The text is the standard library's, its paragraphs shuffled with a seed until there is enough, in a
.jsonl file of documents. pycodestyle, which is slow, scores `--pep8` megabytes of it and the time
is given for itself; everything else is measured with a rule that costs nothing, the share of white
space in a line. For each size and tree two fresh processes run: one reads, scores, tokenises and
packs everything, and packs once more; the other is mle_pretrain.py, which finds what the first kept
(a tree that keeps no tokens makes them), trains a few steps and is judged on what is held out.
Memory is the largest resident size of a process, pages of mapped files included; the processes that
score and tokenise count by themselves. Processor seconds include them.
"""

import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for python benchmarks/corpora.py

VOCABULARY, CONTEXT = 1024, 128


@dataclass
class Args:
    megabytes: tuple[float, ...] = (1, 10, 100)
    """Sizes of the corpus."""
    tree: tuple[Path, ...] = ()
    """Other checkouts of this repository, measured too."""
    pep8: float = 1
    """Megabytes that pycodestyle scores."""
    holdout: float = 0.01
    """Share of the documents held out."""
    output: Path | None = None
    """File for the results; None: benchmarks/results/corpora.json, and no file with --tiny."""
    tiny: bool = False
    """A smoke test: 20 kB."""


def write_corpus(path: Path, size: int, seed: int = 0) -> None:
    """Rows {"text": ...} with `size` characters of text in all, each text another one."""
    rng, total = random.Random(seed), 0
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    with path.open("w", encoding="utf-8") as file:
        while total < size:
            source = rng.choice(sources).read_text(encoding="utf-8", errors="replace")
            paragraphs = source.split("\n\n\n")
            rng.shuffle(paragraphs)
            text = f"# {rng.random()}\n" + "\n\n\n".join(paragraphs)
            text = text[: min(size - total, 40_000, size // 10)]
            total += len(text)
            file.write(json.dumps({"text": text}) + "\n")


def train_tokenizer(path: Path, folder: Path) -> None:
    """A byte-level BPE of the first lines of the corpus."""
    from pretraining import chunks

    with path.open(encoding="utf-8") as file:
        text = "".join(json.loads(line)["text"] for line, _ in zip(file, range(20)))
    chunks.train_tokenizer((f"\n{line}" for line in text.split("\n")), VOCABULARY).save_pretrained(folder)


def score_by_white_space() -> None:
    """Puts a rule that costs nothing in the place of every scorer."""
    from pretraining import scorers

    def segments(text: str) -> tuple[list[str], list[float]]:
        lines = scorers.split_lines(text)
        return lines, [(line.count(" ") + line.count("\n")) / len(line) for line in lines]

    free = scorers.Scorer("white space", segments, lambda some: [0.0] * len(some), False)
    scorers.load_scorer = lambda *words, **more: free


def pep8_seconds(data: str) -> dict:
    """Runs in a process of its own: processor seconds of pycodestyle on all texts."""
    from pretraining import scorers

    texts = [json.loads(line)["text"] for line in Path(data).read_text(encoding="utf-8").splitlines()]
    before = used()
    for _ in map(scorers.pep8_segments, texts):
        pass
    return {"seconds": used() - before}


def train(words: list[str]) -> dict:
    """mle_pretrain.py with that rule."""
    import importlib

    score_by_white_space()
    script = importlib.import_module("mle_pretrain")  # of the tree that is measured
    script.main(tyro.cli(script.Args, args=words))
    return {"peak_bytes": peak()}


def prepare(data: str, tokenizer_folder: str, scores: str, holdout: float) -> dict:
    """Runs in a process of its own, on the tree it stands in: what each stage took."""
    from common import models
    from pretraining import chunks, corpus

    seconds, tokenizer = {}, models.load_tokenizer(tokenizer_folder)
    score_by_white_space()

    def silent(sentence: str) -> None:
        """Says nothing."""

    def timed(name: str, work):
        before = used()
        result = work()
        seconds[name] = used() - before
        return result

    def load():
        return corpus.load_corpus("pep8", data, "text", "", holdout, 0, scores, say=silent)

    def pack(documents):
        packed = chunks.make_chunks(tokenizer, documents, {}, CONTEXT, say=silent)
        return len((packed[0] if isinstance(packed, tuple) else packed)["train"])

    timed("read and score", load)
    documents, _ = timed("read again", load)
    count = timed("tokenise and pack", lambda: pack(documents))
    timed("pack again", lambda: pack(documents))
    return {"seconds": seconds, "chunks": count, "peak_bytes": peak()}


def used() -> float:
    """Processor seconds of this process and of those it waited for."""
    times = os.times()
    return sum(times[:4])


def peak() -> int:
    """The largest resident size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def in_process(tree: Path, job: str, *words) -> dict:
    """What a function of this file returns in a fresh process, on a tree."""
    environment = dict(os.environ, TQDM_DISABLE="1", PYTHONPATH=str(tree), HF_HUB_OFFLINE="1")
    command = [sys.executable, str(Path(__file__).resolve()), "--job", job, json.dumps(words)]
    process = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{job} failed in {tree}:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def measure(tree: Path, data: Path, tokenizer: Path, folder: Path, holdout: float) -> dict:
    """The numbers of one tree on one corpus."""
    job = [str(data), str(tokenizer), str(folder / "runs" / "scores"), holdout]
    start = time.perf_counter()
    result = in_process(tree, "prepare", *job) | {"wall_seconds": time.perf_counter() - start}
    words = f"--task pep8 --data {data} --tokenizer {tokenizer} --context {CONTEXT} --max-steps 3"
    words += f" --holdout {holdout} --samples 0 --batch-size 8 --name run --output-dir {folder / 'runs'}"
    result["training_peak_bytes"] = in_process(tree, "train", words.split())["peak_bytes"]
    kept = [path for path in (folder / "runs" / "scores").rglob("*") if path.is_file()]
    result["kept_bytes"] = sum(path.stat().st_size for path in kept)
    summary = json.loads((folder / "runs" / "run" / "summary.json").read_text())
    return result | {"perplexity": summary["after"]["perplexity"]}


def commit_of(tree: Path) -> str | None:
    """The commit that is checked out there."""
    command = ["git", "-C", str(tree), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def print_row(size: float, name: str, result: dict) -> None:
    """One line of the table."""
    seconds = "".join(f"{value / size:10.3f}" for value in result["seconds"].values())
    peaks = "".join(f"{result[key] / 2**20:10,.0f}" for key in ("peak_bytes", "training_peak_bytes", "kept_bytes"))
    print(f"{size:8g}  {name:16}{seconds}{peaks}", flush=True)


def main(args: Args) -> None:
    """Measures, prints, writes the file."""
    import torch
    import transformers

    from common.files import write_json
    from report.facts import device_name, git_commit

    output = args.output or (None if args.tiny else ROOT / "benchmarks" / "results" / "corpora.json")
    about = {"command": " ".join(["python", "benchmarks/corpora.py", *sys.argv[1:]]), "commit": git_commit()}
    about |= {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": device_name(torch.device("cpu")),
    }
    about["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    trees = {"this tree": ROOT} | {f"tree {i + 1}": tree.resolve() for i, tree in enumerate(args.tree)}
    results: list[dict] = []
    pep8 = 0.02 if args.tiny else args.pep8
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus.jsonl", int(pep8 * 1e6))
        about["pep8_seconds_per_mb"] = in_process(ROOT, "pep8_seconds", f"{folder}/corpus.jsonl")["seconds"] / pep8
    print(f"pycodestyle: {about['pep8_seconds_per_mb']:.2f} processor seconds a MB")
    print("      MB  tree            processor seconds a MB: score, read again, tokenise, pack again; MiB: peak")
    print("                          of preparing, peak of training, kept on disk")
    for size in (0.02,) if args.tiny else args.megabytes:
        for name, tree in trees.items():
            with tempfile.TemporaryDirectory() as folder:
                data, tokenizer = Path(folder) / "corpus.jsonl", Path(folder) / "tokenizer"
                write_corpus(data, int(size * 1e6))
                train_tokenizer(data, tokenizer)
                result = measure(tree, data, tokenizer, Path(folder), 0.3 if args.tiny else args.holdout)
            results.append({"megabytes": size, "tree": name, "commit": commit_of(tree)} | result)
            print_row(size, name, result)
            if output:
                output.parent.mkdir(parents=True, exist_ok=True)
                write_json(output, about | {"results": results})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        sys.path[0] = os.environ["PYTHONPATH"]  # the tree to measure, not the one that this file is in
        work = {"prepare": prepare, "train": train, "pep8_seconds": pep8_seconds}[sys.argv[2]]
        print(json.dumps(work(*json.loads(sys.argv[3]))))
    else:
        main(tyro.cli(Args, description=__doc__))
