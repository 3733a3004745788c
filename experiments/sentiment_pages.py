"""The blocks of docs/sentiment.md, made of results/sentiment_MODEL.jsonl (`python -m
tests.pages`).
"""

from pathlib import Path

from experiments import frontier, sentiment, study
from experiments.chat_pages import markdown

RESULTS = Path(__file__).resolve().parent.parent / "results"
LONGEST = 160  # characters of a continuation that is shown


def table(lines: list[dict]) -> str:
    """Every method at every setting under the base model, and what the runs were made with."""
    base = [line for line in lines if line["method"] == sentiment.BASE]
    reward = study.interval_cell([line["true_reward"] for line in base])
    rows = [["base model", "", len(base), "0.00", reward, ""]]
    rows += sentiment.table_rows(sentiment.points_of(lines, tuple(sentiment.METHODS)))
    reach = min((line["curve"][-1][0] for line in base), default=0)
    commits = ", ".join(sorted({line["git_commit"][:7] for line in lines}))
    versions = ", ".join(sorted({f"{name} {x}" for line in lines for name, x in line["versions"].items()}))
    devices = ", ".join(sorted({line["device"] for line in lines}))
    words = (
        f"{len(lines)} runs; the best possible curve is known up to a KL of {reach:.1f}; commit {commits}; {versions}; "
    )
    return "\n\n".join([markdown(sentiment.HEADS, rows), words + devices + "."])


def samples(lines: list[dict]) -> str:
    """The first seed's first continuation by each method where it has the largest true reward."""
    best: dict[str, dict] = {}
    first = min(line["seed"] for line in lines)
    for line in lines:
        if line["seed"] == first:
            other = best.get(line["method"], line)
            best[line["method"]] = max(other, line, key=lambda x: x["true_reward"])
    opening = next(iter(best.values()))["samples"][0][0]
    rows = []
    for name in [sentiment.BASE, *frontier.METHODS]:
        if name in best:
            text = " ".join(best[name]["samples"][0][1].split()).replace("|", "\\|")
            rows.append([name, f"{best[name]['value']:g}", f"{best[name]['kl']:.1f}", text[:LONGEST]])
    return "\n\n".join([f'Behind "{opening}":', markdown(["method", "value", "KL", "continuation"], rows)])


def block(kind: str, model: str) -> str:
    """A block by its mark's words: table or samples, and the model's name in its result file.

    Raises KeyError where there is no such block.
    """
    make = {"table": table, "samples": samples}[kind]
    lines = study.read_lines(RESULTS / f"sentiment_{model}.jsonl")
    return make(lines) if lines else "No run is kept yet."
