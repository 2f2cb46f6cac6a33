"""Triton kernels for 16-bit CUDA: both products in one float32 accumulator, rounded once.

A frozen product that is rounded before the low-rank one is added loses about half of an update of
relative size 1e-3. cuBLAS rounds in between even in ``addmm`` (measured on an H200), so the large
product is computed here, in the accumulator that also takes the low-rank one. Partial sums are
added in a fixed order: every result is deterministic.

`forward` and `backward` divide one grid among several kinds of work, so that what waits for memory
runs beside what waits for arithmetic, and so that a layer takes one launch each way:

1. in `forward`, programs that cast the factors, once, for all others to read;
2. where `LOCAL`, the first column of tiles computes ``p``, the thin product that all others of
   the same rows await before their last step. A program's work is the ticket that it draws when it
   starts, not its index, and all that is awaited has a lower ticket: it runs already, in whatever
   order a device starts programs. Else `pack` and `project`, or `prepare` alone, prepare both, and
   the tiles start before they end (Hopper's programmatic dependent launch);
3. the tiles of ``x @ w + p @ q``;
4. in `backward`, blocks of the factors' gradients, which fill the last wave of tiles.

Programs signal each other by a 64-bit number that no other launch of the process uses, so the
memory of the signals needs no clearing.

Sizes are named as in a matrix product, ``M`` rows (tokens), ``N`` columns, ``K`` summed, and ``R``
is the padded rank. Row m of a wide matrix lies ``m // P`` batches and ``m % P`` rows from its
start, so that the positions of an image are rows without a copy, whatever its memory format.
`kept` goes from a forward to its backwards: ``A[R, in]``, ``scale · B.T[R, out]``, ``u[M, R]``,
the count of each block of gradients, and the forward's signals. `tiles` chooses the
tiles.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paramlora.cuda import operands

SPAN, DEEP = tl.constexpr(operands.SPAN), tl.constexpr(operands.DEEP)


@triton.jit
def _drawn(tickets):
    """How many programs of this grid have started before this one: the work that it takes. The last
    clears the count, for the next grid of the stream."""
    program = tl.atomic_add(tickets, 1, sem="relaxed", scope="gpu")
    if program == tl.num_programs(0) - 1:
        tl.store(tickets, 0)
    return program


@triton.jit
def _await(signal, number):
    while tl.atomic_add(signal, 0, sem="acquire", scope="gpu") != number:
        pass


@triton.jit
def _await_all(signals, size, number):
    for start in range(0, size, 128):
        which = start + tl.arange(0, 128)
        none = tl.zeros((128,), tl.int64)
        missing = 1
        while missing > 0:
            seen = tl.atomic_add(signals + which, none, which < size, sem="acquire", scope="gpu")
            missing = tl.sum(((which < size) & (seen != number)).to(tl.int32))
    tl.debug_barrier()  # each thread has seen but its own


@triton.jit
def _after(matrix, rows, R: tl.constexpr):
    """The address that follows ``matrix[rows, R]``."""
    return matrix + tl.cast(rows, tl.int64) * R


@triton.jit
def _counts(kept, M, N, K, R: tl.constexpr):
    """The blocks' counts, and the signals behind them."""
    counts = _after(kept, K + N + M, R).to(tl.pointer_type(tl.int32), bitcast=True)
    blocks = tl.cdiv(K, DEEP) + tl.cdiv(N, DEEP)
    signals = counts + (blocks + blocks % 2)
    return counts, blocks, signals.to(tl.pointer_type(tl.int64), bitcast=True)


@triton.jit
def _place(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile, in groups of rows that share the weight's columns in L2."""
    first = tile // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    inside = tile % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def _rows(start, inside, P, batch, row, EVEN: tl.constexpr):
    """Where rows ``start + inside`` lie, in 64 bits; where `EVEN`, all of them in one batch."""
    if EVEN:
        within = tl.multiple_of(start % P, 16)  # as blocks and batches are
        first = (start // P).to(tl.int64) * batch + within.to(tl.int64) * row
        return first + inside.to(tl.int64) * row
    rows = start + inside
    return (rows // P).to(tl.int64) * batch + (rows % P).to(tl.int64) * row


@triton.jit
def _project(
    x, f, p, row, M, K, P, x_batch, x_row, x_k, r, f_rank, f_k,
    CAST: tl.constexpr, EVEN: tl.constexpr, WHOLE_K: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows `row` of ``p[M, R] = x[M, K] @ f[R, K].T``: one read of x. `CAST`: f is of another type,
    and has but r ranks."""
    rm = row * BM + tl.arange(0, BM)
    rk, rr = tl.arange(0, BK), tl.arange(0, R)
    acc = tl.zeros((BM, R), tl.float32)
    where = _rows(row * BM, tl.arange(0, BM), P, x_batch, x_row, EVEN)
    left = x + where[:, None] + rk[None, :].to(tl.int64) * x_k
    thin = f + rr[None, :] * f_rank + rk[:, None] * f_k
    step = tl.cast(x_k, tl.int64) * BK
    for k in range(0, K, BK):
        if CAST:
            inside = rk < K - k
            tile = tl.load(left, mask=(rm[:, None] < M) & inside[None, :], other=0.0)
            factor = tl.load(thin, mask=inside[:, None] & (rr[None, :] < r), other=0.0)
            acc = tl.dot(tile, factor.to(tile.dtype), acc)
        elif WHOLE_K:
            tile = tl.load(left, mask=rm[:, None] < M, other=0.0)
            acc = tl.dot(tile, tl.load(thin), acc)
        else:
            inside = rk < K - k
            tile = tl.load(left, mask=(rm[:, None] < M) & inside[None, :], other=0.0)
            acc = tl.dot(tile, tl.load(thin, mask=inside[:, None], other=0.0), acc)
        left += step
        thin += BK * f_k
    tl.store(
        p + rm[:, None].to(tl.int64) * R + rr[None, :],
        acc.to(p.dtype.element_ty),
        mask=rm[:, None] < M,
    )


@triton.jit
def _product(
    x, w, row, column, M, N, K, P, x_batch, x_row, x_k, w_k, w_n,
    TMA: tl.constexpr, ROWS_OUT: tl.constexpr, EVEN: tl.constexpr, WHOLE_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of ``x[M, K] @ w[K, N]`` in float32.

    Where `TMA`, x and w are descriptors (w of ``[N, K]`` where ROWS_OUT), loaded by the tensor
    memory engine; else pointers, with any strides and a cheaper launch.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k in range(0, K, BK):
            left = x.load([row * BM, k])
            if ROWS_OUT:
                acc = tl.dot(left, w.load([column * BN, k]).T, acc)
            else:
                acc = tl.dot(left, w.load([k, column * BN]), acc)
    else:
        rm, rn, rk = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
        where = _rows(row * BM, tl.arange(0, BM), P, x_batch, x_row, EVEN)
        left = x + where[:, None] + rk[None, :].to(tl.int64) * x_k
        step = tl.cast(x_k, tl.int64) * BK
        rows = rm[:, None] < M
        right = w + rk[:, None].to(tl.int64) * w_k + (rn % N)[None, :].to(tl.int64) * w_n
        for k in range(0, K, BK):
            if WHOLE_K:
                acc = tl.dot(tl.load(left, mask=rows, other=0.0), tl.load(right), acc)
            else:
                inside = rk < K - k
                tile = tl.load(left, mask=rows & inside[None, :], other=0.0)
                acc = tl.dot(tile, tl.load(right, mask=inside[:, None], other=0.0), acc)
            left += step
            right += BK * w_k
    return acc


@triton.jit
def _low_rank(acc, p, q, rm, rn, M, N, R: tl.constexpr):
    """``acc + p @ q`` for one tile, from ``p[M, R]`` and ``q[R, N]`` in memory."""
    STEP: tl.constexpr = min(R, 32)
    for start in tl.static_range(0, R, STEP):
        rr = start + tl.arange(0, STEP)
        left = tl.load(
            p + rm[:, None].to(tl.int64) * R + rr[None, :], mask=rm[:, None] < M, other=0.0
        )
        right = tl.load(q + rr[:, None] * N + rn[None, :], mask=rn[None, :] < N, other=0.0)
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def _tile(
    x, w, y, wide, f, q, p, bias, signals, number, packs, program,
    M, N, K, P, x_batch, x_row, x_k, w_k, w_n, y_batch, y_row, y_n,
    PACKS: tl.constexpr, LOCAL: tl.constexpr, EARLY: tl.constexpr, BIAS: tl.constexpr,
    TMA: tl.constexpr, ROWS_OUT: tl.constexpr, EVEN: tl.constexpr, WHOLE_K: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of ``y = x @ w + p @ q + bias``, or where `LOCAL` of p.

    `signals`: of the `packs` programs that cast the factors, where `PACKS`; then of rows.
    """
    tl.assume(K > 0)  # else ptxas makes every tensor core instruction wait for the last
    columns = tl.cdiv(N, BN) + (1 if LOCAL else 0)
    row, column = _place(program, tl.cdiv(M, BM), columns, GROUP)
    if LOCAL and column == 0:
        if PACKS:
            _await_all(signals, packs, number)
        _project(
            wide, f, p, row, M, K, P, x_batch, x_row, x_k, R, K, 1, False, EVEN, WHOLE_K, R, BM, BK
        )
        tl.debug_barrier()  # all of the program's rows are stored
        tl.atomic_xchg(signals + packs + row, number, sem="release", scope="gpu")
    else:
        column -= 1 if LOCAL else 0
        acc = _product(
            x, w, row, column, M, N, K, P, x_batch, x_row, x_k, w_k, w_n,
            TMA, ROWS_OUT, EVEN, WHOLE_K, BM, BN, BK,
        )  # fmt: skip
        if LOCAL:
            _await(signals + packs + row, number)
        if EARLY:
            gdc_wait()
        rm, rn = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
        acc = _low_rank(acc, p, q, rm, rn, M, N, R)
        if BIAS:
            acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
        if TMA:
            halves = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
            lower, upper = tl.split(halves)  # one store of half the width leaves room for a stage
            y.store([row * BM, column * BN], lower.to(y.dtype))
            y.store([row * BM, column * BN + BN // 2], upper.to(y.dtype))
        else:
            where = _rows(row * BM, tl.arange(0, BM), P, y_batch, y_row, EVEN)
            out = y + where[:, None] + rn[None, :].to(tl.int64) * y_n
            tl.store(out, acc.to(y.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def _store_gradients(
    acc, rd, valid, da, db, scale, strength, fan_in, r, SCALED: tl.constexpr, R: tl.constexpr
):
    """Stores rows `rd` of ``[da.T; db]``: ``da[r, fan_in]``, and ``db[out, r]`` times the scale."""
    rr = tl.arange(0, R)
    ranks, inner = rr[None, :] < r, rd[:, None] < fan_in
    where = da + rr[None, :].to(tl.int64) * fan_in + rd[:, None]
    tl.store(where, acc, mask=ranks & inner & valid[:, None])
    if SCALED:
        acc *= strength * tl.load(scale).to(tl.float32)
    where = db + (rd[:, None] - fan_in).to(tl.int64) * r + rr[None, :]
    tl.store(where, acc, mask=ranks & (rd[:, None] >= fan_in) & valid[:, None])


@triton.jit
def _gradients(
    dy, x, v, u, part, da, db, scale, strength, signals, number, counts, program,
    M, fan_in, out, r, P, dy_batch, dy_row, dy_k, x_batch, x_row, x_k, groups, each,
    LOCAL: tl.constexpr, EARLY: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr,
    R: tl.constexpr, HEIGHT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """A block of ``x.T @ v`` or ``dy.T @ u`` over one of the groups of `each` rows; the last group
    to end adds all of them in order, from ``part[groups, fan_in + out, R]``."""
    block, group = program // groups, program % groups
    count = counts + block
    blocks = tl.cdiv(fan_in, DEEP)
    inner = block < blocks
    # a select, not a branch, keeps what the compiler knows of the pointers' alignment
    wide, thin = tl.where(inner, x, dy), tl.where(inner, v, u)
    size, batch = tl.where(inner, fan_in, out), tl.where(inner, x_batch, dy_batch)
    row, step = tl.where(inner, x_row, dy_row), tl.where(inner, x_k, dy_k)
    block -= tl.where(inner, 0, blocks)
    rd, rm, rr = block * DEEP + tl.arange(0, DEEP), tl.arange(0, BM), tl.arange(0, R)
    low, high = group * each, min(M, group * each + each)
    if LOCAL:
        if inner:
            for tile in range(low // HEIGHT, tl.cdiv(high, HEIGHT)):
                _await(signals + tile, number)
    if EARLY:
        gdc_wait()
    acc = tl.zeros((DEEP, R), tl.float32)
    for m in range(low, high, BM):
        mm = m + rm
        left = tl.load(
            wide + _rows(m, rm, P, batch, row, EVEN)[None, :] + rd[:, None].to(tl.int64) * step,
            mask=(mm[None, :] < M) & (rd[:, None] < size),
            other=0.0,
        )
        where = thin + mm[:, None].to(tl.int64) * R + rr[None, :]
        right = tl.load(where, mask=mm[:, None] < M, other=0.0)
        acc = tl.dot(left, right, acc)
    rd += tl.where(inner, 0, fan_in)
    valid = rd < tl.where(inner, fan_in, fan_in + out)
    if groups == 1:
        _store_gradients(acc, rd, valid, da, db, scale, strength, fan_in, r, SCALED, R)
    else:
        where = part + rd[:, None].to(tl.int64) * R + rr[None, :]
        whole = tl.cast(fan_in + out, tl.int64) * R
        tl.store(where + group * whole, acc, mask=valid[:, None])
        tl.debug_barrier()  # all of the program's sums are stored
        if tl.atomic_add(count, 1, sem="acq_rel", scope="gpu") == groups - 1:
            tl.store(count, 0)
            acc = tl.zeros((DEEP, R), tl.float32)
            for other in range(groups):
                acc += tl.load(where + other * whole, mask=valid[:, None], other=0.0)
            _store_gradients(acc, rd, valid, da, db, scale, strength, fan_in, r, SCALED, R)


@triton.jit
def _pack(
    a, b, scale, kept, strength, program,
    M, N, K, r, a_rank, a_in, b_dim, b_rank, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A part of the factors cast, rank first and padded with zeros; the scale goes into B's."""
    rr, rd = tl.arange(0, R), tl.arange(0, BD)
    inner, outer = tl.cdiv(K, BD), tl.cdiv(N, BD)
    if program < inner:
        rd += program * BD
        valid = (rr[:, None] < r) & (rd[None, :] < K)
        value = tl.load(a + rr[:, None] * a_rank + rd[None, :] * a_in, mask=valid, other=0.0)
        where = kept + rr[:, None] * K + rd[None, :]
        tl.store(where, value.to(kept.dtype.element_ty), mask=rd[None, :] < K)
    elif program < inner + outer:
        rd += (program - inner) * BD
        valid = (rr[:, None] < r) & (rd[None, :] < N)
        value = tl.load(b + rr[:, None] * b_rank + rd[None, :] * b_dim, mask=valid, other=0.0)
        value = value.to(tl.float32) * (strength * tl.load(scale).to(tl.float32))
        where = kept + R * K + rr[:, None] * N + rd[None, :]
        tl.store(where, value.to(kept.dtype.element_ty), mask=rd[None, :] < N)
    else:
        counts, blocks, _ = _counts(kept, M, N, K, R)
        for start in range(0, blocks, BD):
            tl.store(counts + start + rd, tl.zeros((BD,), tl.int32), mask=start + rd < blocks)


@triton.jit(do_not_specialize=["r"])
def pack(
    a, b, scale, kept, strength, M, N, K, r, a_rank, a_in, b_dim, b_rank,
    EARLY: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The factors cast, and the counts cleared, where `forward` does not."""
    if EARLY:
        gdc_launch_dependents()
    program = tl.program_id(0)
    _pack(a, b, scale, kept, strength, program, M, N, K, r, a_rank, a_in, b_dim, b_rank, R, BD)


@triton.jit
def project(
    x, f, p, M, K, P, x_batch, x_row, x_k,
    EARLY: tl.constexpr, EVEN: tl.constexpr, WHOLE_K: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``p[M, R] = x[M, K] @ f[R, K].T``."""
    if EARLY:  # what reads x or the factors may start only after those who wrote them
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    _project(x, f, p, row, M, K, P, x_batch, x_row, x_k, R, K, 1, False, EVEN, WHOLE_K, R, BM, BK)


@triton.jit(do_not_specialize=["r"])
def prepare(
    x, a, b, scale, kept, strength,
    M, N, K, P, x_batch, x_row, x_k, r, a_rank, a_in, b_dim, b_rank,
    EARLY: tl.constexpr, EVEN: tl.constexpr, WHOLE_K: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What `pack` and `project` compute, in one grid: the factors are small enough to be cast by
    every program that reads them."""
    if EARLY:
        gdc_launch_dependents()
    program, rows = tl.program_id(0), tl.cdiv(M, BM)
    if program < rows:
        _project(
            x, a, _after(kept, K + N, R), program, M, K, P, x_batch, x_row, x_k, r, a_rank, a_in,
            True, EVEN, WHOLE_K, R, BM, BK,
        )  # fmt: skip
    else:
        program -= rows
        _pack(a, b, scale, kept, strength, program, M, N, K, r, a_rank, a_in, b_dim, b_rank, R, BD)


@triton.jit
def product(
    x, w, y, q, p, bias,
    M, N, K, P, x_batch, x_row, x_k, w_k, w_n, y_batch, y_row, y_n,
    EARLY: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr, ROWS_OUT: tl.constexpr,
    EVEN: tl.constexpr, WHOLE_K: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``y = x @ w + p @ q + bias``."""
    _tile(  # without a thin product of its own: what that would need is filled in
        x, w, y, x, q, q, p, bias, p, 0, 0, tl.program_id(0),
        M, N, K, P, x_batch, x_row, x_k, w_k, w_n, y_batch, y_row, y_n,
        False, False, EARLY, BIAS, TMA, ROWS_OUT, EVEN, WHOLE_K, R, BM, BN, BK, GROUP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["number", "packs", "r"])
def forward(
    x, w, y, wide, a, b, scale, kept, bias, tickets, strength, number,
    packs, M, N, K, P, x_batch, x_row, x_k, w_k, w_n, y_batch, y_row, y_n,
    r, a_rank, a_in, b_dim, b_rank,
    BIAS: tl.constexpr, TMA: tl.constexpr, ROWS_OUT: tl.constexpr, EVEN: tl.constexpr,
    WHOLE_K: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``y = x @ w + u @ q + bias`` and all of `kept`; `wide` is x again, always as a pointer."""
    program = _drawn(tickets)
    _, _, signals = _counts(kept, M, N, K, R)
    if program < packs:
        _pack(a, b, scale, kept, strength, program, M, N, K, r, a_rank, a_in, b_dim, b_rank, R, BD)
        tl.debug_barrier()  # all of the program's part is stored
        tl.atomic_xchg(signals + program, number, sem="release", scope="gpu")
    else:
        _tile(
            x, w, y, wide, kept, kept + R * K, _after(kept, K + N, R), bias, signals, number,
            packs, program - packs,
            M, N, K, P, x_batch, x_row, x_k, w_k, w_n, y_batch, y_row, y_n,
            True, True, False, BIAS, TMA, ROWS_OUT, EVEN, WHOLE_K, R, BM, BN, BK, GROUP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["number", "tiles", "r", "groups", "each"])
def backward(
    dy, w, dx, wide, kept, scratch, x, da, db, scale, tickets, strength, number,
    tiles, M, N, K, P, dy_batch, dy_row, dy_k, w_k, w_n, dx_batch, dx_row, dx_n,
    x_batch, x_row, x_k, r, groups, each,
    LOCAL: tl.constexpr, EARLY: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr,
    ROWS_OUT: tl.constexpr, EVEN: tl.constexpr, WHOLE_K: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, GM: tl.constexpr,
):  # fmt: skip
    """The gradients of the input, in `tiles` programs that may be none, and of the factors. Of
    ``dx = dy @ w`` K are the layer's outputs and N its inputs.

    `scratch` holds ``v[M, R]``, the signals, and the groups' sums.
    """
    counts, _, _ = _counts(kept, M, N, K, R)
    signals = _after(scratch, M, R).to(tl.pointer_type(tl.int64), bitcast=True)
    rows = tl.cdiv(M, SPAN)
    part = (signals + (rows + rows % 2)).to(tl.pointer_type(tl.float32), bitcast=True)
    part = tl.multiple_of(part, 16)  # bytes, as the signals' size is
    program = _drawn(tickets) if LOCAL else tl.program_id(0)
    if program < tiles:
        _tile(
            dy, w, dx, wide, kept + R * N, kept, scratch, kept, signals, number, 0, program,
            M, N, K, P, dy_batch, dy_row, dy_k, w_k, w_n, dx_batch, dx_row, dx_n,
            False, LOCAL, EARLY, False, TMA, ROWS_OUT, EVEN, WHOLE_K, R, BM, BN, BK, GROUP,
        )  # fmt: skip
    else:
        _gradients(
            wide, x, scratch, _after(kept, N + K, R), part, da, db, scale, strength,
            signals, number, counts, program - tiles,
            M, N, K, r, P, dy_batch, dy_row, dy_k, x_batch, x_row, x_k, groups, each,
            LOCAL, EARLY, SCALED, EVEN, R, BM, GM,
        )  # fmt: skip
