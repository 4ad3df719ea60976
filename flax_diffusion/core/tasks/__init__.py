"""What a run is for: one file a task, and the command line that chooses among them."""
