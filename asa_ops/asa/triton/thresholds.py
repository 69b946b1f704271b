"""Thresholds of rows, and the tiles that reach them.

``peaks[J, i]`` is the largest score (base 2, float16, rounded up) that query i gives to the 64 keys of block J. A tile
of 64 x 64 pairs is active if some row's peak exceeds that row's threshold; if neighbours must be mutual, in both
directions. Tiles that are left out hold no neighbour; tiles that are visited in vain cost time only.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from ...core.triton_launch import last_bits
from ..types import Saved
from .problem import LOG2_E, Peaks, PerHead, Problem, Tokens
from .scores import Statistics, kth_largest
from .tiles import LN_2, SCALARS, TileKernel, multiplier_of, of_head, own_block, own_rows


class Thresholds(NamedTuple):
    """In base 2 and arranged order, [n_heads, padded]: a pair is a neighbour if s2 - lse2 > cut2 and s2 >= kappa2."""

    lse2: Tensor | None
    cut2: Tensor | None  # inf at padding
    kappa2: Tensor | None  # None without topk
    flags: Tensor | None  # int8 [n_heads, row blocks, key blocks]: tiles that reach a threshold of their rows


NO_THRESHOLDS = Thresholds(None, None, None, None)


@triton.jit
def _lse_of_parts(statistics, at, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """The largest score of rows (0 without any) and lse, base 2. NaN scores are in the sum, not in the maximum."""
    m = tl.full([ROWS], -float("inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        m = tl.maximum(m, tl.load(statistics.largest + split * statistics.rows + at))
    m = tl.where(m == -float("inf"), 0, m)
    summed = tl.zeros([ROWS], tl.float32)
    for split in tl.static_range(SPLITS):
        part = tl.load(statistics.total + split * statistics.rows + at)
        weight = tl.exp2(tl.load(statistics.largest + split * statistics.rows + at) - m)
        summed += tl.where(part == 0, 0, part * weight)
    return m, m + tl.log2(summed)


@triton.jit
def thresholds_of_rows(
    statistics, lse, base2, alpha, kth, kappa, tokens, thresholds, z, p, writes,
    alpha_stride_b, alpha_stride_h, alpha_stride_n, heads, sharing, n, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """lse2, cut2 and kappa2 of rows, written if ``writes``; the last is ``kth`` or, without it, what was kept.

    SPLITS > 0: lse comes from the parts of the statistics and is written; 0: it is read from ``base2``.
    """
    at = z * tokens.rows.padded + p
    first = (tl.zeros([ROWS], tl.int32) + writes) != 0
    token = tl.load(tokens.rows.order + z // sharing * tokens.rows.padded + p).to(tl.int64)
    real = p < tl.load(tokens.rows.counts + z // sharing)
    if SPLITS > 0:
        m, row_lse2 = _lse_of_parts(statistics, at, SPLITS, ROWS)
        tl.store(lse + z * n + token, row_lse2 * LN_2, mask=real & first)
        if base2.numbers is not None:
            tl.store(of_head(base2, z) + token, row_lse2, mask=real & first)
    else:
        row_lse2 = tl.load(of_head(base2, z) + token, mask=real, other=0)
    cut = tl.full([ROWS], -float("inf"), tl.float32)
    smallest = tl.full([ROWS], -float("inf"), tl.float32)
    if thresholds.flags is not None:
        if alpha is None:
            row_lse2 = tl.zeros_like(row_lse2)  # the cut is -inf, which differences of huge scores may reach
        else:
            n_keys = tl.load(tokens.keys.counts + z // sharing)
            multiplier = multiplier_of(alpha, z, token, real, heads, alpha_stride_b, alpha_stride_h, alpha_stride_n)
            cut = tl.log2(multiplier) - tl.log2(n_keys.to(tl.float32))
            cut = tl.where(multiplier >= 0, cut, float("nan"))
        if kth is not None:
            smallest = kth
        elif thresholds.kappa2 is not None:
            smallest = tl.load(of_head(kappa, z) + token, mask=real, other=0)
        if SPLITS > 0:
            # Pairs are decided by scores that are formed again: the largest may not miss a threshold that it exceeds.
            above = m - row_lse2
            cut = tl.where(above > cut, tl.minimum(cut, above - last_bits(m)), cut)
            smallest = tl.minimum(smallest, m - last_bits(m))
        else:
            smallest -= 2 * last_bits(smallest)  # nor may a neighbour miss it here
        cut = tl.where(real, cut, float("inf"))
        tl.store(thresholds.lse2 + at, row_lse2, mask=first)
        tl.store(thresholds.cut2 + at, cut, mask=first)
        if thresholds.kappa2 is not None:
            tl.store(thresholds.kappa2 + at, smallest, mask=first)
    return row_lse2, cut, smallest


@triton.jit
def flag_tiles(
    peaks, flags, tokens, z, sharing, p, block, first, lse2, cut2, kappa2, LEARNING: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Flag which of BLOCK_J blocks of 64 keys, from ``first`` on, ROWS rows reach; ``block``: their first of 64.

    Extra tokens reach everybody and everybody reaches them; if LEARNING they reach nobody, since no threshold decides.
    """
    SUB: tl.constexpr = ROWS // 64
    j = first + tl.arange(0, BLOCK_J)
    n_keys = tl.load(tokens.keys.counts + z // sharing)
    padded, key_blocks = tokens.rows.padded, tokens.keys.padded // 64
    there = j * 64 < n_keys
    at_peak = peaks.peaks + z * peaks.stride + tl.cast(j, tl.int64)[None, :] * padded + p[:, None]
    peak = tl.load(at_peak, mask=there[None, :], other=-float("inf")).to(tl.float32)
    reached = ((peak - lse2[:, None]) > cut2[:, None]) & (peak >= kappa2[:, None])
    if tokens.keys.extra is not None:
        extra = (p < tl.load(tokens.rows.extra + z // sharing))[:, None]
        if LEARNING:
            reached &= extra == 0
        else:
            reached |= extra | (j * 64 < tl.load(tokens.keys.extra + z // sharing))[None, :]
    reached = tl.max(tl.reshape(reached.to(tl.int32), [SUB, 64, BLOCK_J]), 1) * there.to(tl.int32)[None, :]
    row = (tl.cast(block, tl.int64) + tl.arange(0, SUB)) * key_blocks  # of all heads
    tl.store(flags + row[:, None] + j[None, :], reached.to(tl.int8), mask=(j < key_blocks)[None, :])


@triton.jit(do_not_specialize=SCALARS)
def _asa_flags_kernel(
    statistics, lse, base2, alpha, tokens, peaks, thresholds, alpha_stride_b, alpha_stride_h, alpha_stride_n,
    heads, sharing, n, band2, SPLITS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """lse and thresholds of 64 rows, and which blocks of 64 keys they reach within ``band2`` (base 2).

    Axis 1 of the grid: BLOCK_J blocks of keys each; the first writes what is one number a row.
    """
    padded = tokens.rows.padded
    z, p = own_rows(padded, 64)
    lse2, cut2, kappa2 = thresholds_of_rows(
        statistics, lse, base2, alpha, None, None, tokens, thresholds, z, p, tl.program_id(1) == 0,
        alpha_stride_b, alpha_stride_h, alpha_stride_n, heads, sharing, n, SPLITS, 64,
    )  # fmt: skip
    if thresholds.flags is not None:
        flag_tiles(peaks, thresholds.flags, tokens, z, sharing, p, tl.program_id(0), tl.program_id(1) * BLOCK_J, lse2,
                   cut2 - band2, kappa2, False, 64, BLOCK_J)  # fmt: skip


@triton.jit(do_not_specialize=SCALARS)
def _asa_topk_kernel(
    q, k, statistics, lse, base2, alpha, kappa, tokens, peaks, thresholds,
    alpha_stride_b, alpha_stride_h, alpha_stride_n, scale2, topk, heads, sharing, n, band2,
    SCORES, CUTS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The k-th largest score of rows, kept as kappa; with it their thresholds and flags, as in the kernel above."""
    BLOCK_M: tl.constexpr = SCORES.BLOCK_M
    padded, key_padded = tokens.rows.padded, tokens.keys.padded
    z, i0 = own_block(padded, BLOCK_M)
    n_keys = tl.load(tokens.keys.counts + z // sharing)
    p = i0 + tl.arange(0, BLOCK_M)
    real = p < tl.load(tokens.rows.counts + z // sharing)
    kth = kth_largest(q, k, tokens, z, i0, real, n_keys, scale2, topk, CUTS, SCORES)
    z = z.to(tl.int64)
    token = tl.load(tokens.rows.order + z // sharing * padded + p, mask=real, other=0)
    tl.store(of_head(kappa, z) + token, kth, mask=real)
    lse2, cut2, kappa2 = thresholds_of_rows(
        statistics, lse, base2, alpha, tl.where(real, kth, 0), None, tokens, thresholds, z, p, True,
        alpha_stride_b, alpha_stride_h, alpha_stride_n, heads, sharing, n, SPLITS, BLOCK_M,
    )  # fmt: skip
    for first in range(0, key_padded // 64, BLOCK_J):
        flag_tiles(peaks, thresholds.flags, tokens, z, sharing, p, tl.program_id(0) * (BLOCK_M // 64), first, lse2,
                   cut2 - band2, kappa2, False, BLOCK_M, BLOCK_J)  # fmt: skip


def new_thresholds(problem: Problem) -> Thresholds:
    """Allocate thresholds and flags, if there are any."""
    if not problem.has_bits:
        return NO_THRESHOLDS
    lse2, cut2 = (problem.new(problem.n_heads, problem.padded) for _ in range(2))
    kappa2 = problem.new(problem.n_heads, problem.padded) if problem.has_topk else None
    return Thresholds(lse2, cut2, kappa2, problem.new_flags())


def find_thresholds(
    problem: Problem, tokens: Tokens, saved: Saved, peaks: Peaks, statistics: Statistics, band: float
) -> Thresholds:
    """Find thresholds and the tiles that reach them, or come within ``band`` of them; write lse and kappa of saved."""
    alpha, thresholds = problem.inputs.alpha, new_thresholds(problem)
    base2, strides = PerHead.of(saved.base2), problem.strides(alpha)
    cut = {"SPLITS": statistics.splits, "BLOCK_J": 32}
    if problem.has_topk:
        kernel = TileKernel(problem, tokens, "topk")
        kernel.launch(
            _asa_topk_kernel, (kernel.programs,), "q k", statistics, saved.lse, base2, alpha, PerHead.of(saved.kappa),
            tokens, peaks, thresholds, *strides, problem.scale2, problem.options.topk, problem.heads, problem.sharing,
            problem.n, band * LOG2_E, CUTS=8, **cut,
        )  # fmt: skip
    else:
        chunks = triton.cdiv(tokens.keys.padded // 64, 32) if problem.has_bits else 1
        triton_launch.launch(
            _asa_flags_kernel, (problem.n_heads * (tokens.rows.padded // 64), chunks), statistics, saved.lse, base2,
            alpha, tokens, peaks, thresholds, *strides, problem.heads, problem.sharing, problem.n, band * LOG2_E, **cut,
        )  # fmt: skip
    return thresholds
