"""Channelized axial attention in readable PyTorch: the specification, with the products that the gates are about.

O(N (H + W) C) memory, any dtype, differentiable twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..precision import at_least_float32, outside_autocast


def channelized_axial_attention(
    column: Tensor,
    row: Tensor,
    value: Tensor,
    column_gate: Sequence[Tensor] | None = None,
    row_gate: Sequence[Tensor] | None = None,
    *,
    negative_slope: float = 0.2,
) -> Tensor:
    """Compute :func:`asa_ops.channelized_axial_attention` product by product; see there for the arguments."""
    with outside_autocast(value.device.type):
        p, r, v = at_least_float32(column, row, value)
        weights = torch.einsum("bdhw,bdkw->bhwk", p, p).softmax(-1)
        products = torch.einsum("bhwk,bckw->bchwk", weights, v)
        if column_gate is not None:
            mean = products.mean((3, 4))  # [B, C, H]
            products = products * gate(mean.mT, column_gate, negative_slope).mT[..., None, None]
        out = products.sum(-1)
        weights = torch.einsum("bdhw,bdhl->bhwl", r, r).softmax(-1)
        products = torch.einsum("bhwl,bchl->bchwl", weights, out)
        if row_gate is not None:
            mean = products.mean((2, 4))  # [B, C, W]
            products = products * gate(mean.mT, row_gate, negative_slope).mT[:, :, None, :, None]
        return products.sum(-1).to(value.dtype)


def gate(mean: Tensor, weights: Sequence[Tensor], negative_slope: float) -> Tensor:
    """Return the gates [..., C] of the mean products [..., C], by linear layers without bias."""
    *hidden, last = (weight.to(mean.dtype) for weight in weights)
    for weight in hidden:
        mean = F.leaky_relu(F.linear(mean, weight), negative_slope)
    return F.linear(mean, last).sigmoid()
