"""The PyTorch twin: the same tasks, configs, data order and noise on Diffusers and Accelerate."""
