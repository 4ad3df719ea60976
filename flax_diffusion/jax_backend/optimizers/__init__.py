"""Optimizers on JAX: AdamW in float32 or 8 bits, with moments on the device or the host."""
