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
   order a device starts programs. Else `pack` and `project` prepare both, and the tiles start
   before they end (Hopper's programmatic dependent launch);
3. the tiles of ``x @ w + p @ q``;
4. in `backward`, blocks of the factors' gradients, which fill the last wave of tiles.

Programs signal each other by a 64-bit number that no other launch of the process uses, so the
memory of the signals needs no clearing.

Sizes are named as in a matrix product, ``M`` rows (tokens), ``N`` columns, ``K`` summed, and ``R``
is the padded rank. Row m of a wide matrix lies ``m // P`` batches and ``m % P`` rows from its
start, so that the positions of an image are rows without a copy, whatever its memory format.
`kept` goes from a forward to its backwards: ``A[R, in]``, ``scale · B.T[R, out]``, ``u[M, R]``,
of a mask the numbers of its columns and rows, the count of each block of gradients, and the
forward's signals. `tiles` chooses the tiles.

Where an update drops inputs, its mask is drawn where x is read, in ``u = (mask ∘ x) @ A.T`` and in
``v.T @ (mask ∘ x)``, and where the low-rank term of x's gradient is added, ``mask ∘ (v @ A)``.
Several masks have an equal share of the ranks each.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paramlora.cuda import operands
from paramlora.cuda.masks.kernels import below, keys, numbers

# a kernel may read a global only if it is a constexpr
SPAN, DEEP = tl.constexpr(operands.SPAN), tl.constexpr(operands.DEEP)


class Matrix(NamedTuple):
    """A wide matrix: its start, a pointer or a descriptor for the tensor memory engine, and the
    distances of a batch, a row and a column."""

    ptr: Any
    stride_batch: Any
    stride_row: Any
    stride_col: Any


class Sizes(NamedTuple):
    """The sizes of a product, and the rows `P` of a batch."""

    M: Any
    N: Any
    K: Any
    P: Any


class Signals(NamedTuple):
    """The signals of the `packs` programs that cast the factors, then those of rows of tiles."""

    ptr: Any
    number: Any
    packs: Any


class Drop(NamedTuple):
    """`ON` masks, each of an equal share of the ranks: pointers to their seed, which only a forward
    needs, and to the numbers of the columns and rows of the first in `kept`; and below which number
    one drops an element, or of several `thresholds`, which are known when a kernel is compiled."""

    seed: Any
    columns: Any
    rows: Any
    threshold: Any
    ON: Any
    thresholds: Any


class Rescale(NamedTuple):
    """By what outputs are multiplied, if `ON`: ``m / norm`` of each column; and where the product
    itself goes, laid out as y, if it `KEEPS` that."""

    z: Any
    m: Any
    norm: Any
    ON: Any
    KEEPS: Any


class Meta(NamedTuple):
    """What a kernel is compiled for, see `tiles.Tiles`. Always made inside of the call that it is
    handed to: of one that first gets a name in a kernel, Triton takes the fields for values that
    only the device knows, not for constants."""

    TMA: Any
    ROWS_OUT: Any
    EVEN_P: Any
    EVEN_K: Any
    R: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_K: Any
    GROUP_M: Any


@triton.jit
def _drawn(tickets):
    """How many programs of this grid have started before this one: the work that it takes. The last
    clears the count, for the next grid of the stream."""
    # relaxed: a ticket orders nothing in memory, the signals do
    pid = tl.atomic_add(tickets, 1, sem="relaxed", scope="gpu")
    if pid == tl.num_programs(0) - 1:
        tl.store(tickets, 0)
    return pid


@triton.jit
def _await(signal, number):
    # adds 0: tl.load has no acquire, so what it reads next might be older than the signal
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
def _numbers(kept, M, N, K, fan_in, R: tl.constexpr):
    """Where in `kept` the numbers of a mask's columns lie, which `_pack` writes, and those of its
    rows, which `_project` writes: found anew in each step of a loop, they would take as long as the
    mask itself. Those of each of several masks follow the last one's."""
    # kept is of 16 bits; R is a multiple of 16, so wider numbers behind its rows are aligned
    columns = _after(kept, K + N + M, R).to(tl.pointer_type(tl.uint32), bitcast=True)
    return columns, columns + fan_in


@triton.jit
def _counts(kept, M, N, K, fan_in, R: tl.constexpr, DROP: tl.constexpr):
    """Where in `kept` the counts of the blocks of gradients lie, how many blocks there are, and
    where the signals begin, which lie behind the counts."""
    counts = _after(kept, K + N + M, R).to(tl.pointer_type(tl.int32), bitcast=True)
    if DROP:
        # an even number of 32 bits, as of the counts below, leaves the signals' 64 aligned
        numbers = DROP * (M + fan_in)
        counts += numbers + numbers % 2
    blocks = tl.cdiv(K, DEEP) + tl.cdiv(N, DEEP)
    signals = counts + (blocks + blocks % 2)
    return counts, blocks, signals.to(tl.pointer_type(tl.int64), bitcast=True)


@triton.jit
def _place(pid, num_pid_m, num_pid_n, GROUP_M: tl.constexpr):
    """Row and column of a tile, in groups of rows that share the weight's columns in L2."""
    first = pid // (GROUP_M * num_pid_n) * GROUP_M
    height = min(num_pid_m - first, GROUP_M)
    # down a column of the group first: all of its first column come before its second
    inside = pid % (GROUP_M * num_pid_n)
    return first + inside % height, inside // height


@triton.jit
def _rows(start, inside, P, stride_batch, stride_row, EVEN_P: tl.constexpr):
    """Where rows ``start + inside`` lie, in 64 bits; where `EVEN_P`, all of them in one batch."""
    if EVEN_P:
        within = tl.multiple_of(start % P, 16)  # as blocks and batches are
        first = (start // P).to(tl.int64) * stride_batch + within.to(tl.int64) * stride_row
        return first + inside.to(tl.int64) * stride_row
    rows = start + inside
    return (rows // P).to(tl.int64) * stride_batch + (rows % P).to(tl.int64) * stride_row


@triton.jit
def _threshold(drop, which):
    least = drop.threshold
    for mask in tl.static_range(len(drop.thresholds)):
        least = tl.where(which == mask, drop.thresholds[mask], least)
    return least


@triton.jit
def _project(x, f, p, pid_m, which, sizes, drop, meta, R: tl.constexpr):
    """A block of rows of ``p[M, R] = (mask ∘ x[M, K]) @ f[R, K].T``: one read of x; of several
    masks, of the columns that have mask `which`."""
    p += which * meta.R
    f += which * meta.R * sizes.K
    offs_m = pid_m * meta.BLOCK_M + tl.arange(0, meta.BLOCK_M)
    offs_k, offs_r = tl.arange(0, meta.BLOCK_K), tl.arange(0, meta.R)
    acc = tl.zeros((meta.BLOCK_M, meta.R), tl.float32)
    inside_m = tl.arange(0, meta.BLOCK_M)
    where = _rows(
        start=pid_m * meta.BLOCK_M,
        inside=inside_m,
        P=sizes.P,
        stride_batch=x.stride_batch,
        stride_row=x.stride_row,
        EVEN_P=meta.EVEN_P,
    )
    left = x.ptr + where[:, None] + offs_k[None, :].to(tl.int64) * x.stride_col
    # 32 bits reach all of a factor (`operands.factors_fit`), but not of x
    thin = f + offs_r[None, :] * sizes.K + offs_k[:, None]
    step = tl.cast(x.stride_col, tl.int64) * meta.BLOCK_K
    if drop.ON:
        of_rows, _ = keys(drop.seed, which)
        rows, before = numbers(offs_m, of_rows), which * (sizes.M + sizes.K)
        # for the backward, which then need not know the seed
        tl.store(drop.rows + before + offs_m, rows, mask=offs_m < sizes.M)
        of_columns, threshold = drop.columns + before, _threshold(drop, which)
    for k in range(0, sizes.K, meta.BLOCK_K):
        if meta.EVEN_K:
            tile = tl.load(left, mask=offs_m[:, None] < sizes.M, other=0.0)
            factor = tl.load(thin)
        else:
            inside = offs_k < sizes.K - k
            tile = tl.load(left, mask=(offs_m[:, None] < sizes.M) & inside[None, :], other=0.0)
            # both are masked: 0 times what lies past the end may be NaN
            factor = tl.load(thin, mask=inside[:, None], other=0.0)
        if drop.ON:
            if meta.EVEN_K:
                columns = tl.load(of_columns + k + offs_k)
            else:
                columns = tl.load(of_columns + k + offs_k, mask=offs_k < sizes.K - k, other=0)
            gone = below(rows[:, None], columns[None, :], threshold)
            tile = tl.where(gone, 0.0, tile).to(tile.dtype)
        acc = tl.dot(tile, factor, acc)
        left += step
        thin += meta.BLOCK_K
    where = p + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
    tl.store(where, acc.to(p.dtype.element_ty), mask=offs_m[:, None] < sizes.M)


@triton.jit
def _product(x, w, pid_m, pid_n, stride_wk, stride_wn, sizes, meta):
    """One tile of ``x[M, K] @ w[K, N]`` in float32.

    Where `TMA`, x and w are descriptors (w of ``[N, K]`` where ROWS_OUT), loaded by the tensor
    memory engine; else pointers, with any strides and a cheaper launch.
    """
    acc = tl.zeros((meta.BLOCK_M, meta.BLOCK_N), tl.float32)
    if meta.TMA:
        for k in range(0, sizes.K, meta.BLOCK_K):
            left = x.ptr.load([pid_m * meta.BLOCK_M, k])
            # a descriptor's last dimension is contiguous: [N, K] is loaded as it lies, and turned
            if meta.ROWS_OUT:
                acc = tl.dot(left, w.load([pid_n * meta.BLOCK_N, k]).T, acc)
            else:
                acc = tl.dot(left, w.load([k, pid_n * meta.BLOCK_N]), acc)
    else:
        inside_m, offs_k = tl.arange(0, meta.BLOCK_M), tl.arange(0, meta.BLOCK_K)
        offs_m = pid_m * meta.BLOCK_M + inside_m
        offs_n = pid_n * meta.BLOCK_N + tl.arange(0, meta.BLOCK_N)
        where = _rows(
            start=pid_m * meta.BLOCK_M,
            inside=inside_m,
            P=sizes.P,
            stride_batch=x.stride_batch,
            stride_row=x.stride_row,
            EVEN_P=meta.EVEN_P,
        )
        left = x.ptr + where[:, None] + offs_k[None, :].to(tl.int64) * x.stride_col
        step = tl.cast(x.stride_col, tl.int64) * meta.BLOCK_K
        rows = offs_m[:, None] < sizes.M
        right = w + offs_k[:, None].to(tl.int64) * stride_wk
        # columns past N read those that there are: no mask in the loop, and `_store` drops them
        right += (offs_n % sizes.N)[None, :].to(tl.int64) * stride_wn
        for k in range(0, sizes.K, meta.BLOCK_K):
            if meta.EVEN_K:
                acc = tl.dot(tl.load(left, mask=rows, other=0.0), tl.load(right), acc)
            else:
                inside = offs_k < sizes.K - k
                tile = tl.load(left, mask=rows & inside[None, :], other=0.0)
                acc = tl.dot(tile, tl.load(right, mask=inside[:, None], other=0.0), acc)
            left += step
            right += meta.BLOCK_K * stride_wk
    return acc


@triton.jit
def _low_rank(acc, p, q, offs_m, offs_n, sizes, drop, R: tl.constexpr):
    """``acc + mask ∘ (p @ q)`` for one tile, from ``p[M, R]`` and ``q[R, N]`` in memory."""
    if drop.ON > 1:
        for which in range(drop.ON):  # not unrolled, which would take more registers than there are
            acc = _share(
                acc=acc,
                p=p,
                q=q,
                offs_m=offs_m,
                offs_n=offs_n,
                sizes=sizes,
                drop=drop,
                which=which,
                R=R,
            )
    else:
        acc = _share(
            acc=acc,
            p=p,
            q=q,
            offs_m=offs_m,
            offs_n=offs_n,
            sizes=sizes,
            drop=drop,
            which=0,
            R=R,
        )
    return acc


@triton.jit
def _share(acc, p, q, offs_m, offs_n, sizes, drop, which, R: tl.constexpr):
    """`_low_rank` of the ranks of one mask."""
    SHARE: tl.constexpr = R // max(1, drop.ON)
    STEP: tl.constexpr = min(SHARE, 32)
    # the mask is of p @ q alone, which then cannot go straight into the accumulator
    low = tl.zeros_like(acc) if drop.ON else acc
    for start in tl.static_range(0, SHARE, STEP):
        offs_r = which * SHARE + start + tl.arange(0, STEP)
        where = p + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
        left = tl.load(where, mask=offs_m[:, None] < sizes.M, other=0.0)
        where = q + offs_r[:, None] * sizes.N + offs_n[None, :]
        low = tl.dot(left, tl.load(where, mask=offs_n[None, :] < sizes.N, other=0.0), low)
    if drop.ON:
        before = which * (sizes.M + sizes.N)
        rows = tl.load(drop.rows + before + offs_m, mask=offs_m < sizes.M, other=0)[:, None]
        where = drop.columns + before + offs_n
        columns = tl.load(where, mask=offs_n < sizes.N, other=0)[None, :]
        low = tl.where(below(rows, columns, _threshold(drop, which)), acc, acc + low)
    return low


@triton.jit
def _halves(acc):
    """The left and right columns of a tile: a store of half its width takes half of the shared
    memory, which leaves room for one more stage of loads."""
    # tl.split takes a last dimension of 2 apart, so the halves are moved there
    HALF: tl.constexpr = acc.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1)))


@triton.jit
def _store(y, acc, pid_m, pid_n, sizes, meta):
    """A tile's place in y, by the tensor memory engine in two halves, or by pointers."""
    if meta.TMA:
        # no mask: the engine leaves out what lies past the end of y
        lower, upper = _halves(acc)
        y.ptr.store([pid_m * meta.BLOCK_M, pid_n * meta.BLOCK_N], lower.to(y.ptr.dtype))
        half = pid_n * meta.BLOCK_N + meta.BLOCK_N // 2
        y.ptr.store([pid_m * meta.BLOCK_M, half], upper.to(y.ptr.dtype))
    else:
        inside_m = tl.arange(0, meta.BLOCK_M)
        offs_m = pid_m * meta.BLOCK_M + inside_m
        offs_n = pid_n * meta.BLOCK_N + tl.arange(0, meta.BLOCK_N)
        where = _rows(
            start=pid_m * meta.BLOCK_M,
            inside=inside_m,
            P=sizes.P,
            stride_batch=y.stride_batch,
            stride_row=y.stride_row,
            EVEN_P=meta.EVEN_P,
        )
        out = y.ptr + where[:, None] + offs_n[None, :].to(tl.int64) * y.stride_col
        inside = (offs_m[:, None] < sizes.M) & (offs_n[None, :] < sizes.N)
        tl.store(out, acc.to(y.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _factor(m, norm, offs_n, N):
    """By what DoRA multiplies each output, ``m / norm``; and norm itself, as a divisor: 1 in place
    of 0, so that a row of zeros gives 0 and not NaN."""
    length = tl.load(norm + offs_n, mask=offs_n < N, other=1.0)
    length = tl.where(length == 0.0, 1.0, length)
    return tl.load(m + offs_n, mask=offs_n < N, other=0.0).to(tl.float32) / length, length


@triton.jit
def _tile(
    x,
    w,
    y,
    x_ptr,
    f,
    q,
    p,
    bias,
    rescale,
    signals,
    pid,
    stride_wk,
    stride_wn,
    sizes,
    drop_in,
    drop,
    meta,
    PACKS: tl.constexpr,
    LOCAL: tl.constexpr,
    EARLY: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One tile of ``y = x @ w + mask ∘ (p @ q) + bias``, or where `LOCAL` of p, by the mask
    `drop_in` of x; where `rescale` says so, of ``z = x @ w + p @ q`` and ``z · m/norm + bias``.
    `x_ptr` is x, always as a pointer."""
    tl.assume(sizes.K > 0)  # else ptxas makes every tensor core instruction wait for the last
    num_pid_n = tl.cdiv(sizes.N, meta.BLOCK_N) + (1 if LOCAL else 0)
    pid_m, pid_n = _place(pid, tl.cdiv(sizes.M, meta.BLOCK_M), num_pid_n, meta.GROUP_M)
    # the thin column, one wider than y: `_place` gives it lower tickets than all who await it
    if LOCAL and pid_n == 0:
        if PACKS:
            _await_all(signals.ptr, signals.packs, signals.number)
        _project(
            x=x_ptr,
            f=f,
            p=p,
            pid_m=pid_m,
            which=0,
            sizes=sizes,
            drop=drop_in,
            meta=meta,
            R=meta.R,
        )
        # the release is of one thread alone
        tl.debug_barrier()  # all of the program's rows are stored
        own = signals.ptr + signals.packs + pid_m
        tl.atomic_xchg(own, signals.number, sem="release", scope="gpu")
    else:
        pid_n -= 1 if LOCAL else 0
        acc = _product(
            x=x,
            w=w,
            pid_m=pid_m,
            pid_n=pid_n,
            stride_wk=stride_wk,
            stride_wn=stride_wn,
            sizes=sizes,
            meta=meta,
        )
        if LOCAL:
            _await(signals.ptr + signals.packs + pid_m, signals.number)
        # p is of the launch ahead, whose end this waits for; x @ w needed nothing of it
        if EARLY:
            gdc_wait()
        offs_m = pid_m * meta.BLOCK_M + tl.arange(0, meta.BLOCK_M)
        offs_n = pid_n * meta.BLOCK_N + tl.arange(0, meta.BLOCK_N)
        if not (meta.TMA and drop.ON):
            acc = _low_rank(
                acc=acc,
                p=p,
                q=q,
                offs_m=offs_m,
                offs_n=offs_n,
                sizes=sizes,
                drop=drop,
                R=meta.R,
            )
        if rescale.KEEPS:
            _store(
                y=Matrix(rescale.z, y.stride_batch, y.stride_row, y.stride_col),
                acc=acc,
                pid_m=pid_m,
                pid_n=pid_n,
                sizes=sizes,
                meta=meta,
            )
        if rescale.ON:
            times, _ = _factor(rescale.m, rescale.norm, offs_n, sizes.N)
            acc *= times[None, :]
        # behind DoRA's factor, which is of the weight and not of the bias
        if BIAS:
            acc += tl.load(bias + offs_n, mask=offs_n < sizes.N, other=0.0).to(tl.float32)[None, :]
        if meta.TMA and drop.ON:  # a masked term of its own for half of the registers
            HALF: tl.constexpr = meta.BLOCK_N // 2
            lower, upper = _halves(acc)
            offs_n = pid_n * meta.BLOCK_N + tl.arange(0, HALF)
            lower = _low_rank(
                acc=lower,
                p=p,
                q=q,
                offs_m=offs_m,
                offs_n=offs_n,
                sizes=sizes,
                drop=drop,
                R=meta.R,
            )
            y.ptr.store([pid_m * meta.BLOCK_M, pid_n * meta.BLOCK_N], lower.to(y.ptr.dtype))
            upper = _low_rank(
                acc=upper,
                p=p,
                q=q,
                offs_m=offs_m,
                offs_n=offs_n + HALF,
                sizes=sizes,
                drop=drop,
                R=meta.R,
            )
            y.ptr.store([pid_m * meta.BLOCK_M, pid_n * meta.BLOCK_N + HALF], upper.to(y.ptr.dtype))
        else:
            _store(y=y, acc=acc, pid_m=pid_m, pid_n=pid_n, sizes=sizes, meta=meta)


@triton.jit
def _store_gradients(
    acc,
    offs_d,
    valid,
    da,
    db,
    scale,
    strength,
    fan_in,
    r,
    SCALED: tl.constexpr,
    R: tl.constexpr,
):
    """Stores rows `offs_d` of ``[da.T; db]``: ``da[r, fan_in]``, and ``db[out, r]`` times the
    scale."""
    offs_r = tl.arange(0, R)
    ranks, inner = offs_r[None, :] < r, offs_d[:, None] < fan_in
    where = da + offs_r[None, :].to(tl.int64) * fan_in + offs_d[:, None]
    tl.store(where, acc, mask=ranks & inner & valid[:, None])
    # only B's gradient: in A's the scale is part of v
    if SCALED:
        acc *= strength * tl.load(scale).to(tl.float32)
    where = db + (offs_d[:, None] - fan_in).to(tl.int64) * r + offs_r[None, :]
    tl.store(where, acc, mask=ranks & (offs_d[:, None] >= fan_in) & valid[:, None])


@triton.jit
def _thin_sum(
    wide,
    thin,
    block,
    size,
    low,
    high,
    M,
    P,
    drop,
    EVEN_P: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A block of ``(mask ∘ wide).T @ thin`` over the rows from `low` to `high`."""
    offs_d = block * DEEP + tl.arange(0, DEEP)
    offs_m, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, R)
    if drop.ON == 1:
        columns = tl.load(drop.columns + offs_d, mask=offs_d < size, other=0)[:, None]
    acc = tl.zeros((DEEP, R), tl.float32)
    for m in range(low, high, BLOCK_M):
        # up to M, not high: a group is whole blocks (see `plan.Backward`), but for the last
        mm = m + offs_m
        rows = _rows(
            start=m,
            inside=offs_m,
            P=P,
            stride_batch=wide.stride_batch,
            stride_row=wide.stride_row,
            EVEN_P=EVEN_P,
        )
        where = wide.ptr + rows[None, :]
        where += offs_d[:, None].to(tl.int64) * wide.stride_col
        left = tl.load(where, mask=(mm[None, :] < M) & (offs_d[:, None] < size), other=0.0)
        if drop.ON == 1:
            rows = tl.load(drop.rows + mm, mask=mm < M, other=0)[None, :]
            gone = below(rows, columns, drop.threshold)
            left = tl.where(gone, 0.0, left).to(left.dtype)
        where = thin + mm[:, None].to(tl.int64) * R + offs_r[None, :]
        right = tl.load(where, mask=mm[:, None] < M, other=0.0)
        if drop.ON > 1:
            for which in tl.static_range(drop.ON):
                before = which * (M + size)
                rows = tl.load(drop.rows + before + mm, mask=mm < M, other=0)[None, :]
                columns = tl.load(drop.columns + before + offs_d, mask=offs_d < size, other=0)
                gone = below(rows, columns[:, None], drop.thresholds[which])
                own = tl.where(offs_r[None, :] // (R // drop.ON) == which, right, 0.0)
                seen = tl.where(gone, 0.0, left).to(left.dtype)
                acc = tl.dot(seen, own.to(right.dtype), acc)
        else:
            acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def _gradients(
    dy,
    x,
    v,
    u,
    part,
    da,
    db,
    scale,
    strength,
    signals,
    counts,
    pid,
    M,
    fan_in,
    out,
    r,
    P,
    groups,
    rows_per_group,
    drop,
    LOCAL: tl.constexpr,
    EARLY: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN_P: tl.constexpr,
    R: tl.constexpr,
    TILE_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A block of ``(mask ∘ x).T @ v`` or ``dy.T @ u`` over one of the groups of rows; the last
    group to end adds all of them in order, from ``part[groups, fan_in + out, R]``."""
    block, group = pid // groups, pid % groups
    count = counts + block
    blocks = tl.cdiv(fan_in, DEEP)
    inner = block < blocks
    size = tl.where(inner, fan_in, out)
    block -= tl.where(inner, 0, blocks)
    low, high = group * rows_per_group, min(M, group * rows_per_group + rows_per_group)
    if LOCAL:
        # x.T @ v needs the v of this grid; dy.T @ u the u of the forward, which has ended
        if inner:
            for tile in range(low // TILE_M, tl.cdiv(high, TILE_M)):
                _await(signals.ptr + tile, signals.number)
    # v is of the launch ahead
    if EARLY:
        gdc_wait()
    if drop.ON:  # by a branch, so that what is not masked takes no time for it
        tl.assume(low < high)  # else ptxas makes every tensor core instruction of the kernel wait
        if inner:
            acc = _thin_sum(
                wide=x,
                thin=v,
                block=block,
                size=size,
                low=low,
                high=high,
                M=M,
                P=P,
                drop=drop,
                EVEN_P=EVEN_P,
                R=R,
                BLOCK_M=BLOCK_M,
            )
        else:
            acc = _thin_sum(
                wide=dy,
                thin=u,
                block=block,
                size=size,
                low=low,
                high=high,
                M=M,
                P=P,
                drop=Drop(seed=v, columns=v, rows=v, threshold=0, ON=0, thresholds=()),
                EVEN_P=EVEN_P,
                R=R,
                BLOCK_M=BLOCK_M,
            )
    else:
        # a select, not a branch, keeps what the compiler knows of the pointers' alignment
        wide = Matrix(
            tl.where(inner, x.ptr, dy.ptr),
            tl.where(inner, x.stride_batch, dy.stride_batch),
            tl.where(inner, x.stride_row, dy.stride_row),
            tl.where(inner, x.stride_col, dy.stride_col),
        )
        thin = tl.where(inner, v, u)
        acc = _thin_sum(
            wide=wide,
            thin=thin,
            block=block,
            size=size,
            low=low,
            high=high,
            M=M,
            P=P,
            drop=drop,
            EVEN_P=EVEN_P,
            R=R,
            BLOCK_M=BLOCK_M,
        )
    offs_r = tl.arange(0, R)
    offs_d = block * DEEP + tl.arange(0, DEEP) + tl.where(inner, 0, fan_in)
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
            # for another backward of the same forward, which finds the same `kept`
            tl.store(count, 0)
            acc = tl.zeros((DEEP, R), tl.float32)
            for other in range(groups):
                # in their own order, not that in which they ended: deterministic
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
    a,
    b,
    scale,
    kept,
    seed,
    strength,
    pid,
    M,
    N,
    K,
    r,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    DROP: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Casts the part `pid` of the factors into `kept`, ranks first and padded with zeros, B's with
    the scale in it; finds there the numbers of a mask's columns. The last one clears counts."""
    offs_r, offs_d = tl.arange(0, R), tl.arange(0, BLOCK_D)
    inner, outer = tl.cdiv(K, BLOCK_D), tl.cdiv(N, BLOCK_D)
    if pid < inner:
        offs_d += pid * BLOCK_D
        valid = (offs_r[:, None] < r) & (offs_d[None, :] < K)
        where = a + offs_r[:, None] * stride_ar + offs_d[None, :] * stride_ak
        value = tl.load(where, mask=valid, other=0.0)
        where = kept + offs_r[:, None] * K + offs_d[None, :]
        tl.store(where, value.to(kept.dtype.element_ty), mask=offs_d[None, :] < K)
        if DROP:
            columns, _ = _numbers(kept=kept, M=M, N=N, K=K, fan_in=K, R=R)
            for which in tl.static_range(DROP):
                _, of_columns = keys(seed, which)
                where = columns + which * (M + K) + offs_d
                tl.store(where, numbers(offs_d, of_columns), mask=offs_d < K)
    elif pid < inner + outer:
        offs_d += (pid - inner) * BLOCK_D
        valid = (offs_r[:, None] < r) & (offs_d[None, :] < N)
        where = b + offs_r[:, None] * stride_br + offs_d[None, :] * stride_bn
        value = tl.load(where, mask=valid, other=0.0)
        # in float32, so that B is rounded once however small the scale
        value = value.to(tl.float32) * (strength * tl.load(scale).to(tl.float32))
        where = kept + R * K + offs_r[:, None] * N + offs_d[None, :]
        tl.store(where, value.to(kept.dtype.element_ty), mask=offs_d[None, :] < N)
    else:
        counts, blocks, _ = _counts(kept=kept, M=M, N=N, K=K, fan_in=K, R=R, DROP=DROP)
        none = tl.zeros((BLOCK_D,), tl.int32)
        for start in range(0, blocks, BLOCK_D):
            tl.store(counts + start + offs_d, none, mask=start + offs_d < blocks)


# an r of 1 or a multiple of 16 would otherwise compile the kernel once more
@triton.jit(do_not_specialize=["r"])
def pack(
    a,
    b,
    scale,
    kept,
    seed,
    strength,
    M,
    N,
    K,
    r,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    DROP: tl.constexpr,
    EARLY: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The factors cast, and the counts cleared, where `forward` does not."""
    if EARLY:
        gdc_launch_dependents()
    _pack(
        a=a,
        b=b,
        scale=scale,
        kept=kept,
        seed=seed,
        strength=strength,
        pid=tl.program_id(0),
        M=M,
        N=N,
        K=K,
        r=r,
        stride_ar=stride_ar,
        stride_ak=stride_ak,
        stride_bn=stride_bn,
        stride_br=stride_br,
        DROP=DROP,
        R=R,
        BLOCK_D=BLOCK_D,
    )


@triton.jit(do_not_specialize=["threshold"])
def project(
    x,
    f,
    p,
    kept,
    seed,
    M,
    N,
    K,
    P,
    stride_xb,
    stride_xm,
    stride_xk,
    threshold,
    DROP: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    EARLY: tl.constexpr,
    EVEN_P: tl.constexpr,
    EVEN_K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``p[M, R] = (mask ∘ x[M, K]) @ f[R, K].T``, of several masks in programs side by side, which
    read the same of x."""
    MASKS: tl.constexpr = max(1, DROP)
    if EARLY:  # what reads x or the factors may start only after those who wrote them
        gdc_wait()
        gdc_launch_dependents()
    columns, rows = _numbers(kept=kept, M=M, N=N, K=K, fan_in=K, R=R)
    pid = tl.program_id(0)
    _project(
        x=Matrix(x, stride_xb, stride_xm, stride_xk),
        f=f,
        p=p,
        pid_m=pid // MASKS,
        which=pid % MASKS,
        sizes=Sizes(M, 0, K, P),
        drop=Drop(
            seed=seed,
            columns=columns,
            rows=rows,
            threshold=threshold,
            ON=DROP,
            thresholds=THRESHOLDS,
        ),
        meta=Meta(
            TMA=False,
            ROWS_OUT=False,
            EVEN_P=EVEN_P,
            EVEN_K=EVEN_K,
            R=R // MASKS,
            BLOCK_M=BLOCK_M,
            BLOCK_N=0,
            BLOCK_K=BLOCK_K,
            GROUP_M=0,
        ),
        R=R,
    )


@triton.jit(do_not_specialize=["threshold"])
def product(
    x,
    w,
    y,
    z,
    q,
    p,
    bias,
    m,
    norm,
    M,
    N,
    K,
    P,
    stride_xb,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_yb,
    stride_ym,
    stride_yn,
    threshold,
    DROP: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    EARLY: tl.constexpr,
    BIAS: tl.constexpr,
    RESCALES: tl.constexpr,
    KEEPS: tl.constexpr,
    TMA: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    EVEN_P: tl.constexpr,
    EVEN_K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``y = x @ w + mask ∘ (p @ q) + bias``; q is the start of `kept` where there is a mask. Where
    it `RESCALES`, ``y = z · m/norm + bias`` of what is not rounded yet, ``z = x @ w + p @ q``,
    which it `KEEPS` or not."""
    columns, rows = _numbers(kept=q, M=M, N=N, K=K, fan_in=N, R=R)
    left = Matrix(x, stride_xb, stride_xm, stride_xk)
    _tile(
        x=left,
        w=w,
        y=Matrix(y, stride_yb, stride_ym, stride_yn),
        x_ptr=left,
        f=q,
        q=q,
        p=p,
        bias=bias,
        rescale=Rescale(z, m, norm, RESCALES, KEEPS),
        signals=Signals(p, 0, 0),
        pid=tl.program_id(0),
        stride_wk=stride_wk,
        stride_wn=stride_wn,
        sizes=Sizes(M, N, K, P),
        drop_in=Drop(seed=q, columns=q, rows=q, threshold=0, ON=0, thresholds=()),
        drop=Drop(
            seed=q,
            columns=columns,
            rows=rows,
            threshold=threshold,
            ON=DROP,
            thresholds=THRESHOLDS,
        ),
        meta=Meta(
            TMA=TMA,
            ROWS_OUT=ROWS_OUT,
            EVEN_P=EVEN_P,
            EVEN_K=EVEN_K,
            R=R,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            GROUP_M=GROUP_M,
        ),
        PACKS=False,
        LOCAL=False,
        EARLY=EARLY,
        BIAS=BIAS,
    )


# number above all: it changes with each launch, and `Launch` hands it to the one compiled function
@triton.jit(do_not_specialize=["number", "packs", "r", "threshold"])
def forward(
    x,
    w,
    y,
    z,
    x_ptr,
    a,
    b,
    scale,
    kept,
    bias,
    m,
    norm,
    seed,
    tickets,
    strength,
    number,
    packs,
    M,
    N,
    K,
    P,
    stride_xb,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_yb,
    stride_ym,
    stride_yn,
    r,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    threshold,
    DROP: tl.constexpr,
    BIAS: tl.constexpr,
    RESCALES: tl.constexpr,
    KEEPS: tl.constexpr,
    TMA: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    EVEN_P: tl.constexpr,
    EVEN_K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``y = x @ w + u @ q + bias`` and all of `kept`; `x_ptr` is x again, always as a pointer.
    `RESCALES`, `KEEPS`: as of `product`."""
    pid = _drawn(tickets)
    _, _, signals = _counts(kept=kept, M=M, N=N, K=K, fan_in=K, R=R, DROP=DROP)
    columns, rows = _numbers(kept=kept, M=M, N=N, K=K, fan_in=K, R=R)
    if pid < packs:
        _pack(
            a=a,
            b=b,
            scale=scale,
            kept=kept,
            seed=seed,
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
            DROP=DROP,
            R=R,
            BLOCK_D=BLOCK_D,
        )
        tl.debug_barrier()  # all of the program's part is stored
        tl.atomic_xchg(signals + pid, number, sem="release", scope="gpu")
    else:
        _tile(
            x=Matrix(x, stride_xb, stride_xm, stride_xk),
            w=w,
            y=Matrix(y, stride_yb, stride_ym, stride_yn),
            x_ptr=Matrix(x_ptr, stride_xb, stride_xm, stride_xk),
            f=kept,
            q=kept + R * K,
            p=_after(kept, K + N, R),
            bias=bias,
            rescale=Rescale(z, m, norm, RESCALES, KEEPS),
            signals=Signals(signals, number, packs),
            pid=pid - packs,
            stride_wk=stride_wk,
            stride_wn=stride_wn,
            sizes=Sizes(M, N, K, P),
            drop_in=Drop(
                seed=seed,
                columns=columns,
                rows=rows,
                threshold=threshold,
                ON=DROP,
                thresholds=(),
            ),
            drop=Drop(seed=seed, columns=columns, rows=rows, threshold=0, ON=0, thresholds=()),
            meta=Meta(
                TMA=TMA,
                ROWS_OUT=ROWS_OUT,
                EVEN_P=EVEN_P,
                EVEN_K=EVEN_K,
                R=R,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                GROUP_M=GROUP_M,
            ),
            PACKS=True,
            LOCAL=True,
            EARLY=False,
            BIAS=BIAS,
        )


@triton.jit(do_not_specialize=["number", "tiles", "r", "groups", "rows_per_group", "threshold"])
def backward(
    dy,
    w,
    dx,
    dy_ptr,
    kept,
    scratch,
    x,
    da,
    db,
    scale,
    tickets,
    strength,
    number,
    tiles,
    M,
    N,
    K,
    P,
    stride_dyb,
    stride_dym,
    stride_dyk,
    stride_wk,
    stride_wn,
    stride_dxb,
    stride_dxm,
    stride_dxn,
    stride_xb,
    stride_xm,
    stride_xk,
    r,
    groups,
    rows_per_group,
    threshold,
    DROP: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LOCAL: tl.constexpr,
    EARLY: tl.constexpr,
    SCALED: tl.constexpr,
    TMA: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    EVEN_P: tl.constexpr,
    EVEN_K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The gradients of the input, in `tiles` programs that may be none, and of the factors. Of
    ``dx = dy @ w`` K are the layer's outputs and N its inputs.

    `scratch` holds ``v[M, R]``, the signals, and the groups' sums.
    """
    counts, _, _ = _counts(kept=kept, M=M, N=N, K=K, fan_in=N, R=R, DROP=DROP)
    columns, of_rows = _numbers(kept=kept, M=M, N=N, K=K, fan_in=N, R=R)
    signals = _after(scratch, M, R).to(tl.pointer_type(tl.int64), bitcast=True)
    rows = tl.cdiv(M, SPAN)
    part = (signals + (rows + rows % 2)).to(tl.pointer_type(tl.float32), bitcast=True)
    # the compiler cannot tell that rows + rows % 2 is even
    part = tl.multiple_of(part, 16)  # bytes, as the signals' size is
    # tiles have the lower numbers: they make v, and the short blocks fill what is left
    pid = _drawn(tickets) if LOCAL else tl.program_id(0)
    pointed = Matrix(dy_ptr, stride_dyb, stride_dym, stride_dyk)
    if pid < tiles:
        _tile(
            x=Matrix(dy, stride_dyb, stride_dym, stride_dyk),
            w=w,
            y=Matrix(dx, stride_dxb, stride_dxm, stride_dxn),
            x_ptr=pointed,
            f=kept + R * N,
            q=kept,
            p=scratch,
            bias=kept,
            # what is off still needs a pointer: any that there is
            rescale=Rescale(kept, kept, kept, False, False),
            signals=Signals(signals, number, 0),
            pid=pid,
            stride_wk=stride_wk,
            stride_wn=stride_wn,
            sizes=Sizes(M, N, K, P),
            drop_in=Drop(
                seed=kept,
                columns=columns,
                rows=of_rows,
                threshold=0,
                ON=0,
                thresholds=(),
            ),
            drop=Drop(
                seed=kept,
                columns=columns,
                rows=of_rows,
                threshold=threshold,
                ON=DROP,
                thresholds=THRESHOLDS,
            ),
            meta=Meta(
                TMA=TMA,
                ROWS_OUT=ROWS_OUT,
                EVEN_P=EVEN_P,
                EVEN_K=EVEN_K,
                R=R,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                GROUP_M=GROUP_M,
            ),
            PACKS=False,
            LOCAL=LOCAL,
            EARLY=EARLY,
            BIAS=False,
        )
    else:
        _gradients(
            dy=pointed,
            x=Matrix(x, stride_xb, stride_xm, stride_xk),
            v=scratch,
            u=_after(kept, N + K, R),
            part=part,
            da=da,
            db=db,
            scale=scale,
            strength=strength,
            signals=Signals(signals, number, 0),
            counts=counts,
            pid=pid - tiles,
            M=M,
            fan_in=N,
            out=K,
            r=r,
            P=P,
            groups=groups,
            rows_per_group=rows_per_group,
            drop=Drop(
                seed=kept,
                columns=columns,
                rows=of_rows,
                threshold=threshold,
                ON=DROP,
                thresholds=THRESHOLDS,
            ),
            LOCAL=LOCAL,
            EARLY=EARLY,
            SCALED=SCALED,
            EVEN_P=EVEN_P,
            R=R,
            TILE_M=BLOCK_M,
            BLOCK_M=BLOCK_ROWS,
        )
