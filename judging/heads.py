"""What can be read from a model's folder: log-probabilities, rewards, or both.

A causal language model has log-probabilities; one with a head `score` beside it (a run of dph.py)
has rewards, too; a sequence-classification model (a run of reward_model.py, or a reward model of
others) has rewards only.
"""

from pathlib import Path

import torch

from adapters import lora
from common import InputError
from common.files import read_json
from common.models import load_model, load_weights
from common.oracle import plain_rewards
from report import progress
from rewards.models import load_judge


def is_classifier(folder: str) -> bool:
    """Whether a folder holds a sequence-classification model, or an adapter of one."""
    if lora.has_adapter(folder):
        return lora.read_settings(folder).get("task_type") == "SEQ_CLS"
    config = read_json(Path(folder) / "config.json", f"--model {folder}: ")
    return any("ForSequenceClassification" in name for name in config.get("architectures") or [])


def is_run(folder: str) -> bool:
    """Whether a folder is a run of a script here, trained with an EOS behind each answer."""
    return (Path(folder) / "args.json").is_file()


def refuse_classifier(name: str, folder: str, flag: str) -> None:
    """Raises InputError where a flag needs log-probabilities and the model has rewards only."""
    if is_classifier(folder):
        raise InputError(f"{flag}: {name} is a sequence-classification model, which has no log-probabilities.")


def refuse_without_reward(name: str, folder: str, flag: str) -> None:
    """Raises InputError where a flag needs a reward and the model has none."""
    if not is_classifier(folder) and not load_weights(folder, "score.weight"):
        raise InputError(f"{flag}: {name} has no reward head; dph.py and reward_model.py train one.")


def load_parts(name: str, folder: str, tokenizer, device) -> tuple:
    """(model in float32, reward or None, whether the model has log-probabilities) of a folder.

    `reward((prompt ids, completion ids))` -> the logit at the last token, of one sequence alone; of
    two labels the second's logit minus the first's.
    """
    if not is_classifier(folder):
        model = load_model(folder, device, tokenizer).eval()
        head = load_weights(folder, "score.weight").get("score.weight")  # [1, hidden]
        return model, head if head is None else lambda sequence: plain_rewards(model, head, [sequence])[0], True
    model, _ = load_judge(name, folder, "--model")
    model.to(device).eval()
    model.config.pad_token_id = None  # one text at a time: the last token, whatever its id

    @torch.no_grad()
    def reward(sequence: tuple[list[int], list[int]]) -> float:
        ids = torch.tensor([sequence[0] + sequence[1]], device=device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
        return (logits[-1] - (logits[0] if len(logits) == 2 else 0.0)).item()

    return model, reward, False


def rewards_of(reward, sequences: list[tuple]) -> list[float]:
    """The reward of each sequence, with progress."""
    return [
        reward(sequence) for sequence in progress.track(sequences, f"rewards of {len(sequences):,} answers", "answer")
    ]
