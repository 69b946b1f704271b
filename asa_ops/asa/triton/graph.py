"""The survivors of a forward pass as a graph in CSR form, tokens in raster order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import triton_launch
from ..types import Saved
from .arrange import NO_BITS, Problem
from .tiles import SCALARS, bit_at, image_of


@triton.jit(do_not_specialize=SCALARS)
def _asa_neighbors_kernel(
    words, local, place, key_place, row_offsets, col_indices,
    words_stride, heads, per_image, n, n_keys, padded, width,
    HAS_BITS: tl.constexpr, DENSE: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Write the columns of BLOCK rows, ascending, from their offsets on."""
    blocks = tl.cdiv(n, BLOCK)
    z = tl.cast(tl.program_id(0) // blocks, tl.int64)
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image = image_of(z, heads, per_image)
    p = tl.load(place + image * n + token, mask=token < n, other=-1)
    real = p >= 0
    slot = tl.load(row_offsets + z * n + token, mask=real, other=0)
    for start in range(0, n_keys, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        at = tl.load(key_place + image * n_keys + j, mask=j < n_keys, other=-1)
        pair = real[:, None] & (at >= 0)[None, :]
        kept = pair & DENSE
        if HAS_BITS:
            kept |= bit_at(words + z * words_stride, p[:, None], at[None, :], padded, pair)
        if WINDOW > 0:
            r = (j // width)[None, :] - (token // width)[:, None] + WINDOW // 2
            c = (j % width)[None, :] - (token % width)[:, None] + WINDOW // 2
            near = pair & (r >= 0) & (r < WINDOW) & (c >= 0) & (c < WINDOW)
            flag = local + (z * n + token)[:, None] * (WINDOW * WINDOW) + r * WINDOW + c
            kept |= tl.load(flag, mask=near, other=0) != 0
        kept = kept.to(tl.int32)
        tl.store(col_indices + slot[:, None] + tl.cumsum(kept, 1) - 1, j[None, :] + tl.zeros_like(kept), mask=kept != 0)
        slot += tl.sum(kept, 1)


def write_columns(problem: Problem, saved: Saved, row_offsets: Tensor, col_indices: Tensor) -> None:
    """Fill ``col_indices`` from the bits and flags of a forward pass."""
    rows, keys = problem.rows, problem.keys
    bits = problem.bits(saved.bits) if saved.bits.shape[-1] else NO_BITS
    triton_launch.launch(
        _asa_neighbors_kernel, (problem.zs * triton.cdiv(rows.n, 16),), bits.words, saved.local.view(torch.uint8),
        rows.place, keys.place, row_offsets, col_indices, bits.stride, problem.heads, problem.per_image, rows.n,
        keys.n, rows.padded, max(problem.options.grid[1], 1), HAS_BITS=problem.has_bits, DENSE=problem.dense,
        WINDOW=problem.window, BLOCK=16, BLOCK_J=64,
    )  # fmt: skip
