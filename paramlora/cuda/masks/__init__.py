"""Masks of dropout, drawn inside of the kernels."""
