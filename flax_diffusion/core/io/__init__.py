"""Files and object stores, what strangers wrote, the Hub, names of tensors."""
