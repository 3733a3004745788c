"""Trackers that a run's metrics, end table and samples are sent to: tensorboard and wandb, optional
packages.
"""

import importlib
from pathlib import Path

from common import InputError
from common.processes import is_main_process
from report.card import samples_of, tables


def check_tracker(kind: str) -> None:
    """Raises InputError where the package of a tracker is not installed."""
    try:
        if kind != "none":
            importlib.import_module(kind)
    except ImportError:
        how = f"pip install {kind} (see requirements-optional.txt)"
        raise InputError(f"--track {kind} needs a package that is not installed: {how}") from None


def tracker(kind: str, folder: Path, args: dict):
    """None, or a tracker: `send(step, metrics)` while training, `finish(step, columns)` after."""
    if kind == "none" or not is_main_process():
        return None
    return Wandb(folder, args) if kind == "wandb" else Tensorboard(folder)


def numbers_of(columns: dict[str, dict]) -> dict[str, float]:
    """The end table flat, as "end/after/held_out/kl"."""
    return {
        f"end/{state}/{split}/{name}": value
        for state, splits in columns.items()
        for split, metrics in splits.items()
        for name, value in metrics.items()
        if isinstance(value, (int, float))
    }


class Wandb:
    """Sends to wandb, whose settings are its own."""

    def __init__(self, folder: Path, args: dict):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(project="preferences", name=folder.name, config=args)

    def send(self, step: int, metrics: dict) -> None:
        self.wandb.log(metrics, step=step)

    def finish(self, step: int, columns: dict[str, dict]) -> None:
        self.run.summary.update(numbers_of(columns))
        rows = [list(row) for row in samples_of(columns)]
        if rows:
            self.wandb.log({"samples": self.wandb.Table(columns=["model", "prompt", "answer"], data=rows)}, step=step)
        self.wandb.finish()


class Tensorboard:
    """Writes to the folder tensorboard/ of the run."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def send(self, step: int, metrics: dict) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def finish(self, step: int, columns: dict[str, dict]) -> None:
        self.send(step, numbers_of(columns))
        self.writer.add_text("end table", "\n\n".join(tables(columns)), step)
        for i, (state, prompt, text) in enumerate(samples_of(columns)):
            self.writer.add_text(f"samples/{state}", f"{prompt}\n\n> {text}", i)
        self.writer.close()
