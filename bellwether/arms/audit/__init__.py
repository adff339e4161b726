"""Attacks on a federation's privacy, on a person's own recipe, in the simulation."""
