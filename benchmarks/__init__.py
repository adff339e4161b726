"""Benchmarks: how fast rounds are, beside other ways to do the same, and beside what the machine can do."""
