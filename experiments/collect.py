"""Gathers run folders into one result file and prints its table: every seed's value, mean and
standard deviation.

    python -m experiments.collect runs/dpo-* --output results/toy_dpo.json

Runs that differ in name and seed only form one entry. The file is a list of entries:
    command             makes a run again; defaults are left out, the seed is open
    seeds               the seeds in rising order: the order of everything below
    git_commit, device, threads, versions, steps, seconds
                        one value where all seeds have the same, else a list of one for each seed
    before, after, ...  each report of summary.json: metric -> [mean, standard deviation,
                        [value of each seed]]; a seed that has no value stands as null, and so does
                        the deviation of a single one

Files written before the values were kept hold [mean, standard deviation] alone. Every number of the
docs comes from such a file.
"""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/collect.py

from common import InputError
from common.files import read_json, write_json
from experiments.study import mean_and_std

REPORTS = ("before", "after", "after_best_of_n", "reference_best_of_n")
FACTS = ("git_commit", "device", "threads", "versions", "steps", "seconds")
NOT_IN_COMMAND = {"name", "output_dir", "seed", "resume"}


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]
    """Folders of finished runs."""
    output: str
    """Where the result file goes; it is replaced."""


def hide_data_folder(text: str) -> str:
    """The text with the folder of outside data as the variable that names it."""
    folder = os.environ.get("PREFERENCE_DATA", "").rstrip("/")
    return text.replace(folder, "$PREFERENCE_DATA") if folder else text


def command_of(summary: dict) -> str:
    """The command line that makes a run again, defaults left out, the seed open."""
    defaults = importlib.import_module(summary["script"].removesuffix(".py")).Args()
    words = ["python", summary["script"]]
    for name, value in summary["args"].items():
        if name in NOT_IN_COMMAND or value == getattr(defaults, name, None):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", hide_data_folder(str(value))]
    return " ".join(words)


def collect(summaries: list[dict]) -> list[dict]:
    """One entry for each command among the summaries, in the order of their first runs."""
    groups: dict[str, list[dict]] = {}
    for summary in summaries:
        groups.setdefault(command_of(summary), []).append(summary)
    return [entry_of(command, group) for command, group in groups.items()]


def entry_of(command: str, summaries: list[dict]) -> dict:
    """The entry of runs that differ in their seed alone; the module's docstring tells its form."""
    summaries = sorted(summaries, key=lambda summary: summary["args"]["seed"])
    entry = {"command": command, "seeds": [summary["args"]["seed"] for summary in summaries]}
    for name in FACTS:
        values = [summary[name] for summary in summaries]
        entry[name] = values[0] if all(value == values[0] for value in values) else values
    for report in [name + part for part in ("", "_unseen") for name in REPORTS]:
        reports = [summary.get(report, {}) for summary in summaries]
        metrics = dict.fromkeys(metric for values in reports for metric in values)
        table = {metric: spread([values.get(metric) for values in reports]) for metric in metrics}
        table = {metric: cell for metric, cell in table.items() if cell is not None}
        if table:
            entry[report] = table
    return entry


def spread(values: list) -> list | None:
    """[mean, standard deviation, values] of a metric, rounded; None where no seed has a number."""
    numbers = [value if isinstance(value, (int, float)) else None for value in values]
    mean, std = mean_and_std(numbers)
    if mean is None:
        return None
    rounded = [None if number is None else round(number, 4) for number in numbers]
    return [round(mean, 4), None if std is None else round(std, 4), rounded]


def print_entry(entry: dict) -> None:
    """An entry in words: a line a metric, mean and deviation and then each seed's value."""
    print(f"\n{entry['command']}   seeds {' '.join(map(str, entry['seeds']))}")
    for report in (name for name in entry if name.startswith(REPORTS)):
        print(f"  {report}")
        for metric, (mean, std, values) in entry[report].items():
            deviation = "" if std is None else f" +- {std:.3f}"
            each = " ".join("-" if value is None else f"{value:.3f}" for value in values)
            print(f"    {metric:24}{mean:.3f}{deviation}   ({each})")


def main(args: Args) -> None:
    """Reads summaries, groups them by command, writes and prints."""
    summaries = []
    for folder in args.runs:
        path = Path(folder) / "summary.json"
        if not path.is_file():
            raise InputError(f"{folder}: no summary.json; expected the folder of a finished run.")
        summaries.append(read_json(path))
    entries = collect(summaries)
    write_json(Path(args.output), entries)
    for entry in entries:
        print_entry(entry)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
