"""The rows of one process by kernels that go by tiles: the order of a call, and what processes exchange.

Every process has all tokens, gathered, and a range of rows, and of keys, in whole blocks of the order in which kernels
take tokens, whatever tokens are its own. ``asa_ops.asa.parts`` says what an implementation computes of them.

    forward   scan own rows against all keys; gather thresholds, and which tiles reach them; choose rows of equal work;
              decide the pairs of own rows and aggregate them; send outputs to the processes of their tokens
    backward  send the gradient of the output to the processes of the rows; gather it and the softmax of every row; dq,
              dalpha and dbeta of own rows; dk and dv of own keys; send them home

Pairs are not exchanged: whoever asks for one decides it, by the same numbers in the same order. So processors must be
of one kind, and per process and head there are N^2 / (8 R) bytes of bits, with R processes, and what is gathered,
O(N D), and N^2 / 4096 bytes of flags in a forward. Bits of all rows and own keys are as many again, where thresholds
learn or, in a backward, nobody is to be mutual.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..asa import ops, parts
from ..asa.types import Inputs, NeighborGraph, Options, new_graph
from ..core.contracts import NAMESPACE
from . import collectives
from .call import Call
from .ranges import blocks_of, ranges, ranges_of_equal_work

# Where the implementations are.
PARTS = {"triton": ".asa.triton.part", "cuda": ".asa.cuda_part"}
_Tokens = list[tuple[Tensor, Tensor]]  # images and tokens, for each process


def _implementation(impl: str) -> type[parts.Part]:
    return importlib.import_module(PARTS[impl], NAMESPACE).Part


def can_run(call: Call, inputs: Inputs) -> bool:
    """Return whether these kernels take the call; a map of one block is not split."""
    n_q, n_k, heads = sum(call.n_q), sum(call.n_k), inputs.query.shape[0] * inputs.query.shape[1]
    if call.impl not in PARTS or min(n_q, n_k, heads) == 0:
        return False
    part, scale = _implementation(call.impl), call.options.scale
    return max(n_q, n_k) > part.block and part.can_run(inputs, n_q, n_k, scale)


class _Homes:
    """The processes that hold tokens, and those that compute them.

    Args:
        order: int32 [1 or B, positions]; ``computed[r]`` of them are those of process r.
        held: how many tokens each process has.
    """

    def __init__(self, call: Call, order: Tensor, computed: Sequence[int], held: Sequence[int], batch: int):
        self.group, self.held, self.batch, n = call.group, held, batch, sum(held)
        self.rank, size = dist.get_rank(call.group), len(held)
        tokens = parts.tokens_at(order, (0, order.shape[1]), n)
        by_position = torch.arange(size, device=order.device).repeat_interleave(order.new_tensor(computed))[:n]
        self.computer = torch.empty_like(tokens).scatter_(1, tokens, by_position.expand_as(tokens)).expand(batch, n)
        of_processes = self.computer.split(list(held), 1)
        # What this process computes, by who holds it; and what it holds, by who computes it.
        begins = [sum(held[:r]) for r in range(size)]
        self.computed = [
            (images, tokens + begin)
            for begin, x in zip(begins, of_processes, strict=True)
            for images, tokens in [(x == self.rank).nonzero(as_tuple=True)]
        ]
        self.here = [(of_processes[self.rank] == r).nonzero(as_tuple=True) for r in range(size)]

    def send(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return own tokens of tensors [B, heads, N, ..], from the processes that compute them."""
        return self._exchange(tensors, self.computed, self.here, self.held[self.rank])

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors [B, heads, N, ..] of the tokens that this process computes, from those who hold them."""
        return self._exchange(tensors, self.here, self.computed, sum(self.held))

    def _exchange(self, tensors: Sequence[Tensor], to_each: _Tokens, from_each: _Tokens, n: int) -> list[Tensor]:
        pieces = [[x.transpose(0, 1)[:, images, tokens][None] for x in tensors] for images, tokens in to_each]
        received = collectives.exchange_rows(self.group, pieces, [len(tokens) for _, tokens in from_each])
        images, tokens = (torch.cat(x) for x in zip(*from_each, strict=True))
        exchanged = [x.new_empty(self.batch, x.shape[1], n, *x.shape[3:]) for x in tensors]
        for x, came in zip(exchanged, received, strict=True):
            x.transpose(0, 1)[:, images, tokens] = came[0]
        return exchanged


class _Pass:
    """A forward, a backward or a graph of a process."""

    def __init__(self, call: Call, inputs: Inputs, keep: bool, split: tuple[list[int], list[int]] | None = None):
        self.call, self.inputs = call, inputs
        self.size, self.rank = len(call.n_q), dist.get_rank(call.group)
        self.part = _implementation(call.impl)(ops.broadcast(inputs), Options.of(*call.options), call.band, keep)
        block, self.has_one_range = self.part.block, sum(call.n_q) == sum(call.n_k)
        orders = self.part.row_order, self.part.key_order
        self.rows, self.keys = split or tuple(ranges(x.shape[1], self.size, block=block) for x in orders)

    def range_of(self, sizes: list[int]) -> parts.Range:
        begin = sum(sizes[: self.rank])
        return begin, begin + sizes[self.rank]

    def gather(self, sizes: Sequence[int], *tensors: Tensor) -> list[Tensor]:
        """Return tensors [n_heads, sizes[r], ..] of process r joined."""
        return [x[0] for x in collectives.all_gather_rows(self.call.group, [x[None] for x in tensors], sizes)]

    def attend(self) -> tuple[parts.Outputs, list[Tensor | None]]:
        """Return outputs of own rows, of equal work, and what a backward needs."""
        scan = self.part.scan(self.range_of(self.rows))
        if scan is not None:
            (numbers,) = self.gather(self.rows, scan.numbers)
            (flags,) = self.gather(blocks_of(self.rows, parts.TILE), scan.flags)
            scan = parts.Scan(numbers, flags, self._share_out(flags, scan.peaks))
        return self.part.attend(self.range_of(self.rows), self.range_of(self.keys), scan)

    def _share_out(self, flags: Tensor, peaks: Tensor | None) -> Tensor | None:
        """Choose rows of equal work, by how many pairs are to be decided; return peaks of own rows."""
        before, block = self.rows, self.part.block
        visited = flags & flags.mT if self.call.options.reciprocal else flags
        pairs = visited.sum((0, 2)).view(-1, block // parts.TILE).sum(1) * parts.TILE**2
        # Beside the neighbours, masks of all pairs are read: they take about as long as one pair in 64.
        masks = sum(self.call.n_k) * len(flags) * (block // parts.TILE)
        rows = ranges_of_equal_work(sum(before), blocks_of(before, block), pairs.tolist(), masks, block)
        if rows is not None:
            self.rows = rows
            self.keys = rows if self.has_one_range else self.keys
            if peaks is not None:
                (peaks,) = collectives.redistribute_rows(self.call.group, [peaks], before, rows)
        return peaks

    def homes_of_rows(self) -> _Homes:
        return _Homes(self.call, self.part.row_order, self.rows, self.call.n_q, self.inputs.query.shape[0])

    def homes_of_keys(self) -> _Homes:
        return _Homes(self.call, self.part.key_order, self.keys, self.call.n_k, self.inputs.query.shape[0])


class Attention(torch.autograd.Function):
    """Out, lse, lse_kept and survivors of this process's tokens."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Any) -> Any:
        inputs = call.gather(Inputs(*tensors))
        with torch.cuda.device_of(inputs.query):
            mine = _Pass(call, inputs, call.keep)
            outputs, kept = mine.attend()
            home = mine.homes_of_rows().send(outputs)
        if call.keep:
            ctx.call, ctx.split = call, (mine.rows, mine.keys)
            ctx.save_for_backward(*inputs, *outputs, *kept)
        ctx.mark_non_differentiable(*home[1:])
        return tuple(home)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> Any:
        call, saved = ctx.call, ctx.saved_tensors
        inputs, outputs, kept = Inputs(*saved[:6]), parts.Outputs(*saved[6:10]), saved[10:]
        with torch.cuda.device_of(inputs.query):
            mine = _Pass(call, inputs, True, ctx.split)
            rows, keys, homes = mine.range_of(mine.rows), mine.range_of(mine.keys), mine.homes_of_rows()
            (d_out,) = homes.fetch([grad_out])
            of_rows, largest = mine.part.begin_backward(rows, keys, d_out, outputs, kept)
            of_rows = mine.gather(mine.rows, *of_rows)
            (largest,) = mine.gather([1] * mine.size, largest[None, None])
            found = mine.part.end_backward(rows, keys, of_rows, largest[0].amax(0))
            query, *of_keys = (ops.like(dx, x, d_out) for dx, x in zip(found[:3], inputs[:3], strict=True))
            (dq,) = homes.send([query])
            dk, dv = (homes if mine.has_one_range else mine.homes_of_keys()).send(of_keys)
            learning = [_of_thresholds(call, homes, dx, x) for dx, x in zip(found[3:], inputs[3:5], strict=True)]
        return None, dq, dk, dv, *learning, None


def _of_thresholds(call: Call, homes: _Homes, gradient: Tensor | None, multiplier: Tensor | None) -> Tensor | None:
    """Return the gradient of own thresholds; heads or images that share one are summed as one process sums them."""
    if multiplier is None:
        return None
    n = call.n_q[homes.rank]
    if gradient is None:
        return multiplier.new_zeros(*multiplier.shape[:2], n)
    # Images may have different orders, so sums over them are formed here; of a whole map, whose shape sums may follow.
    (own,) = homes.send([gradient])
    begin = sum(call.n_q[: homes.rank])
    whole = torch.nn.functional.pad(own, (begin, sum(call.n_q) - begin - n))
    return ops.like(whole, multiplier, own)[:, :, begin : begin + n].contiguous()


def neighbors(call: Call, tensors: Inputs) -> NeighborGraph:
    """Return the survivors of this process's tokens."""
    inputs = call.gather(tensors)
    with torch.cuda.device_of(inputs.query):
        mine = _Pass(call, inputs, True)
        outputs, _ = mine.attend()
        homes = mine.homes_of_rows()
        survivors = outputs.survivors.masked_fill((homes.computer != mine.rank)[:, None], 0)
        graph = new_graph(survivors)
        mine.part.list_survivors(mine.range_of(mine.rows), *graph)
        return _send_home(homes, survivors, graph)


def _send_home(homes: _Homes, survivors: Tensor, graph: NeighborGraph) -> NeighborGraph:
    """Return the graph of this process's tokens from those of the rows that each computed, of whole maps."""
    (counts,) = homes.send([survivors])
    home = new_graph(counts)
    sent = [graph.col_indices[_entries(survivors, graph, *there)].view(torch.uint8) for there in homes.computed]
    entries = [_entries(counts, home, *here) for here in homes.here]
    lengths = [len(x) * home.col_indices.itemsize for x in entries]
    for x, received in zip(entries, collectives.all_to_all(homes.group, sent, lengths), strict=True):
        home.col_indices[x] = received.view(torch.int32)
    return home


def _entries(survivors: Tensor, graph: NeighborGraph, images: Tensor, tokens: Tensor) -> Tensor:
    """Return where the neighbours of some tokens stand in a graph of [B, heads, n], token by token, head by head."""
    begins = graph.row_offsets[:-1].view(survivors.shape)[images, :, tokens].flatten()
    counts = survivors[images, :, tokens].flatten().long()
    entries = torch.arange(int(counts.sum()), device=counts.device)
    return entries + (begins - (counts.cumsum(0) - counts)).repeat_interleave(counts)
