"""Who is whose neighbour: in the tiles that reach thresholds every pair is decided once and kept as a bit.

All of it runs on the device, with room of fixed size, so that nothing is read back.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from ..types import Saved
from .configs import PAD
from .problem import Bits, PerHead, Problem, Tokens
from .scores import Statistics
from .thresholds import Thresholds
from .tiles import (
    SCALARS,
    TileKernel,
    back_of,
    count_bits,
    first_bits,
    own_rows,
    pack_columns,
    pack_rows,
    products_both_ways,
    tile_count,
    words_of,
)
from .window import NO_CUT, NOTHING_LOCAL, Local, window_cut, window_of_rows


class RowStats(NamedTuple):
    """What rows know of their neighbours, arranged, [n_heads, padded]."""

    largest: Tensor | None  # largest score of a neighbour, base 2; -inf without any
    counts: Tensor | None  # int32
    not_finite: Tensor | None  # int32, not 0 if the value of a neighbour is not finite


NO_ROW_STATS = RowStats(None, None, None)


class OwnRows(NamedTuple):
    """The rows of a part of a call, whose mutual neighbours are decided in the tiles of all rows."""

    tokens: Tokens  # of these rows and all keys
    first: int  # a multiple of 128
    padded: int
    occupied_back: Tensor | None  # int8 [n_heads, all row blocks, own key blocks]: the same of ``Bits.back``


class Neighbours(NamedTuple):
    """What a forward decides of pairs."""

    bits: Bits
    stats: RowStats
    occupied: Tensor | None  # int8 [n_heads, row blocks, key blocks]: tiles that hold a bit
    own: OwnRows | None = None  # None: all rows

    @classmethod
    def new(cls, problem: Problem, bits: Bits) -> "Neighbours":
        """Allocate what is known of rows and tiles beside the ``bits``."""
        largest = problem.new(problem.n_heads, problem.padded)
        counts, not_finite = (problem.new(problem.n_heads, problem.padded, dtype=torch.int32) for _ in range(2))
        return cls(bits, RowStats(largest, counts, not_finite), problem.new_flags())


NO_NEIGHBOURS = Neighbours(Bits(None, 0), NO_ROW_STATS, None)


@triton.jit
def _collect_pairs(flags, pairs, count, tokens, own, TILE: tl.constexpr, MUTUAL: tl.constexpr, BLOCK_J: tl.constexpr):
    """Collect the active tiles of TILE x TILE pairs, unordered if mutual, as z * tiles * other_tiles + I * .. + J.

    Their order is left to chance: each is worked on alone, and sums over them are sums of integers. ``own``: only tiles
    with rows of its own, of mutual pairs, either way round.
    """
    tiles, other_tiles = tokens.rows.padded // TILE, tokens.keys.padded // TILE
    key_blocks = tokens.keys.padded // 64
    if own is None:
        z = tl.cast(tl.program_id(0) // tiles, tl.int64)
        tile = tl.program_id(0) % tiles
        first = tile // BLOCK_J * BLOCK_J if MUTUAL else 0
    else:
        z = tl.cast(tl.program_id(0) // (own.padded // TILE), tl.int64)
        tile = own.first // TILE + tl.program_id(0) % (own.padded // TILE)
        first = 0
    flags += z * (tokens.rows.padded // 64) * key_blocks
    SUB: tl.constexpr = TILE // 64
    for start in range(first, other_tiles, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        there = j < other_tiles
        active = tl.zeros([BLOCK_J], tl.int32)
        for a in tl.static_range(SUB):
            for b in tl.static_range(SUB):
                row, column = tile * SUB + a, j * SUB + b
                flag = tl.load(flags + row * key_blocks + column, mask=there, other=0).to(tl.int32)
                if MUTUAL:
                    flag &= tl.load(flags + column * key_blocks + row, mask=there, other=0).to(tl.int32)
                active |= flag
        low, high = tile, j
        if own is not None:
            active = tl.where((j >= tile) | (j < own.first // TILE), active, 0)
            low, high = tl.minimum(tile, j), tl.maximum(tile, j)
        elif MUTUAL:
            active = tl.where(j >= tile, active, 0)
        slot = tl.atomic_add(count, tl.sum(active, 0), sem="relaxed") + tl.cumsum(active, 0) - 1
        tl.store(pairs + slot, (z * tiles + low) * other_tiles + high, mask=active != 0)


@triton.jit(do_not_specialize=SCALARS)
def _asa_pairs_kernel(
    flags, pairs, notes, tokens, own, beta, kept, beta_stride_b, beta_stride_h, beta_stride_n, scale2,
    heads, sharing, n_heads, n, height, width, extra,
    TILE: tl.constexpr, MUTUAL: tl.constexpr, BLOCK_J: tl.constexpr, CUT,
):  # fmt: skip
    """Collect the tiles whose pairs are to be decided; the other programs find local survivors meanwhile."""
    programs = n_heads * (tokens.rows.padded // TILE)
    if own is not None:
        programs = n_heads * (own.padded // TILE)
    if tl.program_id(0) < programs:
        _collect_pairs(flags, pairs, tile_count(notes), tokens, own, TILE, MUTUAL, BLOCK_J)
    elif CUT.WINDOW.POSITIONS > 0:
        if own is not None:
            tokens = own.tokens
        window_of_rows(tl.program_id(0) - programs, tokens, beta, kept, beta_stride_b, beta_stride_h, beta_stride_n,
                       scale2, heads, sharing, n, height, width, extra, CUT)  # fmt: skip


def collect_pairs(
    problem: Problem, tokens: Tokens, notes: Tensor, saved: Saved | None, flags: Tensor, tile: int,
    own: OwnRows | None,
) -> Tensor:  # fmt: skip
    """Collect the active tiles of ``tile`` x ``tile`` pairs, counted in ``notes``; return room for all their numbers.

    Local survivors are found too, where ``saved`` is given: its log_mean and local.
    """
    tiles, other_tiles = tokens.rows.padded // tile, tokens.keys.padded // tile
    capacity = problem.n_heads * (tiles * (tiles + 1) // 2 if problem.mutual else tiles * other_tiles)
    programs, rows = problem.n_heads * tiles, tokens.rows.padded
    if own is not None:
        programs, rows = problem.n_heads * (own.padded // tile), own.padded
        capacity = min(capacity, programs * other_tiles)
    pairs = problem.new(capacity, dtype=torch.int64)
    beta, kept, cut = problem.inputs.beta, NOTHING_LOCAL, NO_CUT
    if saved is not None:
        kept, cut = Local(PerHead.of(saved.log_mean), PerHead.of(saved.local)), window_cut(problem)
        programs += problem.n_heads * rows // problem.block if problem.window.POSITIONS else 0
    triton_launch.launch(
        _asa_pairs_kernel, (programs,), flags, pairs, notes, tokens, own, beta, kept, *problem.strides(beta),
        problem.scale2, problem.heads, problem.sharing, problem.n_heads, problem.n, *problem.of_grid, TILE=tile,
        MUTUAL=problem.mutual, BLOCK_J=128, CUT=cut, warps=problem.warps, registers=128,
    )  # fmt: skip
    return pairs


@triton.jit
def _keeps_not_finite(words, not_finite, block, TILE: tl.constexpr):
    """Per row, whether packed words [TILE, TILE // 32] hold a key whose value is not finite."""
    of_keys = tl.load(not_finite + block * (TILE // 32) + tl.arange(0, TILE // 32))
    return tl.max(((words & of_keys[None, :]) != 0).to(tl.int32), 1)


@triton.jit
def _are_neighbours(s, thresholds, at, ROWS: tl.constexpr):
    """A_ij of scores from the thresholds of positions ``at``: those of the rows of the tile, or of its columns."""
    axis: tl.constexpr = 1 if ROWS else 0
    a = (s - tl.expand_dims(tl.load(thresholds.lse2 + at), axis)) > tl.expand_dims(tl.load(thresholds.cut2 + at), axis)
    if thresholds.kappa2 is not None:
        a &= s >= tl.expand_dims(tl.load(thresholds.kappa2 + at), axis)
    return a


@triton.jit
def _have_extra_token(tokens, image, i0, j0, TILE: tl.constexpr):
    """Which pairs of a tile are neighbours because one of them is an extra token; both are real."""
    i, j = i0 + tl.arange(0, TILE), j0 + tl.arange(0, TILE)
    of_real = tl.where(i < tl.load(tokens.rows.counts + image), tl.load(tokens.keys.extra + image), 0)
    end = tl.where(i < tl.load(tokens.rows.extra + image), tl.load(tokens.keys.counts + image), of_real)
    return j[None, :] < end[:, None]


@triton.jit
def _add_to_rows(stats, at, largest, count, not_finite):
    """Take the neighbours in a tile into what rows know.

    By atomics, in any order, which integers and maxima do not see; relaxed ones, since nothing reads them before the
    next kernel and the others would each wait for memory.
    """
    tl.atomic_max(stats.largest + at, largest, sem="relaxed")
    tl.atomic_add(stats.counts + at, count, sem="relaxed")
    tl.atomic_max(stats.not_finite + at, not_finite, sem="relaxed")


@triton.jit
def _hold_bits(words, TILE: tl.constexpr):
    """Which tiles of 64 x 64 pairs hold a bit, from the words [TILE, TILE // 32] of a larger one."""
    SUB: tl.constexpr = TILE // 64
    holds = tl.max(tl.reshape((words != 0).to(tl.int32), [SUB, 64, SUB * 2]), 1)
    return tl.max(tl.reshape(holds, [SUB, SUB, 2]), 2)


@triton.jit
def _store_pairs(
    words, occupied, stored, holds, row, column, padded, key_padded, TILE: tl.constexpr, BY_ROWS: tl.constexpr
):
    """Store the words of a tile, [TILE, words] or the transpose, and which of its tiles of 64 x 64 pairs hold a bit.

    ``row`` and ``column``: numbers of the tile.
    """
    SUB: tl.constexpr = TILE // 64
    sub = tl.arange(0, SUB)
    rows, group = row * TILE + tl.arange(0, TILE), (column * (TILE // 32) + tl.arange(0, TILE // 32)).to(tl.int64)
    if BY_ROWS:
        at = group[None, :] * padded + rows[:, None]
    else:
        at = group[:, None] * padded + rows[None, :]
    tl.store(words + at, stored)
    at = (row * SUB + sub)[:, None] * (key_padded // 64) + (column * SUB + sub)[None, :]
    tl.store(occupied + at, holds.to(tl.int8))


@triton.jit
def _flags_of(flags, z, padded, key_padded):
    """The flags of a head."""
    return flags + z.to(tl.int64) * (padded // 64) * (key_padded // 64)


@triton.jit
def _decide_tile(
    q, k, z, i_tile, j_tile, tokens, thresholds, neighbours, scale2, sharing,
    MUTUAL: tl.constexpr, SYMMETRIC: tl.constexpr, ONE_WAY_BITS: tl.constexpr, SCORES,
):  # fmt: skip
    """Decide the pairs of one tile: write its bits and whether it has any, and add to what its rows know."""
    TILE: tl.constexpr = SCORES.BLOCK_M
    stats, bits, own = neighbours.stats, neighbours.bits, neighbours.own
    padded, key_padded = tokens.rows.padded, tokens.keys.padded
    i0, j0 = i_tile * TILE, j_tile * TILE
    BOTH: tl.constexpr = MUTUAL and not SYMMETRIC
    s, back = products_both_ways(q, k, None, None, z * padded + i0, z * key_padded + j0, BOTH, SCORES)
    s *= scale2
    n_keys = tl.load(tokens.keys.counts + z // sharing)
    rows = z.to(tl.int64) * padded + i0 + tl.arange(0, TILE)
    a = _are_neighbours(s, thresholds, rows, True)
    if MUTUAL:
        back = s if SYMMETRIC else back * scale2
        columns = z.to(tl.int64) * padded + j0 + tl.arange(0, TILE)
        a_back = _are_neighbours(back, thresholds, columns, False)
        kept = a & a_back
        if tokens.keys.extra is not None:
            kept |= _have_extra_token(tokens, z // sharing, i0, j0, TILE)
        largest_columns = tl.max(tl.where(kept, back, -float("inf")), 0)
    else:
        kept = a & ((j0 + tl.arange(0, TILE)) < n_keys)[None, :]
        if tokens.keys.extra is not None:
            kept |= _have_extra_token(tokens, z // sharing, i0, j0, TILE)
    largest_rows = tl.max(tl.where(kept, s, -float("inf")), 1)
    # Positions after the last real one have zeros for keys: their scores are numbers, their bits must be 0.
    group = tl.arange(0, TILE // 32)
    real_j = first_bits(n_keys - j0 - 32 * group)[None, :]
    of_rows = pack_rows(kept, TILE, TILE) & real_j
    words = words_of(bits, z)
    not_finite = tokens.not_finite + z * (key_padded // 32)
    height = padded  # of the rows whose neighbours are kept
    if own is not None:
        height = own.padded
    occupied = _flags_of(neighbours.occupied, z, height, key_padded)
    if MUTUAL:
        real_i = first_bits(n_keys - i0 - 32 * group)[:, None]
        of_columns = pack_columns(kept, TILE, TILE) & real_i
        stored_rows, stored_columns = of_rows, of_columns
        if ONE_WAY_BITS:
            stored_rows = pack_rows(a, TILE, TILE) & real_j
            stored_columns = pack_columns(a_back, TILE, TILE) & real_i
            if tokens.keys.extra is not None:
                stored_rows |= of_rows
                stored_columns |= of_columns
        # A diagonal tile has every pair twice, each from another product: both must agree.
        diagonal = i_tile == j_tile
        both = stored_rows & tl.trans(stored_columns)
        stored_rows = tl.where(diagonal, both, stored_rows)
        if ONE_WAY_BITS:
            of_rows = tl.where(diagonal, of_rows & tl.trans(of_columns), of_rows)
        else:
            of_rows = stored_rows
        holds_rows = _hold_bits(stored_rows, TILE)
        row, column = i_tile, j_tile
        keeps_rows, keeps_columns = True, diagonal == 0
        if own is not None:
            row, column = i_tile - own.first // TILE, j_tile - own.first // TILE
            keeps_rows = (row >= 0) & (row < height // TILE)
            keeps_columns &= (column >= 0) & (column < height // TILE)
            rows = z.to(tl.int64) * height + row * TILE + tl.arange(0, TILE)
            columns = z.to(tl.int64) * height + column * TILE + tl.arange(0, TILE)
        if keeps_rows:
            _store_pairs(words, occupied, stored_rows, holds_rows, row, j_tile, height, key_padded, TILE, True)
        if keeps_columns:
            holds = _hold_bits(tl.trans(stored_columns), TILE) if ONE_WAY_BITS else tl.trans(holds_rows)
            _store_pairs(words, occupied, stored_columns, holds, column, i_tile, height, key_padded, TILE, False)
            holds = _keeps_not_finite(tl.trans(of_columns), not_finite, i_tile, TILE)
            _add_to_rows(stats, columns, largest_columns, tl.sum(count_bits(of_columns), 0), holds)
        if bits.back is not None:
            back = back_of(bits, z)
            occupied_back = _flags_of(own.occupied_back, z, padded, height)
            if keeps_columns | (keeps_rows & diagonal):
                _store_pairs(back, occupied_back, stored_rows, holds_rows, i_tile, column, padded, height, TILE, True)
            if keeps_rows & (diagonal == 0):
                holds = _hold_bits(tl.trans(stored_columns), TILE)
                _store_pairs(back, occupied_back, stored_columns, holds, j_tile, row, padded, height, TILE, False)
        if keeps_rows:
            holds = _keeps_not_finite(of_rows, not_finite, j_tile, TILE)
            _add_to_rows(stats, rows, largest_rows, tl.sum(count_bits(of_rows), 1), holds)
    else:
        holds = _hold_bits(of_rows, TILE)
        _store_pairs(words, occupied, of_rows, holds, i_tile, j_tile, padded, key_padded, TILE, True)
        holds = _keeps_not_finite(of_rows, not_finite, j_tile, TILE)
        _add_to_rows(stats, rows, largest_rows, tl.sum(count_bits(of_rows), 1), holds)


@triton.jit(do_not_specialize=SCALARS)
def _asa_mask_kernel(
    q, k, pairs, notes, tokens, thresholds, neighbours, scale2, sharing, SCORES,
    MUTUAL: tl.constexpr, SYMMETRIC: tl.constexpr, ONE_WAY_BITS: tl.constexpr,
):  # fmt: skip
    """Decide every pair of the listed tiles, and what rows need to know about their neighbours.

    A_ij = [s2_ij - lse2_i > cut2_i] and [s2_ij >= kappa2_i], and 1 where i or j is an extra token. If MUTUAL, a tile
    (I, J) also gets s_ji, by a second product laid out [i, j] (none if SYMMETRIC, query is key), so that M = A_ij and
    A_ji, as bits of the rows i and of the rows j. Stored is M, or A if ONE_WAY_BITS.
    """
    n_listed = tl.load(tile_count(notes))
    tiles, other_tiles = tokens.rows.padded // SCORES.BLOCK_M, tokens.keys.padded // SCORES.BLOCK_M
    for t in tl.range(tl.program_id(0), n_listed, tl.num_programs(0)):
        code = tl.load(pairs + t)
        j_tile = (code % other_tiles).to(tl.int32)
        i_tile = (code // other_tiles % tiles).to(tl.int32)
        z = (code // other_tiles // tiles).to(tl.int32)
        _decide_tile(q, k, z, i_tile, j_tile, tokens, thresholds, neighbours, scale2, sharing,
                     MUTUAL, SYMMETRIC, ONE_WAY_BITS, SCORES)  # fmt: skip


def find_neighbours(
    problem: Problem, tokens: Tokens, notes: Tensor, saved: Saved | None, thresholds: Thresholds,
    neighbours: Neighbours,
) -> None:  # fmt: skip
    """Decide the pairs of all tiles that reach thresholds; also write log_mean and local of ``saved``, if given."""
    kernel = TileKernel(problem, tokens, "mask")
    tile = kernel.config.block_m
    pairs = collect_pairs(problem, tokens, notes, saved, thresholds.flags, tile, neighbours.own)
    kernel.launch(
        _asa_mask_kernel, (min(len(pairs), 4 * triton_launch.processors(problem.device)),),
        "q k", pairs, notes, tokens, thresholds, neighbours, problem.scale2, problem.sharing,
        MUTUAL=problem.mutual, SYMMETRIC=problem.mutual and tokens.k is tokens.q, ONE_WAY_BITS=problem.one_way_bits,
    )  # fmt: skip


@triton.jit(do_not_specialize=SCALARS)
def _asa_everybody_kernel(statistics, tokens, neighbours, sharing, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Dense attention: everybody real is everybody's neighbour."""
    bits, stats = neighbours.bits, neighbours.stats
    padded, key_padded = tokens.rows.padded, tokens.keys.padded
    z, p = own_rows(padded, BLOCK)
    n_keys = tl.load(tokens.keys.counts + z // sharing)
    n_rows = tl.load(tokens.rows.counts + z // sharing)
    real = p < n_rows
    not_finite = tl.zeros([BLOCK], tl.int32)
    for group in range(0, key_padded // 32):
        valid = first_bits(tl.zeros([BLOCK], tl.int32) + n_keys - 32 * group)
        word = tl.where(real, valid, 0)
        tl.store(bits.words + z * bits.stride + tl.cast(group, tl.int64) * padded + p, word)
        not_finite |= (word & tl.load(tokens.not_finite + z * (key_padded // 32) + group)) != 0
    SUB: tl.constexpr = BLOCK // 64
    block = tl.program_id(0) * SUB + tl.arange(0, SUB)  # of all heads
    real_block = (block % (padded // 64)) * 64 < n_rows
    for start in range(0, key_padded // 64, 128):
        j = start + tl.arange(0, 128)
        holds = real_block[:, None] & (j * 64 < n_keys)[None, :]
        at = block.to(tl.int64)[:, None] * (key_padded // 64) + j[None, :]
        tl.store(neighbours.occupied + at, holds.to(tl.int8), mask=(j < key_padded // 64)[None, :])
    if stats.counts is not None:
        m = tl.full([BLOCK], -float("inf"), tl.float32)
        at = z * padded + p
        for split in tl.static_range(SPLITS):
            m = tl.maximum(m, tl.load(statistics.largest + split * statistics.rows + at))
        tl.store(stats.largest + at, m)
        tl.store(stats.counts + at, tl.where(real, n_keys, 0))
        tl.store(stats.not_finite + at, not_finite)


def keep_everybody(problem: Problem, tokens: Tokens, statistics: Statistics, neighbours: Neighbours) -> None:
    """Write the bits of dense attention and the tiles that hold some, and what rows know where that is asked for."""
    triton_launch.launch(
        _asa_everybody_kernel, (problem.n_heads * tokens.rows.padded // PAD,), statistics, tokens, neighbours,
        problem.sharing, SPLITS=statistics.splits, BLOCK=PAD,
    )  # fmt: skip
