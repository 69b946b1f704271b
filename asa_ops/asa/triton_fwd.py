"""The forward in Triton: statistics of the scores, neighbours as bits, the sum over neighbours.

Scores are in base 2, s2_ij = log2(e) * scale * <q_i, k_j>. Every pair is decided once, in the mask kernel; all others
read its bits. Each kernel sums in a fixed order, so results repeat bitwise. What the local block adds is in
``triton_window``.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    SCALARS,
    count_bits,
    first_bits,
    image_of,
    load_tile,
    load_whole,
    pack_columns,
    pack_rows,
    pairs_of_tile,
    product,
)


@triton.jit(do_not_specialize=SCALARS)
def _asa_statistics_kernel(
    q, k, largest, total, peaks, key_counts, peaks_stride, scale2, heads, zs, per_image, padded, key_padded, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, HAS_PEAKS: tl.constexpr,
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
    SUB: tl.constexpr = BLOCK_N // 64
    for j0 in range(split * BLOCK_N, n_keys, splits * BLOCK_N):
        k_whole = load_whole(k, z * key_padded + j0, BLOCK_N, DIM, CHUNK, TMA)
        s = product(q, q_whole, z * padded + i0, k, k_whole, z * key_padded + j0,
                    BLOCK_M, BLOCK_N, DIM, CHUNK, PRECISION, TMA)  # fmt: skip
        s = tl.where((j0 + tl.arange(0, BLOCK_N))[None, :] < n_keys, s * scale2, -float("inf"))
        if HAS_PEAKS:
            peak = tl.max(tl.reshape(s, [BLOCK_M, SUB, 64]), 2)
            above = peak + tl.abs(peak) * 0.001 + 1e-6  # more than rounding to float16 takes
            block = tl.cast(j0 // 64, tl.int64) + tl.arange(0, SUB)
            tl.store(peaks + block[None, :] * padded + rows[:, None], above.to(tl.float16))
            m_new = tl.maximum(m, tl.max(peak, 1))
        else:
            m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == -float("inf"), 0, m_new)
        summed = summed * tl.exp2(m - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        m = m_new
    at = (split * zs + z).to(tl.int64) * padded + rows
    tl.store(largest + at, m)
    tl.store(total + at, summed)


@triton.jit
def _ordered(x):
    """Integers in the order of the floats they are made from."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_ordered(x):
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
    middle = following + (kth - following) * 0.5
    threshold = tl.where((middle > following) & (middle < kth), middle, kth)
    threshold = tl.where((n_keys <= topk) | (reached == n_keys), -float("inf"), threshold)
    image = tl.cast(image_of(z, heads, per_image), tl.int64)
    token = tl.load(order + image * padded + rows, mask=real, other=0)
    tl.store(kappa + z.to(tl.int64) * n + token, threshold * 0.6931471805599453, mask=real)


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
    the rows j. Stored is M, or A if ONE_WAY_BITS. Rows collect integers and maxima by atomics, in any order.
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
        kept = a
        if MUTUAL:
            back = s if SYMMETRIC else back * scale2
            columns = z.to(tl.int64) * padded + j0 + tl.arange(0, TILE)
            a_back = (back - tl.load(lse2 + columns)[None, :]) > tl.load(cut2 + columns)[None, :]
            if HAS_TOPK:
                a_back &= back >= tl.load(kappa2 + columns)[None, :]
            kept = a & a_back
            largest_columns = tl.max(tl.where(kept, back, -float("inf")), 0)
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
                tl.atomic_max(row_largest + columns, largest_columns)
                tl.atomic_add(row_count + columns, tl.sum(count_bits(of_columns), 0))
                tl.atomic_max(row_broken + columns, _keeps_broken(tl.trans(of_columns), bad_z, i_tile, TILE))
        else:
            tl.store(mine + at_rows, of_rows)
        tl.atomic_max(row_largest + rows, largest_rows)
        tl.atomic_add(row_count + rows, tl.sum(count_bits(of_rows), 1))
        tl.atomic_max(row_broken + rows, _keeps_broken(of_rows, bad_z, j_tile, TILE))


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


@triton.jit(do_not_specialize=SCALARS)
def _asa_aggregate_kernel(
    q, k, v, lists, lengths, words, row_largest, partial, total, words_stride, scale2, zs, padded, key_padded, others,
    splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_V: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, BY_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of exp2(s2 - largest kept s2) and of that times v, over the neighbours in every ``splits``-th listed block.

    The exponents' base is known beforehand, so parts add up without rescaling. Axis 2 of the grid: chunks of v.
    """
    blocks = padded // BLOCK_M
    z = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    i0 = block * BLOCK_M
    split = tl.program_id(1)
    column = tl.program_id(2) * CHUNK_V
    rows = i0 + tl.arange(0, BLOCK_M)
    base = tl.load(row_largest + z.to(tl.int64) * padded + rows)
    base = tl.where(base == -float("inf"), 0, base)
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
        p = tl.exp2(tl.where(kept, s * scale2 - base[:, None], -float("inf")))
        summed += tl.sum(p, 1)
        values = load_tile(v, z * key_padded + j0, column, BLOCK_N, CHUNK_V, DIM_V, TMA)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    at = (split * zs + z).to(tl.int64) * padded + rows
    tl.store(partial + at[:, None] * DIM_V + (column + tl.arange(0, CHUNK_V))[None, :], acc)
    if column == 0:
        tl.store(total + at, summed)
