"""The same numbers in torch's operations, on any device; tensors only."""
