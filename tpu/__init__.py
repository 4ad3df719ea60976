"""Planning and running on TPUs."""
