"""Talking to what was tuned."""
