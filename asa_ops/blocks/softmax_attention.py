"""Dense softmax attention for the blocks that contain it: the fastest of torch's own ways, no kernel of ours."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.contracts import at_least_float32, is_known, outside_autocast

_FEW_SCORES = 2**24


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Return softmax_j(scale * <q_i, k_j>) v_j in memory linear in the number of positions.

    One exception: where D and Dv differ on a CPU, up to 64 MB of scores are stored, which is faster.

    Args:
        query: [B, heads, N_q, D].
        key: [B, heads, N_k, D].
        value: [B, heads, N_k, Dv].
        scale: factor of the scores.
        mask: bool, broadcastable to [B, heads, N_q, N_k], True = attend; at least one True in every row.

    Returns:
        [B, heads, N_q, Dv].
    """
    with outside_autocast(query.device.type):
        return _softmax_attention(query, key, value, scale, mask)


def _are_few(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether to store scores whose head dims differ: the fused kernel would multiply the zeros that pad them."""
    return query.shape[-1] != value.shape[-1] and is_known(math.prod(query.shape[:-1]) * key.shape[-2] <= _FEW_SCORES)


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    dim, dim_v = query.shape[-1], value.shape[-1]
    # A row of scores is then hardly longer than the query and the output it is for, and may be stored.
    short = is_known(key.shape[-2] <= max(dim + dim_v, 256))
    if query.device.type == "cpu" and (short or _are_few(query, key, value)):
        # SDPA's fused kernel is slower here than the plain formula, and its own plain formula scales both operands.
        q, k, v = at_least_float32(query, key, value)
        scores = (q * scale) @ k.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1)
        # The output is formed in the layout of the value: for long rows the gradient would have to be turned over.
        columns = short and v.stride(-1) != 1
        out = (v.mT @ weights.mT).mT if columns else weights @ v
        return out.to(query.dtype)
    if not short and dim != dim_v:
        # Unequal head dims send SDPA to its plain formula, which stores the N_q x N_k matrix.
        query, key, value = (F.pad(x, (0, max(dim, dim_v) - x.shape[-1])) for x in (query, key, value))
    # A last dimension that is not contiguous does the same.
    query, key, value = (x.contiguous() for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)[..., :dim_v]
