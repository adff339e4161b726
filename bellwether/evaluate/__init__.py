"""Scores: texts and sums in, numbers out."""
