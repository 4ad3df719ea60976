"""The data pipeline: sources → images → transforms → captions → noise → examples → batches."""
