"""What both backends share: config, data, loop, tracking, checkpoint rules. Knows neither jax nor torch."""
