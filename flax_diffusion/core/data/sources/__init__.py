"""Where pictures and captions come from: folders, Parquet, the Hub, built-in digits."""
