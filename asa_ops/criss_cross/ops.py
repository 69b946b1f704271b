"""The torch contracts of criss-cross attention: schemas, fakes, autocast, autograd, vmap, FLOPs, as in ``asa.ops``."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..core import dispatch
from ..core.contracts import NAMESPACE, OPS, backward_of, below_autograd, differentiate, run_outside_autocast
from . import reference

Shape = Sequence[int]


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_INPUTS = "Tensor query, Tensor key, Tensor value"
for _schema in (
    f"criss_cross_fwd({_INPUTS}, float scale, str impl) -> (Tensor out, Tensor stats)",
    f"criss_cross_bwd(Tensor grad_out, {_INPUTS}, Tensor stats, float scale, str impl) -> (Tensor, Tensor, Tensor)",
):
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
criss_cross_fwd = OPS.criss_cross_fwd.default
criss_cross_bwd = OPS.criss_cross_bwd.default


@torch.library.impl(_LIBRARY, "criss_cross_fwd", "CompositeExplicitAutograd")
def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    """Run the forward of ``impl`` on checked arguments.

    Returns:
        out: [B, Dv, H, W] or [B, Dv, T, H, W].
        stats: [B, 2, H, W] or [B, 2, T, H, W], at least float32: the largest of a pixel's scores, and the sum of
            exp(score - largest). (Their log-sum-exp would be rounded, and with it every weight that a backward forms
            again.)
    """
    out, stats = outputs = _new_outputs(query, value)
    if out.numel():
        dispatch.load("criss_cross", impl).fwd(query, key, value, scale, out, stats)
    return outputs


@torch.library.register_fake(criss_cross_fwd)  # type: ignore[untyped-decorator]
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    return _new_outputs(query, value)


def _new_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, *sides = value.shape
    stats = query.new_empty(batch, 2, *sides, dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(value.shape), stats


@torch.library.impl(_LIBRARY, "criss_cross_bwd", "CompositeExplicitAutograd")
def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stats: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value from what the forward returned."""
    inputs = query, key, value
    if not grad_out.numel():
        dq, dk, dv = (x.new_empty(x.shape) for x in inputs)
        return dq, dk, dv
    gradients = dispatch.load("criss_cross", impl).bwd(grad_out, *inputs, stats, scale)
    dq, dk, dv = (dx.to(x.dtype).contiguous() for dx, x in zip(gradients, inputs, strict=True))
    return dq, dk, dv


@torch.library.register_fake(criss_cross_bwd)  # type: ignore[untyped-decorator]
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


_without_grad = below_autograd(criss_cross_fwd)


class _CrissCross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *maps, ctx.scale, ctx.impl = args
        output = _without_grad(*args)
        ctx.save_for_backward(*maps, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> Any:
        if grad_out is None:
            return (None,) * 5
        return *criss_cross_bwd(grad_out, *ctx.saved_tensors, ctx.scale, ctx.impl), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "criss_cross_attention has no forward-mode derivative (jvp) in this implementation: use reverse mode "
            "(torch.func.vjp, torch.func.jacrev), or impl='reference'"
        )


def _formula(query: Tensor, key: Tensor, value: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    """Compute what the forward op returns, for inference, by the formula: no statistics."""
    return reference.criss_cross_attention(query, key, value, scale=scale), query.new_empty(0)


_DOUBLE_BACKWARD = "criss_cross_attention has no double backward in this implementation: use impl='reference'"
differentiate(_LIBRARY, criss_cross_fwd, _CrissCross, _formula)
differentiate(_LIBRARY, criss_cross_bwd, backward_of(criss_cross_bwd, _DOUBLE_BACKWARD))


@register_flop_formula(OPS.criss_cross_fwd)
def _forward_flops(q_shape: Shape, k_shape: Shape, v_shape: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _pairs(q_shape) * (q_shape[1] + v_shape[1])


@register_flop_formula(OPS.criss_cross_bwd)
def _backward_flops(do_shape: Shape, q_shape: Shape, k_shape: Shape, v_shape: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _pairs(q_shape) * (3 * q_shape[1] + 2 * v_shape[1])


def _pairs(shape: Shape) -> int:
    batch, _, *sides = shape
    return batch * math.prod(sides) * sum(sides)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, impl: str) -> Tensor:
    """Run ``impl`` with autograd on checked arguments."""
    if impl == "reference":  # plain torch, differentiable twice: no op around it
        return reference.criss_cross_attention(query, key, value, scale=scale)
    # torch.compile fails on a Function that is given one tensor twice; torch.jit.trace cannot save what it makes of it.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]  # not in torch's list of public names
    run = criss_cross_fwd if traced or torch._C._are_functorch_transforms_active() else _CrissCross.apply
    return run(query, key, value, scale, impl)[0]


run_outside_autocast(criss_cross_fwd, criss_cross_bwd)
