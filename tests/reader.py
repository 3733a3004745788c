"""Reads model folders with torch and transformers alone, as other programs do.

    python tests/reader.py request.json answer.safetensors

The environment may have another version of transformers; tests/test_folders.py compares.
"""

import json
import sys

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@torch.no_grad()
def read(folder: str, kind: str, texts: list[str], ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """What a folder says: token ids of texts and the text they decode to, logits or rewards.

    kind: "lm", "reward", or "both". Rewards are of the padded batch of all texts, each ending in
    EOS, and of each text alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = [tokenizer(text).input_ids for text in texts]
    decoded = [tokenizer.decode(line, skip_special_tokens=True) for line in token_ids]
    found = {f"ids {i}": torch.tensor(line) for i, line in enumerate(token_ids)}
    found |= {f"decoded {i}": torch.tensor(list(text.encode())) for i, text in enumerate(decoded)}
    if kind != "reward":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found["logits"] = model(input_ids=torch.tensor(ids)).logits.contiguous()
    if kind != "lm":
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = model.config.pad_token_id  # as README.md says
        tokenizer.padding_side = "right"
        lines = [{"input_ids": [*line, tokenizer.eos_token_id]} for line in token_ids]
        batch = tokenizer.pad(lines, return_tensors="pt")
        found["rewards"] = model(**batch).logits[:, 0].contiguous()
        alone = [model(input_ids=torch.tensor([line["input_ids"]])).logits[0, 0] for line in lines]
        found["rewards alone"] = torch.stack(alone)
    return found


def main() -> None:
    """Answers a request: a list of the arguments of `read`."""
    with open(sys.argv[1], encoding="utf-8") as file:
        requests = json.load(file)
    answers = {f"{i}|{name}": value for i, words in enumerate(requests) for name, value in read(*words).items()}
    safetensors.torch.save_file(answers, sys.argv[2])


if __name__ == "__main__":
    main()
