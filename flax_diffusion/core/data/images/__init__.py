"""From a stored picture to the pixels that are trained on."""
