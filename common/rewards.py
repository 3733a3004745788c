"""What scores answers while a policy samples: the toy's true reward, a flawed proxy of it, or a model.

A reward is a function (prompts, answers) -> [n], float32 on the CPU; prompts are strings or lists of chat messages, answers strings. Higher is better.
"""

from pathlib import Path

import torch

from common import data, runtime, toy
from common.data import InputError


def load(name: str, run, flag: str = "--reward"):
    """The reward that `--reward` (or another flag) names.

    Args:
        name: "toy", the toy's true reward; "toy:flawed", a proxy of it that can be exploited (`toy.flawed_reward`); else a folder or hub id of a
            sequence-classification model, a run of reward_model.py or dph.py among them. One label: its logit is the reward; two labels: the
            second's logit minus the first's.
        run: of common.runtime, for device and autocast.

    Returns:
        reward(prompts, answers) -> [n], float32, on the CPU. Raises InputError where the name leads to no reward.
    """
    if name in {"toy", "toy:flawed"}:
        if toy.flip_share(run.args.data) is None:
            raise InputError(f"{flag} {name}: it judges answers to the toy's questions only; expected a reward model, since --data is {run.args.data}.")
        judge = toy.true_reward if name == "toy" else toy.flawed_reward

        def of_toy(prompts: list, answers: list[str]) -> torch.Tensor:
            return torch.tensor([judge(toy.row_of(prompt), answer) for prompt, answer in zip(prompts, answers)], dtype=torch.float32)

        return of_toy
    return of_model(name, run, flag)


def of_model(name: str, run, flag: str):
    """The reward of a sequence-classification model: prompt + answer in one line, with an EOS behind it where the model was trained here.

    An answer comes without the white space that it began with: where it would run into the prompt, a space goes between. A text that is longer than the
    model's context loses its beginning.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if name.startswith("toy:"):
        raise InputError(f"{flag} {name}: expected toy, toy:flawed, a folder, or a hub id.")
    folder = runtime.resolve_model(name, flag=flag)
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise InputError(f"{flag} {name}: cannot be loaded as a sequence-classification model ({str(error).splitlines()[0]}).") from None
    if found["missing_keys"]:  # transformers would go on with random weights
        names = ", ".join(sorted(found["missing_keys"]))
        raise InputError(f"{flag} {name}: the model has no reward head ({names} not found); reward_model.py trains one.")
    model.to(run.device).eval().requires_grad_(False)
    labels = model.config.num_labels
    if labels > 2:
        raise InputError(f"{flag} {name}: the model has {labels} labels; expected one, or two of which the second is the better.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # These models look for the last token that is not padding: with pad = EOS they would read one token early.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(runtime.choose_pad_id(tokenizer))
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    model.config.pad_token_id = tokenizer.pad_token_id
    ours = (Path(folder) / "args.json").is_file() and tokenizer.eos_token_id is not None  # a run of a script here: rewards are read at the EOS
    limit = min(runtime.context_length(model), tokenizer.model_max_length)

    def tokens(prompt, answer: str) -> list[int]:
        is_text = isinstance(prompt, str)
        apart = not answer or answer[0].isspace() or (is_text and prompt[-1:].isspace())
        answer = ("" if apart else " ") + answer if is_text else [{"role": "assistant", "content": answer.strip()}]
        if ours:
            example, reason, _ = data.encode(tokenizer, prompt, [answer], 1 << 30)  # as in training, EOS included
            if reason:
                raise InputError(f"{flag} {name}: {reason}.")
            ids = example["prompt"] + example["completions"][0]
        elif is_text:
            ids = tokenizer(prompt + answer).input_ids
        elif tokenizer.chat_template is None:
            raise InputError(f"{flag} {name}: chat messages, but the tokenizer has no chat template.")
        else:
            ids = tokenizer(tokenizer.apply_chat_template([*prompt, *answer], tokenize=False), add_special_tokens=False).input_ids
        return ids[-limit:]

    @torch.no_grad()
    def reward(prompts: list, answers: list[str]) -> torch.Tensor:
        rows = [tokens(prompt, answer) for prompt, answer in zip(prompts, answers)]
        order, values = sorted(range(len(rows)), key=lambda i: len(rows[i])), torch.zeros(len(rows))
        size = 64 if runtime.is_tiny(model) else 16
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            batch = tokenizer.pad({"input_ids": [rows[i] for i in chunk]}, return_tensors="pt").to(run.device)
            with run.autocast():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()  # [chunk, labels]
            values[torch.tensor(chunk)] = (logits[:, -1] - (logits[:, 0] if labels == 2 else 0.0)).cpu()
        return values

    return reward
