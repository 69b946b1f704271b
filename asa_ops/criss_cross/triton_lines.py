"""What the Triton kernels of criss-cross attention share: lines, their tiles, how kernels are cut into blocks.

A line is a row of a map or, if COLUMN, a column, in which no pixel attends to itself. Maps lie with channels last,
[B * H * W, channels]; a tile is some pixels of a line.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support as support
from ..triton_rounding import top_of

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
    if support.architecture(device) == 0:  # the interpreter: small blocks, so that small inputs have several
        return Config(32, 16, 32, 4, 1)
    if dtype == torch.float32:
        return Config(32, 32, 64, 4, 1)
    if dim <= 128:
        return Config(64, 32, 128 if dim <= 64 else 64, 8, 2)
    return Config(32, 32, 64, 8, 2)


@triton.jit
def line_of(blocks, height, width, COLUMN: tl.constexpr):
    """Of this program: its block within the line, the line's first pixel, and its image, whose first pixel is last."""
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
            support.launch(
                kernel, (self.batch * lines * blocks, chunks), *args, self.scale, blocks, self.height, self.width,
                self.dim, self.dim_v, DIM=self.width_dim, CHUNK=self.chunk, BLOCK_M=m, BLOCK_N=n, COLUMN=column,
                PRECISION=support.precision(self.q.dtype), warps=warps, stages=stages, **constants,
            )  # fmt: skip
