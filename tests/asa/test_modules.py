"""asa_ops.nn.AdaptiveSparseAttention beside what all blocks have in common, and AdaptiveSparseSelfAttention."""

import functools
import math

import pytest
import torch

from asa_ops import asa_attention, nn, reciprocal_neighbors
from asa_ops.core.layout import to_map, to_tokens
from asa_ops.nn import AdaptiveSparseAttention, AdaptiveSparseSelfAttention


def attending(**options) -> AdaptiveSparseAttention:
    """Return a block whose weights make a difference."""
    block = AdaptiveSparseAttention(16, **options)
    for conv in (block.query, block.key, block.proj):
        torch.nn.init.normal_(conv.weight)
    return block


def test_initialisation_of_thresholds():
    block = AdaptiveSparseAttention(256)
    bound = (256 * 9) ** -0.5
    for conv in (block.alpha, block.beta):
        assert 0.95 * bound < conv.weight.abs().max() <= bound and conv.bias.abs().max() <= bound


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_thresholds_learn_unless_told_not_to(activation):
    x = torch.randn(2, 16, 9, 8)
    for threshold_grad, published in (("straight_through", False), (None, False), ("straight_through", True)):
        torch.manual_seed(0)
        block = attending(threshold_activation=activation, threshold_grad=threshold_grad, published=published)
        block(x).square().sum().backward()
        for name, parameter in block.named_parameters():
            learns = threshold_grad is not None and not published
            if name.startswith(("alpha", "beta")) and not learns:
                assert torch.equal(parameter.grad, torch.zeros_like(parameter))
            elif name != "key.bias":  # a constant added to every score of a row
                assert parameter.grad.abs().max() > 0, name


def test_tokens_are_arguments_for_the_functional_op():
    block = attending(heads=2, topk=5)
    x = torch.randn(2, 16, 6, 7)
    tokens = block.tokens(x)
    y = x + block.proj(to_map(asa_attention(**tokens), (6, 7)))
    torch.testing.assert_close(y, block(x))
    del tokens["value"]
    graph = reciprocal_neighbors(**tokens)
    _, stats = asa_attention(**block.tokens(x), return_stats=True)
    assert torch.equal(graph.row_offsets.diff(), stats.survivors.flatten().long())


def test_without_the_local_block():
    block = attending(local=False)
    torch.nn.init.constant_(block.alpha.bias, 1.0)
    x = torch.randn(2, 16, 6, 7)
    tokens = block.tokens(x)
    assert "beta.weight" not in block.state_dict() and tokens["beta"] is None
    _, alone = asa_attention(**tokens, return_stats=True)
    with_local = tokens | {"beta": torch.ones_like(tokens["alpha"])}
    _, both = asa_attention(**with_local, return_stats=True)
    assert (alone.survivors <= both.survivors).all() and alone.survivors.sum() < both.survivors.sum()
    torch.testing.assert_close(block(x), x + block.proj(to_map(asa_attention(**tokens), (6, 7))))


def test_band_of_the_straight_through_gradient():
    gradients = []
    for band in (0.5, 4.0):
        torch.manual_seed(0)
        block = attending(threshold_band=band)
        x = torch.randn(2, 16, 6, 7)
        block(x).square().sum().backward()
        gradients.append(block.alpha.weight.grad)
    assert not torch.allclose(*gradients, rtol=0.1)


def test_gaussian_mode_attends_with_one_tensor():
    tokens = AdaptiveSparseAttention(16, mode="gaussian").tokens(torch.randn(1, 16, 4, 4))
    assert tokens["query"] is tokens["key"] and tokens["scale"] == 1


def test_layout_round_trip():
    x = torch.randn(2, 12, 5, 7)
    tokens = to_tokens(x, heads=3)
    assert tokens.shape == (2, 3, 35, 4)
    assert torch.equal(tokens[1, 2, 2 * 7 + 3], x[1, 8:12, 2, 3])
    assert torch.equal(to_map(tokens, (5, 7)), x)


class DenseSelfAttention(torch.nn.Module):
    """Dense attention with the names of timm's."""

    def __init__(self, dim, heads, norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)
        self.q_norm, self.k_norm = norm(dim // heads), norm(dim // heads)
        self.norm = norm(dim)

    def forward(self, x, attn_mask=None):
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
        return self.proj(self.norm(out.transpose(1, 2).flatten(2)))


def self_attention(**options):
    """Return a layer of 4 heads whose weights make a difference, and dense attention with the same."""
    torch.manual_seed(0)
    norm = functools.partial(torch.nn.LayerNorm, elementwise_affine=True)
    dense = DenseSelfAttention(32, 4, norm)
    for x in dense.parameters():
        torch.nn.init.normal_(x, std=0.3)
    layer = AdaptiveSparseSelfAttention(
        32, 4, qkv_bias=True, qk_norm=True, scale_norm=True, norm_layer=torch.nn.LayerNorm, **options
    )
    layer.load_state_dict(dense.state_dict())  # strictly: it has no thresholds
    return layer, dense


@pytest.mark.parametrize("options", [{}, {"beta": 2.0, "extra_tokens": 1}, {"alpha": 3.0}])
def test_self_attention_starts_dense_from_dense_weights(options):
    layer, dense = self_attention(**options)
    x = torch.randn(2, 26, 32)
    assert layer.alpha.tolist() == [options.get("alpha", 0.0)] * 4
    assert (layer(x) - dense(x)).abs().max() > 1e-3 if "alpha" in options else True
    layer.load_state_dict(layer.state_dict() | {"alpha": torch.zeros(4)})
    torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        layer.alpha.fill_(-1.0)  # cut off at 0
    torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-5)


def test_self_attention_is_the_op():
    layer, _ = self_attention(alpha=1.0, beta=1.5, extra_tokens=2, grid=(3, 8), window=(1, 5))
    layer.load_state_dict(layer.state_dict() | {"alpha": torch.tensor([0.0, 0.5, 1.0, 4.0])})
    x = torch.randn(2, 26, 32)
    query, key, value = layer.qkv(x).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    alpha, beta = layer.alpha.view(1, 4, 1), torch.full((1, 1, 1), 1.5)
    options = {"grid": (3, 8), "window": (1, 5), "extra_tokens": 2}
    with nn.monitor(layer, tiles=True) as watched:
        found = layer(x)
        statistics = watched.statistics()
    query, key = layer.q_norm(query), layer.k_norm(key)
    out, stats = asa_attention(query, key, value, alpha, beta, **options, return_stats=True)
    torch.testing.assert_close(found, layer.proj(layer.norm(out.transpose(1, 2).flatten(2))))
    assert statistics["density"] == pytest.approx(stats.survivors.float().mean().item() / 26)
    assert statistics["active_tiles"] == 1 and 0 < statistics["density"] < 0.7
    square = AdaptiveSparseSelfAttention(32, beta=1.0, extra_tokens=1)
    assert square(torch.randn(1, 26, 32)).shape == (1, 26, 32)
    with pytest.raises(ValueError, match=r"beta needs grid=\(H, W\) .* N - extra_tokens = 25 - 1"):
        square(torch.randn(1, 25, 32))


def test_thresholds_of_self_attention_learn_and_leave_zero():
    layer, _ = self_attention(alpha=0.0, beta=1.0)
    x = torch.randn(2, 25, 32)

    def gradients(penalty):
        layer.zero_grad()
        (layer(x).square().sum() - penalty * layer.alpha.sum()).backward()
        return layer.alpha.grad.clone(), layer.beta.grad.clone()

    assert [g.abs().max() for g in gradients(0.0)] == [0, 0]  # the output is dense, and says nothing of thresholds
    for start in (0.0, -1.0):
        with torch.no_grad():
            layer.alpha.fill_(start)
        assert gradients(2.0)[0].tolist() == [-2.0] * 4
    with torch.no_grad():
        layer.alpha.fill_(1.0)
    assert all((g != 0).all() for g in gradients(0.0))
    schedule = nn.ThresholdSchedule(layer, start=1, stop=2)
    assert torch.equal(gradients(0.0)[0], torch.zeros(4))  # dense again
    schedule.remove()
    layer.alpha.requires_grad_(False)
    names = [group["name"] for group in nn.parameter_groups(layer, lr=1.0) for x in group["params"] if x is layer.beta]
    assert names == ["thresholds"]


def test_masks_of_self_attention():
    layer, dense = self_attention()
    x = torch.randn(2, 10, 32)
    real = torch.ones(2, 10, dtype=torch.bool)
    real[1, 7:] = False
    expected = dense(x, real[:, None, None])[real]
    additive = torch.zeros(2, 1, 1, 10).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min)
    rows = real[:, None, None].expand(2, 1, 10, 10)
    for mask in (
        real,
        real.long(),
        real[:, None, None],
        rows,
        rows.contiguous(),
        additive,
        additive.expand(2, 4, 10, 10),
    ):
        torch.testing.assert_close(layer(x, attn_mask=mask)[real], expected, atol=1e-5, rtol=1e-5)
    wrong = [
        (rows.tril(), "rows that differ, as of a causal mask"),
        (additive.clamp(min=-1e4), "numbers other than 0 and the minimum"),
        (additive.requires_grad_(), "requires a gradient, as a position bias"),
        (real[:, :9], r"must be a key padding mask, \[B, N_k\] = \[2, 10\]"),
        (torch.zeros(2, 10), "key padding mask"),  # 0 could mean either
        (rows.expand(2, 3, 10, 10), "key padding mask"),
    ]
    for mask, message in wrong:
        with pytest.raises(ValueError, match=f"AdaptiveSparseSelfAttention: .*{message}.*use timm.layers.Attention"):
            layer(x, attn_mask=mask)
    with pytest.raises(ValueError, match="no causal attention"):
        layer(x, is_causal=True)
    for wrong_x in (x[0], x[:, :, :31]):
        with pytest.raises(ValueError, match=r"x must be \[B, N, 32\]"):
            layer(wrong_x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "dim = 32 must be divisible by num_heads = 3"),
        ({"qk_norm": True}, "need a norm_layer"),
        ({"attn_drop": 0.1}, "attn_drop must be 0, got attn_drop=0.1: .* use proj_drop"),
        ({"alpha": -1.0}, "alpha must be >= 0, got -1.0"),
        ({"beta": math.nan}, "beta must be >= 0, got nan"),
        ({"window": 4}, "window must be odd"),
        ({"extra_tokens": -1}, "extra_tokens"),
        ({"impl": "fast"}, "impl"),
    ],
)
def test_wrong_options_of_self_attention(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSparseSelfAttention(32, **options)


def test_self_attention_in_torchs_machinery():
    x = torch.randn(2, 26, 32)
    options = {"alpha": 0.5, "beta": 1.5, "extra_tokens": 1, "proj_bias": False}
    layer = AdaptiveSparseSelfAttention(32, **options, dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64} and len(layer.state_dict()) == 4
    assert layer(x.double()).dtype == torch.float64
    with torch.device("meta"):
        deferred = AdaptiveSparseSelfAttention(32, **options)
    deferred.to_empty(device="cpu").reset_parameters()
    assert deferred.alpha.tolist() == [0.5] * 8 and deferred.beta.tolist() == [1.5] * 8
    assert torch.allclose(deferred.qkv.weight.std(), layer.qkv.weight.std().float(), rtol=0.1)
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(deferred, torch.nn.ReLU()))
    assert torch.equal(traced(x), deferred(x).relu())
    compiled = torch.compile(deferred, backend="eager", fullgraph=True)
    real = torch.ones(2, 26, dtype=torch.bool)
    torch.testing.assert_close(compiled(x, attn_mask=real[:, None, None]), deferred(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert deferred(x).dtype == torch.bfloat16
    assert deferred.bfloat16()(x.bfloat16()).isfinite().all()


def test_active_tiles_with_extra_tokens():
    """These come first, before tiles of 8 x 8 positions; 64 tokens each."""
    layer = AdaptiveSparseSelfAttention(16, 1, beta=3.0, alpha=2.0, extra_tokens=2, grid=(16, 16))
    torch.nn.init.normal_(layer.qkv.weight)
    x = torch.randn(1, 2 + 256, 16)
    with nn.monitor(layer, tiles=True) as watched:
        layer(x)
        statistics = watched.statistics()
    query, key, _ = layer.qkv(x).unflatten(2, (3, 1, 16)).permute(2, 0, 3, 1, 4)
    offsets, columns = reciprocal_neighbors(query, key, 2.0, 3.0, extra_tokens=2, grid=(16, 16))
    tile = {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3}
    grid = sorted(range(256), key=lambda i: (tile[i // 16 // 8, i % 16 // 8], i))
    place = {token: i for i, token in enumerate([0, 1, *(2 + i for i in grid)])}
    rows = torch.arange(258).repeat_interleave(offsets.diff()).tolist()
    active = {(place[i] // 64, place[j] // 64) for i, j in zip(rows, columns.tolist(), strict=True)}
    assert statistics["active_tiles"] == pytest.approx(len(active) / 25)
    assert statistics["density"] == pytest.approx(len(columns) / 258**2)
    assert 9 <= len(active) < 25


@pytest.mark.parametrize("size", [(0, 16, 32), (2, 0, 32)])
def test_self_attention_of_nothing(size):
    layer = AdaptiveSparseSelfAttention(32, num_heads=2, beta=1.0)
    assert layer(torch.randn(size)).shape == size


def test_self_attention_compiles_for_squares_of_any_size():
    layer = AdaptiveSparseSelfAttention(32, num_heads=2, alpha=1.0, beta=1.0)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for n in (16, 25, 36):
        x = torch.randn(2, n, 32)
        torch.testing.assert_close(compiled(x), layer(x))
