"""Random numbers that depend on the seed and the example only, never on machines."""
