"""Triton kernels for rows that take different low-rank updates of one weight, in one accumulator.

A row here is a position: ``P`` of them, which lie one after the other, take one update. `product`
computes ``y = x w + p_i q_i + bias`` of rows as they lie: most tiles meet one update, and those
that meet several add one after the other. `project` computes the thin ``p_i = x f_iᵀ``, and
`gradients` those of the factors, ``v_iᵀ x`` and ``u_iᵀ dy``, over the rows sorted by their update,
which nothing is copied for: ``order`` says where each lies. All is read on the device, so nothing
waits for the host. Each row is multiplied by its own update's numbers, and what is not finite
reaches no other row.

On Hopper each starts before the one ahead of it ends (programmatic dependent launch): a product
awaits the thin ones before its last step, and the gradients, which read no product, begin once all
of its programs have.

The updates' factors lie one after the other, of update i from ``starts[i]`` on. Sizes are named as
in `paramlora.cuda.experts.kernels`, whose ``experts`` are the updates here.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paramlora.cuda.decoding.kernels import _held, _rank
from paramlora.cuda.experts.kernels import _expert, _share, _wide
from paramlora.cuda.linear.kernels import _halves, _place


@triton.jit
def _lying(order, rm, M, P):
    """Where the rows `rm` of those that are sorted lie, in 64 bits."""
    row = tl.load(order + rm // P, mask=rm < M, other=0)
    return row.to(tl.int64) * P + rm % P


@triton.jit
def _scaling(table, which, updates, scale, gain):
    """An update's scale times its strength."""
    s = tl.load(_held(table, 2 * updates + which, scale)).to(tl.float32)
    return s * tl.load(_held(table, 3 * updates + which, gain)).to(tl.float32)


@triton.jit
def pack(
    table, starts, down, up, factor, scale, gain, updates, fan_in, out, inner,
    EARLY: tl.constexpr, RANK: tl.constexpr, RB: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """The updates' factors cast, one after the other: a block of ``down[ranks, in]``, the first
    `inner` of each update, or of ``up[ranks, out]``, ``s_i B_iᵀ``; ``table`` as in
    `paramlora.cuda.decoding.kernels`."""
    if EARLY:
        gdc_launch_dependents()
    blocks = tl.num_programs(0) // updates
    block, update = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    start = tl.load(starts + update)
    r, rr = _rank(starts, update, RANK), tl.arange(0, RB)
    if block < inner:
        rk = block * DEEP + tl.arange(0, DEEP)
        fits = (rr[:, None] < r) & (rk[None, :] < fan_in)
        a = _held(table, update, factor) + rr[:, None] * fan_in + rk[None, :]
        at = down + (start + rr)[:, None].to(tl.int64) * fan_in + rk[None, :]
        tl.store(at, tl.load(a, mask=fits, other=0.0).to(down.dtype.element_ty), mask=fits)
    else:
        rn = (block - inner) * DEEP + tl.arange(0, DEEP)
        inside = (rn[:, None] < out) & (rr[None, :] < r)
        b = _held(table, updates + update, factor) + rn[:, None] * r + rr[None, :]
        value = tl.load(b, mask=inside, other=0.0).to(tl.float32)
        value = tl.trans(value * _scaling(table, update, updates, scale, gain))
        where = up + (start + rr)[:, None].to(tl.int64) * out + rn[None, :]
        tl.store(where, value.to(up.dtype.element_ty), mask=tl.trans(inside))


@triton.jit
def project(
    x, f, p, order, ends, starts, M, K, updates, P, x_row, f_rank, f_k, R,
    EARLY: tl.constexpr, WHOLE_K: tl.constexpr, E: tl.constexpr, RB: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Some rows of ``p[M, R] = x[M, K] f_i[r_i, K]ᵀ``, zeros beyond the rank; not those of none."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    update, first, end = _expert(ends, tl.program_id(0), M, updates, E, BM)
    if (update < updates) & (first < end):
        tl.assume(K > 0)
        start = tl.load(starts + update)
        r = tl.load(starts + update + 1) - start
        rm, rk, rr = first + tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, RB)
        lying = _lying(order, rm, M, P)
        acc = tl.zeros((BM, RB), tl.float32)
        left = x + lying[:, None] * x_row + rk[None, :]
        thin = f + (start + rr)[None, :].to(tl.int64) * f_rank + rk[:, None].to(tl.int64) * f_k
        rows, ranks = rm[:, None] < end, rr[None, :] < r
        for k in range(0, K, BK):
            if WHOLE_K:
                tile = tl.load(left, mask=rows, other=0.0)
                factor = tl.load(thin, mask=ranks, other=0.0)
            else:
                inside = rk < K - k
                tile = tl.load(left, mask=rows & inside[None, :], other=0.0)
                factor = tl.load(thin, mask=ranks & inside[:, None], other=0.0)
            acc = tl.dot(tile, factor, acc)
            left += BK
            thin += tl.cast(f_k, tl.int64) * BK
        where = p + lying[:, None] * R + rr[None, :]
        tl.store(where, acc.to(p.dtype.element_ty), mask=rows & (rr[None, :] < R))


@triton.jit
def _factor(q, lying, end, rn, N, q_rank, q_n):
    """``q`` of some ranks among those of all updates."""
    where = q + lying[:, None].to(tl.int64) * q_rank + rn[None, :].to(tl.int64) * q_n
    return tl.load(where, mask=(lying < end)[:, None] & (rn < N)[None, :], other=0.0)


@triton.jit
def _finite(tile):
    return tl.abs(tile.to(tl.float32)) < float("inf")  # NaN is not


@triton.jit
def _some(
    acc, p, q, own, owner, starts, lowest, first, start, end, several, rm, rn, N, R, q_rank, q_n,
    CH: tl.constexpr,
):  # fmt: skip
    """``acc + p_i q_i`` of a few ranks, whosever they are: each row's part of p is zero in those of
    others."""
    lying = start + tl.arange(0, CH)
    if several:
        whose = tl.load(owner + lying, mask=lying < end, other=-1).to(tl.int32)
        within = lying - tl.load(starts + whose, mask=whose >= 0, other=0)
    else:  # what is looked up would come a memory's latency later, once and again
        whose, within = tl.where(lying < end, lowest, -1), lying - first
    right = _factor(q, lying, end, rn, N, q_rank, q_n)
    where = p + rm[:, None].to(tl.int64) * R + within[None, :]
    left = tl.load(where, mask=own[:, None] == whose[None, :], other=0.0)
    return tl.dot(left, right, acc)


@triton.jit
def _at_once(
    acc, p, q, own, owner, starts, lowest, first, end, several, rm, rn, N, R, q_rank, q_n,
    CH: tl.constexpr,
):  # fmt: skip
    """`_some` of all ranks from `first` up to `end`. The first of them, which are all that most
    tiles have, are outside of the loop: one that is to be pipelined takes longer to enter."""
    acc = _some(
        acc, p, q, own, owner, starts, lowest, first, first, end, several, rm, rn, N, R, q_rank,
        q_n, CH,
    )  # fmt: skip
    for start in tl.range(first + CH, end, CH, num_stages=1):
        acc = _some(
            acc, p, q, own, owner, starts, lowest, first, start, end, several, rm, rn, N, R, q_rank,
            q_n, CH,
        )  # fmt: skip
    return acc


@triton.jit
def _one_by_one(
    acc, p, q, own, starts, lowest, highest, rm, rn, N, R, q_rank, q_n, RB: tl.constexpr
):
    """`_at_once` of numbers that are not finite: zeros times them would be no zeros, so that they
    come to their own rows alone."""
    rr = tl.arange(0, RB)
    for update in range(lowest, highest + 1):
        start = tl.load(starts + update)
        r, mine = tl.load(starts + update + 1) - start, own == update
        where = p + rm[:, None].to(tl.int64) * R + rr[None, :]
        left = tl.load(where, mask=mine[:, None] & (rr[None, :] < r), other=0.0)
        where = q + (start + rr)[:, None].to(tl.int64) * q_rank + rn[None, :].to(tl.int64) * q_n
        right = tl.load(where, mask=(rr[:, None] < r) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(left, tl.where(_finite(right), right, 0.0).to(right.dtype), acc)
        bad = tl.max(tl.where(_finite(right), 0, 1), 0) > 0
        acc = tl.where(mine[:, None] & bad[None, :], float("nan"), acc)
    return acc


@triton.jit
def product(
    x, w, y, p, q, index, spans, starts, owner, bias,
    M, N, K, updates, rows, P, x_row, w_k, w_n, q_rank, q_n, R,
    EARLY: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr, ROWS_OUT: tl.constexpr,
    WHOLE_K: tl.constexpr, RB: tl.constexpr, CH: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of ``y[M, N] = x w + p_i q_i + bias``."""
    columns = tl.cdiv(N, BN)
    block, column = _place(tl.program_id(0), tl.cdiv(M, BM), columns, GROUP)
    rm, rn = block * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    # asked for now and looked at once the products are there, so that nothing waits for them
    own = tl.load(index + rm // P, mask=rm < M, other=updates).to(tl.int32)
    span = spans + block * BM // P
    first, end = tl.load(span), tl.load(span + rows)
    tl.assume(K > 0)
    acc = _wide(
        x, w, 0, block * BM, M, column, N, K, x_row, 0, w_k, w_n,
        TMA, ROWS_OUT, WHOLE_K, BM, BN, BK,
    )  # fmt: skip
    if EARLY:  # p, and q too, which a launch right ahead may have cast
        gdc_wait()
        gdc_launch_dependents()
    bad, lowest, highest = 0, tl.min(own, 0), tl.max(own, 0)
    several = lowest < highest
    if several:
        highest = tl.max(tl.where(own < updates, own, -1), 0)
        first, end = tl.load(starts + lowest), tl.load(starts + highest + 1)
        for start in tl.range(first, end, CH, num_stages=1):
            right = _factor(q, start + tl.arange(0, CH), end, rn, N, q_rank, q_n)
            bad = tl.maximum(bad, tl.max(tl.max(tl.where(_finite(right), 0, 1), 1), 0))
    if bad > 0:
        acc = _one_by_one(acc, p, q, own, starts, lowest, highest, rm, rn, N, R, q_rank, q_n, RB)
    else:
        acc = _at_once(
            acc, p, q, own, owner, starts, lowest, first, end, several, rm, rn, N, R, q_rank, q_n,
            CH,
        )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    if TMA:
        lower, upper = _halves(acc)
        y.store([block * BM, column * BN], lower.to(y.dtype))
        y.store([block * BM, column * BN + BN // 2], upper.to(y.dtype))
    else:
        where = y + rm[:, None].to(tl.int64) * N + rn[None, :]
        tl.store(where, acc.to(y.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def gradients(
    x, v, dy, u, da, db, order, ends, starts, table, scale, gain,
    M, fan_in, out, updates, ranks, P, R, x_row, dy_row, inner, parts,
    EARLY: tl.constexpr, APART: tl.constexpr, E: tl.constexpr, RB: tl.constexpr,
    DEEP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """A block of ``da[part, ranks, in] = v_iᵀ x_i``, the first `inner` of them, or of
    ``db[part, ranks, out] = u_iᵀ dy_i``, over one of the parts of an update's rows. Where `APART`,
    db are ``s_i [out, r_i]`` of each, one after the other, as their own gradients."""
    blocks = tl.num_programs(0) // (updates * parts)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // (blocks * updates)
    update = tl.program_id(0) // blocks % updates
    which, low, high = _share(ends, M, updates, E)
    first = tl.sum(tl.where(which == update, low, 0), 0)
    end = tl.sum(tl.where(which == update, high, 0), 0)
    each = tl.cdiv(tl.maximum(end - first, 0), parts * BM) * BM
    first += part * each
    end = tl.minimum(end, first + each)
    start = tl.load(starts + update)
    r = tl.load(starts + update + 1) - start
    is_a = block < inner
    wide, thin, found = tl.where(is_a, x, dy), tl.where(is_a, v, u), tl.where(is_a, da, db)
    size, row = tl.where(is_a, fan_in, out), tl.where(is_a, x_row, dy_row)
    rd = (block - tl.where(is_a, 0, inner)) * DEEP + tl.arange(0, DEEP)
    rm, rr = tl.arange(0, BM), tl.arange(0, RB)
    acc = tl.zeros((DEEP, RB), tl.float32)
    for m in range(first, end, BM):
        mm = m + rm
        lying = _lying(order, mm, M, P)
        where = wide + lying[None, :] * row + rd[:, None]
        left = tl.load(where, mask=(mm[None, :] < end) & (rd[:, None] < size), other=0.0)
        where = thin + lying[:, None] * R + rr[None, :]
        right = tl.load(where, mask=(mm[:, None] < end) & (rr[None, :] < r), other=0.0)
        acc = tl.dot(left, right, acc)
    where = found + (tl.cast(part * ranks + start, tl.int64) + rr[None, :]) * size + rd[:, None]
    if EARLY:  # a product whose programs have all awaited the thin ones runs ahead, and ends first
        gdc_wait()
    if APART:
        if not is_a:
            acc *= _scaling(table, update, updates, scale, gain)
            where = found + tl.cast(part * ranks + start, tl.int64) * size
            where = where + rd[:, None].to(tl.int64) * r + rr[None, :]
    tl.store(where, acc, mask=(rd[:, None] < size) & (rr[None, :] < r))
