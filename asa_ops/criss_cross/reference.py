"""Criss-cross attention in readable PyTorch: the specification.

O(H W (H + W)) memory, any dtype and device, differentiable twice. Scores of half-precision inputs are computed in
float32 and the result is rounded once. The formulas stand in ``asa_ops/criss_cross/__init__.py``.
"""

import torch
from torch import Tensor

from ..core.contracts import ignoring_autocast


@ignoring_autocast
def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0) -> Tensor:
    """Compute :func:`asa_ops.criss_cross_attention`; see there for the arguments."""
    weights = attention(query, key, scale)
    v = value.to(weights.dtype)
    column, row = weights.split(value.shape[2:], -1)
    out = torch.einsum("bhwi,bciw->bchw", column, v) + torch.einsum("bhwj,bchj->bchw", row, v)
    return out.to(query.dtype).contiguous()


def attention(query: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """Return the weights [B, H, W, H + W] of every pixel: its column, in it 0 for the pixel itself; then its row."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k = query.to(dtype), key.to(dtype)
    itself = torch.eye(query.shape[2], dtype=torch.bool, device=query.device)[:, None, :]
    column = scale * torch.einsum("bdhw,bdiw->bhwi", q, k)
    row = scale * torch.einsum("bdhw,bdhj->bhwj", q, k)
    return torch.cat([column.masked_fill(itself, -torch.inf), row], -1).softmax(-1)
