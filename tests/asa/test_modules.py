"""asa_ops.nn.AdaptiveSparseAttention beside what all blocks have in common."""

import pytest
import torch

from asa_ops import asa_attention, reciprocal_neighbors
from asa_ops.core.layout import to_map, to_tokens
from asa_ops.nn import AdaptiveSparseAttention


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
