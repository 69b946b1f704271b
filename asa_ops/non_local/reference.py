"""Non-local attention in readable PyTorch: the specification. Dense, O(N N_k) memory, any dtype, differentiable."""

from torch import Tensor

from ..precision import at_least_float32, ignoring_autocast


@ignoring_autocast
def non_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mode: str = "gaussian",
    scale: float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute :func:`asa_ops.non_local_attention` densely; see there for the arguments."""
    q, k, v = at_least_float32(query, key, value)
    if mode == "gaussian":
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        weights = (scale * (q @ k.mT)).softmax(-1)
    else:
        scale = 1 / k.shape[-2] if scale is None else scale
        if mode == "dot_product":
            weights = scale * (q @ k.mT)
        else:
            for_query, for_key = weight.to(q.dtype)
            weights = scale * ((q @ for_query)[..., :, None] + (k @ for_key)[..., None, :]).relu()
    return (weights @ v).to(query.dtype)
