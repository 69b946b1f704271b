"""What rounding may do to a computation: the same on every machine, whichever BLAS it has.

:func:`evaluations` runs a computation in float64 several times and moves the result of every operation at random, as
far as rounding it to some precision may (Monte Carlo arithmetic: Parker, UCLA CSD-970002, 1997):

- a rounded number by up to u, half a unit in the last place of 1, times itself;
- a sum of K terms as K rounded partial sums do, if the terms come one after the other in random order. The mean square
  of a partial sum is then (2 S^2 + T) / 6, S the sum and T that of the terms' squares, so all of them together move the
  result like one number rounded that is sqrt(K (2 S^2 + T) / 6) in size. Matrix products are such sums.

Operations that move numbers or choose among them (views, where, max, ...) round nothing.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_MOVERS = """
    neg abs sign relu clamp clamp_min clamp_max maximum minimum max min amax amin topk sort where masked_fill nan_to_num
    gather index index_select scatter index_put select_scatter cat stack slice_backward select_backward constant_pad_nd
    clone copy_ _to_copy fill threshold_backward full_like zeros_like ones_like new_full new_zeros new_ones full flip
    roll repeat scalar_tensor upsample_nearest2d arange
"""
_EXACT = {getattr(aten, name) for name in _MOVERS.split()}


class Rounding(TorchDispatchMode):
    """Moves the results of float64 operations at random, as rounding with unit roundoff ``u`` may.

    ``exp_u``: the error of exponentials within a softmax, relative, if it is larger.
    """

    def __init__(self, u: float, exp_u: float, seed: int):
        super().__init__()
        self.u, self.exp_u, self.seed = u, max(u, exp_u), seed
        self.generators = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = function.overloadpacket
        if (rule := _RULES.get(packet)) and args[0].dtype == torch.float64:
            return rule(self, *args, **kwargs)
        out = function(*args, **kwargs)
        if packet in _EXACT or function.is_view or not isinstance(out, Tensor) or out.dtype != torch.float64:
            return out
        moved = self.move(out, out.abs() * self.u)
        return out.copy_(moved) if function._schema.is_mutable else moved

    def move(self, x: Tensor, by: Tensor) -> Tensor:
        """Return x, each number moved by up to ``by``; what is not finite stays."""
        if x.device not in self.generators:
            self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        noise = torch.empty_like(x).uniform_(-1, 1, generator=self.generators[x.device])
        return torch.where(x.isfinite(), x + noise * by.nan_to_num(0, 0, 0), x)

    def one(self, x: Tensor, u: float | None = None) -> Tensor:
        """Return x rounded."""
        return self.move(x, x.abs() * (self.u if u is None else u))

    def sum(self, x: Tensor, dims=None, keepdim: bool = False, *, dtype=None) -> Tensor:
        dims = dims or list(range(x.dim()))
        total = aten.sum.dim_IntList(x, dims, keepdim)
        terms = x.numel() // max(total.numel(), 1)
        return self.move(total, self._of_sum(total, aten.sum.dim_IntList(x * x, dims, keepdim), terms))

    def _of_sum(self, total: Tensor, squares: Tensor, terms: int) -> Tensor:
        of_one, of_all = total.abs(), (terms * (2 * total**2 + squares) / 6).sqrt()
        return self.u * torch.maximum(of_one, of_all)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return self.move(a @ b, self._of_sum(a @ b, (a * a) @ (b * b), a.shape[-1]))

    def mean(self, x: Tensor, dims=None, keepdim: bool = False, *, dtype=None) -> Tensor:
        total = self.sum(x, dims, keepdim)
        return self.one(total / (x.numel() // max(total.numel(), 1)))

    def _exponentials(self, x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        largest = x.amax(dims, keepdim=True)
        base = torch.where(largest.isfinite(), largest, 0)
        e = self.one(self.one(x - base).exp(), self.exp_u)
        return e, self.sum(e, dims, True), base

    def softmax(self, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        if not x.numel():
            return x.clone()
        e, total, _ = self._exponentials(x, [dim])
        return self.one(e / total)

    def logsumexp(self, x: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
        if not x.numel():
            return aten.logsumexp.default(x, dims, keepdim)
        _, total, base = self._exponentials(x, dims)
        out = self.one(base + self.one(total.log()))
        return out if keepdim else out.squeeze(dims)

    def softmax_gradient(self, grad: Tensor, out: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        mean = self.sum(self.one(grad * out), [dim], True)
        return self.one(out * self.one(grad - mean))

    def norm(self, x: Tensor, ord=2, dims=None, keepdim: bool = False, *, dtype=None) -> Tensor:
        return self.one(self.sum(self.one(x * x), dims, keepdim).sqrt())


_RULES = {
    aten.mm: Rounding.product,
    aten.bmm: Rounding.product,
    aten.addmm: lambda self, c, a, b: self.one(c + self.product(a, b)),
    aten.baddbmm: lambda self, c, a, b: self.one(c + self.product(a, b)),
    aten.sum: Rounding.sum,
    aten.mean: Rounding.mean,
    aten._softmax: Rounding.softmax,
    aten.logsumexp: Rounding.logsumexp,
    aten._softmax_backward_data: Rounding.softmax_gradient,
    aten.linalg_vector_norm: Rounding.norm,
}


def evaluations(
    compute: Callable[[], list[Tensor]], dtype: torch.dtype, exp_ulps: int = 0, ulps: int = 0, count: int = 4
) -> Iterator[list[Tensor]]:
    """Yield what ``compute``, which computes in float64, may return if all of it were rounded to ``dtype``.

    Args:
        count: how many times.
        exp_ulps: units in the last place by which exponentials may be off within a softmax, if more than rounding.
        ulps: so many units in the last place every operation may be off beside rounding.
    """
    eps = torch.finfo(dtype).eps
    for seed in range(count):
        with Rounding(eps / 2 + ulps * eps, exp_ulps * eps, seed):
            result = compute()
        yield result
