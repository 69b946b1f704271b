"""The k-th largest score of every row, exactly, in Triton."""

import triton
import triton.language as tl

from ...core import triton_launch
from ..types import Saved
from .arrange import Problem
from .tiles import SCALARS, image_of, load_whole, product


@triton.jit
def _from_ordered(x):
    """The float that an integer stands for, in the order of whose bits floats are."""
    return (x ^ ((x >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=SCALARS)
def _asa_topk_kernel(
    q, k, order, counts, key_counts, kappa, scale2, topk, heads, per_image, n, padded, key_padded,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    """A threshold between the ``topk``-th largest score of every row and the next smaller one, exactly, for any topk.

    Scores are never stored. The bits of a float, as an integer, order as it does: every sweep over the keys counts how
    many scores reach each of CUTS values that divide the interval known to hold the k-th largest, until exactly topk
    scores reach its lower end or it holds a single value. The last sweep finds the two neighbours of the gap; any
    threshold between them selects the same scores, however a later product rounds.
    """
    blocks = padded // BLOCK_M
    z = tl.program_id(0) // blocks
    i0 = tl.program_id(0) % blocks * BLOCK_M
    n_keys = tl.load(key_counts + image_of(z, heads, per_image))
    rows = i0 + tl.arange(0, BLOCK_M)
    real = rows < tl.load(counts + image_of(z, heads, per_image))
    q_whole = load_whole(q, z * padded + i0, BLOCK_M, DIM, CHUNK, TMA)
    # low: at least topk scores reach it (-inf: all do). high: fewer do.
    low = tl.full([BLOCK_M], -0x7F800001, tl.int32)
    high = tl.full([BLOCK_M], 0x7F800001, tl.int32)
    reached = tl.zeros([BLOCK_M], tl.int32) + n_keys
    open_rows = tl.max((real & (reached > topk)).to(tl.int32), 0)
    while open_rows != 0:
        # In int64: the interval is wider than an int32 holds.
        step = (high.to(tl.int64) - low.to(tl.int64) + CUTS) // (CUTS + 1)
        counted = tl.zeros([BLOCK_M, CUTS], tl.int32)
        cuts = low.to(tl.int64)[:, None] + step[:, None] * (1 + tl.arange(0, CUTS))[None, :]
        cuts = tl.minimum(cuts, high.to(tl.int64)[:, None]).to(tl.int32)
        values = _from_ordered(cuts)
        for j0 in range(0, n_keys, BLOCK_N):
            k_whole = load_whole(k, z * key_padded + j0, BLOCK_N, DIM, CHUNK, TMA)
            s = product(q, q_whole, z * padded + i0, k, k_whole, z * key_padded + j0,
                        BLOCK_M, BLOCK_N, DIM, CHUNK, PRECISION, TMA) * scale2  # fmt: skip
            s = tl.where((j0 + tl.arange(0, BLOCK_N))[None, :] < n_keys, s, float("nan"))
            for c in tl.static_range(CUTS):
                cut = tl.sum(tl.where((tl.arange(0, CUTS) == c)[None, :], values, 0), 1)
                hits = tl.sum((s >= cut[:, None]).to(tl.int32), 1)
                counted += tl.where((tl.arange(0, CUTS) == c)[None, :], hits[:, None], 0)
        enough = counted >= topk
        low = tl.maximum(low, tl.max(tl.where(enough, cuts, -0x7F800001), 1))
        reached = tl.minimum(reached, tl.min(tl.where(enough, counted, 0x7FFFFFFF), 1))
        high = tl.minimum(high, tl.min(tl.where(enough, 0x7F800001, cuts), 1))
        width = high.to(tl.int64) - low.to(tl.int64)
        open_rows = tl.max((real & (reached > topk) & (width > 1)).to(tl.int32), 0)
    floor = _from_ordered(low)
    kth = tl.full([BLOCK_M], float("inf"), tl.float32)
    following = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for j0 in range(0, n_keys, BLOCK_N):
        k_whole = load_whole(k, z * key_padded + j0, BLOCK_N, DIM, CHUNK, TMA)
        s = product(q, q_whole, z * padded + i0, k, k_whole, z * key_padded + j0,
                    BLOCK_M, BLOCK_N, DIM, CHUNK, PRECISION, TMA) * scale2  # fmt: skip
        there = (j0 + tl.arange(0, BLOCK_N))[None, :] < n_keys
        above = s >= floor[:, None]
        kth = tl.minimum(kth, tl.min(tl.where(there & above, s, float("inf")), 1))
        following = tl.maximum(following, tl.max(tl.where(there & (above == 0), s, -float("inf")), 1))
    kth = tl.where(kth == float("inf"), floor, kth)  # formed again, those that had reached the floor may all miss it
    middle = following + (kth - following) * 0.5
    threshold = tl.where((middle > following) & (middle < kth), middle, kth)
    threshold = tl.where((n_keys <= topk) | (reached == n_keys), -float("inf"), threshold)
    image = tl.cast(image_of(z, heads, per_image), tl.int64)
    token = tl.load(order + image * padded + rows, mask=real, other=0)
    tl.store(kappa + z.to(tl.int64) * n + token, threshold, mask=real)


def find_kth(problem: Problem, saved: Saved) -> None:
    """Write kappa of ``saved``."""
    config = problem.config("topk")
    rows, keys = problem.rows, problem.keys
    chunk = min(config.chunk, problem.width)
    triton_launch.launch(
        _asa_topk_kernel, (problem.zs * (rows.padded // config.block_m),),
        *problem.tiles(config, q=(config.block_m, chunk), k=(config.block_n, chunk)), rows.order, rows.counts,
        keys.counts, saved.kappa, problem.scale2, problem.options.topk, problem.heads, problem.per_image, rows.n,
        rows.padded, keys.padded, BLOCK_M=config.block_m, BLOCK_N=config.block_n, DIM=problem.width, CHUNK=chunk,
        CUTS=8, **problem.common(config),
    )  # fmt: skip
