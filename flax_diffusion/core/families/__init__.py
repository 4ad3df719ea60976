"""Families of models: what a pipeline folder of each holds."""
