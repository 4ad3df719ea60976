"""The PyTorch twin: the same tasks, configs, data order and noise, with Diffusers and Accelerate."""
