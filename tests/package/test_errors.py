"""Bad input: an error that quotes what came and what was expected, before any work."""

import block_cases
import cases
import pytest
import torch

import asa_ops
from asa_ops import nn
from asa_ops.core import dispatch, extension

TRIPLE = ("query", "key", "value")


def valid(name: str) -> tuple:
    """Return a function, by its name or that of a block's case, and arguments that it takes."""
    if name in ("asa_attention", "reciprocal_neighbors"):
        inputs, options = cases.make(cases.named("plain", grid=(4, 6)), torch.float32)
        tensors = dict(zip((*TRIPLE, "alpha", "beta"), inputs, strict=True))
        if name == "reciprocal_neighbors":
            del tensors["value"]
        return getattr(asa_ops, name), tensors | options
    if name == "criss_cross_attention":
        return asa_ops.criss_cross_attention, {x: torch.randn(2, 5 if x == "value" else 8, 5, 4) for x in TRIPLE}
    case = block_cases.named(name)
    return case.op, block_cases.make(case, torch.float32) | case.options


# Of a call: what changes in its arguments (to a value, or by a function of it), the error and its message.
FOUR = {"query": lambda x: x[0]}
FEWER_KEYS = {"key": lambda x: x[:, :, :9], "value": lambda x: x[:, :, :9]}
ASA = [
    ({"query": [1.0]}, TypeError, r"query must be a tensor, got \[1.0\] of type list"),
    (FOUR, ValueError, r"query must have the 4 dimensions .*\[2, 24, 8\]"),
    ({"key": lambda x: x[None]}, ValueError, r"key must have the 4 dimensions .*\[1, 2, 2, 24, 8\]"),
    ({"key": lambda x: x[:1]}, ValueError, r"key must have .*\[2, 2\], got .*\[1, 2, 24, 8\]"),
    ({"value": lambda x: x[:, :1]}, ValueError, r"value must have the heads of key, 2, got .*\[2, 1, 24, 5\]"),
    ({"key": lambda x: x[..., :7]}, ValueError, r"D = 8, got D = 7"),
    ({"key": lambda x: torch.cat([x, x, x], 1)}, ValueError, "heads of which query's are a multiple"),
    (dict.fromkeys(TRIPLE[:2], lambda x: x[..., :0]), ValueError, r"D >= 1"),
    ({"value": lambda x: x[:, :, :9]}, ValueError, r"N_k = 24, got N_k = 9"),
    (FEWER_KEYS, ValueError, r"reciprocal=True needs as many queries as keys, got N_q = 24 and N_k = 9"),
    (FEWER_KEYS | {"reciprocal": False}, ValueError, r"beta needs as many queries .*, got N_q = 24 and N_k = 9"),
    ({"query": lambda x: x.int()}, TypeError, r"one of .*torch.float64.*got a torch.int32"),
    ({"key": lambda x: x.half()}, TypeError, r"key .*torch.float32, got a torch.float16"),
    ({"value": lambda x: x.to("meta")}, ValueError, r"value .*device of query, cpu, got .*meta"),
    ({"alpha": lambda x: x[..., :9]}, ValueError, r"alpha must broadcast to .*\[2, 2, 24\], got .*\[2, 1, 9\]"),
    ({"alpha": lambda x: x.expand(2, 3, 24)}, ValueError, r"alpha .*got .*\[2, 3, 24\]"),
    ({"alpha": lambda x: x[None]}, ValueError, r"alpha must broadcast to .*\[2, 2, 24\], got .*\[1, 2, 1, 24\]"),
    ({"alpha": lambda x: x[0, 0, :2]}, ValueError, r"alpha must broadcast to .*\[2, 2, 24\], got .*\[1, 1, 2\]"),
    ({"alpha": "2"}, TypeError, r"alpha must be a number or a tensor, got '2' of type str"),
    ({"impl": ["cpu"]}, ValueError, r"impl must be one of .*, got \['cpu'\] of type list"),
    ({"alpha": [2.0]}, TypeError, r"alpha must be a number or a tensor, got \[2.0\] of type list"),
    ({"query": torch.nested.nested_tensor([torch.ones(2, 24, 3)] * 2)}, TypeError, "query must be no nested tensor"),
    ({"alpha": lambda x: x.double()}, TypeError, r"alpha must be torch.float32, got a torch.float64"),
    ({"alpha": lambda x: x.to("meta")}, ValueError, r"alpha must lie on the device of query"),
    ({"beta": lambda x: x[..., :9]}, ValueError, r"beta must broadcast to .*got .*\[2, 1, 9\]"),
    ({"grid": None}, ValueError, r"beta needs grid=\(L,\), .* with the product N = 24, got grid=None"),
    ({"grid": (5, 5)}, ValueError, r"H \* W = N = 24, got 5 \* 5 = 25"),
    ({"grid": (-4, -6)}, ValueError, r"H \* W = N = 24"),
    ({"grid": (23,)}, ValueError, r"grid must be \(L,\) with L = N = 24, got 23"),
    ({"grid": (2, 3, 3)}, ValueError, r"\(T, H, W\) with T \* H \* W = N = 24, got 2 \* 3 \* 3 = 18"),
    ({"grid": 24}, TypeError, r"grid must be \(L,\) or \(H, W\) or \(T, H, W\), got 24 of type int"),
    ({"grid": (1, 2, 3, 4)}, TypeError, r"grid must be .*\(T, H, W\), got \(1, 2, 3, 4\)"),
    ({"grid": (4.0, 6)}, TypeError, r"integers .*\(H, W\).*, got 4.0 of type float"),
    ({"window": (3, 3, 3)}, ValueError, r"window must be an odd integer, or 2 of them, .*got window=\(3, 3, 3\)"),
    ({"window": (3, 3), "grid": None, "beta": None}, ValueError, r"window .* needs a grid, got .*window=\(3, 3\)"),
    ({"window": (3, 2)}, ValueError, r"window must be odd, got window=\(3, 2\)"),
    ({"window": (3, 3.0)}, TypeError, r"each side of window must be an integer >= 1, got 3.0"),
    ({"window": 4}, ValueError, r"window must be odd, got window=4"),
    ({"extra_tokens": -1}, ValueError, r"extra_tokens must be >= 0, got extra_tokens=-1"),
    ({"extra_tokens": 1.0}, TypeError, r"extra_tokens must be an integer >= 0, got 1.0"),
    ({"extra_tokens": 25, "beta": None, "grid": None}, ValueError, r"extra_tokens must be at most N = 24, got .*=25"),
    ({"extra_tokens": 1}, ValueError, r"grid must be .* with .* = N - extra_tokens = 24 - 1, got"),
    ({"window": -3}, ValueError, r"window must be >= 1, got window=-3"),
    ({"window": 3.0}, TypeError, r"window must be an integer >= 1, got 3.0"),
    ({"topk": 0}, ValueError, r"topk must be >= 1, got topk=0"),
    ({"topk": 25}, ValueError, r"topk .*N_k = 24, got topk=25"),
    ({"topk": True}, TypeError, r"topk must be an integer >= 1, got True"),
    ({"key_padding_mask": torch.ones(2, 24)}, TypeError, r"_mask must be torch.bool .*got a torch.float32"),
    ({"key_padding_mask": torch.ones(2, 23) > 0}, ValueError, r"_mask must be \[B, N_k\] = \[2, 24\], got .*\[2, 23\]"),
    (
        {"key_padding_mask": torch.ones(2, 24, dtype=torch.bool, device="meta")},
        ValueError,
        r"key_padding_mask must lie on the device of query, cpu, got .*meta",
    ),
    ({"threshold_grad": "ste"}, ValueError, r"threshold_grad must be .*got 'ste'"),
    ({"threshold_band": 0.0}, ValueError, r"must be > 0 and finite, got 0.0"),
    ({"threshold_band": float("inf")}, ValueError, r"finite, got inf"),
    ({"threshold_band": "2"}, TypeError, r"threshold_band must be a number, got '2'"),
    ({"scale": torch.ones(2)}, TypeError, r"scale must be a number, got a torch.float32 tensor of shape \[2\]"),
    ({"reciprocal": "no"}, TypeError, r"reciprocal must be True or False, got 'no'"),
    ({"impl": "fast"}, ValueError, r"impl must be one of \['auto', .*got 'fast'"),
    (
        {"impl": "cuda"},
        RuntimeError,
        r"impl='cuda' cannot run .*need CUDA tensors, these are on cpu. Available here: \[.*'blocked', 'reference'\]",
    ),
]
CRISS_CROSS = [
    ({"query": 1.0}, TypeError, "query must be a tensor, got 1.0 of type float"),
    (FOUR, ValueError, r"query must have the dimensions \[B, D, H, W\] or \[B, D, T, H, W\], got .*\[8, 5, 4\]"),
    ({"query": lambda x: x[:, :, None]}, ValueError, r"key must have the 5 dimensions \[B, D, T, H, W\], got"),
    ({"value": lambda x: x[None]}, ValueError, r"value must have the 4 dimensions \[B, Dv, H, W\]"),
    ({"key": lambda x: x[:, :7]}, ValueError, r"key must have the shape of query, \[2, 8, 5, 4\], got .*\[2, 7"),
    ({"query": lambda x: x[:, :0]}, ValueError, "query must have channels, H and W >= 1, got"),
    ({"value": lambda x: x[..., :0]}, ValueError, "value must have channels, H and W >= 1, got"),
    ({"value": lambda x: x[:1]}, ValueError, r"must be \[B, Dv, H, W\] = \[2, Dv, 5, 4\], got .*\[1, 5, 5, 4\]"),
    ({"value": lambda x: x[..., :3]}, ValueError, r"value must be .* got .*\[2, 5, 5, 3\]"),
    ({"query": lambda x: x.int()}, TypeError, "query must be one of .*float64.*got a torch.int32"),
    ({"key": lambda x: x.half()}, TypeError, "key must have the dtype of query, torch.float32, got a torch.float16"),
    ({"value": lambda x: x.to("meta")}, ValueError, "value must lie on the device of query, cpu, got .* on meta"),
    ({"scale": "2"}, TypeError, "scale must be a number, got '2' of type str"),
    ({"impl": "fast"}, ValueError, r"impl must be one of \['auto', .*got 'fast'"),
    ({"impl": "cuda"}, RuntimeError, "cannot run this criss_cross_attention call: asa_ops has no cuda kernels for"),
]
TOKENS = [
    ({"query": [1.0]}, TypeError, r"query must be a tensor, got \[1.0\] of type list"),
    ({"key": lambda x: x[0]}, ValueError, r"key must have the 4 dimensions"),
    ({"key": lambda x: x[:1]}, ValueError, r"key must have the batch and heads of query, \[2, 2\]"),
    ({"key": lambda x: x[..., :1]}, ValueError, r"got D = 1 in"),
    ({"value": lambda x: x[:, :, :3]}, ValueError, r"one row per key, .*got N_k = 3"),
    ({"query": lambda x: x.int()}, TypeError, r"query must be one of .*got a torch.int32"),
    ({"value": lambda x: x.half()}, TypeError, r"value must have the dtype of query"),
    ({"value": lambda x: x.to("meta")}, ValueError, r"value must lie on the device of query"),
]


def of_neighbors(changes: dict) -> dict:
    """Return those of the changes that concern reciprocal_neighbors."""
    return {x: change for x, change in changes.items() if x != "value" and not x.startswith("threshold")}


WRONG = [
    *(("asa_attention", *row) for row in ASA),
    *(("asa_attention", {"impl": "reference"} | changes, *expected) for changes, *expected in ASA),
    *(
        ("reciprocal_neighbors", of_neighbors(changes), *expected)
        for changes, *expected in ASA
        if of_neighbors(changes)
    ),
    *(("criss_cross_attention", *row) for row in CRISS_CROSS),
    *((name, *row) for name in ("gaussian_short", "linear", "efficient", "interlaced_long") for row in TOKENS),
    ("interlaced_long", FEWER_KEYS, ValueError, "as many keys as queries, got N_q = 48 and N_k = 9"),
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
    ("axial", {"value": torch.zeros(2, 6, 5)}, ValueError, r"the dimensions \[B, C, H, W\] or \[B, C, T, H, W\], got"),
    (
        "axial",
        {"time": torch.zeros(2, 6, 5, 7)},
        ValueError,
        r"a value \[B, C, H, W\] wants no time, got a torch.float32",
    ),
    ("axial_video", {"time": None}, ValueError, r"a value \[B, C, T, H, W\] wants time, got none"),
    ("axial_video", {"row": torch.zeros(2, 3, 2, 3, 5)}, ValueError, r"row must have the B, T, H, W of value, .*got"),
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
    ("squeeze", {"pool": (2, 2, 2)}, ValueError, r"pool must be an integer, or 2 of them, .* got pool=\(2, 2, 2\)"),
    (
        "squeeze",
        {"residual": torch.zeros(2, 6)},
        ValueError,
        r"\[B, C, L\] or \[B, C, H, W\] or \[B, C, T, H, W\], got",
    ),
    ("squeeze_video", {"pool": 2}, ValueError, r"ceil\(T / pool\), .* = \[2, 3, 2, 2, 2\] for pool=2 and .*, got"),
    ("squeeze_sequence", {"upsample": "bilinear"}, ValueError, r"one of \['nearest', 'linear'\], got 'bilinear'"),
    ("squeeze", {"activation": "relu"}, ValueError, "activation must be one of .*got 'relu'"),
    ("squeeze", {"upsample": "bicubic"}, ValueError, "upsample must be one of .*got 'bicubic'"),
    ("interlaced_long", {"grid": (5, 5)}, ValueError, r"H \* W = N = 48, got 5 \* 5 = 25"),
    ("interlaced_long", {"factors": 3}, TypeError, "factors must be two integers, got 3"),
    ("interlaced_long", {"factors": (3, 0)}, ValueError, "each of factors must be >= 1"),
    ("interlaced_long", {"factors": (7, 2)}, ValueError, r"at most \(H, W\) = \(6, 8\), got factors=\(7, 2\)"),
    ("interlaced_video", {"factors": (2, 3)}, TypeError, r"factors must be three integers, got \(2, 3\)"),
    ("interlaced_video", {"factors": (3, 3, 4)}, ValueError, r"\(T, H, W\) = \(2, 3, 5\), got factors=\(3, 3, 4\)"),
    ("interlaced_video", {"factors": None}, ValueError, r"at most \(T, H, W\) .* got factors=\(8, 8, 8\)"),
    ("interlaced_sequence", {"factors": 4}, TypeError, "factors must be a tuple of one integer, got 4"),
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


def fail(*args, **kwargs):
    pytest.fail("work was done")


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    WRONG,
    ids=[f"{name}, {[*changes][-1]}, {m[:20]}" for name, changes, _, m in WRONG],
)
def test_wrong_arguments(name, changes, error, message, monkeypatch):
    function, arguments = valid(name)
    function(**arguments)
    arguments |= {x: change(arguments[x]) if callable(change) else change for x, change in changes.items()}
    has = extension.has  # tests that ran before in this process may have loaded the emulation of the CUDA kernels
    monkeypatch.setattr(extension, "has", lambda op, key: "emulated" not in op and has(op, key))
    monkeypatch.setattr(dispatch, "remembered", dispatch.resolve)
    for module in (asa_ops.asa.ops, asa_ops.asa.reference, asa_ops.criss_cross.ops, asa_ops.criss_cross.reference):
        for work in ("attend", "asa_attention", "criss_cross_attention"):
            monkeypatch.setattr(module, work, fail, raising=False)
    with pytest.raises(error, match=message):
        function(**arguments)


# Blocks.

WRONG_MODULES = [
    ("asa", {"mode": "dot_product"}, ValueError, r"mode must be one of .*got 'dot_product'"),
    ("asa", {"norm": "layer"}, ValueError, r"norm must be one of .*got 'layer'"),
    ("asa", {"threshold_activation": "gelu"}, ValueError, r"threshold_activation .*got 'gelu'"),
    ("asa", {"threshold_grad": True}, ValueError, r"threshold_grad .*got True of type bool"),
    ("asa", {"window": 2}, ValueError, "window must be odd, got window=2"),
    ("asa", {"topk": 0}, ValueError, "topk must be >= 1"),
    ("asa", {"heads": 3}, ValueError, r"in_channels // reduction = 8 must be divisible by heads = 3"),
    ("asa", {"mode": "gaussian", "in_channels": 17, "heads": 2}, ValueError, "in gaussian mode in_channels = 17 must"),
    ("asa", {"published": True, "topk": 3}, ValueError, "published=True has no topk, got topk=3"),
    ("asa", {"published": True, "local": False}, ValueError, "published=True has both blocks, got local=False"),
    ("asa", {"threshold_band": 0.0}, ValueError, "threshold_band must be > 0 and finite, got 0.0"),
    ("asa", {"published": True, "impl": "blocked"}, ValueError, "the reference, got impl='blocked'"),
    ("asa", {"impl": "fast"}, ValueError, "impl must be one of"),
    ("asa", {"dims": 4}, ValueError, "dims must be 1, 2 or 3, got dims=4"),
    ("asa", {"dims": 3, "window": (3, 3)}, ValueError, r"window must be an odd integer, or 3 of them, .*\(3, 3\)"),
    ("asa", {"dims": 3, "published": True}, ValueError, "AdaptiveSparseAttention .* of dims=2, got dims=3"),
    ("criss_cross", {"recurrence": 0}, ValueError, "recurrence must be >= 1"),
    ("criss_cross", {"impl": "fast"}, ValueError, "impl must be one of"),
    ("non_local", {"mode": "softmax"}, ValueError, r"mode must be one of .*got 'softmax'"),
    ("non_local", {"heads": 3}, ValueError, "in_channels // reduction = 8 must be divisible by heads = 3"),
    ("non_local", {"mode": "gaussian", "in_channels": 17, "heads": 2}, ValueError, "in_channels = 17 .*heads = 2"),
    ("non_local", {"norm": "layer"}, ValueError, "norm must be one of"),
    ("non_local", {"sub_sample": "output"}, ValueError, "sub_sample must be False, True or 'input', got 'output'"),
    ("linear_attention", {"kind": "both"}, ValueError, "kind must be one of .*got 'both'"),
    ("linear_attention", {"reduction": 0}, ValueError, "reduction must be >= 1"),
    ("efficient_attention", {"heads": 3}, ValueError, "value_channels = 16 must be divisible by heads = 3"),
    ("efficient_attention", {"heads": 4, "key_channels": 10}, ValueError, "key_channels = 10 must be divisible"),
    ("efficient_attention", {"heads": 4, "key_channels": 3, "published": True}, ValueError, "heads must be at most"),
    ("channelized_axial", {"hidden_layers": -1}, ValueError, "hidden_layers must be >= 0, got hidden_layers=-1"),
    ("channelized_axial", {"hidden_ratio": 0}, ValueError, "hidden_ratio must be > 0 and finite, got 0"),
    ("channelized_axial", {"key_channels": 0}, ValueError, "key_channels must be >= 1"),
    ("squeeze_and_attention", {"upsample": "cubic"}, ValueError, "upsample must be one of"),
    ("squeeze_and_attention", {"upsample": "bilinear", "dims": 3}, ValueError, "upsample must be one of .*'trilinear'"),
    ("squeeze_and_attention", {"pool": (2, 2), "dims": 3}, ValueError, "pool must be an integer, or 3 of them"),
    ("squeeze_and_attention", {"activation": "relu"}, ValueError, "activation must be one of"),
    ("interlaced_sparse", {"factors": (8, 8, 8)}, TypeError, r"factors must be two integers, got \(8, 8, 8\)"),
    ("interlaced_sparse", {"factors": [(8, 8), (8, -1)]}, ValueError, "each of factors must be >= 1"),
    ("interlaced_sparse", {"factors": []}, TypeError, r"factors must be two integers, got \[\]"),
    ("interlaced_sparse", {"factors": (8, 8), "dims": 3}, TypeError, "factors must be three integers, got"),
    ("interlaced_sparse", {"heads": 3}, ValueError, "key_channels = 8 must be divisible by heads = 3"),
    ("salient_positions", {"topk": 0}, ValueError, "topk must be >= 1"),
    ("salient_positions", {"heads": 3}, ValueError, "inner_channels = 8 must be divisible by heads = 3"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), WRONG_MODULES)
def test_wrong_module_options(name, options, error, message):
    with pytest.raises(error, match=message):
        nn.build(name, **({"in_channels": 16} | options))


KEYS = {"asa": r"\['conv_out", "criss_cross": r"\['gamma.*'key_conv"}  # of published checkpoints


@pytest.mark.parametrize("name", nn.available())
def test_wrong_module_inputs(name):
    block = nn.build(name, 16)
    for x, error, message in (
        (torch.randn(1, 8, 9, 9), ValueError, r"x must have C = in_channels = 16 channels, got .*\[1, 8, 9, 9\]"),
        (torch.randn(9, 9), ValueError, r"x must have the 4 dimensions \[B, C, H, W\]"),
        (torch.randn(8, 9, 9), ValueError, r"x must have C = in_channels = 16 channels, got .*\[8, 9, 9\]"),
        (torch.randn(1, 16, 0, 9), ValueError, r"x must have H, W >= 1, got .*\[1, 16, 0, 9\]"),
        ([1.0], TypeError, "x must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            block(x)
    with pytest.raises(ValueError, match="in_channels must be >= 1, got in_channels=0"):
        nn.build(name, 0)
    message = rf"unknown key 'head.weight' in a .*, expected {KEYS.get(name, '')}.*without their prefix"
    with pytest.raises(ValueError, match=message):
        type(block).from_upstream({"head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="dims must be 1, 2 or 3, got dims=0"):
        nn.build(name, 16, dims=0)


@pytest.mark.parametrize(("dims", "layout", "sides"), [(1, r"\[B, C, L\]", "L"), (3, r"\[B, C, T, H, W\]", "T, H, W")])
@pytest.mark.parametrize("name", nn.available())
def test_wrong_maps_of_other_dimensions(name, dims, layout, sides):
    block = nn.build(name, 16, dims=dims)
    for x, message in (
        (torch.randn(1, 16, *[9] * dims, 9), rf"x must have the {dims + 2} dimensions {layout}, got"),
        (torch.randn(1, 8, *[9] * dims), "x must have C = in_channels = 16 channels, got"),
        (torch.randn(8, *[9] * dims), "x must have C = in_channels = 16 channels, got"),
        (torch.randn(1, 16, *[9] * (dims - 1), 0), f"x must have {sides} >= 1, got"),
    ):
        with pytest.raises(ValueError, match=message):
            block(x)


def test_maps_that_are_too_small():
    with pytest.raises(ValueError, match=r"factors must be at most \(H, W\) = \(4, 9\), got factors=\(8, 8\)"):
        nn.InterlacedSparseAttention(16)(torch.randn(1, 16, 4, 9))
    with pytest.raises(ValueError, match="topk must be at most the number of positions N = 6, got topk=8"):
        nn.SalientPositionsAttention(16)(torch.randn(1, 16, 2, 3))
    with pytest.raises(ValueError, match=r"sub_sample needs H, W >= 2 with published=True, got .*\[1, 16, 1, 3\]"):
        nn.NonLocal(16, sub_sample=True, published=True)(torch.randn(1, 16, 1, 3))
    with pytest.raises(ValueError, match=r"sub_sample needs L >= 2 with published=True, got .*\[1, 16, 1\]"):
        nn.NonLocal(16, sub_sample=True, published=True, dims=1)(torch.randn(1, 16, 1))
    with pytest.raises(ValueError, match=r"factors must be at most \(T, H, W\) = \(4, 9, 9\), got factors=\(8, 8, 8\)"):
        nn.InterlacedSparseAttention(16, dims=3)(torch.randn(1, 16, 4, 9, 9))
