"""The local block: who survives in the window; and the graph of all survivors.

Pairs of a window are few and scattered, so kernels take them one offset at a time, with plain float32 products. The
tile kernels know the mutual neighbours M only; ``finish`` adds the pairs that survive locally without being neighbours.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from ..types import Saved
from .problem import NO_WINDOW, Bits, Order, PerHead, Problem, Tokens, Window
from .tiles import (
    SCALARS,
    UNROLL,
    bit_at,
    constants,
    in_window,
    multiplier_of,
    of_head,
    place_of,
    raster_of,
    rows_of,
)

MAX_HELD = 32


@triton.jit
def _score(q_i, k, z, at, valid, padded, scale2, DIM: tl.constexpr):
    """Scores of rows with the keys at ``at``, base 2, where they are ``valid``."""
    d = tl.arange(0, DIM)
    k_j = tl.load(k + (z * padded + at)[:, None] * DIM + d[None, :], mask=valid[:, None], other=0).to(tl.float32)
    return tl.sum(q_i * k_j, 1) * scale2


class Local(NamedTuple):
    """What is kept of windows."""

    log_mean2: PerHead
    survives: PerHead


NOTHING_LOCAL = Local(PerHead(None, 0), PerHead(None, 0))


class WindowCut(NamedTuple):
    """What the local block is compiled for; constants."""

    BLOCK: int  # rows of a program
    DIM: int
    WINDOW: Window
    HELD: int  # so many scores a row are held until the mean is known; 0: they are formed again, for any window


@triton.jit
def window_of_rows(
    program, tokens, beta, kept, beta_stride_b, beta_stride_h, beta_stride_n, scale2, heads, sharing, n, height, width,
    extra, CUT,
):  # fmt: skip
    """log_mean2_i = log2 mean exp2 s2_ij over the window of i; local survivors s2_ij - log_mean2_i > log2 beta_i.

    Padding has no local survivors.
    """
    BLOCK: tl.constexpr = CUT.BLOCK
    POSITIONS: tl.constexpr = CUT.WINDOW.POSITIONS
    padded, key_padded = tokens.rows.padded, tokens.keys.padded
    z, p = rows_of(program, padded, BLOCK)
    image = z // sharing
    token = tl.load(tokens.rows.order + image * padded + p)
    place = tokens.keys.place + image * n
    real = token >= 0
    q_i = tl.load(tokens.q + (z * padded + p)[:, None] * CUT.DIM + tl.arange(0, CUT.DIM)[None, :]).to(tl.float32)
    m = tl.full([BLOCK], -float("inf"), tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    members = tl.zeros([BLOCK], tl.float32)
    first = tl.zeros([BLOCK], tl.int32)  # offset of the largest
    if CUT.HELD > 0:
        index = tl.arange(0, CUT.HELD)[None, :]
        scores = tl.full([BLOCK, CUT.HELD], -float("inf"), tl.float32)
    for offset in tl.range(POSITIONS, loop_unroll_factor=UNROLL):
        _, at, there = in_window(place, token, offset, n, height, width, extra, CUT.WINDOW)
        s = tl.where(there, _score(q_i, tokens.k, z, at, there, key_padded, scale2, CUT.DIM), -float("inf"))
        first = tl.where(s > m, offset, first)
        m_new = tl.maximum(m, s)
        base = tl.where(m_new == -float("inf"), 0, m_new)
        summed = summed * tl.exp2(m - base) + tl.exp2(s - base)
        members += there.to(tl.float32)
        m = m_new
        if CUT.HELD > 0:
            scores = tl.where(index == offset, s[:, None], scores)
    mean2 = m + tl.log2(summed) - tl.log2(members)
    tl.store(of_head(kept.log_mean2, z) + token, mean2, mask=real)
    multiplier = multiplier_of(beta, z, token, real, heads, beta_stride_b, beta_stride_h, beta_stride_n)
    cut = tl.where(multiplier >= 0, tl.log2(multiplier), float("nan"))
    written, in_raster = token != -1, raster_of(token)
    flags = of_head(kept.survives, z) + in_raster.to(tl.int64) * POSITIONS
    if CUT.HELD > 0:
        survives = real[:, None] & (scores - mean2[:, None] > cut[:, None])
        inside = written[:, None] & (index < POSITIONS)
        tl.store(flags[:, None] + index, survives, mask=inside)
    else:
        for offset in range(POSITIONS):
            _, at, there = in_window(place, token, offset, n, height, width, extra, CUT.WINDOW)
            # The largest must not miss a cut that it exceeds by its last bits.
            s = tl.where(offset == first, m, _score(q_i, tokens.k, z, at, there, key_padded, scale2, CUT.DIM))
            tl.store(flags + offset, there & (s - mean2 > cut), mask=written)


@triton.jit(do_not_specialize=SCALARS)
def _asa_window_kernel(
    tokens, beta, kept, beta_stride_b, beta_stride_h, beta_stride_n, scale2, heads, sharing, n, height, width, extra,
    CUT,
):  # fmt: skip
    """:func:`window_of_rows`, where there is nothing else to do meanwhile."""
    window_of_rows(tl.program_id(0), tokens, beta, kept, beta_stride_b, beta_stride_h, beta_stride_n, scale2, heads,
                   sharing, n, height, width, extra, CUT)  # fmt: skip


NO_CUT = constants(WindowCut(0, 0, NO_WINDOW, 0))


def window_cut(problem: Problem) -> WindowCut:
    """Return what the local block is compiled for."""
    held = triton.next_power_of_2(problem.window.POSITIONS)
    return constants(WindowCut(problem.block, problem.width, problem.window, held if held <= MAX_HELD else 0))


def find_local_survivors(problem: Problem, tokens: Tokens, saved: Saved) -> None:
    """Write log_mean and local of ``saved``."""
    beta, kept = problem.inputs.beta, Local(PerHead.of(saved.log_mean), PerHead.of(saved.local))
    triton_launch.launch(
        _asa_window_kernel, problem.row_programs, tokens, beta, kept, *problem.strides(beta), problem.scale2,
        problem.heads, problem.sharing, problem.n, *problem.of_grid, CUT=window_cut(problem), warps=problem.warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=SCALARS)
def _asa_neighbors_kernel(
    bits, local, rows, keys, first, row_offsets, col_indices, sharing, n, n_keys, height, width, extra,
    DENSE: tl.constexpr, WINDOW, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Write the columns of BLOCK rows, ascending, from their offsets on; of those from position ``first`` on."""
    blocks = tl.cdiv(n, BLOCK)
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image = z // sharing
    p = tl.load(rows.place + image * n + token, mask=token < n, other=-1) - first
    real = (p >= 0) & (p < rows.padded)
    slot = tl.load(row_offsets + z * n + token, mask=real, other=0)
    for start in range(0, tl.where(tl.max(real.to(tl.int32), 0) != 0, n_keys, 0), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        at = tl.load(keys.place + image * n_keys + j, mask=j < n_keys, other=-1)
        pair = real[:, None] & (at >= 0)[None, :]
        kept = pair & DENSE
        if bits.words is not None:
            kept |= bit_at(bits.words + z * bits.stride, p[:, None], at[None, :], rows.padded, pair)
        if WINDOW.POSITIONS > 0:
            t_i, r_i, c_i = place_of(token, height, width, extra, WINDOW)
            t_j, r_j, c_j = place_of(j, height, width, extra, WINDOW)
            t = t_j[None, :] - t_i[:, None] + WINDOW.DEPTH // 2
            r = r_j[None, :] - r_i[:, None] + WINDOW.HEIGHT // 2
            c = c_j[None, :] - c_i[:, None] + WINDOW.WIDTH // 2
            there = pair & (t >= 0) & (t < WINDOW.DEPTH)
            there &= (r >= 0) & (r < WINDOW.HEIGHT) & (c >= 0) & (c < WINDOW.WIDTH)
            if extra is not None:
                there &= (token >= extra)[:, None] & (j >= extra)[None, :]
            offset = (t * WINDOW.HEIGHT + r) * WINDOW.WIDTH + c
            flag = of_head(local, z) + token.to(tl.int64)[:, None] * WINDOW.POSITIONS + offset
            kept |= tl.load(flag, mask=there, other=0) != 0
        kept = kept.to(tl.int32)
        tl.store(col_indices + slot[:, None] + tl.cumsum(kept, 1) - 1, j[None, :] + tl.zeros_like(kept), mask=kept != 0)
        slot += tl.sum(kept, 1)


def write_columns(
    problem: Problem, rows: Order, keys: Order, bits: Bits, local: Tensor, row_offsets: Tensor, col_indices: Tensor,
    first: int = 0,
) -> None:  # fmt: skip
    """Fill ``col_indices`` from the bits and local survivors of a forward; tokens in raster order.

    ``rows`` may be some of all, from position ``first`` on.
    """
    triton_launch.launch(
        _asa_neighbors_kernel, (problem.n_heads * triton.cdiv(problem.n, 16),), bits, PerHead.of(local), rows, keys,
        first, row_offsets, col_indices, problem.sharing, problem.n, problem.n_keys, *problem.of_grid,
        DENSE=problem.dense, WINDOW=constants(problem.window), BLOCK=16, BLOCK_J=64,
    )  # fmt: skip
