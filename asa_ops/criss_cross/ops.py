"""The torch contracts of criss-cross attention: schemas, fakes, autocast, autograd, vmap, FLOPs, as in ``asa.ops``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..core import dispatch
from ..core.contracts import backward_of, run_folded, run_outside_autocast
from . import reference

Shape = Sequence[int]


@torch.library.custom_op("asa_ops::criss_cross_fwd", mutates_args=())
def criss_cross_fwd(query: Tensor, key: Tensor, value: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    """Run the forward of ``impl`` on checked arguments.

    Returns:
        out: [B, Dv, H, W].
        stats: [B, 2, H, W], at least float32: the largest of a pixel's scores, and the sum of exp(score - largest).
            (Their log-sum-exp would be rounded, and with it every weight that a backward forms again.)
    """
    out, stats = outputs = _new_outputs(query, value)
    if out.numel():
        dispatch.load("criss_cross", impl).fwd(query, key, value, scale, out, stats)
    return outputs


@criss_cross_fwd.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    return _new_outputs(query, value)


def _new_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, height, width = value.shape
    stats = query.new_empty(batch, 2, height, width, dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(value.shape), stats


@torch.library.custom_op("asa_ops::criss_cross_bwd", mutates_args=())
def criss_cross_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stats: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value from what :func:`criss_cross_fwd` returned."""
    inputs = query, key, value
    if not grad_out.numel():
        dq, dk, dv = (x.new_empty(x.shape) for x in inputs)
        return dq, dk, dv
    gradients = dispatch.load("criss_cross", impl).bwd(grad_out, *inputs, stats, scale)
    dq, dk, dv = (dx.to(x.dtype).contiguous() for dx, x in zip(gradients, inputs, strict=True))
    return dq, dk, dv


@criss_cross_bwd.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


_Backward = backward_of(
    criss_cross_bwd, "criss_cross_attention has no double backward in this implementation: use impl='reference'"
)


class _CrissCross(torch.autograd.Function):
    """Autograd around the op. A Function with ``setup_context`` and ``vmap`` works under torch.func transforms."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return criss_cross_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *maps, ctx.scale, ctx.impl = inputs
        ctx.save_for_backward(*maps, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> Any:
        if grad_out is None:
            return (None,) * 5
        return *_Backward.apply(grad_out, *ctx.saved_tensors, ctx.scale, ctx.impl), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return run_folded(_CrissCross.apply, info.batch_size, in_dims, args)


# The raw op has the same gradient, for whoever calls it from a graph without the Function.
criss_cross_fwd.register_autograd(_CrissCross.backward, setup_context=_CrissCross.setup_context)


@register_flop_formula(torch.ops.asa_ops.criss_cross_fwd)
def _forward_flops(q_shape: Shape, k_shape: Shape, v_shape: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _pairs(q_shape) * (q_shape[1] + v_shape[1])


@register_flop_formula(torch.ops.asa_ops.criss_cross_bwd)
def _backward_flops(do_shape: Shape, q_shape: Shape, k_shape: Shape, v_shape: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _pairs(q_shape) * (3 * q_shape[1] + 2 * v_shape[1])


def _pairs(shape: Shape) -> int:
    batch, _, height, width = shape
    return batch * height * width * (height + width)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, impl: str) -> Tensor:
    """Run ``impl`` with autograd on checked arguments."""
    if impl == "reference":  # plain torch, differentiable twice: no op around it
        return reference.criss_cross_attention(query, key, value, scale=scale)
    # torch.compile fails on a Function that is given one tensor twice or needs no gradient, and what torch.jit.trace
    # makes of one cannot be saved; the op has its gradient.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]  # not in torch's list of public names
    run = criss_cross_fwd if traced else _CrissCross.apply
    return run(query, key, value, scale, impl)[0]


run_outside_autocast(torch.ops.asa_ops.criss_cross_fwd.default, torch.ops.asa_ops.criss_cross_bwd.default)
