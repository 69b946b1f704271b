"""The backward in Triton: <do, out> of every pixel, then dq and dk, whose kernel is one, then dv."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support as support
from .triton_lines import SIZES, Lines, finish, length_of, line_of, load_pixels, load_stats, pairs


@triton.jit(do_not_specialize=["pixels", "channels"])
def _criss_cross_delta_kernel(
    do, out, rest, delta, pixels, channels, BLOCK: tl.constexpr, CHUNK: tl.constexpr, HAS_REST: tl.constexpr
):
    """delta = <do, out> of some pixels of an image; maps [B, channels, pixels]."""
    image = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    summed = tl.zeros([BLOCK], tl.float32)
    for first in range(0, channels, CHUNK):
        c = first + tl.arange(0, CHUNK)
        offsets = (image * channels + c[:, None]) * pixels + at[None, :]
        mask = (c < channels)[:, None] & (at < pixels)[None, :]
        exact = tl.load(out + offsets, mask=mask, other=0).to(tl.float32)
        if HAS_REST:
            exact += tl.load(rest + offsets, mask=mask, other=0).to(tl.float32)
        summed += tl.sum(tl.load(do + offsets, mask=mask, other=0).to(tl.float32) * exact, 0)
    tl.store(delta + image * pixels + at, summed, mask=at < pixels)


@triton.jit(do_not_specialize=["blocks", *SIZES])
def _criss_cross_dqk_kernel(
    own, other, own_v, other_v, stats, delta, partial, result, scale, blocks, height, width, dim, dim_v,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COLUMN: tl.constexpr,
    PRECISION: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """dq / scale = sum over keys of ds k; if OF_KEYS dk / scale = sum over queries of ds q, tiles being [keys, queries].

    ``own``, ``own_v``: q and do, or k and v; ``other``, ``other_v``: the others.
    """
    block, first, image = line_of(blocks, height, width, COLUMN)
    n, step = length_of(height, width, COLUMN)
    start = image.to(tl.int64) * height * width
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = i < n
    pixels = first + i * step
    mine = load_pixels(own, start + pixels, valid, 0, dim, DIM)
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
            mean = tl.load(delta + at, mask=j < n, other=0)
            base, total, mean = base[None, :], total[None, :], mean[None, :]
        else:
            base, total = load_stats(stats, start, pixels, valid, height, width)
            mean = tl.load(delta + start + pixels, mask=valid, other=0)
            base, total, mean = base[:, None], total[:, None], mean[:, None]
        kept = pairs(i, j, n, COLUMN)
        p = tl.exp(tl.where(kept, s - base, -float("inf"))) / total
        ds = tl.where(kept, p * (dp - mean), 0)
        acc = tl.dot(ds.to(theirs.dtype), theirs, acc, input_precision=PRECISION)
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
        p = tl.exp(tl.where(pairs(j, i, n, COLUMN), s - base[None, :], -float("inf"))) / total[None, :]
        gradients = load_pixels(do, at, i < n, channel, dim_v, CHUNK)
        acc = tl.dot(p.to(gradients.dtype), gradients, acc, input_precision=PRECISION)
    finish(acc, partial, result, image, start, pixels, valid, channel, dim_v, height, width, CHUNK, COLUMN)


def backward(
    do: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor, rest: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv."""
    lines = Lines(query, key, value, scale)
    stats, delta = stats.contiguous(), lines.new_partial(1)
    pixels, block, has_rest = lines.height * lines.width, 64, rest.shape[1] > 0
    support.launch(
        _criss_cross_delta_kernel, (triton.cdiv(pixels, block), lines.batch), do.contiguous(), out.contiguous(),
        rest.contiguous(), delta, pixels, lines.dim_v, BLOCK=block, CHUNK=32, HAS_REST=has_rest,
    )  # fmt: skip
    do = lines.channels_last(do)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    partial = lines.new_partial(lines.dim)
    mine, others = (lines.q, lines.k), (do, lines.v)
    lines.launch(_criss_cross_dqk_kernel, 1, *mine, *others, stats, delta, partial, dq, OF_KEYS=False)
    lines.launch(_criss_cross_dqk_kernel, 1, *mine[::-1], *others[::-1], stats, delta, partial, dk, OF_KEYS=True)
    lines.launch(_criss_cross_dv_kernel, lines.chunks, lines.q, lines.k, do, stats, lines.new_partial(lines.dim_v), dv)
    return dq, dk, dv
