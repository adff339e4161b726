"""What a client does with a task and its own rows."""
