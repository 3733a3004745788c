"""Conversations: their forms in rows, and the templates that make text of them."""
