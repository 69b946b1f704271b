"""Interlaced sparse attention: dense attention among distant positions, then among neighbouring ones.

Source: L. Huang, Y. Yuan, J. Guo, C. Zhang, X. Chen and J. Wang, Interlaced Sparse Self-Attention for Semantic
Segmentation, arXiv 1907.12273 (2019).

With factors (dh, dw) the map is padded to H' = dh ceil(H / dh) rows, the smaller half of the padding on top, and
likewise to W' columns. Attention runs within groups of real positions::

    span="long"    groups of equal (r mod dh, c mod dw):     dh dw groups of (H' / dh) (W' / dw) positions
    span="short"   groups of equal (r // dh, c // dw):       (H' / dh) (W' / dw) blocks of dh dw positions
    out_i = sum_j softmax_j(scale <q_i, k_j>) v_j            j in the group of i; scale = D**-0.5 by default

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

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks
from ..core.contracts import at_least_float32, cast_under_autocast, ignoring_autocast, is_known, takes_dtensors
from ..core.layout import padding_to_multiples
from .softmax_attention import softmax_attention


@takes_dtensors(query="bh..", key="bh..", value="bh..", out="bh..")
def interlaced_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, int],
    factors: tuple[int, int] = (8, 8),
    span: str = "long",
    scale: float | None = None,
) -> Tensor:
    """Attend among positions a fixed step apart ("long"), or among those of one block of the map ("short").

    Formulas: ``help(asa_ops.blocks.interlaced_sparse)``. Source: Huang et al., arXiv 1907.12273 (2019).

    Args:
        query: [B, heads, N, D], floating point, tokens of a map in raster order.
        key: [B, heads, N, D].
        value: [B, heads, N, Dv].
        grid: (H, W) with H * W == N.
        factors: (dh, dw), the steps, which are also the sides of a block; at most (H, W).
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
    grid = checks.as_grid(grid, n, 2)
    factors = checks.as_factors(factors, grid)
    checks.check_choice("span", span, ("long", "short"))
    scale = checks.as_scale(scale, query)
    if torch.compiler.is_compiling():
        return _by_index(query, key, value, grid, factors, span, scale)
    mask = None
    if grid[0] % factors[0] or grid[1] % factors[1]:
        real = torch.ones_like(query[:1, :1, :, :1]).expand(-1, heads, -1, -1)
        mask = _groups(real, grid, factors, span).mT > 0  # [1, heads * groups, 1, n]
    query, key, value = (_groups(x, grid, factors, span) for x in (query, key, value))
    out = softmax_attention(query, key, value, scale, mask)
    return _tokens(out, heads, grid, factors, span)


def _blocks(grid: tuple[int, int], factors: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks of the size ``factors`` the padded map has, down and across."""
    return -(-grid[0] // factors[0]), -(-grid[1] // factors[1])


def _groups(x: Tensor, grid: tuple[int, int], factors: tuple[int, int], span: str) -> Tensor:
    """Return tokens [B, heads, N, D] as groups [B, heads * groups, n, D], padded with zeros."""
    batch, heads, _, dim = x.shape
    (down, across), around = _blocks(grid, factors), padding_to_multiples(grid, factors)
    # Fused kernels want rows. The plain formula takes columns, and tokens of a map are copied faster as what they are.
    columns = x.stride(-1) != 1 and x.device.type == "cpu"
    x = x.mT
    if any(around):
        x = F.pad(x.unflatten(3, grid), around)
    x = x.reshape(batch, heads, dim, down, factors[0], across, factors[1])
    outer, inner = ((4, 6), (3, 5)) if span == "long" else ((3, 5), (4, 6))
    n = down * across if span == "long" else factors[0] * factors[1]
    groups = heads * (factors[0] * factors[1] if span == "long" else down * across)
    if columns:
        return x.permute(0, 1, *outer, 2, *inner).reshape(batch, groups, dim, n).mT
    return x.permute(0, 1, *outer, *inner, 2).reshape(batch, groups, n, dim)


def _tokens(x: Tensor, heads: int, grid: tuple[int, int], factors: tuple[int, int], span: str) -> Tensor:
    """Undo :func:`_groups`."""
    left, _, top, _ = padding_to_multiples(grid, factors)
    blocks = _blocks(grid, factors)
    batch, dim = x.shape[0], x.shape[-1]
    # Columns in memory, like the tokens of a map: the output is a map without another copy.
    if span == "long":
        x = x.reshape(batch, heads, *factors, *blocks, dim).permute(0, 1, 6, 4, 2, 5, 3)
    else:
        x = x.reshape(batch, heads, *blocks, *factors, dim).permute(0, 1, 6, 2, 4, 3, 5)
    x = x.reshape(batch, heads, dim, blocks[0] * factors[0], blocks[1] * factors[1])
    return x[..., top : top + grid[0], left : left + grid[1]].flatten(3).mT


def _by_index(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    factors: tuple[int, int],
    span: str,
    scale: float,
) -> Tensor:
    """The same by indices of tokens, for torch.compile and torch.export.

    Views that split the sides of a map take them most of a minute where the sides are variables, and tie a program to
    sides that are multiples of the factors, or are not.
    """
    (height, width), (dh, dw), (down, across) = grid, factors, _blocks(grid, factors)
    left, _, top, _ = padding_to_multiples(grid, factors)
    batch, heads, tokens, _ = query.shape
    long, blocks, size = span == "long", down * across, dh * dw
    groups, n = (size, blocks) if long else (blocks, size)
    # From group and place in it to the token: both count in raster order, one the blocks, the other within a block.
    at = torch.arange(groups * n, device=query.device)
    block, within = (at % n, at // n) if long else (at // n, at % n)
    row, column = block // across * dh + within // dw - top, block % across * dw + within % dw - left
    real = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    token = torch.where(real, row * width + column, 0)
    q, k, v = (x.index_select(2, token).view(batch, heads * groups, n, x.shape[3]) for x in (query, key, value))
    whole = is_known(height % dh + width % dw == 0)
    mask = None if whole else real.view(1, groups, 1, n).repeat(1, heads, 1, 1)
    out = softmax_attention(q, k, v, scale, mask)
    # And back.
    at = torch.arange(tokens, device=query.device)
    row, column = at // width + top, at % width + left
    block, within = row // dh * across + column // dw, row % dh * dw + column % dw
    return out.reshape(batch, heads, groups * n, -1).index_select(2, within * n + block if long else block * n + within)


@ignoring_autocast
def reference_interlaced_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, int],
    factors: tuple[int, int] = (8, 8),
    span: str = "long",
    scale: float | None = None,
) -> Tensor:
    """The specification of :func:`interlaced_sparse_attention`: dense, O(N^2) memory, differentiable twice."""
    q, k, v = at_least_float32(query, key, value)
    together = torch.ones((), dtype=torch.bool, device=q.device)
    for axis, position in zip((0, 1), positions(grid, q.device), strict=True):
        factor = factors[axis]
        before = -grid[axis] % factor // 2  # padding: the smaller half comes first
        group = (position + before) % factor if span == "long" else (position + before) // factor
        together = together & (group[:, None] == group)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.mT)
    return (scores.masked_fill(~together, -torch.inf).softmax(-1) @ v).to(query.dtype)


def positions(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and column [N] of every token."""
    token = torch.arange(grid[0] * grid[1], device=device)
    return token // grid[1], token % grid[1]
