"""Every score once: lse and block maxima of rows; and the k-th largest score, from as many more sweeps as it takes.

Scores are in base 2, s2_ij = log2(e) * scale * <q_i, k_j>, and never stored.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .problem import Peaks, Problem, Tokens
from .tiles import SCALARS, TileKernel, load_whole, own_block, product


class Statistics(NamedTuple):
    """Maximum and sum of exponentials of every row over each of some parts of the keys, [splits, n_heads, padded]."""

    largest: Tensor | None
    total: Tensor | None
    rows: int  # from part to part: n_heads * padded

    @property
    def splits(self) -> int:
        return 0 if self.largest is None else self.largest.shape[0]


NO_STATISTICS = Statistics(None, None, 0)


@triton.jit
def _add_scores(
    s, m, summed, peaks, j0, rows, padded, n_keys, scale2, NEGATIVE: tl.constexpr, MASKED: tl.constexpr, SCORES,
):  # fmt: skip
    """Take a block of products into the running maximum and sum of exponentials of its rows; store its peaks.

    ``scale2`` >= 0 and products change sign if NEGATIVE, so the largest score is that of the largest product. MASKED:
    the block reaches beyond the keys.

    The fused multiply-add subtracts a rounded maximum from an unrounded score: where scores are so large that half of
    their last place counts, exponentials of <= 0 come out as anything. Bounds on their sum keep the error within that
    half: here at most BLOCK_N, and at least 1 in the end.
    """
    SUB: tl.constexpr = SCORES.BLOCK_N // 64
    if NEGATIVE:
        s = -s
    if MASKED:
        there = ((j0 + tl.arange(0, SCORES.BLOCK_N)) < n_keys)[None, :]
        s = tl.where(there, s, -float("inf"))
    if peaks is not None:
        peak = tl.max(tl.reshape(s, [SCORES.BLOCK_M, SUB, 64]), 2)
        peak = tl.where(peak == -float("inf"), peak, peak * scale2)
        # More than rounding to float16 takes, in its range at the lower end: never below the score.
        above = tl.maximum(peak + tl.abs(peak) * 0.001 + 1e-6, -65504.0)
        block = tl.cast(j0 // 64, tl.int64) + tl.arange(0, SUB)
        tl.store(peaks + block[None, :] * padded + rows[:, None], above.to(tl.float16))
        m_new = tl.maximum(m, tl.max(peak, 1))
    else:
        largest = tl.max(s, 1)
        m_new = tl.maximum(m, tl.where(largest == -float("inf"), largest, largest * scale2))
    base = tl.where(m_new == -float("inf"), 0, m_new)
    p = tl.exp2(tl.fma(s, scale2, -base[:, None]))
    if MASKED:
        p = tl.where(there, p, 0)
    added = tl.minimum(tl.sum(p, 1), SCORES.BLOCK_N, propagate_nan=tl.PropagateNan.ALL)
    return m_new, summed * tl.exp2(m - base) + added


@triton.jit(do_not_specialize=SCALARS)
def _asa_statistics_kernel(q, k, tokens, statistics, peaks, scale2, sharing, SCORES, NEGATIVE: tl.constexpr):
    """Every score once: maximum and sum of exponentials of rows over every n-th block of keys, and peaks.

    Axis 1 of the grid: which of n.
    """
    padded = tokens.rows.padded
    z, i0 = own_block(padded, SCORES.BLOCK_M)
    split, splits = tl.program_id(1), tl.num_programs(1)
    n_keys = tl.load(tokens.keys.counts + z // sharing)
    rows = i0 + tl.arange(0, SCORES.BLOCK_M)
    m = tl.full([SCORES.BLOCK_M], -float("inf"), tl.float32)
    summed = tl.zeros([SCORES.BLOCK_M], tl.float32)
    q_row = z * padded + i0
    q_whole = load_whole(q, q_row, SCORES.BLOCK_M, SCORES)
    peaks_of_head = peaks.peaks
    if peaks_of_head is not None:
        peaks_of_head += z.to(tl.int64) * peaks.stride
    BLOCK_N: tl.constexpr = SCORES.BLOCK_N
    whole = n_keys // BLOCK_N
    for j0 in range(split * BLOCK_N, whole * BLOCK_N, splits * BLOCK_N):
        k_row = z * tokens.keys.padded + j0
        k_whole = load_whole(k, k_row, BLOCK_N, SCORES)
        s = product(q, q_whole, q_row, k, k_whole, k_row, SCORES)
        m, summed = _add_scores(s, m, summed, peaks_of_head, j0, rows, padded, n_keys, scale2, NEGATIVE, False, SCORES)
    if whole * BLOCK_N < n_keys and whole % splits == split:  # the last block, which is not full
        j0 = whole * BLOCK_N
        k_row = z * tokens.keys.padded + j0
        k_whole = load_whole(k, k_row, BLOCK_N, SCORES)
        s = product(q, q_whole, q_row, k, k_whole, k_row, SCORES)
        m, summed = _add_scores(s, m, summed, peaks_of_head, j0, rows, padded, n_keys, scale2, NEGATIVE, True, SCORES)
    summed = tl.where(m == -float("inf"), summed, tl.maximum(summed, 1, propagate_nan=tl.PropagateNan.ALL))
    at = tl.cast(split, tl.int64) * statistics.rows + z.to(tl.int64) * padded + rows
    tl.store(statistics.largest + at, m)
    tl.store(statistics.total + at, summed)


def find_statistics(problem: Problem, tokens: Tokens, peaks: Peaks) -> Statistics:
    """Return maximum and sum of exponentials of every row in parts; write the peaks."""
    kernel = TileKernel(problem, tokens, "statistics")
    splits = kernel.splits(limit=min(8, tokens.keys.padded // kernel.config.block_n))
    rows = problem.n_heads * tokens.rows.padded
    largest, total = (problem.new(splits, problem.n_heads, tokens.rows.padded) for _ in range(2))
    statistics = Statistics(largest, total, rows)
    kernel.launch(
        _asa_statistics_kernel, (kernel.programs, splits), "q k", tokens,
        statistics, peaks, abs(problem.scale2), problem.sharing, NEGATIVE=problem.scale2 < 0,
    )  # fmt: skip
    return statistics


@triton.jit
def _from_ordered(x):
    """The float that an integer stands for, in the order of whose bits floats are."""
    return (x ^ ((x >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _count_scores(q, q_whole, q_row, k, k_row, values, n_keys, scale2, CUTS: tl.constexpr, SCORES):
    """How many scores of every row reach each of its CUTS ``values``."""
    counted = tl.zeros([SCORES.BLOCK_M, CUTS], tl.int32)
    cut_index = tl.arange(0, CUTS)[None, :]
    for j0 in range(0, n_keys, SCORES.BLOCK_N):
        k_whole = load_whole(k, k_row + j0, SCORES.BLOCK_N, SCORES)
        s = product(q, q_whole, q_row, k, k_whole, k_row + j0, SCORES) * scale2
        s = tl.where((j0 + tl.arange(0, SCORES.BLOCK_N))[None, :] < n_keys, s, float("nan"))
        for c in tl.static_range(CUTS):
            cut = tl.sum(tl.where(cut_index == c, values, 0), 1)
            hits = tl.sum((s >= cut[:, None]).to(tl.int32), 1)
            counted += tl.where(cut_index == c, hits[:, None], 0)
    return counted


@triton.jit
def _around(q, q_whole, q_row, k, k_row, floor, n_keys, scale2, SCORES):
    """The smallest score of every row from ``floor`` on (inf if none), and the largest below it."""
    above = tl.full([SCORES.BLOCK_M], float("inf"), tl.float32)
    below = tl.full([SCORES.BLOCK_M], -float("inf"), tl.float32)
    for j0 in range(0, n_keys, SCORES.BLOCK_N):
        k_whole = load_whole(k, k_row + j0, SCORES.BLOCK_N, SCORES)
        s = product(q, q_whole, q_row, k, k_whole, k_row + j0, SCORES) * scale2
        there = (j0 + tl.arange(0, SCORES.BLOCK_N))[None, :] < n_keys
        reaches = s >= floor[:, None]
        above = tl.minimum(above, tl.min(tl.where(there & reaches, s, float("inf")), 1))
        below = tl.maximum(below, tl.max(tl.where(there & (reaches == 0), s, -float("inf")), 1))
    return above, below


@triton.jit
def kth_largest(q, k, tokens, z, i0, real, n_keys, scale2, topk, CUTS: tl.constexpr, SCORES):
    """A threshold between the ``topk``-th largest score of ``real`` rows and the next smaller one, exactly.

    The bits of a float, as an integer, order as it does: every sweep over the keys counts how many scores reach each of
    CUTS values that divide the interval known to hold the k-th largest, until exactly topk scores reach its lower end
    or it holds a single value. The last sweep finds the two neighbours of the gap; any threshold between them selects
    the same scores, however a later product rounds.
    """
    q_row, k_row = z * tokens.rows.padded + i0, z * tokens.keys.padded
    q_whole = load_whole(q, q_row, SCORES.BLOCK_M, SCORES)
    # low: at least topk scores reach it (-inf: all do). high: fewer do.
    low = tl.full([SCORES.BLOCK_M], -0x7F800001, tl.int32)
    high = tl.full([SCORES.BLOCK_M], 0x7F800001, tl.int32)
    reached = tl.zeros([SCORES.BLOCK_M], tl.int32) + n_keys
    open_rows = tl.max((real & (reached > topk)).to(tl.int32), 0)
    while open_rows != 0:
        # In int64: the interval is wider than an int32 holds.
        step = (high.to(tl.int64) - low.to(tl.int64) + CUTS) // (CUTS + 1)
        cuts = low.to(tl.int64)[:, None] + step[:, None] * (1 + tl.arange(0, CUTS))[None, :]
        cuts = tl.minimum(cuts, high.to(tl.int64)[:, None]).to(tl.int32)
        counted = _count_scores(q, q_whole, q_row, k, k_row, _from_ordered(cuts), n_keys, scale2, CUTS, SCORES)
        enough = counted >= topk
        low = tl.maximum(low, tl.max(tl.where(enough, cuts, -0x7F800001), 1))
        reached = tl.minimum(reached, tl.min(tl.where(enough, counted, 0x7FFFFFFF), 1))
        high = tl.minimum(high, tl.min(tl.where(enough, 0x7F800001, cuts), 1))
        width = high.to(tl.int64) - low.to(tl.int64)
        open_rows = tl.max((real & (reached > topk) & (width > 1)).to(tl.int32), 0)
    floor = _from_ordered(low)
    kth, following = _around(q, q_whole, q_row, k, k_row, floor, n_keys, scale2, SCORES)
    kth = tl.where(kth == float("inf"), floor, kth)  # formed again, those that had reached the floor may all miss it
    middle = following + (kth - following) * 0.5
    threshold = tl.where((middle > following) & (middle < kth), middle, kth)
    return tl.where((n_keys <= topk) | (reached == n_keys), -float("inf"), threshold)
