"""What the processes of a call agree on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..asa import api, ops
from ..asa.types import Grid, Inputs, ThresholdGrad, Window
from ..core import checks
from ..core.contracts import allows_tf32, cast_under_autocast
from ..core.dispatch import Impl
from . import collectives

Group = dist.ProcessGroup | DeviceMesh | None


@dataclass(frozen=True)
class Call:
    """What all processes know of a call."""

    group: dist.ProcessGroup
    n_q: list[int]  # tokens of every process
    n_k: list[int]
    options: ops.OpOptions
    threshold_grad: ThresholdGrad
    threshold_band: float
    impl: str
    keep: bool  # whether a backward may follow
    learns: bool  # and thresholds will get a gradient

    @property
    def band(self) -> float:
        """Half width of the window in which thresholds learn, 0 if they do not."""
        return self.threshold_band if self.learns else 0.0

    def gather(self, inputs: Inputs) -> Inputs:
        """Return the inputs of the whole map."""
        mask = inputs.key_padding_mask
        of_rows = {"query": inputs.query, "alpha": inputs.alpha, "beta": inputs.beta}
        of_keys = {"key": inputs.key, "value": inputs.value, "mask": mask if mask is None else mask[:, None]}
        both = [(of_rows, self.n_q), (of_keys, self.n_k)]
        if self.n_q == self.n_k:  # one message
            both = [({**of_rows, **of_keys}, self.n_q)]
        whole: dict[str, Tensor] = {}
        for tensors, sizes in both:
            given = {name: x for name, x in tensors.items() if x is not None}
            whole |= zip(given, collectives.all_gather_rows(self.group, list(given.values()), sizes), strict=True)
        mask = None if mask is None else whole["mask"][:, 0]
        return Inputs(whole["query"], whole["key"], whole["value"], whole.get("alpha"), whole.get("beta"), mask)

    def own(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return this process's rows of a tensor of the whole map [B, heads, N, ..]."""
        return x.split(list(sizes), 2)[dist.get_rank(self.group)].contiguous()


class _Seen(NamedTuple):
    """What a process found when it looked at its arguments."""

    inputs: Inputs
    options: ops.OpOptions
    grid: tuple[int, ...] | None
    topk: int | None
    band: float
    impl: str


def agree(
    group: Group,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    alpha: Tensor | float | None,
    beta: Tensor | float | None,
    grid: Grid | None,
    window: Window,
    extra_tokens: int,
    topk: int | None,
    reciprocal: bool,
    key_padding_mask: Tensor | None,
    scale: float | None,
    impl: Impl,
    learning: tuple[ThresholdGrad, float],
    has_values: bool = True,
) -> tuple[Call, Inputs]:
    """Check the arguments on every process; return the call and this process's tensors, thresholds of every row.

    Without ``has_values`` nobody's values are asked for.
    """
    group = collectives.as_group(group)
    threshold_grad, threshold_band = learning

    def look() -> collectives.Found[_Seen]:
        tokens: dict[str, Any] = {"query": query, "key": key} | ({"value": value} if has_values else {})
        q, k, *v = cast_under_autocast(**tokens)
        extra = checks.as_int("extra_tokens", extra_tokens, at_least=0)  # which another process may have
        of_map = topk if topk is None else checks.as_positive_int("topk", topk)  # this process may have fewer keys
        whole_grid = None if grid is None else checks.as_sides(grid, 1, 2, 3)
        n = q.shape[2] if isinstance(q, Tensor) and q.dim() == 4 else 0
        place = None if whole_grid is None else (*[1] * (len(whole_grid) - 1), n)
        inputs, options = api.check(
            q, k, v[0] if v else k[..., :0], alpha, beta, key_padding_mask, place, window, 0, None, reciprocal, scale
        )
        checks.check_choice("threshold_grad", threshold_grad, (None, "straight_through"))
        band = checks.as_positive_number("threshold_band", threshold_band)
        alphas, betas = (x if x is None else x.expand(-1, -1, q.shape[2]) for x in inputs[3:5])
        inputs = inputs._replace(alpha=alphas, beta=betas)
        chosen = api.chosen(inputs.query, inputs.value, impl)
        same = {
            "batch, heads and head dims": [x if x is None else x.shape[:2] + x.shape[3:] for x in inputs[:5]],
            "dtypes": [x if x is None else x.dtype for x in inputs],
            "requires_grad": torch.is_grad_enabled() and [x is not None and x.requires_grad for x in inputs],
            "grid": whole_grid,
            "window": options.window,
            "extra_tokens": extra,
            "topk": of_map,
            "reciprocal": reciprocal,
            "scale": options.scale,
            "threshold_grad": threshold_grad,
            "threshold_band": band,
            "impl": chosen,
        }
        if chosen == "cpu":  # their kernels differ in more than the last digits: in how many rows they take at a time
            same["instruction set"] = torch.ops.asa_ops.cpu_isa()
        elif chosen in ("triton", "cuda"):  # whoever asks for a pair decides it, so all must round alike
            device = inputs.query.device
            gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
            same["kind of GPU"] = gpu and (gpu.name, gpu.multi_processor_count)  # which say how sums are cut, too
            same["torch.backends.cuda.matmul.fp32_precision"] = q.dtype == torch.float32 and allows_tf32()
        if chosen == "cuda":
            same["ASA_OPS_HOPPER"] = os.environ.get("ASA_OPS_HOPPER")
        sizes = [inputs.query.shape[2], inputs.key.shape[2]]
        return _Seen(inputs, options._replace(extra_tokens=extra), whole_grid, of_map, band, chosen), sizes, same

    seen, sizes = collectives.agree(group, look)
    n_q, n_k = ([of[i] for of in sizes] for i in (0, 1))
    if seen.topk is not None and seen.topk > sum(n_k):
        raise ValueError(f"topk must be at most the number of keys, N_k = {sum(n_k)}, got topk={seen.topk}")
    extra, n = seen.options.extra_tokens, sum(n_q)
    if extra > n or (extra and n != sum(n_k)):
        raise ValueError(
            f"extra_tokens must be at most N = {n}, as many queries as keys, got {extra_tokens=}, N_k = {sum(n_k)}"
        )
    place = [0, 0] if seen.grid is None else list(checks.as_grid(seen.grid, n, 1, 2, 3, extra_tokens=extra))
    options = seen.options._replace(grid=place, topk=seen.topk or 0)
    inputs = api.with_extra_tokens(seen.inputs, options, sum(n_q[: dist.get_rank(group)]))
    asked = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    learns = threshold_grad is not None and any(asked[3:5])
    call = Call(group, n_q, n_k, options, threshold_grad, seen.band, seen.impl, any(asked), learns)
    return call, inputs
