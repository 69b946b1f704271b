"""Criss-cross attention on the GPU: the Triton kernels, on copies of the maps with channels last.

A line is a row of a map or, if COLUMN, a column, in which no pixel attends to itself. Maps lie as
[B * H * W, channels]; a tile is some pixels of a line. Forward: the softmax of columns alone, then that of rows, merged
with it. Backward: columns leave their part of every gradient, rows add theirs. Every program owns what it sums, in a
fixed order: results repeat bitwise.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core import triton_launch
from ..core.triton_launch import top_of

# Arguments for which no kernel is compiled anew when they happen to be 1 or a multiple of 16.
SIZES = ["height", "width"]


class Config(NamedTuple):
    """``block_m``: pixels that a program owns; ``block_n``: others at a time; ``chunk``: value channels at a time."""

    block_m: int
    block_n: int
    chunk: int
    warps: int
    stages: int


def config(dim: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Return how kernels are cut for queries of ``dim`` channels: from a table, no tuning at the first call."""
    if triton_launch.architecture(device) == 0:  # the interpreter: small blocks, so that small inputs have several
        return Config(32, 16, 32, 4, 1)
    if dtype == torch.float32:
        return Config(32, 32, 64, 4, 1)
    if dim <= 128:
        return Config(64, 32, 128 if dim <= 64 else 64, 8, 2)
    return Config(32, 32, 64, 8, 2)


@triton.jit
def line_of(blocks, height, width, COLUMN: tl.constexpr):
    """Return this program's block within its line, the first pixel of the line, and its image."""
    if COLUMN:
        line = tl.program_id(0) // blocks % width
        image = tl.program_id(0) // blocks // width
        first = line
    else:
        line = tl.program_id(0) // blocks % height
        image = tl.program_id(0) // blocks // height
        first = line * width
    return tl.program_id(0) % blocks, first, image


@triton.jit
def length_of(height, width, COLUMN: tl.constexpr):
    """Pixels of a line, and how far apart they are."""
    if COLUMN:
        n, step = height, width
    else:
        n, step = width, 1
    return n, step


@triton.jit
def load_pixels(x, pixels, valid, first, channels, WIDTH: tl.constexpr):
    """WIDTH channels of some pixels, from channel ``first`` on; 0 where there are none."""
    c = first + tl.arange(0, WIDTH)
    at = pixels.to(tl.int64)[:, None] * channels + c[None, :]
    return tl.load(x + at, mask=valid[:, None] & (c < channels)[None, :], other=0)


@triton.jit
def load_stats(stats, start, pixels, valid, height, width):
    """The largest score of some pixels of the image that begins at ``start``, and the sum of exp(score - largest)."""
    at = stats + 2 * start + pixels
    largest = tl.load(at, mask=valid, other=0)
    return largest, tl.load(at + height * width, mask=valid, other=1)


@triton.jit
def store_stats(stats, largest, total, start, pixels, valid, height, width):
    at = stats + 2 * start + pixels
    tl.store(at, largest, mask=valid)
    tl.store(at + height * width, total, mask=valid)


@triton.jit
def softmax_weight(s, largest, total, kept):
    """p from scores that are formed again; ``largest`` and ``total`` as stored by the forward."""
    return tl.exp(tl.where(kept, tl.minimum(s - top_of(largest), 0), -float("inf"))) / total


@triton.jit
def pairs(i, j, n, COLUMN: tl.constexpr):
    """Which pairs of positions in a line attend to each other."""
    kept = (i < n)[:, None] & (j < n)[None, :]
    if COLUMN:
        kept = kept & (i[:, None] != j[None, :])
    return kept


@triton.jit
def at_channels(image, pixels, first, channels, height, width, WIDTH: tl.constexpr):
    """Offsets in a map [B, channels, H, W] of WIDTH channels of an image's pixels."""
    c = first + tl.arange(0, WIDTH)
    return (image.to(tl.int64) * channels + c[None, :]) * (height * width) + pixels[:, None]


@triton.jit
def finish(
    acc, partial, result, image, start, pixels, valid, first, channels, height, width,
    WIDTH: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """Leave a column's part of a gradient; a row adds it to its own and writes the result [B, channels, H, W]."""
    c = first + tl.arange(0, WIDTH)
    mask = valid[:, None] & (c < channels)[None, :]
    at = (start + pixels).to(tl.int64)[:, None] * channels + c[None, :]
    if COLUMN:
        tl.store(partial + at, acc, mask=mask)
    else:
        acc += tl.load(partial + at, mask=mask, other=0)
        tl.store(result + at_channels(image, pixels, first, channels, height, width, WIDTH), acc, mask=mask)


@triton.jit(do_not_specialize=["blocks", *SIZES])
def _criss_cross_fwd_kernel(
    q, k, v, partial, stats_column, out, stats, scale, blocks, height, width, dim, dim_v,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COLUMN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of exp(s) and of exp(s) v over a line's keys, for some of its pixels and a chunk of the value's channels."""
    block, first, image = line_of(blocks, height, width, COLUMN)
    n, step = length_of(height, width, COLUMN)
    start = image.to(tl.int64) * height * width
    channel = tl.program_id(1) * CHUNK
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = i < n
    pixels = first + i * step
    queries = load_pixels(q, start + pixels, valid, 0, dim, DIM)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    summed = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, CHUNK], tl.float32)
    for j0 in range(0, n, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        others = start + first + j * step
        keys = load_pixels(k, others, j < n, 0, dim, DIM)
        s = tl.dot(queries, keys.T, input_precision=PRECISION) * scale
        s = tl.where(pairs(i, j, n, COLUMN), s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == -float("inf"), 0, m_new)
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(m - base)
        summed = summed * shrink + tl.sum(p, 1)
        values = load_pixels(v, others, j < n, channel, dim_v, CHUNK)
        if values.dtype == tl.float32:
            # By blocks, not term by term as the product would add: along a long line float32 loses most there.
            acc = tl.fma(acc, shrink[:, None], tl.dot(p, values, input_precision=PRECISION))
        else:
            acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        m = m_new
    c = channel + tl.arange(0, CHUNK)
    mask = valid[:, None] & (c < dim_v)[None, :]
    at = (start + pixels)[:, None] * dim_v + c[None, :]
    if COLUMN:
        nobody = summed == 0
        tl.store(partial + at, acc / tl.where(nobody, 1, summed)[:, None], mask=mask)
        if channel == 0:
            store_stats(stats_column, m, summed, start, pixels, valid, height, width)
    else:
        column, other = load_stats(stats_column, start, pixels, valid, height, width)
        base = tl.maximum(m, column)
        mine = tl.exp(m - base)
        other *= tl.exp(column - base)
        total = mine * summed + other
        of_column = tl.load(partial + at, mask=mask, other=0)
        result = acc * (mine / total)[:, None] + of_column * (other / total)[:, None]
        at = at_channels(image, pixels, channel, dim_v, height, width, CHUNK)
        tl.store(out + at, result, mask=mask)
        if channel == 0:
            store_stats(stats, base, total, start, pixels, valid, height, width)


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


class Lines:
    """The maps of a call with channels last, and how its kernels are launched, once for columns and once for rows."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float):
        self.batch, self.dim, self.height, self.width = query.shape
        self.dim_v, self.scale = value.shape[1], scale
        self.config = config(self.dim, query.dtype, query.device)
        self.width_dim = max(16, triton.next_power_of_2(self.dim))
        self.chunk = min(self.config.chunk, max(16, triton.next_power_of_2(self.dim_v)))
        self.chunks = triton.cdiv(self.dim_v, self.chunk)
        self.q, self.k, self.v = (self.channels_last(x) for x in (query, key, value))

    @staticmethod
    def channels_last(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).contiguous()

    def new_partial(self, channels: int) -> Tensor:
        return self.q.new_empty(self.batch, self.height, self.width, channels, dtype=torch.float32)

    def launch(self, kernel, chunks: int, *args, **constants) -> None:
        """Launch for all columns, then for all rows; axis 1 of the grid: chunks of channels."""
        m, n, _, warps, stages = self.config
        for column, lines, length in ((True, self.width, self.height), (False, self.height, self.width)):
            blocks = triton.cdiv(length, m)
            with torch.cuda.device_of(self.q):  # which Triton launches on
                triton_launch.launch(
                    kernel, (self.batch * lines * blocks, chunks), *args, self.scale, blocks, self.height, self.width,
                    self.dim, self.dim_v, DIM=self.width_dim, CHUNK=self.chunk, BLOCK_M=m, BLOCK_N=n, COLUMN=column,
                    PRECISION=triton_launch.precision(self.q.dtype), warps=warps, stages=stages, **constants,
                )  # fmt: skip


def fwd(query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, stats: Tensor) -> None:
    """Write into ``out`` and ``stats``."""
    lines = Lines(query, key, value, scale)
    partial = lines.new_partial(lines.dim_v)
    lines.launch(
        _criss_cross_fwd_kernel, lines.chunks, lines.q, lines.k, lines.v, partial, stats.new_empty(stats.shape), out,
        stats,
    )  # fmt: skip


def bwd(
    do: Tensor, query: Tensor, key: Tensor, value: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv."""
    lines = Lines(query, key, value, scale)
    stats, do = stats.contiguous(), lines.channels_last(do)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    delta, partial = lines.new_partial(1), lines.new_partial(lines.dim)
    mine, others = (lines.q, lines.k), (do, lines.v)
    for delta_first in (True, False):
        written = stats, delta, partial, dq
        lines.launch(_criss_cross_dqk_kernel, 1, *mine, *others, *written, OF_KEYS=False, DELTA=delta_first)
    written = stats, delta, partial, dk
    lines.launch(_criss_cross_dqk_kernel, 1, *mine[::-1], *others[::-1], *written, OF_KEYS=True, DELTA=False)
    lines.launch(_criss_cross_dv_kernel, lines.chunks, lines.q, lines.k, do, stats, lines.new_partial(lines.dim_v), dv)
    return dq, dk, dv
