"""asa_ops.nn: what single blocks do beside what all of them have in common."""

import pytest
import torch
from block_cases import alive

from asa_ops import nn


@pytest.mark.parametrize("kind", [nn.NonLocal, nn.AdaptiveSparseAttention])
def test_initialisation_of_non_local_blocks_is_the_published_one(kind):
    block = kind(256)
    for conv in (block.query, block.key, block.value):
        assert abs(conv.weight.std().item() - 0.01) < 2e-4 and (conv.bias == 0).all()
    assert not block.proj.weight.any() and not block.proj.bias.any()
    block = kind(16, norm="batch")
    assert block.proj.bias is None and not block.norm.weight.any() and not block.norm.bias.any()
    assert block.proj.weight.any()


def test_initialisation_is_the_published_one():
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
