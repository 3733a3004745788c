"""Small models for tests: random ones of two layers, and a bigram model whose log-probabilities are
known exactly.
"""

from pathlib import Path

import torch

ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # as in the toy's tokenizer


def spread_biases(model, seed: int = 0):
    """Random biases: they start at zero, and a forgotten bias would then go unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5, generator=generator)
    return model


def tiny_gpt2(vocabulary: int, seed: int = 0, **changes):
    """A random GPT-2 type, 2 layers of 32.

    Wide initial weights, so that attention, positions and masks matter to the logits.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
    return spread_biases(GPT2LMHeadModel(GPT2Config(**({"vocab_size": vocabulary} | shape | ENDS | changes))).eval())


def tiny_llama(vocabulary: int, seed: int = 0, **changes):
    """A random Llama type, 2 layers of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    shape |= {"max_position_embeddings": 128, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**({"vocab_size": vocabulary} | shape | ENDS | changes))).eval()


def random_table(vocabulary: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Log-probabilities [from, to] in nats, float64: row u is the distribution of the token after
    u.
    """
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(vocabulary, vocabulary, dtype=torch.float64, generator=generator)).log_softmax(-1)


def bigram_model(table: torch.Tensor):
    """A causal LM whose next-token distribution after token u is exactly `table[u]`, whatever
    stands before u.

    A Llama type, so that it loads from a folder and takes position ids, 2-D and 4-D masks, caches
    and logits_to_keep like any other: its embedding is one-hot, its one layer adds zero, its output
    layer holds the table.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    n = len(table)
    shape = {
        "hidden_size": n,
        "intermediate_size": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
    }
    shape |= {"max_position_embeddings": 256, "rms_norm_eps": 0.0, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=n, **shape, **ENDS)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(n))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(n**-0.5)  # a one-hot vector of n has root mean square n ** -.5
        model.lm_head.weight.copy_(table.T)
    return model


def bigram_logps(table: torch.Tensor, prompt: list[int], completion: list[int]) -> float:
    """Exact summed log-probability in nats of a completion after a prompt."""
    return sum(table[u, v].item() for u, v in zip([prompt[-1], *completion], completion))


def save(model, tokenizer, folder: Path) -> Path:
    """The model and its tokenizer as a transformers folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def byte_tokenizer(
    bos: bool = False,
    eos: bool = False,
    merges: tuple = (("a", "b"), ("Ġ", "t"), ("Ċ", "Ċ")),
    chat_template: str | None = None,
):
    """A byte-level BPE tokenizer in GPT-2's manner with few merges: every text has ids, and which
    tokens merge is plain to see.

    Args:
        bos, eos: whether it puts <s> before, or </s> behind every text.
        merges: in the byte alphabet, where Ġ is a space and Ċ a newline.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]  # the ids of ENDS
    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(tokenizer_models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos or eos:
        pattern = "<s> " * bos + "$A" + " </s>" * eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=pattern, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = chat_template
    return fast
