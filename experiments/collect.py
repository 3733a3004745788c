"""Gathers run folders into one result file and prints its table: mean and standard deviation over seeds.

    python -m experiments.collect runs/dpo-* --output results/toy_dpo.json

Runs that differ in name and seed only form one line. Every number of the docs comes from such a file.
"""

import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

REPORTS = ("before", "after", "after_best_of_n", "reference_best_of_n")


@dataclass
class Args:
    runs: tyro.conf.Positional[list[str]]
    """Folders of finished runs."""
    output: str
    """Where the result file goes; it is replaced."""


def nameless(value):
    """The value with the folder of outside data as the variable that names it."""
    folder = os.environ.get("PREFERENCE_DATA", "")
    return value.replace(folder.rstrip("/"), "$PREFERENCE_DATA") if folder and isinstance(value, str) else value


def command(summary: dict) -> str:
    """The command line that makes a run again, defaults left out, the seed open."""
    import importlib

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    defaults = importlib.import_module(summary["script"].removesuffix(".py")).Args()
    words = []
    for key, value in summary["args"].items():
        if key not in {"name", "output_dir", "seed", "resume"} and value != getattr(defaults, key, None):
            flag = "--" + key.replace("_", "-")
            words += ([flag] if value else ["--no-" + flag[2:]]) if isinstance(value, bool) else [flag, nameless(str(value))]
    return " ".join(["python", summary["script"], *words])


def main(args: Args) -> None:
    """Reads summaries, groups them by command, writes and prints."""
    groups: dict[str, list[dict]] = {}
    for folder in args.runs:
        path = Path(folder) / "summary.json"
        if not path.is_file():
            raise SystemExit(f"{folder}: no summary.json; expected the folder of a finished run.")
        summary = json.loads(path.read_text(encoding="utf-8"))
        groups.setdefault(command(summary), []).append(summary)
    lines = []
    for words, summaries in groups.items():
        line = {"command": words, "seeds": sorted(s["args"]["seed"] for s in summaries)}
        for key in ("git_commit", "device", "threads", "versions", "steps"):
            found = [s[key] for s in summaries]
            line[key] = found[0] if all(f == found[0] for f in found) else found
        line["seconds"] = round(statistics.mean(s["seconds"] for s in summaries), 2)
        for report in (f"{name}{part}" for part in ("", "_unseen") for name in REPORTS):
            for key in summaries[0].get(report, {}):
                values = [s[report][key] for s in summaries if s[report].get(key) is not None]
                if values:
                    line.setdefault(report, {})[key] = [round(statistics.mean(values), 4), round(statistics.stdev(values), 4) if len(values) > 1 else None]
        lines.append(line)
    Path(args.output).write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    for line in lines:
        print(f"\n{line['command']}   seeds {line['seeds']}")
        for report in (key for key in line if key.startswith(REPORTS)):
            cells = (f"{key} {mean:.3f}" + (f" +- {spread:.3f}" if spread is not None else "") for key, (mean, spread) in line[report].items())
            print(f"  {report:28}" + ", ".join(cells))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
