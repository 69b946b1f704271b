"""Adaptive sparse attention on the CPU: the extension's kernels (csrc/cpu), on tensors as they want them.

The kernels take contiguous float32 or float64 (half precisions are computed in float32), head dims padded to multiples
of 16, and zeros where nothing may be read: in padding, and for values that are not finite, which are flagged instead.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .types import Inputs, NeighborGraph, Options, Saved, new_graph


class _Prepared(NamedTuple):
    """The tensors of a call as the kernels take them, in the order of their schemas."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    real_q: Tensor | None
    real_k: Tensor | None
    broken: Tensor | None  # keys whose value was not finite


def _pad(x: Tensor) -> Tensor:
    """Return x with its last dimension padded to a multiple of 16."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 16)) if x.shape[-1] % 16 else x


def _prepare(inputs: Inputs) -> _Prepared:
    query, key, value, alpha, beta, key_padding_mask = inputs
    dtype, rows = inputs.precision, query.shape[:3]
    real_q = real_k = broken = None
    if key_padding_mask is not None:
        real_k = key_padding_mask.contiguous()
        real_q = real_k if query.shape[2] == key.shape[2] else None

    def clean(x, real):
        return (x if real is None else x.masked_fill(~real[:, None, :, None], 0)).contiguous()

    q, k, v = (
        clean(query.to(dtype), real_q),
        clean(key.to(dtype), real_k),
        clean(value.to(dtype), real_k),
    )
    q, k, v = _pad(q), _pad(k), _pad(v)
    if not v.sum().isfinite():  # rarely; then see which
        finite = v.isfinite()
        v, broken = v.nan_to_num(0, 0, 0), ~finite.all(-1)
    thresholds = (x if x is None else x.to(dtype).expand(rows).contiguous() for x in (alpha, beta))
    return _Prepared(q, k, v, *thresholds, real_q, real_k, broken)


def _scalars(options: Options) -> tuple[int, int, int, int, bool, float]:
    return *options.grid, options.window, options.topk, options.reciprocal, options.scale


def fwd(inputs: Inputs, options: Options, saved: Saved, band: float | None) -> None:
    """Write into ``saved``; thresholds that learn, within ``band``, need no more of it."""
    prepared = _prepare(inputs)
    out, *rest, _, _ = saved
    padded = (*out.shape[:3], prepared.v.shape[3])
    fits = out.dtype == inputs.precision and out.shape == padded
    full = out if fits else out.new_empty(padded, dtype=inputs.precision)
    torch.ops.asa_ops.asa_cpu_fwd(*prepared, *_scalars(options), full, *rest)
    if full is not out:
        out.copy_(full[..., : out.shape[3]])


def bwd(
    do: Tensor, inputs: Inputs, saved: Saved, options: Options, band: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv and, unless ``band`` is None, the straight-through dalpha and dbeta, [B, heads, N_q].

    A row whose output is NaN makes the gradients of its image and head NaN.
    """
    *prepared, _ = kernel_inputs = _prepare(inputs)
    do = do.to(inputs.precision)
    if kernel_inputs.real_q is not None:  # their output is the constant 0
        do = do.masked_fill(~kernel_inputs.real_q[:, None, :, None], 0)
    if not saved.out.sum().isfinite():  # rarely; then see which rows
        do = do.masked_fill(saved.out.isnan().any(-1, keepdim=True), torch.nan)
    rest = (saved.lse, saved.lse_kept, saved.survivors, saved.kappa, saved.log_mean, saved.bits, saved.local)

    def run(do, *thresholds):
        dq, dk, dv = gradients = [torch.empty_like(x) for x in prepared[:3]]
        learning = [x if x is None else torch.zeros_like(x) for x in thresholds]
        torch.ops.asa_ops.asa_cpu_bwd(
            _pad(do).contiguous(), *prepared, *_scalars(options), *rest, band or 0.0, *gradients, *learning
        )
        return [d[..., : x.shape[3]] for d, x in zip((dq, dk, dv), inputs[:3], strict=True)], learning

    learned = prepared[3:5] if band is not None else (None, None)
    gradients, learning = run(do, *learned)
    if not do.sum().isfinite():  # what reaches the constant output of an empty row ends there, but for its thresholds
        empty = (saved.survivors == 0) & ~saved.out.isnan().any(-1)
        if empty.any():
            gradients, _ = run(do.masked_fill(empty[..., None], 0), None, None)
    return *gradients, *learning


def neighbor_graph(inputs: Inputs, options: Options) -> NeighborGraph:
    """Return the survivors K."""
    saved = Saved.new(inputs, options, "cpu", keep_bits=True)
    fwd(inputs, options, saved, None)
    graph = new_graph(saved)
    *prepared, _ = _prepare(inputs)
    rest = (saved.lse, saved.lse_kept, saved.kappa, saved.log_mean, saved.bits, saved.local)
    torch.ops.asa_ops.asa_cpu_neighbors(*prepared, *_scalars(options), *rest, *graph)
    return graph
