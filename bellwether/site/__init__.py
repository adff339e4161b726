"""A real federation: coordinator, sites, their keys, folders and invitations."""
