"""The local block in Triton, backward: gradients through pairs that survive in the window only, thresholds included.

As in the forward, pairs of the window are taken one offset at a time. Rows and columns are finished here: the parts of
the tile kernels summed, what the window adds, all written in raster order. A head in which an output row is NaN gets
NaN gradients.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from ..types import Saved
from .arrange import Bits, Problem, RowGradients
from .plan import Thresholds
from .tiles import (
    SCALARS,
    admission_weight,
    bit_at,
    exponential,
    image_of,
    shrink_of,
    step_derivative,
    window_neighbour,
)
from .window import UNROLL

LN_2 = tl.constexpr(0.6931471805599453)


class Parts(NamedTuple):
    """A sum over neighbours in ``splits`` parts, [splits, ...]."""

    partial: Tensor | None
    splits: int


NO_PARTS = Parts(None, 0)


@triton.jit
def _sum_of_parts(partial, at, zs, padded, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, WIDTH)
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    if SPLITS > 0:
        for split in range(SPLITS):
            acc += tl.load(partial + (split * tl.cast(zs, tl.int64) * padded + at)[:, None] * WIDTH + d[None, :])
    return acc


@triton.jit
def _flag_at(local, row, offset, valid, WINDOW: tl.constexpr):
    return tl.load(local + row * (WINDOW * WINDOW) + offset, mask=valid, other=0) != 0


@triton.jit(do_not_specialize=SCALARS)
def _asa_settle_delta_kernel(
    partial, q, k, v, do, words, top, share, delta, order, place, local,
    words_stride, scale2, heads, zs, per_image, n, padded, height, width,
    SPLITS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WINDOW: tl.constexpr, HAS_BITS: tl.constexpr,
    ONE_WAY_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to delta what is missing until sum_j p_ij (<do_i, v_j> - delta_i) is 0, neighbours' parts given.

    delta comes from the output; its rounding reaches every pair of a row with the same sign. In float32 that is the
    largest error of the gradients where many survive, in half precisions it is below the rounding of the weights.
    """
    blocks = padded // BLOCK
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at_row = z * padded + p
    delta_i = tl.load(delta + at_row)
    missing = tl.zeros([BLOCK], tl.float32)
    if SPLITS > 0:
        for split in range(SPLITS):
            missing += tl.load(partial + split * tl.cast(zs, tl.int64) * padded + at_row)
    if WINDOW > 0:
        if HAS_BITS:
            words += z * words_stride
        image = image_of(z, heads, per_image)
        token = tl.load(order + image * padded + p)
        real = token >= 0
        d, d_v = tl.arange(0, DIM), tl.arange(0, DIM_V)
        q_i = tl.load(q + at_row[:, None] * DIM + d[None, :]).to(tl.float32)
        do_i = tl.load(do + at_row[:, None] * DIM_V + d_v[None, :]).to(tl.float32)
        top_i, share_i = tl.load(top + at_row), tl.load(share + at_row)
        for offset in tl.range(WINDOW * WINDOW, loop_unroll_factor=UNROLL):
            other, inside = window_neighbour(token, offset, height, width, WINDOW)
            new = _flag_at(local, z * n + token, offset, real & inside, WINDOW)
            at = tl.load(place + image * n + other, mask=new, other=0)
            if HAS_BITS:
                neighbour = bit_at(words, p, at, padded, new)
                if ONE_WAY_BITS:
                    neighbour &= bit_at(words, at, p, padded, new)
                new &= neighbour == 0
            at_key = z * padded + at
            k_j = tl.load(k + at_key[:, None] * DIM + d[None, :], mask=new[:, None], other=0).to(tl.float32)
            v_j = tl.load(v + at_key[:, None] * DIM_V + d_v[None, :], mask=new[:, None], other=0).to(tl.float32)
            weight = exponential(tl.sum(q_i * k_j, 1) * scale2 - top_i, new) * share_i
            missing += tl.where(new, weight * (tl.sum(do_i * v_j, 1) - delta_i), 0)
    tl.store(delta + at_row, delta_i + missing)


@triton.jit(do_not_specialize=SCALARS)
def _asa_finish_rows_kernel(
    partial, partial_t, q, k, v, do, words, lse2, cut2, kappa2, top, share, lse_kept2, delta, poisoned, bounds, order,
    place, local, log_mean2, alpha, beta, dq, dalpha, dbeta,
    alpha_stride_b, alpha_stride_h, alpha_stride_n, beta_stride_b, beta_stride_h, beta_stride_n,
    words_stride, scale, scale2, band, heads, zs, per_image, n, padded, height, width, dim,
    SPLITS: tl.constexpr, T_SPLITS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WINDOW: tl.constexpr,
    HAS_BITS: tl.constexpr, ONE_WAY_BITS: tl.constexpr, MUTUAL: tl.constexpr, HAS_TOPK: tl.constexpr,
    LEARN_ALPHA: tl.constexpr, LEARN_BETA: tl.constexpr, SHRINK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dq, dalpha and dbeta of BLOCK rows."""
    blocks = padded // BLOCK
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image = image_of(z, heads, per_image)
    token = tl.load(order + image * padded + p)
    real = token >= 0
    row = z * n + token
    at_row = z * padded + p
    d, d_v = tl.arange(0, DIM), tl.arange(0, DIM_V)
    acc = _sum_of_parts(partial, at_row, zs, padded, DIM, SPLITS, BLOCK) / shrink_of(bounds, z, zs, SHRINK)
    if LEARN_ALPHA:
        dt = tl.zeros([BLOCK], tl.float32)  # -dl/dt
        if T_SPLITS > 0:
            for split in range(T_SPLITS):
                dt += tl.load(partial_t + split * tl.cast(zs, tl.int64) * padded + at_row)
    if WINDOW > 0:
        if HAS_BITS:
            words += z * words_stride
        q_i = tl.load(q + at_row[:, None] * DIM + d[None, :]).to(tl.float32)
        do_i = tl.load(do + at_row[:, None] * DIM_V + d_v[None, :]).to(tl.float32)
        top_i, share_i, delta_i = tl.load(top + at_row), tl.load(share + at_row), tl.load(delta + at_row)
        if LEARN_BETA:
            multiplier = beta + z // heads * beta_stride_b + z % heads * beta_stride_h
            multiplier = tl.load(multiplier + token.to(tl.int64) * beta_stride_n, mask=real, other=0).to(tl.float32)
            mean_i, cut_u = tl.load(log_mean2 + row, mask=real, other=0), tl.log2(multiplier)
            du = tl.zeros([BLOCK], tl.float32)  # -dl/du
        for offset in tl.range(WINDOW * WINDOW, loop_unroll_factor=UNROLL):
            other, inside = window_neighbour(token, offset, height, width, WINDOW)
            at = tl.load(place + image * n + other, mask=real & inside, other=-1)
            near = at >= 0
            at = tl.where(near, at, 0)
            survives = _flag_at(local, row, offset, near, WINDOW)
            neighbour = near & False
            if HAS_BITS:
                one_way = bit_at(words, p, at, padded, near)
                neighbour = one_way
                if ONE_WAY_BITS:
                    other_way = bit_at(words, at, p, padded, near)
                    neighbour = one_way & other_way
            if LEARN_ALPHA or LEARN_BETA:
                used = near
            else:
                used = survives & (neighbour == 0)
            at_key = z * padded + at
            k_j = tl.load(k + at_key[:, None] * DIM + d[None, :], mask=used[:, None], other=0).to(tl.float32)
            v_j = tl.load(v + at_key[:, None] * DIM_V + d_v[None, :], mask=used[:, None], other=0).to(tl.float32)
            s = tl.sum(q_i * k_j, 1)
            dp = tl.sum(do_i * v_j, 1) - delta_i
            new = survives & (neighbour == 0)
            ds = tl.where(new, exponential(s * scale2 - top_i, new) * share_i * dp, 0)
            acc += ds[:, None] * k_j
            if LEARN_ALPHA or LEARN_BETA:
                kept_i = tl.load(lse_kept2 + at_row)
                offer = admission_weight(s * scale2 - kept_i, survives | neighbour, kept_i == -float("inf")) * dp
            if LEARN_BETA:
                # In the forward's terms: a score that is its window's mean is so here too, to the last bit.
                step = step_derivative(((s * scale2 - mean_i) - cut_u) * LN_2, band)
                du += tl.where(near & (neighbour == 0) & (step > 0), step * offer, 0)
            if LEARN_ALPHA:
                lse_i, cut_i = tl.load(lse2 + at_row), tl.load(cut2 + at_row)
                step = step_derivative(((s * scale2 - lse_i) - cut_i) * LN_2, band)
                counts = near & (step > 0)
                if HAS_TOPK:
                    counts &= s * scale2 >= tl.load(kappa2 + at_row)
                offer = tl.where(survives, 0, offer)
                if MUTUAL:
                    counts &= other_way
                    back_survives = _flag_at(local, z * n + other, WINDOW * WINDOW - 1 - offset, near, WINDOW)
                    k_i = tl.load(k + at_row[:, None] * DIM + d[None, :]).to(tl.float32)
                    q_j = tl.load(q + at_key[:, None] * DIM + d[None, :], mask=near[:, None], other=0).to(tl.float32)
                    back = tl.sum(k_i * q_j, 1)
                    v_i = tl.load(v + at_row[:, None] * DIM_V + d_v[None, :]).to(tl.float32)
                    do_j = tl.load(do + at_key[:, None] * DIM_V + d_v[None, :], mask=near[:, None], other=0)
                    dp_back = tl.sum(v_i * do_j.to(tl.float32), 1) - tl.load(delta + at_key)
                    kept_j = tl.load(lse_kept2 + at_key)
                    weight = admission_weight(back * scale2 - kept_j, neighbour, kept_j == -float("inf"))
                    offer += tl.where(back_survives, 0, weight * dp_back)
                dt += tl.where(counts, step * offer, 0)
    bad = tl.load(poisoned + z) != 0
    acc = tl.where(bad, float("nan"), acc * scale)
    there = real[:, None] & (d < dim)[None, :]
    tl.store(dq + row[:, None] * dim + d[None, :], acc.to(dq.dtype.element_ty), mask=there)
    if LEARN_ALPHA:
        multiplier = alpha + z // heads * alpha_stride_b + z % heads * alpha_stride_h
        multiplier = tl.load(multiplier + token.to(tl.int64) * alpha_stride_n, mask=real, other=0).to(tl.float32)
        dt = tl.where(multiplier == 0, 0, -dt / tl.where(multiplier == 0, 1, multiplier))
        tl.store(dalpha + row, tl.where(bad, float("nan"), dt), mask=real)
    if LEARN_BETA:
        multiplier = beta + z // heads * beta_stride_b + z % heads * beta_stride_h
        multiplier = tl.load(multiplier + token.to(tl.int64) * beta_stride_n, mask=real, other=0).to(tl.float32)
        du = tl.where(multiplier == 0, 0, -du / tl.where(multiplier == 0, 1, multiplier))
        tl.store(dbeta + row, tl.where(bad, float("nan"), du), mask=real)


@triton.jit(do_not_specialize=SCALARS)
def _asa_finish_columns_kernel(
    partial_k, partial_v, q, k, v, do, words, top, share, delta, poisoned, bounds, order, place, local, dk, dv,
    words_stride, scale, scale2, heads, zs, per_image, n, padded, height, width, dim, dim_v,
    SPLITS_K: tl.constexpr, SPLITS_V: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WINDOW: tl.constexpr,
    HAS_BITS: tl.constexpr, ONE_WAY_BITS: tl.constexpr, SHRINK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK keys; in the window of a key are the queries whose windows hold it."""
    blocks = padded // BLOCK
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image = image_of(z, heads, per_image)
    token = tl.load(order + image * padded + p)
    real = token >= 0
    row = z * n + token
    at_key = z * padded + p
    d, d_v = tl.arange(0, DIM), tl.arange(0, DIM_V)
    acc_k = _sum_of_parts(partial_k, at_key, zs, padded, DIM, SPLITS_K, BLOCK) / shrink_of(bounds, z, zs, SHRINK)
    acc_v = _sum_of_parts(partial_v, at_key, zs, padded, DIM_V, SPLITS_V, BLOCK)
    if WINDOW > 0:
        if HAS_BITS:
            words += z * words_stride
        k_j = tl.load(k + at_key[:, None] * DIM + d[None, :]).to(tl.float32)
        v_j = tl.load(v + at_key[:, None] * DIM_V + d_v[None, :]).to(tl.float32)
        for offset in range(WINDOW * WINDOW):
            other, inside = window_neighbour(token, offset, height, width, WINDOW)
            at = tl.load(place + image * n + other, mask=real & inside, other=-1)
            near = at >= 0
            at = tl.where(near, at, 0)
            new = _flag_at(local, z * n + other, WINDOW * WINDOW - 1 - offset, near, WINDOW)
            if HAS_BITS:
                neighbour = bit_at(words, at, p, padded, new)
                if ONE_WAY_BITS:
                    neighbour &= bit_at(words, p, at, padded, new)
                new &= neighbour == 0
            at_row = z * padded + at
            q_i = tl.load(q + at_row[:, None] * DIM + d[None, :], mask=new[:, None], other=0).to(tl.float32)
            do_i = tl.load(do + at_row[:, None] * DIM_V + d_v[None, :], mask=new[:, None], other=0).to(tl.float32)
            gap = tl.sum(q_i * k_j, 1) * scale2 - tl.load(top + at_row)
            weight = exponential(gap, new) * tl.load(share + at_row)
            ds = tl.where(new, weight * (tl.sum(do_i * v_j, 1) - tl.load(delta + at_row)), 0)
            acc_k += ds[:, None] * q_i
            acc_v += weight[:, None] * do_i
    bad = tl.load(poisoned + z) != 0
    acc_k = tl.where(bad, float("nan"), acc_k * scale)
    acc_v = tl.where(bad, float("nan"), acc_v)
    there = real[:, None] & (d < dim)[None, :]
    tl.store(dk + row[:, None] * dim + d[None, :], acc_k.to(dk.dtype.element_ty), mask=there)
    there = real[:, None] & (d_v < dim_v)[None, :]
    tl.store(dv + row[:, None] * dim_v + d_v[None, :], acc_v.to(dv.dtype.element_ty), mask=there)


def _window_arguments(problem: Problem, saved: Saved) -> tuple:
    """Where rows stand and who survives locally."""
    return problem.rows.order, problem.rows.place, saved.local.view(torch.uint8)


def settle_delta(problem: Problem, saved: Saved, bits: Bits, row: RowGradients, residual: Parts) -> None:
    """Correct delta in place by what it misses over neighbours, ``residual``, and over local survivors."""
    rows, (height, width) = problem.rows, problem.options.grid
    triton_launch.launch(
        _asa_settle_delta_kernel, problem.row_programs(rows), residual.partial, problem.q, problem.k, problem.v,
        problem.do, bits.words, row.top, row.share, row.delta, *_window_arguments(problem, saved), bits.stride,
        problem.scale2, problem.heads, problem.zs, problem.per_image, rows.n, rows.padded, height, width,
        SPLITS=residual.splits, DIM=problem.width, DIM_V=problem.width_v, WINDOW=problem.window,
        HAS_BITS=problem.has_bits, ONE_WAY_BITS=problem.one_way_bits, BLOCK=problem.block, warps=problem.warps,
    )  # fmt: skip


def finish_rows(
    problem: Problem, saved: Saved, bits: Bits, row: RowGradients, thresholds: Thresholds | None, band: float | None,
    sums_q: Parts, sums_t: Parts, dq: Tensor, dalpha: Tensor | None, dbeta: Tensor | None,
) -> None:  # fmt: skip
    """Write dq, and dalpha and dbeta where they are asked for."""
    rows, (height, width) = problem.rows, problem.options.grid
    lse2, cut2, kappa2, _ = thresholds or (None,) * 4
    triton_launch.launch(
        _asa_finish_rows_kernel, problem.row_programs(rows), sums_q.partial, sums_t.partial, problem.q, problem.k,
        problem.v, problem.do, bits.words, lse2, cut2, kappa2, row.top, row.share, row.lse_kept2, row.delta,
        row.poisoned, problem.bounds, *_window_arguments(problem, saved), saved.log_mean, problem.inputs.alpha,
        problem.inputs.beta, dq, dalpha, dbeta, *problem.strides[0], *problem.strides[1], bits.stride, problem.scale,
        problem.scale2, band or 1.0, problem.heads, problem.zs, problem.per_image, rows.n, rows.padded, height, width,
        problem.dim, SPLITS=sums_q.splits, T_SPLITS=sums_t.splits, DIM=problem.width, DIM_V=problem.width_v,
        WINDOW=problem.window, HAS_BITS=problem.has_bits, ONE_WAY_BITS=problem.one_way_bits, MUTUAL=problem.mutual,
        HAS_TOPK=problem.has_topk, LEARN_ALPHA=dalpha is not None, LEARN_BETA=dbeta is not None,
        SHRINK=problem.bounds is not None, BLOCK=problem.block, warps=problem.warps, registers=255,
    )  # fmt: skip


def finish_columns(
    problem: Problem, saved: Saved, bits: Bits, row: RowGradients, sums_k: Parts, sums_v: Parts, dk: Tensor, dv: Tensor
) -> None:
    """Write dk and dv."""
    keys, (height, width) = problem.keys, problem.options.grid
    triton_launch.launch(
        _asa_finish_columns_kernel, problem.row_programs(keys), sums_k.partial, sums_v.partial, problem.q, problem.k,
        problem.v, problem.do, bits.words, row.top, row.share, row.delta, row.poisoned, problem.bounds, keys.order,
        keys.place, saved.local.view(torch.uint8), dk, dv, bits.stride, problem.scale, problem.scale2, problem.heads,
        problem.zs, problem.per_image, keys.n, keys.padded, height, width, problem.dim, problem.dim_v,
        SPLITS_K=sums_k.splits, SPLITS_V=sums_v.splits, DIM=problem.width, DIM_V=problem.width_v,
        WINDOW=problem.window, HAS_BITS=problem.has_bits, ONE_WAY_BITS=problem.one_way_bits,
        SHRINK=problem.bounds is not None, BLOCK=problem.block, warps=problem.warps,
    )  # fmt: skip
