"""The recipe: typed sections, YAML, contradictions, the shipped ones."""
