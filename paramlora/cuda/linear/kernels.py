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
    pid = tl.atomic_add(tickets, 1, sem="relaxed", scope="gpu")
    if pid == tl.num_programs(0) - 1:
        tl.store(tickets, 0)
    return pid


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
def _place(tile, rows, columns, GROUP_M: tl.constexpr):
    """Row and column of a tile, in groups of rows that share the weight's columns in L2."""
    first = tile // (GROUP_M * columns) * GROUP_M
    height = min(rows - first, GROUP_M)
    inside = tile % (GROUP_M * columns)
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
    x, f, p, row, M, K, P, stride_xb, stride_xm, stride_xk, r, stride_fr, stride_fk,
    CAST: tl.constexpr, EVEN: tl.constexpr, WHOLE_K: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `row` of ``p[M, R] = x[M, K] @ f[R, K].T``: one read of x. `CAST`: f is of another type,
    and has but r ranks."""
    offs_m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, R)
    acc = tl.zeros((BLOCK_M, R), tl.float32)
    where = _rows(row * BLOCK_M, tl.arange(0, BLOCK_M), P, stride_xb, stride_xm, EVEN)
    left = x + where[:, None] + offs_k[None, :].to(tl.int64) * stride_xk
    thin = f + offs_r[None, :] * stride_fr + offs_k[:, None] * stride_fk
    step = tl.cast(stride_xk, tl.int64) * BLOCK_K
    for k in range(0, K, BLOCK_K):
        if CAST:
            inside = offs_k < K - k
            tile = tl.load(left, mask=(offs_m[:, None] < M) & inside[None, :], other=0.0)
            factor = tl.load(thin, mask=inside[:, None] & (offs_r[None, :] < r), other=0.0)
            acc = tl.dot(tile, factor.to(tile.dtype), acc)
        elif WHOLE_K:
            tile = tl.load(left, mask=offs_m[:, None] < M, other=0.0)
            acc = tl.dot(tile, tl.load(thin), acc)
        else:
            inside = offs_k < K - k
            tile = tl.load(left, mask=(offs_m[:, None] < M) & inside[None, :], other=0.0)
            acc = tl.dot(tile, tl.load(thin, mask=inside[:, None], other=0.0), acc)
        left += step
        thin += BLOCK_K * stride_fk
    tl.store(
        p + offs_m[:, None].to(tl.int64) * R + offs_r[None, :],
        acc.to(p.dtype.element_ty),
        mask=offs_m[:, None] < M,
    )


@triton.jit
def _product(
    x, w, row, column, M, N, K, P, stride_xb, stride_xm, stride_xk, stride_wk, stride_wn,
    TMA: tl.constexpr, ROWS_OUT: tl.constexpr, EVEN: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of ``x[M, K] @ w[K, N]`` in float32.

    Where `TMA`, x and w are descriptors (w of ``[N, K]`` where ROWS_OUT), loaded by the tensor
    memory engine; else pointers, with any strides and a cheaper launch.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for k in range(0, K, BLOCK_K):
            left = x.load([row * BLOCK_M, k])
            if ROWS_OUT:
                acc = tl.dot(left, w.load([column * BLOCK_N, k]).T, acc)
            else:
                acc = tl.dot(left, w.load([k, column * BLOCK_N]), acc)
    else:
        offs_m, offs_n, offs_k = (
            row * BLOCK_M + tl.arange(0, BLOCK_M),
            column * BLOCK_N + tl.arange(0, BLOCK_N),
            tl.arange(0, BLOCK_K),
        )
        where = _rows(row * BLOCK_M, tl.arange(0, BLOCK_M), P, stride_xb, stride_xm, EVEN)
        left = x + where[:, None] + offs_k[None, :].to(tl.int64) * stride_xk
        step = tl.cast(stride_xk, tl.int64) * BLOCK_K
        rows = offs_m[:, None] < M
        right = (
            w
            + offs_k[:, None].to(tl.int64) * stride_wk
            + (offs_n % N)[None, :].to(tl.int64) * stride_wn
        )
        for k in range(0, K, BLOCK_K):
            if WHOLE_K:
                acc = tl.dot(tl.load(left, mask=rows, other=0.0), tl.load(right), acc)
            else:
                inside = offs_k < K - k
                tile = tl.load(left, mask=rows & inside[None, :], other=0.0)
                acc = tl.dot(tile, tl.load(right, mask=inside[:, None], other=0.0), acc)
            left += step
            right += BLOCK_K * stride_wk
    return acc


@triton.jit
def _low_rank(acc, p, q, offs_m, offs_n, M, N, R: tl.constexpr):
    """``acc + p @ q`` for one tile, from ``p[M, R]`` and ``q[R, N]`` in memory."""
    STEP: tl.constexpr = min(R, 32)
    for start in tl.static_range(0, R, STEP):
        offs_r = start + tl.arange(0, STEP)
        left = tl.load(
            p + offs_m[:, None].to(tl.int64) * R + offs_r[None, :],
            mask=offs_m[:, None] < M,
            other=0.0,
        )
        right = tl.load(
            q + offs_r[:, None] * N + offs_n[None, :], mask=offs_n[None, :] < N, other=0.0
        )
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def _tile(
    x, w, y, wide, f, q, p, bias, signals, number, packs, pid,
    M, N, K, P, stride_xb, stride_xm, stride_xk, stride_wk, stride_wn, stride_yb, stride_ym,
    stride_yn,
    PACKS: tl.constexpr, LOCAL: tl.constexpr, EARLY: tl.constexpr, BIAS: tl.constexpr,
    TMA: tl.constexpr, ROWS_OUT: tl.constexpr, EVEN: tl.constexpr, WHOLE_K: tl.constexpr,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of ``y = x @ w + p @ q + bias``, or where `LOCAL` of p.

    `signals`: of the `packs` programs that cast the factors, where `PACKS`; then of rows.
    """
    tl.assume(K > 0)  # else ptxas makes every tensor core instruction wait for the last
    columns = tl.cdiv(N, BLOCK_N) + (1 if LOCAL else 0)
    row, column = _place(pid, tl.cdiv(M, BLOCK_M), columns, GROUP_M)
    if LOCAL and column == 0:
        if PACKS:
            _await_all(signals, packs, number)
        _project(
            x=wide,
            f=f,
            p=p,
            row=row,
            M=M,
            K=K,
            P=P,
            stride_xb=stride_xb,
            stride_xm=stride_xm,
            stride_xk=stride_xk,
            r=R,
            stride_fr=K,
            stride_fk=1,
            CAST=False,
            EVEN=EVEN,
            WHOLE_K=WHOLE_K,
            R=R,
            BLOCK_M=BLOCK_M,
            BLOCK_K=BLOCK_K,
        )
        tl.debug_barrier()  # all of the program's rows are stored
        tl.atomic_xchg(signals + packs + row, number, sem="release", scope="gpu")
    else:
        column -= 1 if LOCAL else 0
        acc = _product(
            x=x,
            w=w,
            row=row,
            column=column,
            M=M,
            N=N,
            K=K,
            P=P,
            stride_xb=stride_xb,
            stride_xm=stride_xm,
            stride_xk=stride_xk,
            stride_wk=stride_wk,
            stride_wn=stride_wn,
            TMA=TMA,
            ROWS_OUT=ROWS_OUT,
            EVEN=EVEN,
            WHOLE_K=WHOLE_K,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
        )
        if LOCAL:
            _await(signals + packs + row, number)
        if EARLY:
            gdc_wait()
        offs_m, offs_n = (
            row * BLOCK_M + tl.arange(0, BLOCK_M),
            column * BLOCK_N + tl.arange(0, BLOCK_N),
        )
        acc = _low_rank(acc, p, q, offs_m, offs_n, M, N, R)
        if BIAS:
            acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        if TMA:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            lower, upper = tl.split(halves)  # one store of half the width leaves room for a stage
            y.store([row * BLOCK_M, column * BLOCK_N], lower.to(y.dtype))
            y.store([row * BLOCK_M, column * BLOCK_N + BLOCK_N // 2], upper.to(y.dtype))
        else:
            where = _rows(row * BLOCK_M, tl.arange(0, BLOCK_M), P, stride_yb, stride_ym, EVEN)
            out = y + where[:, None] + offs_n[None, :].to(tl.int64) * stride_yn
            tl.store(
                out, acc.to(y.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N)
            )


@triton.jit
def _store_gradients(
    acc, offs_d, valid, da, db, scale, strength, fan_in, r, SCALED: tl.constexpr, R: tl.constexpr
):
    """Stores rows `offs_d` of ``[da.T; db]``: ``da[r, fan_in]``, and ``db[out, r]`` times the
    scale."""
    offs_r = tl.arange(0, R)
    ranks, inner = offs_r[None, :] < r, offs_d[:, None] < fan_in
    where = da + offs_r[None, :].to(tl.int64) * fan_in + offs_d[:, None]
    tl.store(where, acc, mask=ranks & inner & valid[:, None])
    if SCALED:
        acc *= strength * tl.load(scale).to(tl.float32)
    where = db + (offs_d[:, None] - fan_in).to(tl.int64) * r + offs_r[None, :]
    tl.store(where, acc, mask=ranks & (offs_d[:, None] >= fan_in) & valid[:, None])


@triton.jit
def _gradients(
    dy, x, v, u, part, da, db, scale, strength, signals, number, counts, pid,
    M, fan_in, out, r, P, stride_dyb, stride_dym, stride_dyk, stride_xb, stride_xm, stride_xk,
    groups, each,
    LOCAL: tl.constexpr, EARLY: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr,
    R: tl.constexpr, HEIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A block of ``x.T @ v`` or ``dy.T @ u`` over one of the groups of `each` rows; the last group
    to end adds all of them in order, from ``part[groups, fan_in + out, R]``."""
    block, group = pid // groups, pid % groups
    count = counts + block
    blocks = tl.cdiv(fan_in, DEEP)
    inner = block < blocks
    # a select, not a branch, keeps what the compiler knows of the pointers' alignment
    wide, thin = tl.where(inner, x, dy), tl.where(inner, v, u)
    size, batch = tl.where(inner, fan_in, out), tl.where(inner, stride_xb, stride_dyb)
    row, step = tl.where(inner, stride_xm, stride_dym), tl.where(inner, stride_xk, stride_dyk)
    block -= tl.where(inner, 0, blocks)
    offs_d, offs_m, offs_r = (
        block * DEEP + tl.arange(0, DEEP),
        tl.arange(0, BLOCK_M),
        tl.arange(0, R),
    )
    low, high = group * each, min(M, group * each + each)
    if LOCAL:
        if inner:
            for tile in range(low // HEIGHT, tl.cdiv(high, HEIGHT)):
                _await(signals + tile, number)
    if EARLY:
        gdc_wait()
    acc = tl.zeros((DEEP, R), tl.float32)
    for m in range(low, high, BLOCK_M):
        mm = m + offs_m
        left = tl.load(
            wide
            + _rows(m, offs_m, P, batch, row, EVEN)[None, :]
            + offs_d[:, None].to(tl.int64) * step,
            mask=(mm[None, :] < M) & (offs_d[:, None] < size),
            other=0.0,
        )
        where = thin + mm[:, None].to(tl.int64) * R + offs_r[None, :]
        right = tl.load(where, mask=mm[:, None] < M, other=0.0)
        acc = tl.dot(left, right, acc)
    offs_d += tl.where(inner, 0, fan_in)
    valid = offs_d < tl.where(inner, fan_in, fan_in + out)
    if groups == 1:
        _store_gradients(
            acc=acc,
            offs_d=offs_d,
            valid=valid,
            da=da,
            db=db,
            scale=scale,
            strength=strength,
            fan_in=fan_in,
            r=r,
            SCALED=SCALED,
            R=R,
        )
    else:
        where = part + offs_d[:, None].to(tl.int64) * R + offs_r[None, :]
        whole = tl.cast(fan_in + out, tl.int64) * R
        tl.store(where + group * whole, acc, mask=valid[:, None])
        tl.debug_barrier()  # all of the program's sums are stored
        if tl.atomic_add(count, 1, sem="acq_rel", scope="gpu") == groups - 1:
            tl.store(count, 0)
            acc = tl.zeros((DEEP, R), tl.float32)
            for other in range(groups):
                acc += tl.load(where + other * whole, mask=valid[:, None], other=0.0)
            _store_gradients(
                acc=acc,
                offs_d=offs_d,
                valid=valid,
                da=da,
                db=db,
                scale=scale,
                strength=strength,
                fan_in=fan_in,
                r=r,
                SCALED=SCALED,
                R=R,
            )


@triton.jit
def _pack(
    a, b, scale, kept, strength, pid,
    M, N, K, r, stride_ar, stride_ak, stride_bn, stride_br, R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A part of the factors cast, rank first and padded with zeros; the scale goes into B's."""
    offs_r, offs_d = tl.arange(0, R), tl.arange(0, BLOCK_D)
    inner, outer = tl.cdiv(K, BLOCK_D), tl.cdiv(N, BLOCK_D)
    if pid < inner:
        offs_d += pid * BLOCK_D
        valid = (offs_r[:, None] < r) & (offs_d[None, :] < K)
        value = tl.load(
            a + offs_r[:, None] * stride_ar + offs_d[None, :] * stride_ak, mask=valid, other=0.0
        )
        where = kept + offs_r[:, None] * K + offs_d[None, :]
        tl.store(where, value.to(kept.dtype.element_ty), mask=offs_d[None, :] < K)
    elif pid < inner + outer:
        offs_d += (pid - inner) * BLOCK_D
        valid = (offs_r[:, None] < r) & (offs_d[None, :] < N)
        value = tl.load(
            b + offs_r[:, None] * stride_br + offs_d[None, :] * stride_bn, mask=valid, other=0.0
        )
        value = value.to(tl.float32) * (strength * tl.load(scale).to(tl.float32))
        where = kept + R * K + offs_r[:, None] * N + offs_d[None, :]
        tl.store(where, value.to(kept.dtype.element_ty), mask=offs_d[None, :] < N)
    else:
        counts, blocks, _ = _counts(kept, M, N, K, R)
        for start in range(0, blocks, BLOCK_D):
            tl.store(
                counts + start + offs_d,
                tl.zeros((BLOCK_D,), tl.int32),
                mask=start + offs_d < blocks,
            )


@triton.jit(do_not_specialize=["r"])
def pack(
    a, b, scale, kept, strength, M, N, K, r, stride_ar, stride_ak, stride_bn, stride_br,
    EARLY: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The factors cast, and the counts cleared, where `forward` does not."""
    if EARLY:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    _pack(
        a=a,
        b=b,
        scale=scale,
        kept=kept,
        strength=strength,
        pid=pid,
        M=M,
        N=N,
        K=K,
        r=r,
        stride_ar=stride_ar,
        stride_ak=stride_ak,
        stride_bn=stride_bn,
        stride_br=stride_br,
        R=R,
        BLOCK_D=BLOCK_D,
    )


@triton.jit
def project(
    x, f, p, M, K, P, stride_xb, stride_xm, stride_xk,
    EARLY: tl.constexpr, EVEN: tl.constexpr, WHOLE_K: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``p[M, R] = x[M, K] @ f[R, K].T``."""
    if EARLY:  # what reads x or the factors may start only after those who wrote them
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    _project(
        x=x,
        f=f,
        p=p,
        row=row,
        M=M,
        K=K,
        P=P,
        stride_xb=stride_xb,
        stride_xm=stride_xm,
        stride_xk=stride_xk,
        r=R,
        stride_fr=K,
        stride_fk=1,
        CAST=False,
        EVEN=EVEN,
        WHOLE_K=WHOLE_K,
        R=R,
        BLOCK_M=BLOCK_M,
        BLOCK_K=BLOCK_K,
    )


@triton.jit(do_not_specialize=["r"])
def prepare(
    x, a, b, scale, kept, strength,
    M, N, K, P, stride_xb, stride_xm, stride_xk, r, stride_ar, stride_ak, stride_bn, stride_br,
    EARLY: tl.constexpr, EVEN: tl.constexpr, WHOLE_K: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What `pack` and `project` compute, in one grid: the factors are small enough to be cast by
    every program that reads them."""
    if EARLY:
        gdc_launch_dependents()
    pid, rows = tl.program_id(0), tl.cdiv(M, BLOCK_M)
    if pid < rows:
        _project(
            x=x,
            f=a,
            p=_after(kept, K + N, R),
            row=pid,
            M=M,
            K=K,
            P=P,
            stride_xb=stride_xb,
            stride_xm=stride_xm,
            stride_xk=stride_xk,
            r=r,
            stride_fr=stride_ar,
            stride_fk=stride_ak,
            CAST=True,
            EVEN=EVEN,
            WHOLE_K=WHOLE_K,
            R=R,
            BLOCK_M=BLOCK_M,
            BLOCK_K=BLOCK_K,
        )
    else:
        pid -= rows
        _pack(
            a=a,
            b=b,
            scale=scale,
            kept=kept,
            strength=strength,
            pid=pid,
            M=M,
            N=N,
            K=K,
            r=r,
            stride_ar=stride_ar,
            stride_ak=stride_ak,
            stride_bn=stride_bn,
            stride_br=stride_br,
            R=R,
            BLOCK_D=BLOCK_D,
        )


@triton.jit
def product(
    x, w, y, q, p, bias,
    M, N, K, P, stride_xb, stride_xm, stride_xk, stride_wk, stride_wn, stride_yb, stride_ym,
    stride_yn,
    EARLY: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr, ROWS_OUT: tl.constexpr,
    EVEN: tl.constexpr, WHOLE_K: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``y = x @ w + p @ q + bias``."""
    _tile(
        x=x,
        w=w,
        y=y,
        wide=x,
        f=q,
        q=q,
        p=p,
        bias=bias,
        signals=p,
        number=0,
        packs=0,
        pid=tl.program_id(0),
        M=M,
        N=N,
        K=K,
        P=P,
        stride_xb=stride_xb,
        stride_xm=stride_xm,
        stride_xk=stride_xk,
        stride_wk=stride_wk,
        stride_wn=stride_wn,
        stride_yb=stride_yb,
        stride_ym=stride_ym,
        stride_yn=stride_yn,
        PACKS=False,
        LOCAL=False,
        EARLY=EARLY,
        BIAS=BIAS,
        TMA=TMA,
        ROWS_OUT=ROWS_OUT,
        EVEN=EVEN,
        WHOLE_K=WHOLE_K,
        R=R,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        GROUP_M=GROUP_M,
    )


@triton.jit(do_not_specialize=["number", "packs", "r"])
def forward(
    x, w, y, wide, a, b, scale, kept, bias, tickets, strength, number,
    packs, M, N, K, P, stride_xb, stride_xm, stride_xk, stride_wk, stride_wn, stride_yb, stride_ym,
    stride_yn,
    r, stride_ar, stride_ak, stride_bn, stride_br,
    BIAS: tl.constexpr, TMA: tl.constexpr, ROWS_OUT: tl.constexpr, EVEN: tl.constexpr,
    WHOLE_K: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``y = x @ w + u @ q + bias`` and all of `kept`; `wide` is x again, always as a pointer."""
    pid = _drawn(tickets)
    _, _, signals = _counts(kept, M, N, K, R)
    if pid < packs:
        _pack(
            a=a,
            b=b,
            scale=scale,
            kept=kept,
            strength=strength,
            pid=pid,
            M=M,
            N=N,
            K=K,
            r=r,
            stride_ar=stride_ar,
            stride_ak=stride_ak,
            stride_bn=stride_bn,
            stride_br=stride_br,
            R=R,
            BLOCK_D=BLOCK_D,
        )
        tl.debug_barrier()  # all of the program's part is stored
        tl.atomic_xchg(signals + pid, number, sem="release", scope="gpu")
    else:
        _tile(
            x=x,
            w=w,
            y=y,
            wide=wide,
            f=kept,
            q=kept + R * K,
            p=_after(kept, K + N, R),
            bias=bias,
            signals=signals,
            number=number,
            packs=packs,
            pid=pid - packs,
            M=M,
            N=N,
            K=K,
            P=P,
            stride_xb=stride_xb,
            stride_xm=stride_xm,
            stride_xk=stride_xk,
            stride_wk=stride_wk,
            stride_wn=stride_wn,
            stride_yb=stride_yb,
            stride_ym=stride_ym,
            stride_yn=stride_yn,
            PACKS=True,
            LOCAL=True,
            EARLY=False,
            BIAS=BIAS,
            TMA=TMA,
            ROWS_OUT=ROWS_OUT,
            EVEN=EVEN,
            WHOLE_K=WHOLE_K,
            R=R,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            GROUP_M=GROUP_M,
        )


@triton.jit(do_not_specialize=["number", "tiles", "r", "groups", "each"])
def backward(
    dy, w, dx, wide, kept, scratch, x, da, db, scale, tickets, strength, number,
    tiles, M, N, K, P, stride_dyb, stride_dym, stride_dyk, stride_wk, stride_wn, stride_dxb,
    stride_dxm, stride_dxn,
    stride_xb, stride_xm, stride_xk, r, groups, each,
    LOCAL: tl.constexpr, EARLY: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr,
    ROWS_OUT: tl.constexpr, EVEN: tl.constexpr, WHOLE_K: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
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
    pid = _drawn(tickets) if LOCAL else tl.program_id(0)
    if pid < tiles:
        _tile(
            x=dy,
            w=w,
            y=dx,
            wide=wide,
            f=kept + R * N,
            q=kept,
            p=scratch,
            bias=kept,
            signals=signals,
            number=number,
            packs=0,
            pid=pid,
            M=M,
            N=N,
            K=K,
            P=P,
            stride_xb=stride_dyb,
            stride_xm=stride_dym,
            stride_xk=stride_dyk,
            stride_wk=stride_wk,
            stride_wn=stride_wn,
            stride_yb=stride_dxb,
            stride_ym=stride_dxm,
            stride_yn=stride_dxn,
            PACKS=False,
            LOCAL=LOCAL,
            EARLY=EARLY,
            BIAS=False,
            TMA=TMA,
            ROWS_OUT=ROWS_OUT,
            EVEN=EVEN,
            WHOLE_K=WHOLE_K,
            R=R,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            GROUP_M=GROUP_M,
        )
    else:
        _gradients(
            dy=wide,
            x=x,
            v=scratch,
            u=_after(kept, N + K, R),
            part=part,
            da=da,
            db=db,
            scale=scale,
            strength=strength,
            signals=signals,
            number=number,
            counts=counts,
            pid=pid - tiles,
            M=M,
            fan_in=N,
            out=K,
            r=r,
            P=P,
            stride_dyb=stride_dyb,
            stride_dym=stride_dym,
            stride_dyk=stride_dyk,
            stride_xb=stride_xb,
            stride_xm=stride_xm,
            stride_xk=stride_xk,
            groups=groups,
            each=each,
            LOCAL=LOCAL,
            EARLY=EARLY,
            SCALED=SCALED,
            EVEN=EVEN,
            R=R,
            HEIGHT=BLOCK_M,
            BLOCK_M=BLOCK_ROWS,
        )
