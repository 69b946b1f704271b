"""What the custom ops of asa_ops have in common: vmap by folding into the batch, no autocast within."""

import torch
from torch import Tensor

from .precision import outside_autocast


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
