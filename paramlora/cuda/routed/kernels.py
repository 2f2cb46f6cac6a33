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

The updates' factors lie one after the other, of update i from ``starts[i]`` on, filled up with
zeros to the ranks that one instruction multiplies (`paramlora.update.choice.padded`): so no number
of an update depends on which others a tile meets, or on their ranks. ``held`` are the ranks. Sizes
are named as in `paramlora.cuda.experts.kernels`, whose ``experts`` are the updates here.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paramlora.cuda.decoding.kernels import _held, _rank
from paramlora.cuda.experts.kernels import _expert, _part, _wide
from paramlora.cuda.linear.kernels import _halves, _place


@triton.jit
def _lying(order, offs_m, M, P):
    """Where the rows `offs_m` of those that are sorted lie, in 64 bits."""
    row = tl.load(order + offs_m // P, mask=offs_m < M, other=0)
    return row.to(tl.int64) * P + offs_m % P


@triton.jit
def _scaling(table, which, updates, scale, gain):
    """An update's scale times its strength."""
    s = tl.load(_held(table, 2 * updates + which, scale)).to(tl.float32)
    return s * tl.load(_held(table, 3 * updates + which, gain)).to(tl.float32)


@triton.jit
def pack(
    table,
    starts,
    held,
    down,
    up,
    factor,
    scale,
    gain,
    updates,
    fan_in,
    out,
    inner,
    EARLY: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The updates' factors cast, one after the other, zeros between them: a block of
    ``down[ranks, in]``, the first `inner` of each update, or of ``up[ranks, out]``, ``s_i B_iᵀ``;
    ``table`` as in `paramlora.cuda.decoding.kernels`."""
    if EARLY:
        gdc_launch_dependents()
    blocks = tl.num_programs(0) // updates
    block, update = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    start, end = tl.load(starts + update), tl.load(starts + update + 1)
    r, offs_r = _rank(held, update, RANK), tl.arange(0, BLOCK_R)
    mine = start + offs_r < end
    if block < inner:
        offs_k = block * BLOCK_D + tl.arange(0, BLOCK_D)
        fits = (offs_r[:, None] < r) & (offs_k[None, :] < fan_in)
        a = _held(table, update, factor) + offs_r[:, None] * fan_in + offs_k[None, :]
        at = down + (start + offs_r)[:, None].to(tl.int64) * fan_in + offs_k[None, :]
        value = tl.load(a, mask=fits, other=0.0).to(down.dtype.element_ty)
        tl.store(at, value, mask=mine[:, None] & (offs_k[None, :] < fan_in))
    else:
        offs_n = (block - inner) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (offs_n[:, None] < out) & (offs_r[None, :] < r)
        b = _held(table, updates + update, factor) + offs_n[:, None] * r + offs_r[None, :]
        scaled = tl.load(b, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.trans(scaled * _scaling(table, update, updates, scale, gain))
        where = up + (start + offs_r)[:, None].to(tl.int64) * out + offs_n[None, :]
        tl.store(
            where, scaled.to(up.dtype.element_ty), mask=mine[:, None] & (offs_n[None, :] < out)
        )


@triton.jit
def project(
    x,
    f,
    p,
    order,
    ends,
    starts,
    M,
    K,
    updates,
    P,
    stride_xm,
    stride_fr,
    stride_fk,
    R,
    EARLY: tl.constexpr,
    EVEN_K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some rows of ``p[M, R] = x[M, K] f_i[r_i, K]ᵀ``, zeros beyond the rank; not those of none."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    update, first, end = _expert(
        ends=ends,
        block=tl.program_id(0),
        M=M,
        experts=updates,
        E=E,
        BLOCK_M=BLOCK_M,
    )
    if (update < updates) & (first < end):
        tl.assume(K > 0)
        start = tl.load(starts + update)
        r = tl.load(starts + update + 1) - start
        offs_m, offs_k, offs_r = (
            first + tl.arange(0, BLOCK_M),
            tl.arange(0, BLOCK_K),
            tl.arange(0, BLOCK_R),
        )
        lying = _lying(order, offs_m, M, P)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        left = x + lying[:, None] * stride_xm + offs_k[None, :]
        thin = (
            f
            + (start + offs_r)[None, :].to(tl.int64) * stride_fr
            + offs_k[:, None].to(tl.int64) * stride_fk
        )
        rows, ranks = offs_m[:, None] < end, offs_r[None, :] < r
        for k in range(0, K, BLOCK_K):
            if EVEN_K:
                tile = tl.load(left, mask=rows, other=0.0)
                factor = tl.load(thin, mask=ranks, other=0.0)
            else:
                inside = offs_k < K - k
                tile = tl.load(left, mask=rows & inside[None, :], other=0.0)
                factor = tl.load(thin, mask=ranks & inside[:, None], other=0.0)
            acc = tl.dot(tile, factor, acc)
            left += BLOCK_K
            thin += tl.cast(stride_fk, tl.int64) * BLOCK_K
        where = p + lying[:, None] * R + offs_r[None, :]
        tl.store(where, acc.to(p.dtype.element_ty), mask=rows & (offs_r[None, :] < R))


@triton.jit
def _factor(q, lying, end, offs_n, N, stride_qr, stride_qn):
    """``q`` of some ranks among those of all updates."""
    where = q + lying[:, None].to(tl.int64) * stride_qr + offs_n[None, :].to(tl.int64) * stride_qn
    return tl.load(where, mask=(lying < end)[:, None] & (offs_n < N)[None, :], other=0.0)


@triton.jit
def _finite(tile):
    return tl.abs(tile.to(tl.float32)) < float("inf")  # NaN is not


@triton.jit
def _some(
    acc,
    p,
    q,
    own,
    owner,
    starts,
    lowest,
    first,
    start,
    end,
    several,
    offs_m,
    offs_n,
    N,
    R,
    stride_qr,
    stride_qn,
    STEP_R: tl.constexpr,
):
    """``acc + p_i q_i`` of a few ranks, whosever they are: each row's part of p is zero in those of
    others."""
    lying = start + tl.arange(0, STEP_R)
    if several:
        whose = tl.load(owner + lying, mask=lying < end, other=-1).to(tl.int32)
        within = lying - tl.load(starts + whose, mask=whose >= 0, other=0)
    else:  # what is looked up would come a memory's latency later, once and again
        whose, within = tl.where(lying < end, lowest, -1), lying - first
    right = _factor(
        q=q,
        lying=lying,
        end=end,
        offs_n=offs_n,
        N=N,
        stride_qr=stride_qr,
        stride_qn=stride_qn,
    )
    where = p + offs_m[:, None].to(tl.int64) * R + within[None, :]
    left = tl.load(where, mask=own[:, None] == whose[None, :], other=0.0)
    return tl.dot(left, right, acc)


@triton.jit
def _alone(
    acc,
    p,
    q,
    first,
    end,
    offs_m,
    offs_n,
    M,
    N,
    R,
    stride_qr,
    stride_qn,
    STEP_R: tl.constexpr,
):
    """``acc + p_i q_i`` of one update, which all of a tile's rows take, of ranks `first` to `end`:
    nothing is asked of each row, which would take 4 % of the product."""
    for start in tl.range(first, end, STEP_R, num_stages=1):
        lying = start + tl.arange(0, STEP_R)
        where = p + offs_m[:, None].to(tl.int64) * R + (lying - first)[None, :]
        left = tl.load(where, mask=(offs_m < M)[:, None] & (lying < end)[None, :], other=0.0)
        right = _factor(
            q=q,
            lying=lying,
            end=end,
            offs_n=offs_n,
            N=N,
            stride_qr=stride_qr,
            stride_qn=stride_qn,
        )
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def _at_once(
    acc,
    p,
    q,
    own,
    owner,
    starts,
    lowest,
    first,
    end,
    several,
    offs_m,
    offs_n,
    N,
    R,
    stride_qr,
    stride_qn,
    STEP_R: tl.constexpr,
):
    """`_some` of all ranks from `first` up to `end`. The first of them, which are all that most
    tiles have, are outside of the loop: one that is to be pipelined takes longer to enter."""
    acc = _some(
        acc=acc,
        p=p,
        q=q,
        own=own,
        owner=owner,
        starts=starts,
        lowest=lowest,
        first=first,
        start=first,
        end=end,
        several=several,
        offs_m=offs_m,
        offs_n=offs_n,
        N=N,
        R=R,
        stride_qr=stride_qr,
        stride_qn=stride_qn,
        STEP_R=STEP_R,
    )
    for start in tl.range(first + STEP_R, end, STEP_R, num_stages=1):
        acc = _some(
            acc=acc,
            p=p,
            q=q,
            own=own,
            owner=owner,
            starts=starts,
            lowest=lowest,
            first=first,
            start=start,
            end=end,
            several=several,
            offs_m=offs_m,
            offs_n=offs_n,
            N=N,
            R=R,
            stride_qr=stride_qr,
            stride_qn=stride_qn,
            STEP_R=STEP_R,
        )
    return acc


@triton.jit
def _one_by_one(
    acc,
    p,
    q,
    own,
    starts,
    lowest,
    highest,
    offs_m,
    offs_n,
    N,
    R,
    stride_qr,
    stride_qn,
    BLOCK_R: tl.constexpr,
):
    """`_at_once` of numbers that are not finite: zeros times them would be no zeros, so that they
    come to their own rows alone."""
    offs_r = tl.arange(0, BLOCK_R)
    for update in range(lowest, highest + 1):
        start = tl.load(starts + update)
        r, mine = tl.load(starts + update + 1) - start, own == update
        where = p + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
        left = tl.load(where, mask=mine[:, None] & (offs_r[None, :] < r), other=0.0)
        where = (
            q
            + (start + offs_r)[:, None].to(tl.int64) * stride_qr
            + offs_n[None, :].to(tl.int64) * stride_qn
        )
        right = tl.load(where, mask=(offs_r[:, None] < r) & (offs_n[None, :] < N), other=0.0)
        acc = tl.dot(left, tl.where(_finite(right), right, 0.0).to(right.dtype), acc)
        bad = tl.max(tl.where(_finite(right), 0, 1), 0) > 0
        # added, as Triton 3.7 compiles no choice between two sums for Blackwell's tensor memory
        acc += tl.where(mine[:, None] & bad[None, :], float("nan"), 0.0)
    return acc


@triton.jit
def _of_several(
    acc,
    p,
    q,
    own,
    owner,
    starts,
    first,
    end,
    updates,
    offs_m,
    offs_n,
    N,
    R,
    stride_qr,
    stride_qn,
    STEP_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``acc + p_i q_i`` of a tile whose rows may take any updates."""
    bad, lowest, highest = 0, tl.min(own, 0), tl.max(own, 0)
    several = lowest < highest
    if several:
        highest = tl.max(tl.where(own < updates, own, -1), 0)
        first, end = tl.load(starts + lowest), tl.load(starts + highest + 1)
        for start in tl.range(first, end, STEP_R, num_stages=1):
            right = _factor(
                q=q,
                lying=start + tl.arange(0, STEP_R),
                end=end,
                offs_n=offs_n,
                N=N,
                stride_qr=stride_qr,
                stride_qn=stride_qn,
            )
            bad = tl.maximum(bad, tl.max(tl.max(tl.where(_finite(right), 0, 1), 1), 0))
    if bad > 0:
        acc = _one_by_one(
            acc=acc,
            p=p,
            q=q,
            own=own,
            starts=starts,
            lowest=lowest,
            highest=highest,
            offs_m=offs_m,
            offs_n=offs_n,
            N=N,
            R=R,
            stride_qr=stride_qr,
            stride_qn=stride_qn,
            BLOCK_R=BLOCK_R,
        )
    else:
        acc = _at_once(
            acc=acc,
            p=p,
            q=q,
            own=own,
            owner=owner,
            starts=starts,
            lowest=lowest,
            first=first,
            end=end,
            several=several,
            offs_m=offs_m,
            offs_n=offs_n,
            N=N,
            R=R,
            stride_qr=stride_qr,
            stride_qn=stride_qn,
            STEP_R=STEP_R,
        )
    return acc


@triton.jit
def product(
    x,
    w,
    y,
    p,
    q,
    index,
    spans,
    starts,
    owner,
    bias,
    M,
    N,
    K,
    updates,
    rows,
    P,
    stride_xm,
    stride_wk,
    stride_wn,
    stride_qr,
    stride_qn,
    R,
    EARLY: tl.constexpr,
    ALONE: tl.constexpr,
    BIAS: tl.constexpr,
    TMA: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEP_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of ``y[M, N] = x w + p_i q_i + bias``; where `ALONE`, its rows take one update."""
    num_pid_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), num_pid_n, GROUP_M)
    offs_m, offs_n = (
        pid_m * BLOCK_M + tl.arange(0, BLOCK_M),
        pid_n * BLOCK_N + tl.arange(0, BLOCK_N),
    )
    # asked for now and looked at once the products are there, so that nothing waits for them
    span = spans + pid_m * BLOCK_M // P
    first, end = tl.load(span), tl.load(span + rows)
    if not ALONE:
        own = tl.load(index + offs_m // P, mask=offs_m < M, other=updates).to(tl.int32)
    tl.assume(K > 0)
    acc = _wide(
        x=x,
        w=w,
        expert=0,
        first=pid_m * BLOCK_M,
        end=M,
        pid_n=pid_n,
        N=N,
        K=K,
        stride_xm=stride_xm,
        stride_we=0,
        stride_wk=stride_wk,
        stride_wn=stride_wn,
        TMA=TMA,
        ROWS_OUT=ROWS_OUT,
        EVEN_K=EVEN_K,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
    )
    if EARLY:  # p, and q too, which a launch right ahead may have cast
        gdc_wait()
        gdc_launch_dependents()
    if ALONE:
        acc = _alone(
            acc=acc,
            p=p,
            q=q,
            first=first,
            end=end,
            offs_m=offs_m,
            offs_n=offs_n,
            M=M,
            N=N,
            R=R,
            stride_qr=stride_qr,
            stride_qn=stride_qn,
            STEP_R=STEP_R,
        )
    else:
        acc = _of_several(
            acc=acc,
            p=p,
            q=q,
            own=own,
            owner=owner,
            starts=starts,
            first=first,
            end=end,
            updates=updates,
            offs_m=offs_m,
            offs_n=offs_n,
            N=N,
            R=R,
            stride_qr=stride_qr,
            stride_qn=stride_qn,
            STEP_R=STEP_R,
            BLOCK_R=BLOCK_R,
        )
    if BIAS:
        acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if TMA:
        lower, upper = _halves(acc)
        y.store([pid_m * BLOCK_M, pid_n * BLOCK_N], lower.to(y.dtype))
        y.store([pid_m * BLOCK_M, pid_n * BLOCK_N + BLOCK_N // 2], upper.to(y.dtype))
    else:
        where = y + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
        tl.store(
            where, acc.to(y.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N)
        )


@triton.jit
def gradients(
    x,
    v,
    dy,
    u,
    da,
    db,
    order,
    ends,
    starts,
    held,
    table,
    scale,
    gain,
    M,
    fan_in,
    out,
    updates,
    ranks,
    P,
    R,
    stride_xm,
    stride_dym,
    inner,
    parts,
    EARLY: tl.constexpr,
    APART: tl.constexpr,
    E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A block of ``da[part, ranks, in] = v_iᵀ x_i``, the first `inner` of them, or of
    ``db[part, ranks, out] = u_iᵀ dy_i``, over one of the parts of an update's rows. Where `APART`,
    db are ``s_i [out, r_i]`` of each, as their own gradients, from where each one's ranks start."""
    blocks = tl.num_programs(0) // (updates * parts)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // (blocks * updates)
    update = tl.program_id(0) // blocks % updates
    first, end = _part(
        ends=ends,
        M=M,
        experts=updates,
        expert=update,
        part=part,
        parts=parts,
        E=E,
        BLOCK_M=BLOCK_M,
    )
    start = tl.load(starts + update)
    r = tl.load(starts + update + 1) - start
    is_a = block < inner
    wide, thin, found = tl.where(is_a, x, dy), tl.where(is_a, v, u), tl.where(is_a, da, db)
    size, row = tl.where(is_a, fan_in, out), tl.where(is_a, stride_xm, stride_dym)
    offs_d = (block - tl.where(is_a, 0, inner)) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_m, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for m in range(first, end, BLOCK_M):
        mm = m + offs_m
        lying = _lying(order, mm, M, P)
        where = wide + lying[None, :] * row + offs_d[:, None]
        left = tl.load(where, mask=(mm[None, :] < end) & (offs_d[:, None] < size), other=0.0)
        where = thin + lying[:, None] * R + offs_r[None, :]
        right = tl.load(where, mask=(mm[:, None] < end) & (offs_r[None, :] < r), other=0.0)
        acc = tl.dot(left, right, acc)
    where = (
        found + (tl.cast(part * ranks + start, tl.int64) + offs_r[None, :]) * size + offs_d[:, None]
    )
    if EARLY:  # a product whose programs have all awaited the thin ones runs ahead, and ends first
        gdc_wait()
    if APART:
        if not is_a:
            acc *= _scaling(table, update, updates, scale, gain)
            r = tl.load(held + update)
            where = found + tl.cast(part * ranks + start, tl.int64) * size
            where = where + offs_d[:, None].to(tl.int64) * r + offs_r[None, :]
    tl.store(where, acc, mask=(offs_d[:, None] < size) & (offs_r[None, :] < r))
