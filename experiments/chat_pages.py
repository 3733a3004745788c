"""The blocks of docs/chat_model.md, made of results/chat_model.jsonl (`python -m tests.pages`)."""

from pathlib import Path

from experiments import study
from experiments.chat_model import CHOICE, METHODS, best_lr

RESULTS = Path(__file__).resolve().parent.parent / "results" / "chat_model.jsonl"
COLUMNS = {  # heading -> (where it stands in a line, digits)
    "pairs ranked right by log-probability": ("after.preference_accuracy", 3),
    "by the method's reward": ("after.reward_accuracy", 3),
    "AUC of log-probabilities": ("after.logps_auc", 3),
    "AUC of the method's reward": ("after.reward_auc", 3),
    "perplexity": ("after.perplexity", 2),
    "reward raised": ("after.reward", 3),
    "test reward": ("after.test_reward", 3),
    "KL, nats": ("after.kl", 2),
    "win rate": ("win_rate", 3),
    "win rate at equal length": ("win_rate_equal_length", 3),
    "words": ("words", 0),
    "minutes": ("minutes", 1),
    "GiB": ("gib", 1),
}


def value_of(line: dict, where: str) -> float | None:
    """A number of a result line, None where it has none: "after.kl", "win_rate"."""
    costs = {"minutes": line["seconds"] / 60, "gib": line["peak_memory_bytes"] / 2**30}
    value = line | costs
    for key in where.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def markdown(heads: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def lines_of(name: str, lines: list[dict]) -> dict[str, list[dict]]:
    """The result lines of a file of rows by method, in the study's order."""
    order = [method for methods in METHODS.values() for method in methods]
    mine = [line for line in lines if line["data"] == name]
    return {method: found for method in order if (found := [line for line in mine if line["method"] == method])}


def table(name: str, lines: list[dict]) -> str:
    """Each method at the learning rate that was chosen: mean and standard deviation over seeds."""
    methods = lines_of(name, lines)
    shown = {
        head: where
        for head, where in COLUMNS.items()
        if any(value_of(line, where[0]) is not None for found in methods.values() for line in found)
    }
    first = min(line["seed"] for found in methods.values() for line in found)
    rows = []
    before = next((found[0]["before"] for found in methods.values()), {})
    rows.append(["(as it came, first seed)", "", "", *(before_cell(before, *where) for where in shown.values())])
    for method, found in methods.items():
        lr = best_lr(found, name, method, first)
        runs = [line for line in found if line["lr"] == lr]
        cells = [study.plus_minus([value_of(line, where) for line in runs], digits) for where, digits in shown.values()]
        rows.append([method, f"{lr:g}", len(runs), *(cell.replace("+-", "±") for cell in cells)])
    return markdown(["", "learning rate", "seeds", *shown], rows)


def before_cell(before: dict, where: str, digits: int) -> str:
    """What the model had before training, where a run measured that."""
    value = before.get(where.removeprefix("after.")) if where.startswith("after.") else None
    return "" if value is None else f"{value:.{digits}f}"


def rates(name: str, lines: list[dict]) -> str:
    """What each learning rate came to with the first seed: the number that decides, and the KL."""
    methods = lines_of(name, lines)
    first = min(line["seed"] for found in methods.values() for line in found)
    rows = []
    for method, found in methods.items():
        tried = sorted((line for line in found if line["seed"] == first), key=lambda line: line["lr"])
        cells = [
            f"{line['lr']:g}: {line['after'][CHOICE[method]]:.3f} (KL {line['after']['kl']:.2f})" for line in tried
        ]
        rows.append([method, CHOICE[method].replace("_", " "), "; ".join(cells)])
    return markdown(["", "chosen by held-out", "learning rate: value"], rows)


def samples(name: str, method: str, lines: list[dict]) -> str:
    """Five held-out prompts of the first seed with a method's answer and the untrained model's."""
    found = lines_of(name, lines)[method]
    first = min(line["seed"] for line in found)
    lr = best_lr(found, name, method, first)
    (line,) = [line for line in found if (line["seed"], line["lr"]) == (first, lr)]
    rows = [[clean(text) for text in texts] for texts in line["samples"]]
    return markdown(["prompt", method, "before"], rows)


def clean(text: str, longest: int = 320) -> str:
    """Text as a cell of a table."""
    text = " ".join(text.split())
    text = text if len(text) <= longest else text[:longest] + " [...]"
    for mark in "\\`*_|<>[]":
        text = text.replace(mark, "\\" + mark)
    return text


def facts(name: str, lines: list[dict]) -> str:
    """What the runs of a file of rows were made with."""
    mine = [line for line in lines if line["data"] == name]
    hours = sum(line["seconds"] for line in mine) / 3600
    commits = sorted({line["git_commit"][:7] for line in mine})
    versions = sorted({f"torch {line['versions']['torch']}" for line in mine})
    versions += sorted({f"transformers {line['versions']['transformers']}" for line in mine})
    devices = sorted({line["device"] for line in mine})
    size = f"{len(mine)} runs of {mine[0]['rows']} rows, {hours:.1f} hours of one thread"
    return f"{size}; commit {', '.join(commits)}; {', '.join(versions)}; {', '.join(devices)}."


def block(kind: str, name: str, *more: str) -> str:
    """A block by its mark's words: table, rates, facts, each with a file of rows, or samples with
    a method besides.

    Raises KeyError where there is no such thing in the results.
    """
    lines = study.read_lines(RESULTS)
    if name not in {line["data"] for line in lines}:
        raise KeyError(name)
    if kind == "samples":
        return samples(name, *more, lines)
    return {"table": table, "rates": rates, "facts": facts}[kind](name, lines)
