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

from . import buffers
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
    if buffers.prepare_outputs(inputs, saved):
        from . import triton_arrange, triton_fwd

        triton_fwd.forward(triton_arrange.Problem(inputs, options, band is not None), saved, band)


@_on_its_device
def bwd(
    do: Tensor, inputs: Inputs, saved: Saved, options: Options, band: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv and, unless ``band`` is None, the straight-through dalpha and dbeta, [B, heads, N_q].

    A row whose output is NaN makes the gradients of its image and head NaN.
    """
    tokens, learning, wanted = buffers.new_gradients(inputs, saved, band)
    if wanted:
        from . import triton_arrange, triton_bwd

        problem = triton_arrange.Problem(inputs, options, band is not None, backward=True)
        triton_bwd.backward(problem, do, saved, band, tokens, learning)
    return *tokens, *learning


@_on_its_device
def neighbor_graph(inputs: Inputs, options: Options) -> NeighborGraph:
    """Return the survivors K."""
    saved = Saved.new(inputs, options, bits_shape(inputs.query.shape[2], inputs.key.shape[2]), keep_bits=True)
    fwd(inputs, options, saved, None)
    graph = buffers.new_graph(saved)
    if len(graph.col_indices):
        from . import triton_arrange, triton_graph

        triton_graph.write_columns(triton_arrange.Problem(inputs, options, False), saved, *graph)
    return graph
