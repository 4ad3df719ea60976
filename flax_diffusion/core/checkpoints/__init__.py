"""Checkpoints of a run: folders that are whole or absent, and a form that both backends read."""
