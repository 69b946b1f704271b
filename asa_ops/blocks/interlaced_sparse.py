"""Interlaced sparse attention: dense attention among distant positions, then among neighbouring ones.

Source: L. Huang, Y. Yuan, J. Guo, C. Zhang, X. Chen and J. Wang, Interlaced Sparse Self-Attention for Semantic
Segmentation, arXiv 1907.12273 (2019).

With factors (dh, dw) the map is padded to H' = dh ceil(H / dh) rows, the smaller half of the padding on top, and
likewise to W' columns. Attention runs within groups of real positions::

    span="long"    groups of equal (r mod dh, c mod dw):     dh dw groups of (H' / dh) (W' / dw) positions
    span="short"   groups of equal (r // dh, c // dw):       (H' / dh) (W' / dw) blocks of dh dw positions
    out_i = sum_j softmax_j(scale <q_i, k_j>) v_j            j in the group of i; scale = D**-0.5 by default

Each side of the map is grouped by itself, so that the formula holds with one factor and one side, or three of each.

The block (:class:`asa_ops.nn.InterlacedSparseAttention`) applies "long" and on its result "short".

How it is computed: tokens are reordered so that a group is contiguous, and the groups are a batch for
``F.scaled_dot_product_attention`` (on a CPU the plain formula where groups are small); padding is masked out.

Cost per head, N' = H' W': 2 N' (N' / (dh dw) + dh dw) (D + Dv) operations for both spans, memory N' (D + Dv) and on a
CPU N' (N' / (dh dw) + dh dw); the block's projections add 8 N (C D + D^2 + C Dv) or so.

Compiled and exported programs gather groups by the indices of their tokens instead.

What it attends to: a grid of positions dh and dw pixels apart; in the block, through these, every position.

Differences from the published code. It pads with zeros and attends to them: its padding has weights, and after the
first span features of its own, and takes part in the batch statistics. Here padding is nobody's neighbour
(``published=True`` of the block does as published). A factor larger than the map is an error: there the map is then
mostly padding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import checks
from ..core.contracts import at_least_float32, cast_under_autocast, ignoring_autocast, is_known, takes_dtensors
from ..core.layout import crop, pad, padding_to_multiples
from .softmax_attention import softmax_attention


@takes_dtensors(query="bh..", key="bh..", value="bh..", out="bh..")
def interlaced_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int],
    factors: Sequence[int] | None = None,
    span: str = "long",
    scale: float | None = None,
) -> Tensor:
    """Attend among positions a fixed step apart ("long"), or among those of one block of the map ("short").

    Formulas: ``help(asa_ops.blocks.interlaced_sparse)``. Source: Huang et al., arXiv 1907.12273 (2019).

    Args:
        query: [B, heads, N, D], floating point, tokens of a map in raster order.
        key: [B, heads, N, D].
        value: [B, heads, N, Dv].
        grid: (H, W) with H * W == N; or (L,) or (T, H, W).
        factors: (dh, dw), the steps, which are also the sides of a block; at most (H, W). As many as the grid has
            sides, default 8 each.
        span: "long" or "short".
        scale: factor of the scores, default D**-0.5.

    Returns:
        [B, heads, N, Dv] in the dtype of ``query``.

    Raises:
        ValueError: shapes or options that do not fit.
        TypeError: dtypes that do not.

    Example:
        >>> import torch
        >>> from asa_ops import interlaced_sparse_attention
        >>> q, k, v = torch.randn(3, 1, 2, 25 * 32, 16)
        >>> out = interlaced_sparse_attention(q, k, v, grid=(25, 32))
        >>> interlaced_sparse_attention(q, k, out, grid=(25, 32), span="short").shape
        torch.Size([1, 2, 800, 16])
    """
    query, key, value = cast_under_autocast(query=query, key=key, value=value)
    checks.check_qkv(query, key, value)
    heads, n = query.shape[1:3]
    if key.shape[2] != n:
        raise ValueError(f"there must be as many keys as queries, got N_q = {n} and N_k = {key.shape[2]}")
    grid = checks.as_grid(grid, n, 1, 2, 3)
    factors = (8,) * len(grid) if factors is None else factors
    factors = checks.as_factors(factors, grid)
    checks.check_choice("span", span, ("long", "short"))
    scale = checks.as_scale(scale, query)
    if torch.compiler.is_compiling():
        return _by_index(query, key, value, grid, factors, span, scale)
    mask = None
    if any(side % factor for side, factor in zip(grid, factors, strict=True)):
        real = torch.ones_like(query[:1, :1, :, :1]).expand(-1, heads, -1, -1)
        mask = _groups(real, grid, factors, span).mT > 0  # [1, heads * groups, 1, n]
    query, key, value = (_groups(x, grid, factors, span) for x in (query, key, value))
    out = softmax_attention(query, key, value, scale, mask)
    return _tokens(out, heads, grid, factors, span)


def _blocks(grid: Sequence[int], factors: Sequence[int]) -> list[int]:
    """Return how many blocks of the size ``factors`` the padded map has along each side."""
    # Not by a negative number: the exporter to ONNX would round its quotient towards 0.
    return [(side + factor - 1) // factor for side, factor in zip(grid, factors, strict=True)]


def _groups(x: Tensor, grid: Sequence[int], factors: Sequence[int], span: str) -> Tensor:
    """Return tokens [B, heads, N, D] as groups [B, heads * groups, n, D], padded with zeros."""
    batch, heads, _, dim = x.shape
    blocks, around = _blocks(grid, factors), padding_to_multiples(grid, factors)
    # Fused kernels want rows. The plain formula takes columns, and tokens of a map are copied faster as what they are.
    columns = x.stride(-1) != 1 and x.device.type == "cpu"
    x = x.mT
    if any(map(any, around)):
        x = pad(x.unflatten(3, grid), around)
    x = x.reshape(batch, heads, dim, *(size for pair in zip(blocks, factors, strict=True) for size in pair))
    of_block, within = range(3, x.dim(), 2), range(4, x.dim(), 2)  # dimensions: which block, where in it
    if span == "long":
        outer, inner, groups, n = within, of_block, heads * math.prod(factors), math.prod(blocks)
    else:
        outer, inner, groups, n = of_block, within, heads * math.prod(blocks), math.prod(factors)
    if columns:
        return x.permute(0, 1, *outer, 2, *inner).reshape(batch, groups, dim, n).mT
    return x.permute(0, 1, *outer, *inner, 2).reshape(batch, groups, n, dim)


def _tokens(x: Tensor, heads: int, grid: Sequence[int], factors: Sequence[int], span: str) -> Tensor:
    """Undo :func:`_groups`."""
    blocks, sides = _blocks(grid, factors), len(grid)
    batch, dim = x.shape[0], x.shape[-1]
    outer, inner = (factors, blocks) if span == "long" else (blocks, factors)
    x = x.reshape(batch, heads, *outer, *inner, dim)
    of_outer, of_inner = range(2, 2 + sides), range(2 + sides, 2 + 2 * sides)
    of_block, within = (of_inner, of_outer) if span == "long" else (of_outer, of_inner)
    # Columns in memory, like the tokens of a map: the output is a map without another copy.
    x = x.permute(0, 1, -1, *(at for pair in zip(of_block, within, strict=True) for at in pair))
    x = x.reshape(batch, heads, dim, *(block * factor for block, factor in zip(blocks, factors, strict=True)))
    return crop(x, padding_to_multiples(grid, factors), grid).flatten(3).mT


def _by_index(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Sequence[int],
    factors: Sequence[int],
    span: str,
    scale: float,
) -> Tensor:
    """The same by indices of tokens, for torch.compile and torch.export.

    Views that split the sides of a map take them most of a minute where the sides are variables, and tie a program to
    sides that are multiples of the factors, or are not.
    """
    blocks, around = _blocks(grid, factors), padding_to_multiples(grid, factors)
    batch, heads, tokens, _ = query.shape
    long, count, size = span == "long", math.prod(blocks), math.prod(factors)
    groups, n = (size, count) if long else (count, size)
    # From group and place in it to the token: both count in raster order, one the blocks, the other within a block.
    at = torch.arange(groups * n, device=query.device)
    group, place = _coordinates(at, (groups, n))
    block, within = (place, group) if long else (group, place)
    real, token = torch.ones_like(at, dtype=torch.bool), torch.zeros_like(at)
    for side, factor, (before, _), b, w in zip(
        grid, factors, around, _coordinates(block, blocks), _coordinates(within, factors), strict=True
    ):
        position = b * factor + w - before
        real = real & (position >= 0) & (position < side)
        token = token * side + position
    token = torch.where(real, token, 0)
    q, k, v = (x.index_select(2, token).view(batch, heads * groups, n, x.shape[3]) for x in (query, key, value))
    whole = is_known(sum(side % factor for side, factor in zip(grid, factors, strict=True)) == 0)
    mask = None if whole else real.view(1, groups, 1, n).repeat(1, heads, 1, 1)
    out = softmax_attention(q, k, v, scale, mask)
    # And back.
    at = torch.arange(tokens, device=query.device)
    block, within = torch.zeros_like(at), torch.zeros_like(at)
    for position, factor, (before, _), number in zip(_coordinates(at, grid), factors, around, blocks, strict=True):
        position = position + before
        block, within = block * number + position // factor, within * factor + position % factor
    return out.reshape(batch, heads, groups * n, -1).index_select(2, within * n + block if long else block * n + within)


def _coordinates(at: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """Return the coordinates, one for each side, of places counted in raster order."""
    found = []
    for side in reversed(sides[1:]):
        rest = at // side
        found.append(at - rest * side)  # the exporter to ONNX has no % of a side that is a variable
        at = rest
    return [at, *reversed(found)]


@ignoring_autocast
def reference_interlaced_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int],
    factors: Sequence[int] | None = None,
    span: str = "long",
    scale: float | None = None,
) -> Tensor:
    """The specification of :func:`interlaced_sparse_attention`: dense, O(N^2) memory, differentiable twice."""
    q, k, v = at_least_float32(query, key, value)
    together = torch.ones((), dtype=torch.bool, device=q.device)
    factors = (8,) * len(grid) if factors is None else factors
    positions = _coordinates(torch.arange(math.prod(grid), device=q.device), grid)
    for side, factor, position in zip(grid, factors, positions, strict=True):
        before = -side % factor // 2  # padding: the smaller half comes first
        group = (position + before) % factor if span == "long" else (position + before) // factor
        together = together & (group[:, None] == group)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.mT)
    return (scores.masked_fill(~together, -torch.inf).softmax(-1) @ v).to(query.dtype)
