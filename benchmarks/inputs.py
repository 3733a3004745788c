"""What both systems of benchmarks/pairs.py are given: models with random weights, and batches of
token ids.
"""

import os
import random
from pathlib import Path

import torch

from common import InputError, batches, data
from common.fields import pair_of_row
from common.files import read_rows

# Tokens of prompt, chosen and rejected answer; "long" as in UltraFeedback.
SHAPES = {
    "prompt-heavy": (448, 32, 32),
    "even": (192, 64, 64),
    "completion-heavy": (64, 192, 192),
    "short": (64, 32, 32),
    "long": (200, 300, 250),
    "tiny": (24, 8, 8),
}
LONGEST = 512  # tokens of prompt and one completion of the real rows
PAD, EOS = 0, 1  # ids are only places in a table here: the weights are random


def build_model(name: str):
    """A model with random weights, the same at every call."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ends = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    torch.manual_seed(0)
    if name == "gpt2-small":
        return GPT2LMHeadModel(GPT2Config(**ends))
    small, tiny = llama_shape(256, 704, layers=8, heads=4), llama_shape(32, 64, layers=2, heads=2)
    known = {
        "llama-19m": (small, 49_152),
        "llama-135m": (llama_shape(576, 1536, 30, 9, 3), 49_152),
        "tiny": (tiny, 512),
    }
    if name not in known:
        raise InputError(f"--models {name}: expected gpt2-small, {', '.join(known)}.")
    shape, vocabulary = known[name]
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": 1024, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **shape, **ends))


def llama_shape(width: int, inner: int, layers: int, heads: int, key_heads: int = 0) -> dict[str, int]:
    """The sizes of a Llama type's body; fewer `key_heads` than heads: grouped queries."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": key_heads or heads}


def save_model(name: str, folder: Path) -> int:
    """Writes model and tokenizer there and returns the vocabulary's size.

    TRL asks for a tokenizer; only its pad and EOS ids matter here.
    """
    model = build_model(name)
    model.save_pretrained(folder)
    word_tokenizer(2).save_pretrained(folder)
    return model.config.vocab_size


def word_tokenizer(vocabulary: int):
    """A tokenizer of so many words: pad, EOS and numbers."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<pad>": PAD, "<eos>": EOS} | {str(i): i for i in range(2, vocabulary)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def make_batches(shape: str, vocabulary: int, batch_size: int, steps: int) -> list[list[dict]]:
    """Rows as data.encode_rows returns them, the first of a training plan: both systems get them in
    this order.
    """
    if shape in SHAPES:
        rows = random_rows(SHAPES[shape], vocabulary, steps * batch_size)
    else:
        rows = real_rows(Path(os.environ["PREFERENCE_DATA"]), max(steps, 16) * batch_size, vocabulary)
    plan = batches.plan_batches(rows, batch_size, 1.0, steps, seed=0)
    return [[rows[i] for i in step] for step in plan]


def random_rows(lengths: tuple[int, int, int], vocabulary: int, count: int) -> list[dict]:
    """Pairs of random token ids, all of the same lengths of prompt and answers."""
    rng = random.Random(0)
    prompt, *answers = lengths

    def random_ids(n: int) -> list[int]:
        return [rng.randrange(2, vocabulary) for _ in range(n)]

    rows = []
    for _ in range(count):
        rows.append({"prompt": random_ids(prompt), "completions": [random_ids(length) for length in answers]})
    return rows


def real_rows(folder: Path, count: int, vocabulary: int) -> list[dict]:
    """A random sample of the HH rows.

    Ids beyond a smaller vocabulary are folded into it: what a token is called does not matter here.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizers" / "gpt2")
    files = sorted((folder / "pairs").glob("hh_*.jsonl.gz"))
    if not files:
        raise InputError(f"--shapes hh: no pairs/hh_*.jsonl.gz in PREFERENCE_DATA, {folder}.")
    pairs = []
    for file in files:
        usable, _ = data.usable(read_rows(str(file)), pair_of_row)
        pairs += usable
    random.Random(0).shuffle(pairs)
    rows = []
    for row in data.encode_rows(tokenizer, pairs[: 2 * count], LONGEST)[:count]:
        prompt, *completions = [[token % vocabulary for token in ids] for ids in (row["prompt"], *row["completions"])]
        rows.append({"prompt": prompt, "completions": completions})
    return rows
