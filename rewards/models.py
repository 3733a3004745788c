"""What scores answers while a policy samples: the toy's true reward, a flawed proxy of it, or a
model.

A reward is a function (prompts, answers) -> [n], float32 on the CPU; prompts are strings or lists
of chat messages, answers strings. Higher is better.
"""

from pathlib import Path

import torch

from common import InputError
from common.data import encode_row
from common.generate import is_tiny
from common.models import choose_pad_id, context_length, disable_dropout, fuse_gelu, resolve_model
from toy import base, world


def load_classifier(folder: str, device, tokenizer):
    """A sequence-classification model with one label in float32, its pad id set to the tokenizer's;
    a head that the folder does not have is zero."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(folder)
        trained = any("ForSequenceClassification" in name for name in config.architectures or [])
        if trained and config.num_labels != 1:
            raise InputError(
                f"--model {folder}: a sequence-classification model with {config.num_labels} labels; expected one."
            )
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32, output_loading_info=True
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"--model {folder}: cannot be loaded for sequence classification ({str(error).splitlines()[0]})."
        ) from None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The last layer alone: zeros further down would block its gradient.
            if name in loading["missing_keys"] and parameter.shape[0] == 1:
                parameter.zero_()
    model.config.pad_token_id = tokenizer.pad_token_id
    fuse_gelu(model)
    disable_dropout(model)
    return model.to(device)


def load_reward(name: str, data: str, device, autocast, flag: str = "--reward"):
    """The reward that `--reward` (or another flag) names.

    Args:
        name: "toy", the toy's true reward; "toy:flawed", a proxy of it that can be exploited
            (`toy.world.flawed_reward`); else a folder or hub id of a
            sequence-classification model, a run of reward_model.py or dph.py among them. One label:
            its logit is the reward; two labels: the second's logit minus the first's.
        data: what `--data` names; only the toy's questions have a true reward.
        device, autocast: where and in which context a model runs.

    Returns:
        reward(prompts, answers) -> [n], float32, on the CPU. Raises InputError where the name leads
        to no reward.
    """
    if name in {"toy", "toy:flawed"}:
        if base.flip_share(data) is None:
            raise InputError(
                f"{flag} {name}: it judges the toy's questions only, and --data is {data}; expected a reward model."
            )
        rule = world.true_reward if name == "toy" else world.flawed_reward

        def toy_reward(prompts: list, answers: list[str]) -> torch.Tensor:
            return torch.tensor(
                [rule(world.row_of(prompt), answer) for prompt, answer in zip(prompts, answers)], dtype=torch.float32
            )

        return toy_reward
    return model_reward(name, device, autocast, flag)


def model_reward(name: str, device, autocast, flag: str):
    """The reward of a sequence-classification model: prompt + answer in one line, with an EOS
    behind it where the model was trained here.

    An answer comes without the white space that it began with: where it would run into the prompt,
    a space goes between. A text that is longer than the model's context loses its beginning."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if name.startswith("toy:"):
        raise InputError(f"{flag} {name}: expected toy, toy:flawed, a folder, or a hub id.")
    folder = resolve_model(name, flag=flag)
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise InputError(
            f"{flag} {name}: cannot be loaded as a sequence-classification model ({str(error).splitlines()[0]})."
        ) from None
    if loading["missing_keys"]:  # transformers would go on with random weights
        names = ", ".join(sorted(loading["missing_keys"]))
        raise InputError(
            f"{flag} {name}: the model has no reward head ({names} not found); reward_model.py trains one."
        )
    model.to(device).eval().requires_grad_(False)
    labels = model.config.num_labels
    if labels > 2:
        raise InputError(
            f"{flag} {name}: the model has {labels} labels; expected one, or two of which the second is the better."
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # These models look for the last token that is not padding: with pad = EOS they would read
        # one token early.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(choose_pad_id(tokenizer))
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    model.config.pad_token_id = tokenizer.pad_token_id
    ours = (
        Path(folder) / "args.json"
    ).is_file() and tokenizer.eos_token_id is not None  # a run of a script here: rewards are read at the EOS
    limit = min(context_length(model), tokenizer.model_max_length)

    def tokens(prompt, answer: str) -> list[int]:
        is_text = isinstance(prompt, str)
        apart = not answer or answer[0].isspace() or (is_text and prompt[-1:].isspace())
        answer = ("" if apart else " ") + answer if is_text else [{"role": "assistant", "content": answer.strip()}]
        if ours:
            row, reason, _ = encode_row(tokenizer, prompt, [answer], 1 << 30)  # as in training, EOS included
            if reason:
                raise InputError(f"{flag} {name}: {reason}.")
            ids = row["prompt"] + row["completions"][0]
        elif is_text:
            ids = tokenizer(prompt + answer).input_ids
        elif tokenizer.chat_template is None:
            raise InputError(f"{flag} {name}: chat messages, but the tokenizer has no chat template.")
        else:
            ids = tokenizer(
                tokenizer.apply_chat_template([*prompt, *answer], tokenize=False), add_special_tokens=False
            ).input_ids
        return ids[-limit:]

    @torch.no_grad()
    def reward(prompts: list, answers: list[str]) -> torch.Tensor:
        rows = [tokens(prompt, answer) for prompt, answer in zip(prompts, answers)]
        order, values = sorted(range(len(rows)), key=lambda i: len(rows[i])), torch.zeros(len(rows))
        size = 64 if is_tiny(model) else 16
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            batch = tokenizer.pad({"input_ids": [rows[i] for i in chunk]}, return_tensors="pt").to(device)
            with autocast():
                logits = model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).logits.float()  # [chunk, labels]
            values[torch.tensor(chunk)] = (logits[:, -1] - (logits[:, 0] if labels == 2 else 0.0)).cpu()
        return values

    return reward
