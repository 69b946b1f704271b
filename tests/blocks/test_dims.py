"""asa_ops.nn with dims=1 and dims=3: what all blocks do with sequences, volumes and videos, and the single ones."""

import pytest
import torch
import torch.utils.checkpoint
from block_cases import OTHER_DIMS, SIDES, alive
from implementations import slow

from asa_ops import (
    asa_attention,
    channelized_axial_attention,
    criss_cross_attention,
    interlaced_sparse_attention,
    nn,
    squeeze_and_attention,
)
from asa_ops.core.layout import to_map, to_tokens

each_block = pytest.mark.parametrize("name, options, identity", OTHER_DIMS, ids=str)
SMALL = {"interlaced_sparse": {1: {"factors": (3,)}, 3: {"factors": (1, 2, 3)}}}  # options for maps of SIDES
each_kind = pytest.mark.parametrize("name, dims", [(name, dims) for name in nn.available() for dims in (1, 3)])

some_kinds = pytest.mark.parametrize(  # what takes long: the others with `make test-all`
    "name, dims", [slow(name, dims, when=(name, dims) != ("asa", 3)) for name in nn.available() for dims in (1, 3)]
)


def block_of(name: str, dims: int, **options) -> torch.nn.Module:
    return alive(nn.build(name, 8, dims=dims, **SMALL.get(name, {}).get(dims, {}), **options))


@each_block
def test_shapes_layouts_and_precisions(name, options, identity):
    if name == "salient_positions":
        options = options | {"topk": 11}  # of few: which are salient depends on rounding
    block, sides = nn.build(name, 16, **options), SIDES[options["dims"]]
    x = torch.randn(2, 16, *sides)
    assert torch.equal(block(x), x) == identity
    y = alive(block)(x)
    assert y.shape == (2, options.get("out_channels", 16), *sides) and y.is_contiguous() and y.dtype == x.dtype
    block.eval()
    expected = block(x)
    assert block(x[:0]).shape == (0, *y.shape[1:])
    torch.testing.assert_close(block(x[1]), expected[1])
    if block.dims == 3:
        block.to(memory_format=torch.channels_last_3d)
        y = block(x.contiguous(memory_format=torch.channels_last_3d))
        # torch's convolution of volumes keeps this layout with several threads only: where x is added, it is back.
        assert y.is_contiguous(memory_format=torch.channels_last_3d) or not identity
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for image in (x.bfloat16(), x):
            torch.testing.assert_close(block(image).float(), expected, rtol=0.05, atol=0.1)
    torch.testing.assert_close(block.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("name, options", [row[:2] for row in OTHER_DIMS if row[0] != "asa"], ids=str)
def test_every_parameter_learns(name, options):
    block, sides = alive(nn.build(name, 16, **options)).double(), SIDES[options["dims"]]
    (block(torch.randn(2, 16, *sides, dtype=torch.float64)) * torch.randn(sides)).sum().backward()
    # A constant added to every score of a row, or shifted away by a batch norm.
    idle = {"key.bias"} if name in ("non_local", "criss_cross", "efficient_attention") else {"proj.bias"}
    idle |= {"value.bias"} if "norm" in options else set()
    for key, parameter in block.named_parameters():
        if key not in idle and not (name == "squeeze_and_attention" and key.endswith("0.bias")):
            assert parameter.grad.abs().max() > 1e-12, key


# ---- a map whose first side is 1 is a map of one dimension less

SAME = [  # name, options of both blocks
    ("asa", {}),
    ("asa", {"mode": "gaussian", "impl": "reference", "norm": "batch"}),
    ("criss_cross", {"recurrence": 3}),
    ("criss_cross", {"recurrence": 1, "impl": "reference"}),
    ("non_local", {}),
    ("non_local", {"mode": "dot_product", "sub_sample": True, "norm": "batch"}),
    ("non_local", {"mode": "concatenation", "sub_sample": "input"}),
    ("linear_attention", {}),
    ("linear_attention", {"kind": "channel"}),
    ("efficient_attention", {"heads": 2}),
    ("channelized_axial", {"channel_attention": False}),
    ("squeeze_and_attention", {"pool": 2}),
    ("salient_positions", {"topk": 6}),
    ("salient_positions", {"topk": 6, "sub_sample": True}),
]
LESS = [  # name, dims, options, options of the block of one dimension less
    *((name, dims, options, options) for name, options in SAME for dims in (3, 2)),
    ("asa", 3, {"window": (1, 3, 5)}, {"window": (3, 5)}),
    ("asa", 2, {"window": (3, 5)}, {"window": 5}),
    ("squeeze_and_attention", 3, {"upsample": "trilinear"}, {"upsample": "bilinear"}),
    ("squeeze_and_attention", 2, {"upsample": "bilinear"}, {"upsample": "linear"}),
    ("interlaced_sparse", 3, {"factors": (1, 2, 3)}, {"factors": (2, 3)}),
    ("interlaced_sparse", 3, {"factors": (1, 2, 4), "published": True}, {"factors": (2, 4), "published": True}),
    ("interlaced_sparse", 2, {"factors": (1, 3)}, {"factors": (3,)}),
]


@pytest.mark.parametrize("name, dims, options, others", LESS, ids=str)
def test_a_side_of_one_is_a_dimension_less(name, dims, options, others):
    block = alive(nn.build(name, 8, dims=dims, **options)).double()
    less = nn.build(name, 8, dims=dims - 1, **others).double()
    state = {}
    for key, x in less.state_dict().items():  # all but what attends along the side; of kernels of 3 the middle
        mine = block.state_dict()[key]
        state[key] = mine if mine.dim() == x.dim() else mine[:, :, mine.shape[2] // 2]
    less.load_state_dict(state)
    x = torch.randn(2, 8, *((3, 5) if dims == 3 else (7,)), dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    results = []
    for each, image in ((block, x.unsqueeze(2)), (less, x)):
        y = each(image).view(x.shape)
        results.append([y.detach(), *torch.autograd.grad((y * weights).sum(), x)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_functions_of_a_side_of_one_are_bitwise_those_of_a_dimension_less():
    image, gate = torch.randn(3, 2, 4, 3, 5), torch.randn(2, 4, 2, 3)
    video = image.unsqueeze(3)
    pairs = [
        (criss_cross_attention(*video, impl="blocked"), criss_cross_attention(*image, impl="blocked")),
        (criss_cross_attention(*video, impl="reference"), criss_cross_attention(*image, impl="reference")),
        (channelized_axial_attention(*video, time=video[0]), channelized_axial_attention(*image)),
        (squeeze_and_attention(video[0], gate.unsqueeze(2)), squeeze_and_attention(image[0], gate)),
        (
            squeeze_and_attention(image[0, :, :, :1], gate[:, :, :1]),
            squeeze_and_attention(image[0, :, :, 0], gate[:, :, 0]),
        ),
    ]
    tokens = [to_tokens(x, 2) for x in image]
    for span in ("long", "short"):
        for sides, factors in (((3, 5), (2, 3)), ((15,), (4,))):
            more = interlaced_sparse_attention(*tokens, grid=(1, *sides), factors=(1, *factors), span=span)
            pairs.append((more, interlaced_sparse_attention(*tokens, grid=sides, factors=factors, span=span)))
    for more, less in pairs:
        assert torch.equal(more.view(less.shape), less)


# ---- single blocks


@pytest.mark.parametrize("options", [{"dims": 1, "window": 5}, {"dims": 3, "window": (1, 3, 5), "heads": 2}], ids=str)
def test_adaptive_sparse_attention_is_the_function_on_its_grid(options):
    block, x = nn.AdaptiveSparseAttention(8, **options), torch.randn(2, 8, *SIDES[options["dims"]])
    for conv in (block.query, block.key, block.proj):
        torch.nn.init.normal_(conv.weight)
    tokens = block.tokens(x)
    assert tokens["grid"] == x.shape[2:] and tokens["window"] == options["window"]
    out = asa_attention(**tokens, threshold_grad="straight_through")
    torch.testing.assert_close(block(x), x + block.proj(to_map(out, x.shape[2:])))
    block(x).square().sum().backward()
    assert all(conv.weight.grad.any() for conv in (block.alpha, block.beta))
    assert block.alpha.kernel_size == (3,) * block.dims


def reach(block: torch.nn.Module, sides: tuple, at: tuple) -> torch.Tensor:
    """Return which positions the output at one position depends on."""
    torch.nn.init.ones_(block.gamma)
    x = torch.randn(1, 8, *sides, dtype=torch.float64, requires_grad=True)
    block.double()(x)[(0, slice(None), *at)].sum().backward()
    return (x.grad != 0).any(1)[0]


def test_criss_cross_reaches_the_whole_volume_in_three():
    lines = torch.zeros(2, 3, 4, dtype=torch.bool)
    lines[1, 2], lines[1, :, 3], lines[:, 2, 3] = True, True, True
    assert torch.equal(reach(nn.CrissCrossAttention(8, recurrence=1, dims=3), (2, 3, 4), (1, 2, 3)), lines)
    assert not reach(nn.CrissCrossAttention(8, recurrence=2, dims=3), (2, 3, 4), (1, 2, 3)).all()
    assert reach(nn.CrissCrossAttention(8, dims=3), (2, 3, 4), (1, 2, 3)).all()
    assert reach(nn.CrissCrossAttention(8, dims=1), (5,), (2,)).all()
    assert [nn.CrissCrossAttention(8, dims=dims).recurrence for dims in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize("published", [False, True])
def test_sub_sampling_of_videos_is_in_space(published):
    block = alive(nn.NonLocal(8, mode="dot_product", sub_sample=True, published=published, dims=3))
    keys = []
    block.key.register_forward_hook(lambda _, inputs, out: keys.append(out))
    x = torch.randn(1, 8, 3, 4, 5)
    y = block(x)
    columns = 2 if published else 3
    pooled = [
        torch.stack(
            [z[:, :, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].amax((3, 4)) for i in range(2) for j in range(columns)], 3
        )
        for z in (keys[0], block.value(x))
    ]
    key, value = (to_tokens(z) for z in pooled)
    out = to_tokens(block.query(x)) @ key.mT @ value / key.shape[2]
    torch.testing.assert_close(y, x + block.proj(to_map(out, x.shape[2:])))


# ---- published checkpoints of video networks


def published_non_local(state: dict, x: torch.Tensor, names: dict, pool_first: bool, scaled: bool) -> torch.Tensor:
    """A non-local block in evaluation, by its formula, with somebody's names of its parts."""

    def project(part: str, y: torch.Tensor) -> torch.Tensor:
        weight = state[f"{names[part]}.weight"]
        assert weight.shape[2:] == (1, 1, 1)
        return torch.einsum("oi,bithw->bothw", weight[..., 0, 0, 0], y) + state.get(
            f"{names[part]}.bias", torch.zeros(1)
        ).view(1, -1, 1, 1, 1)

    def pool(y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.max_pool3d(y, (1, 2, 2))

    key, value = (
        (project(part, pool(x)) if pool_first else pool(project(part, x))).flatten(2) for part in ("phi", "g")
    )
    query = project("theta", x).flatten(2)
    weights = torch.einsum("bcn,bcm->bnm", query, key) * (query.shape[1] ** -0.5 if scaled else 1)
    y = torch.einsum("bnm,bcm->bcn", weights.softmax(-1), value).unflatten(2, x.shape[2:])
    norm = [state[f"{names['norm']}.{each}"] for each in ("running_mean", "running_var", "weight", "bias")]
    return x + torch.nn.functional.batch_norm(project("out", y), *norm)


VIDEO = {  # names of the parts; does it pool first, are scores scaled, is there a bias before the norm
    "mmaction2": ("theta.conv phi.0.conv g.0.conv conv_out.conv conv_out.bn", False, True, False),
    "Non-local_pytorch": ("theta phi.0 g.0 W.0 W.1", False, False, True),
    "SlowFast": ("conv_theta conv_phi conv_g conv_out norm", True, True, True),
    "SlowFast of before": ("conv_theta conv_phi conv_g conv_out bn", True, True, True),
}


@pytest.mark.parametrize("code", VIDEO)
def test_checkpoints_of_video_networks(code):
    names, pool_first, scaled, biased = VIDEO[code]
    names = dict(zip(("theta", "phi", "g", "out", "norm"), names.split(), strict=True))
    state = {}
    for part, (outputs, inputs) in {"theta": (4, 8), "phi": (4, 8), "g": (4, 8), "out": (8, 4)}.items():
        state[f"{names[part]}.weight"] = torch.randn(outputs, inputs, 1, 1, 1, dtype=torch.float64)
        if part != "out" or biased:
            state[f"{names[part]}.bias"] = torch.randn(outputs, dtype=torch.float64)
    norm = torch.nn.BatchNorm3d(8).double().state_dict()
    state |= {f"{names['norm']}.{key}": x if x.dtype == torch.int64 else torch.rand_like(x) for key, x in norm.items()}
    options = {"use_scale": scaled, "sub_sample": "input" if pool_first else True, "norm": "batch", "published": True}
    block = nn.NonLocal(8, **options, dims=3).double()
    block.load_state_dict(block.from_upstream(state))
    x = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(block.eval()(x), published_non_local(state, x, names, pool_first, scaled))


@pytest.mark.parametrize("name", ["concat_project.conv", "concat_project.0"])
def test_checkpoints_whose_pairs_are_an_image(name):
    """The published codes pair positions by a convolution of the N x N matrix, also for videos."""
    suffix = ".conv" if name.endswith("conv") else ""
    state = {f"{part}{suffix}.bias": torch.randn(4) for part in ("theta", "phi", "g")}
    state |= {f"{part}{suffix}.weight": torch.randn(4, 8, 1, 1, 1) for part in ("theta", "phi", "g")}
    out = "conv_out.conv" if suffix else "W"
    state |= {f"{out}.weight": torch.randn(8, 4, 1, 1, 1), f"{out}.bias": torch.randn(8)}
    state[f"{name}.weight"] = torch.randn(1, 8, 1, 1)
    block = nn.NonLocal(8, mode="concatenation", dims=3)
    block.load_state_dict(block.from_upstream(state))
    x = torch.randn(2, 8, 2, 3, 4)
    query, key, value = (to_tokens(conv(x))[:, 0] for conv in (block.query, block.key, block.value))
    first, second = state[f"{name}.weight"].flatten().split(4)
    weights = ((query @ first)[:, :, None] + (key @ second)[:, None]).relu() / 24
    out = block.proj((weights @ value).mT.unflatten(2, (2, 3, 4)))
    torch.testing.assert_close(block(x), x + out, rtol=1e-4, atol=1e-5)


# ---- torch's contracts


@each_kind
def test_leaves_of_fx(name, dims):
    block, x = block_of(name, dims).eval(), torch.randn(2, 8, *SIDES[dims])
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(block, torch.nn.ReLU()))
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    torch.testing.assert_close(traced(x), block(x).relu())


@pytest.mark.slow
@each_kind
def test_compiles_without_graph_breaks(name, dims):
    torch._dynamo.reset()
    block = block_of(name, dims).eval()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):  # the second call makes the batch dynamic
        x = torch.randn(batch, 8, *SIDES[dims])
        torch.testing.assert_close(compiled(x), block(x))


@some_kinds
def test_exports_for_any_size(name, dims):
    block = block_of(name, dims).eval().requires_grad_(False)
    sides = (10,) if dims == 1 else (4, 6, 8)
    any_size = dict.fromkeys(range(2, dims + 2), torch.export.Dim.DYNAMIC)
    program = torch.export.export(block, (torch.randn(1, 8, *sides),), dynamic_shapes=(any_size,)).module()
    for size in (sides, *([(24,), (9,)] if dims == 1 else [(3, 5, 7), (6, 9, 4)])):
        x = torch.randn(1, 8, *size)
        torch.testing.assert_close(program(x), block(x), rtol=1e-3, atol=1e-4)


@each_kind
def test_transforms(name, dims):
    block, x = block_of(name, dims).eval(), torch.randn(2, 8, *SIDES[dims])
    torch.testing.assert_close(torch.func.vmap(block)(x[:, None]), block(x)[:, None], rtol=1e-4, atol=1e-5)
    gradient = torch.func.grad(lambda x: block(x).square().sum())(x)
    x.requires_grad_()
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    torch.testing.assert_close(gradient, *torch.autograd.grad(y.square().sum(), x))
    assert block.to("meta")(x.to("meta")).shape == x.shape


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
@some_kinds
def test_traces(name, dims):
    block = block_of(name, dims).eval()
    x, other = torch.randn(2, 2, 8, *SIDES[dims])
    torch.testing.assert_close(torch.jit.trace(block, (x,))(other), block(other))


def test_a_gate_of_time_wants_time():
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"a value \[B, C, H, W\] wants no time_gate, got one"):
        channelized_axial_attention(x, x, x, time_gate=(torch.ones(3, 3), torch.ones(3, 3)))


def test_a_checkpoint_of_some_layers_is_renamed():
    """Without the statistics of its norm a bias before it stays where it is."""
    layers = {f"conv_out.{name}": torch.randn(4) for name in ("conv.bias", "bn.weight", "bn.bias")}
    renamed = nn.NonLocal.from_upstream(layers)
    assert set(renamed) == {"proj.bias", "norm.weight", "norm.bias"}
