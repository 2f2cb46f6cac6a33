"""Dropout's masks in a Triton kernel: those of `paramlora.evaluate.dropout`, element by element.

An element is dropped by a function of the seed and of its place, so no mask is stored, and torch's
operations draw the same one: where the product of its row's and its column's number, both odd, is
below a threshold in 32 bits. A kernel finds the number of a row or of a column once, and then takes
one multiplication, one comparison and one selection an element.
"""

import triton
import triton.language as tl

# odd, so that no seed or place is lost by multiplying; those of `evaluate.dropout`
_GOLDEN, _SECOND = tl.constexpr(0x9E3779B97F4A7C15), tl.constexpr(0xD1342543DE82EF95)
_NEXT = tl.constexpr(0x632BE5AB)
_STEP, _FACTOR = tl.constexpr(0x9E3779B1), tl.constexpr(0x846CA68B)


@triton.jit
def keys(seed, which=0):
    """What numbers of rows, and of columns, of one of several masks are drawn from; `seed`: a
    pointer to it."""
    n = (tl.load(seed) + tl.cast(which, tl.int64) * _NEXT).to(tl.uint64) * _GOLDEN
    n = (n ^ (n >> 32)) * _SECOND
    n ^= n >> 32
    return n.to(tl.uint32), (n >> 32).to(tl.uint32)


@triton.jit
def numbers(places, key):
    """The odd numbers that stand for rows or for columns."""
    n = places.to(tl.uint32) * _STEP + key
    n = (n ^ (n >> 15)) * _FACTOR
    # an even number would make the low bits of all of its row's products 0
    return (n ^ (n >> 16)) | 1


@triton.jit
def below(rows, columns, threshold):
    """Where an element is dropped, of numbers that broadcast against each other."""
    # with a sign, as `evaluate.dropout` compares: torch computes little in uint32
    return (rows * columns).to(tl.int32, bitcast=True) < threshold


@triton.jit
def dropped(seed, rows, columns, threshold):
    """Which of ``[rows, columns]`` the first update does not get; `seed`: a pointer to it."""
    of_rows, of_columns = keys(seed)
    return below(numbers(rows, of_rows)[:, None], numbers(columns, of_columns)[None, :], threshold)


@triton.jit(do_not_specialize=["which", "start", "threshold"])
def mask(
    x,
    base,
    y,
    seed,
    M,
    N,
    LINES,
    channels,
    which,
    start,
    threshold,
    ADD: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``y = mask ∘ x``, or where `ADD` ``base + mask ∘ x``, a block of each in each program.

    They are ``[M, N]``, rows and columns of the mask; or where `LAST` images ``[N, LINES, M]``
    whose channels are the last in memory, ``[LINES, M, N]`` of each: the mask's columns are M, and
    its rows the lines of the `channels`, behind which others may lie that no mask matters to.
    """
    of_rows, of_columns = keys(seed, which)
    pid, blocks_m, blocks_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    line = pid // (blocks_m * blocks_n)
    offs_m = pid // blocks_n % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if LAST:
        offs_r = start + (line // LINES * channels + offs_n) * LINES + line % LINES
        rows = numbers(offs_r, of_rows)[None, :]
        columns = numbers(offs_m, of_columns)[:, None]
    else:
        rows, columns = numbers(start + offs_m, of_rows)[:, None], numbers(offs_n, of_columns)[None]
    inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    where = (line.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
    value = tl.load(x + where, mask=inside)
    value = tl.where(below(rows, columns, threshold), 0.0, value).to(value.dtype)
    if ADD:  # 16 bits in float32, and rounded once
        wide = value.to(tl.float32) if value.dtype.primitive_bitwidth == 16 else value
        value = wide + tl.load(base + where, mask=inside)
    tl.store(y + where, value, mask=inside)
