"""The public function of criss-cross attention: checks, dispatch, nothing else."""

from torch import Tensor

from ..core import checks, dispatch
from ..core.contracts import cast_under_autocast, takes_dtensors
from ..core.dispatch import Impl
from . import ops


@takes_dtensors(query="b...", key="b...", value="b...", out="b...")
def criss_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0, impl: Impl = "auto"
) -> Tensor:
    """Attend from every pixel to its row and its column, by one softmax over these H + W - 1 pixels.

    In three dimensions, from every position to the three lines through it, T + H + W - 2 positions.
    Formulas and cost: ``help(asa_ops.criss_cross)``. Source: Huang et al., CCNet, ICCV 2019 and TPAMI 2020. The whole
    block, with its projections and its recurrence, is :class:`asa_ops.nn.CrissCrossAttention`.

    Args:
        query: [B, D, H, W] or [B, D, T, H, W], floating point. Heads, if any, are a part of B.
        key: as query.
        value: the same with Dv channels.
        scale: factor of the scores <q, k>; 1, as published.
        impl: "auto", or one of "reference", "blocked", "cpu", "triton"; an explicit choice never falls back. "triton"
            forms float32 products as torch does (``torch.set_float32_matmul_precision``), and runs on CPU tensors in
            Triton's interpreter only. Three dimensions have no kernels: "blocked" and "reference" run them.

    Returns:
        The shape of ``value``, contiguous, in the dtype of ``query``. What is not finite spreads along lines, never to
        another image.

    Raises:
        ValueError: shapes that do not fit, or an unknown ``impl``.
        TypeError: dtypes that do not fit, or arguments that are no tensors or numbers.
        RuntimeError: ``impl`` cannot run this call here.

    Example:
        >>> import torch
        >>> from asa_ops import criss_cross_attention
        >>> query, key = torch.randn(2, 1, 64, 24, 32)
        >>> value = torch.randn(1, 512, 24, 32)
        >>> criss_cross_attention(query, key, value).shape
        torch.Size([1, 512, 24, 32])
    """
    query, key, value = cast_under_autocast(query=query, key=key, value=value)
    checks.check_maps(query, key, value)
    scale = checks.as_number("scale", scale)
    names = ("criss_cross_attention", "criss_cross")  # of the op and of its kernels
    no_kernels = "there are kernels for maps [B, D, H, W] only" if query.dim() == 5 else None
    # The value may have any number of channels: kernels take them in parts.
    call = dispatch.Call(*names, query.device, query.dtype, query.shape[1], no_kernels)
    return ops.attend(query, key, value, scale, dispatch.choose(call, impl))
