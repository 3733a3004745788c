"""Labelled answers and demonstrations: what pointwise_dpo.py, ulma.py and sft.py read."""
