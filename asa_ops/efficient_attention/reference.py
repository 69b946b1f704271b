"""Efficient attention in readable PyTorch: the specification. Dense, O(N^2) memory, any dtype, differentiable twice."""

from torch import Tensor

from ..precision import at_least_float32, ignoring_autocast


@ignoring_autocast
def efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute :func:`asa_ops.efficient_attention` densely; see there for the arguments."""
    q, k, v = at_least_float32(query, key, value)
    weights = q.softmax(-1) @ k.softmax(-2).mT
    return (weights @ v).to(query.dtype)
