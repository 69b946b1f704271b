"""The backward in Triton: <do, out> of every pixel, dq and dk, all by one kernel; then dv."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_lines import SIZES, Lines, finish, length_of, line_of, load_pixels, load_stats, pairs, softmax_weight


@triton.jit(do_not_specialize=["blocks", *SIZES])
def _criss_cross_dqk_kernel(
    own, other, own_v, other_v, stats, delta, partial, result, scale, blocks, height, width, dim, dim_v,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COLUMN: tl.constexpr,
    PRECISION: tl.constexpr, OF_KEYS: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """dq / scale = sum over keys of ds k; if OF_KEYS dk / scale = sum over queries of ds q, tiles [keys, queries].

    DELTA: <do, out> = sum over keys of p dp instead, formed from the very numbers that it is subtracted from.

    ``own``, ``own_v``: q and do, or k and v; ``other``, ``other_v``: the others.
    """
    block, first, image = line_of(blocks, height, width, COLUMN)
    n, step = length_of(height, width, COLUMN)
    start = image.to(tl.int64) * height * width
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = i < n
    pixels = first + i * step
    mine = load_pixels(own, start + pixels, valid, 0, dim, DIM)
    if DELTA:
        acc = tl.zeros([BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    for j0 in range(0, n, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        at = start + first + j * step
        theirs = load_pixels(other, at, j < n, 0, dim, DIM)
        s = tl.dot(mine, theirs.T, input_precision=PRECISION) * scale
        dp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for channel in range(0, dim_v, CHUNK):
            x = load_pixels(own_v, start + pixels, valid, channel, dim_v, CHUNK)
            y = load_pixels(other_v, at, j < n, channel, dim_v, CHUNK)
            dp = tl.dot(x, y.T, dp, input_precision=PRECISION)
        if OF_KEYS:
            base, total = load_stats(stats, start, first + j * step, j < n, height, width)
            base, total = base[None, :], total[None, :]
        else:
            base, total = load_stats(stats, start, pixels, valid, height, width)
            base, total = base[:, None], total[:, None]
        kept = pairs(i, j, n, COLUMN)
        p = softmax_weight(s, base, total, kept)
        if DELTA:
            acc += tl.sum(tl.where(kept, p * dp, 0), 1)
        else:
            if OF_KEYS:
                mean = tl.load(delta + at, mask=j < n, other=0)[None, :]
            else:
                mean = tl.load(delta + start + pixels, mask=valid, other=0)[:, None]
            ds = tl.where(kept, p * (dp - mean), 0)
            acc = tl.dot(ds.to(theirs.dtype), theirs, acc, input_precision=PRECISION)
    if DELTA:
        if not COLUMN:
            acc += tl.load(delta + start + pixels, mask=valid, other=0)
        tl.store(delta + start + pixels, acc, mask=valid)
    else:
        finish(acc * scale, partial, result, image, start, pixels, valid, 0, dim, height, width, DIM, COLUMN)


@triton.jit(do_not_specialize=["blocks", *SIZES])
def _criss_cross_dv_kernel(
    q, k, do, stats, partial, result, scale, blocks, height, width, dim, dim_v,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COLUMN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv = sum over queries of p do, for a chunk of channels; tiles are [keys, queries]."""
    block, first, image = line_of(blocks, height, width, COLUMN)
    n, step = length_of(height, width, COLUMN)
    start = image.to(tl.int64) * height * width
    channel = tl.program_id(1) * CHUNK
    j = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = j < n
    pixels = first + j * step
    keys = load_pixels(k, start + pixels, valid, 0, dim, DIM)
    acc = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    for i0 in range(0, n, BLOCK_N):
        i = i0 + tl.arange(0, BLOCK_N)
        at = start + first + i * step
        queries = load_pixels(q, at, i < n, 0, dim, DIM)
        s = tl.dot(keys, queries.T, input_precision=PRECISION) * scale
        base, total = load_stats(stats, start, first + i * step, i < n, height, width)
        p = softmax_weight(s, base[None, :], total[None, :], pairs(j, i, n, COLUMN))
        gradients = load_pixels(do, at, i < n, channel, dim_v, CHUNK)
        acc = tl.dot(p.to(gradients.dtype), gradients, acc, input_precision=PRECISION)
    finish(acc, partial, result, image, start, pixels, valid, channel, dim_v, height, width, CHUNK, COLUMN)


def backward(
    do: Tensor, query: Tensor, key: Tensor, value: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv."""
    lines = Lines(query, key, value, scale)
    stats, do = stats.contiguous(), lines.channels_last(do)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    delta, partial = lines.new_partial(1), lines.new_partial(lines.dim)
    mine, others = (lines.q, lines.k), (do, lines.v)
    for delta_first in (True, False):
        rest = stats, delta, partial, dq
        lines.launch(_criss_cross_dqk_kernel, 1, *mine, *others, *rest, OF_KEYS=False, DELTA=delta_first)
    rest = stats, delta, partial, dk
    lines.launch(_criss_cross_dqk_kernel, 1, *mine[::-1], *others[::-1], *rest, OF_KEYS=True, DELTA=False)
    lines.launch(_criss_cross_dv_kernel, lines.chunks, lines.q, lines.k, do, stats, lines.new_partial(lines.dim_v), dv)
    return dq, dk, dv
