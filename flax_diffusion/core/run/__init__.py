"""A run from its first check to its last save."""
