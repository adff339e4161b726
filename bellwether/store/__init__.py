"""What runs and comparisons keep on disk."""
