"""Criss-cross attention on the CPU: the extension's kernels (csrc/cpu/criss_cross), on tensors as they take them.

The kernels take contiguous maps in float32 or float64; half precisions are computed in float32.
"""

import torch
from torch import Tensor

from ..core.contracts import OPS


def fwd(query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, stats: Tensor) -> None:
    """Write into ``out`` and ``stats``."""
    full = out if out.dtype == stats.dtype else torch.empty_like(out, dtype=stats.dtype)
    OPS.criss_cross_cpu_fwd(*_prepare(stats.dtype, query, key, value), scale, full, stats)
    if full is not out:
        out.copy_(full)


def bwd(
    do: Tensor, query: Tensor, key: Tensor, value: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv."""
    inputs = _prepare(stats.dtype, do, query, key, value)
    dq, dk, dv = (torch.empty_like(x) for x in inputs[1:])
    OPS.criss_cross_cpu_bwd(*inputs, stats.contiguous(), scale, dq, dk, dv)
    return dq, dk, dv


def _prepare(dtype: torch.dtype, *maps: Tensor) -> list[Tensor]:
    return [x.to(dtype).contiguous() for x in maps]
