"""Autocast: inputs are cast where autograd sees it, kernels run outside it."""

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
