"""Checkpoints of a run: folders that are whole or not there, and a form that both backends read."""
