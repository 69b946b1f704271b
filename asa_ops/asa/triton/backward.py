"""The backward in Triton, over the neighbours that the forward stored as bits: rows for dq, columns for dk and dv.

Each program owns what it sums, in a fixed order: no atomics, bitwise repeatable. Scores are formed again, and weights
from them never exceed 1, whatever their last bits: see ``top_of``. ``delta_i`` = <do_i, out_i>. Pairs that survive only
locally come in ``window_bwd``, which also sums the parts written here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from ..types import Saved
from .arrange import MAX_SPLITS, NO_BITS, Bits, Problem, RowFindings, RowGradients
from .plan import Thresholds, find_occupied, find_thresholds, keep_everybody, list_blocks
from .tiles import (
    SCALARS,
    admission_weight,
    exponential,
    image_of,
    load_tile,
    load_whole,
    operand,
    pairs_of_tile,
    product,
    shrink_of,
    some_columns,
    step_derivative,
)
from .window_bwd import NO_PARTS, Parts, finish_columns, finish_rows, settle_delta

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=SCALARS)
def _asa_dq_kernel(
    q, k, v, do, lists, lengths, words, top, share, delta, bounds, partial,
    words_stride, scale2, zs, padded, key_padded, others, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_V: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, BY_COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr, SHRINK: tl.constexpr,
):  # fmt: skip
    """dq_i / scale = sum_j p_ij (<do_i, v_j> - delta_i) k_j over every ``splits``-th listed block.

    Axis 2 of the grid: chunks of COLUMNS of the result. RESIDUAL: only sum_j p_ij (<do_i, v_j> - delta_i), which would
    be 0 if delta were not rounded.
    """
    blocks = padded // BLOCK_M
    z = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    i0 = block * BLOCK_M
    split = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS
    rows = z.to(tl.int64) * padded + i0 + tl.arange(0, BLOCK_M)
    top_i, share_i, delta_i = tl.load(top + rows), tl.load(share + rows), tl.load(delta + rows)
    shrink = shrink_of(bounds, z, zs, SHRINK)
    words += z.to(tl.int64) * words_stride
    lists += (z.to(tl.int64) * blocks + block) * others
    SUB: tl.constexpr = BLOCK_N if BLOCK_N > 64 else 64
    PARTS: tl.constexpr = SUB // BLOCK_N
    q_whole = load_whole(q, z * padded + i0, BLOCK_M, DIM, CHUNK, TMA)
    do_whole = load_whole(do, z * padded + i0, BLOCK_M, DIM_V, CHUNK_V, TMA)
    if RESIDUAL:
        acc = tl.zeros([BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for t in range(split, tl.load(lengths + z * blocks + block) * PARTS, splits):
        j0 = tl.load(lists + t // PARTS) * SUB + t % PARTS * BLOCK_N
        at = z * key_padded + j0
        k_whole = load_whole(k, at, BLOCK_N, DIM, CHUNK, TMA)
        s = product(q, q_whole, z * padded + i0, k, k_whole, at, BLOCK_M, BLOCK_N, DIM, CHUNK, PRECISION, TMA)
        v_whole = load_whole(v, at, BLOCK_N, DIM_V, CHUNK_V, TMA)
        dp = product(do, do_whole, z * padded + i0, v, v_whole, at,
                     BLOCK_M, BLOCK_N, DIM_V, CHUNK_V, PRECISION, TMA)  # fmt: skip
        kept = pairs_of_tile(words, i0, j0, padded, BLOCK_M, BLOCK_N, True, BY_COLUMNS)
        p = exponential(s * scale2 - top_i[:, None], kept) * share_i[:, None]
        ds = tl.where(kept, p * (dp - delta_i[:, None]), 0) * shrink
        if RESIDUAL:
            acc += tl.sum(ds, 1)
        else:
            keys = some_columns(k, k_whole, at, column, BLOCK_N, DIM, CHUNK, COLUMNS, TMA)
            acc = tl.dot(operand(ds, PRECISION).to(keys.dtype), keys, acc, input_precision=PRECISION)
    at = split * tl.cast(zs, tl.int64) * padded + rows
    if RESIDUAL:
        tl.store(partial + at, acc)
    else:
        tl.store(partial + at[:, None] * DIM + (column + tl.arange(0, COLUMNS))[None, :], acc)


@triton.jit(do_not_specialize=SCALARS)
def _asa_dkv_kernel(
    q, k, v, do, lists, lengths, words, top, share, delta, bounds, partial_k, partial_v,
    words_stride, scale2, zs, padded, key_padded, others, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_V: tl.constexpr, COLUMNS: tl.constexpr, COLUMNS_V: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BY_ROWS: tl.constexpr, BY_COLUMNS: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    SHRINK: tl.constexpr,
):  # fmt: skip
    """dv_j = sum_i p_ij do_i and dk_j / scale = sum_i p_ij (<do_i, v_j> - delta_i) q_i, one or both.

    Tiles are [keys, queries], so that neither p nor its gradient is ever transposed. Axis 2 of the grid: chunks of
    the result.
    """
    blocks = key_padded // BLOCK_M
    z = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    j0 = block * BLOCK_M
    split = tl.program_id(1)
    chunk = tl.program_id(2)
    words += z.to(tl.int64) * words_stride
    lists += (z.to(tl.int64) * blocks + block) * others
    at_key = z * key_padded + j0
    SUB: tl.constexpr = BLOCK_N if BLOCK_N > 64 else 64
    PARTS: tl.constexpr = SUB // BLOCK_N
    k_whole = load_whole(k, at_key, BLOCK_M, DIM, CHUNK, TMA)
    if WANT_DK:
        shrink = shrink_of(bounds, z, zs, SHRINK)
        v_whole = load_whole(v, at_key, BLOCK_M, DIM_V, CHUNK_V, TMA)
        dk = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    if WANT_DV:
        dv = tl.zeros([BLOCK_M, COLUMNS_V], tl.float32)
    for t in range(split, tl.load(lengths + z * blocks + block) * PARTS, splits):
        i0 = tl.load(lists + t // PARTS) * SUB + t % PARTS * BLOCK_N
        at = z * padded + i0
        rows = z.to(tl.int64) * padded + i0 + tl.arange(0, BLOCK_N)
        q_whole = load_whole(q, at, BLOCK_N, DIM, CHUNK, TMA)
        s = product(k, k_whole, at_key, q, q_whole, at, BLOCK_M, BLOCK_N, DIM, CHUNK, PRECISION, TMA)
        kept = pairs_of_tile(words, j0, i0, padded, BLOCK_M, BLOCK_N, BY_ROWS, BY_COLUMNS)
        # As exponential() has it; who is no survivor is left out below, which takes fewer registers.
        e = tl.exp2(tl.minimum(s * scale2 - tl.load(top + rows)[None, :], 0))
        do_whole = load_whole(do, at, BLOCK_N, DIM_V, CHUNK_V, TMA)
        if WANT_DV:
            live = some_columns(do, do_whole, at, chunk * COLUMNS_V, BLOCK_N, DIM_V, CHUNK_V, COLUMNS_V, TMA)
            p = tl.where(kept, e * tl.load(share + rows)[None, :], 0)
            dv = tl.dot(operand(p, PRECISION).to(live.dtype), live, dv, input_precision=PRECISION)
        if WANT_DK:
            dp = product(v, v_whole, at_key, do, do_whole, at, BLOCK_M, BLOCK_N, DIM_V, CHUNK_V, PRECISION, TMA)
            gain = (dp - tl.load(delta + rows)[None, :]) * (tl.load(share + rows) * shrink)[None, :]
            ds = tl.where(kept, e * gain, 0)
            queries = some_columns(q, q_whole, at, chunk * COLUMNS, BLOCK_N, DIM, CHUNK, COLUMNS, TMA)
            dk = tl.dot(operand(ds, PRECISION).to(queries.dtype), queries, dk, input_precision=PRECISION)
    at = (split * tl.cast(zs, tl.int64) * key_padded + at_key + tl.arange(0, BLOCK_M))[:, None]
    if WANT_DK:
        tl.store(partial_k + at * DIM + (chunk * COLUMNS + tl.arange(0, COLUMNS))[None, :], dk)
    if WANT_DV:
        tl.store(partial_v + at * DIM_V + (chunk * COLUMNS_V + tl.arange(0, COLUMNS_V))[None, :], dv)


@triton.jit(do_not_specialize=SCALARS)
def _asa_dt_kernel(
    q, k, v, do, lists, lengths, words, lse2, cut2, kappa2, lse_kept2, delta, order, key_counts, partial,
    words_stride, scale2, band, heads, zs, per_image, padded, key_padded, others, splits, width, reach,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_V: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    MUTUAL: tl.constexpr, HAS_TOPK: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """-dl/dt_i, the straight-through gradient of the adaptive threshold, of pairs outside the window.

    Both directions of a pair are laid out [i, j]: four products a tile, two unless MUTUAL. One-way bits A are read by
    rows, for A_ij, and by columns, for A_ji.
    """
    blocks = padded // BLOCK_M
    z = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    i0 = block * BLOCK_M
    split = tl.program_id(1)
    at_i = z * padded + i0
    rows = z.to(tl.int64) * padded + i0 + tl.arange(0, BLOCK_M)
    words += z.to(tl.int64) * words_stride
    lists += (z.to(tl.int64) * blocks + block) * others
    image = tl.cast(image_of(z, heads, per_image), tl.int64)
    n_keys = tl.load(key_counts + image)
    kept_i, delta_i = tl.load(lse_kept2 + rows), tl.load(delta + rows)
    lse_i, cut_i = tl.load(lse2 + rows), tl.load(cut2 + rows)
    order += image * padded
    SUB: tl.constexpr = BLOCK_N if BLOCK_N > 64 else 64
    PARTS: tl.constexpr = SUB // BLOCK_N
    acc = tl.zeros([BLOCK_M], tl.float32)
    for t in range(split, tl.load(lengths + z * blocks + block) * PARTS, splits):
        j0 = tl.load(lists + t // PARTS) * SUB + t % PARTS * BLOCK_N
        at_j = z * key_padded + j0
        j = j0 + tl.arange(0, BLOCK_N)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        back = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for c in range(0, DIM, CHUNK):
            qi = load_tile(q, at_i, c, BLOCK_M, CHUNK, DIM, TMA)
            s = tl.dot(qi, load_tile(k, at_j, c, BLOCK_N, CHUNK, DIM, TMA).T, s, input_precision=PRECISION)
            if MUTUAL:
                ki = load_tile(k, at_i, c, BLOCK_M, CHUNK, DIM, TMA)
                back = tl.dot(ki, load_tile(q, at_j, c, BLOCK_N, CHUNK, DIM, TMA).T, back, input_precision=PRECISION)
        dp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        dp_back = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for c in range(0, DIM_V, CHUNK_V):
            doi = load_tile(do, at_i, c, BLOCK_M, CHUNK_V, DIM_V, TMA)
            dp = tl.dot(doi, load_tile(v, at_j, c, BLOCK_N, CHUNK_V, DIM_V, TMA).T, dp, input_precision=PRECISION)
            if MUTUAL:
                vi = load_tile(v, at_i, c, BLOCK_M, CHUNK_V, DIM_V, TMA)
                doj = load_tile(do, at_j, c, BLOCK_N, CHUNK_V, DIM_V, TMA)
                dp_back = tl.dot(vi, doj.T, dp_back, input_precision=PRECISION)
        neighbour = pairs_of_tile(words, i0, j0, padded, BLOCK_M, BLOCK_N, True, False)
        counts = (j < n_keys)[None, :]
        if MUTUAL:
            other_way = pairs_of_tile(words, i0, j0, padded, BLOCK_M, BLOCK_N, False, True)
            counts &= other_way
            neighbour &= other_way
        if HAS_TOPK:
            counts &= s * scale2 >= tl.load(kappa2 + rows)[:, None]
        if HAS_WINDOW:
            token_i = tl.load(order + i0 + tl.arange(0, BLOCK_M))[:, None]
            token_j = tl.load(order + j)[None, :]
            near = tl.abs(token_i // width - token_j // width) <= reach
            counts &= (near & (tl.abs(token_i % width - token_j % width) <= reach)) == 0
        empty_i = (kept_i == -float("inf"))[:, None]
        offer = admission_weight(s * scale2 - kept_i[:, None], neighbour, empty_i) * (dp - delta_i[:, None])
        if MUTUAL:
            columns = z.to(tl.int64) * padded + j
            kept_j = tl.load(lse_kept2 + columns)[None, :]
            weight = admission_weight(back * scale2 - kept_j, neighbour, kept_j == -float("inf"))
            offer += weight * (dp_back - tl.load(delta + columns)[None, :])
        step = step_derivative(((s * scale2 - lse_i[:, None]) - cut_i[:, None]) * LN_2, band)
        acc += tl.sum(tl.where(counts & (step > 0), step * offer, 0), 1)
    tl.store(partial + split * tl.cast(zs, tl.int64) * padded + rows, acc)


def backward(problem: Problem, do: Tensor, saved: Saved, band: float | None, tokens: tuple, learning: tuple) -> None:
    """Write ``tokens``, the gradients dq, dk, dv, and ``learning``, dalpha and dbeta, each where it is not None."""
    row = problem.arrange_gradient(do, saved)
    memory = problem.new_bits() if problem.dense else saved.bits
    sums_q = sums_k = sums_v = sums_t = NO_PARTS
    bits, thresholds = NO_BITS, None
    if memory.shape[-1]:
        bits = problem.bits(memory)
        if problem.dense:
            unused = problem.q.new_empty((3, problem.zs, problem.rows.padded), dtype=torch.int32)
            keep_everybody(problem, bits, RowFindings(unused[0].view(torch.float32), *unused[1:]), unused[:0])
        flags = find_occupied(problem, bits)
        if problem.dtype == torch.float32:
            settle_delta(problem, saved, bits, row, _sum_rows(problem, flags, bits, row, residual=True))
        sums_q = _sum_rows(problem, flags, bits, row)
        sums_k, sums_v = _sum_columns(problem, flags, bits, row)
        if learning[0] is not None:
            thresholds = find_thresholds(problem, saved, bits, None, band)
            sums_t = _sum_thresholds(problem, flags, bits, row, thresholds, band)
    elif problem.dtype == torch.float32:
        settle_delta(problem, saved, bits, row, NO_PARTS)
    finish_rows(problem, saved, bits, row, thresholds, band, sums_q, sums_t, tokens[0], *learning)
    finish_columns(problem, saved, bits, row, sums_k, sums_v, *tokens[1:])


def _sum_rows(problem: Problem, flags: Tensor, bits: Bits, row: RowGradients, residual: bool = False) -> Parts:
    """Return dq / scale over neighbours, [splits, zs * padded, D]; ``residual``: what delta misses, without D."""
    config = problem.config("dq")
    rows, keys, zs = problem.rows, problem.keys, problem.zs
    m, n = config.block_m, config.block_n
    blocks = rows.padded // m
    chunk, chunk_v = min(config.chunk, problem.width), min(config.chunk, problem.width_v)
    columns = min(config.columns, problem.width)
    lists = list_blocks(problem, flags, flags, config, rows=True)
    parts = 1 if residual else problem.width // columns
    splits = problem.splits(zs * blocks * parts, MAX_SPLITS)
    partial = problem.new(splits, zs * rows.padded, *(() if residual else (problem.width,)))
    triton_launch.launch(
        _asa_dq_kernel, (zs * blocks, splits, parts),
        *problem.tiles(config, q=(m, chunk), k=(n, chunk), v=(n, chunk_v), do=(m, chunk_v)), lists.lists, lists.lengths,
        bits.words, row.top, row.share, row.delta, problem.bounds, partial, bits.stride, problem.scale2, zs,
        rows.padded, keys.padded, lists.others, splits, BLOCK_M=m, BLOCK_N=n, DIM=problem.width, DIM_V=problem.width_v,
        CHUNK=chunk, CHUNK_V=chunk_v, COLUMNS=columns, BY_COLUMNS=problem.one_way_bits, RESIDUAL=residual,
        SHRINK=problem.bounds is not None, **problem.common(config),
    )  # fmt: skip
    return Parts(partial, splits)


def _sum_columns(problem: Problem, flags: Tensor, bits: Bits, row: RowGradients) -> tuple[Parts, Parts]:
    """Return dk / scale and dv over neighbours, [splits, zs * padded, D or Dv]: by one kernel if it fits, or two."""
    rows, keys, zs = problem.rows, problem.keys, problem.zs
    fused = problem.config("dkv")
    fused = fused is not None and fused.columns >= max(problem.width, problem.width_v)
    sums = {}
    for name in ("dkv",) if fused else ("dk", "dv"):
        config = problem.config(name)
        m, n = config.block_m, config.block_n
        blocks = keys.padded // m
        chunk, chunk_v = min(config.chunk, problem.width), min(config.chunk, problem.width_v)
        columns, columns_v = min(config.columns, problem.width), min(config.columns, problem.width_v)
        parts = {"dkv": 1, "dk": problem.width // columns, "dv": problem.width_v // columns_v}[name]
        lists = list_blocks(problem, flags, flags, config, rows=False)
        splits = problem.splits(zs * blocks * parts, MAX_SPLITS)
        widths = {"k": problem.width, "v": problem.width_v}
        sums |= {x: Parts(problem.new(splits, zs * keys.padded, widths[x]), splits) for x in name[1:]}
        triton_launch.launch(
            _asa_dkv_kernel, (zs * blocks, splits, parts),
            *problem.tiles(config, q=(n, chunk), k=(m, chunk), v=(m, chunk_v), do=(n, chunk_v)), lists.lists,
            lists.lengths, bits.words, row.top, row.share, row.delta, problem.bounds,
            sums["k"].partial if "k" in name else None, sums["v"].partial if "v" in name else None, bits.stride,
            problem.scale2, zs, rows.padded, keys.padded, lists.others, splits, BLOCK_M=m, BLOCK_N=n,
            DIM=problem.width, DIM_V=problem.width_v, CHUNK=chunk, CHUNK_V=chunk_v, COLUMNS=columns,
            COLUMNS_V=columns_v, BY_ROWS=problem.mutual, BY_COLUMNS=problem.one_way_bits or not problem.mutual,
            WANT_DK="k" in name, WANT_DV="v" in name, SHRINK=problem.bounds is not None, **problem.common(config),
        )  # fmt: skip
    return sums["k"], sums["v"]


def _sum_thresholds(
    problem: Problem, flags: Tensor, bits: Bits, row: RowGradients, thresholds: Thresholds, band: float
) -> Parts:
    """Return -dl/dt over pairs outside the window, [splits, zs, padded]."""
    config = problem.config("dt")
    rows, keys, zs = problem.rows, problem.keys, problem.zs
    m, n = config.block_m, config.block_n
    blocks = rows.padded // m
    chunk, chunk_v = min(config.chunk, problem.width), min(config.chunk, problem.width_v)
    # Tiles with a score in the band around their rows' thresholds, and a neighbour the other way.
    lists = list_blocks(problem, thresholds.flags, flags, config, rows=True)
    splits = problem.splits(zs * blocks, MAX_SPLITS)
    partial = problem.new(splits, zs, rows.padded)
    triton_launch.launch(
        _asa_dt_kernel, (zs * blocks, splits),
        *problem.tiles(config, q=(m, chunk), k=(n, chunk), v=(n, chunk_v), do=(m, chunk_v)), lists.lists, lists.lengths,
        bits.words, *thresholds[:3], row.lse_kept2, row.delta, rows.order, keys.counts, partial, bits.stride,
        problem.scale2, band, problem.heads, zs, problem.per_image, rows.padded, keys.padded, lists.others, splits,
        max(problem.options.grid[1], 1), problem.window // 2, BLOCK_M=m, BLOCK_N=n, DIM=problem.width,
        DIM_V=problem.width_v, CHUNK=chunk, CHUNK_V=chunk_v, MUTUAL=problem.mutual, HAS_TOPK=problem.has_topk,
        HAS_WINDOW=problem.window > 0, **problem.common(config),
    )  # fmt: skip
    return Parts(partial, splits)
