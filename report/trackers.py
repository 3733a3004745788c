"""Trackers that metrics are sent to: tensorboard and wandb, optional packages."""

from pathlib import Path

from common import InputError
from common.processes import is_main_process


def tracker(kind: str, folder: Path, args: dict):
    """None, or a function (step, metrics) that sends metrics to tensorboard or wandb."""
    if kind == "none" or not is_main_process():
        return None
    try:
        if kind == "wandb":
            import wandb

            wandb.init(project="preferences", name=folder.name, config=args)
            return lambda step, metrics: wandb.log(metrics, step=step)
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(f"--track {kind} needs a package that is not installed: pip install {kind}") from None
    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(step: int, metrics: dict) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, step)

    return send
