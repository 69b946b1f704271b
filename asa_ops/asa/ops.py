"""The ops of adaptive sparse attention and what torch asks of them: fakes, autocast, autograd, vmap and FLOPs.

``asa_ops::asa_fwd`` and ``asa_ops::asa_bwd`` are C++ from end to end, on a CPU and on CUDA (csrc, registered when the
extension loads). The implementations in Python have ops of the same schemas: ``asa_ops::asa_triton_fwd``,
``asa_ops::asa_blocked_fwd``. :func:`attend` wraps a pair of them in an autograd.Function. Arguments, beside those of
:func:`asa_ops.asa_attention`:

    grid             the sides of the map; [] or [0, 0]: none
    window           an odd side for each dimension
    extra_tokens     alpha and beta of these are 0; with a beta there is an alpha or a topk too
    topk             0: none
    band             half width of the window in which thresholds learn; 0: they do not
    keep             whether a backward will follow: ``kept`` holds what it needs, otherwise nothing
    tf32             whether CUDA kernels may take the products of float32 in TF32; nobody else asks
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ..core import dispatch, extension
from ..core.contracts import (
    NAMESPACE,
    OPS,
    allows_tf32,
    backward_of,
    below_autograd,
    differentiate,
    outside_autocast,
    run_outside_autocast,
)
from . import reference
from .types import AsaStats, Inputs, NeighborGraph, Options, Saved, kept_bytes, new_graph, new_outputs

Shape = Sequence[int]

_OPTIONS = "SymInt[] grid, SymInt[] window, SymInt extra_tokens, SymInt topk, bool reciprocal, float scale, float band"
_PRECISION = "bool tf32=False"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? alpha, Tensor? beta, Tensor? key_padding_mask"
_OUTPUTS = "Tensor out, Tensor lse, Tensor lse_kept, Tensor survivors, Tensor kept"
FORWARD = f"({_INPUTS}, {_OPTIONS}, bool keep, {_PRECISION}) -> ({_OUTPUTS})"
BACKWARD = (
    f"(Tensor grad_out, {_INPUTS}, {_OUTPUTS}, {_OPTIONS}, {_PRECISION}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dalpha, Tensor dbeta)"
)


class OpOptions(NamedTuple):
    """What an op takes between ``inputs`` and ``band``."""

    grid: list[int]
    window: list[int]
    extra_tokens: int
    topk: int
    reciprocal: bool
    scale: float


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_FORWARD_MODE = (
    "asa_attention has no forward-mode derivative (jvp) in this implementation: use reverse mode (torch.func.vjp, "
    "torch.func.jacrev), or impl='reference' with threshold_grad=None"
)
_DOUBLE_BACKWARD = (
    "asa_attention has no double backward in this implementation: use impl='reference', threshold_grad=None"
)


def broadcast(inputs: Inputs) -> Inputs:
    """Return the inputs with alpha and beta [B, heads, N_q], by strides of 0, and key and value of all heads."""
    rows = inputs.query.shape[:3]
    alpha, beta = (x if x is None else x.expand(rows) for x in (inputs.alpha, inputs.beta))
    key, value = (x if x.shape[1] == rows[1] else x.repeat_interleave(rows[1] // x.shape[1], 1) for x in inputs[1:3])
    return inputs._replace(key=key, value=value, alpha=alpha, beta=beta)


def _define(impl: str) -> None:
    """Define the ops of an implementation in Python."""

    def forward(*args: Any) -> Any:
        tensors, options, (band, keep) = args[:6], args[6:12], args[12:14]
        inputs, options = broadcast(Inputs(*tensors)), Options.of(*options)
        saved = Saved.new(inputs, options, impl, keep, band)
        dispatch.load("asa", impl).fwd(inputs, options, saved, band if band and keep else None)
        return *saved[:4], saved.kept if keep else saved.kept.new_empty(*saved.kept.shape[:2], 0)

    def backward(grad_out: Tensor, *args: Any) -> Any:
        tensors, outputs, options, band = args[:6], args[6:11], args[11:17], args[17]
        inputs, options = broadcast(Inputs(*tensors)), Options.of(*options)
        expected, found = kept_bytes(inputs, options, impl, band=band), outputs[4].shape[2]
        if expected and not found:
            raise RuntimeError("asa_attention: this forward pass ran with keep=False, so it has no backward")
        if found != expected:
            raise RuntimeError(f"asa_attention: kept must be of {expected} bytes a head, got {found}")
        saved = Saved.of(inputs, options, impl, True, *outputs)
        gradients = list(dispatch.load("asa", impl).bwd(grad_out, inputs, saved, options, band or None))
        # Thresholds that do not learn have zeros: one launch for both.
        constant = [i for i in (3, 4) if tensors[i] is not None and gradients[i] is None]
        for i in constant:
            gradients[i] = tensors[i].new_empty(tensors[i].shape)
        if constant:
            torch._foreach_zero_([gradients[i] for i in constant])
        return tuple(like(dx, x, grad_out) for dx, x in zip(gradients, tensors[:5], strict=True))

    for name, schema, run in (("fwd", FORWARD, forward), ("bwd", BACKWARD, backward)):
        _LIBRARY.define(f"asa_{impl}_{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(f"asa_{impl}_{name}", run, "CompositeExplicitAutograd")


def like(gradient: Tensor | None, x: Tensor | None, grad_out: Tensor) -> Tensor:
    """Return a gradient in the shape and dtype of its input: 0 if there is none, [B, 0, 0] if there is no input."""
    if x is None:
        return grad_out.new_empty(grad_out.shape[0], 0, 0)
    if gradient is None:
        return x.new_zeros(x.shape)
    if x.dim() == 4 and gradient.shape[1] != x.shape[1]:  # heads that share keys
        gradient = gradient.unflatten(1, (x.shape[1], -1)).sum(2)
    return gradient.sum_to_size(x.shape).to(x.dtype).contiguous()


class _Ops:
    """The ops of an implementation, by the stem of their names, and autograd around them."""

    def __init__(self, stem: str):
        fwd, bwd = (getattr(OPS, f"{stem}_{name}").default for name in ("fwd", "bwd"))
        plain_fwd, plain_bwd = below_autograd(fwd), below_autograd(bwd)
        self.fwd, self.bwd, self.no_grad = fwd, bwd, plain_fwd
        self.list_survivors = getattr(OPS, f"{stem}_list_survivors", None)  # of those in C++

        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = plain_fwd(*args)
                _remember(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> Any:
                return _backward(bwd if torch.is_grad_enabled() or _is_transformed() else plain_bwd, ctx, grad_out)

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                raise NotImplementedError(_FORWARD_MODE)

        self.with_grad = Attention.apply
        # The ops themselves have the same gradient, under torch.compile and torch.func too.
        differentiate(_LIBRARY, fwd, Attention, _dense)
        differentiate(_LIBRARY, bwd, backward_of(bwd, _DOUBLE_BACKWARD))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what a backward needs."""
    ctx.options, ctx.others = (*inputs[6:13], *inputs[14:]), len(inputs) - 5  # all but `keep`
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # what is kept would get a gradient of zeros as large as it is


def _backward(run: Any, ctx: Any, grad_out: Tensor | None) -> Any:
    """Return the gradients of all arguments of a forward pass by ``run``, a backward op."""
    if grad_out is None:
        return (None,) * (5 + ctx.others)
    tensors = ctx.saved_tensors
    dq, dk, dv, dalpha, dbeta = run(grad_out, *tensors, *ctx.options)
    dalpha, dbeta = None if tensors[3] is None else dalpha, None if tensors[4] is None else dbeta
    return dq, dk, dv, dalpha, dbeta, *(None,) * ctx.others


def _is_transformed() -> bool:
    """Whether torch.compile or a torch.func transform is at work."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _dense(*args: Any) -> tuple[Tensor, ...]:
    """Compute what a forward op returns, for inference, by the formula: O(N^2) memory per image and head."""
    inputs, options = Inputs(*args[:6]), OpOptions(*args[6:12])
    out, stats = attend(inputs, options, None, 0.0, "reference")
    return out, *stats, out.new_empty(*out.shape[:2], 0, dtype=torch.uint8)


def of(impl: str, device: torch.device) -> _Ops:
    """Return the ops of an implementation for tensors of ``device``."""
    if impl == "cuda" and device.type == "cpu":
        return _OPS["asa_emulated"]  # of the tests
    return _OPS["asa" if impl in ("cpu", "cuda") else f"asa_{impl}"]


def register(stem: str, impl: str | None = None) -> None:
    """Tell torch about a pair of ops; ``impl`` None: that of C++ for the device of the inputs."""
    fwd, bwd = (f"{NAMESPACE}::{stem}_{name}" for name in ("fwd", "bwd"))

    @torch.library.register_fake(fwd)  # type: ignore[untyped-decorator]
    def _(*args: Any) -> Any:
        inputs, options, keep = Inputs(*args[:6]), Options.of(*args[6:12]), args[13]
        kind = impl or ("cpu" if inputs.query.device.type == "cpu" else "cuda")
        return new_outputs(inputs, kept_bytes(inputs, options, kind, band=args[12]) if keep else 0)

    @torch.library.register_fake(bwd)  # type: ignore[untyped-decorator]
    def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, alpha: Any, beta: Any, *_: Any) -> Any:
        tokens = (x.new_empty(x.shape) for x in (query, key, value))
        return *tokens, *(like(None, x, query) for x in (alpha, beta))

    @register_flop_formula(getattr(OPS, f"{stem}_fwd"))
    def _(q_shape: Shape, k_shape: Shape, v_shape: Shape, *args: Any, **kwargs: Any) -> int:
        """Dense cost: shapes cannot say how many pairs survive (:func:`flops` can)."""
        return flops(q_shape, k_shape, v_shape)

    @register_flop_formula(getattr(OPS, f"{stem}_bwd"))
    def _(do_shape: Shape, q_shape: Shape, k_shape: Shape, v_shape: Shape, *args: Any, **kwargs: Any) -> int:
        batch, heads, n_q, dim = q_shape
        return 2 * batch * heads * n_q * k_shape[2] * (3 * dim + 2 * v_shape[3])

    run_outside_autocast(*(getattr(OPS, f"{stem}_{name}").default for name in ("fwd", "bwd")))
    _OPS[stem] = _Ops(stem)


def flops(q_shape: Shape, k_shape: Shape, v_shape: Shape, pairs: int | None = None) -> int:
    """Return the floating point operations of a forward pass, multiply and add counted as two.

    Every score is needed once, 2 * B * heads * N_q * N_k * D; aggregation costs 2 * Dv for each of ``pairs`` (default:
    all of them, as in dense attention, in all 4 * N^2 * D).
    """
    batch, heads, n_q, dim = q_shape
    everybody = batch * heads * n_q * k_shape[2]
    return 2 * everybody * dim + 2 * (everybody if pairs is None else pairs) * v_shape[3]


@torch.library.custom_op(f"{NAMESPACE}::asa_neighbors", mutates_args=())
def asa_neighbors(
    query: Tensor,
    key: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    key_padding_mask: Tensor | None,
    grid: Sequence[int],
    window: Sequence[int],
    extra_tokens: int,
    topk: int,
    reciprocal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return the graph of :func:`asa_ops.reciprocal_neighbors` by ``impl``; arguments as of ``asa_fwd``."""
    inputs = Inputs(query, key, key[..., :0], alpha, beta, key_padding_mask)  # nobody's values are asked for
    options = (list(grid), list(window), extra_tokens, topk, reciprocal, scale)
    if impl not in ("cpu", "cuda"):
        return dispatch.load("asa", impl).neighbor_graph(broadcast(inputs), Options.of(*options))
    ops = of(impl, query.device)
    outputs = ops.fwd(*inputs, *options, 0.0, True, takes_tf32(impl, query.dtype))
    graph = new_graph(outputs[3])
    assert ops.list_survivors is not None
    ops.list_survivors(*inputs, *outputs, *options, 0.0, *graph)
    return graph


@asa_neighbors.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    row_offsets = query.new_empty(math.prod(query.shape[:3]) + 1, dtype=torch.int64)
    return row_offsets, query.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32)


@register_flop_formula(OPS.asa_neighbors)
def _neighbors_flops(q_shape: Shape, k_shape: Shape, *args: Any, **kwargs: Any) -> int:
    return flops(q_shape, k_shape, q_shape, pairs=0)


def takes_tf32(impl: str, dtype: torch.dtype) -> bool:
    """Return what an op of ``impl`` is told of TF32: torch's setting at the call, for its backward too."""
    return impl == "cuda" and dtype == torch.float32 and allows_tf32()


def neighbors(inputs: Inputs, options: OpOptions, impl: str) -> NeighborGraph:
    """Run ``impl`` on checked arguments; return the survivors."""
    if impl == "reference":  # plain torch, no op around it
        with outside_autocast(inputs.query.device.type):
            return reference.neighbor_graph(broadcast(inputs), Options.of(*options))
    query, key, _, alpha, beta, mask = inputs
    return NeighborGraph(*asa_neighbors(query, key, alpha, beta, mask, *options, impl))


def attend(
    inputs: Inputs, options: OpOptions, threshold_grad: str | None, threshold_band: float, impl: str
) -> tuple[Tensor, AsaStats]:
    """Run ``impl`` with autograd on checked arguments; return out and its statistics."""
    if impl == "reference":  # plain torch, differentiable twice: no op around it
        grid, window, extra, topk, reciprocal, scale = options
        return reference.asa_attention(  # type: ignore[return-value]  # with its statistics
            *broadcast(inputs)[:5],
            grid=grid,
            window=window,
            extra_tokens=extra,
            topk=topk or None,
            reciprocal=reciprocal,
            key_padding_mask=inputs.key_padding_mask,
            scale=scale,
            threshold_grad=threshold_grad,
            threshold_band=threshold_band,
            return_stats=True,
        )
    ops = of(impl, inputs.query.device)
    wanted = [x is not None and x.requires_grad for x in inputs]
    keep, learns = torch.is_grad_enabled() and any(wanted), any(wanted[3:5])
    if torch._C._are_functorch_transforms_active():
        run, keep, learns = ops.fwd, True, True  # inside a vmap of a grad, requires_grad does not show
    elif torch.compiler.is_compiling():
        run = ops.fwd  # torch.compile fails on a Function that is given one tensor twice
        learns = learns or torch.compiler.is_exporting()  # whoever runs it may ask for more than the example did
    elif torch.jit.is_tracing():  # type: ignore[attr-defined]  # not in torch's list of public names
        # What it makes of a Function cannot be saved; it may run with gradients or without.
        run, keep, learns = ops.fwd, True, True
    elif keep or forward_ad._current_level >= 0:  # only a Function sees a tangent
        run = ops.with_grad
    else:
        run = ops.no_grad
    band = threshold_band if learns and threshold_grad is not None else 0.0
    tf32 = takes_tf32(impl, inputs.query.dtype)
    out, lse, lse_kept, survivors, _ = run(*inputs, *options, band, keep, tf32)
    return out, AsaStats(lse, lse_kept, survivors)


_OPS: dict[str, _Ops] = {}
for _impl in ("triton", "blocked"):
    _define(_impl)
    register(f"asa_{_impl}", _impl)
if not extension.WHY_MISSING:
    register("asa")
run_outside_autocast(OPS.asa_neighbors.default)
