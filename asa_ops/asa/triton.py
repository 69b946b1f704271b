"""Adaptive sparse attention on the GPU: the Triton kernels, in the order in which a call runs them.

Forward: tokens are arranged in 8 x 8 tiles of the map (``triton_arrange``); every score is formed once, for lse and
block maxima (``triton_fwd``); from these come the tiles in which neighbours can be (``triton_plan``); there every pair
is decided and stored as a bit; blocks with neighbours are listed and summed; the local block and the end of every row
follow (``triton_window``). The backward lists blocks from the same bits (``triton_bwd``, ``triton_window_bwd``).
Everything runs on the device in one stream: no size depends on the data, nothing is read back.

Besides inputs and outputs a call holds N^2 / 8 bytes of bits, N^2 / 32 of block maxima (both until the backward), and
copies and parts of sums of O(N D). Only what is imported within functions here imports triton.
"""

import functools

import torch
from torch import Tensor

from .types import Inputs, NeighborGraph, Options, Saved

PAD = 128  # tokens of a head are padded to a multiple of this


def padded_length(n: int) -> int:
    """Return how many positions n tokens take."""
    return (n + PAD - 1) // PAD * PAD


def bits_shape(n_q: int, n_k: int) -> tuple[int, int]:
    """Shape of one head's bits: for 64 keys and every query, in arranged order, 64 bits and a float16 maximum."""
    return padded_length(n_k) // 64, padded_length(n_q) * 10


def _on_its_device(function):
    """Run with the device of the inputs current, which Triton launches on."""

    @functools.wraps(function)
    def run(*args):
        inputs = next(x for x in args if isinstance(x, Inputs))
        with torch.cuda.device_of(inputs.query):
            return function(*args)

    return run


@_on_its_device
def fwd(inputs: Inputs, options: Options, saved: Saved, band: float | None) -> None:
    """Write into ``saved``; ``band``: half width of the window in which thresholds learn, None if they do not."""
    if not saved.lse.numel():
        return
    empty = 0, -torch.inf, -torch.inf, 0
    if not inputs.key.shape[2]:  # nobody to attend to
        for x, value in zip(saved[:4], empty, strict=True):
            x.fill_(value)
        return
    from . import triton_arrange, triton_fwd

    problem = triton_arrange.Problem(inputs, options, band is not None)
    if inputs.key_padding_mask is not None and problem.rows is problem.keys:  # kernels leave padding rows alone
        for x, value in zip((*saved[:4], saved.local, saved.rest), (*empty, False, 0), strict=True):
            x.fill_(value)
    triton_fwd.forward(problem, saved, band)


@_on_its_device
def bwd(
    do: Tensor, inputs: Inputs, saved: Saved, options: Options, band: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv and, unless ``band`` is None, the straight-through dalpha and dbeta, [B, heads, N_q].

    A row whose output is NaN makes the gradients of its image and head NaN.
    """
    # Kernels leave padding alone.
    nothing = not saved.lse.numel() or not inputs.key.shape[2]
    new = torch.zeros if nothing or inputs.key_padding_mask is not None else torch.empty
    tokens = tuple(new(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:3])
    wanted = [x is not None and band is not None for x in (inputs.alpha, inputs.beta)]
    learning = tuple(new(saved.lse.shape, dtype=torch.float32, device=do.device) if x else None for x in wanted)
    if not nothing:
        from . import triton_arrange, triton_bwd

        problem = triton_arrange.Problem(inputs, options, band is not None)
        triton_bwd.backward(problem, do, saved, band, tokens, learning)
    return *tokens, *learning


@_on_its_device
def neighbor_graph(inputs: Inputs, options: Options) -> NeighborGraph:
    """Return the survivors K."""
    saved = Saved.new(inputs, options, bits_shape(inputs.query.shape[2], inputs.key.shape[2]), keep_bits=True)
    fwd(inputs, options, saved, None)
    row_offsets = torch.nn.functional.pad(saved.survivors.flatten().to(torch.int64).cumsum(0), (1, 0))
    col_indices = row_offsets.new_empty(int(row_offsets[-1]), dtype=torch.int32)
    if len(col_indices):
        from . import triton_arrange, triton_graph

        problem = triton_arrange.Problem(inputs, options, False)
        triton_graph.write_columns(problem, saved, row_offsets, col_indices)
    return NeighborGraph(row_offsets, col_indices)
