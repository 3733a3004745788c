"""Rows of text to token ids, and token ids kept on disk."""
