"""What a run pushes to the Hugging Face Hub: in a thread beside training, with a model card."""
