"""Some rows and keys of a map by the CUDA kernels: ops of csrc/cuda/asa/part.cu, for ``asa_ops.distributed.tiles``.

The ops work on tensors of all rows, of which each process writes its own; what processes send each other is cut out of
them here.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .parts import Gradients, Outputs, Range, Scan
from .types import Inputs, Options, places_of


def _op(name: str, device: torch.device) -> Any:
    """Return an op for tensors of ``device``; on a CPU that of the emulation of the tests."""
    return getattr(torch.ops.asa_ops, f"asa_{'emulated_' if device.type == 'cpu' else ''}tiles_{name}")


def _order(n: int, grid: tuple[int, int, int], extra: int, real: Tensor | None, device: torch.device) -> Tensor:
    """Return the order of n tokens, [1 or B, padded]; csrc/cuda/asa/arrange.cu finds the same."""
    n -= extra  # which stand before the grid
    grid = grid if math.prod(grid) == n else (1, 1, n)
    thick, side = (1, 8) if grid[0] == 1 else (4, 4)
    places = places_of(torch.arange(n, device=device), grid)
    tile, within = torch.zeros(2, n, dtype=torch.int64, device=device)
    for place, of_grid, of_tile in zip(places, grid, (thick, side, side), strict=True):
        tile = tile * (of_grid // of_tile + 1) + place // of_tile
        within = within * of_tile + place % of_tile
    order = (tile * Part.block + within).argsort() + extra
    order = torch.cat([torch.arange(extra, device=device), order])[None]
    if real is not None:  # padding comes last
        order = order[0][(~real[:, order[0]]).byte().argsort(stable=True)]
        order = torch.where(real.gather(1, order), order, -2 - order)
    return torch.nn.functional.pad(order.int(), (0, -order.shape[1] % Part.block), value=-1)


class Part:
    """See :class:`asa_ops.asa.parts.Part`."""

    block = 64

    @staticmethod
    def can_run(inputs: Inputs, n_q: int, n_k: int, scale: float) -> bool:
        query, tf32 = inputs.query, ops.takes_tf32("cuda", inputs.query.dtype)
        return bool(_op("can_run", query.device)(query, n_q, n_k, inputs.value.shape[3], scale, tf32))

    def __init__(self, inputs: Inputs, options: Options, band: float, keep: bool) -> None:
        self.inputs, self.keep, self.band = inputs, keep, band if keep else 0.0
        self.options = (list(options.grid), list(options.window), *options[2:], self.band)
        self.has_thresholds = inputs.alpha is not None or options.topk > 0
        query, key = inputs.query, inputs.key
        self.n_heads = query.shape[0] * query.shape[1]
        self.key_order = _order(key.shape[2], options.grid, options.extra, inputs.key_padding_mask, key.device)
        self.row_order = self.key_order
        if query.shape[2] != key.shape[2]:
            self.row_order = _order(query.shape[2], (1, 1, query.shape[2]), 0, None, query.device)

    def _call(self, name: str, *args: Any, first: tuple[Tensor, ...] = (), saved: tuple[Tensor, ...] = ()) -> Any:
        return _op(name, self.inputs.query.device)(*first, *self.inputs, *saved, *self.options, *args)

    def scan(self, rows: Range) -> Scan | None:
        self.numbers, flags, peaks = self._call("scan", rows)
        learns = self.band > 0 and self.inputs.alpha is not None
        return Scan(self.numbers, flags, peaks if learns else None) if self.has_thresholds else None

    def attend(self, rows: Range, keys: Range, scan: Scan | None) -> tuple[Outputs, list[Tensor | None]]:
        if scan is None:
            flags = self.numbers.new_empty(self.n_heads, 0, self.key_order.shape[1] // 64, dtype=torch.uint8)
            scan = Scan(self._of_all(self.numbers, rows), flags, None)
        numbers, flags, peaks = (x if x is None else x.contiguous() for x in scan)
        *outputs, kept = self._call("attend", self.keep, rows, keys, numbers, flags)
        self.saved, self.keys = (*outputs, kept), keys
        # Without thresholds nobody has been told of the local survivors yet.
        untold = None if self.has_thresholds or self.inputs.beta is None else self.numbers
        return Outputs(*outputs), [kept, peaks, untold] if self.keep else []

    def _of_all(self, x: Tensor, rows: Range) -> Tensor:
        """Return numbers of all rows, 0 of others."""
        numbers = x.new_zeros(len(x), self.row_order.shape[1], *x.shape[2:])
        numbers[:, rows[0] : rows[1]] = x
        return numbers

    def list_survivors(self, rows: Range, row_offsets: Tensor, col_indices: Tensor) -> None:
        self._call("list_survivors", self.keep, rows, self.keys, row_offsets, col_indices, saved=self.saved)

    def begin_backward(
        self, rows: Range, keys: Range, d_out: Tensor, outputs: Outputs, kept: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], Tensor]:
        bits, self.peaks, untold = kept
        assert bits is not None
        self.saved = (*outputs, bits)
        arranged, of_rows, noted = self._call("begin_bwd", rows, keys, first=(d_out,), saved=self.saved)
        told = [x[:, rows[0] : rows[1]].contiguous() for x in (arranged, *of_rows)]
        return [*told, *([] if untold is None else [untold])], noted

    def end_backward(self, rows: Range, keys: Range, of_rows: Sequence[Tensor], largest: Tensor) -> Gradients:
        arranged, *numbers = (x.contiguous() for x in of_rows)
        untold = numbers[5] if len(numbers) > 5 else None
        given = (self.peaks, untold, arranged, torch.stack(numbers[:5]), largest.contiguous())
        dq, dk, dv, *thresholds = self._call("end_bwd", rows, keys, *given, saved=self.saved)
        learning = [self.band > 0 and x is not None for x in (self.inputs.alpha, self.inputs.beta)]
        return Gradients(dq, dk, dv, *(x if learns else None for x, learns in zip(thresholds, learning, strict=True)))
