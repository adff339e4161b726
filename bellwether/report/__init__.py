"""Tables and pages of finished runs and comparisons."""
