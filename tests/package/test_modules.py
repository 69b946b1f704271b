"""asa_ops.nn: what all blocks have in common: shapes, identity at first, gradients, layouts, state dicts, compile."""

import pytest
import torch
import torch.utils.checkpoint
from block_cases import MODULES, alive

from asa_ops import nn

each_block = pytest.mark.parametrize("name, options, identity", MODULES, ids=str)
each_kind = pytest.mark.parametrize("name", nn.available())
SMALL = {"interlaced_sparse": {"factors": (2, 3)}}  # options for maps of 5 x 7


@each_block
@pytest.mark.parametrize("size", [(5, 7), (1, 9), (8, 8)], ids=str)
def test_shapes_and_identity(name, options, identity, size):
    block = nn.build(name, 16, **options)
    x = torch.randn(2, 16, *size)
    if identity:
        assert torch.equal(block(x), x)
    y = alive(block)(x)
    assert y.shape == (2, options.get("out_channels", 16), *size) and y.dtype == x.dtype and y.is_contiguous()
    assert not torch.equal(y, x)
    empty = block.eval()(x[:0])
    assert empty.shape == (0, *y.shape[1:])
    if identity:
        block.reset_parameters()
        assert torch.equal(block.train()(x), x)


@pytest.mark.parametrize("name, options", [row[:2] for row in MODULES if row[0] != "asa"], ids=str)
def test_every_parameter_learns(name, options):
    block = alive(nn.build(name, 16, **options)).double()
    x = torch.randn(2, 16, 6, 7, dtype=torch.float64)
    (block(x) * torch.randn(6, 7)).sum().backward()
    # A constant added to every score of a row, or shifted away by a batch norm.
    idle = {"key.bias"} if options.get("mode") in (None, "embedded_gaussian") else set()
    idle |= {"salient_positions": {"proj.bias"}, "squeeze_and_attention": {"residual.0.0.bias"}}.get(name, set())
    for key, parameter in block.named_parameters():
        assert parameter.grad is not None, key
        if key not in idle and not (name == "squeeze_and_attention" and key.endswith("0.bias")):
            assert parameter.grad.abs().max() > 1e-12, key


@each_block
def test_channels_last_state_dict_and_half_precision(name, options, identity):
    if name == "salient_positions":
        options = options | {"topk": 30}  # all of them: which are salient depends on rounding
    block = alive(nn.build(name, 16, **options)).eval()
    x = torch.randn(2, 16, 6, 5)
    expected = block(x)
    other = nn.build(name, 16, **options).eval()
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for image in (x.bfloat16(), x):
            y = block(image)
            assert y.dtype == image.dtype or name != "criss_cross"
            torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.sum().backward()
    y = other.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(  # interlaced_sparse takes long, and its function is compiled elsewhere
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] * (x == "interlaced_sparse")) for x in nn.available() if x != "asa"],
)
def test_compiles_without_graph_breaks(name):
    torch._dynamo.reset()
    block = alive(nn.build(name, 16, **SMALL.get(name, {}))).eval()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 16, 5, 7)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), block(x))


@each_kind
def test_exports_and_transforms(name):
    block = alive(nn.build(name, 16, **SMALL.get(name, {}))).eval()
    x = torch.randn(2, 16, 5, 7)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    x = torch.randn(3, 16, 5, 7)
    torch.testing.assert_close(program.module()(x), block(x))
    torch.testing.assert_close(torch.func.vmap(block)(x[:, None]), block(x)[:, None], rtol=1e-4, atol=1e-5)
    gradient = torch.func.grad(lambda x: block(x).square().sum())(x)
    x.requires_grad_()
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    torch.testing.assert_close(gradient, *torch.autograd.grad(y.square().sum(), x))
    assert block.to("meta")(x.to("meta")).shape == x.shape


def test_build_and_available():
    assert set(nn.available()) == {name for name, *_ in MODULES}
    for name in nn.available():
        block = nn.build(name, 16)
        assert type(block) in [getattr(nn, each) for each in nn.__all__]
        assert type(block).__module__ == f"asa_ops.nn.{name}"
    assert isinstance(nn.build("asa", 16, window=5), nn.AdaptiveSparseAttention)
    with pytest.raises(ValueError, match=r"name must be one of \['asa', .*'non_local', .*got 'nonlocal'"):
        nn.build("nonlocal", 16)
    with pytest.raises(TypeError, match="unexpected keyword argument 'windw'"):
        nn.build("asa", 16, windw=3)
