"""Interlaced sparse attention in readable PyTorch: the specification. Dense, O(N^2) memory, any dtype."""

import torch
from torch import Tensor

from ..precision import at_least_float32, ignoring_autocast


@ignoring_autocast
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
    """Compute :func:`asa_ops.interlaced_sparse_attention` densely; see there for the arguments."""
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
