"""Adapters on a pretrained model: LoRA."""
