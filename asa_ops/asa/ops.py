"""The torch contracts of adaptive sparse attention: schemas, fakes, autocast, autograd, vmap and FLOPs.

``asa_ops::asa_fwd``, ``asa_ops::asa_bwd`` and ``asa_ops::asa_neighbors`` are opaque to torch.compile and the same for
every implementation. An argument names it; ``asa_ops.core.dispatch`` resolves it beforehand. :func:`attend` wraps the
first two in an autograd.Function.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..core import dispatch
from ..core.contracts import backward_of, outside_autocast, run_folded, run_outside_autocast
from . import reference
from .types import PADDED_TO, AsaStats, Inputs, NeighborGraph, Options, Saved

Shape = Sequence[int]


@torch.library.custom_op("asa_ops::asa_fwd", mutates_args=())
def asa_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    key_padding_mask: Tensor | None,
    grid_height: int,
    grid_width: int,
    window: int,
    topk: int,
    reciprocal: bool,
    scale: float,
    learn_thresholds: bool,
    band: float,
    keep_bits: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the forward of ``impl`` on checked arguments; topk = 0 means none, a grid of 0 x 0 none.

    ``learn_thresholds`` and ``band`` say what the gradient of alpha and beta is; the forward may keep more for it.

    Returns: the fields of :class:`Saved`; the bits are kept if ``keep_bits``, which a backward pass needs.
    """
    inputs = Inputs(query, key, value, alpha, beta, key_padding_mask)
    options = Options((grid_height, grid_width), window, topk, reciprocal, scale)
    saved = Saved.new(inputs, options, impl, keep_bits)
    dispatch.load("asa", impl).fwd(inputs, options, saved, band if learn_thresholds and keep_bits else None)
    return saved


@asa_fwd.register_fake
def _(  # type: ignore[no-untyped-def]
    query, key, value, alpha, beta, mask, h, w, window, topk, reciprocal, scale, learn, band, keep_bits, impl
):
    options = Options((h, w), window, topk, reciprocal, scale)
    return Saved.new(Inputs(query, key, value, alpha, beta, mask), options, impl, keep_bits)


@torch.library.custom_op("asa_ops::asa_bwd", mutates_args=())
def asa_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    key_padding_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_kept: Tensor,
    survivors: Tensor,
    kappa: Tensor,
    log_mean: Tensor,
    bits: Tensor,
    local: Tensor,
    residual: Tensor,
    base2: Tensor,
    grid_height: int,
    grid_width: int,
    window: int,
    topk: int,
    reciprocal: bool,
    scale: float,
    learn_thresholds: bool,
    band: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, alpha, beta from what :func:`asa_fwd` returned with ``keep_bits``.

    Those of alpha and beta are 0 unless ``learn_thresholds``, and [B, 0, 0] where there is no such argument.
    """
    if (alpha is not None or topk > 0) and 0 in bits.shape[3:] and key.shape[2]:
        raise RuntimeError("asa_attention: this forward pass ran with keep_bits=False, so it has no backward")
    if impl in PADDED_TO and 0 in base2.shape[3:] and out.numel() and key.shape[2]:
        raise RuntimeError("asa_attention: this forward pass ran with keep_bits=False, so it has no backward")
    inputs = Inputs(query, key, value, alpha, beta, key_padding_mask)
    saved = Saved(out, lse, lse_kept, survivors, kappa, log_mean, bits, local, residual, base2)
    options = Options((grid_height, grid_width), window, topk, reciprocal, scale)
    grads = dispatch.load("asa", impl).bwd(grad_out, inputs, saved, options, band if learn_thresholds else None)
    dq, dk, dv, dalpha, dbeta = (_like(dx, x, query) for dx, x in zip(grads, inputs[:5], strict=True))
    return dq, dk, dv, dalpha, dbeta


def _like(gradient: Tensor | None, x: Tensor | None, query: Tensor) -> Tensor:
    """Return a gradient in the shape and dtype of its input: 0 if there is none, [B, 0, 0] if there is no input."""
    if x is None:
        return query.new_empty(query.shape[0], 0, 0)
    if gradient is None:
        return x.new_zeros(x.shape)
    return gradient.sum_to_size(x.shape).to(x.dtype).contiguous()


@asa_bwd.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_out, query, key, value, alpha, beta, *others
):
    tokens = [x.new_empty(x.shape) for x in (query, key, value)]
    return *tokens, *(_like(None, x, query) for x in (alpha, beta))


@torch.library.custom_op("asa_ops::asa_neighbors", mutates_args=())
def asa_neighbors(
    query: Tensor,
    key: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    key_padding_mask: Tensor | None,
    grid_height: int,
    grid_width: int,
    window: int,
    topk: int,
    reciprocal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return the graph of :func:`asa_ops.reciprocal_neighbors` by ``impl``; arguments as of :func:`asa_fwd`."""
    inputs = Inputs(query, key, key[..., :0], alpha, beta, key_padding_mask)  # nobody's values are asked for
    options = Options((grid_height, grid_width), window, topk, reciprocal, scale)
    return dispatch.load("asa", impl).neighbor_graph(inputs, options)


@asa_neighbors.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    row_offsets = query.new_empty(query.shape[:3].numel() + 1, dtype=torch.int64)
    return row_offsets, query.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32)


_Backward = backward_of(
    asa_bwd,
    "asa_attention has no double backward in this implementation: use impl='reference', threshold_grad=None",
)


class _AsaAttention(torch.autograd.Function):
    """Autograd around the op. A Function with ``setup_context`` and ``vmap`` works under torch.func transforms."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return asa_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        (*tensors, height, width, window, topk, reciprocal, scale, learn, band, _, impl) = inputs
        ctx.options = (height, width, window, topk, reciprocal, scale, learn, band, impl)
        ctx.has_thresholds = [x is not None for x in (inputs[3], inputs[4])]
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # the bits would get a gradient of zeros as large as they are

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> Any:
        if grad_out is None:
            return (None,) * 16
        dq, dk, dv, *dx = _Backward.apply(grad_out, *ctx.saved_tensors, *ctx.options)
        dx = (d if given else None for d, given in zip(dx, ctx.has_thresholds, strict=True))
        return dq, dk, dv, *dx, *[None] * 11

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return run_folded(_AsaAttention.apply, info.batch_size, in_dims, args)


# The raw op has the same gradient, for whoever calls it from a graph without the Function.
asa_fwd.register_autograd(_AsaAttention.backward, setup_context=_AsaAttention.setup_context)


@register_flop_formula(torch.ops.asa_ops.asa_fwd)
def _forward_flops(q_shape: Shape, k_shape: Shape, v_shape: Shape, *args: Any, **kwargs: Any) -> int:
    """Dense cost: shapes cannot say how many pairs survive (:func:`flops` can)."""
    return flops(q_shape, k_shape, v_shape)


@register_flop_formula(torch.ops.asa_ops.asa_neighbors)
def _neighbors_flops(q_shape: Shape, k_shape: Shape, *args: Any, **kwargs: Any) -> int:
    return flops(q_shape, k_shape, q_shape, pairs=0)


@register_flop_formula(torch.ops.asa_ops.asa_bwd)
def _backward_flops(do_shape: Shape, q_shape: Shape, k_shape: Shape, v_shape: Shape, *args: Any, **kwargs: Any) -> int:
    batch, heads, n_q, dim = q_shape
    return 2 * batch * heads * n_q * k_shape[2] * (3 * dim + 2 * v_shape[3])


def flops(q_shape: Shape, k_shape: Shape, v_shape: Shape, pairs: int | None = None) -> int:
    """Return the floating point operations of a forward pass, multiply and add counted as two.

    Every score is needed once, 2 * B * heads * N_q * N_k * D; aggregation costs 2 * Dv for each of ``pairs`` (default:
    all of them, as in dense attention, in all 4 * N^2 * D).
    """
    batch, heads, n_q, dim = q_shape
    everybody = batch * heads * n_q * k_shape[2]
    return 2 * everybody * dim + 2 * (everybody if pairs is None else pairs) * v_shape[3]


def neighbors(inputs: Inputs, options: Options, impl: str) -> NeighborGraph:
    """Run ``impl`` on checked arguments; return the survivors."""
    if impl == "reference":  # plain torch, no op around it
        with outside_autocast(inputs.query.device.type):
            return reference.neighbor_graph(inputs, options)
    query, key, _, alpha, beta, mask = inputs
    (height, width), *others = options
    return NeighborGraph(*asa_neighbors(query, key, alpha, beta, mask, height, width, *others, impl))


def attend(
    inputs: Inputs, options: Options, threshold_grad: str | None, threshold_band: float, impl: str
) -> tuple[Tensor, AsaStats]:
    """Run ``impl`` with autograd on checked arguments; return out and its statistics."""
    if impl == "reference":  # plain torch, differentiable twice: no op around it
        grid, window, topk, reciprocal, scale = options
        return reference.asa_attention(  # type: ignore[return-value]  # with its statistics
            *inputs[:5],
            grid=grid,
            window=window,
            topk=topk or None,
            reciprocal=reciprocal,
            key_padding_mask=inputs.key_padding_mask,
            scale=scale,
            threshold_grad=threshold_grad,
            threshold_band=threshold_band,
            return_stats=True,
        )
    (height, width), *others = options
    compiling = torch.compiler.is_compiling()
    tracing = not compiling and torch.jit.is_tracing()  # type: ignore[attr-defined]  # not in torch's list of public names
    # Inside a vmap of a grad, requires_grad does not show, and a trace may run with gradients or without: keep what a
    # backward would read.
    unknown = tracing or (not compiling and torch._C._are_functorch_transforms_active())
    keep_bits = unknown or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs))
    # torch.compile fails on a Function that is given one tensor twice or needs no gradient, and what torch.jit.trace
    # makes of one cannot be saved; the op has its gradient.
    run = asa_fwd if compiling or tracing else _AsaAttention.apply
    outputs = run(*inputs, height, width, *others, threshold_grad is not None, threshold_band, keep_bits, impl)
    return outputs[0], AsaStats(*outputs[1:4])


run_outside_autocast(*(getattr(torch.ops.asa_ops, name).default for name in ("asa_fwd", "asa_bwd", "asa_neighbors")))
