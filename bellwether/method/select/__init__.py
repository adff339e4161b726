"""Choosing the rows to train on: arrays in, arrays out."""
