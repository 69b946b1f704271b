"""Salient positions attention in readable PyTorch: the specification. Any dtype, differentiable twice."""

import torch
from torch import Tensor

from ..precision import at_least_float32, ignoring_autocast


@ignoring_autocast
def salient_positions_attention(query: Tensor, value: Tensor, *, topk: int | None = 8) -> Tensor:
    """Compute :func:`asa_ops.salient_positions_attention`; see there for the arguments."""
    q, v = at_least_float32(query, value)
    topk = max(q.shape[-2] // 16, 1) if topk is None else topk
    saliency = q.square().sum(-1)
    salient = torch.zeros_like(saliency).scatter(-1, saliency.topk(topk).indices, 1)
    agreement = torch.einsum("...nc,...nd,...n->...cd", q, q, salient)
    weights = agreement.softmax(-1)
    return torch.einsum("...cd,...nd->...nc", weights, v).to(query.dtype)
