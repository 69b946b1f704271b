"""Adaptive sparse attention on the CPU: the extension's kernels (csrc/cpu/asa), on tensors as they take them.

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
    real: Tensor | None
    not_finite: Tensor | None  # keys whose value is not finite


def _pad(x: Tensor) -> Tensor:
    """Return x with its last dimension padded to a multiple of 16."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 16)) if x.shape[-1] % 16 else x


def _prepare(inputs: Inputs) -> _Prepared:
    query, key, value, alpha, beta, key_padding_mask = inputs
    dtype, rows = inputs.precision, query.shape[:3]
    real = None if key_padding_mask is None else key_padding_mask.contiguous()
    not_finite = None

    def clean(x: Tensor, real: Tensor | None) -> Tensor:
        return (x if real is None else x.masked_fill(~real[:, None, :, None], 0)).contiguous()

    q, k, v = (
        clean(query.to(dtype), real if query.shape[2] == key.shape[2] else None),
        clean(key.to(dtype), real),
        clean(value.to(dtype), real),
    )
    q, k, v = _pad(q), _pad(k), _pad(v)
    if not v.sum().isfinite():  # rarely; then see which
        finite = v.isfinite()
        v, not_finite = v.nan_to_num(0, 0, 0), ~finite.all(-1)
    alpha, beta = (x if x is None else x.to(dtype).expand(rows).contiguous() for x in (alpha, beta))
    return _Prepared(q, k, v, alpha, beta, real, not_finite)


def fwd(inputs: Inputs, options: Options, saved: Saved, band: float | None) -> None:
    """Write into ``saved``. Gradients of thresholds, which learn within ``band``, need nothing else."""
    prepared = _prepare(inputs)
    out = saved.out
    padded = (*out.shape[:3], prepared.v.shape[3])
    fits = out.dtype == inputs.precision and out.shape == padded
    full = out if fits else out.new_empty(padded, dtype=inputs.precision)
    torch.ops.asa_ops.asa_cpu_fwd(*prepared, options.numbers(band), saved._replace(out=full))
    if full is not out:
        out.copy_(full[..., : out.shape[3]])


def bwd(
    do: Tensor, inputs: Inputs, saved: Saved, options: Options, band: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv and, unless ``band`` is None, the straight-through dalpha and dbeta, [B, heads, N_q].

    A row whose output is NaN makes the gradients of its image and head NaN.
    """
    *prepared, _ = tokens = _prepare(inputs)
    do = do.to(inputs.precision)
    if inputs.key_padding_mask is not None and do.shape[2] == inputs.key.shape[2]:  # their output is the constant 0
        do = do.masked_fill(~inputs.key_padding_mask[:, None, :, None], 0)
    if not saved.out.sum().isfinite():  # rarely; then see which rows
        do = do.masked_fill(saved.out.isnan().any(-1, keepdim=True), torch.nan)

    def run(do: Tensor, *thresholds: Tensor | None) -> tuple[list[Tensor], list[Tensor | None]]:
        dq, dk, dv = gradients = [torch.empty_like(x) for x in tokens[:3]]
        learning = [x if x is None else torch.zeros_like(x) for x in thresholds]
        torch.ops.asa_ops.asa_cpu_bwd(
            _pad(do).contiguous(), *prepared, options.numbers(band), saved, *gradients, *learning
        )
        return [d[..., : x.shape[3]] for d, x in zip((dq, dk, dv), inputs[:3], strict=True)], learning

    learned = (tokens.alpha, tokens.beta) if band is not None else (None, None)
    (dq, dk, dv), (dalpha, dbeta) = run(do, *learned)
    # The output of an empty row is constant: a gradient that reaches it goes to the thresholds of the row only.
    if not do.sum().isfinite():
        empty = (saved.survivors == 0) & ~saved.out.isnan().any(-1)
        if empty.any():
            (dq, dk, dv), _ = run(do.masked_fill(empty[..., None], 0), None, None)
    return dq, dk, dv, dalpha, dbeta


def neighbor_graph(inputs: Inputs, options: Options) -> NeighborGraph:
    """Return the survivors K."""
    saved = Saved.new(inputs, options, "cpu", keep_bits=True)
    fwd(inputs, options, saved, None)
    graph = new_graph(saved)
    *prepared, _ = _prepare(inputs)
    torch.ops.asa_ops.asa_cpu_neighbors(*prepared, options.numbers(), saved, *graph)
    return graph
