"""What `generate` and `convert` open, and how pictures are written."""
