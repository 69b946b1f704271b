"""Criss-cross attention in readable PyTorch: the specification.

O(H W (H + W)) memory, in three dimensions O(N (T + H + W)), any dtype and device, differentiable twice. Scores of
half-precision inputs are computed in float32 and the result is rounded once. The formulas stand in
``asa_ops/criss_cross/__init__.py``.
"""

import functools

import torch
from torch import Tensor

from ..core.contracts import ignoring_autocast


@ignoring_autocast
def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0) -> Tensor:
    """Compute :func:`asa_ops.criss_cross_attention`; see there for the arguments."""
    weights = attention(query, key, scale)
    v = value.to(weights.dtype)
    sides = "thw"[-len(value.shape[2:]) :]
    lines = zip(sides, weights.split(value.shape[2:], -1), strict=True)
    parts = (torch.einsum(f"b{sides}i,bc{sides.replace(side, 'i')}->bc{sides}", line, v) for side, line in lines)
    return functools.reduce(torch.add, parts).to(query.dtype).contiguous()


def attention(query: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """Return the weights [B, H, W, H + W] of every pixel: its column, in it 0 for the pixel itself; then its row.

    In three dimensions [B, T, H, W, T + H + W]: the line through time, column, row; 0 likewise in the first two.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k = query.to(dtype), key.to(dtype)
    sides = "thw"[-len(query.shape[2:]) :]
    lines = []
    for axis, side in enumerate(sides, 2):
        line = scale * torch.einsum(f"bd{sides},bd{sides.replace(side, 'i')}->b{sides}i", q, k)
        if side != "w":
            n = query.shape[axis]
            itself = torch.eye(n, dtype=torch.bool, device=query.device).view(n, *[1] * (query.dim() - 1 - axis), n)
            line = line.masked_fill(itself, -torch.inf)
        lines.append(line)
    return torch.cat(lines, -1).softmax(-1)
