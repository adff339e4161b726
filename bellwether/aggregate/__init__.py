"""Turning updates into the next adapter: arrays in, arrays out."""
