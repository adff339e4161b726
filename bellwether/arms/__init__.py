"""Comparisons: arms under several seeds, trials, trivial rivals."""
