"""What a run says while it works: whole lines, one bar in a terminal, plain lines in a file."""
