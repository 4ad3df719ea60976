"""What changes in code that was written for the Flax classes of Diffusers 0.39 and Transformers 4.57."""
