"""The attached model: which tensors, what is registered on them, merging, values."""
