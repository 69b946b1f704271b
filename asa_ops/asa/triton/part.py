"""Some rows of a call, for one map over processes: the steps of ``call`` between which processes exchange.

``asa_ops.asa.parts`` says what is asked for. A process's rows and all keys are one problem, of which it forms the
output, dq, dalpha and dbeta; all rows and its keys are another, of which it forms dk and dv. Tokens of either side are
all of them or a slice; bits, peaks, flags and lists are of these pairs only.

Numbers are those of one process. Sums have as many parts, and the same terms in the same order. Mutual pairs are
decided in the tiles (I, J), I <= J, of all rows, as one process visits them, and what belongs to others is left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import parts
from ..parts import Outputs, Range, Scan
from ..types import Inputs, Options, Saved, new_gradients
from .arrange import RowGradients, arrange_backward, arrange_tokens, find_orders
from .configs import PAD
from .finish import Gradients, GradientSums, correct_delta, finish_gradients, finish_out
from .lists import Listing
from .problem import Bits, Order, Peaks, Problem, Tokens
from .scores import NO_STATISTICS, find_statistics
from .select import NO_NEIGHBOURS, NO_ROW_STATS, Neighbours, OwnRows, find_neighbours, keep_everybody
from .sums import NO_SUMS, Across, sum_columns, sum_out, sum_rows, sum_thresholds
from .thresholds import NO_THRESHOLDS, Thresholds, find_thresholds, new_thresholds
from .window import find_local_survivors, write_columns

NO_ROW_GRADIENTS = RowGradients(None, None, None, None, None)


class Part:
    """See :class:`asa_ops.asa.parts.Part`."""

    block = PAD

    @staticmethod
    def can_run(inputs: Inputs, n_q: int, n_k: int, scale: float) -> bool:
        return True

    def __init__(self, inputs: Inputs, options: Options, band: float, keep: bool) -> None:
        self.inputs, self.options, self.band, self.keep = inputs, options, band, keep
        self.problem = Problem(inputs, options, band > 0)
        self.orders = find_orders(self.problem)
        self.row_order, self.key_order = self.orders.rows.order, self.orders.keys.order

    def scan(self, rows: Range) -> Scan | None:
        problem, part = self.problem, self._own_rows(rows)
        self.tokens = arrange_tokens(problem, self.orders)
        self.saved = Saved.new(self.inputs, self.options, "triton", self.keep, self.band, pairs=False)
        self.statistics, thresholds, peaks = NO_STATISTICS, new_thresholds(part), None
        if problem.has_bits:
            blocks = problem.key_padded // 64
            peaks = problem.new(problem.n_heads, blocks, part.padded, dtype=torch.float16)
        if rows[0] < rows[1]:
            tokens = self._with_rows(rows)
            self.statistics = find_statistics(part, tokens, _peaks(peaks))
            # Threshold gradients ask for A_ji of pairs (i, j) in the band below the threshold of i: those tiles too.
            reach = self.band if problem.one_way_bits else 0.0
            thresholds = find_thresholds(part, tokens, self.saved, _peaks(peaks), self.statistics, reach)
        if not problem.has_bits:
            return None
        known = [parts.take(x, self._tokens_at(rows), part.padded) for x in self._known()]
        numbers = torch.stack([*(x for x in thresholds[:3] if x is not None), *known], -1)
        return Scan(numbers, thresholds.flags.view(torch.uint8), peaks if self._alpha_learns() else None)

    def attend(self, rows: Range, keys: Range, scan: Scan | None) -> tuple[Outputs, list[Tensor | None]]:
        problem, part, saved = self.problem, self._own_rows(rows), self.saved
        tokens, neighbours, sums = self._with_rows(rows), NO_NEIGHBOURS, NO_SUMS
        back = None
        kept: list[Tensor | None] = [None] * 6
        if scan is not None:
            known = self._known()
            for x, raster in zip(scan.numbers[:, rows[0] : rows[1], -len(known) :].unbind(-1), known, strict=True):
                parts.put(x, self._tokens_at(rows), raster)
        if rows[0] < rows[1]:
            if scan is not None:
                neighbours = self._decide(rows, tokens, scan)
            elif problem.dense:
                neighbours = Neighbours.new(part, _bits(_new_bits(part)))
                keep_everybody(part, tokens, self.statistics, neighbours)
            else:
                find_local_survivors(part, tokens, saved)
            if neighbours.own is not None:
                back, neighbours = neighbours.own.occupied_back, neighbours._replace(own=None)
            if problem.has_tiles:
                listing = self._list(rows, tokens, neighbours.occupied, back, ["aggregate"])
                sums = sum_out(part, tokens, listing, neighbours)
            finish_out(part, tokens, saved, neighbours, sums)
        self.bits = neighbours.bits
        if scan is not None and self.keep:
            words_back = None if self.bits.back is None else self.bits.back.words
            kept = [self.bits.words, words_back, back, scan.peaks, None, None]
            if not problem.mutual:  # a backward decides the pairs of own keys again
                kept[4:] = scan.numbers, scan.flags[:, :, keys[0] // 64 : keys[1] // 64].contiguous()
        return Outputs(*saved[:4]), [saved.kept, *kept]

    def list_survivors(self, rows: Range, row_offsets: Tensor, col_indices: Tensor) -> None:
        tokens = self._with_rows(rows)
        write_columns(self.problem, tokens.rows, tokens.keys, self.bits, self.saved.local, row_offsets, col_indices,
                      rows[0])  # fmt: skip

    def begin_backward(
        self, rows: Range, keys: Range, d_out: Tensor, outputs: Outputs, kept: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], Tensor]:
        problem, part = self.problem, self._own_rows(rows)
        of_saved, words, words_back, back, peaks, *self.of_columns = kept
        assert of_saved is not None
        outputs_and_kept = *outputs, of_saved
        self.saved = Saved.of(self.inputs, self.options, "triton", True, *outputs_and_kept, band=self.band, pairs=False)
        self.tokens = arrange_tokens(problem, self.orders, backward=True)
        self.own, self.row, self.bits = self._with_rows(rows), NO_ROW_GRADIENTS, _bits(words, words_back)
        self.thresholds = new_thresholds(part) if self._alpha_learns() else NO_THRESHOLDS
        local = parts.take(self.saved.local.flatten(0, 1).view(torch.uint8), self._tokens_at(rows), part.padded)
        if rows[0] == rows[1]:
            do = problem.new(problem.n_heads, 0, problem.width_v, dtype=problem.dtype)
            return [do, problem.new(problem.n_heads, 0, 4), local], self.orders.notes
        occupied = part.new_flags() if problem.has_tiles else None
        if problem.dense:
            self.bits = _bits(_new_bits(part))
            keep_everybody(part, self.own, NO_STATISTICS, Neighbours(self.bits, NO_ROW_STATS, occupied))
        tokens, row = self.own, self.row = arrange_backward(
            part, self.orders, d_out, self.saved, self.bits, _peaks(peaks), None if problem.dense else occupied,
            self.thresholds, self.band, arranged=self.own,
        )  # fmt: skip
        delta_error = NO_SUMS
        if problem.has_tiles:
            kernels = ["dq", *(problem.column_sums if problem.mutual else ()), *["dt"] * self._alpha_learns()]
            self.listing = self._list(rows, tokens, occupied, back, kernels, self.thresholds.flags)
        if problem.dtype == torch.float32:
            if problem.has_tiles:
                delta_error = sum_rows(part, tokens, self.listing, self.bits, row, delta_error=True)
            correct_delta(part, tokens, self.saved, self.bits, row, delta_error)
        do, numbers = tokens.do.view(problem.n_heads, part.padded, -1), torch.stack(row[:4], -1)
        return [do, numbers, local], self.orders.notes

    def end_backward(self, rows: Range, keys: Range, of_rows: Sequence[Tensor], largest: Tensor) -> parts.Gradients:
        problem, part, (do, numbers, local) = self.problem, self._own_rows(rows), of_rows
        self.orders.notes.copy_(largest)
        self.tokens = self.tokens._replace(do=do.reshape(-1, problem.width_v))
        saved = self.saved._replace(local=self._local_of_all(local))
        delta, top, share, lse_kept2 = (x.contiguous() for x in numbers.unbind(-1))
        row_of_all = RowGradients(delta, top, share, lse_kept2, self.orders.notes)
        across = Across(self._with_keys(keys), row_of_all, self.bits)
        sums = GradientSums(NO_SUMS, NO_SUMS, NO_SUMS, NO_SUMS)
        if problem.has_tiles and keys[0] < keys[1]:
            own_keys = problem.part(problem.padded, keys[1] - keys[0])
            if problem.mutual:
                listing = self.listing
            else:
                neighbours = self._of_columns(own_keys, across.tokens)
                across = across._replace(bits=neighbours.bits)
                listing = Listing(own_keys, across.tokens, neighbours.occupied, problem.column_sums)
            sums_k, sums_v = sum_columns(own_keys, across.tokens, listing, across.bits, row_of_all)
            sums = sums._replace(k=sums_k, v=sums_v)
        row = self.row
        if problem.has_tiles and rows[0] < rows[1]:
            sums = sums._replace(q=sum_rows(part, self.own, self.listing, self.bits, row))
            if self.thresholds is not NO_THRESHOLDS:
                sums_t = sum_thresholds(
                    part, self.own, self.listing, self.bits, row, self.thresholds, self.band, across
                )
                sums = sums._replace(t=sums_t)
        tokens, learning, _ = new_gradients(self.inputs, saved, self.band or None)
        gradients = Gradients(*tokens, *learning)
        finish_gradients(part, self.own, saved, self.bits, row, self.thresholds, self.band or None, sums, gradients,
                         across)  # fmt: skip
        return parts.Gradients(*gradients)

    def _own_rows(self, rows: Range) -> Problem:
        """Return the problem of own rows and all keys."""
        return self.problem.part(rows[1] - rows[0], self.problem.key_padded)

    def _with_rows(self, rows: Range) -> Tokens:
        """Return the tokens of own rows and all keys."""
        x = self.tokens
        do = None if x.do is None else self._slice(x.do, rows)
        return x._replace(rows=_slice_order(x.rows, rows), q=self._slice(x.q, rows), do=do)

    def _with_keys(self, keys: Range) -> Tokens:
        """Return the tokens of all rows and own keys."""
        x = self.tokens
        not_finite = x.not_finite[:, keys[0] // 32 : keys[1] // 32].contiguous()
        k, v = self._slice(x.k, keys), self._slice(x.v, keys)
        return x._replace(keys=_slice_order(x.keys, keys), k=k, v=v, not_finite=not_finite)

    def _slice(self, x: Tensor, own: Range) -> Tensor:
        """Return some positions of all heads, [n_heads * padded, width]."""
        return x.view(self.problem.n_heads, -1, x.shape[1])[:, own[0] : own[1]].reshape(-1, x.shape[1])

    def _known(self) -> list[Tensor]:
        """Return what a scan knows of rows beside their thresholds, [n_heads, N_q] each."""
        saved = self.saved
        known = [saved.lse]
        if self.keep:
            known += [saved.base2[:, :, 0], *([saved.kappa] if self.problem.has_topk else [])]
        return [x.flatten(0, 1) for x in known]

    def _thresholds(self, numbers: Tensor, flags: Tensor) -> Thresholds:
        """Return thresholds from what a scan knows, [n_heads, rows, ..]."""
        lse2, cut2, *kappa2 = (x.contiguous() for x in numbers[..., : 2 + self.problem.has_topk].unbind(-1))
        return Thresholds(lse2, cut2, kappa2[0] if kappa2 else None, flags.view(torch.int8))

    def _decide(self, rows: Range, tokens: Tokens, scan: Scan) -> Neighbours:
        """Decide the pairs of own rows; find local survivors."""
        problem, part, saved = self.problem, self._own_rows(rows), self.saved
        numbers, flags = scan.numbers, scan.flags
        if not problem.mutual:
            numbers, flags = numbers[:, rows[0] : rows[1]], flags[:, rows[0] // 64 : rows[1] // 64].contiguous()
            neighbours = _nobody(part)
            find_neighbours(part, tokens, self.orders.notes, saved, self._thresholds(numbers, flags), neighbours)
            return neighbours
        back, occupied_back = None, None
        if problem.one_way_bits:  # of all rows and own keys
            columns = problem.part(problem.padded, part.padded)
            back, occupied_back = _new_bits(columns).zero_(), columns.new_flags().zero_()
        own = OwnRows(tokens, rows[0], part.padded, occupied_back)
        neighbours = _nobody(part, back)._replace(own=own)
        find_neighbours(problem, self.tokens, self.orders.notes, saved, self._thresholds(numbers, flags), neighbours)
        return neighbours

    def _of_columns(self, problem: Problem, tokens: Tokens) -> Neighbours:
        """Return the neighbours of all rows among own keys, one way."""
        if problem.dense:
            neighbours = Neighbours(_bits(_new_bits(problem)), NO_ROW_STATS, problem.new_flags())
            keep_everybody(problem, tokens, NO_STATISTICS, neighbours)
        else:
            neighbours = _nobody(problem)
            notes = torch.zeros_like(self.orders.notes)
            find_neighbours(problem, tokens, notes, None, self._thresholds(*self.of_columns), neighbours)
        return neighbours

    def _list(self, rows: Range, tokens: Tokens, occupied: Tensor, back: Tensor | None, kernels: Sequence[str],
              reached: Tensor | None = None) -> Listing:  # fmt: skip
        """List the tiles of own rows; ``back``: those of all rows and own keys that are occupied."""
        if self.problem.mutual and back is None:  # what is occupied one way round is so the other
            back = occupied.mT.contiguous()
        return Listing(self._own_rows(rows), tokens, occupied, tuple(kernels), reached, back)

    def _local_of_all(self, of_rows: Tensor) -> Tensor:
        """Return the local survivors of all rows, raster, from those in order; heads a multiple of 16 apart."""
        shape, n = self.saved.local.shape, of_rows.shape[2] * self.problem.n
        room = of_rows.new_empty(self.problem.n_heads, -(-n // 16) * 16)[:, :n]
        parts.put(of_rows, self._tokens_at((0, self.problem.padded)), room.view(self.problem.n_heads, *shape[2:]))
        return room.view(shape)

    def _alpha_learns(self) -> bool:
        return self.band > 0 and self.inputs.alpha is not None

    def _tokens_at(self, rows: Range) -> Tensor:
        return parts.tokens_at(self.row_order, rows, self.problem.n)


def _slice_order(order: Order, own: Range) -> Order:
    """Return some positions of an order; tokens keep their positions in all of it."""
    begin, end = own
    counts, extra = (x if x is None else (x - begin).clamp(0, end - begin) for x in (order.counts, order.extra))
    return Order(order.order[:, begin:end].contiguous(), order.place, counts, extra, end - begin)


def _new_bits(problem: Problem) -> Tensor:
    """Allocate the bits of a problem's pairs."""
    return problem.new(problem.n_heads, problem.key_padded // 32 * problem.padded, dtype=torch.int32)


def _bits(words: Tensor | None, back: Tensor | None = None) -> Bits:
    return Bits(None, 0) if words is None else Bits(words, words.stride(0), None if back is None else _bits(back))


def _peaks(peaks: Tensor | None) -> Peaks:
    """Return block maxima [n_heads, key blocks, rows] as kernels take them."""
    return Peaks(peaks, peaks.stride(0)) if peaks is not None and peaks.numel() else Peaks(None, 0)


def _nobody(problem: Problem, back: Tensor | None = None) -> Neighbours:
    """Return room for neighbours, of whom nobody has any yet."""
    neighbours = Neighbours.new(problem, _bits(_new_bits(problem).zero_(), back))
    neighbours.stats.largest.fill_(-torch.inf)
    for x in (neighbours.stats.counts, neighbours.stats.not_finite, neighbours.occupied):
        x.zero_()
    return neighbours
