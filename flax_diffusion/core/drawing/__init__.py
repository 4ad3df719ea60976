"""The models that `generate` and `convert` open, and the writing of pictures."""
