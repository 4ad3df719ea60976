"""Decoding and transformation of pictures, from a stored file to the pixels for training."""
