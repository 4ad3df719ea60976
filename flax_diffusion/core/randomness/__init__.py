"""Random numbers that depend only on the seed and the example, never on the machines."""
