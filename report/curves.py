"""The curves of a run, drawn from its metrics.jsonl."""

import json
from pathlib import Path


def draw_curves(folder: Path) -> None:
    """curves.png: a panel for each metric of metrics.jsonl; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    names = [name for name in dict.fromkeys(name for line in lines for name in line) if name not in {"step", "split"}]
    down = -(-len(names) // 4)
    figure = plt.figure(figsize=(13.6, 2.5 * down or 1))
    for i, name in enumerate(names):
        axis = figure.add_subplot(down, 4, i + 1, title=name, xlabel="step")
        for split, style in (("train", "-"), ("held_out", "o--")):
            some = [line for line in lines if line["split"] == split and line.get(name) is not None]
            axis.plot([line["step"] for line in some], [line[name] for line in some], style, markersize=3, label=split)
        if i == 0:
            axis.legend(fontsize=7)
    if names:
        figure.tight_layout()
        figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)
