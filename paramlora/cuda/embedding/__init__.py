"""Look-ups of an embedding."""
