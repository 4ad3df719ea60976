"""What each family of models computes in JAX."""
