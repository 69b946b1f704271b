"""From block maxima of the scores to the tiles worth visiting: on the device, with fixed capacity, without a host sync.

``peaks[J, i]`` is the largest score (base 2, float16, rounded up) that query i gives to the 64 keys of block J. A tile
of 64 x 64 pairs is active if some row's peak exceeds that row's threshold; if neighbours must be mutual, in both
directions. What is left out holds no neighbour; what is visited in vain costs time only.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from ...core.triton_launch import last_bits
from ..types import Saved
from .arrange import Bits, Problem, RowFindings
from .configs import PAD, Config
from .tiles import SCALARS, first_bits, image_of

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=SCALARS)
def _asa_flags_kernel(
    largest, total, lse, base2, alpha, kappa, order, counts, key_counts, peaks, lse2, cut2, kappa2, flags,
    alpha_stride_b, alpha_stride_h, alpha_stride_n, peaks_stride, heads, zs, per_image, n, padded, key_blocks, band2,
    SPLITS: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_TOPK: tl.constexpr, HAS_FLAGS: tl.constexpr,
    HAS_BASE2: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Thresholds of 64 rows, and which blocks of 64 keys they reach within ``band2`` (base 2).

    SPLITS > 0: lse comes from the partial sums of the statistics and is written; 0: it is read from ``base2``. A pair
    is above its threshold if s2 - lse2 > cut2 (and s2 >= kappa2); rows that are padding have an infinite cut2. Axis 1
    of the grid: BLOCK_J blocks of keys each; what is one number a row is written by the first.
    """
    blocks = padded // 64
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    block = tl.program_id(0) % blocks
    p = block * 64 + tl.arange(0, 64)
    at = z * padded + p
    first = (tl.zeros([64], tl.int32) + tl.program_id(1)) == 0
    token = tl.load(order + image_of(z, heads, per_image) * padded + p).to(tl.int64)
    real = p < tl.load(counts + image_of(z, heads, per_image))
    if SPLITS > 0:
        m = tl.full([64], -float("inf"), tl.float32)
        for split in tl.static_range(SPLITS):
            m = tl.maximum(m, tl.load(largest + split * zs * padded + at))
        m = tl.where(m == -float("inf"), 0, m)
        # A row with a NaN has a NaN sum, whatever its maximum.
        summed = tl.zeros([64], tl.float32)
        for split in tl.static_range(SPLITS):
            part = tl.load(total + split * zs * padded + at)
            weight = tl.exp2(tl.load(largest + split * zs * padded + at) - m)
            summed += tl.where(part == 0, 0, part * weight)
        row_lse2 = m + tl.log2(summed)
        tl.store(lse + z * n + token, row_lse2 * LN_2, mask=real & first)
        if HAS_BASE2:
            tl.store(base2 + 3 * z * n + token, row_lse2, mask=real & first)
    else:
        row_lse2 = tl.load(base2 + 3 * z * n + token, mask=real, other=0)
    if not HAS_ALPHA:
        row_lse2 = tl.zeros_like(row_lse2)  # the cut is -inf, which differences of huge scores may reach
    tl.store(lse2 + at, row_lse2, mask=first)
    if HAS_FLAGS:
        n_keys = tl.load(key_counts + image_of(z, heads, per_image))
        cut = tl.full([64], -float("inf"), tl.float32)
        if HAS_ALPHA:
            multiplier = alpha + z // heads * alpha_stride_b + z % heads * alpha_stride_h + token * alpha_stride_n
            multiplier = tl.load(multiplier, mask=real, other=0).to(tl.float32)
            cut = tl.log2(multiplier) - tl.log2(n_keys.to(tl.float32))
            cut = tl.where(multiplier >= 0, cut, float("nan"))
        kth = tl.full([64], -float("inf"), tl.float32)
        if HAS_TOPK:
            kth = tl.load(kappa + z * n + token, mask=real, other=0)
        if SPLITS > 0:
            # Pairs are decided by scores that are formed again: the largest may not miss a threshold that it exceeds.
            above = m - row_lse2
            cut = tl.where(above > cut, tl.minimum(cut, above - last_bits(m)), cut)
            kth = tl.minimum(kth, m - last_bits(m))
        else:
            kth -= 2 * last_bits(kth)  # nor may a neighbour miss it here
        cut = tl.where(real, cut, float("inf"))
        tl.store(cut2 + at, cut, mask=first)
        if HAS_TOPK:
            tl.store(kappa2 + at, kth, mask=first)
        j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
        there = j * 64 < n_keys
        # padded is a multiple of 64 and counts rows; peaks lie [key block, row]
        peak = tl.load(peaks + z * peaks_stride + tl.cast(j, tl.int64)[None, :] * padded + p[:, None],
                       mask=there[None, :], other=-float("inf")).to(tl.float32)  # fmt: skip
        reached = ((peak - row_lse2[:, None]) > (cut[:, None] - band2)) & (peak >= kth[:, None])
        reached = tl.max(reached.to(tl.int32), 0) * there.to(tl.int32)
        tl.store(flags + (z * blocks + block) * key_blocks + j, reached.to(tl.int8), mask=j < key_blocks)


@triton.jit(do_not_specialize=SCALARS)
def _asa_pairs_kernel(
    flags, pairs, count, row_blocks, column_blocks, tiles, other_tiles,
    TILE: tl.constexpr, MUTUAL: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Collect the active tiles of TILE x TILE pairs, unordered if mutual, as z * tiles * other_tiles + I * .. + J.

    Their order is left to chance: each is worked on alone, and what is summed over them are integers.
    """
    z = tl.cast(tl.program_id(0) // tiles, tl.int64)
    tile = tl.program_id(0) % tiles
    first = tile // BLOCK_J * BLOCK_J if MUTUAL else 0
    flags += z * row_blocks * column_blocks
    SUB: tl.constexpr = TILE // 64
    for start in range(first, other_tiles, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        there = j < other_tiles
        active = tl.zeros([BLOCK_J], tl.int32)
        for a in tl.static_range(SUB):
            for b in tl.static_range(SUB):
                row, column = tile * SUB + a, j * SUB + b
                flag = tl.load(flags + row * column_blocks + column, mask=there, other=0).to(tl.int32)
                if MUTUAL:
                    flag &= tl.load(flags + column * column_blocks + row, mask=there, other=0).to(tl.int32)
                active |= flag
        if MUTUAL:
            active = tl.where(j >= tile, active, 0)
        wanted = active != 0
        slot = tl.atomic_add(count, tl.sum(active, 0), sem="relaxed") + tl.cumsum(active, 0) - 1
        tl.store(pairs + slot, (z * tiles + tile) * other_tiles + j, mask=wanted)


@triton.jit(do_not_specialize=SCALARS)
def _asa_occupied_kernel(words, flags, words_stride, padded, key_blocks, BLOCK_J: tl.constexpr):
    """flags[I, J]: whether any bit of a tile of 64 x 64 pairs is set."""
    blocks = padded // 64
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    block = tl.program_id(0) % blocks
    i = block * 64 + tl.arange(0, 64)
    start = tl.program_id(1) * BLOCK_J
    c = 2 * start + tl.arange(0, 2 * BLOCK_J)
    word = tl.load(words + z * words_stride + tl.cast(c, tl.int64)[None, :] * padded + i[:, None],
                   mask=(c < 2 * key_blocks)[None, :], other=0)  # fmt: skip
    occupied = tl.max(tl.reshape(tl.max((word != 0).to(tl.int32), 0), [BLOCK_J, 2]), 1)
    j = start + tl.arange(0, BLOCK_J)
    tl.store(flags + (z * blocks + block) * key_blocks + j, occupied.to(tl.int8), mask=j < key_blocks)


@triton.jit(do_not_specialize=SCALARS)
def _asa_lists_kernel(
    by_rows, by_columns, lists, lengths, blocks, others, row_blocks, column_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_ROWS: tl.constexpr, BY_COLUMNS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """For every block of ROWS rows the blocks of COLUMNS columns that hold an active tile, ascending.

    A tile (I, J) of 64 x 64 is active if by_rows[I, J] and by_columns[J, I] say so, each if asked for; ``row_blocks``
    and ``column_blocks`` are the sides of a flag matrix.
    """
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    block = tl.program_id(0) % blocks
    offset = z * row_blocks * column_blocks
    SUB_I: tl.constexpr = ROWS // 64
    SUB_J: tl.constexpr = COLUMNS // 64
    length = 0
    for start in range(0, others, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        there = j < others
        active = tl.zeros([BLOCK_J], tl.int32)
        for a in tl.static_range(SUB_I):
            for b in tl.static_range(SUB_J):
                i, jj = block * SUB_I + a, j * SUB_J + b
                flag = there.to(tl.int32)
                if BY_ROWS:
                    flag &= tl.load(by_rows + offset + i * column_blocks + jj, mask=there, other=0).to(tl.int32)
                if BY_COLUMNS:
                    flag &= tl.load(by_columns + offset + jj * column_blocks + i, mask=there, other=0).to(tl.int32)
                active |= flag
        slot = length + tl.cumsum(active, 0) - 1
        tl.store(lists + (z * blocks + block) * others + slot, j, mask=active != 0)
        length += tl.sum(active, 0)
    tl.store(lengths + z * blocks + block, length)


@triton.jit(do_not_specialize=SCALARS)
def _asa_everybody_kernel(
    words, largest, broken, counts, key_counts, row_largest, row_count, row_broken,
    words_stride, heads, zs, per_image, padded, key_padded, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dense attention: everybody real is everybody's neighbour."""
    blocks = padded // BLOCK
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image = image_of(z, heads, per_image)
    n_keys = tl.load(key_counts + image)
    real = p < tl.load(counts + image)
    bad = tl.zeros([BLOCK], tl.int32)
    for group in range(0, key_padded // 32):
        valid = first_bits(tl.zeros([BLOCK], tl.int32) + n_keys - 32 * group)
        word = tl.where(real, valid, 0)
        tl.store(words + z * words_stride + tl.cast(group, tl.int64) * padded + p, word)
        bad |= (word & tl.load(broken + z * (key_padded // 32) + group)) != 0
    m = tl.full([BLOCK], -float("inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        m = tl.maximum(m, tl.load(largest + split * zs * padded + z * padded + p))
    at = z * padded + p
    tl.store(row_largest + at, m)
    tl.store(row_count + at, tl.where(real, n_keys, 0))
    tl.store(row_broken + at, bad)


class Thresholds(NamedTuple):
    """In base 2 and arranged order, [zs, padded]: a pair is a neighbour if s2 - lse2 > cut2 and s2 >= kappa2."""

    lse2: Tensor
    cut2: Tensor
    kappa2: Tensor
    flags: Tensor | None  # int8 [zs, row blocks, key blocks]: tiles that reach a threshold of their rows


def find_thresholds(
    problem: Problem, saved: Saved, bits: Bits, statistics: tuple[Tensor, Tensor] | None, band: float = 0.0
) -> Thresholds:
    """Find thresholds and the tiles that reach them, or come within ``band`` of them.

    ``statistics``: the partial sums of a forward, whose lse is written to ``saved``; without them it is read there.
    """
    rows, keys, alpha = problem.rows, problem.keys, problem.inputs.alpha
    lse2, cut2, kappa2 = (problem.new(problem.zs, rows.padded) for _ in range(3))
    row_blocks, key_blocks = rows.padded // 64, keys.padded // 64
    flags = problem.new(problem.zs, row_blocks, key_blocks, dtype=torch.int8) if problem.has_bits else None
    largest, total = statistics or (None, None)
    parts = triton.cdiv(key_blocks, 32) if problem.has_bits else 1
    triton_launch.launch(
        _asa_flags_kernel, (problem.zs * row_blocks, parts), largest, total, saved.lse, saved.base2, alpha,
        saved.kappa, rows.order, rows.counts, keys.counts, bits.peaks, lse2, cut2, kappa2, flags, *problem.strides[0],
        bits.peaks_stride, problem.heads, problem.zs, problem.per_image, rows.n, rows.padded, key_blocks,
        band * math.log2(math.e), SPLITS=0 if statistics is None else largest.shape[0], HAS_ALPHA=alpha is not None,
        HAS_TOPK=problem.has_topk, HAS_FLAGS=problem.has_bits, HAS_BASE2=saved.base2.shape[-1] > 0, BLOCK_J=32,
    )  # fmt: skip
    return Thresholds(lse2, cut2, kappa2, flags)


def collect_pairs(problem: Problem, flags: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Collect the active tiles of ``tile`` x ``tile`` pairs; return room for all their numbers, and their count."""
    rows, keys = problem.rows, problem.keys
    tiles, other_tiles = rows.padded // tile, keys.padded // tile
    capacity = problem.zs * (tiles * (tiles + 1) // 2 if problem.mutual else tiles * other_tiles)
    pairs = problem.new(capacity, dtype=torch.int64)
    count = problem.q.new_zeros((1,), dtype=torch.int32)
    triton_launch.launch(
        _asa_pairs_kernel, (problem.zs * tiles,), flags, pairs, count, rows.padded // 64, keys.padded // 64, tiles,
        other_tiles, TILE=tile, MUTUAL=problem.mutual, BLOCK_J=128,
    )  # fmt: skip
    return pairs, count


def find_occupied(problem: Problem, bits: Bits) -> Tensor:
    """Return flags int8 [zs, row blocks, key blocks] of the tiles that hold a bit."""
    row_blocks, key_blocks = problem.rows.padded // 64, problem.keys.padded // 64
    flags = problem.new(problem.zs, row_blocks, key_blocks, dtype=torch.int8)
    triton_launch.launch(
        _asa_occupied_kernel, (problem.zs * row_blocks, triton.cdiv(key_blocks, 16)), bits.words, flags, bits.stride,
        problem.rows.padded, key_blocks, BLOCK_J=16,
    )  # fmt: skip
    return flags


class Lists(NamedTuple):
    """For every block of rows, or of keys, the blocks of the other side to visit."""

    lists: Tensor  # int32 [zs, blocks, others], ascending
    lengths: Tensor  # int32 [zs, blocks]
    others: int


def list_blocks(problem: Problem, by_rows: Tensor, by_columns: Tensor, config: Config, rows: bool) -> Lists:
    """List, for every block of rows (of keys if not ``rows``), the blocks of the other side in active tiles."""
    own, other = (problem.rows, problem.keys) if rows else (problem.keys, problem.rows)
    size = max(config.block_n, 64)
    blocks, others = own.padded // config.block_m, other.padded // size
    lists = problem.new(problem.zs, blocks, others, dtype=torch.int32)
    lengths = problem.new(problem.zs, blocks, dtype=torch.int32)
    triton_launch.launch(
        _asa_lists_kernel, (problem.zs * blocks,), by_rows, by_columns, lists, lengths, blocks, others,
        *by_rows.shape[1:], ROWS=config.block_m, COLUMNS=size, BY_ROWS=rows or problem.mutual,
        BY_COLUMNS=problem.mutual or not rows, BLOCK_J=128,
    )  # fmt: skip
    return Lists(lists, lengths, others)


def keep_everybody(problem: Problem, bits: Bits, found: RowFindings, largest: Tensor) -> None:
    """Write the bits and findings of dense attention; ``largest`` [parts, zs, padded]: maxima of rows."""
    rows, keys = problem.rows, problem.keys
    triton_launch.launch(
        _asa_everybody_kernel, (problem.zs * rows.padded // PAD,), bits.words, largest, problem.broken, rows.counts,
        keys.counts, *found, bits.stride, problem.heads, problem.zs, problem.per_image, rows.padded, keys.padded,
        SPLITS=largest.shape[0], BLOCK=PAD,
    )  # fmt: skip
