"""What torch asks of every op: autocast, vmap, no silent double backward.

Inputs are cast where autograd sees it, and kernels run outside autocast. vmap folds its dimension into the batch.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import describe


def has_autocast(device: str) -> bool:
    """Return whether there is such a thing as autocast on ``device``."""
    return torch.amp.is_autocast_available(device)


# To torch.compile the answer is a constant: torch 2.11 cannot trace the question.
has_autocast._dynamo_marked_constant = True


def cast_under_autocast(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Return ``tensors`` in the autocast dtype of their device where autocast is on; float64 stays as it is."""

    def cast(name: str, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(x)}")
        device = x.device.type
        on = has_autocast(device) and torch.is_autocast_enabled(device)
        castable = x.dtype.is_floating_point and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(device)) if on and castable else x

    return tuple(cast(name, x) for name, x in tensors.items())


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return half-precision tensors in float32, the others as they are: sums over a map need it."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def outside_autocast(device: str) -> contextlib.AbstractContextManager:
    """Return a context in which nothing is cast on ``device``."""
    return torch.autocast(device, enabled=False) if has_autocast(device) else contextlib.nullcontext()


def ignoring_autocast(function: Callable) -> Callable:
    """Run ``function``, whose first argument is ``query``, outside autocast."""

    @functools.wraps(function)
    def run(query, *args, **kwargs):
        with outside_autocast(query.device.type):
            return function(query, *args, **kwargs)

    return run


def run_folded(run, size: int, in_dims, args):
    """Run with a vmapped dimension of every tensor merged into its batch: the ops are independent over images."""
    tensors = {i: x for i, x in enumerate(args) if isinstance(x, Tensor)}
    for i, x in tensors.items():
        tensors[i] = x.expand(size, *x.shape) if in_dims[i] is None else x.movedim(in_dims[i], 0)
    batch = tensors[0].shape[1]
    outputs = run(*(tensors[i].flatten(0, 1).contiguous() if i in tensors else x for i, x in enumerate(args)))
    return tuple(x.unflatten(0, (size, batch)) for x in outputs), (0,) * len(outputs)


def run_outside_autocast(*ops) -> None:
    """Have ops run outside autocast, so that their bodies compute what their fakes promise."""
    for device in ("cpu", "cuda"):
        library = torch.library.Library("asa_ops", "FRAGMENT")
        for op in ops:

            def outside(*args, _op=op, _device=device, **kwargs):
                with outside_autocast(_device):
                    return _op(*args, **kwargs)

            library.impl(op, outside, f"Autocast{device.upper()}")
        _libraries.append(library)  # a Library undoes its registrations when it is collected


_libraries: list[torch.library.Library] = []
