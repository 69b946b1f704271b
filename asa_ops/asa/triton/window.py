"""The local block in Triton, forward: who survives in the window, and what these pairs add to the sum over neighbours.

Pairs of a window are few and scattered, so they are taken one offset at a time with plain float32 products. The tile
kernels know the mutual neighbours M only; here come the pairs that survive locally without being neighbours, and the
row is finished: parts summed, normalised, written in raster order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from ..types import Saved
from .arrange import Bits, Problem, RowFindings
from .tiles import SCALARS, bit_at, image_of, window_neighbour

LN_2 = tl.constexpr(0.6931471805599453)
UNROLL = tl.constexpr(3)  # offsets of the window at a time, so that their loads are under way together
MAX_HELD = 32


class Sums(NamedTuple):
    """Sums over neighbours in ``splits`` parts."""

    partial: Tensor | None  # [splits, zs * padded, Dv]
    total: Tensor | None  # [splits, zs, padded]
    splits: int


@triton.jit(do_not_specialize=SCALARS)
def _asa_window_kernel(
    q, k, order, place, beta, log_mean2, local, beta_stride_b, beta_stride_h, beta_stride_n,
    scale2, heads, per_image, n, padded, height, width,
    DIM: tl.constexpr, WINDOW: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log_mean2_i = log2 mean exp2 s2_ij over the window of i; local survivors s2_ij - log_mean2_i > log2 beta_i.

    HELD: so many scores a row are held until the mean is known; 0: they are formed again, so that a window of any size
    needs no memory.
    """
    blocks = padded // BLOCK
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image = image_of(z, heads, per_image)
    token = tl.load(order + image * padded + p)
    real = token >= 0
    d = tl.arange(0, DIM)
    q_i = tl.load(q + (z * padded + p)[:, None] * DIM + d[None, :]).to(tl.float32)
    m = tl.full([BLOCK], -float("inf"), tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    members = tl.zeros([BLOCK], tl.float32)
    first = tl.zeros([BLOCK], tl.int32)  # offset of the largest
    if HELD > 0:
        index = tl.arange(0, HELD)[None, :]
        scores = tl.full([BLOCK, HELD], -float("inf"), tl.float32)
    for offset in tl.range(WINDOW * WINDOW, loop_unroll_factor=UNROLL):
        other, inside = window_neighbour(token, offset, height, width, WINDOW)
        at = tl.load(place + image * n + other, mask=real & inside, other=-1)
        near = at >= 0
        k_j = tl.load(k + (z * padded + at)[:, None] * DIM + d[None, :], mask=near[:, None], other=0).to(tl.float32)
        s = tl.where(near, tl.sum(q_i * k_j, 1) * scale2, -float("inf"))
        first = tl.where(s > m, offset, first)
        m_new = tl.maximum(m, s)
        base = tl.where(m_new == -float("inf"), 0, m_new)
        summed = summed * tl.exp2(m - base) + tl.exp2(s - base)
        members += near.to(tl.float32)
        m = m_new
        if HELD > 0:
            scores = tl.where(index == offset, s[:, None], scores)
    mean2 = m + tl.log2(summed) - tl.log2(members)
    row = z * n + token
    tl.store(log_mean2 + row, mean2, mask=real)
    multiplier = beta + z // heads * beta_stride_b + z % heads * beta_stride_h + token.to(tl.int64) * beta_stride_n
    multiplier = tl.load(multiplier, mask=real, other=0).to(tl.float32)
    cut = tl.where(multiplier >= 0, tl.log2(multiplier), float("nan"))
    if HELD > 0:
        survives = scores - mean2[:, None] > cut[:, None]
        inside = real[:, None] & (index < WINDOW * WINDOW)
        tl.store(local + row[:, None] * (WINDOW * WINDOW) + index, survives, mask=inside)
    else:
        for offset in range(WINDOW * WINDOW):
            other, inside = window_neighbour(token, offset, height, width, WINDOW)
            at = tl.load(place + image * n + other, mask=real & inside, other=-1)
            near = at >= 0
            at_key = (z * padded + at)[:, None]
            k_j = tl.load(k + at_key * DIM + d[None, :], mask=near[:, None], other=0).to(tl.float32)
            # The largest must not miss a cut that it exceeds by its last bits.
            s = tl.where(offset == first, m, tl.sum(q_i * k_j, 1) * scale2)
            tl.store(local + row * (WINDOW * WINDOW) + offset, near & (s - mean2 > cut), mask=real)


@triton.jit(do_not_specialize=SCALARS)
def _asa_combine_kernel(
    partial, total, row_largest, row_count, row_broken, words, q, k, v, broken, order, place, key_counts, local,
    lse, alpha, beta, out, rest, lse_kept, base2, survivors,
    alpha_stride_b, alpha_stride_h, alpha_stride_n, beta_stride_b, beta_stride_h, beta_stride_n,
    words_stride, scale2, heads, zs, per_image, n, padded, height, width, dim_v,
    SPLITS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WINDOW: tl.constexpr, HAS_BITS: tl.constexpr,
    ONE_WAY_BITS: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_REST: tl.constexpr,
    FOR_BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Finish rows: the parts of the sum over neighbours, the local survivors beside them, output and statistics.

    ``rest`` is what rounding takes from the output, so that the backward can have it to more digits. Rows that are
    padding are not touched.
    """
    blocks = padded // BLOCK
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image = image_of(z, heads, per_image)
    token = tl.load(order + image * padded + p)
    real = token >= 0
    at_row = z * padded + p
    d_v = tl.arange(0, DIM_V)
    acc = tl.zeros([BLOCK, DIM_V], tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    if SPLITS > 0:
        for split in range(SPLITS):
            at = split * tl.cast(zs, tl.int64) * padded + at_row
            acc += tl.load(partial + at[:, None] * DIM_V + d_v[None, :])
            summed += tl.load(total + at)
    m = tl.load(row_largest + at_row)
    kept_count = tl.load(row_count + at_row)
    spoilt = tl.load(row_broken + at_row) != 0
    if WINDOW > 0:
        if HAS_BITS:
            words += z * words_stride
        d = tl.arange(0, DIM)
        q_i = tl.load(q + at_row[:, None] * DIM + d[None, :]).to(tl.float32)
        for offset in range(WINDOW * WINDOW):  # unrolled it needs so many registers that it is slower
            other, inside = window_neighbour(token, offset, height, width, WINDOW)
            flag = tl.load(local + (z * n + token) * (WINDOW * WINDOW) + offset, mask=real & inside, other=0) != 0
            at = tl.load(place + image * n + other, mask=flag, other=0)
            new = flag
            if HAS_BITS:
                neighbour = bit_at(words, p, at, padded, flag)
                if ONE_WAY_BITS:
                    neighbour &= bit_at(words, at, p, padded, flag)
                new = flag & (neighbour == 0)
            at_key = (z * padded + at)[:, None]
            k_j = tl.load(k + at_key * DIM + d[None, :], mask=new[:, None], other=0).to(tl.float32)
            s = tl.where(new, tl.sum(q_i * k_j, 1) * scale2, -float("inf"))
            m_new = tl.maximum(m, s)
            base = tl.where(m_new == -float("inf"), 0, m_new)
            shrink, weight = tl.exp2(m - base), tl.exp2(s - base)
            v_j = tl.load(v + at_key * DIM_V + d_v[None, :], mask=new[:, None], other=0)
            acc = acc * shrink[:, None] + weight[:, None] * v_j.to(tl.float32)
            summed = summed * shrink + weight
            bad = (tl.load(broken + z * (padded // 32) + at // 32, mask=new, other=0) >> (at % 32)) & 1
            spoilt |= bad != 0
            kept_count += new.to(tl.int32)
            m = m_new
    row = z * n + token
    row_lse = tl.load(lse + row, mask=real, other=0)
    empty = kept_count == 0
    summed = tl.where(empty, 1, summed)
    acc = tl.where(empty[:, None], 0, acc / summed[:, None])
    # A row of scores with NaN or +inf has no softmax, a negative threshold no logarithm.
    finite = tl.abs(row_lse) < float("inf")
    invalid = finite == 0
    if HAS_ALPHA:
        multiplier = alpha + z // heads * alpha_stride_b + z % heads * alpha_stride_h
        invalid |= (tl.load(multiplier + token.to(tl.int64) * alpha_stride_n, mask=real, other=0) >= 0) == 0
    if HAS_BETA:
        multiplier = beta + z // heads * beta_stride_b + z % heads * beta_stride_h
        invalid |= (tl.load(multiplier + token.to(tl.int64) * beta_stride_n, mask=real, other=0) >= 0) == 0
    invalid &= tl.load(key_counts + image) > 0
    acc = tl.where((spoilt | invalid)[:, None], float("nan"), acc)
    tl.store(lse_kept + row, tl.where(finite, (m + tl.log2(summed)) * LN_2, row_lse), mask=real)
    tl.store(survivors + row, kept_count, mask=real)
    rounded = acc.to(out.dtype.element_ty)
    at_out = row[:, None] * dim_v + d_v[None, :]
    there = real[:, None] & (d_v < dim_v)[None, :]
    tl.store(out + at_out, rounded, mask=there)
    if FOR_BACKWARD:
        tl.store(base2 + (3 * z + 1) * n + token, m, mask=real)
        tl.store(base2 + (3 * z + 2) * n + token, summed, mask=real)
    if HAS_REST:
        tl.store(rest + at_out, (acc - rounded.to(tl.float32)).to(rest.dtype.element_ty), mask=there)


def find_local_survivors(problem: Problem, saved: Saved) -> None:
    """Write log_mean and local of ``saved``."""
    rows, (height, width) = problem.rows, problem.options.grid
    held = triton.next_power_of_2(problem.window**2)
    triton_launch.launch(
        _asa_window_kernel, problem.row_programs(rows), problem.q, problem.k, rows.order, rows.place,
        problem.inputs.beta, saved.log_mean, saved.local.view(torch.uint8), *problem.strides[1], problem.scale2,
        problem.heads, problem.per_image, rows.n, rows.padded, height, width, DIM=problem.width, WINDOW=problem.window,
        HELD=held if held <= MAX_HELD else 0, BLOCK=problem.block, warps=problem.warps,
    )  # fmt: skip


def combine(problem: Problem, saved: Saved, bits: Bits, found: RowFindings, sums: Sums) -> None:
    """Write the output and its statistics to ``saved``."""
    rows, keys, (height, width) = problem.rows, problem.keys, problem.options.grid
    alpha, beta = problem.inputs.alpha, problem.inputs.beta
    triton_launch.launch(
        _asa_combine_kernel, problem.row_programs(rows), sums.partial, sums.total, *found, bits.words, problem.q,
        problem.k, problem.v, problem.broken, rows.order, rows.place, keys.counts, saved.local.view(torch.uint8),
        saved.lse, alpha, beta, saved.out, saved.rest, saved.lse_kept, saved.base2, saved.survivors,
        *problem.strides[0], *problem.strides[1], bits.stride, problem.scale2, problem.heads, problem.zs,
        problem.per_image, rows.n, rows.padded, height, width, problem.dim_v, SPLITS=sums.splits, DIM=problem.width,
        DIM_V=problem.width_v, WINDOW=problem.window, HAS_BITS=problem.has_bits, ONE_WAY_BITS=problem.one_way_bits,
        HAS_ALPHA=alpha is not None, HAS_BETA=beta is not None, HAS_REST=saved.rest.shape[-1] > 0,
        FOR_BACKWARD=saved.base2.shape[-1] > 0, BLOCK=problem.block, warps=problem.warps,
    )  # fmt: skip
