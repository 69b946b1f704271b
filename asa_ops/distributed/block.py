"""The adaptive sparse attention block on strips of a map."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..core import checks
from ..core.layout import to_map
from ..nn import AdaptiveSparseAttention
from ..nn.training import attend
from . import collectives, strips
from .asa import asa_attention
from .call import Group


def parallelize(block: AdaptiveSparseAttention, group: Group = None) -> AdaptiveSparseAttention:
    """Have a block take and return this process's strip of rows of a map, in place.

    ``block(x)`` of x [B, C, rows, W], the r-th strip in process r, is then the same strip of what one process returns
    for the whole map. Strips may have different heights, and none. Every process of the group must call the block, and
    run the backward if one does. The 3x3 convolutions of the thresholds see a row of each neighbour; ``norm="batch"``
    in training takes the statistics of the whole map. x may be a ``DTensor`` with placements ``[Shard(2)]``, and so is
    the output then.

    Parameters stay as they are, the same tensors in every process, and get the gradients of the loss of this process's
    rows: their sum over the group is the gradient of one process. ``DistributedDataParallel`` and FSDP over the group,
    or over a mesh that contains it, form the mean instead; the loss of every process is then to be the sum over its
    rows, times the number of processes, divided by the number of rows of the whole map.

    Args:
        block: the same in every process.
        group: a process group, a DeviceMesh of one dimension, or None: all processes.

    Returns:
        ``block``.

    Raises:
        TypeError: another module.
        ValueError: ``published=True``, which is dense on one process, or ``dims`` other than 2.

    Example (torchrun --nproc-per-node 2):
        >>> import torch, torch.distributed as dist
        >>> from asa_ops import distributed, nn
        >>> dist.init_process_group("gloo")  # doctest: +SKIP
        >>> block = distributed.parallelize(nn.AdaptiveSparseAttention(64))  # doctest: +SKIP
        >>> y = block(torch.randn(1, 64, 16, 32))  # doctest: +SKIP
    """
    if type(block) is not AdaptiveSparseAttention and not isinstance(block, _OfStrips):
        raise TypeError(f"block must be an AdaptiveSparseAttention, got {checks.describe(block)}")
    if block.published:
        raise ValueError("published=True is dense on one process and cannot be split")
    if block.dims != 2:
        raise ValueError(f"block must have dims=2, strips are rows of maps [B, C, H, W], got dims={block.dims}")
    strip_group = collectives.as_group(group)
    block.__class__ = _OfStrips
    cast(_OfStrips, block).group = strip_group
    return block


class _OfStrips(AdaptiveSparseAttention):
    """What a block is once :func:`parallelize` has been called."""

    group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return self.attend(x)
        mesh = x.device_mesh
        own = dist.get_process_group_ranks(collectives.as_group(mesh)) == dist.get_process_group_ranks(self.group)
        if not own or tuple(x.placements) != (Shard(2),):
            raise ValueError(f"x must have the placements [Shard(2)] on the group's mesh, got {x.placements} on {mesh}")
        return DTensor.from_local(self.attend(x.to_local()), mesh, x.placements, shape=x.shape, stride=x.stride())

    def tokens(self, x: Tensor) -> dict[str, Any]:
        """Return the arguments of :func:`asa_ops.distributed.asa_attention` for a strip."""
        rows = self._rows(x)
        halo = strips.with_halo(x, self.group, rows)
        n = x.shape[2] * x.shape[3]
        if not n:  # convolutions want a row
            x, halo = (nn.functional.pad(y, (0, 0, 0, 1)) for y in (x, halo))

        def convolve(layer: nn.Conv2d) -> Tensor:
            return nn.functional.conv2d(halo, layer.weight, layer.bias, padding=(0, 1))

        tokens = self._tokens(x, convolve(self.alpha), None if self.beta is None else convolve(self.beta))
        for name in ("query", "key", "value", "alpha", "beta"):
            if tokens[name] is not None:
                tokens[name] = tokens[name].narrow(2, 0, n)
        return tokens | {"grid": (sum(rows), x.shape[3])}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # processes wait for each other in the middle
    def attend(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        out = attend(
            self,
            asa_attention,
            **tokens,
            group=self.group,
            threshold_grad=self.threshold_grad,
            threshold_band=self.threshold_band,
            impl=self.impl,
        )
        height, width = x.shape[2:]
        out = to_map(out, (height, width))
        projected = self.proj(out if height else nn.functional.pad(out, (0, 0, 0, 1)))[:, :, :height]
        return x + strips.batch_norm(self.norm, projected, self.group, tokens["grid"][0])

    def _rows(self, x: Tensor) -> list[int]:
        """Check the strips of all processes and return their heights."""

        def look() -> collectives.Found[None]:
            checks.check_tensor("x", x, "[B, C, rows, W]")
            checks.check_feature_map(x if x.shape[2] else nn.functional.pad(x, (0, 0, 0, 1)), self.in_channels)
            same: dict[str, object] = {
                "batch and width": (x.shape[0], x.shape[3]),
                "dtype": x.dtype,
                "requires_grad": torch.is_grad_enabled() and x.requires_grad,
                "mode, training or not": self.training,
            }
            return None, [x.shape[2]], same

        _, sizes = collectives.agree(self.group, look)
        rows = [height for (height,) in sizes]
        if not sum(rows):
            raise ValueError("x must have rows in some process, got none")
        return rows
