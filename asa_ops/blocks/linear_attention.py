"""Linear attention of positions or of channels: the softmax replaced by its first-order Taylor expansion.

Source: R. Li, J. Su, C. Duan and S. Zheng, Linear Attention Mechanism: An Efficient Attention for Semantic
Segmentation, arXiv 2007.14902 (2020).

unit(x) = x / ||x||_2 over the channels of a position, and 0 where x = 0. Position attention, with q = unit(query),
k = unit(key), N keys::

    out_i = sum_j (1 + <q_i, k_j>) v_j / (N + <q_i, sum_j k_j + eps>)        weights >= 0; eps is added to the vector

Channel attention, x_nc channel c of position n, u_n = unit(x_n)::

    out_nc = (sum_c' x_nc' + sum_m u_nm sum_n' u_n'm x_n'c) / (N + sum_n' u_n'c (sum_c' u_n'c' + eps))

How it is computed: the sums over positions first. In position attention a channel of ones, appended to query and key,
carries the 1 of the kernel, and the division is done on the query, so that value and output are each touched once.

Cost per head. Position: 4 N (D + 1) Dv operations, N (D + Dv) + D Dv memory; the block has D = C / 8 and adds
2 N C (C + 2 D) for its projections. Channel: 4 N C^2 operations, N C + C^2 memory, no projections.

What it attends to: every position, more or less evenly: weights lie between 0 and 2 before they are normalised. Where
all keys are opposite to a query, all weights are 0 and the output is rounding noise. Channel attention is no weighted
mean (as published: its normaliser counts positions where channels are summed).

Differences from the published code. There, a position with all channels 0, usual after a ReLU, gives NaN in the whole
image; here it gives zero and zero gradients. It reshapes its output as [B, C, W, H]: maps that are not square fail or
come out transposed; here H and W keep their places. Below 8 channels it fails; here a block has at least 1 key channel,
but with one, unit vectors are +-1 and query and key learn nothing (so up to 15 channels).
"""

import torch
from torch import Tensor

from ..core import checks
from ..core.contracts import at_least_float32, cast_under_autocast, outside_autocast, takes_dtensors


@takes_dtensors(query="bh..", key="bh..", value="bh..", out="bh..")
def linear_attention(query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Attend from every position to every position with weights 1 + cosine(query, key), in linear time.

    Formulas: ``help(asa_ops.blocks.linear_attention)``. Source: Li, Su, Duan and Zheng, arXiv 2007.14902 (2020).

    Args:
        query: [B, heads, N_q, D], floating point; need not be normalised.
        key: [B, heads, N_k, D], the same.
        value: [B, heads, N_k, Dv].
        eps: added to every channel of the sum of keys in the normaliser.

    Returns:
        [B, heads, N_q, Dv] in the dtype of ``query``.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that do not.

    Example:
        >>> import torch
        >>> from asa_ops import linear_attention
        >>> q, k, v = torch.randn(3, 1, 2, 24 * 32, 16)
        >>> linear_attention(q, k, v).shape
        torch.Size([1, 2, 768, 16])
    """
    query, key, value = cast_under_autocast(query=query, key=key, value=value)
    checks.check_qkv(query, key, value)
    eps = checks.as_number("eps", eps)
    with outside_autocast(query.device.type):
        q, k, v = at_least_float32(query, key, value)
        q, k, v = unit(q).mT, unit(k).mT, v.mT
        normaliser = k.shape[-1] + ((k.sum(-1, keepdim=True) + eps) * q).sum(-2, keepdim=True)
        k = torch.cat([k, torch.ones_like(k[..., :1, :])], -2)
        q = torch.cat([q, torch.ones_like(q[..., :1, :])], -2) / normaliser
        return ((v @ k.mT) @ q).mT.to(query.dtype)


@takes_dtensors(x="bh..", out="bh..")
def channel_linear_attention(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Attend from every channel to every channel, without a softmax.

    Formulas: ``help(asa_ops.blocks.linear_attention)``. Source: Li, Su, Duan and Zheng, arXiv 2007.14902 (2020).

    Args:
        x: [B, heads, N, C], floating point: query, key and value at once.
        eps: as in :func:`linear_attention`.

    Returns:
        [B, heads, N, C] in the dtype of ``x``.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that do not.

    Example:
        >>> import torch
        >>> from asa_ops import channel_linear_attention
        >>> channel_linear_attention(torch.randn(1, 2, 24 * 32, 16)).shape
        torch.Size([1, 2, 768, 16])
    """
    (x,) = cast_under_autocast(x=x)
    checks.check_tensor("x", x, "[B, heads, N, C]")
    checks.check_floating("x", x)
    eps = checks.as_number("eps", eps)
    with outside_autocast(x.device.type):
        (values,) = at_least_float32(x)
        u, values = unit(values).mT, values.mT
        normaliser = x.shape[-2] + u @ (u.sum(-2, keepdim=True) + eps).mT
        out = (values @ u.mT / normaliser) @ u
        return torch.addcmul(out, values.sum(-2, keepdim=True), 1 / normaliser).mT.to(x.dtype)


def reference_linear_attention(query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The specification of :func:`linear_attention`: dense, O(N^2) memory, any dtype, differentiable twice."""
    with outside_autocast(query.device.type):
        q, k, v = at_least_float32(query, key, value)
        q, k = unit(q), unit(k)
        weights = 1 + q @ k.mT
        normaliser = weights.sum(-1, keepdim=True) + eps * q.sum(-1, keepdim=True)
        return (weights @ v / normaliser).to(query.dtype)


def reference_channel_linear_attention(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The specification of :func:`channel_linear_attention`: dense, O(N^2) memory, any dtype, differentiable twice."""
    with outside_autocast(x.device.type):
        (values,) = at_least_float32(x)
        u = unit(values)
        normaliser = x.shape[-2] + (u * (u.sum(-1, keepdim=True) + eps)).sum(-2, keepdim=True)
        out = values.sum(-1, keepdim=True) + u @ u.mT @ values
        return (out / normaliser).to(x.dtype)


def unit(x: Tensor) -> Tensor:
    """Return ``x`` [..., D] as unit vectors; 0, with zero gradients, where it is 0."""
    square = x.square().sum(-1, keepdim=True)
    zero = square == 0
    return x * square.masked_fill(zero, 1).rsqrt().masked_fill(zero, 0)
