"""Latents of pictures: how they are computed, and folders of them that a run reads in place of pictures."""
