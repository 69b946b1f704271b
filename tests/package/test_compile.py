"""torch.compile with its default backend, torch.export for any size, compiled transforms, torch.fx."""

import copy
import pickle
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from block_cases import alive
from implementations import slow
from torch.fx.experimental.proxy_tensor import make_fx

from asa_ops import asa_attention, criss_cross_attention, nn

needs_inductor = pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="Inductor needs Python.h (Debian: apt install python3-dev)",
)
FACTORS = {2: (3, 2), 3: (1, 3, 2)}
SIZES = {2: ((6, 8), (9, 11), (16, 24)), 3: ((4, 6, 8), (3, 9, 5), (5, 7, 10))}  # by the dimensions of maps


def block_of(name: str, dims: int = 2) -> torch.nn.Module:
    options = {"factors": FACTORS[dims]} if name == "interlaced_sparse" else {}
    return alive(nn.build(name, 8, dims=dims, **options))


def output_and_gradients(function, block, x) -> list[torch.Tensor]:
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = function(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)]


@needs_inductor
@pytest.mark.parametrize(
    "name, way, dims",
    [
        slow(name, way, dims, when=(name, way, dims) != ("asa", "dynamic", 2))
        for name in nn.available()
        for way in ("dynamic", "automatic", "marked")
        for dims in (2, 3)
        if way == "dynamic" or (name in ("asa", "criss_cross") and dims == 2)
    ],
)
def test_blocks_train_at_sizes_that_change(name, way, dims, request):
    if (name, dims) == ("squeeze_and_attention", 3):
        request.applymarker(pytest.mark.xfail(reason="Inductor of torch 2.13 fails on pooled volumes", strict=True))
    torch._dynamo.reset()
    block = block_of(name, dims).double()  # some gradients are 0 but for rounding: a bias before a batch norm
    compiled = torch.compile(block, dynamic=True if way == "dynamic" else None)
    for size in SIZES[dims]:
        x = torch.randn(2, 8, *size, dtype=torch.float64)
        if way == "marked":
            torch._dynamo.mark_dynamic(x, (2, 3))
        results = [output_and_gradients(function, block, x) for function in (compiled, block)]
        torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        slow(name, dim, when=dim == "AUTO" and name not in ("asa", "criss_cross"))  # DYNAMIC demands more
        for name in nn.available()
        for dim in ("AUTO", "DYNAMIC")
    ],
)
def test_blocks_export_for_maps_of_any_size(name, dim):
    block = block_of(name).eval().requires_grad_(False)
    any_size = dict.fromkeys((2, 3), getattr(torch.export.Dim, dim))
    program = torch.export.export(block, (torch.randn(1, 8, 6, 8),), dynamic_shapes=(any_size,)).module()
    for size in ((6, 8), (24, 24), (5, 3), (41, 9)):
        x = torch.randn(1, 8, *size)
        torch.testing.assert_close(program(x), block(x), rtol=1e-3, atol=1e-4)


def attend(query, key, value):
    return asa_attention(query, key, value, 1.2, 0.9, grid=(3, 4), threshold_grad="straight_through")


def loss(*tokens):
    return attend(*tokens).square().sum()


def loss_of_all(*tokens):
    return torch.func.vmap(loss)(*tokens).sum()


@needs_inductor
@pytest.mark.parametrize(
    "transformed",
    [
        torch.func.vmap(attend),
        torch.func.grad(loss_of_all, (0, 1, 2)),
        torch.func.vmap(torch.func.grad(loss, (0, 1, 2))),
    ],
    ids=["vmap", "grad of vmap", "vmap of grad"],
)
def test_transforms_compile_to_one_call(transformed):
    """The batching rule folds the vmapped dimension: the op is not called once for each of its entries."""
    torch._dynamo.reset()
    tokens = torch.randn(3, 5, 1, 2, 12, 4).unbind()
    compiled = torch.compile(transformed, fullgraph=True)
    torch.testing.assert_close(compiled(*tokens), transformed(*tokens), rtol=1e-4, atol=1e-5)
    traced = make_fx(transformed)(*tokens)
    assert sum("asa_fwd" in str(node.target) for node in traced.graph.nodes) == 1


def test_gradients_of_criss_cross_compile_under_vmap():
    torch._dynamo.reset()
    maps = torch.randn(3, 5, 1, 2, 4, 3).unbind()
    transformed = torch.func.vmap(
        torch.func.grad(lambda *x: criss_cross_attention(*x).square().sum(), argnums=(0, 1, 2))
    )
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*maps), transformed(*maps), rtol=1e-4, atol=1e-5)


def test_compiled_autograd():
    torch._dynamo.reset()
    block, x = block_of("asa"), torch.randn(1, 8, 5, 6)
    expected = output_and_gradients(block, block, x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        results = output_and_gradients(block, block, x)
    torch.testing.assert_close(results, expected)


class NodePaths(torch.fx.Tracer):
    """Notes in which module each node was made, as torchvision's create_feature_extractor does."""

    def __init__(self):
        super().__init__()
        self.path, self.paths = "", {}

    def call_module(self, module, forward, args, kwargs):
        before, self.path = self.path, self.path_of_module(module)
        try:
            if self.is_leaf_module(module, self.path):
                return self.create_proxy("call_module", self.path, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            self.path = before

    def create_proxy(self, kind, target, *args, **kwargs):
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        self.paths[proxy.node] = self.path
        return proxy


@pytest.mark.parametrize("name", nn.available())
def test_blocks_are_leaves_of_fx(name):
    """A network is traced through, its blocks are not: their checks want sizes."""
    inner = torch.nn.Sequential(block_of(name))
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), inner, torch.nn.Conv2d(8, 2, 1))
    x = torch.randn(2, 3, 6, 8)
    for training in (True, False):
        network.train(training)
        graph = (tracer := NodePaths()).trace(network)
        assert [path for path in tracer.paths.values() if path] == ["0", "1.0", "2"]
        torch.testing.assert_close(torch.fx.GraphModule(network, graph)(x), network(x))
        # What the block returns, instead of the output: as a feature extractor, the rest left out.
        (end,) = (node for node in graph.nodes if node.op == "output")
        end.args = ({"features": next(node for node, path in tracer.paths.items() if path == "1.0")},)
        graph.eliminate_dead_code()
        extractor = torch.fx.GraphModule(network, graph)
        graph.lint()
        assert [child for child, _ in extractor.named_children()] == ["0", "1"]
    expected = network[:2](x)
    for each in (extractor, copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):
        torch.testing.assert_close(each(x)["features"], expected)
    with pytest.raises(RuntimeError, match=f"{type(inner[0]).__name__} is a leaf of torch.fx"):
        torch.fx.symbolic_trace(inner[0])


def test_functions_are_leaves_of_fx_where_they_are_wrapped():
    class Network(torch.nn.Module):
        def forward(self, x):
            return asa_attention(x, x, x, 1.2).relu()

    graph = torch.fx.Tracer(autowrap_functions=(asa_attention,)).trace(Network())
    x = torch.randn(1, 2, 9, 4)
    torch.testing.assert_close(torch.fx.GraphModule(Network(), graph)(x), Network()(x))


@pytest.mark.parametrize("name", nn.available())
def test_blocks_take_one_map(name):
    block, x = block_of(name).eval(), torch.randn(8, 6, 8)
    out = block(x)
    assert out.dim() == 3
    torch.testing.assert_close(out, block(x[None])[0])


LEAKS = """
import gc, pathlib, torch
from asa_ops import asa_attention

tokens = [x.requires_grad_() for x in torch.randn(3, 1, 2, 40, 8)]


def pages_after_calls():
    for _ in range(1000):
        torch.autograd.grad(asa_attention(*tokens, 1.0).sum(), tokens)
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1])


pages_after_calls()
print(-pages_after_calls() + pages_after_calls())
"""


def test_calls_leak_nothing():
    """A call keeps 20 KB for its backward; 1,000 calls grow by less than 1 MB, in a process of their own."""
    run = subprocess.run([sys.executable, "-c", LEAKS], check=True, capture_output=True, text=True, timeout=100)
    assert int(run.stdout) < 250
