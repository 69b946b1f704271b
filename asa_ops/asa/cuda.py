"""Adaptive sparse attention on the GPU: the CUDA C++ kernels of the extension (csrc/cuda/asa).

They take the same steps as the Triton kernels (``asa_ops.asa.triton``) and hold the same memory; scores of float32 are
plain sums of products. One op a call launches everything; nothing is read back.
"""

import torch
from torch import Tensor

from .types import Inputs, NeighborGraph, Options, Saved, new_gradients, new_graph, prepare_outputs


def _tensors(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Return the inputs as the ops take them."""
    query, key, value, alpha, beta, key_padding_mask = inputs
    thresholds = (x if x is None else x.float() for x in (alpha, beta))
    real = key_padding_mask if key_padding_mask is None else key_padding_mask.contiguous()
    return query, key, value, *thresholds, real


def fwd(inputs: Inputs, options: Options, saved: Saved, band: float | None) -> None:
    """Write into ``saved``; ``band``: half width of the window in which thresholds learn, None if they do not."""
    if prepare_outputs(inputs, saved):
        torch.ops.asa_ops.asa_cuda_fwd(*_tensors(inputs), options.numbers(band), saved)


def bwd(
    do: Tensor, inputs: Inputs, saved: Saved, options: Options, band: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv and, unless ``band`` is None, the straight-through dalpha and dbeta, [B, heads, N_q].

    A row whose output is NaN makes the gradients of its image and head NaN.
    """
    tokens, learning, wanted = new_gradients(inputs, saved, band)
    if wanted:
        torch.ops.asa_ops.asa_cuda_bwd(do, *_tensors(inputs), options.numbers(band), saved, *tokens, *learning)
    return *tokens, *learning


def neighbor_graph(inputs: Inputs, options: Options) -> NeighborGraph:
    """Return the survivors K."""
    saved = Saved.new(inputs, options, "cuda", keep_bits=True)
    fwd(inputs, options, saved, None)
    graph = new_graph(saved)
    torch.ops.asa_ops.asa_cuda_neighbors(*_tensors(inputs), options.numbers(), saved, *graph)
    return graph
