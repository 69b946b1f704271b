"""Calls of the functional ops of the blocks for tests: one factory, one list of named cases; and their modules."""

import importlib
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import asa_ops


@dataclass(frozen=True)
class Case:
    """A call of an op: shapes of its tensors (of a gate: a list of shapes) and its options."""

    name: str
    stem: str
    tensors: dict
    options: dict = field(default_factory=dict)
    function: str = ""
    fused: bool = False  # by torch's fused attention: not differentiable twice

    @property
    def op(self):
        return getattr(asa_ops, self._function)

    @property
    def reference(self):
        return getattr(importlib.import_module(f"asa_ops.blocks.{self.stem}"), f"reference_{self._function}")

    @property
    def _function(self) -> str:
        return self.function or f"{self.stem}_attention".replace("attention_attention", "attention")


def tokens(n=35, dim=4, dim_v=4, n_k=None, batch=2, heads=2) -> dict:
    n_k = n if n_k is None else n_k
    shapes = [(batch, heads, n, dim), (batch, heads, n_k, dim), (batch, heads, n_k, dim_v)]
    return dict(zip(("query", "key", "value"), shapes, strict=True))


def axial(size=(5, 7), batch=2, gates=True) -> dict:
    maps = {name: (batch, dim, *size) for name, dim in (("column", 3), ("row", 2), ("value", 6))}
    maps |= {"time": (batch, 4, *size)} if len(size) == 3 else {}
    layers = {"column_gate": [(4, 6), (4, 4), (6, 4)], "row_gate": [(6, 6)]} if gates else {}
    return maps | layers | ({"time_gate": [(2, 6), (6, 2)]} if gates and len(size) == 3 else {})


def squeezed(size, pool, batch=2) -> dict:
    pools = pool if isinstance(pool, tuple) else (pool,) * len(size)
    return {
        "residual": (batch, 3, *size),
        "attention": (batch, 3, *(-(-side // p) for side, p in zip(size, pools, strict=True))),
    }


def interlaced(grid, factors, span, dim=3, dim_v=5, **options) -> tuple[dict, dict]:
    return tokens(math.prod(grid), dim, dim_v), {"grid": grid, "factors": factors, "span": span, **options}


def salient(n=35, n_v=35, dim=5, batch=2) -> dict:
    return {"query": (batch, 2, n, dim), "value": (batch, 2, n_v, dim)}


CONCATENATION = {"mode": "concatenation"}
CASES = [
    Case("gaussian_short", "non_local", tokens(9, dim=6, dim_v=5)),
    Case("gaussian_fused", "non_local", tokens(289, batch=1), fused=True),
    Case("gaussian_padded", "non_local", tokens(289, dim=6, dim_v=3, batch=1), fused=True),
    Case("gaussian_padded_query", "non_local", tokens(dim=2, dim_v=5, n_k=260), {"scale": 1.0}, fused=True),
    Case("gaussian_one", "non_local", tokens(1)),
    Case("gaussian_empty", "non_local", tokens(batch=0)),
    Case("dot_product", "non_local", tokens(dim_v=3, n_k=17), {"mode": "dot_product"}),
    Case("dot_product_scale", "non_local", tokens(), {"mode": "dot_product", "scale": -0.3}),
    Case("dot_product_empty", "non_local", tokens(batch=0), {"mode": "dot_product"}),
    Case("concatenation", "non_local", tokens(dim_v=3, n_k=17) | {"weight": (2, 4)}, CONCATENATION),
    Case("concatenation_scale", "non_local", tokens() | {"weight": (2, 4)}, CONCATENATION | {"scale": -0.3}),
    Case("concatenation_one", "non_local", tokens(1) | {"weight": (2, 4)}, CONCATENATION),
    Case("concatenation_empty", "non_local", tokens(batch=0) | {"weight": (2, 4)}, CONCATENATION),
    Case("linear", "linear_attention", tokens(dim_v=7)),
    Case("linear_lengths", "linear_attention", tokens(n_k=11), {"eps": 0.1}),
    Case("linear_one", "linear_attention", tokens(1, dim=32)),
    Case("linear_empty", "linear_attention", tokens(batch=0)),
    *(
        Case(f"channel_{name}", "linear_attention", {"x": shape}, function="channel_linear_attention")
        for name, shape in {"plain": (2, 2, 35, 5), "one": (2, 1, 1, 5), "empty": (0, 1, 35, 5)}.items()
    ),
    Case("efficient", "efficient_attention", tokens(dim_v=7)),
    Case("efficient_lengths", "efficient_attention", tokens(n_k=11, dim=1)),
    Case("efficient_one", "efficient_attention", tokens(1)),
    Case("efficient_empty", "efficient_attention", tokens(batch=0)),
    Case("axial", "channelized_axial", axial()),
    Case("axial_slope", "channelized_axial", axial((4, 3)), {"negative_slope": 0.0}),
    Case("axial_plain", "channelized_axial", axial(gates=False)),
    Case("axial_row", "channelized_axial", axial((1, 7))),
    Case("axial_column", "channelized_axial", axial((5, 1))),
    Case("axial_empty", "channelized_axial", axial(batch=0)),
    Case("axial_video", "channelized_axial", axial((2, 3, 4))),
    Case("axial_video_plain", "channelized_axial", axial((3, 1, 2), gates=False)),
    Case("squeeze", "squeeze_and_attention", squeezed((6, 8), 2)),
    Case("squeeze_odd", "squeeze_and_attention", squeezed((5, 7), 3), {"pool": 3, "activation": None}),
    Case("squeeze_bilinear", "squeeze_and_attention", squeezed((6, 8), 2), {"upsample": "bilinear"}),
    Case("squeeze_bilinear_odd", "squeeze_and_attention", squeezed((5, 7), 3), {"pool": 3, "upsample": "bilinear"}),
    Case("squeeze_row", "squeeze_and_attention", squeezed((1, 7), 2), {"upsample": "bilinear"}),
    Case("squeeze_sequence", "squeeze_and_attention", squeezed((7,), 3), {"pool": 3, "upsample": "linear"}),
    Case("squeeze_video", "squeeze_and_attention", squeezed((3, 4, 3), (1, 2, 2)), {"pool": (1, 2, 2)}),
    Case("squeeze_trilinear", "squeeze_and_attention", squeezed((3, 4, 5), 2), {"upsample": "trilinear"}),
    Case("squeeze_empty", "squeeze_and_attention", squeezed((5, 7), 2, batch=0)),
    Case("interlaced_long", "interlaced_sparse", *interlaced((6, 8), (3, 2), "long")),
    Case("interlaced_short", "interlaced_sparse", *interlaced((6, 8), (3, 2), "short")),
    Case("interlaced_long_padded", "interlaced_sparse", *interlaced((5, 7), (3, 4), "long", scale=1.3)),
    Case("interlaced_short_padded", "interlaced_sparse", *interlaced((5, 7), (3, 4), "short")),
    Case("interlaced_whole", "interlaced_sparse", *interlaced((3, 4), (3, 4), "short")),
    Case("interlaced_ones", "interlaced_sparse", *interlaced((3, 4), (1, 1), "short")),
    Case("interlaced_row", "interlaced_sparse", *interlaced((1, 7), (1, 3), "long")),
    Case("interlaced_fused", "interlaced_sparse", *interlaced((15, 35), (2, 1), "long", dim_v=3), fused=True),
    Case("interlaced_sequence", "interlaced_sparse", *interlaced((11,), (4,), "long")),
    Case("interlaced_sequence_short", "interlaced_sparse", *interlaced((12,), (3,), "short")),
    Case("interlaced_video", "interlaced_sparse", *interlaced((2, 3, 5), (2, 2, 2), "long")),
    Case("interlaced_video_short", "interlaced_sparse", *interlaced((3, 2, 4), (2, 2, 3), "short")),
    Case("interlaced_empty", "interlaced_sparse", tokens(35, batch=0), {"grid": (5, 7), "factors": (2, 3)}),
    Case("salient", "salient_positions", salient()),
    Case("salient_adaptive", "salient_positions", salient(), {"topk": None}),
    Case("salient_all", "salient_positions", salient(n_v=11), {"topk": 35}),
    Case("salient_one", "salient_positions", salient(1, 1), {"topk": None}),
    Case("salient_empty", "salient_positions", salient(batch=0)),
]
CONTRACT_CASES = [  # one of each way to compute
    *("gaussian_short", "gaussian_padded", "dot_product", "concatenation", "linear", "channel_plain", "efficient"),
    *("axial", "squeeze_bilinear_odd", "interlaced_long", "interlaced_short_padded", "salient"),
]
MODULES = [  # name in asa_ops.nn, options, whether a fresh block is the identity
    *(
        ("asa", options, True)
        for options in (
            *({}, {"mode": "gaussian"}, {"mode": "gaussian", "heads": 4}, {"reduction": 100}, {"window": 5, "topk": 9}),
            *({"reduction": 1, "heads": 4, "use_scale": False}, {"norm": "batch", "threshold_activation": "softplus"}),
            *({"threshold_grad": None, "impl": "blocked"}, {"local": False, "threshold_band": 0.5}),
            {"published": True},
        )
    ),
    ("criss_cross", {}, True),
    ("criss_cross", {"reduction": 100}, True),
    ("criss_cross", {"recurrence": 3, "impl": "reference"}, True),
    ("non_local", {}, True),
    ("non_local", {"mode": "gaussian", "heads": 2, "sub_sample": True}, True),
    ("non_local", {"mode": "dot_product", "norm": "batch", "heads": 4}, True),
    ("non_local", {"mode": "concatenation", "reduction": 1, "heads": 2, "sub_sample": True}, True),
    ("linear_attention", {}, True),
    ("linear_attention", {"kind": "channel"}, True),
    ("efficient_attention", {}, False),
    ("efficient_attention", {"heads": 4, "key_channels": 8, "value_channels": 12}, False),
    ("efficient_attention", {"heads": 4, "key_channels": 10, "published": True}, False),
    ("channelized_axial", {"key_channels": 4}, False),
    ("channelized_axial", {"out_channels": 6, "channel_attention": False}, False),
    ("channelized_axial", {"hidden_layers": 0}, False),
    ("squeeze_and_attention", {}, False),
    ("squeeze_and_attention", {"pool": 3, "upsample": "bilinear", "activation": None, "out_channels": 6}, False),
    ("interlaced_sparse", {"factors": (1, 3)}, False),
    ("interlaced_sparse", {"factors": [(1, 2), (1, 3)], "out_channels": 6, "heads": 2, "dropout": 0.1}, False),
    ("interlaced_sparse", {"factors": (1, 4), "published": True}, False),
    ("salient_positions", {}, False),
    ("salient_positions", {"topk": None, "sub_sample": True, "heads": 2}, False),
]
OTHER_DIMS = [  # the same, of maps of one and of three dimensions
    ("asa", {"dims": 1, "window": 5}, True),
    ("asa", {"dims": 3}, True),
    ("asa", {"dims": 3, "window": (1, 3, 5), "topk": 9, "norm": "batch", "impl": "blocked"}, True),
    ("criss_cross", {"dims": 1}, True),
    ("criss_cross", {"dims": 3}, True),
    ("non_local", {"dims": 1, "sub_sample": True}, True),
    ("non_local", {"dims": 3, "sub_sample": "input", "norm": "batch"}, True),
    ("non_local", {"dims": 3, "sub_sample": True, "mode": "concatenation", "reduction": 1, "heads": 2}, True),
    ("linear_attention", {"dims": 1}, True),
    ("linear_attention", {"dims": 3}, True),
    ("linear_attention", {"dims": 3, "kind": "channel"}, True),
    ("efficient_attention", {"dims": 1, "heads": 4}, False),
    ("efficient_attention", {"dims": 3}, False),
    ("channelized_axial", {"dims": 1, "key_channels": 4}, False),
    ("channelized_axial", {"dims": 3, "key_channels": 4}, False),
    ("channelized_axial", {"dims": 3, "out_channels": 6, "channel_attention": False}, False),
    ("squeeze_and_attention", {"dims": 1, "upsample": "linear"}, False),
    ("squeeze_and_attention", {"dims": 3, "pool": (1, 2, 2), "out_channels": 6}, False),
    ("squeeze_and_attention", {"dims": 3, "upsample": "trilinear"}, False),
    ("interlaced_sparse", {"dims": 1, "factors": (3,)}, False),
    ("interlaced_sparse", {"dims": 3, "factors": [(1, 2, 2), (2, 1, 3)], "out_channels": 6, "dropout": 0.1}, False),
    ("interlaced_sparse", {"dims": 3, "factors": (4, 2, 3), "published": True}, False),
    ("salient_positions", {"dims": 1}, False),
    ("salient_positions", {"dims": 3, "topk": None, "sub_sample": True, "heads": 2}, False),
]
SIDES = {1: (11,), 2: (5, 7), 3: (2, 3, 5)}  # of small maps, by their dimensions
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def make(case: Case, dtype: torch.dtype = torch.float64, layout: str = "tokens", seed: int = 0) -> dict:
    """Return the tensors of a case by name, the same numbers in every dtype up to rounding, with gradients.

    ``layout`` "map": tokens are columns in memory, as those of a feature map, and maps are channels last.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if layout == "map":
            first, last = (1, -1) if case.stem in ("channelized_axial", "squeeze_and_attention") else (-2, -1)
            if x.dim() > 2:
                x = x.transpose(first, last).contiguous().transpose(first, last)
        return x.requires_grad_()

    return {
        name: [normal(each) for each in shape] if isinstance(shape, list) else normal(shape)
        for name, shape in case.tensors.items()
    }


def flat(tensors: dict) -> list[Tensor]:
    return [x for value in tensors.values() for x in (value if isinstance(value, list) else [value])]


def unflat(case: Case, tensors) -> dict:
    tensors = iter(tensors)
    return {
        name: [next(tensors) for _ in shape] if isinstance(shape, list) else next(tensors)
        for name, shape in case.tensors.items()
    }


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def alive(block: torch.nn.Module) -> torch.nn.Module:
    """Return ``block`` with what starts at 0 at something else, but for thresholds and scores, which decide."""
    for name, parameter in block.named_parameters():
        if not parameter.any() and not (isinstance(block, asa_ops.nn.AdaptiveSparseAttention) and "bias" in name):
            torch.nn.init.normal_(parameter)
    return block
