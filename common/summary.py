"""What a run leaves to read: the facts of summary.json, the end table, the curves, and trackers."""

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

from common import InputError
from common.models import sha256_of_model
from common.processes import is_main_process, world_size

ROOT = Path(__file__).resolve().parent.parent

METRICS = {  # what the end table calls each metric, in this order
    "preference_accuracy": "preferred answer more likely than the other",
    "reward_accuracy": "preferred answer has the higher reward",
    "margin_calibration": "calibration error of sigma(margin)",
    "rank_correlation": "rank correlation of reward and true reward",
    "logps_auc": "better labelled answer more likely than the other",
    "reward_auc": "better labelled answer has the higher reward",
    "reward": "reward that it was trained on",
    "test_reward": "reward that it was not trained on",
    "meteor_similarity": "METEOR between answers to different prompts",
    "duplicate_share": "same answer to different prompts",
    "short_share": "answers of three words or fewer",
    "length": "words an answer",
    "kl": "KL to the reference, nats per answer",
    "true_reward": "true reward of sampled answers",
    "misalignment": "mean score of samples",
    "expected_max": "expected maximum of 25 samples",
    "share_above": "samples with a score above the limit",
    "red_team_best": "mean score behind the red team's best prompt",
    "red_team_mean": "mean score behind the red team's prompts",
    "right_share": "right answers, or sentences that state a right fact",
    "rude_share": "rude answers",
    "frontier_efficiency": "share of the best possible gain at this KL",
    "perplexity": "perplexity per token of held-out text",
    "perplexity_good": "the same on good segments",
    "kl_to_teacher": "KL(teacher || model), nats per sequence",
    "sample_tokens": "mean length of a sample, tokens",
    "distinct_2": "different pairs of tokens among all",
    "token_entropy": "entropy of the tokens, nats",
    "self_bleu": "Self-BLEU of the samples",
}


def git_commit() -> str | None:
    """The commit of the code that runs, "+" where files differ from it; None outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_bytes(device) -> int:
    """Largest memory of the run: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"cpu, {names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def machine(device) -> dict:
    """What a run was made on and with."""
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    return {
        "peak_memory_bytes": peak_memory_bytes(device),
        "versions": versions,
        "git_commit": git_commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }


def sources(model_folder: str, data_sha256: str) -> dict:
    """Hashes of what a run read: the rows, and the weights that it began with, if any."""
    return {"data_sha256": data_sha256, "model_sha256": sha256_of_model(model_folder) if model_folder else None}


def cell(metrics: dict, name: str) -> str:
    """One number of the end table, with its standard error where there is one."""
    value, error = metrics.get(name), metrics.get(f"{name}_se")
    if value is None:
        return "-"
    number = f"{value:.3g}" if 0 < abs(value) < 0.1 else f"{value:.3f}"
    return number if error is None else f"{number} ± {error:.2g}"


def print_end_table(columns: dict[str, dict], folder: Path, speed: float | None) -> None:
    """The end table, a line a metric and a column a state of the model; then samples of each state.

    Args:
        columns: name -> split -> metrics, with "samples": [prompt, answer] or texts.
        speed: tokens a second.
    """
    splits = next(iter(columns.values())).keys()
    trained = "On the questions trained for" if "unseen" in splits else "On held-out rows"
    width = max(17, *(len(name) + 2 for name in columns))
    heads = "".join(f"{name.replace('_', ' '):>{width}}" for name in columns)
    for split in splits:
        states = [column[split] for column in columns.values()]
        names = [name for name in METRICS if any(metrics.get(name) is not None for metrics in states)]
        if names:
            print(f"\n{trained if split == 'held_out' else 'On unseen questions':66}{heads}")
        for name in names:
            cells = "".join(f"{cell(metrics, name):>{width}}" for metrics in states)
            print(f"  {f'{METRICS[name]} ({name})':64}{cells}")
    print_samples({name: column["held_out"].get("samples", []) for name, column in columns.items()})
    print(f"\n{speed or 0:,.0f} tokens a second. The model, its metrics and summary.json are in {folder}")


def print_samples(samples: dict[str, list]) -> None:
    """Three samples of each state of the model, below their prompt where they have one."""
    for i in range(max(map(len, samples.values()))):
        print("\nSampled" if i == 0 else "")
        for name, items in samples.items():
            prompt, text = ("", items[i]) if isinstance(items[i], str) else items[i]
            prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            if prompt and name == next(iter(samples)):
                print(f"  {prompt.strip()[-300:]}")
            lines = [line[:400] for line in text.strip("\n").split("\n")[:12]]
            print(f"    {name.replace('_', ' '):18}" + f"\n{'':22}".join(lines))


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
