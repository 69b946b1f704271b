"""The forward in Triton: the softmax of columns alone, then that of rows merged with it."""

import triton
import triton.language as tl
from torch import Tensor

from .triton_lines import SIZES, Lines, at_channels, length_of, line_of, load_pixels, load_stats, pairs, store_stats


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


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, stats: Tensor) -> None:
    """Write into ``out`` and ``stats``."""
    lines = Lines(query, key, value, scale)
    partial = lines.new_partial(lines.dim_v)
    lines.launch(
        _criss_cross_fwd_kernel, lines.chunks, lines.q, lines.k, lines.v, partial, stats.new_empty(stats.shape), out,
        stats,
    )  # fmt: skip
