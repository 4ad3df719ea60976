"""What several tasks share: options, data, prompts, the training of a denoiser."""
