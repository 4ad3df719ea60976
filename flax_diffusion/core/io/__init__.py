"""Files and object stores, untrusted input, the Hub, names of tensors, TensorBoard."""
