"""The order of a call, on one page: forward, backward, neighbours.

Everything runs on the device in one stream: no size depends on the data, nothing is read back.
"""

import functools

import torch
from torch import Tensor

from ..types import Inputs, NeighborGraph, Options, Saved, new_gradients, new_graph, prepare_outputs
from .arrange import arrange_gradient, arrange_tokens, find_orders
from .finish import Gradients, correct_delta, finish_dkv, finish_dq, finish_out
from .problem import Order, Problem
from .scores import NO_STATISTICS, find_kth, find_statistics
from .select import (
    NO_ROW_STATS,
    NO_THRESHOLDS,
    Listing,
    RowStats,
    find_neighbours,
    find_occupied,
    find_thresholds,
    keep_everybody,
)
from .sums import NO_SUMS, sum_columns, sum_out, sum_rows, sum_thresholds
from .window import find_local_survivors, write_columns


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
        problem = Problem(inputs, options, band is not None)
        forward(problem, find_orders(problem), saved, band)


@_on_its_device
def bwd(
    do: Tensor, inputs: Inputs, saved: Saved, options: Options, band: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv and, unless ``band`` is None, the straight-through dalpha and dbeta, [B, heads, N_q].

    A row whose output is NaN makes the gradients of its image and head NaN.
    """
    tokens, learning, wanted = new_gradients(inputs, saved, band)
    if wanted:
        problem = Problem(inputs, options, band is not None)
        backward(problem, find_orders(problem), do, saved, band, *tokens, *learning)
    return *tokens, *learning


@_on_its_device
def neighbor_graph(inputs: Inputs, options: Options) -> NeighborGraph:
    """Return the survivors K."""
    saved = Saved.new(inputs, options, "triton", keep=True)
    problem = Problem(inputs, options, False)
    if not prepare_outputs(inputs, saved):
        return new_graph(saved.survivors)
    orders = find_orders(problem)
    forward(problem, orders, saved, None)
    graph = new_graph(saved.survivors)
    if len(graph.col_indices):
        write_columns(problem, orders, problem.bits(saved.bits), saved, *graph)
    return graph


def forward(problem: Problem, orders: tuple[Order, Order], saved: Saved, band: float | None) -> None:
    """Write into ``saved``; ``band``: half width of the window in which thresholds learn."""
    tokens = arrange_tokens(problem, orders)
    buffer = saved.bits if saved.bits.shape[-1] or not problem.has_tiles else problem.new_bits()
    bits, peaks = problem.bits(buffer), problem.peaks(buffer)
    statistics = find_statistics(problem, tokens, peaks)
    if problem.has_topk:
        find_kth(problem, tokens, saved)
    # Threshold gradients ask for A_ji of pairs (i, j) in the band below the threshold of i: those tiles too.
    reach = band if problem.one_way_bits else 0.0
    thresholds = find_thresholds(problem, tokens, saved, peaks, statistics, reach)
    stats = RowStats.new(problem)
    if problem.has_bits:
        bits.words.zero_()
        find_neighbours(problem, tokens, thresholds, bits, stats)
    elif problem.dense:
        keep_everybody(problem, tokens, bits, statistics, stats)
    if problem.window:
        find_local_survivors(problem, tokens, saved)
    sums = NO_SUMS
    if problem.has_tiles:
        occupied = find_occupied(problem, tokens, bits)
        sums = sum_out(problem, tokens, Listing(problem, tokens, occupied, occupied), bits, stats)
    finish_out(problem, tokens, saved, bits, stats, sums)


def backward(
    problem: Problem, orders: tuple[Order, Order], do: Tensor, saved: Saved, band: float | None,
    dq: Tensor, dk: Tensor, dv: Tensor, dalpha: Tensor | None, dbeta: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients, of thresholds where they are not None."""
    tokens = arrange_tokens(problem, orders, backward=True)
    tokens, row = arrange_gradient(problem, tokens, do, saved)
    bits = problem.bits(problem.new_bits() if problem.dense else saved.bits)
    if problem.dense:
        keep_everybody(problem, tokens, bits, NO_STATISTICS, NO_ROW_STATS)
    delta_error = sums = sums_k = sums_v = sums_t = NO_SUMS
    thresholds = NO_THRESHOLDS
    if problem.has_tiles:
        occupied = find_occupied(problem, tokens, bits)
        listing = Listing(problem, tokens, occupied, occupied)
    if problem.dtype == torch.float32:
        if problem.has_tiles:
            delta_error = sum_rows(problem, tokens, listing, bits, row, delta_error=True)
        correct_delta(problem, tokens, saved, bits, row, delta_error)
    if problem.has_tiles:
        sums = sum_rows(problem, tokens, listing, bits, row)
        sums_k, sums_v = sum_columns(problem, tokens, listing, bits, row)
    if dalpha is not None:
        # Tiles with a score in the band around their rows' thresholds, and a neighbour the other way.
        thresholds = find_thresholds(problem, tokens, saved, problem.peaks(saved.bits), NO_STATISTICS, band)
        listing = Listing(problem, tokens, thresholds.flags, occupied)
        sums_t = sum_thresholds(problem, tokens, listing, bits, row, thresholds, band)
    gradients = Gradients(dq, dalpha, dbeta)
    finish_dq(problem, tokens, saved, bits, row, thresholds, band, sums, sums_t, gradients)
    finish_dkv(problem, tokens, saved, bits, row, sums_k, sums_v, dk, dv)
