"""Non-local attention: every position attends to every position, or to every position of a coarser map.

Source: X. Wang, R. Girshick, A. Gupta and K. He, Non-local Neural Networks, CVPR 2018; published code: mmcv,
``NonLocal2d``.

With s_ij = <q_i, k_j> and N_k keys (theta, phi and g are the paper's names of query, key and value)::

    gaussian        w_ij = softmax_j(scale * s_ij)                  scale = D**-0.5 by default
    dot_product     w_ij = scale * s_ij                             scale = 1 / N_k by default
    concatenation   w_ij = scale * relu(<w1, q_i> + <w2, k_j>)      scale = 1 / N_k by default
    out_i = sum_j w_ij v_j

"embedded_gaussian" is "gaussian" with a projected query and key; the block (:class:`asa_ops.nn.NonLocal`) has both.

How it is computed. gaussian: ``F.scaled_dot_product_attention``; where D and Dv differ the shorter is padded with
zeros, without which it would store the N_q x N_k matrix (so the block's "gaussian", D = 2 Dv, takes a third more time
on a CPU, forward and backward, than the formula that stores it); up to 256 keys, on a CPU, the plain formula.
dot_product: by associativity, q_i (sum_j k_j v_j^T). concatenation: w_ij is positive for the keys whose b_j = <w2, k_j>
exceeds -a_i = -<w1, q_i>; with the keys sorted by b they come first, so that out_i = scale * (a_i sum v_j +
sum b_j v_j) over a prefix, and the prefix sums of all lengths are formed once (in float64).

Cost per head, N queries and N_k keys, forward:

    =============  =============================  ===================
    mode           operations                     memory
    =============  =============================  ===================
    gaussian       4 N N_k max(D, Dv)             N + N_k rows
    dot_product    2 (N + N_k) D Dv               N + N_k rows, D Dv
    concatenation  O((N + N_k) (D + Dv)), a sort  N + N_k rows
    =============  =============================  ===================

The projections of the block add 8 N C C'.

Differences from the published code. It stores N x N_k weights in every mode, and for concatenation 2 C' x N x N_k
inputs: this code stores neither. Its concatenation mode cannot be trained with current torch (it divides the output of
a ReLU in place). Its sub-sampling drops the last row and column of a map of odd size, and fails where H or W is 1: here
a last window is smaller instead, unless ``published=True``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks
from ..core.contracts import (
    at_least_float32,
    cast_under_autocast,
    exporting_to_onnx,
    ignoring_autocast,
    outside_autocast,
    takes_dtensors,
)
from .softmax_attention import softmax_attention

MODES = ("gaussian", "dot_product", "concatenation")


@takes_dtensors(query="bh..", key="bh..", value="bh..", weight="..", out="bh..")
def non_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mode: str = "gaussian",
    scale: float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Attend from every position to every position, without an N x N matrix.

    Formulas: ``help(asa_ops.blocks.non_local)``. Source: Wang, Girshick, Gupta and He, CVPR 2018.

    Args:
        query: [B, heads, N_q, D], floating point.
        key: [B, heads, N_k, D].
        value: [B, heads, N_k, Dv].
        mode: "gaussian", softmax of the scaled scores; "dot_product", the scaled scores themselves; "concatenation",
            the scaled relu of <weight[0], query> + <weight[1], key>.
        scale: default D**-0.5 ("gaussian"), 1 / N_k (the others).
        weight: [2, D], shared by all heads; "concatenation" only, and required there.

    Returns:
        [B, heads, N_q, Dv] in the dtype of ``query``. In "gaussian" mode a double backward is torch's, which has none
        for its fused kernels.

    Raises:
        ValueError: shapes or options that do not fit.
        TypeError: dtypes that do not.

    Example:
        >>> import torch
        >>> from asa_ops import non_local_attention
        >>> q, k, v = torch.randn(3, 1, 2, 24 * 32, 16)
        >>> non_local_attention(q, k, v).shape
        torch.Size([1, 2, 768, 16])
    """
    query, key, value = cast_under_autocast(query=query, key=key, value=value)
    checks.check_qkv(query, key, value)
    checks.check_choice("mode", mode, MODES)
    if (weight is None) == (mode == "concatenation"):
        given = "no weight" if weight is None else f"weight={checks.describe(weight)}"
        raise ValueError(f'weight [2, D] belongs to mode="concatenation", got mode={mode!r} and {given}')
    if mode == "gaussian":
        return softmax_attention(query, key, value, checks.as_scale(scale, query))
    n_k = checks.as_int("N_k", key.shape[-2], at_least=0)  # not the tensor that torch.jit.trace has for a size
    scale = 1 / max(n_k, 1) if scale is None else checks.as_number("scale", scale)
    if weight is not None:
        (weight,) = cast_under_autocast(weight=weight)
        checks.check_tensor("weight", weight, "[2, D]")
        checks.check_like("weight", weight, query)
        if weight.shape != (2, query.shape[-1]):
            raise ValueError(f"weight must be [2, D] = [2, {query.shape[-1]}], got {checks.describe(weight)}")
    with outside_autocast(query.device.type):
        q, k, v = at_least_float32(query, key, value)
        if mode == "dot_product":
            # Tokens of a map are columns in memory: formed as its transpose, the output is a map without a copy.
            out = ((v.mT @ k * scale) @ q.mT).mT
        else:
            assert weight is not None  # checked above
            for_query, for_key = weight.to(q.dtype)
            if exporting_to_onnx():  # which has no searchsorted; onnxruntime gets products with vectors wrong
                out = scale * (q @ for_query[:, None] + (k @ for_key[:, None]).mT).relu() @ v
            else:
                out = scale * _relu_of_sums(q @ for_query, k @ for_key, v)
        return out.to(query.dtype)


def _relu_of_sums(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """Return sum_j relu(a_i + b_j) v_j [..., N_q, Dv], of a [..., N_q], b [..., N_k] and v [..., N_k, Dv].

    Without the N_q x N_k matrix: a_i + b_j > 0 for the largest b_j, so each output is made of two prefix sums.
    """
    b, order = b.sort(descending=True, dim=-1)
    with torch.no_grad():
        count = torch.searchsorted(-b, a.contiguous())  # how many b_j > -a_i

    def prefix_sums(x: Tensor) -> Tensor:  # [..., Dv, N_k] -> [..., Dv, N_q] in float64: long sums cancel
        sums = F.pad(x.cumsum(-1), (1, 0))
        return sums.gather(-1, count[..., None, :].expand(*x.shape[:-1], -1))

    v = v.mT
    v = v.gather(-1, order[..., None, :].expand_as(v)).double()
    out = a[..., None, :] * prefix_sums(v) + prefix_sums(b[..., None, :] * v)
    return out.to(a.dtype).mT


@ignoring_autocast
def reference_non_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mode: str = "gaussian",
    scale: float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The specification of :func:`non_local_attention`: dense, O(N^2) memory, any dtype, differentiable twice."""
    q, k, v = at_least_float32(query, key, value)
    if mode == "gaussian":
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        weights = (scale * (q @ k.mT)).softmax(-1)
    else:
        scale = 1 / k.shape[-2] if scale is None else scale
        if mode == "dot_product":
            weights = scale * (q @ k.mT)
        else:
            assert weight is not None
            for_query, for_key = weight.to(q.dtype)
            weights = scale * ((q @ for_query)[..., :, None] + (k @ for_key)[..., None, :]).relu()
    return (weights @ v).to(query.dtype)
