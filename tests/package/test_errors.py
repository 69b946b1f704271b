"""Bad input: an error that quotes what came and what was expected, before any work."""

import pytest
import torch
from cases import make, named

import asa_ops
from asa_ops import asa_attention, reciprocal_neighbors
from asa_ops.core import devices, dispatch, extension
from asa_ops.nn import AdaptiveSparseAttention


def call(change, **options):
    inputs, defaults = make(named("plain", grid=(4, 6)), torch.float32)
    arguments = dict(zip(("query", "key", "value", "alpha", "beta"), inputs, strict=True)) | defaults | options
    return asa_attention(**(arguments | change(arguments)))


WRONG = {
    "no tensor": (lambda a: {"query": [1.0]}, TypeError, r"query must be a tensor, got \[1.0\] of type list"),
    "query rank": (lambda a: {"query": a["query"][0]}, ValueError, r"query must have the 4 dimensions .*\[2, 24, 8\]"),
    "key rank": (lambda a: {"key": a["key"][None]}, ValueError, r"key must have the 4 dimensions .*\[1, 2, 2, 24, 8\]"),
    "batch": (lambda a: {"key": a["key"][:1]}, ValueError, r"key must have .*\[2, 2\], got .*\[1, 2, 24, 8\]"),
    "heads": (lambda a: {"value": a["value"][:, :1]}, ValueError, r"value must have .*\[2, 2\], got .*\[2, 1, 24, 5\]"),
    "head dim": (lambda a: {"key": a["key"][..., :7]}, ValueError, r"D = 8, got D = 7"),
    "no head dim": (lambda a: {"query": a["query"][..., :0], "key": a["key"][..., :0]}, ValueError, r"D >= 1"),
    "value rows": (lambda a: {"value": a["value"][:, :, :9]}, ValueError, r"N_k = 24, got N_k = 9"),
    "key rows": (
        lambda a: {"key": a["key"][:, :, :9], "value": a["value"][:, :, :9]},
        ValueError,
        r"reciprocal=True needs as many queries as keys, got N_q = 24 and N_k = 9",
    ),
    "beta and lengths": (
        lambda a: {"key": a["key"][:, :, :9], "value": a["value"][:, :, :9], "reciprocal": False},
        ValueError,
        r"beta needs as many queries as keys, got N_q = 24 and N_k = 9",
    ),
    "integer": (
        lambda a: {"query": a["query"].int()},
        TypeError,
        r"one of .*torch.float64.*got a torch.int32",
    ),
    "dtype mix": (lambda a: {"key": a["key"].half()}, TypeError, r"key .*torch.float32, got a torch.float16"),
    "device mix": (lambda a: {"value": a["value"].to("meta")}, ValueError, r"value .*device of query, cpu, got .*meta"),
    "alpha shape": (
        lambda a: {"alpha": a["alpha"][..., :9]},
        ValueError,
        r"alpha .*\[2, 2 or 1, 24\], got .*\[2, 1, 9\]",
    ),
    "alpha heads": (lambda a: {"alpha": a["alpha"].expand(2, 3, 24)}, ValueError, r"alpha .*got .*\[2, 3, 24\]"),
    "alpha rank": (lambda a: {"alpha": a["alpha"][:, 0]}, ValueError, r"alpha must have the 3 dimensions"),
    "alpha number": (lambda a: {"alpha": 2.0}, TypeError, r"alpha must be a tensor .*got 2.0 of type float"),
    "alpha dtype": (
        lambda a: {"alpha": a["alpha"].double()},
        TypeError,
        r"alpha must be torch.float32, got a torch.float64",
    ),
    "alpha device": (lambda a: {"alpha": a["alpha"].to("meta")}, ValueError, r"alpha must lie on the device of query"),
    "beta shape": (lambda a: {"beta": a["beta"][:1]}, ValueError, r"beta must be .*got .*\[1, 1, 24\]"),
    "beta without grid": (lambda a: {"grid": None}, ValueError, r"beta needs grid=\(H, W\) with H \* W = N = 24"),
    "grid product": (lambda a: {"grid": (5, 5)}, ValueError, r"H \* W = N = 24, got 5 \* 5 = 25"),
    "grid sign": (lambda a: {"grid": (-4, -6)}, ValueError, r"H \* W = N = 24"),
    "grid form": (lambda a: {"grid": 24}, TypeError, r"grid must be \(H, W\), got 24 of type int"),
    "grid sides": (lambda a: {"grid": (4.0, 6)}, TypeError, r"two integers \(H, W\), got 4.0 of type float"),
    "even window": (lambda a: {"window": 4}, ValueError, r"window must be odd, got window=4"),
    "window sign": (lambda a: {"window": -3}, ValueError, r"window must be >= 1, got window=-3"),
    "window type": (lambda a: {"window": 3.0}, TypeError, r"window must be an integer >= 1, got 3.0"),
    "topk 0": (lambda a: {"topk": 0}, ValueError, r"topk must be >= 1, got topk=0"),
    "topk large": (lambda a: {"topk": 25}, ValueError, r"topk .*N_k = 24, got topk=25"),
    "topk type": (lambda a: {"topk": True}, TypeError, r"topk must be an integer >= 1, got True"),
    "mask dtype": (
        lambda a: {"key_padding_mask": torch.ones(2, 24)},
        TypeError,
        r"key_padding_mask must be torch.bool .*got a torch.float32",
    ),
    "mask shape": (
        lambda a: {"key_padding_mask": torch.ones(2, 23, dtype=torch.bool)},
        ValueError,
        r"key_padding_mask must be \[B, N_k\] = \[2, 24\], got .*\[2, 23\]",
    ),
    "mask device": (
        lambda a: {"key_padding_mask": torch.ones(2, 24, dtype=torch.bool, device="meta")},
        ValueError,
        r"key_padding_mask must lie on the device of query, cpu, got .*meta",
    ),
    "threshold_grad": (lambda a: {"threshold_grad": "ste"}, ValueError, r"threshold_grad must be .*got 'ste'"),
    "threshold_band": (
        lambda a: {"threshold_band": 0.0},
        ValueError,
        r"must be > 0 and finite, got 0.0",
    ),
    "threshold_band inf": (lambda a: {"threshold_band": float("inf")}, ValueError, r"finite, got inf"),
    "threshold_band type": (lambda a: {"threshold_band": "2"}, TypeError, r"threshold_band must be a number, got '2'"),
    "scale type": (
        lambda a: {"scale": torch.ones(2)},
        TypeError,
        r"scale must be a number, got a torch.float32 tensor of shape \[2\]",
    ),
    "reciprocal type": (lambda a: {"reciprocal": "no"}, TypeError, r"reciprocal must be True or False, got 'no'"),
    "impl unknown": (lambda a: {"impl": "fast"}, ValueError, r"impl must be one of \['auto', .*got 'fast'"),
    "impl not here": (
        lambda a: {"impl": "cuda"},
        RuntimeError,
        r"impl='cuda' cannot run .*need CUDA tensors, these are on cpu. Available here: \[.*'blocked', 'reference'\]",
    ),
}


@pytest.fixture(autouse=True)
def no_emulation(monkeypatch):
    """Tests that ran before in this process may have loaded the emulation of the CUDA kernels."""
    has = extension.has
    monkeypatch.setattr(extension, "has", lambda op, key: "cuda" not in op and has(op, key))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, impl):
    change, error, message = WRONG[name]
    call(lambda a: {}, impl=impl)
    with pytest.raises(error, match=message):
        call(change, impl=impl)


@pytest.mark.parametrize("name", [name for name in WRONG if "value" not in name and "threshold_" not in name])
def test_wrong_arguments_of_reciprocal_neighbors(name):
    change, error, message = WRONG[name]
    inputs, options = make(named("plain", grid=(4, 6)), torch.float32)
    arguments = dict(zip(("query", "key", "value", "alpha", "beta"), inputs, strict=True)) | options
    changed = change(arguments)
    if set(changed) == {"value"}:
        return
    arguments |= changed
    del arguments["value"]
    with pytest.raises(error, match=message.replace("asa_attention", ".*")):
        reciprocal_neighbors(**arguments)


def test_errors_come_before_any_work(monkeypatch):
    for module in (asa_ops.asa.ops, asa_ops.asa.reference):
        for name in ("attend", "asa_attention"):
            monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("work was done"), raising=False)
    for change, error, message in WRONG.values():
        with pytest.raises(error, match=message):
            call(change)


def test_explain_names_what_runs_and_why_the_others_do_not(monkeypatch):
    monkeypatch.setattr(devices, "triton_is_interpreted", lambda: False)
    monkeypatch.setattr(devices, "_why_no_triton_on", devices._why_no_triton_on.__wrapped__)
    query = torch.randn(1, 1, 16, 8)
    text = asa_ops.explain(query)
    lines = text.splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names == list(dispatch._PREDICATES)
    chosen = lines[0].rsplit(" ", 1)[1]
    assert lines[0] == f"asa_attention on cpu, torch.float32, impl='auto': {chosen}"
    assert dict(zip(names, lines[1:], strict=True))[chosen].endswith("runs")
    assert "need CUDA tensors" in lines[1 + names.index("triton")]
    with pytest.raises(TypeError, match="unexpected keyword argument 'windw'"):
        asa_ops.explain(query, windw=3)
    assert "an error" in asa_ops.explain(query, impl="cuda").splitlines()[0]


def test_explain_says_why_the_extension_is_missing(monkeypatch):
    monkeypatch.setattr(extension, "WHY_MISSING", "it was never built")
    assert "cpu        it was never built" in asa_ops.explain(torch.randn(1, 1, 16, 8))
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run this asa_attention call: it was never built"):
        call(lambda a: {"impl": "cpu"})


MODULE = {
    "channels": ({"in_channels": 0}, ValueError, "in_channels must be >= 1, got in_channels=0"),
    "reduction": ({"reduction": 1.5}, TypeError, "reduction must be an integer"),
    "mode": ({"mode": "dot_product"}, ValueError, r"mode must be one of .*got 'dot_product'"),
    "norm": ({"norm": "layer"}, ValueError, r"norm must be one of .*got 'layer'"),
    "activation": ({"threshold_activation": "gelu"}, ValueError, r"threshold_activation .*got 'gelu'"),
    "threshold_grad": ({"threshold_grad": True}, ValueError, r"threshold_grad .*got True of type bool"),
    "window": ({"window": 2}, ValueError, "window must be odd, got window=2"),
    "topk": ({"topk": 0}, ValueError, "topk must be >= 1"),
    "heads": ({"heads": 3}, ValueError, r"in_channels // reduction = 8 must be divisible by heads = 3"),
    "gaussian heads": (
        {"mode": "gaussian", "in_channels": 17, "heads": 2},
        ValueError,
        "in gaussian mode in_channels = 17 must be divisible by heads = 2",
    ),
    "published topk": ({"published": True, "topk": 3}, ValueError, "published=True has no topk, got topk=3"),
    "published local": (
        {"published": True, "local": False},
        ValueError,
        "published=True has both blocks, got local=False",
    ),
    "threshold_band": ({"threshold_band": 0.0}, ValueError, "threshold_band must be > 0 and finite, got 0.0"),
    "published impl": ({"published": True, "impl": "blocked"}, ValueError, "the reference, got impl='blocked'"),
    "impl": ({"impl": "fast"}, ValueError, "impl must be one of"),
}


@pytest.mark.parametrize("name", MODULE)
def test_wrong_module_options(name):
    options, error, message = MODULE[name]
    with pytest.raises(error, match=message):
        AdaptiveSparseAttention(**({"in_channels": 16} | options))


def test_wrong_module_inputs():
    block = AdaptiveSparseAttention(16)
    with pytest.raises(ValueError, match=r"x must have C = in_channels = 16 channels, got .*\[1, 8, 4, 4\]"):
        block(torch.randn(1, 8, 4, 4))
    with pytest.raises(ValueError, match=r"x must have the 4 dimensions \[B, C, H, W\]"):
        block(torch.randn(16, 4, 4))
    with pytest.raises(ValueError, match=r"x must have H, W >= 1, got .*\[1, 16, 0, 4\]"):
        block(torch.randn(1, 16, 0, 4))
    with pytest.raises(ValueError, match=r"unknown key 'conv.weight' in a .*, expected \['conv_out"):
        AdaptiveSparseAttention.from_upstream({"conv.weight": torch.zeros(1)})
