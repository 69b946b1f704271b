"""An implementation by tiles run part by part in one process: what processes would compute, and what they exchange."""

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from asa_ops.asa import parts
from asa_ops.asa.types import Inputs, Options


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
