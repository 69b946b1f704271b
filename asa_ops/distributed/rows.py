"""The rows of one process by kernels that compute some rows of a problem: the order of a call.

Every process has all tokens, gathered, and a range of rows, and of columns, in whole blocks of 64, whatever tokens are
its own: so its sums are those of one process.

    forward   scan its rows against all keys; exchange bits, to know which neighbours are mutual; choose rows of equal
              work; aggregate; send outputs to the processes of their tokens
    backward  gather the gradient of the output; dq of its rows; gather the softmax of every row; dk and dv of its
              columns from all rows, whose probabilities it forms again; dalpha and dbeta of its rows; send them home

Per process and head, with R processes: N^2 / (8 R) bytes of bits, and what is gathered, O(N D). The bits of the columns
are kept too, as many bytes again, where a backward asks for one-way neighbours: thresholds learn, or nobody is to be
mutual; and in a forward that begins outputs with neighbours (``scan`` of csrc/cpu/asa).
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..asa.types import Inputs, NeighborGraph, new_graph
from ..core.contracts import OPS
from . import collectives
from .call import Call
from .ranges import BLOCK, blocks_of, ranges, ranges_of_equal_work

PIECE_BYTES = 2**22  # of bits, sent at a time
WITH_NEIGHBOURS = 1  # Begun::neighbours of csrc/cpu/asa/problem.h


def can_run(call: Call, inputs: Inputs) -> bool:
    """Return whether these kernels take the call; a map of one block is not split."""
    n_q, n_k, heads = sum(call.n_q), sum(call.n_k), inputs.query.shape[0] * inputs.query.shape[1]
    return call.impl == "cpu" and max(n_q, n_k) > BLOCK and min(n_q, n_k, heads) > 0


class Part:
    """What a process computes of a call."""

    def __init__(self, call: Call, inputs: Inputs, split: tuple[list[int], list[int]] | None = None):
        self.call, self.inputs = call, inputs
        self.size, self.rank = len(call.n_q), dist.get_rank(call.group)
        self.rows, self.columns = split or tuple(ranges(sum(n), self.size) for n in (call.n_q, call.n_k))
        self.options = [*inputs, *call.options]

    def own(self, sizes: list[int]) -> list[int]:
        begin = sum(sizes[: self.rank])
        return [begin, begin + sizes[self.rank]]

    def pieces(self, bits: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield bits of all rows and own columns, piece by piece, each with the first block of its rows.

        ``bits`` are those of own rows and all columns; those of the columns may change between pieces to those of
        mutual neighbours.
        """
        batch, heads = bits.shape[:2]
        rows, columns, size, rank = blocks_of(self.rows), blocks_of(self.columns), self.size, self.rank
        first_rows, first_columns = [0, *accumulate(rows)], [0, *accumulate(columns)]
        largest = batch * heads * max(rows) * max(columns) * BLOCK * 8
        count = max(1, min(max(rows), -(-largest // PIECE_BYTES)))
        for shift in range(size):
            to, source = (rank + shift) % size, (rank - shift) % size
            for piece in range(count):
                begin, end = (rows[rank] * x // count for x in (piece, piece + 1))
                first, last = (rows[source] * x // count for x in (piece, piece + 1))
                sent = bits[:, :, begin:end, first_columns[to] : first_columns[to + 1]]
                sent = sent.clone(memory_format=torch.contiguous_format)
                shape = batch, heads, last - first, columns[rank], BLOCK
                yield (
                    first_rows[source] + first,
                    sent if shift == 0 else collectives.shift(self.call.group, sent, shape, to, source),
                )

    def exchange(self, bits: Tensor) -> Tensor:
        """Return the bits of all rows and own columns from those of own rows and all columns."""
        rows, columns = blocks_of(self.rows), blocks_of(self.columns)
        back = bits.new_empty(*bits.shape[:2], sum(rows), columns[self.rank], BLOCK)
        for first, piece in self.pieces(bits):
            back[:, :, first : first + piece.shape[2]] = piece
        return back

    def make_mutual(self, bits: Tensor) -> None:
        """Make the bits of own rows those of mutual neighbours: those of others need not be kept."""
        for first, piece in self.pieces(bits):
            OPS.asa_keep_mutual(bits, piece, first)

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """Return tensors of own rows [B, heads, n, ..] as those of all rows."""
        return collectives.all_gather_rows(self.call.group, tensors, self.rows)

    def send_home(self, held: list[int], wanted: list[int], *tensors: Tensor) -> list[Tensor]:
        """Return the rows of this process's tokens, from tensors [B, heads, n, ..] of the rows that each computed."""
        return collectives.redistribute_rows(self.call.group, tensors, held, wanted)

    def is_thresholded(self) -> bool:
        return self.inputs.alpha is not None or self.call.options.topk > 0

    def scan(self) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
        """Return lse, who was found, outputs begun, and the bits of own columns where they will be asked for.

        Rows are even until their neighbours are counted; from here on each process has rows of equal work. Where nobody
        asks for one-way neighbours later, bits are those of mutual ones, and there are none of columns.
        """
        lse, *found, begun = OPS.asa_rows_scan(*self.options, self.own(self.rows))
        if not self.is_thresholded():
            return lse, found, begun, None
        mutual, blocks = self.call.options.reciprocal, blocks_of(self.rows)
        any_begun = collectives.any_process(self.call.group, bool((begun[..., 0] == WITH_NEIGHBOURS).any()))
        only_mutual = mutual and not self.call.band and not any_begun
        if only_mutual:
            self.make_mutual(found[0])
        work = OPS.asa_count_bits(found[0]).sum((0, 1))
        (work,) = collectives.all_gather_rows(self.call.group, [work[None, None]], blocks)
        lse, *found, begun = self.share_out(work.flatten(), blocks, lse, *found, begun)
        if only_mutual:
            return lse, found, begun, None
        return lse, found, begun, self.exchange(found[0]) if mutual or self.call.keep else None

    def options_of(self, back: Tensor | None) -> list[Any]:
        """Return the options for bits and those of columns: without these, what was mutual is read for one way."""
        *options, reciprocal, scale = self.options
        return [*options, reciprocal and not (self.is_thresholded() and back is None), scale]

    def both_ways(self, back: Tensor | None) -> Tensor | None:
        """Return the bits of columns where rows are to be read with them."""
        return back if self.call.options.reciprocal else None

    def share_out(self, work: Tensor, blocks: list[int], lse: Tensor, bits: Tensor, *rest: Tensor) -> list[Tensor]:
        """Choose rows of equal work, by the neighbours of every block, and send what is known of them there."""
        before = self.rows
        # Beside the neighbours, masks of all pairs are read: they take about as long as one pair in 64.
        masks = sum(self.call.n_k) * self.inputs.query.shape[0] * self.inputs.query.shape[1]
        rows = ranges_of_equal_work(sum(self.call.n_q), blocks, work.tolist(), masks)
        if rows is None:
            return [lse, bits, *rest]
        self.rows = rows
        if sum(self.call.n_k) == sum(self.call.n_q):
            self.columns = self.rows
        (bits,) = collectives.redistribute_rows(self.call.group, [bits], blocks, blocks_of(self.rows))
        # There is no kappa without topk, and no log_mean without beta.
        has = [True, self.call.options.topk > 0, self.inputs.beta is not None, True, True]
        there = [x for x, is_there in zip((lse, *rest), has, strict=True) if is_there]
        moved = iter(collectives.redistribute_rows(self.call.group, there, before, self.rows))
        lse, *others = [next(moved) if is_there else x for x, is_there in zip((lse, *rest), has, strict=True)]
        return [lse, bits, *others]


class Attention(torch.autograd.Function):
    """Out, lse, lse_kept and survivors of this process's tokens."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Any) -> Any:
        part = Part(call, call.gather(Inputs(*tensors)))
        lse, found, begun, back = part.scan()
        given = part.options_of(back)
        out, lse_kept, survivors = OPS.asa_rows_fwd(
            *given, part.own(part.rows), lse, *found, begun, part.both_ways(back)
        )
        home = part.send_home(part.rows, call.n_q, out, lse, lse_kept, survivors)
        if call.keep:
            if call.options.reciprocal and back is not None and not call.band:
                OPS.asa_keep_mutual(found[0], back, 0)
                back = None
            ctx.call, ctx.split = call, (part.rows, part.columns)
            ctx.dtypes = [x.dtype for x in tensors if x is not None]
            ctx.save_for_backward(*part.inputs, out.isnan().any(-1), lse, lse_kept, survivors, *found, back)
        ctx.mark_non_differentiable(*home[1:])
        return tuple(home)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> Any:
        call = ctx.call
        nan_rows, lse, lse_kept, survivors, *found, back = ctx.saved_tensors[6:]
        part = Part(call, Inputs(*ctx.saved_tensors[:6]), ctx.split)
        rows, columns = part.own(part.rows), part.own(part.columns)
        bits, kappa, log_mean, local = found
        grad_out = collectives.all_gather_rows(call.group, [grad_out], call.n_q)[0]
        nan_rows, survivors, lse_kept, local_of_all = part.gather(nan_rows, survivors, lse_kept, local)
        of_all = grad_out, nan_rows, survivors
        dq, softmax, groups = OPS.asa_rows_bwd(*of_all, *part.options_of(back), rows, *found, part.both_ways(back))
        softmax, groups = (x.mT.contiguous() for x in part.gather(softmax.mT, groups.mT))
        mine = bits if call.options.reciprocal and part.is_thresholded() else None
        dk, dv = OPS.asa_columns_bwd(*of_all, *part.options, columns, mine, local_of_all, back, softmax, groups)
        gradients: list[Tensor | None] = [*part.send_home(part.rows, call.n_q, dq)]
        gradients += part.send_home(part.columns, call.n_k, dk, dv)
        learning = [x is not None for x in part.inputs[3:5]]
        if call.band > 0 and any(learning):
            delta = softmax[:, :, 2].contiguous()
            thresholds = OPS.asa_thresholds_bwd(
                *of_all,
                *part.options,
                rows,
                lse,
                bits,
                kappa,
                log_mean,
                local_of_all,
                part.both_ways(back),
                lse_kept,
                delta,
                call.band,
            )
            wanted = [_sum_shared(dx, x) for dx, x in zip(thresholds, part.inputs[3:5], strict=True) if x is not None]
            homes = iter(part.send_home(part.rows, call.n_q, *wanted))
            gradients += [next(homes) if learns else None for learns in learning]
        else:
            n = call.n_q[part.rank]
            gradients += [None if x is None else x.new_zeros(*x.shape[:2], n) for x in part.inputs[3:5]]
        dtypes = iter(ctx.dtypes)
        return None, *(x if x is None else x.to(next(dtypes)) for x in gradients), None


def _sum_shared(gradient: Tensor, multiplier: Tensor) -> Tensor:
    """Return the gradient [B, heads, n] of a multiplier that heads or images may share, summed as one process does."""
    sums = gradient.new_zeros(*multiplier.shape[:2], gradient.shape[2], dtype=torch.float64)
    for b, of_image in enumerate(gradient):
        for h, of_head in enumerate(of_image):
            sums[b % len(sums), h % sums.shape[1]] += of_head
    return sums.to(gradient.dtype)


def neighbors(call: Call, tensors: Inputs) -> NeighborGraph:
    """Return the survivors of this process's tokens."""
    part = Part(call, call.gather(tensors))
    lse, found, begun, back = part.scan()
    given, rows = part.options_of(back), part.own(part.rows)
    _, _, survivors = OPS.asa_rows_fwd(*given, rows, lse, *found, begun, part.both_ways(back))
    graph = new_graph(survivors)
    OPS.asa_rows_list_survivors(*given, rows, *found, part.both_ways(back), *graph)
    return _send_home(part, survivors, graph)


def _send_home(part: Part, survivors: Tensor, graph: NeighborGraph) -> NeighborGraph:
    """Return the graph of this process's tokens from those of the rows that each computed."""
    call, rank = part.call, part.rank
    if part.rows == call.n_q:
        return graph
    (counts,) = part.send_home(part.rows, call.n_q, survivors)
    heads = counts.shape[0] * counts.shape[1]
    # A process sends each other the entries of its rows, head by head; so they come, too.
    to_each, from_each = (collectives.overlaps(*x, rank) for x in ((part.rows, call.n_q), (call.n_q, part.rows)))
    sizes = torch.stack([x.sum(-1) for x in survivors.view(heads, -1).split(to_each, 1)], 1)
    pieces = graph.col_indices.split(sizes.flatten().tolist())
    sent = [torch.cat(pieces[r :: part.size]).view(torch.uint8) for r in range(part.size)]
    sizes = torch.stack([x.sum(-1) for x in counts.view(heads, -1).split(from_each, 1)])
    received = collectives.all_to_all(call.group, sent, (sizes.sum(1) * graph.col_indices.itemsize).tolist())
    by_head = [x.view(torch.int32).split(of.tolist()) for x, of in zip(received, sizes, strict=True)]
    columns = [of[h] for h in range(heads) for of in by_head]
    return NeighborGraph(new_graph(counts).row_offsets, torch.cat([*columns, graph.col_indices[:0]]))
