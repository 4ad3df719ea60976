"""What a dataset holds, before it is trained on."""
