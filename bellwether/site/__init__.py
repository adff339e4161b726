"""A real federation: coordinator, sites, their keys and papers."""
