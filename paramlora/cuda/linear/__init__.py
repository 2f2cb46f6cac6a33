"""Products with a matrix."""
