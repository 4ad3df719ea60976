"""Sources of pictures and captions: folders, Parquet, the Hub, built-in digits."""
