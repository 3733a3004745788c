"""What the functions of beds_pairs.py and beds_toy.py share: reading result files for the claims.

Of a file with runs of several beds (other sizes, another model) the bed with most lines counts, so
that no difference is between two of them.
"""

import json
from collections import Counter

# Commits whose toy runs began with base models that torch 2.13 had trained (docs/toy.md, Frozen).
BEFORE_WORLDS = ("788c75a", "4381d8b", "c2f236d", "09c7143", "fcc53c4")


def source_of(name: str, lines: list[dict]) -> str:
    """Where numbers are from: file, commits and versions of its lines."""

    def distinct(key: str) -> list:
        values = [line.get(key) for line in lines]
        return list(
            dict.fromkeys(json.dumps(x) for value in values for x in (value if type(value) is list else [value]))
        )

    commits = [(json.loads(text) or "unknown")[:7] for text in distinct("git_commit")]
    versions = [json.loads(text) for text in distinct("versions")]
    words = [
        f"torch {each['torch']}, transformers {each['transformers']}" if each else "versions not kept"
        for each in versions
    ]
    old = "; base models from before `toy/worlds/`" if set(commits) & set(BEFORE_WORLDS) else ""
    return f"`results/{name}`, commit {', '.join(commits)}, {'; '.join(words)}{old}"


def most_common_bed(lines: list[dict], names: tuple[str, ...]) -> list[dict]:
    """The lines that agree with most others in these fields."""
    beds = [json.dumps([line.get(name) for name in names]) for line in lines]
    most = Counter(beds).most_common(1)[0][0] if beds else None
    return [line for line, bed in zip(lines, beds) if bed == most]


def by_seed(lines: list[dict], name: str, **expected) -> dict[int, float]:
    """{seed: number} of the lines that have these values."""
    found = [line for line in lines if expected.items() <= line.items()]
    return {line["seed"]: line[name] for line in found if line.get(name) is not None}
