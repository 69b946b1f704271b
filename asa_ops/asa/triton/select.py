"""Who is whose neighbour: thresholds, the tiles that reach them, and there every pair, decided once and kept as a bit.

``peaks[J, i]`` is the largest score (base 2, float16, rounded up) that query i gives to the 64 keys of block J. A tile
of 64 x 64 pairs is active if some row's peak exceeds that row's threshold; if neighbours must be mutual, in both
directions. Tiles that are left out hold no neighbour; tiles that are visited in vain cost time only. All of it runs on
the device, with room of fixed size, so that nothing is read back.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from ...core.triton_launch import last_bits
from ..types import Saved
from .configs import PAD
from .problem import LOG2_E, Bits, Peaks, PerHead, Problem, Tokens
from .scores import Statistics
from .tiles import (
    LN_2,
    SCALARS,
    TileKernel,
    count_bits,
    first_bits,
    multiplier_of,
    of_head,
    own_rows,
    pack_columns,
    pack_rows,
    products_both_ways,
)


class Thresholds(NamedTuple):
    """In base 2 and arranged order, [n_heads, padded]: a pair is a neighbour if s2 - lse2 > cut2 and s2 >= kappa2."""

    lse2: Tensor | None
    cut2: Tensor | None  # inf at padding
    kappa2: Tensor | None  # None without topk
    flags: Tensor | None  # int8 [n_heads, row blocks, key blocks]: tiles that reach a threshold of their rows


NO_THRESHOLDS = Thresholds(None, None, None, None)


class RowStats(NamedTuple):
    """What rows know of their neighbours, arranged, [n_heads, padded]."""

    largest: Tensor | None  # largest score of a neighbour, base 2; -inf without any
    counts: Tensor | None  # int32
    not_finite: Tensor | None  # int32, not 0 if the value of a neighbour is not finite

    @classmethod
    def new(cls, problem: Problem) -> "RowStats":
        """Return what rows without neighbours know."""
        rows, like = (problem.n_heads, problem.padded), problem.inputs.query
        largest = like.new_full(rows, -torch.inf, dtype=torch.float32)
        return cls(largest, *like.new_zeros((2, *rows), dtype=torch.int32))


NO_ROW_STATS = RowStats(None, None, None)


@triton.jit
def _lse_of_parts(statistics, at, SPLITS: tl.constexpr):
    """The largest score of rows (0 without any) and lse, base 2. NaN scores are in the sum, not in the maximum."""
    m = tl.full([64], -float("inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        m = tl.maximum(m, tl.load(statistics.largest + split * statistics.rows + at))
    m = tl.where(m == -float("inf"), 0, m)
    summed = tl.zeros([64], tl.float32)
    for split in tl.static_range(SPLITS):
        part = tl.load(statistics.total + split * statistics.rows + at)
        weight = tl.exp2(tl.load(statistics.largest + split * statistics.rows + at) - m)
        summed += tl.where(part == 0, 0, part * weight)
    return m, m + tl.log2(summed)


@triton.jit(do_not_specialize=SCALARS)
def _asa_flags_kernel(
    statistics, lse, base2, alpha, kappa, tokens, peaks, thresholds, alpha_stride_b, alpha_stride_h, alpha_stride_n,
    heads, sharing, n, key_blocks, band2, SPLITS: tl.constexpr, HAS_TOPK: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Thresholds of 64 rows, and which blocks of 64 keys they reach within ``band2`` (base 2).

    SPLITS > 0: lse comes from the parts of the statistics and is written; 0: it is read from ``base2``. Axis 1 of the
    grid: BLOCK_J blocks of keys each; the first writes what is one number a row.
    """
    padded = tokens.rows.padded
    z, p = own_rows(padded, 64)
    at = z * padded + p
    first = (tl.zeros([64], tl.int32) + tl.program_id(1)) == 0
    token = tl.load(tokens.rows.order + z // sharing * padded + p).to(tl.int64)
    real = p < tl.load(tokens.rows.counts + z // sharing)
    if SPLITS > 0:
        m, row_lse2 = _lse_of_parts(statistics, at, SPLITS)
        tl.store(lse + z * n + token, row_lse2 * LN_2, mask=real & first)
        if base2.numbers is not None:
            tl.store(of_head(base2, z) + token, row_lse2, mask=real & first)
    else:
        row_lse2 = tl.load(of_head(base2, z) + token, mask=real, other=0)
    if alpha is None:
        row_lse2 = tl.zeros_like(row_lse2)  # the cut is -inf, which differences of huge scores may reach
    tl.store(thresholds.lse2 + at, row_lse2, mask=first)
    if thresholds.flags is not None:
        n_keys = tl.load(tokens.keys.counts + z // sharing)
        cut = tl.full([64], -float("inf"), tl.float32)
        if alpha is not None:
            multiplier = multiplier_of(alpha, z, token, real, heads, alpha_stride_b, alpha_stride_h, alpha_stride_n)
            cut = tl.log2(multiplier) - tl.log2(n_keys.to(tl.float32))
            cut = tl.where(multiplier >= 0, cut, float("nan"))
        kth = tl.full([64], -float("inf"), tl.float32)
        if HAS_TOPK:
            kth = tl.load(of_head(kappa, z) + token, mask=real, other=0)
        if SPLITS > 0:
            # Pairs are decided by scores that are formed again: the largest may not miss a threshold that it exceeds.
            above = m - row_lse2
            cut = tl.where(above > cut, tl.minimum(cut, above - last_bits(m)), cut)
            kth = tl.minimum(kth, m - last_bits(m))
        else:
            kth -= 2 * last_bits(kth)  # nor may a neighbour miss it here
        cut = tl.where(real, cut, float("inf"))
        tl.store(thresholds.cut2 + at, cut, mask=first)
        if HAS_TOPK:
            tl.store(thresholds.kappa2 + at, kth, mask=first)
        j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
        there = j * 64 < n_keys
        at_peak = peaks.peaks + z * peaks.stride + tl.cast(j, tl.int64)[None, :] * padded + p[:, None]
        peak = tl.load(at_peak, mask=there[None, :], other=-float("inf")).to(tl.float32)
        reached = ((peak - row_lse2[:, None]) > (cut[:, None] - band2)) & (peak >= kth[:, None])
        reached = tl.max(reached.to(tl.int32), 0) * there.to(tl.int32)
        row = tl.cast(tl.program_id(0), tl.int64) * key_blocks  # programs are row blocks, of all heads
        tl.store(thresholds.flags + row + j, reached.to(tl.int8), mask=j < key_blocks)


def find_thresholds(
    problem: Problem, tokens: Tokens, saved: Saved, peaks: Peaks, statistics: Statistics, band: float = 0.0
) -> Thresholds:
    """Find thresholds and the tiles that reach them, or come within ``band`` of them.

    lse is written to ``saved`` from the ``statistics`` of a forward; without them it is read there.
    """
    rows, alpha = tokens.rows, problem.inputs.alpha
    row_blocks, key_blocks = rows.padded // 64, tokens.keys.padded // 64
    lse2, cut2, kappa2 = (problem.new(problem.n_heads, rows.padded) for _ in range(3))
    flags = problem.new(problem.n_heads, row_blocks, key_blocks, dtype=torch.int8) if problem.has_bits else None
    thresholds = Thresholds(lse2, cut2, kappa2 if problem.has_topk else None, flags)
    triton_launch.launch(
        _asa_flags_kernel, (problem.n_heads * row_blocks, triton.cdiv(key_blocks, 32) if problem.has_bits else 1),
        statistics, saved.lse, PerHead.of(saved.base2), alpha, PerHead.of(saved.kappa), tokens, peaks,
        thresholds, *problem.strides(alpha), problem.heads, problem.sharing, problem.n, key_blocks, band * LOG2_E,
        SPLITS=statistics.splits, HAS_TOPK=problem.has_topk, BLOCK_J=32,
    )  # fmt: skip
    return thresholds


@triton.jit(do_not_specialize=SCALARS)
def _asa_pairs_kernel(
    flags, pairs, count, row_blocks, key_blocks, tiles, other_tiles,
    TILE: tl.constexpr, MUTUAL: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Collect the active tiles of TILE x TILE pairs, unordered if mutual, as z * tiles * other_tiles + I * .. + J.

    Their order is left to chance: each is worked on alone, and sums over them are sums of integers.
    """
    z = tl.cast(tl.program_id(0) // tiles, tl.int64)
    tile = tl.program_id(0) % tiles
    first = tile // BLOCK_J * BLOCK_J if MUTUAL else 0
    flags += z * row_blocks * key_blocks
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
        if MUTUAL:
            active = tl.where(j >= tile, active, 0)
        wanted = active != 0
        slot = tl.atomic_add(count, tl.sum(active, 0), sem="relaxed") + tl.cumsum(active, 0) - 1
        tl.store(pairs + slot, (z * tiles + tile) * other_tiles + j, mask=wanted)


def collect_pairs(problem: Problem, tokens: Tokens, flags: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Collect the active tiles of ``tile`` x ``tile`` pairs; return room for all their numbers, and their count."""
    tiles, other_tiles = tokens.rows.padded // tile, tokens.keys.padded // tile
    capacity = problem.n_heads * (tiles * (tiles + 1) // 2 if problem.mutual else tiles * other_tiles)
    pairs = problem.new(capacity, dtype=torch.int64)
    count = flags.new_zeros((1,), dtype=torch.int32)
    triton_launch.launch(
        _asa_pairs_kernel, (problem.n_heads * tiles,), flags, pairs, count, *flags.shape[1:], tiles, other_tiles,
        TILE=tile, MUTUAL=problem.mutual, BLOCK_J=128,
    )  # fmt: skip
    return pairs, count


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
def _add_to_rows(stats, at, largest, count, not_finite):
    """Take the neighbours in a tile into what rows know.

    By atomics, in any order, which integers and maxima do not see; relaxed ones, since nothing reads them before the
    next kernel and the others would each wait for memory.
    """
    tl.atomic_max(stats.largest + at, largest, sem="relaxed")
    tl.atomic_add(stats.counts + at, count, sem="relaxed")
    tl.atomic_max(stats.not_finite + at, not_finite, sem="relaxed")


@triton.jit
def _decide_tile(
    q, k, z, i_tile, j_tile, tokens, thresholds, bits, stats, scale2, sharing,
    MUTUAL: tl.constexpr, SYMMETRIC: tl.constexpr, ONE_WAY_BITS: tl.constexpr, SCORES,
):  # fmt: skip
    """Decide the pairs of one tile: write its bits and add to what its rows know."""
    TILE: tl.constexpr = SCORES.BLOCK_M
    padded, key_padded = tokens.rows.padded, tokens.keys.padded
    i0, j0 = i_tile * TILE, j_tile * TILE
    BOTH: tl.constexpr = MUTUAL and not SYMMETRIC
    s, back = products_both_ways(q, k, z * padded + i0, z * key_padded + j0, BOTH, SCORES)
    s *= scale2
    n_keys = tl.load(tokens.keys.counts + z // sharing)
    rows = z.to(tl.int64) * padded + i0 + tl.arange(0, TILE)
    a = _are_neighbours(s, thresholds, rows, True)
    if MUTUAL:
        back = s if SYMMETRIC else back * scale2
        columns = z.to(tl.int64) * padded + j0 + tl.arange(0, TILE)
        a_back = _are_neighbours(back, thresholds, columns, False)
        kept = a & a_back
        largest_columns = tl.max(tl.where(kept, back, -float("inf")), 0)
    else:
        kept = a & ((j0 + tl.arange(0, TILE)) < n_keys)[None, :]
    largest_rows = tl.max(tl.where(kept, s, -float("inf")), 1)
    # Positions after the last real one have zeros for keys: their scores are numbers, their bits must be 0.
    group = tl.arange(0, TILE // 32)
    real_j = first_bits(n_keys - j0 - 32 * group)[None, :]
    of_rows = pack_rows(kept, TILE, TILE) & real_j
    words = bits.words + z.to(tl.int64) * bits.stride
    at_rows = (j0 // 32 + group).to(tl.int64)[None, :] * padded + (i0 + tl.arange(0, TILE))[:, None]
    not_finite = tokens.not_finite + z * (key_padded // 32)
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
        tl.store(words + at_rows, stored_rows)
        if not diagonal:
            tl.store(words + at_columns, stored_columns)
            holds = _keeps_not_finite(tl.trans(of_columns), not_finite, i_tile, TILE)
            _add_to_rows(stats, columns, largest_columns, tl.sum(count_bits(of_columns), 0), holds)
    else:
        tl.store(words + at_rows, of_rows)
    holds = _keeps_not_finite(of_rows, not_finite, j_tile, TILE)
    _add_to_rows(stats, rows, largest_rows, tl.sum(count_bits(of_rows), 1), holds)


@triton.jit(do_not_specialize=SCALARS)
def _asa_mask_kernel(
    q, k, pairs, count, tokens, thresholds, bits, stats, scale2, sharing, tiles, other_tiles, SCORES,
    MUTUAL: tl.constexpr, SYMMETRIC: tl.constexpr, ONE_WAY_BITS: tl.constexpr,
):  # fmt: skip
    """Decide every pair of the listed tiles, and what rows need to know about their neighbours.

    A_ij = [s2_ij - lse2_i > cut2_i] and [s2_ij >= kappa2_i]. If MUTUAL, a tile (I, J) also gets s_ji, by a second
    product laid out [i, j] (none if SYMMETRIC, query is key), so that M = A_ij and A_ji, as bits of the rows i and of
    the rows j. Stored is M, or A if ONE_WAY_BITS.
    """
    n_listed = tl.load(count)
    for t in tl.range(tl.program_id(0), n_listed, tl.num_programs(0)):
        code = tl.load(pairs + t)
        j_tile = (code % other_tiles).to(tl.int32)
        i_tile = (code // other_tiles % tiles).to(tl.int32)
        z = (code // other_tiles // tiles).to(tl.int32)
        _decide_tile(q, k, z, i_tile, j_tile, tokens, thresholds, bits, stats, scale2, sharing,
                     MUTUAL, SYMMETRIC, ONE_WAY_BITS, SCORES)  # fmt: skip


def find_neighbours(problem: Problem, tokens: Tokens, thresholds: Thresholds, bits: Bits, stats: RowStats) -> None:
    """Decide the pairs of all tiles that reach thresholds: write bits and what rows know."""
    kernel = TileKernel(problem, tokens, "mask")
    tile = kernel.config.block_m
    pairs, count = collect_pairs(problem, tokens, thresholds.flags, tile)
    kernel.launch(
        _asa_mask_kernel, (min(len(pairs), 4 * triton_launch.processors(problem.device)),),
        "q k", pairs, count, tokens, thresholds, bits, stats, problem.scale2,
        problem.sharing, tokens.rows.padded // tile, tokens.keys.padded // tile,
        MUTUAL=problem.mutual, SYMMETRIC=problem.mutual and tokens.k is tokens.q, ONE_WAY_BITS=problem.one_way_bits,
    )  # fmt: skip


@triton.jit(do_not_specialize=SCALARS)
def _asa_everybody_kernel(statistics, tokens, bits, stats, sharing, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Dense attention: everybody real is everybody's neighbour."""
    padded, key_padded = tokens.rows.padded, tokens.keys.padded
    z, p = own_rows(padded, BLOCK)
    n_keys = tl.load(tokens.keys.counts + z // sharing)
    real = p < tl.load(tokens.rows.counts + z // sharing)
    not_finite = tl.zeros([BLOCK], tl.int32)
    for group in range(0, key_padded // 32):
        valid = first_bits(tl.zeros([BLOCK], tl.int32) + n_keys - 32 * group)
        word = tl.where(real, valid, 0)
        tl.store(bits.words + z * bits.stride + tl.cast(group, tl.int64) * padded + p, word)
        not_finite |= (word & tl.load(tokens.not_finite + z * (key_padded // 32) + group)) != 0
    if stats.counts is not None:
        m = tl.full([BLOCK], -float("inf"), tl.float32)
        at = z * padded + p
        for split in tl.static_range(SPLITS):
            m = tl.maximum(m, tl.load(statistics.largest + split * statistics.rows + at))
        tl.store(stats.largest + at, m)
        tl.store(stats.counts + at, tl.where(real, n_keys, 0))
        tl.store(stats.not_finite + at, not_finite)


def keep_everybody(problem: Problem, tokens: Tokens, bits: Bits, statistics: Statistics, stats: RowStats) -> None:
    """Write the bits of dense attention, and what rows know where that is asked for."""
    triton_launch.launch(
        _asa_everybody_kernel, (problem.n_heads * tokens.rows.padded // PAD,), statistics, tokens, bits, stats,
        problem.sharing, SPLITS=statistics.splits, BLOCK=PAD,
    )  # fmt: skip


@triton.jit(do_not_specialize=SCALARS)
def _asa_occupied_kernel(bits, flags, padded, key_blocks, BLOCK_J: tl.constexpr):
    """flags[I, J]: whether any bit of a tile of 64 x 64 pairs is set."""
    z, i = own_rows(padded, 64)
    start = tl.program_id(1) * BLOCK_J
    c = 2 * start + tl.arange(0, 2 * BLOCK_J)
    word = tl.load(bits.words + z * bits.stride + tl.cast(c, tl.int64)[None, :] * padded + i[:, None],
                   mask=(c < 2 * key_blocks)[None, :], other=0)  # fmt: skip
    occupied = tl.max(tl.reshape(tl.max((word != 0).to(tl.int32), 0), [BLOCK_J, 2]), 1)
    j = start + tl.arange(0, BLOCK_J)
    row = tl.cast(tl.program_id(0), tl.int64) * key_blocks  # programs are row blocks, of all heads
    tl.store(flags + row + j, occupied.to(tl.int8), mask=j < key_blocks)


def find_occupied(problem: Problem, tokens: Tokens, bits: Bits) -> Tensor:
    """Return flags int8 [n_heads, row blocks, key blocks] of the tiles that hold a bit."""
    row_blocks, key_blocks = tokens.rows.padded // 64, tokens.keys.padded // 64
    flags = problem.new(problem.n_heads, row_blocks, key_blocks, dtype=torch.int8)
    triton_launch.launch(
        _asa_occupied_kernel, (problem.n_heads * row_blocks, triton.cdiv(key_blocks, 16)), bits, flags,
        tokens.rows.padded, key_blocks, BLOCK_J=16,
    )  # fmt: skip
    return flags


@triton.jit(do_not_specialize=SCALARS)
def _asa_lists_kernel(
    by_rows, by_columns, lists, lengths, blocks, others, row_blocks, key_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_ROWS: tl.constexpr, BY_COLUMNS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """For every block of ROWS rows the blocks of COLUMNS columns that hold an active tile, ascending.

    A tile (I, J) of 64 x 64 is active if by_rows[I, J] and by_columns[J, I] say so, each if asked for; ``row_blocks``
    and ``key_blocks`` are the sides of a flag matrix.
    """
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    block = tl.program_id(0) % blocks
    offset = z * row_blocks * key_blocks
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
                    flag &= tl.load(by_rows + offset + i * key_blocks + jj, mask=there, other=0).to(tl.int32)
                if BY_COLUMNS:
                    flag &= tl.load(by_columns + offset + jj * key_blocks + i, mask=there, other=0).to(tl.int32)
                active |= flag
        slot = length + tl.cumsum(active, 0) - 1
        tl.store(lists + (z * blocks + block) * others + slot, j, mask=active != 0)
        length += tl.sum(active, 0)
    tl.store(lengths + z * blocks + block, length)


class Lists(NamedTuple):
    """For every block of rows, or of keys, the blocks of the other side to visit."""

    lists: Tensor  # int32 [n_heads, blocks, others], ascending
    lengths: Tensor  # int32 [n_heads, blocks]


class Listing:
    """The blocks to visit, listed when a kernel asks for them, once for all kernels that ask for the same.

    Blocks of rows visit the tiles (I, J) of 64 x 64 pairs for which the flag ``by_rows[I, J]`` is set, those of keys
    the tiles for which ``by_columns[J, I]`` is; both flags must be set where neighbours must be mutual.
    """

    def __init__(self, problem: Problem, tokens: Tokens, by_rows: Tensor, by_columns: Tensor):
        self.problem, self.tokens = problem, tokens
        self.by_rows, self.by_columns = by_rows, by_columns
        self.listed: dict[tuple[bool, int, int], Lists] = {}

    def of(self, kernel: TileKernel) -> Lists:
        symmetric = self.problem.mutual and self.by_rows is self.by_columns  # then rows and keys have one list
        cut = kernel.of_keys and not symmetric, kernel.config.block_m, max(kernel.config.block_n, 64)
        if cut not in self.listed:
            self.listed[cut] = self._list(*cut)
        return self.listed[cut]

    def _list(self, of_keys: bool, own_size: int, other_size: int) -> Lists:
        problem, rows, keys = self.problem, self.tokens.rows, self.tokens.keys
        own, other = (keys, rows) if of_keys else (rows, keys)
        blocks, others = own.padded // own_size, other.padded // other_size
        lists = problem.new(problem.n_heads, blocks, others, dtype=torch.int32)
        lengths = problem.new(problem.n_heads, blocks, dtype=torch.int32)
        triton_launch.launch(
            _asa_lists_kernel, (problem.n_heads * blocks,), self.by_rows, self.by_columns, lists, lengths, blocks,
            others, *self.by_rows.shape[1:], ROWS=own_size, COLUMNS=other_size,
            BY_ROWS=problem.mutual or not of_keys, BY_COLUMNS=problem.mutual or of_keys, BLOCK_J=128,
        )  # fmt: skip
        return Lists(lists, lengths)
