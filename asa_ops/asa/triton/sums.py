"""Sums over the neighbours that are kept as bits, tile by tile: the output, dq, dk, dv and the threshold gradients.

Rows own out, dq and threshold gradients, columns own dk and dv. Each program owns what it sums, in a fixed order: no
atomics, bitwise repeatable. Scores are formed again, and weights from them never exceed 1, whatever their last bits:
see ``top_of``. Sums stay in parts, which ``finish`` adds up.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core.triton_launch import top_of
from .arrange import RowGradients
from .lists import Listing
from .problem import Bits, Problem, Tokens
from .select import Neighbours
from .thresholds import Thresholds
from .tiles import (
    LN_2,
    SCALARS,
    TileKernel,
    admission_weight,
    constants,
    exponential,
    load_tile,
    load_whole,
    operand,
    own_block,
    pairs_of_tile,
    place_of,
    product,
    products_both_ways,
    shrink_of,
    some_columns,
    step_derivative,
)


class Sums(NamedTuple):
    """A sum over neighbours in parts."""

    partial: Tensor | None  # [SPLITS, n_heads * padded, width], or without width
    total: Tensor | None  # [SPLITS, n_heads * padded] sum of exponentials, beside the output
    rows: int  # from part to part: n_heads * padded, a multiple of 128
    SPLITS: tl.constexpr


NO_SUMS = Sums(None, None, 0, tl.constexpr(0))


class Across(NamedTuple):
    """Beside some rows and all keys, in a part of a call: all rows and its own keys."""

    tokens: Tokens
    row: RowGradients  # of all rows
    bits: Bits


def _new_sums(kernel: TileKernel, splits: int, *width: int, totals: bool = False) -> Sums:
    rows = kernel.problem.n_heads * kernel.own.padded
    total = kernel.problem.new(splits, rows) if totals else None
    return Sums(kernel.problem.new(splits, rows, *width), total, rows, tl.constexpr(splits))


@triton.jit
def _own_list(lists, z, block, blocks, other_padded, TILE):
    """Where the list of a block begins, and how many tiles of BLOCK_N it has."""
    SUB: tl.constexpr = TILE.BLOCK_N if TILE.BLOCK_N > 64 else 64
    first = lists.lists + (z.to(tl.int64) * blocks + block) * (other_padded // SUB)
    return first, tl.load(lists.lengths + z * blocks + block) * (SUB // TILE.BLOCK_N)


@triton.jit
def _listed(first, t, TILE):
    """Where the ``t``-th tile of a list begins."""
    SUB: tl.constexpr = TILE.BLOCK_N if TILE.BLOCK_N > 64 else 64
    PARTS: tl.constexpr = SUB // TILE.BLOCK_N
    t = tl.cast(t, tl.int32)  # in the interpreter it is an integer of Python
    return tl.load(first + t // PARTS).to(tl.int32) * SUB + t % PARTS * TILE.BLOCK_N


@triton.jit(do_not_specialize=SCALARS)
def _asa_aggregate_kernel(
    q, k, v, tokens, lists, bits, row_largest, sums, scale2, SCORES, VALUES, BY_COLUMNS: tl.constexpr
):
    """Sums of exp2(s2 - largest kept s2) and of that times v, over the neighbours in every n-th listed block.

    The largest is known beforehand, so parts add up without rescaling. Axis 1 of the grid: which of n; axis 2: chunks
    of v.
    """
    padded, key_padded = tokens.rows.padded, tokens.keys.padded
    BLOCK_M: tl.constexpr = SCORES.BLOCK_M
    BLOCK_N: tl.constexpr = SCORES.BLOCK_N
    z, i0 = own_block(padded, BLOCK_M)
    column = tl.program_id(2) * VALUES.CHUNK
    rows = z.to(tl.int64) * padded + i0 + tl.arange(0, BLOCK_M)
    top = top_of(tl.load(row_largest + rows))
    first, length = _own_list(lists, z, i0 // BLOCK_M, padded // BLOCK_M, key_padded, SCORES)
    q_row = z * padded + i0
    q_whole = load_whole(q, q_row, BLOCK_M, SCORES)
    acc = tl.zeros([BLOCK_M, VALUES.CHUNK], tl.float32)
    summed = tl.zeros([BLOCK_M], tl.float32)
    for t in range(tl.program_id(1), length, tl.num_programs(1)):
        j0 = _listed(first, t, SCORES)
        k_row = z * key_padded + j0
        k_whole = load_whole(k, k_row, BLOCK_N, SCORES)
        s = product(q, q_whole, q_row, k, k_whole, k_row, SCORES)
        kept = pairs_of_tile(bits, z, i0, j0, padded, key_padded, BLOCK_M, BLOCK_N, True, BY_COLUMNS)
        p = exponential(s * scale2 - top[:, None], kept)
        summed += tl.sum(p, 1)
        values = load_tile(v, k_row, column, BLOCK_N, VALUES.CHUNK, VALUES)
        p = operand(p, SCORES.PRECISION).to(values.dtype)
        acc = tl.dot(p, values, acc, input_precision=SCORES.PRECISION)
    at = tl.cast(tl.program_id(1), tl.int64) * sums.rows + rows
    tl.store(sums.partial + at[:, None] * VALUES.DIM + (column + tl.arange(0, VALUES.CHUNK))[None, :], acc)
    if column == 0:
        tl.store(sums.total + at, summed)


def sum_out(problem: Problem, tokens: Tokens, listing: Listing, neighbours: Neighbours) -> Sums:
    """Return the sums of weights, and of weights times values, over neighbours."""
    kernel = TileKernel(problem, tokens, "aggregate")
    lists = listing.of("aggregate")
    chunks = problem.width_v // kernel.columns_v
    splits = kernel.splits(chunks)
    sums = _new_sums(kernel, splits, problem.width_v, totals=True)
    kernel.launch(
        _asa_aggregate_kernel, (kernel.programs, splits, chunks),
        "q k v", tokens, lists, neighbours.bits, neighbours.stats.largest, sums,
        problem.scale2, BY_COLUMNS=problem.one_way_bits,
    )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=SCALARS)
def _asa_dq_kernel(
    q, k, v, do, tokens, lists, bits, row, sums, scale2, SCORES, VALUES,
    COLUMNS: tl.constexpr, BY_COLUMNS: tl.constexpr, DELTA_ERROR: tl.constexpr,
):  # fmt: skip
    """dq_i / scale = sum_j p_ij (<do_i, v_j> - delta_i) k_j over every n-th listed block.

    Axis 1 of the grid: which of n; axis 2: chunks of COLUMNS of the result. DELTA_ERROR: only sum_j p_ij (<do_i, v_j> -
    delta_i), which would be 0 if delta were not rounded.
    """
    padded, key_padded = tokens.rows.padded, tokens.keys.padded
    BLOCK_M: tl.constexpr = SCORES.BLOCK_M
    BLOCK_N: tl.constexpr = SCORES.BLOCK_N
    z, i0 = own_block(padded, BLOCK_M)
    column = tl.program_id(2) * COLUMNS
    rows = z.to(tl.int64) * padded + i0 + tl.arange(0, BLOCK_M)
    top_i, share_i, delta_i = tl.load(row.top + rows), tl.load(row.share + rows), tl.load(row.delta + rows)
    shrink = shrink_of(tokens.bounds, z)
    first, length = _own_list(lists, z, i0 // BLOCK_M, padded // BLOCK_M, key_padded, SCORES)
    at_i = z * padded + i0
    q_whole = load_whole(q, at_i, BLOCK_M, SCORES)
    do_whole = load_whole(do, at_i, BLOCK_M, VALUES)
    if DELTA_ERROR:
        acc = tl.zeros([BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for t in range(tl.program_id(1), length, tl.num_programs(1)):
        j0 = _listed(first, t, SCORES)
        at_j = z * key_padded + j0
        k_whole = load_whole(k, at_j, BLOCK_N, SCORES)
        s = product(q, q_whole, at_i, k, k_whole, at_j, SCORES)
        v_whole = load_whole(v, at_j, BLOCK_N, VALUES)
        dp = product(do, do_whole, at_i, v, v_whole, at_j, VALUES)
        kept = pairs_of_tile(bits, z, i0, j0, padded, key_padded, BLOCK_M, BLOCK_N, True, BY_COLUMNS)
        p = exponential(s * scale2 - top_i[:, None], kept) * share_i[:, None]
        ds = tl.where(kept, p * (dp - delta_i[:, None]), 0) * shrink
        if DELTA_ERROR:
            acc += tl.sum(ds, 1)
        else:
            keys = some_columns(k, k_whole, at_j, column, BLOCK_N, COLUMNS, SCORES)
            ds = operand(ds, SCORES.PRECISION).to(keys.dtype)
            acc = tl.dot(ds, keys, acc, input_precision=SCORES.PRECISION)
    at = tl.cast(tl.program_id(1), tl.int64) * sums.rows + rows
    if DELTA_ERROR:
        tl.store(sums.partial + at, acc)
    else:
        tl.store(sums.partial + at[:, None] * SCORES.DIM + (column + tl.arange(0, COLUMNS))[None, :], acc)


def sum_rows(
    problem: Problem, tokens: Tokens, listing: Listing, bits: Bits, row: RowGradients, delta_error: bool = False
) -> Sums:
    """Return dq / scale over neighbours, [.., D]; ``delta_error``: what delta misses, one number a row."""
    kernel = TileKernel(problem, tokens, "dq")
    lists = listing.of("dq")
    chunks = 1 if delta_error else problem.width // kernel.columns
    splits = kernel.splits(chunks)
    sums = _new_sums(kernel, splits, *(() if delta_error else (problem.width,)))
    kernel.launch(
        _asa_dq_kernel, (kernel.programs, splits, chunks),
        "q k v do", tokens, lists, bits, row,
        sums, problem.scale2, COLUMNS=kernel.columns,
        BY_COLUMNS=problem.one_way_bits, DELTA_ERROR=delta_error,
    )  # fmt: skip
    return sums


@triton.jit
def _sum_columns_of_block(
    q, k, v, do, tokens, lists, bits, row, sums_k, sums_v, scale2, chunk, SCORES, VALUES,
    COLUMNS: tl.constexpr, COLUMNS_V: tl.constexpr, BY_ROWS: tl.constexpr, BY_COLUMNS: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
):  # fmt: skip
    """dv_j = sum_i p_ij do_i and dk_j / scale = sum_i p_ij (<do_i, v_j> - delta_i) q_i, one or both, a chunk of each.

    Tiles are [keys, queries], so that neither p nor its gradient is ever transposed.
    """
    padded, key_padded = tokens.rows.padded, tokens.keys.padded
    BLOCK_M: tl.constexpr = SCORES.BLOCK_M
    BLOCK_N: tl.constexpr = SCORES.BLOCK_N
    z, j0 = own_block(key_padded, BLOCK_M)
    first, length = _own_list(lists, z, j0 // BLOCK_M, key_padded // BLOCK_M, padded, SCORES)
    at_j = z * key_padded + j0
    k_whole = load_whole(k, at_j, BLOCK_M, SCORES)
    if WANT_DK:
        shrink = shrink_of(tokens.bounds, z)
        v_whole = load_whole(v, at_j, BLOCK_M, VALUES)
        dk = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    if WANT_DV:
        dv = tl.zeros([BLOCK_M, COLUMNS_V], tl.float32)
    for t in range(tl.program_id(1), length, tl.num_programs(1)):
        i0 = _listed(first, t, SCORES)
        at_i = z * padded + i0
        rows = z.to(tl.int64) * padded + i0 + tl.arange(0, BLOCK_N)
        q_whole = load_whole(q, at_i, BLOCK_N, SCORES)
        s = product(k, k_whole, at_j, q, q_whole, at_i, SCORES)
        kept = pairs_of_tile(bits, z, j0, i0, key_padded, padded, BLOCK_M, BLOCK_N, BY_ROWS, BY_COLUMNS)
        # As exponential() has it; pairs that do not survive are left out below, which takes fewer registers.
        e = tl.exp2(tl.minimum(s * scale2 - tl.load(row.top + rows)[None, :], 0))
        do_whole = load_whole(do, at_i, BLOCK_N, VALUES)
        if WANT_DV:
            do_i = some_columns(do, do_whole, at_i, chunk * COLUMNS_V, BLOCK_N, COLUMNS_V, VALUES)
            p = tl.where(kept, e * tl.load(row.share + rows)[None, :], 0)
            dv = tl.dot(operand(p, SCORES.PRECISION).to(do_i.dtype), do_i, dv, input_precision=SCORES.PRECISION)
        if WANT_DK:
            dp = product(v, v_whole, at_j, do, do_whole, at_i, VALUES)
            gain = (dp - tl.load(row.delta + rows)[None, :]) * (tl.load(row.share + rows) * shrink)[None, :]
            ds = tl.where(kept, e * gain, 0)
            q_i = some_columns(q, q_whole, at_i, chunk * COLUMNS, BLOCK_N, COLUMNS, SCORES)
            dk = tl.dot(operand(ds, SCORES.PRECISION).to(q_i.dtype), q_i, dk, input_precision=SCORES.PRECISION)
    at = tl.cast(tl.program_id(1), tl.int64)
    if WANT_DK:
        at_k = (at * sums_k.rows + at_j + tl.arange(0, BLOCK_M))[:, None] * SCORES.DIM
        tl.store(sums_k.partial + at_k + (chunk * COLUMNS + tl.arange(0, COLUMNS))[None, :], dk)
    if WANT_DV:
        at_v = (at * sums_v.rows + at_j + tl.arange(0, BLOCK_M))[:, None] * VALUES.DIM
        tl.store(sums_v.partial + at_v + (chunk * COLUMNS_V + tl.arange(0, COLUMNS_V))[None, :], dv)


@triton.jit(do_not_specialize=SCALARS)
def _asa_dkv_kernel(
    q, k, v, do, tokens, lists, bits, row, sums_k, sums_v, scale2, SCORES, VALUES,
    COLUMNS: tl.constexpr, COLUMNS_V: tl.constexpr, BY_ROWS: tl.constexpr, BY_COLUMNS: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, CHUNKS_K: tl.constexpr,
):  # fmt: skip
    """Axis 1 of the grid: which of n parts, as in dq; axis 2: chunks of the result.

    CHUNKS_K > 0: so many programs sum chunks of dk, those that follow chunks of dv; 0: what is wanted, at once.
    """
    chunk = tl.program_id(2)
    if CHUNKS_K > 0:
        if chunk < CHUNKS_K:
            _sum_columns_of_block(q, k, v, do, tokens, lists, bits, row, sums_k, sums_v, scale2, chunk, SCORES, VALUES,
                                  COLUMNS, COLUMNS_V, BY_ROWS, BY_COLUMNS, True, False)  # fmt: skip
        else:
            _sum_columns_of_block(q, k, v, do, tokens, lists, bits, row, sums_k, sums_v, scale2, chunk - CHUNKS_K,
                                  SCORES, VALUES, COLUMNS, COLUMNS_V, BY_ROWS, BY_COLUMNS, False, True)  # fmt: skip
    else:
        _sum_columns_of_block(q, k, v, do, tokens, lists, bits, row, sums_k, sums_v, scale2, chunk, SCORES, VALUES,
                              COLUMNS, COLUMNS_V, BY_ROWS, BY_COLUMNS, WANT_DK, WANT_DV)  # fmt: skip


def sum_columns(problem: Problem, tokens: Tokens, listing: Listing, bits: Bits, row: RowGradients) -> tuple[Sums, Sums]:
    """Return dk / scale, [.., D], and dv, [.., Dv], over neighbours: by one kernel if it fits, or by two.

    Those two are one launch, of programs of either kind, where the table cuts them alike.
    """
    names = problem.column_sums
    if len(names) == 1:
        return _sum_columns(problem, tokens, listing, bits, row, names[0], True, True)
    if problem.config("dk") == problem.config("dv"):
        return _sum_columns(problem, tokens, listing, bits, row, "dk", True, True, together=False)
    dk, _ = _sum_columns(problem, tokens, listing, bits, row, "dk", True, False)
    _, dv = _sum_columns(problem, tokens, listing, bits, row, "dv", False, True)
    return dk, dv


def _sum_columns(
    problem: Problem, tokens: Tokens, listing: Listing, bits: Bits, row: RowGradients, name: str,
    want_dk: bool, want_dv: bool, together: bool = True,
) -> tuple[Sums, Sums]:  # fmt: skip
    kernel = TileKernel(problem, tokens, name)
    chunks_k = problem.width // kernel.columns if want_dk else 0
    chunks_v = problem.width_v // kernel.columns_v if want_dv else 0
    chunks = max(chunks_k, chunks_v) if together else chunks_k + chunks_v
    splits = kernel.splits(chunks)
    sums_k = _new_sums(kernel, splits, problem.width) if want_dk else NO_SUMS
    sums_v = _new_sums(kernel, splits, problem.width_v) if want_dv else NO_SUMS
    kernel.launch(
        _asa_dkv_kernel, (kernel.programs, splits, chunks),
        "q k v do", tokens, listing.of(name), bits, row,
        sums_k, sums_v, problem.scale2, COLUMNS=kernel.columns,
        COLUMNS_V=kernel.columns_v, BY_ROWS=problem.mutual, BY_COLUMNS=problem.one_way_bits or not problem.mutual,
        WANT_DK=want_dk, WANT_DV=want_dv, CHUNKS_K=0 if together else chunks_k,
    )  # fmt: skip
    return sums_k, sums_v


@triton.jit
def _outside_window(rows, keys, i, j, height, width, extra, WINDOW):
    """Whether the windows of the tokens at positions i [BLOCK_M] do not hold those at positions j [BLOCK_N]."""
    t_i, row_i, column_i = place_of(tl.load(rows + i)[:, None], height, width, extra, WINDOW)
    t_j, row_j, column_j = place_of(tl.load(keys + j)[None, :], height, width, extra, WINDOW)
    inside = tl.abs(row_i - row_j) <= WINDOW.HEIGHT // 2
    inside &= tl.abs(column_i - column_j) <= WINDOW.WIDTH // 2
    if WINDOW.VOLUME:
        inside &= tl.abs(t_i - t_j) <= WINDOW.DEPTH // 2
    return inside == 0


@triton.jit(do_not_specialize=SCALARS)
def _asa_dt_kernel(
    q, k, v, do, q_others, k_own, v_own, do_others, tokens, lists, bits, thresholds, row, others, sums, scale2, band,
    sharing, height, width, extra, SCORES, VALUES, MUTUAL: tl.constexpr, WINDOW,
):  # fmt: skip
    """-dl/dt_i, the straight-through gradient of the adaptive threshold, of pairs outside the window.

    Both directions of a pair are laid out [i, j]: four products a tile, two unless MUTUAL. One-way bits A are read by
    rows, for A_ij, and by columns, for A_ji. Of a part of the rows: ``others`` are all rows, and so on; or None.
    """
    padded, key_padded = tokens.rows.padded, tokens.keys.padded
    BLOCK_M: tl.constexpr = SCORES.BLOCK_M
    BLOCK_N: tl.constexpr = SCORES.BLOCK_N
    z, i0 = own_block(padded, BLOCK_M)
    rows = z.to(tl.int64) * padded + i0 + tl.arange(0, BLOCK_M)
    first, length = _own_list(lists, z, i0 // BLOCK_M, padded // BLOCK_M, key_padded, SCORES)
    image = tl.cast(z // sharing, tl.int64)
    n_keys = tl.load(tokens.keys.counts + image)
    kept_i, delta_i = tl.load(row.lse_kept2 + rows), tl.load(row.delta + rows)
    lse_i, cut_i = tl.load(thresholds.lse2 + rows), tl.load(thresholds.cut2 + rows)
    order, key_order = tokens.rows.order + image * padded, tokens.keys.order + image * key_padded
    if others is None:
        others = row
    acc = tl.zeros([BLOCK_M], tl.float32)
    for t in range(tl.program_id(1), length, tl.num_programs(1)):
        j0 = _listed(first, t, SCORES)
        j = j0 + tl.arange(0, BLOCK_N)
        i_row, j_row = z * padded + i0, z * key_padded + j0
        s, back = products_both_ways(q, k, q_others, k_own, i_row, j_row, MUTUAL, SCORES)
        dp, dp_back = products_both_ways(do, v, do_others, v_own, i_row, j_row, MUTUAL, VALUES)
        neighbour = pairs_of_tile(bits, z, i0, j0, padded, key_padded, BLOCK_M, BLOCK_N, True, False)
        counts = (j < n_keys)[None, :]
        if tokens.keys.extra is not None:  # whoever keeps extra tokens, thresholds are not why
            counts &= (j >= tl.load(tokens.keys.extra + image))[None, :]
        if MUTUAL:
            other_way = pairs_of_tile(bits, z, i0, j0, padded, key_padded, BLOCK_M, BLOCK_N, False, True)
            counts &= other_way
            neighbour &= other_way
        if WINDOW.POSITIONS > 0:
            counts &= _outside_window(order, key_order, i0 + tl.arange(0, BLOCK_M), j, height, width, extra, WINDOW)
        empty_i = (kept_i == -float("inf"))[:, None]
        offer = admission_weight(s * scale2 - kept_i[:, None], neighbour, empty_i) * (dp - delta_i[:, None])
        if MUTUAL:
            columns = z.to(tl.int64) * key_padded + j
            kept_j = tl.load(others.lse_kept2 + columns)[None, :]
            weight = admission_weight(back * scale2 - kept_j, neighbour, kept_j == -float("inf"))
            offer += weight * (dp_back - tl.load(others.delta + columns)[None, :])
        if thresholds.kappa2 is not None:
            counts &= s * scale2 >= tl.load(thresholds.kappa2 + rows)[:, None]
        step = step_derivative(((s * scale2 - lse_i[:, None]) - cut_i[:, None]) * LN_2, band)
        acc += tl.sum(tl.where(counts & (step > 0), step * offer, 0), 1)
    tl.store(sums.partial + tl.cast(tl.program_id(1), tl.int64) * sums.rows + rows, acc)


def sum_thresholds(
    problem: Problem, tokens: Tokens, listing: Listing, bits: Bits, row: RowGradients, thresholds: Thresholds,
    band: float, across: Across | None = None,
) -> Sums:  # fmt: skip
    """Return -dl/dt over pairs outside the window, one number a row."""
    kernel = TileKernel(problem, tokens, "dt")
    lists = listing.of("dt")
    splits = kernel.splits()
    sums = _new_sums(kernel, splits)
    tokens_across, others = (None, None) if across is None else (across.tokens, across.row)
    back = [kernel.operand(name, tokens_across) for name in ("q", "k", "v", "do")]
    kernel.launch(
        _asa_dt_kernel, (kernel.programs, splits), "q k v do", *back, tokens, lists, bits, thresholds, row, others,
        sums, problem.scale2, band, problem.sharing, *problem.of_grid, MUTUAL=problem.mutual,
        WINDOW=constants(problem.window),
    )  # fmt: skip
    return sums
