"""Model folders as other programs read them: transformers 4.57, and what builds on it."""

import json
from pathlib import Path

# What version 4 calls the base of the rotary angles, that of layers with a window, and the share
# of a head that turns.
USUAL = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
NAMES = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rope_local_base_freq", "rotary_pct"))
NAMES |= dict.fromkeys(
    ("modernbert", "modernbert-decoder"), ("global_rope_theta", "local_rope_theta", "partial_rotary_factor")
)


def with_old_names(config: dict) -> dict:
    """A config.json that both versions read alike.

    Version 5 keeps all of the rotary embedding in `rope_parameters`, by kind of layer where they
    differ. Version 4 does not know that name and would take 10,000 as the base without a word."""
    config = {key: with_old_names(value) if isinstance(value, dict) else value for key, value in config.items()}
    rope = config.get("rope_parameters")
    if not rope:
        return config
    base, local_base, share = NAMES.get(config.get("model_type"), USUAL)
    wide, local = rope.get("full_attention") or rope, rope.get("sliding_attention")
    if "rope_theta" in wide:
        config[base] = wide["rope_theta"]
    if local and "rope_theta" in local:
        config[local_base] = local["rope_theta"]
    if "partial_rotary_factor" in wide:
        config[share] = wide["partial_rotary_factor"]
    if wide.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in wide.items() if key not in USUAL}
    return config


def old_tokenizer_config(config: dict, special: set[str]) -> dict:
    """A tokenizer_config.json that both versions read alike.

    Args:
        special: tokens that the tokenizer itself takes to be special. A word that was chosen to pad
            with is none: as one it would vanish from decoded text; the model's configuration has
            its id."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config.get("pad_token") is not None and text_of(config["pad_token"]) not in special:
        config["pad_token"] = None
    return config


def text_of(token: str | dict) -> str:
    """The text of a token of tokenizer_config.json, which is a string or an object."""
    return token["content"] if isinstance(token, dict) else token


def for_other_loaders(folder: Path) -> dict[str, dict]:
    """The JSON files of a folder, of a model or of an adapter, as other programs must find them, by
    name."""
    files = {}
    if (folder / "config.json").exists():
        config = files["config.json"] = with_old_names(read(folder / "config.json"))
        if config.get("architectures"):  # fully_shard renames the class
            config["architectures"] = [name.removeprefix("FSDP") for name in config["architectures"]]
    if (folder / "tokenizer.json").exists():
        added = read(folder / "tokenizer.json").get("added_tokens", [])
        special = {token["content"] for token in added if token.get("special")}
        files["tokenizer_config.json"] = old_tokenizer_config(read(folder / "tokenizer_config.json"), special)
    return files


def read(path: Path) -> dict:
    """The object of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
