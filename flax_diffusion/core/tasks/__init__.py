"""The tasks that a run may have, one file per task."""
