"""The steps of a run, and what changes from one to the next: learning rate and decays of averages."""
