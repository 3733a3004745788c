"""Models to pretrain: new ones with random weights, and how the output layer of any model is to be
used.
"""

from pathlib import Path

import torch

from common import InputError, first_line, models, oracle
from common.processes import print0
from pretraining.chunks import choose_tokenizer
from pretraining.documents import Documents

# Layers, heads, hidden size.
SIZES = {"tiny": (2, 2, 64), "mini": (4, 4, 128), "small": (4, 4, 256), "gpt2-small": (12, 12, 768)}


def new_model(name: str, tokenizer, context: int, seed: int):
    """A model with random weights and no dropout: `tiny`, `mini`, `small` or `gpt2-small` (GPT-2
    type), or what the config.json of a folder describes.

    Its vocabulary is the tokenizer's; its context at least `context`, of the named sizes exactly
    that. The same seed gives the same weights and leaves the caller's random numbers as they were.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ends = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": pad, "vocab_size": len(tokenizer)}
    if name in SIZES:
        layers, heads, width = SIZES[name]
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"n_positions": context, "n_layer": layers, "n_head": heads, "n_embd": width}
        config = GPT2Config(**shape, **no_dropout, **ends)
    else:
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"--model {name}: expected {', '.join(SIZES)}, or a folder with a config.json.")
        try:
            config = AutoConfig.from_pretrained(name, **ends)
        except Exception as error:
            raise InputError(f"--model {name}: its config.json cannot be used ({first_line(error)}).") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:
            reason = f"no causal language model can be made of its config.json ({first_line(error)})"
            raise InputError(f"--model {name}: {reason}.") from None
    # As in a model that is loaded: a resumed run must compute the same to the last bit.
    models.fuse_gelu(model)
    models.disable_dropout(model)
    check_context(model, context)
    return model


@torch.no_grad()
def choose_output_layer(logps_of, model, ids: torch.Tensor, pad_id: int, say=print0) -> dict:
    """What a batch must hold besides its chunks: nothing, or "logits_to_keep" where
    log-probabilities need the model's own output layer.

    A model that scales or caps its logits, or whose layers do more than `base_model` and output
    layer together, would be trained on other numbers than it is evaluated on, without a word. So
    this is measured on one chunk, against a plain pass, before the first step.

    Args:
        logps_of: batch -> log-probabilities of the targets [1, context - 1]. ids: a chunk
            [context], on the model's device.

    Raises InputError where neither way agrees.
    """
    line = ids.tolist()
    own_layer = {"logits_to_keep": len(line)}
    ways = [{}, own_layer]
    if oracle.changes_logits(model, line):
        ways = [own_layer]
        say("This model scales or caps its logits, so its own output layer is used: slower, and right.")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.compiler.set_stance("force_eager"):
            expected = oracle.plain_logps(model, [(line[:1], line[1:])], pad_id)
            tolerance = 1e-3 + 1e-6 * expected.abs().max().item()
            for more in ways:
                try:
                    logps = logps_of({"input_ids": ids[None], **more}).sum(-1).float().cpu()
                    gap, reason = (logps - expected).abs().max().item(), ""
                except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
                    gap, reason = float("inf"), f"fails ({type(error).__name__})"
                if gap <= tolerance:
                    return more
                if not more:
                    reason = reason or f"is off by {gap:.2g} nats"
                    say(f"With this model the gathered output layer {reason} on a chunk: not used; slower, and right.")
    finally:
        torch.set_float32_matmul_precision(precision)
    raise InputError(
        "This model's log-probabilities differ between a plain pass and every way to train; it cannot be trained here."
    )


def load_start(
    start: str,
    task: str,
    name: str,
    tokenizer_name: str,
    vocabulary: int,
    context: int,
    seed: int,
    documents: Documents,
    device,
):
    """(tokenizer, model) of the folder `start`, or where that is empty those of a new model.

    Args:
        name, tokenizer_name, vocabulary: as --model, --tokenizer, --vocabulary. documents: training
            ones, on which a tokenizer may be trained.

    Raises InputError where the model has fewer positions than a chunk has tokens.
    """
    if start:
        tokenizer = models.load_tokenizer(start)
        model = models.load_model(start, device, tokenizer)
    else:
        tokenizer = choose_tokenizer(task, tokenizer_name, vocabulary, documents)
        model = new_model(name, tokenizer, context, seed).to(device)
    check_context(model, context)
    return tokenizer, model


def check_context(model, context: int) -> None:
    """Raises InputError where a model has fewer positions than a chunk has tokens."""
    positions = models.context_length(model)
    if positions < context:
        raise InputError(f"--context {context}: the model has {positions} positions.")
