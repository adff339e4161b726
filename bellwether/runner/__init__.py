"""A recipe becomes data, clients, an engine and a method, and is run."""
