"""The page of a run: one file with its curves, samples, options and what the model saw."""
