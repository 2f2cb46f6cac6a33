"""Benchmarks of paramlora against the other ways to compute the same layer."""
