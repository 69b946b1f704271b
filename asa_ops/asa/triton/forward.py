"""The forward in Triton: statistics of the scores, neighbours as bits, the sum over neighbours.

Scores are in base 2, s2_ij = log2(e) * scale * <q_i, k_j>. Every pair is decided once, in the mask kernel; all others
read its bits. Each kernel sums in a fixed order, so results repeat bitwise. What the local block adds is in
``window``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from ...core.triton_launch import top_of
from ..types import Saved
from .arrange import MAX_SPLITS, NO_BITS, Bits, Problem, RowFindings
from .plan import Thresholds, collect_pairs, find_occupied, find_thresholds, keep_everybody, list_blocks
from .tiles import (
    SCALARS,
    count_bits,
    exponential,
    first_bits,
    image_of,
    load_tile,
    load_whole,
    operand,
    pack_columns,
    pack_rows,
    pairs_of_tile,
    product,
)
from .topk import find_kth
from .window import Sums, combine, find_local_survivors


@triton.jit
def _add_scores(
    s, m, summed, peaks, j0, rows, padded, n_keys, scale2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_PEAKS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take a block of products into the running maximum and sum of exponentials of its rows; store its peaks.

    ``scale2`` >= 0, so the largest score is that of the largest product. MASKED: the block reaches beyond the keys.

    The fused multiply-add subtracts a rounded maximum from an unrounded score: where scores are so large that half of
    their last place counts, exponentials of <= 0 come out as anything. Bounds on their sum keep the error within that
    half: here at most BLOCK_N, and at least 1 in the end.
    """
    SUB: tl.constexpr = BLOCK_N // 64
    if MASKED:
        there = ((j0 + tl.arange(0, BLOCK_N)) < n_keys)[None, :]
        s = tl.where(there, s, -float("inf"))
    if HAS_PEAKS:
        peak = tl.max(tl.reshape(s, [BLOCK_M, SUB, 64]), 2)
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
    added = tl.minimum(tl.sum(p, 1), BLOCK_N, propagate_nan=tl.PropagateNan.ALL)
    return m_new, summed * tl.exp2(m - base) + added


@triton.jit(do_not_specialize=SCALARS)
def _asa_statistics_kernel(
    q, k, largest, total, peaks, key_counts, peaks_stride, scale2, heads, zs, per_image, padded, key_padded, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, HAS_PEAKS: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Every score once: maximum and sum of exponentials of a row over each ``splits``-th block of keys, and peaks."""
    blocks = padded // BLOCK_M
    z = tl.program_id(0) // blocks
    i0 = tl.program_id(0) % blocks * BLOCK_M
    split = tl.program_id(1)
    n_keys = tl.load(key_counts + image_of(z, heads, per_image))
    rows = i0 + tl.arange(0, BLOCK_M)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    summed = tl.zeros([BLOCK_M], tl.float32)
    q_whole = load_whole(q, z * padded + i0, BLOCK_M, DIM, CHUNK, TMA)
    if HAS_PEAKS:
        peaks += z.to(tl.int64) * peaks_stride
    whole = n_keys // BLOCK_N
    for j0 in range(split * BLOCK_N, whole * BLOCK_N, splits * BLOCK_N):
        k_whole = load_whole(k, z * key_padded + j0, BLOCK_N, DIM, CHUNK, TMA)
        s = product(q, q_whole, z * padded + i0, k, k_whole, z * key_padded + j0,
                    BLOCK_M, BLOCK_N, DIM, CHUNK, PRECISION, TMA)  # fmt: skip
        if NEGATIVE:
            s = -s
        m, summed = _add_scores(s, m, summed, peaks, j0, rows, padded, n_keys, scale2,
                                BLOCK_M, BLOCK_N, HAS_PEAKS, False)  # fmt: skip
    if whole * BLOCK_N < n_keys and whole % splits == split:  # the last block, which is not full
        j0 = whole * BLOCK_N
        k_whole = load_whole(k, z * key_padded + j0, BLOCK_N, DIM, CHUNK, TMA)
        s = product(q, q_whole, z * padded + i0, k, k_whole, z * key_padded + j0,
                    BLOCK_M, BLOCK_N, DIM, CHUNK, PRECISION, TMA)  # fmt: skip
        if NEGATIVE:
            s = -s
        m, summed = _add_scores(s, m, summed, peaks, j0, rows, padded, n_keys, scale2,
                                BLOCK_M, BLOCK_N, HAS_PEAKS, True)  # fmt: skip
    summed = tl.where(m == -float("inf"), summed, tl.maximum(summed, 1, propagate_nan=tl.PropagateNan.ALL))
    at = (split * zs + z).to(tl.int64) * padded + rows
    tl.store(largest + at, m)
    tl.store(total + at, summed)


@triton.jit
def _keeps_broken(words, broken, block, TILE: tl.constexpr):
    """Per row, whether packed words [TILE, TILE // 32] hold a key whose value is not finite."""
    bad = tl.load(broken + block * (TILE // 32) + tl.arange(0, TILE // 32))
    return tl.max(((words & bad[None, :]) != 0).to(tl.int32), 1)


@triton.jit(do_not_specialize=SCALARS)
def _asa_mask_kernel(
    q, k, pairs, count, lse2, cut2, kappa2, key_counts, broken, words, row_largest, row_count, row_broken,
    words_stride, scale2, heads, per_image, padded, key_padded, tiles, other_tiles,
    TILE: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    MUTUAL: tl.constexpr, SYMMETRIC: tl.constexpr, ONE_WAY_BITS: tl.constexpr, HAS_TOPK: tl.constexpr,
):  # fmt: skip
    """Decide every pair of the listed tiles, and what rows need to know about their neighbours.

    A_ij = [s2_ij - lse2_i > cut2_i] and [s2_ij >= kappa2_i]. If MUTUAL, a tile (I, J) also gets s_ji, by a second
    product laid out [i, j] (none if SYMMETRIC, query is key), so that M = A_ij and A_ji, as bits of the rows i and of
    the rows j. Stored is M, or A if ONE_WAY_BITS. Rows collect integers and maxima by atomics, in any order; relaxed
    ones, since nothing reads them before the next kernel and the others would each wait for memory.
    """
    n_listed = tl.load(count)
    for t in range(tl.program_id(0), n_listed, tl.num_programs(0)):
        code = tl.load(pairs + t)
        j_tile = (code % other_tiles).to(tl.int32)
        i_tile = (code // other_tiles % tiles).to(tl.int32)
        z = (code // other_tiles // tiles).to(tl.int32)
        i0, j0 = i_tile * TILE, j_tile * TILE
        s = tl.zeros([TILE, TILE], tl.float32)
        back = tl.zeros([TILE, TILE], tl.float32)
        for c in range(0, DIM, CHUNK):
            qi = load_tile(q, z * padded + i0, c, TILE, CHUNK, DIM, TMA)
            kj = load_tile(k, z * key_padded + j0, c, TILE, CHUNK, DIM, TMA)
            s = tl.dot(qi, kj.T, s, input_precision=PRECISION)
            if MUTUAL and not SYMMETRIC:
                ki = load_tile(k, z * key_padded + i0, c, TILE, CHUNK, DIM, TMA)
                qj = load_tile(q, z * padded + j0, c, TILE, CHUNK, DIM, TMA)
                back = tl.dot(ki, qj.T, back, input_precision=PRECISION)
        s *= scale2
        n_keys = tl.load(key_counts + image_of(z, heads, per_image))
        rows = z.to(tl.int64) * padded + i0 + tl.arange(0, TILE)
        a = (s - tl.load(lse2 + rows)[:, None]) > tl.load(cut2 + rows)[:, None]
        if HAS_TOPK:
            a &= s >= tl.load(kappa2 + rows)[:, None]
        if MUTUAL:
            back = s if SYMMETRIC else back * scale2
            columns = z.to(tl.int64) * padded + j0 + tl.arange(0, TILE)
            a_back = (back - tl.load(lse2 + columns)[None, :]) > tl.load(cut2 + columns)[None, :]
            if HAS_TOPK:
                a_back &= back >= tl.load(kappa2 + columns)[None, :]
            kept = a & a_back
            largest_columns = tl.max(tl.where(kept, back, -float("inf")), 0)
        else:
            kept = a & ((j0 + tl.arange(0, TILE)) < n_keys)[None, :]
        largest_rows = tl.max(tl.where(kept, s, -float("inf")), 1)
        # Positions after the last real one have zeros for keys: their scores are numbers, their bits must be 0.
        group = tl.arange(0, TILE // 32)
        real_j = first_bits(n_keys - j0 - 32 * group)[None, :]
        of_rows = pack_rows(kept, TILE, TILE) & real_j
        mine = words + z.to(tl.int64) * words_stride
        at_rows = (j0 // 32 + group).to(tl.int64)[None, :] * padded + (i0 + tl.arange(0, TILE))[:, None]
        bad_z = broken + z * (key_padded // 32)
        if MUTUAL:
            real_i = first_bits(n_keys - i0 - 32 * group)[:, None]
            of_columns = pack_columns(kept, TILE, TILE) & real_i
            at_columns = (i0 // 32 + group).to(tl.int64)[:, None] * padded + (j0 + tl.arange(0, TILE))[None, :]
            stored_rows, stored_columns = of_rows, of_columns
            if ONE_WAY_BITS:
                stored_rows = pack_rows(a, TILE, TILE) & real_j
                stored_columns = pack_columns(a_back, TILE, TILE) & real_i
            # A diagonal tile has every pair twice, each from another product: both must agree.
            diagonal = i_tile == j_tile
            both = stored_rows & tl.trans(stored_columns)
            stored_rows = tl.where(diagonal, both, stored_rows)
            if ONE_WAY_BITS:
                of_rows = tl.where(diagonal, of_rows & tl.trans(of_columns), of_rows)
            else:
                of_rows = stored_rows
            tl.store(mine + at_rows, stored_rows)
            if not diagonal:
                tl.store(mine + at_columns, stored_columns)
                tl.atomic_max(row_largest + columns, largest_columns, sem="relaxed")
                tl.atomic_add(row_count + columns, tl.sum(count_bits(of_columns), 0), sem="relaxed")
                tl.atomic_max(
                    row_broken + columns, _keeps_broken(tl.trans(of_columns), bad_z, i_tile, TILE), sem="relaxed"
                )
        else:
            tl.store(mine + at_rows, of_rows)
        tl.atomic_max(row_largest + rows, largest_rows, sem="relaxed")
        tl.atomic_add(row_count + rows, tl.sum(count_bits(of_rows), 1), sem="relaxed")
        tl.atomic_max(row_broken + rows, _keeps_broken(of_rows, bad_z, j_tile, TILE), sem="relaxed")


@triton.jit(do_not_specialize=SCALARS)
def _asa_aggregate_kernel(
    q, k, v, lists, lengths, words, row_largest, partial, total, words_stride, scale2, zs, padded, key_padded, others,
    splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_V: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, BY_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of exp2(s2 - largest kept s2) and of that times v, over the neighbours in every ``splits``-th listed block.

    The largest is known beforehand, so parts add up without rescaling. Axis 2 of the grid: chunks of v.
    """
    blocks = padded // BLOCK_M
    z = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    i0 = block * BLOCK_M
    split = tl.program_id(1)
    column = tl.program_id(2) * CHUNK_V
    rows = i0 + tl.arange(0, BLOCK_M)
    top = top_of(tl.load(row_largest + z.to(tl.int64) * padded + rows))
    words += z.to(tl.int64) * words_stride
    lists += (z.to(tl.int64) * blocks + block) * others
    SUB: tl.constexpr = BLOCK_N if BLOCK_N > 64 else 64
    PARTS: tl.constexpr = SUB // BLOCK_N
    q_whole = load_whole(q, z * padded + i0, BLOCK_M, DIM, CHUNK, TMA)
    acc = tl.zeros([BLOCK_M, CHUNK_V], tl.float32)
    summed = tl.zeros([BLOCK_M], tl.float32)
    for t in range(split, tl.load(lengths + z * blocks + block) * PARTS, splits):
        j0 = tl.load(lists + t // PARTS) * SUB + t % PARTS * BLOCK_N
        k_whole = load_whole(k, z * key_padded + j0, BLOCK_N, DIM, CHUNK, TMA)
        s = product(q, q_whole, z * padded + i0, k, k_whole, z * key_padded + j0,
                    BLOCK_M, BLOCK_N, DIM, CHUNK, PRECISION, TMA)  # fmt: skip
        kept = pairs_of_tile(words, i0, j0, padded, BLOCK_M, BLOCK_N, True, BY_COLUMNS)
        p = exponential(s * scale2 - top[:, None], kept)
        summed += tl.sum(p, 1)
        values = load_tile(v, z * key_padded + j0, column, BLOCK_N, CHUNK_V, DIM_V, TMA)
        acc = tl.dot(operand(p, PRECISION).to(values.dtype), values, acc, input_precision=PRECISION)
    at = (split * zs + z).to(tl.int64) * padded + rows
    tl.store(partial + at[:, None] * DIM_V + (column + tl.arange(0, CHUNK_V))[None, :], acc)
    if column == 0:
        tl.store(total + at, summed)


def forward(problem: Problem, saved: Saved, band: float | None) -> None:
    """Write into ``saved``."""
    memory = saved.bits
    if not memory.shape[-1] and (problem.has_bits or problem.dense):
        memory = problem.new_bits()
    bits = problem.bits(memory) if memory.shape[-1] else NO_BITS
    statistics = _find_statistics(problem, bits)
    if problem.has_topk:
        find_kth(problem, saved)
    # Threshold gradients ask for A_ji of pairs (i, j) in the band below the threshold of i: those tiles too.
    thresholds = find_thresholds(problem, saved, bits, statistics, band if problem.one_way_bits else 0.0)
    rows = problem.zs, problem.rows.padded
    row_largest = problem.q.new_full(rows, -torch.inf, dtype=torch.float32)
    found = RowFindings(row_largest, *problem.q.new_zeros((2, *rows), dtype=torch.int32))
    if problem.has_bits:
        bits.words.zero_()
        _find_neighbours(problem, thresholds, bits, found)
    elif problem.dense:
        keep_everybody(problem, bits, found, statistics[0])
    if problem.inputs.beta is not None:
        find_local_survivors(problem, saved)
    sums = _aggregate(problem, bits, found.largest) if memory.shape[-1] else Sums(None, None, 0)
    combine(problem, saved, bits, found, sums)


def _find_statistics(problem: Problem, bits: Bits) -> tuple[Tensor, Tensor]:
    """Return maximum and sum of exponentials of every row in parts, [splits, zs, padded] each; write the peaks."""
    config = problem.config("statistics")
    rows, keys, zs = problem.rows, problem.keys, problem.zs
    blocks = rows.padded // config.block_m
    splits = problem.splits(zs * blocks, min(8, keys.padded // config.block_n))
    largest, total = (problem.new(splits, zs, rows.padded) for _ in range(2))
    chunk = min(config.chunk, problem.width)
    triton_launch.launch(
        _asa_statistics_kernel, (zs * blocks, splits),
        *problem.tiles(config, q=(config.block_m, chunk), k=(config.block_n, chunk)), largest, total, bits.peaks,
        keys.counts, bits.peaks_stride, abs(problem.scale2), problem.heads, zs, problem.per_image, rows.padded,
        keys.padded, splits, BLOCK_M=config.block_m, BLOCK_N=config.block_n, DIM=problem.width, CHUNK=chunk,
        HAS_PEAKS=problem.has_bits, NEGATIVE=problem.scale2 < 0, **problem.common(config),
    )  # fmt: skip
    return largest, total


def _find_neighbours(problem: Problem, thresholds: Thresholds, bits: Bits, found: RowFindings) -> None:
    """Decide the pairs of all tiles that reach thresholds: write bits and findings."""
    config = problem.config("mask")
    rows, keys, tile = problem.rows, problem.keys, config.block_m
    pairs, count = collect_pairs(problem, thresholds.flags, tile)
    chunk = min(config.chunk, problem.width)
    triton_launch.launch(
        _asa_mask_kernel, (min(len(pairs), 4 * triton_launch.processors(problem.device)),),
        *problem.tiles(config, q=(tile, chunk), k=(tile, chunk)), pairs, count, thresholds.lse2, thresholds.cut2,
        thresholds.kappa2, keys.counts, problem.broken, bits.words, *found, bits.stride, problem.scale2, problem.heads,
        problem.per_image, rows.padded, keys.padded, rows.padded // tile, keys.padded // tile, TILE=tile,
        DIM=problem.width, CHUNK=chunk, MUTUAL=problem.mutual, SYMMETRIC=problem.mutual and problem.k is problem.q,
        ONE_WAY_BITS=problem.one_way_bits, HAS_TOPK=problem.has_topk, **problem.common(config),
    )  # fmt: skip


def _aggregate(problem: Problem, bits: Bits, row_largest: Tensor) -> Sums:
    """Return the sums over neighbours."""
    config = problem.config("aggregate")
    rows, keys, zs = problem.rows, problem.keys, problem.zs
    m, n = config.block_m, config.block_n
    blocks = rows.padded // m
    chunk, columns = min(config.chunk, problem.width), min(config.columns, problem.width_v)
    flags = find_occupied(problem, bits)
    lists = list_blocks(problem, flags, flags, config, rows=True)
    parts = problem.width_v // columns
    splits = problem.splits(zs * blocks * parts, MAX_SPLITS)
    partial = problem.new(splits, zs * rows.padded, problem.width_v)
    total = problem.new(splits, zs, rows.padded)
    triton_launch.launch(
        _asa_aggregate_kernel, (zs * blocks, splits, parts),
        *problem.tiles(config, q=(m, chunk), k=(n, chunk), v=(n, columns)), lists.lists, lists.lengths, bits.words,
        row_largest, partial, total, bits.stride, problem.scale2, zs, rows.padded, keys.padded, lists.others, splits,
        BLOCK_M=m, BLOCK_N=n, DIM=problem.width, DIM_V=problem.width_v, CHUNK=chunk, CHUNK_V=columns,
        BY_COLUMNS=problem.one_way_bits, **problem.common(config),
    )  # fmt: skip
    return Sums(partial, total, splits)
