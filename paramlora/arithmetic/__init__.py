"""Arithmetic on adapters as values: sums, other ranks, differences of checkpoints. No file."""

from paramlora.arithmetic.combine import HOWS, combine
from paramlora.arithmetic.difference import between
from paramlora.arithmetic.products import Approximation
from paramlora.arithmetic.resize import resize

__all__ = ["HOWS", "Approximation", "between", "combine", "resize"]
