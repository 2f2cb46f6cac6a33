"""Dropout's masks in a Triton kernel: those of `paramlora.evaluate.dropout`, element by element.

An element is dropped by a function of the seed and of its place, so no mask is stored, and torch's
operations draw the same one.
"""

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_FIRST, _SECOND = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64), tl.constexpr(0x94D049BB133111EB - 2**64)
_LAST = tl.constexpr(0x846CA68B - 2**32)


def threshold(rate: float) -> int:
    """The number below which an element's own number has it dropped; of all by the same rate."""
    return round(rate * 2**32) - 2**31


@triton.jit
def _mixed(n):
    """SplitMix64 (Steele et al. 2014) of 64-bit numbers."""
    n = (n ^ ((n >> 30) & 0x3FFFFFFFF)) * _FIRST
    n = (n ^ ((n >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return n ^ ((n >> 31) & 0x1FFFFFFFF)


@triton.jit
def dropped(seed, rows, columns, threshold):
    """Which of ``[rows, columns]`` the first update does not get; `seed`: a pointer to it."""
    own = _mixed(tl.load(seed).to(tl.int64))
    row = _mixed(rows.to(tl.int64) * _GOLDEN + own).to(tl.int32)
    column = _mixed(columns.to(tl.int64) * _GOLDEN + _mixed(own)).to(tl.int32)
    h = row[:, None] ^ column[None, :]
    h ^= (h >> 16) & 0xFFFF
    h *= 0x7FEB352D
    h ^= (h >> 15) & 0x1FFFF
    h *= _LAST
    return h < threshold
