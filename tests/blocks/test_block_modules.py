"""asa_ops.nn but for adaptive sparse attention: shapes, initialisation, gradients, state dicts, and build."""

import pytest
import torch
import torch.utils.checkpoint

from asa_ops import nn

BLOCKS = [  # name, options, whether a fresh block is the identity
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
each_block = pytest.mark.parametrize("name, options, identity", BLOCKS, ids=str)
each_kind = pytest.mark.parametrize("name", sorted({name for name, *_ in BLOCKS}))


def alive(block):
    """Return ``block`` with everything that starts at 0 at something else."""
    for parameter in block.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    return block


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


@each_block
def test_every_parameter_learns(name, options, identity):
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
        y = block(x)
    y.sum().backward()
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y = other.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(  # interlaced_sparse takes long, and its function is compiled in test_blocks.py
    "name",
    [
        pytest.param(x, marks=[pytest.mark.slow] if x == "interlaced_sparse" else [])
        for x in sorted({name for name, *_ in BLOCKS})
    ],
)
def test_compiles_without_graph_breaks(name):
    torch._dynamo.reset()
    options = {"factors": (2, 3)} if name == "interlaced_sparse" else {}
    block = alive(nn.build(name, 16, **options)).eval()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):  # the second call makes the batch dynamic
        x = torch.randn(batch, 16, 5, 7)
        torch.testing.assert_close(compiled(x), block(x))


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    block = nn.NonLocal(256)
    for conv in (block.query, block.key, block.value):
        assert abs(conv.weight.std().item() - 0.01) < 2e-4 and (conv.bias == 0).all()
    assert not block.proj.weight.any() and not block.proj.bias.any()
    block = nn.NonLocal(16, norm="batch")
    assert block.proj.bias is None and not block.norm.weight.any() and block.proj.weight.any()
    block = nn.ChannelizedAxialAttention(96, 64)
    bound = (6 / (96 + 64)) ** 0.5  # Glorot
    for weight in (block.column[0].weight, block.value[0].weight):
        assert 0.95 * bound < weight.abs().max() <= bound
    bound = (6 / (64 + 16)) ** 0.5
    assert 0.9 * bound < block.row_gate[0].abs().max() <= bound
    assert [tuple(w.shape) for w in block.column_gate] == [(16, 64), *[(16, 16)] * 4, (64, 16)]
    assert block.column[1].eps == 1e-3
    assert nn.LinearAttention(16).gamma.item() == 0 and nn.LinearAttention(16).query.out_channels == 2
    assert list(nn.LinearAttention(16, kind="channel").state_dict()) == ["gamma"]


def test_sub_sampling_keeps_the_last_row_unless_published():
    x = torch.randn(1, 8, 5, 4)
    for published in (False, True):
        block = alive(nn.NonLocal(8, sub_sample=True, published=published))
        changed = x.clone()
        changed[:, :, 4] += 10
        same = (block(x) - block(changed))[:, :, :4].abs().max() < 1e-6
        assert same == published


def test_published_padding_takes_part_and_ours_does_not():
    """Without padding the two modes are one; with it ours depends on real pixels only."""
    x = torch.randn(1, 8, 6, 8)
    blocks = [alive(nn.InterlacedSparseAttention(8, factors=(3, 4), published=flag)).eval() for flag in (False, True)]
    blocks[1].load_state_dict(blocks[0].state_dict())
    torch.testing.assert_close(*(block(x) for block in blocks))
    ours, published = (block(x[..., :7]) for block in blocks)
    assert (ours - published).abs().max() > 1e-4


def test_published_interlaced_attention_takes_factors_above_the_map():
    block = alive(nn.InterlacedSparseAttention(8, published=True))
    assert block(torch.randn(2, 8, 1, 8)).shape == (2, 8, 1, 8)


@each_kind
def test_exports_and_transforms(name):
    options = {"factors": (2, 3)} if name == "interlaced_sparse" else {}
    block = alive(nn.build(name, 16, **options)).eval()
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


def test_efficient_attention_published_ignores_the_remainder():
    block = nn.EfficientAttention(8, key_channels=10, heads=4, published=True)
    block(torch.randn(1, 8, 4, 4)).sum().backward()
    assert not block.query.weight.grad[8:].any() and block.value.weight.grad.any()


def test_linear_attention_is_finite_where_a_pixel_is_zero():
    for kind in ("position", "channel"):
        block = alive(nn.LinearAttention(16, kind=kind))
        if kind == "position":
            for conv in (block.query, block.key):
                torch.nn.init.zeros_(conv.bias)
        x = torch.randn(2, 16, 4, 5).relu()
        x[:, :, 2, 3] = 0
        x.requires_grad_()
        y = block(x)
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()


@each_kind
def test_from_upstream_refuses_unknown_keys(name):
    with pytest.raises(ValueError, match=r"unknown key 'head.weight' in a .*without their prefix"):
        type(nn.build(name, 16)).from_upstream({"head.weight": torch.zeros(1)})


def test_build_and_available():
    assert set(nn.available()) >= {"asa", *(name for name, *_ in BLOCKS)}
    for name in nn.available():
        block = nn.build(name, 16)
        assert type(block) in [getattr(nn, each) for each in nn.__all__]
        assert type(block).__module__ == f"asa_ops.nn.{name}"
    assert isinstance(nn.build("asa", 16, window=5), nn.AdaptiveSparseAttention)
    with pytest.raises(ValueError, match=r"name must be one of \['asa', .*'non_local', .*got 'nonlocal'"):
        nn.build("nonlocal", 16)
    with pytest.raises(TypeError, match="unexpected keyword argument 'windw'"):
        nn.build("asa", 16, windw=3)
