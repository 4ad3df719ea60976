"""What is not the same as in Diffusers 0.39 and Transformers 4.57, and why."""

KNOWN = {}
ABSENT = {}
NOT_CALLED = {}
