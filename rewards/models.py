"""What scores answers while a policy samples: the toy's true reward, a flawed proxy of it, a
lexicon of sentiment, or a model.

A reward is a function (prompts, answers) -> [n], float32 on the CPU; prompts are strings or lists
of chat messages, answers strings. Higher is better.
"""

from pathlib import Path

import torch

from adapters import lora
from chat.messages import chat_of_texts
from common import InputError, first_line
from common.files import read_json
from common.generate import is_tiny
from common.models import choose_pad_id, context_length, load_with, ready, refuse_missing, resolve_model
from report import progress
from rewards.sentiment import vader_reward
from tokens.encode import encode_row, ids_of_text
from toy import base, world


def load_classifier(folder: str, device, tokenizer):
    """A sequence-classification model with one label in float32, its pad id set to the tokenizer's.

    A head that the folder does not have is new, and its last layer zero."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(lora.base_folder(folder, resolve_model), trust_remote_code=False)
    except Exception as error:
        raise InputError(f"--model {folder}: its config.json cannot be used ({first_line(error)}).") from None
    trained = any("ForSequenceClassification" in name for name in config.architectures or [])
    if trained and config.num_labels != 1:
        labels = f"a sequence-classification model with {config.num_labels} labels"
        raise InputError(f"--model {folder}: {labels}; expected one.")
    model, loading = load_with(AutoModelForSequenceClassification, folder, "a sequence classifier", num_labels=1)
    body = f"{model.base_model_prefix}."
    missing = [name for name in loading["missing_keys"] if name.startswith(body) and ".pooler." not in name]
    refuse_missing(f"--model {folder}", loading["missing_keys"] if trained else missing)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The last layer alone: zeros further down would block its gradient.
            if name in loading["missing_keys"] and parameter.shape[0] == 1:
                parameter.zero_()
    model.config.pad_token_id = tokenizer.pad_token_id
    return ready(model, folder).to(device)


def load_reward(name: str, data: str, device, autocast, chat: bool = False, flag: str = "--reward"):
    """The reward that `--reward` (or another flag) names.

    Args:
        name: "toy", the toy's true reward; "toy:flawed", a proxy of it that can be exploited
            (`toy.world.flawed_reward`); "vader", the sentiment of the answer by a lexicon
            (`rewards.sentiment`), of any text; else a folder or hub id of a
            sequence-classification model, a run of reward_model.py or dph.py among them. One label:
            its logit is the reward; two labels: the second's logit minus the first's.
        data: what `--data` names; only the toy's questions have a true reward.
        device, autocast: where and in which context a model runs.
        chat: whether the policy's prompts of plain text go through its chat template.

    Returns:
        reward(prompts, answers) -> [n], float32, on the CPU. Raises InputError where the name leads
        to no reward.
    """
    if name in {"toy", "toy:flawed"}:
        if base.settings_of(data) is None:
            raise InputError(
                f"{flag} {name}: it judges the toy's questions only, and --data is {data}; expected a reward model."
            )
        rule = world.true_reward if name == "toy" else world.flawed_reward

        def toy_reward(prompts: list, answers: list[str]) -> torch.Tensor:
            return torch.tensor(
                [rule(world.row_of(prompt), answer) for prompt, answer in zip(prompts, answers)], dtype=torch.float32
            )

        return toy_reward
    if name == "vader":
        return vader_reward(f"{flag} vader")
    return model_reward(name, device, autocast, chat, flag)


def model_reward(name: str, device, autocast, chat: bool, flag: str):
    """The reward of a sequence-classification model, read at the end of prompt + answer.

    Strings go through the model's own template where it was trained so: a run of a script here
    knows (`chat` in its args.json); another model is taken to, where it has a template, if the
    policy's strings go through one."""
    if name.startswith("toy:"):
        raise InputError(f"{flag} {name}: expected toy, toy:flawed, vader, a folder, or a hub id.")
    folder = resolve_model(name, flag=flag)
    model, tokenizer = load_judge(name, folder, flag)
    model.to(device).eval().requires_grad_(False)
    # A run of a script here was trained with an EOS behind each answer, and is read there.
    is_run = (Path(folder) / "args.json").is_file()
    has_eos = is_run and tokenizer.eos_token_id is not None
    if is_run:
        chat = read_json(Path(folder) / "args.json", f"{flag} {name}: ").get("chat") is True
    chat = chat and tokenizer.chat_template is not None
    limit = min(context_length(model), tokenizer.model_max_length)

    @torch.no_grad()
    def reward(prompts: list, answers: list[str]) -> torch.Tensor:
        lines = [judged_ids(tokenizer, prompt, answer, has_eos, chat) for prompt, answer in zip(prompts, answers)]
        if None in lines:
            raise InputError(f"{flag} {name}: its tokenizer has no chat template for these messages.")
        lines = [ids[-limit:] for ids in lines]  # a text that is too long loses its beginning
        order, values = sorted(range(len(lines)), key=lambda i: len(lines[i])), torch.zeros(len(lines))
        size = 64 if is_tiny(model) else 16
        for start in progress.track(range(0, len(order), size), f"rewards of {len(order):,} answers"):
            chunk = order[start : start + size]
            batch = tokenizer.pad({"input_ids": [lines[i] for i in chunk]}, return_tensors="pt").to(device)
            with autocast():
                output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            logits = output.logits.float()  # [chunk, labels]
            values[torch.tensor(chunk)] = (logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0.0)).cpu()
        return values

    return reward


def load_judge(name: str, folder: str, flag: str):
    """(model, tokenizer) of a sequence classifier with one label, or two of which the second is the
    better.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, loading = load_with(AutoModelForSequenceClassification, folder, "a sequence-classification model", flag)
    if loading["missing_keys"]:  # transformers would go on with random weights
        names = ", ".join(sorted(loading["missing_keys"]))
        raise InputError(
            f"{flag} {name}: the model has no reward head ({names} not found); reward_model.py trains one."
        )
    if model.config.num_labels > 2:
        labels = f"the model has {model.config.num_labels} labels"
        raise InputError(f"{flag} {name}: {labels}; expected one, or two of which the second is the better.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{flag} {name}: no tokenizer can be loaded from it ({first_line(error)}).") from None
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # These models look for the last token that is not padding: with pad = EOS one too early.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(choose_pad_id(tokenizer))
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def judged_ids(tokenizer, prompt, answer: str, has_eos: bool, chat: bool = False) -> list[int] | None:
    """Token ids of prompt + answer, as in training where that ended in EOS; None without a chat
    template. chat: strings go through it too.

    An answer comes without the white space that it began with: where it would run into the prompt,
    a space goes between.
    """
    if chat and isinstance(prompt, str):
        prompt, _ = chat_of_texts(prompt, [])
    is_text = isinstance(prompt, str)
    apart = not answer or answer[0].isspace() or (is_text and prompt[-1:].isspace())
    answer = ("" if apart else " ") + answer if is_text else [{"role": "assistant", "content": answer.strip()}]
    if has_eos:
        row, _, _ = encode_row(tokenizer, prompt, [answer], 1 << 30)
        return row and row["prompt"] + row["completions"][0]
    if is_text:
        return ids_of_text(tokenizer, prompt + answer)
    if tokenizer.chat_template is None:
        return None
    text = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids
