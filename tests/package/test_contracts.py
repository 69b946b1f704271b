"""What torch expects of every function: compile, export, meta tensors, transforms, checkpoint, second derivatives."""

import itertools

import block_cases
import cases
import pytest
import torch
from implementations import IMPLEMENTATIONS, INTERPRETED, slow
from torch.utils.checkpoint import checkpoint

from asa_ops import asa_attention, criss_cross_attention

ASA = [f"asa {case}" for case in ("plain", "padding", "topk", "one_way", "dense", "more_keys", "alpha_only")]
KERNELS = [*IMPLEMENTATIONS, *INTERPRETED]
ALONE = ("channel_plain", "interlaced_short_padded")  # others are compiled as modules


def call(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    """Return a function of tensors and the tensors: of asa_attention, criss_cross_attention or a case of a block."""
    if name == "criss_cross":
        return criss_cross_attention, [torch.randn(1, dim, 3, 4, dtype=dtype) for dim in (2, 2, 3)]
    if not name.startswith("asa"):
        case = block_cases.named(name)
        tensors = [x.detach() for x in block_cases.flat(block_cases.make(case, dtype))]
        return lambda *leaves: case.op(**block_cases.unflat(case, leaves), **case.options), tensors
    inputs, options = cases.make(cases.named(name.removeprefix("asa ")), dtype)
    names = [x for x, y in zip(("query", "key", "value", "alpha", "beta"), inputs, strict=True) if y is not None]
    options["threshold_grad"] = "straight_through"
    return (
        lambda *tensors, **impl: asa_attention(**dict(zip(names, tensors, strict=True)), **options, **impl),
        [x for x in inputs if x is not None],
    )


def results(function, tensors, leaves=None) -> list[torch.Tensor]:
    """Return the output and all gradients of the sum of its squares."""
    leaves = leaves or [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def compilations():
    rows = [(name, {}, dynamic, name in ASA[1:] or not dynamic) for name in ASA for dynamic in (False, True)]
    rows += [("criss_cross", {"impl": impl}, False, impl != "blocked") for impl in ("reference", *KERNELS)]
    rows += [("criss_cross", {}, True, False)]
    blocks = itertools.product(block_cases.CONTRACT_CASES, (False, True))
    rows += [(name, {}, dynamic, name not in ALONE or not dynamic) for name, dynamic in blocks]
    for name, impl, dynamic, takes_long in rows:
        words = [name, *impl.values(), "dynamic" if dynamic else "static"]
        yield slow(name, impl, dynamic, id="-".join(words), when=takes_long)


@pytest.mark.parametrize("name, impl, dynamic", compilations())
def test_compiles_without_a_graph_break(name, impl, dynamic):
    torch._dynamo.reset()
    function, tensors = call(name)
    leaves = [x.requires_grad_() for x in tensors]
    if name.startswith("interlaced") and dynamic:  # the grid is a constant of the call
        dynamic = None
        for x in leaves:
            torch._dynamo.mark_dynamic(x, 0)

    def run(*tensors):
        return function(*tensors, **impl) * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(*(results(f, tensors, leaves) for f in (compiled, run)))
    if name == "criss_cross":
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tensors), run(*tensors))


@pytest.mark.parametrize("name, op", [("asa plain", "asa_fwd"), ("criss_cross", "criss_cross_fwd")])
def test_exports_as_one_op(name, op):
    function, tensors = call(name)

    class Attend(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    exported = torch.export.export(Attend(), tuple(tensors))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(f"asa_ops.{op}.default") == 1
    torch.testing.assert_close(exported.module()(*tensors), function(*tensors))


@pytest.mark.parametrize(
    "name, impl",
    [*((name, "auto") for name in ASA[:3]), *(slow("criss_cross", impl, when=impl == "triton") for impl in KERNELS)],
)
def test_func_transforms(name, impl):
    function, tensors = call(name, torch.float32 if impl == "triton" else torch.float64)
    many = [torch.stack([x, x * 1.1, x * 0.9]) for x in tensors[:3]]
    every = (0, 1, 2)

    def attend(*tokens):
        return function(*tokens, *tensors[3:], impl=impl)

    def loss(*tokens):
        return attend(*tokens).square().sum()

    def each(function):
        """Return what ``function`` gives for every image, stacked."""
        return [torch.stack(x) for x in zip(*(function(*image) for image in zip(*many, strict=True)), strict=True)]

    expected = each(lambda *image: results(attend, image)[1:])
    total = lambda *x: torch.func.vmap(loss)(*x).sum()  # noqa: E731
    for transformed in (
        torch.func.vmap(torch.func.grad(loss, every))(*many),
        torch.func.grad(total, every)(*many),
        torch.func.jacrev(total, every)(*many),
        each(torch.func.grad(loss, every)),
    ):
        torch.testing.assert_close(list(transformed), expected)


@pytest.mark.parametrize("name", ["asa plain", "criss_cross"])
def test_checkpoint_and_double_backward(name):
    function, tensors = call(name, torch.float64)
    again = results(lambda *x: checkpoint(function, *x, use_reentrant=False), tensors)
    torch.testing.assert_close(again, results(function, tensors), rtol=0, atol=0)
    leaves = [x.requires_grad_() for x in tensors]
    grads = torch.autograd.grad(function(*leaves).square().sum(), leaves[:3], create_graph=True)
    message = rf"{name.split()[0]}_attention has no double backward.*use impl='reference'"
    for grad in (grads[0].sum(), sum(x.sum() for x in grads)):
        with pytest.raises(RuntimeError, match=message):
            grad.backward(retain_graph=True)
