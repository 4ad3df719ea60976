"""Where a run reports its values and pictures."""
