"""The order of a call, on one page: forward, backward, neighbours.

Everything runs on the device in one stream: no size depends on the data, nothing is read back. Launches are most of a
small call: at most 9 a forward and 9 a backward, and torch fills no memory beside them. What does not depend on each
other is one launch therefore, and what has to begin with 0 is cleared by an earlier one.
"""

import functools

import torch
from torch import Tensor

from ..types import Inputs, NeighborGraph, Options, Saved, new_gradients, new_graph, prepare_outputs
from .arrange import arrange_backward, arrange_tokens, find_orders
from .finish import Gradients, GradientSums, correct_delta, finish_gradients, finish_out
from .lists import Listing
from .problem import Orders, Problem
from .scores import NO_STATISTICS, find_statistics
from .select import NO_NEIGHBOURS, NO_ROW_STATS, Neighbours, find_neighbours, keep_everybody
from .sums import NO_SUMS, sum_columns, sum_out, sum_rows, sum_thresholds
from .thresholds import NO_THRESHOLDS, find_thresholds, new_thresholds
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
        backward(problem, find_orders(problem), do, saved, band, Gradients(*tokens, *learning))
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
        write_columns(problem, orders.rows, orders.keys, problem.bits(saved.bits), saved.local, *graph)
    return graph


def forward(problem: Problem, orders: Orders, saved: Saved, band: float | None) -> None:
    """Write into ``saved``; ``band``: half width of the window in which thresholds learn."""
    buffer = saved.bits if saved.bits.shape[-1] or not problem.has_tiles else problem.new_bits()
    bits, peaks = problem.bits(buffer), problem.peaks(buffer)
    neighbours = Neighbours.new(problem, bits) if problem.has_tiles else NO_NEIGHBOURS
    tokens = arrange_tokens(problem, orders, neighbours if problem.has_bits else NO_NEIGHBOURS)
    statistics = find_statistics(problem, tokens, peaks)
    # Threshold gradients ask for A_ji of pairs (i, j) in the band below the threshold of i: those tiles too.
    reach = band if band is not None and problem.one_way_bits else 0.0
    thresholds = find_thresholds(problem, tokens, saved, peaks, statistics, reach)
    if problem.has_bits:  # local survivors are found beside them
        find_neighbours(problem, tokens, orders.notes, saved, thresholds, neighbours)
    elif problem.dense:
        keep_everybody(problem, tokens, statistics, neighbours)
    else:
        find_local_survivors(problem, tokens, saved)
    sums = NO_SUMS
    if problem.has_tiles:
        sums = sum_out(problem, tokens, Listing(problem, tokens, neighbours.occupied, ("aggregate",)), neighbours)
    finish_out(problem, tokens, saved, neighbours, sums)


def backward(
    problem: Problem, orders: Orders, do: Tensor, saved: Saved, band: float | None, gradients: Gradients
) -> None:
    """Write the gradients, of thresholds where they are not None."""
    learn_alpha = gradients.dalpha is not None
    bits = problem.bits(problem.new_bits() if problem.dense else saved.bits)
    occupied = problem.new_flags() if problem.has_tiles else None
    # Tiles with a score in the band around their rows' thresholds, and a neighbour the other way.
    thresholds = new_thresholds(problem) if learn_alpha else NO_THRESHOLDS
    tokens, row = arrange_backward(
        problem, orders, do, saved, bits, problem.peaks(saved.bits), None if problem.dense else occupied, thresholds,
        band,
    )  # fmt: skip
    if problem.dense:
        keep_everybody(problem, tokens, NO_STATISTICS, Neighbours(bits, NO_ROW_STATS, occupied))
    delta_error = NO_SUMS
    sums = GradientSums(NO_SUMS, NO_SUMS, NO_SUMS, NO_SUMS)
    if problem.has_tiles:
        kernels = ("dq", *problem.column_sums, "dt") if learn_alpha else ("dq", *problem.column_sums)
        listing = Listing(problem, tokens, occupied, kernels, thresholds.flags)
    if problem.dtype == torch.float32:
        if problem.has_tiles:
            delta_error = sum_rows(problem, tokens, listing, bits, row, delta_error=True)
        correct_delta(problem, tokens, saved, bits, row, delta_error)
    if problem.has_tiles:
        sums_q = sum_rows(problem, tokens, listing, bits, row)
        sums_k, sums_v = sum_columns(problem, tokens, listing, bits, row)
        sums_t = sum_thresholds(problem, tokens, listing, bits, row, thresholds, band) if learn_alpha else NO_SUMS
        sums = GradientSums(sums_q, sums_t, sums_k, sums_v)
    finish_gradients(problem, tokens, saved, bits, row, thresholds, band, sums, gradients)
