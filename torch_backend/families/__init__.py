"""What each family of models computes in PyTorch."""
