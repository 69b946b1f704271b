"""Inputs of asa_attention for tests: one factory, one list of named cases."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from asa_ops.asa import ops
from asa_ops.asa.api import with_extra_tokens
from asa_ops.asa.ops import OpOptions
from asa_ops.asa.types import Inputs, Options, Saved


@dataclass(frozen=True)
class Case:
    """A call of asa_attention. Thresholds: "spread" around 1, "heads" (one per head), "low", "zero", "inf", "mixed",
    "halves", or None.
    """

    name: str
    grid: tuple[int, ...] = (9, 7)
    batch: int = 2
    heads: int = 2
    dim: int = 8
    dim_v: int = 5
    n_keys: int | None = None  # None: as many as queries
    alpha: str | None = "spread"
    beta: str | None = "spread"
    padding: bool = False
    sharpness: float = 1.5  # standard deviation of the scores, roughly
    options: dict = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many tokens there are."""
        return math.prod(self.grid) + self.options.get("extra_tokens", 0)


CASES = [
    Case("plain"),
    Case("alpha_only", beta=None),
    Case("beta_only", alpha=None),
    Case("dense", alpha=None, beta=None),
    Case("head_thresholds", heads=3, alpha="heads", beta="heads"),
    Case("one_way", options={"reciprocal": False}),
    Case("more_keys", beta=None, n_keys=41, options={"reciprocal": False}),
    Case("fewer_queries_padded", beta=None, n_keys=97, padding=True, options={"reciprocal": False}),
    Case("topk", options={"topk": 6}),
    Case("topk_alone", alpha=None, beta=None, options={"topk": 4}),
    Case("topk_one_way", alpha=None, options={"topk": 3, "reciprocal": False}),
    Case("topk_all", beta=None, options={"topk": 63}),
    Case("padding", padding=True),
    Case("padding_topk", padding=True, alpha="heads", options={"topk": 40}),
    Case("padding_dense", padding=True, alpha=None, beta=None),
    Case("window_1", options={"window": 1}),
    Case("window_5", options={"window": 5}),
    Case("window_wider_than_map", grid=(3, 4), options={"window": 9}),
    Case("all_dense", alpha="zero", beta="zero"),
    Case("all_empty", alpha="inf", beta="inf"),
    Case("window_only_by_inf", alpha="inf"),
    Case("mixed", alpha="mixed", beta="mixed"),
    Case("scale", options={"scale": 0.11}),
    Case("sharp", sharpness=12.0),
    Case("one_token", grid=(1, 1)),
    Case("one_row", grid=(1, 65)),
    Case("one_column", grid=(63, 1)),
    Case("wide_values", dim=3, dim_v=33),
    Case("empty_batch", batch=0),
    Case("sequence", grid=(65,), options={"window": 5}),
    Case("sequence_topk", grid=(23,), padding=True, options={"window": (7,), "topk": 6}),
    Case("volume", grid=(3, 4, 6)),
    Case("volume_padding", grid=(2, 3, 7), padding=True, options={"window": (3, 1, 5)}),
    Case("volume_window", grid=(4, 3, 4), alpha=None, options={"window": (7, 3, 5)}),
    Case("volume_one_way", grid=(5, 2, 3), heads=3, alpha="heads", beta="heads", options={"reciprocal": False}),
    Case("map_window", grid=(6, 5), options={"window": (1, 5)}),
    Case("extra", options={"extra_tokens": 1}),
    Case("extra_padding", padding=True, options={"extra_tokens": 3}),
    Case("extra_window_only", alpha=None, options={"extra_tokens": 2, "window": 5}),
    Case("extra_topk_alone", alpha=None, beta=None, padding=True, options={"extra_tokens": 4, "topk": 3}),
    Case("extra_one_way", alpha="heads", options={"extra_tokens": 3, "reciprocal": False}),
    Case("extra_blocks", grid=(5, 13), options={"extra_tokens": 67}),
    Case("extra_volume", grid=(3, 4, 6), padding=True, options={"extra_tokens": 2, "window": (3, 1, 5)}),
    Case("window_of_511", grid=(4, 37), batch=1, heads=1, options={"window": (7, 73)}),
]
IDS = [case.name for case in CASES]
each_case = pytest.mark.parametrize("case", CASES, ids=IDS)


def threshold(kind: str | None, case: Case, dtype: torch.dtype, generator) -> Tensor | None:
    if kind is None:
        return None
    shape = case.batch, case.heads if kind == "heads" else 1, case.n
    x = torch.empty(shape, dtype=torch.float64).uniform_(0.2, 2.5, generator=generator)
    if kind == "zero":
        x.zero_()
    elif kind == "low":  # half of all pairs are neighbours
        x.mul_(0.1)
    elif kind == "inf":
        x.fill_(torch.inf)
    elif kind == "mixed":  # rows that keep everybody, rows that keep nobody
        choice = torch.rand(shape, generator=generator)
        x[choice < 0.2] = 0
        x[choice > 0.8] = torch.inf
    elif kind == "halves":  # the first rows keep nobody, the others everybody
        x.zero_()[..., : case.n // 2] = torch.inf
    return x.to(dtype)


def make(
    case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu"
) -> tuple[list[Tensor | None], dict]:
    """Return ([query, key, value, alpha, beta], options) of a case, the same numbers in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    n = case.n
    n_keys = case.n_keys or n

    def normal(*shape):
        return torch.randn(case.batch, case.heads, *shape, generator=generator, dtype=torch.float64)

    width = case.sharpness**0.5
    query, key, value = normal(n, case.dim) * width, normal(n_keys, case.dim) * width, normal(n_keys, case.dim_v)
    alpha = threshold(case.alpha, case, dtype, generator)
    beta = threshold(case.beta, case, dtype, generator)
    options = dict(case.options)
    if n_keys == n:
        options["grid"] = case.grid
    if case.padding:
        mask = torch.rand(case.batch, n_keys, generator=generator) < 0.7
        mask[-1] = False  # one image is all padding
        options["key_padding_mask"] = mask.to(device)
    inputs = query.to(dtype), key.to(dtype), value.to(dtype), alpha, beta
    return [x if x is None else x.to(device) for x in inputs], options


def with_grad(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [x if x is None else x.detach().clone().requires_grad_() for x in inputs]


def named(name: str, **changes) -> Case:
    return replace(CASES[IDS.index(name)], **changes)


def op_arguments(inputs: list[Tensor | None], options: dict, keep: bool = True, band: float = 2.0) -> tuple:
    """Return the arguments of the ops of a forward pass."""
    grid, window = list(options.get("grid", ())), options.get("window", 3)
    window = list(window) if isinstance(window, tuple) else [window] * (len(grid) or 2)
    rest = options.get("reciprocal", True), options.get("scale", inputs[0].shape[-1] ** -0.5)
    given = OpOptions(grid, window, options.get("extra_tokens", 0), options.get("topk", 0), *rest)
    return *with_extra_tokens(Inputs(*inputs, options.get("key_padding_mask")), given), *given, band, keep


def saved_of(inputs: list[Tensor | None], options: dict, impl: str, **more) -> Saved:
    """Return what a forward pass of ``impl`` returns and keeps."""
    *args, band, keep = op_arguments(inputs, options, **more)
    outputs = ops.of(impl, inputs[0].device).fwd(*args, band, keep)
    return Saved.of(Inputs(*args[:6]), Options.of(*args[6:]), impl, keep, *outputs, band=band)
