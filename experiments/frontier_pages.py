"""The blocks of README.md, docs/frontier.md and docs/typo.md that results/frontier.jsonl fills
(`python -m tests.pages`).
"""

from pathlib import Path

from experiments import frontier, study
from experiments.chat_pages import markdown

RESULTS = Path(__file__).resolve().parent.parent / "results" / "frontier.jsonl"
HEADS = ["KL, nats", "true reward", "share of the best possible gain"]
LABEL_METHODS = ("DPO", "cDPO", "DPH's LM", "TYPO")  # of pairs: what docs/typo.md compares


def whole_seeds(points: list[dict]) -> list[dict]:
    """The points of those seeds that have every setting; the program works seed by seed."""
    settings = set(frontier.groups_of(points))
    found: dict[int, set] = {}
    for point in points:
        found.setdefault(point["seed"], set()).add((point["method"], point["value"]))
    return [point for point in points if found[point["seed"]] == settings]


def command_of(name: str, value: float) -> str:
    """The command that trains a policy of the table, the seed open."""
    method = frontier.METHODS[name]
    if not method.script:
        return f"no training: {value:g} answers, the true reward picks"
    words = study.words_of({method.knob: f"{value:g}"} | method.flags)
    return f"`python {' '.join([method.script, *words])}`"


def best(points: list[dict]) -> str:
    """Each method at the one of its three settings with the highest mean true reward."""
    settings: dict[str, tuple] = {}
    for (name, value), group in frontier.groups_of(points).items():
        if name != frontier.TARGET:
            reward = study.mean_and_interval([point["true_reward"] for point in group])[0]
            settings[name] = max(settings.get(name, (reward, value, group)), (reward, value, group), key=lambda x: x[0])
    rows = []
    for name, (_, value, group) in settings.items():
        sees = "reward" if name in frontier.SEE_REWARD else "labels"
        rows.append([name, sees, *frontier.cells_of(group), command_of(name, value)])
    return markdown(["", "sees", *HEADS, "command"], rows)


def table(points: list[dict]) -> str:
    """Every method at every setting."""
    rows = []
    for (name, value), group in frontier.groups_of(points).items():
        rows.append([name, frontier.setting_of(name, value), *frontier.cells_of(group)])
    return markdown(["method", "setting", *HEADS], rows)


def good(points: list[dict]) -> str:
    """The methods that learn from pairs, with the true reward of the fifth of the questions that
    the base model answers best, before and after.
    """
    groups, rows = frontier.groups_of(points), []
    for name in LABEL_METHODS:
        for (method, value), group in groups.items():
            if method == name:
                cells = [study.interval_cell([point[key] for point in group]) for key in ("good_before", "good_after")]
                rows.append([name, frontier.setting_of(name, value), *frontier.cells_of(group), *cells])
    return markdown(["method", "setting", *HEADS, "good before", "good after"], rows)


def facts(points: list[dict]) -> str:
    """What the runs were made with."""
    runs = [point for point in points if point["method"] != "DPH's pick"]
    seeds = sorted({point["seed"] for point in points})
    commits = sorted({point["git_commit"][:7] for point in runs})
    versions = sorted({f"{name} {version}" for point in runs for name, version in point["versions"].items()})
    devices = sorted({point["device"] for point in runs})
    words = f"{len(runs)} lines, seeds {', '.join(map(str, seeds))}, {runs[0]['asked']} answers a question"
    return f"{words}; commit {', '.join(commits)}; {', '.join(versions)}; {', '.join(devices)}."


def block(kind: str) -> str:
    """A block by its mark's word: best, table, good or facts.

    Raises KeyError where there is no such block.
    """
    points = whole_seeds(frontier.points_of(study.read_lines(RESULTS)))
    return {"best": best, "table": table, "good": good, "facts": facts}[kind](points)
