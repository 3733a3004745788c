"""Tables of the method pages, made of the files that experiments/collect.py writes (`python -m
tests.pages`).

A block asks for a file of results/, for the trained or the unseen questions, and for commands, each
a script with its flags: `toy toy_pairs trained "dpo.py" "cdpo.py --data toy:0.2"`. Of a run with
picks there are further lines. `toy toy_pairs facts` says how the runs were made.
"""

import json
from collections.abc import Callable
from pathlib import Path

from experiments.beds_toy import entry_of, flags_in
from experiments.chat_pages import markdown

COLUMNS = {  # metric -> heading
    "preference_accuracy": "LM ranks right",
    "logps_auc": "AUC of the likelihood",
    "reward_accuracy": "reward ranks right",
    "reward_auc": "AUC of the reward",
    "perplexity": "perplexity",
    "kl": "KL, nats",
    "true_reward": "true reward",
    "right_share": "right",
    "rude_share": "rude",
    "meteor_similarity": "METEOR similarity",
    "frontier_efficiency": "share of the best gain",
}
REPORTS = {"after": "", "after_best_of_n": ", best of 8", "reference_best_of_n": ", best of 8 of the reference"}
PARTS = {"trained": "", "unseen": "_unseen"}


def cell_of(table: dict, metric: str) -> str:
    """A metric's mean and standard deviation over seeds."""
    if metric not in table:
        return "-"
    mean, std = table[metric][:2]
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def table(entries: list[dict], part: str, *commands: str) -> str:
    """A line for each command and each kind of answer that it gave, under one for the model before.

    Raises KeyError where the file has no such command.
    """
    found = {command: entry(entries, command) for command in commands}
    lines = {"before": next(iter(found.values()))["before" + PARTS[part]]}
    for command, of_command in found.items():
        for report, words in REPORTS.items():
            if report + PARTS[part] in of_command:
                lines[f"`{command}`{words}"] = of_command[report + PARTS[part]]
    shown = [metric for metric in COLUMNS if any(metric in line for line in lines.values())]
    rows = [[name, *(cell_of(line, metric) for metric in shown)] for name, line in lines.items()]
    return markdown([f"{part} questions", *(COLUMNS[metric] for metric in shown)], rows)


def entry(entries: list[dict], command: str) -> dict:
    """The entry of a command, defaults of the toy left out; KeyError where there is none."""
    script = command.split()[0]
    found = entry_of([("", each) for each in entries], script, flags_in(f"python {command}"))
    if found is None:
        raise KeyError(command)
    return found[1]


def facts(entries: list[dict]) -> str:
    """Seeds, commit, versions, machine and time, from the file."""

    def distinct(name: str, show: Callable = str) -> str:
        values = [value for each in entries for value in (each[name] if type(each[name]) is list else [each[name]])]
        return ", ".join(dict.fromkeys(show(value) for value in values))

    seeds = {" ".join(map(str, each["seeds"])) for each in entries}
    versions = distinct("versions", lambda x: f"torch {x['torch']}, transformers {x['transformers']}")
    return (
        f"Seeds {' or '.join(sorted(seeds))}, mean ± standard deviation over them, with the value of each in the file; "
        f"commit {distinct('git_commit', lambda x: x[:7])}; {versions}; {distinct('device')}, one thread a run."
    )


def block(results: Path, name: str, kind: str, *commands: str) -> str:
    """A block of a page; KeyError with what there is not."""
    path = results / f"{name}.json"
    if not path.is_file():
        raise KeyError(path.name)
    entries = json.loads(path.read_text(encoding="utf-8"))
    if kind == "facts":
        return facts(entries)
    if kind not in PARTS:
        raise KeyError(kind)
    return table(entries, kind, *commands)
