"""Linear attention in readable PyTorch: the specification. Dense, O(N^2) memory, any dtype, differentiable twice."""

from torch import Tensor

from ..precision import at_least_float32, outside_autocast


def linear_attention(query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Compute :func:`asa_ops.linear_attention` densely; see there for the arguments."""
    with outside_autocast(query.device.type):
        q, k, v = at_least_float32(query, key, value)
        q, k = unit(q), unit(k)
        weights = 1 + q @ k.mT
        normaliser = weights.sum(-1, keepdim=True) + eps * q.sum(-1, keepdim=True)
        return (weights @ v / normaliser).to(query.dtype)


def channel_linear_attention(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Compute :func:`asa_ops.channel_linear_attention` densely; see there for the arguments."""
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
