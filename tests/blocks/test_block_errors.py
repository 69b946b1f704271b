"""Bad input of the blocks: an error that quotes what came and what was expected, before any work."""

import pytest
import torch
from block_cases import make, named

from asa_ops import nn

ATTENTION = ["gaussian_short", "linear", "efficient", "interlaced_long"]  # query, key, value
WRONG_TRIPLE = {
    "no tensor": ({"query": [1.0]}, TypeError, r"query must be a tensor, got \[1.0\] of type list"),
    "rank": (lambda a: {"key": a["key"][0]}, ValueError, r"key must have the 4 dimensions"),
    "batch": (lambda a: {"key": a["key"][:1]}, ValueError, r"key must have the batch and heads of query, \[2, 2\]"),
    "head dim": (lambda a: {"key": a["key"][..., :1]}, ValueError, r"got D = 1 in"),
    "value rows": (lambda a: {"value": a["value"][:, :, :3]}, ValueError, r"one row per key, .*got N_k = 3"),
    "integer": (lambda a: {"query": a["query"].int()}, TypeError, r"query must be one of .*got a torch.int32"),
    "dtype mix": (lambda a: {"value": a["value"].half()}, TypeError, r"value must have the dtype of query"),
    "device mix": (lambda a: {"value": a["value"].to("meta")}, ValueError, r"value must lie on the device of query"),
}
WRONG = [
    ("gaussian_short", {"mode": "softmax"}, ValueError, r"mode must be one of .*got 'softmax'"),
    ("gaussian_short", {"scale": "1"}, TypeError, "scale must be a number, got '1'"),
    ("gaussian_short", {"weight": torch.zeros(2, 6)}, ValueError, r"weight \[2, D\] belongs to mode=\"concatenation\""),
    ("concatenation", {"weight": None}, ValueError, r"got mode='concatenation' and no weight"),
    ("concatenation", {"weight": torch.zeros(2, 3)}, ValueError, r"weight must be \[2, D\] = \[2, 4\], got .*\[2, 3\]"),
    ("concatenation", {"weight": torch.zeros(8)}, ValueError, r"weight must have the 2 dimensions \[2, D\]"),
    ("concatenation", {"weight": torch.zeros(2, 4).half()}, TypeError, "weight must have the dtype of query"),
    ("linear", {"eps": None}, TypeError, "eps must be a number, got None"),
    ("channel_plain", {"x": torch.zeros(3, 4, 5)}, ValueError, r"x must have the 4 dimensions \[B, heads, N, C\]"),
    ("channel_plain", {"x": torch.zeros(1, 2, 3, 4).int()}, TypeError, "x must be one of .*got a torch.int32"),
    ("axial", {"value": torch.zeros(2, 6, 5)}, ValueError, r"value must have the 4 dimensions \[B, C, H, W\]"),
    ("axial", {"value": torch.zeros(2, 6, 5, 7).int()}, TypeError, "value must be one of"),
    ("axial", {"row": torch.zeros(2, 3, 5, 6)}, ValueError, r"row must have the B, H, W of value, \[2, 5, 7\], got"),
    ("axial", {"column": torch.zeros(2, 3, 5, 7).half()}, TypeError, "column must have the dtype of value"),
    ("axial", {"row_gate": []}, TypeError, r"row_gate must be a sequence of weights \[out, in\], got \[\]"),
    ("axial", {"row_gate": torch.zeros(6, 6)}, TypeError, "row_gate must be a sequence"),
    ("axial", {"row_gate": [torch.zeros(6, 5)]}, ValueError, r"row_gate\[0\] must be \[out, in\] with in = 6"),
    ("axial", {"row_gate": [torch.zeros(5, 6)]}, ValueError, r"row_gate\[-1\] must be \[out, in\] with out = C = 6"),
    ("axial", {"negative_slope": "0.2"}, TypeError, "negative_slope must be a number"),
    ("squeeze", {"attention": torch.zeros(2, 3, 3, 3)}, ValueError, r"= \[2, 3, 3, 4\] for pool=2 and .*got .*3, 3, 3"),
    ("squeeze", {"attention": torch.zeros(2, 3, 3, 4).half()}, TypeError, "attention must have the dtype of residual"),
    ("squeeze", {"pool": 0}, ValueError, "pool must be >= 1, got pool=0"),
    ("squeeze", {"pool": 1}, ValueError, r"= \[2, 3, 6, 8\] for pool=1"),
    ("squeeze", {"activation": "relu"}, ValueError, "activation must be one of .*got 'relu'"),
    ("squeeze", {"upsample": "bicubic"}, ValueError, "upsample must be one of .*got 'bicubic'"),
    ("interlaced_long", {"grid": (5, 5)}, ValueError, r"H \* W = N = 48, got 5 \* 5 = 25"),
    ("interlaced_long", {"factors": 3}, TypeError, "factors must be two integers, got 3"),
    ("interlaced_long", {"factors": (3, 0)}, ValueError, "each of factors must be >= 1"),
    ("interlaced_long", {"factors": (7, 2)}, ValueError, r"at most \(H, W\) = \(6, 8\), got factors=\(7, 2\)"),
    ("interlaced_long", {"span": "wide"}, ValueError, "span must be one of .*got 'wide'"),
    ("interlaced_long", {"scale": "1"}, TypeError, "scale must be a number"),
    ("salient", {"query": 3}, TypeError, "query must be a tensor, got 3 of type int"),
    ("salient", {"query": torch.zeros(2, 2, 35)}, ValueError, r"query must have the 4 dimensions \[B, heads, N, D\]"),
    ("salient", {"value": torch.zeros(2, 2, 35, 6)}, ValueError, r"\[2, 2, N_v, 5\] like query, got .*\[2, 2, 35, 6\]"),
    ("salient", {"value": torch.zeros(2, 1, 35, 5)}, ValueError, r"\[2, 2, N_v, 5\] like query, got"),
    ("salient", {"value": torch.zeros(2, 2, 35, 5).half()}, TypeError, "value must have the dtype of query"),
    ("salient", {"topk": 36}, ValueError, "topk must be at most the number of positions N = 35, got topk=36"),
    ("salient", {"topk": 0}, ValueError, "topk must be >= 1, got topk=0"),
    ("salient", {"topk": 2.0}, TypeError, "topk must be an integer >= 1, got 2.0"),
]


def call(name, change, error, message):
    case = named(name)
    arguments = make(case, torch.float32) | case.options
    case.op(**arguments)
    with pytest.raises(error, match=message):
        case.op(**(arguments | (change(arguments) if callable(change) else change)))


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("wrong", WRONG_TRIPLE)
def test_wrong_queries_keys_and_values(name, wrong):
    call(name, *WRONG_TRIPLE[wrong])


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong[0]}, {next(iter(wrong[1]))}, {wrong[3][:20]}")
def test_wrong_arguments(wrong):
    call(*wrong)


def test_interlaced_attention_needs_as_many_keys_as_queries():
    call(
        "interlaced_long",
        lambda a: {"key": a["key"][:, :, :9], "value": a["value"][:, :, :9]},
        ValueError,
        "as many keys as queries, got N_q = 48 and N_k = 9",
    )


WRONG_MODULES = [
    ("non_local", {"mode": "softmax"}, ValueError, r"mode must be one of .*got 'softmax'"),
    ("non_local", {"heads": 3}, ValueError, "in_channels // reduction = 8 must be divisible by heads = 3"),
    ("non_local", {"mode": "gaussian", "in_channels": 17, "heads": 2}, ValueError, "in_channels = 17 .*heads = 2"),
    ("non_local", {"norm": "layer"}, ValueError, "norm must be one of"),
    ("linear_attention", {"kind": "both"}, ValueError, "kind must be one of .*got 'both'"),
    ("linear_attention", {"reduction": 0}, ValueError, "reduction must be >= 1"),
    ("efficient_attention", {"heads": 3}, ValueError, "value_channels = 16 must be divisible by heads = 3"),
    ("efficient_attention", {"heads": 4, "key_channels": 10}, ValueError, "key_channels = 10 must be divisible"),
    ("efficient_attention", {"heads": 4, "key_channels": 3, "published": True}, ValueError, "heads must be at most"),
    ("channelized_axial", {"hidden_layers": -1}, ValueError, "hidden_layers must be >= 0, got hidden_layers=-1"),
    ("channelized_axial", {"hidden_ratio": 0}, ValueError, "hidden_ratio must be > 0 and finite, got 0"),
    ("channelized_axial", {"key_channels": 0}, ValueError, "key_channels must be >= 1"),
    ("squeeze_and_attention", {"pool": 2.0}, TypeError, "pool must be an integer"),
    ("squeeze_and_attention", {"upsample": "cubic"}, ValueError, "upsample must be one of"),
    ("squeeze_and_attention", {"activation": "relu"}, ValueError, "activation must be one of"),
    ("interlaced_sparse", {"factors": (8, 8, 8)}, TypeError, r"factors must be two integers, got \(8, 8, 8\)"),
    ("interlaced_sparse", {"factors": [(8, 8), (8, -1)]}, ValueError, "each of factors must be >= 1"),
    ("interlaced_sparse", {"factors": []}, TypeError, r"factors must be two integers, got \[\]"),
    ("interlaced_sparse", {"heads": 3}, ValueError, "key_channels = 8 must be divisible by heads = 3"),
    ("salient_positions", {"topk": 0}, ValueError, "topk must be >= 1"),
    ("salient_positions", {"heads": 3}, ValueError, "inner_channels = 8 must be divisible by heads = 3"),
]


@pytest.mark.parametrize("wrong", WRONG_MODULES, ids=lambda wrong: f"{wrong[0]}, {next(iter(wrong[1]))}")
def test_wrong_module_options(wrong):
    name, options, error, message = wrong
    with pytest.raises(error, match=message):
        nn.build(name, **({"in_channels": 16} | options))


@pytest.mark.parametrize("name", nn.available())
def test_wrong_module_inputs(name):
    block = nn.build(name, 16)
    for x, message in (
        (torch.randn(1, 8, 9, 9), r"x must have C = in_channels = 16 channels, got .*\[1, 8, 9, 9\]"),
        (torch.randn(16, 9, 9), r"x must have the 4 dimensions \[B, C, H, W\]"),
        (torch.randn(1, 16, 0, 9), r"x must have H, W >= 1, got .*\[1, 16, 0, 9\]"),
    ):
        with pytest.raises(ValueError, match=message):
            block(x)
    with pytest.raises(TypeError, match="x must be a tensor"):
        block([1.0])
    with pytest.raises(ValueError, match="in_channels must be >= 1, got in_channels=0"):
        nn.build(name, 0)


def test_maps_that_are_too_small():
    with pytest.raises(ValueError, match=r"factors must be at most \(H, W\) = \(4, 9\), got factors=\(8, 8\)"):
        nn.InterlacedSparseAttention(16)(torch.randn(1, 16, 4, 9))
    with pytest.raises(ValueError, match="topk must be at most the number of positions N = 6, got topk=8"):
        nn.SalientPositionsAttention(16)(torch.randn(1, 16, 2, 3))
    with pytest.raises(ValueError, match=r"sub_sample needs H, W >= 2 with published=True, got .*\[1, 16, 1, 3\]"):
        nn.NonLocal(16, sub_sample=True, published=True)(torch.randn(1, 16, 1, 3))
