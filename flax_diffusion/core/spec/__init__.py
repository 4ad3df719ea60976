"""What is trained, as plain data: components, adapters, weight files, pipeline folders."""
