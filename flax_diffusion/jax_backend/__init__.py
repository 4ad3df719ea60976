"""The JAX side: the sharded, jitted step, sampling, and the state on devices."""
