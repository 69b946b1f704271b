"""Autocast: inputs are cast where autograd sees it, kernels run outside it."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor


def cast_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return ``tensors`` in the autocast dtype of their device if autocast is on there; float64 stays as it is."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    low = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(low) for x in tensors)


def outside_autocast(device: str) -> contextlib.AbstractContextManager:
    """Return a context in which nothing is cast on ``device``."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def ignoring_autocast(function: Callable) -> Callable:
    """Run ``function``, whose first argument is ``query``, outside autocast."""

    @functools.wraps(function)
    def run(query, *args, **kwargs):
        with outside_autocast(query.device.type):
            return function(query, *args, **kwargs)

    return run
