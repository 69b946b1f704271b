"""What torch asks of every op: autocast, vmap, DTensors, no silent double backward.

Inputs are cast where autograd sees it, and kernels run outside autocast. vmap folds its dimension into the batch.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .checks import check_plain, describe, is_dtensor

# The ops are in the namespace of torch that has the name which the package is imported as. It is another than asa_ops
# where Hugging Face's kernels loads the package: two versions of it then have ops of their own.
NAMESPACE = __name__.partition(".")[0]
OPS: Any = getattr(torch.ops, NAMESPACE)

_F = TypeVar("_F", bound=Callable[..., Any])


def constant_under_compile(function: _F) -> _F:
    """Have torch.compile take what ``function`` returns for a constant, and not trace it.

    This is ``torch.compiler.assume_constant_result``, which would import torch._dynamo.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant_under_compile  # a change of it compiles anew
def allows_tf32() -> bool:
    """Return whether torch forms its own products of float32 matrices in TF32, whichever of its settings said so."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@constant_under_compile  # torch 2.11 cannot trace the question
def has_autocast(device: str) -> bool:
    """Return whether ``device`` has autocast."""
    return torch.amp.is_autocast_available(device)


@constant_under_compile
def exporting_to_onnx() -> bool:
    """Return whether ``torch.onnx.export`` is tracing."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()  # it need not be imported to say no


def cast_under_autocast(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Return ``tensors`` in the autocast dtype of their device where autocast is on; float64 stays as it is."""

    for name, x in tensors.items():
        if type(x) is not Tensor:
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {describe(x)}")
            check_plain(name, x)
    device = next(iter(tensors.values())).device.type  # that of all
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return tuple(tensors.values())

    def to_autocast_dtype(x: Tensor) -> Tensor:
        castable = x.dtype.is_floating_point and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(device)) if castable else x

    return tuple(map(to_autocast_dtype, tensors.values()))


def takes_dtensors(*, out: str, **layouts: str) -> Callable[[_F], _F]:
    """Have a function take DTensors too; ``core.dtensors`` says what a layout is. The first arguments, in order."""
    first = next(iter(layouts))

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            x = args[0] if args else options.get(first)
            if type(x) is Tensor or not is_dtensor(x):
                return function(*args, **options)
            from . import dtensors

            return dtensors.run(function, layouts, out, args, options)

        return cast(_F, run)

    return decorate


def is_known(condition: Any) -> bool:
    """Return whether a condition on sizes holds; of symbolic sizes, whether it holds for all that they stand for.

    An exported program may then choose the general way, where asking would tie it to the sizes of its sample.
    """
    if not isinstance(condition, torch.SymBool):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, and rarely needed

    return statically_known_true(condition)


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return half-precision tensors in float32, the others as they are: sums over a map need it."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def below_autograd(op: Callable[..., Any]) -> Callable[..., Any]:
    """Return the op without its autograd: for an autograd.Function that has its own, or where none is asked for."""

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return run


def outside_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which nothing is cast on ``device``."""
    return torch.autocast(device, enabled=False) if has_autocast(device) else contextlib.nullcontext()


def ignoring_autocast(function: _F) -> _F:
    """Run ``function``, whose first argument is ``query``, outside autocast."""

    @functools.wraps(function)
    def run(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        with outside_autocast(query.device.type):
            return function(query, *args, **kwargs)

    return cast(_F, run)


def run_folded(
    run: Callable[..., tuple[Tensor, ...]], size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Run with a vmapped dimension of every tensor merged into its batch: the ops are independent over images."""
    tensors = {i: x for i, x in enumerate(args) if isinstance(x, Tensor)}
    for i, x in tensors.items():
        dim = in_dims[i]
        tensors[i] = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    batch = tensors[0].shape[1]
    tensors = {i: x.expand(size, batch, *x.shape[2:]) for i, x in tensors.items()}  # images may share one
    outputs = run(*(tensors[i].flatten(0, 1).contiguous() if i in tensors else x for i, x in enumerate(args)))
    return tuple(x.unflatten(0, (size, batch)) for x in outputs), (0,) * len(outputs)


def differentiate(
    library: torch.library.Library,
    op: Any,
    function: type[torch.autograd.Function],
    formula: Callable[..., Any] | None = None,
) -> None:
    """Give an op the gradient of ``function``, and a batching rule, whoever calls it and whatever transforms it.

    This is not ``torch.library.register_autograd``, which torch.compile cannot trace under torch.func.grad.

    ``formula`` computes the same in PyTorch's own operations: ``torch.onnx.export`` traces it in place of the op.
    """
    without = below_autograd(op)

    def run(*args: Any) -> Any:
        # The exporter to ONNX traces every program once more, exported before or not, and gets here.
        if formula is not None and exporting_to_onnx():
            return formula(*args)
        asked = torch.is_grad_enabled() and any([isinstance(x, Tensor) and x.requires_grad for x in args])
        if not asked and forward_ad._current_level < 0:
            return without(*args)
        # This is the autograd of one level of torch.func; Function.apply itself would begin with the first.
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]  # torch does not tell

    def fold(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return run_folded(op, info.batch_size, in_dims, args)

    library.impl(op, run, "Autograd")
    torch.library.register_vmap(op, fold)


def backward_of(op: Callable[..., Any], double_backward: str) -> type[torch.autograd.Function]:
    """Return a Function that runs the backward op ``op``; its own backward is an error, ``double_backward``."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(double_backward)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            return run_folded(Backward.apply, info.batch_size, in_dims, args)

    return Backward


def run_outside_autocast(*ops: Callable[..., Any]) -> None:
    """Have ops run outside autocast, so that their bodies compute what their fakes promise."""
    for device in ("cpu", "cuda"):
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
        for op in ops:

            def outside(*args: Any, _op: Callable[..., Any] = op, _device: str = device, **kwargs: Any) -> Any:
                with outside_autocast(_device):
                    return _op(*args, **kwargs)

            library.impl(op, outside, f"Autocast{device.upper()}")
        _libraries.append(library)  # a Library undoes its registrations when it is collected


_libraries: list[torch.library.Library] = []
