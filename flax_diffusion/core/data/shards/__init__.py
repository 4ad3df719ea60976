"""Examples in shards: what their files hold, and how they are read."""
