"""An implementation by tiles run part by part in one process: what processes would compute, and what they exchange."""

from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from cases import Case, make, op_arguments
from torch import Tensor

from asa_ops.asa import ops, parts
from asa_ops.asa.types import Inputs, Options, Saved
from asa_ops.core import dispatch

BAND = 2.0


def ranges(sizes: list[int]) -> list[parts.Range]:
    """Return the ranges of parts of so many positions."""
    return list(pairwise(accumulate(sizes, initial=0)))


def joined(of_parts: list[Tensor], order: Tensor, own: list[parts.Range]) -> Tensor:
    """Return a tensor of the whole map [B, heads, n, ..] from those in which each part wrote its own tokens."""
    whole = torch.zeros_like(of_parts[0])
    for x, rows in zip(of_parts, own, strict=True):
        tokens = parts.tokens_at(order, rows, x.shape[2])
        heads = x.flatten(0, 1)
        parts.put(parts.take(heads, tokens, tokens.shape[1]), tokens, whole.flatten(0, 1))
    return whole


def forward(part: type, inputs: Inputs, options: Options, band: float, scanned: list[int], rows: list[int],
            keys: list[int], keep: bool = True):  # fmt: skip
    """Return outputs, what each part returned, and the parts.

    Args:
        scanned, rows: how many positions each part scans, and computes; ``keys`` are its own.
    """
    passes = [part(inputs, options, band, keep) for _ in rows]
    own, own_keys = ranges(rows), ranges(keys)
    scans = [each.scan(x) for each, x in zip(passes, ranges(scanned), strict=True)]
    if scans[0] is None:
        assert scanned == rows
    else:
        numbers, flags = (torch.cat([scan[i] for scan in scans], 1) for i in (0, 1))
        peaks = [None] * len(rows) if scans[0].peaks is None else torch.cat([x.peaks for x in scans], 2).split(rows, 2)
        scans = [parts.Scan(numbers, flags, x if x is None else x.contiguous()) for x in peaks]
    found = [each.attend(*x) for each, *x in zip(passes, own, own_keys, scans, strict=True)]
    order, of_parts = passes[0].row_order, zip(*(outputs for outputs, _ in found), strict=True)
    return parts.Outputs(*(joined(list(x), order, own) for x in of_parts)), found, passes


def backward(part: type, inputs: Inputs, options: Options, band: float, rows: list[int], keys: list[int], found: list,
             d_out: Tensor) -> parts.Gradients:  # fmt: skip
    """Return gradients from what parts returned in a forward."""
    passes = [part(inputs, options, band, True) for _ in rows]
    own, own_keys = ranges(rows), ranges(keys)
    begun = [
        each.begin_backward(x, y, d_out, outputs, kept)
        for each, x, y, (outputs, kept) in zip(passes, own, own_keys, found, strict=True)
    ]
    of_rows = [torch.cat(x, 1) for x in zip(*(x for x, _ in begun), strict=True)]
    largest = torch.stack([x for _, x in begun]).amax(0)
    ended = [each.end_backward(x, y, of_rows, largest) for each, x, y in zip(passes, own, own_keys, strict=True)]
    of_rows, of_keys = (passes[0].row_order, own), (passes[0].key_order, own_keys)
    sides = of_rows, of_keys, of_keys, of_rows, of_rows
    of_parts = zip(zip(*ended, strict=True), sides, strict=True)
    return parts.Gradients(*(None if x[0] is None else joined(list(x), *side) for x, side in of_parts))


def arguments(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Inputs, Options]:
    """Return a call as implementations take it."""
    given = op_arguments(*make(case, dtype, device=device))
    return ops.broadcast(Inputs(*given[:6])), Options.of(*given[6:12])


def triton_call(inputs: Inputs, options: Options, band: float, d_out: Tensor) -> tuple[list[Tensor], list]:
    """Return outputs and gradients of one call."""
    triton = dispatch.load("asa", "triton")
    saved = Saved.new(inputs, options, "triton", True, band)
    triton.fwd(inputs, options, saved, band or None)
    return list(saved[:4]), list(triton.bwd(d_out, inputs, saved, options, band or None))


def check(
    part: type, one_call: Callable, inputs: Inputs, options: Options, band: float, scanned: list[int], rows: list[int],
    keys: list[int], backwards: int = 1,
) -> None:  # fmt: skip
    """Check that parts are one call, to the last bit; rows move only where what was scanned moves them."""
    rows = rows if inputs.alpha is not None or options.topk else scanned
    keys = rows if inputs.query.shape[2] == inputs.key.shape[2] else keys
    shape = *inputs.query.shape[:3], inputs.value.shape[3]
    d_out = torch.linspace(-1, 1, inputs.query.new_empty(shape).numel()).view(shape).to(inputs.query)
    expected, gradients = one_call(inputs, options, band, d_out)
    outputs, found, _ = forward(part, inputs, options, band, scanned, rows, keys)
    for x, y in zip(outputs, expected, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))
    for _ in range(backwards):
        ended = backward(part, inputs, options, band, rows, keys, found, d_out)
        for x, y in zip(ended, gradients, strict=True):
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x.nan_to_num(7), y.nan_to_num(7))
