"""Delivering a task to a cohort and collecting the replies."""
