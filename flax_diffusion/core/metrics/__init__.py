"""What pictures are worth: statistics of their features, and distances to those of real ones. It knows no framework."""
