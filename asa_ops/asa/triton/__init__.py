"""Adaptive sparse attention on the GPU: the Triton kernels, in the order in which a call runs them.

Forward: tokens are arranged in 8 x 8 tiles of the map (``arrange``); every score is formed once, for lse and
block maxima (``forward``); from these come the tiles in which neighbours can be (``plan``); there every pair
is decided and stored as a bit; blocks with neighbours are listed and summed; the local block and the end of every row
follow (``window``). The backward lists blocks from the same bits (``backward``, ``window_bwd``).
Everything runs on the device in one stream: no size depends on the data, nothing is read back.

Besides inputs and outputs a call holds N^2 / 8 bytes of bits, N^2 / 32 of block maxima (both until the backward), and
copies and parts of sums of O(N D).
"""

import functools

import torch
from torch import Tensor

from ..types import Inputs, NeighborGraph, Options, Saved, new_gradients, new_graph, prepare_outputs
from .arrange import Problem
from .backward import backward
from .forward import forward
from .graph import write_columns


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
    if prepare_outputs(inputs, saved):
        forward(Problem(inputs, options, band is not None), saved, band)


@_on_its_device
def bwd(
    do: Tensor, inputs: Inputs, saved: Saved, options: Options, band: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv and, unless ``band`` is None, the straight-through dalpha and dbeta, [B, heads, N_q].

    A row whose output is NaN makes the gradients of its image and head NaN.
    """
    tokens, learning, wanted = new_gradients(inputs, saved, band)
    if wanted:
        problem = Problem(inputs, options, band is not None, backward=True)
        backward(problem, do, saved, band, tokens, learning)
    return *tokens, *learning


@_on_its_device
def neighbor_graph(inputs: Inputs, options: Options) -> NeighborGraph:
    """Return the survivors K."""
    saved = Saved.new(inputs, options, "triton", keep_bits=True)
    fwd(inputs, options, saved, None)
    graph = new_graph(saved)
    if len(graph.col_indices):
        write_columns(Problem(inputs, options, False), saved, *graph)
    return graph
