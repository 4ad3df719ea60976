"""Options: those that tasks share. A run's are filled from YAML and the command line."""
