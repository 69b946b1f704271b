"""Initialisation of the blocks: by the constructor, and deferred, on the meta device and then by reset_parameters."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from block_cases import MODULES, OTHER_DIMS, SIDES

from asa_ops import nn

WIDE = [row for row in MODULES + OTHER_DIMS if row[1].get("reduction") != 100]  # what is drawn differs from a constant
each_block = pytest.mark.parametrize("name, options, identity", WIDE, ids=str)


def tensors(module, recurse=True):
    return [*module.parameters(recurse=recurse), *module.buffers(recurse=recurse)]


def by_the_block(block):
    block.to_empty(device="cpu")
    block.reset_parameters()


def by_the_owners(block):
    """As torchtitan and others: every module that owns tensors, parents first."""
    block.to_empty(device="cpu")
    for module in block.modules():
        if tensors(module, recurse=False):
            module.reset_parameters()


def one_by_one(block):
    """As FSDP: as by_the_owners, where the children of a module are still on the meta device in its turn."""
    for module in block.modules():
        if tensors(module, recurse=False):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()


def by_all_that_can(block):
    block.to_empty(device="cpu")
    for module in block.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def deferred(name, options, protocol, channels=16):
    with torch.device("meta"):
        block = nn.build(name, channels, **options)
    assert all(x.is_meta for x in tensors(block))
    protocol(block)
    return block


@each_block
def test_reset_parameters_gives_what_the_constructor_gives(name, options, identity):
    torch.manual_seed(1)
    expected = nn.build(name, 16, **options).state_dict()
    torch.manual_seed(1)
    block = deferred(name, options, lambda block: block.to_empty(device="cpu"))
    torch.manual_seed(1)
    block.reset_parameters()
    torch.testing.assert_close(block.state_dict(), expected, rtol=0, atol=0)


@each_block
def test_device_and_dtype(name, options, identity):
    plain = nn.build(name, 16, **options)
    torch.manual_seed(1)
    expected = nn.build(name, 16, **options, dtype=torch.float64)
    block = nn.build(name, 16, **options, device="meta", dtype=torch.float64)
    for key, x in plain.state_dict().items():
        dtype = torch.float64 if x.is_floating_point() else x.dtype
        for other, device in ((expected, "cpu"), (block, "meta")):
            found = other.state_dict()[key]
            assert (found.dtype, found.device.type, found.shape) == (dtype, device, x.shape), key
    assert list(block.state_dict()) == list(expected.state_dict()) == list(plain.state_dict())
    block.to_empty(device="cpu")
    torch.manual_seed(1)
    block.reset_parameters()
    torch.testing.assert_close(block.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert block(torch.randn(2, 16, *SIDES[block.dims], dtype=torch.float64)).dtype == torch.float64


@each_block
@pytest.mark.parametrize("protocol", [by_the_block, by_the_owners, one_by_one, by_all_that_can])
def test_deferred_initialisation_has_the_constructors_distribution(name, options, identity, protocol):
    block, other = deferred(name, options, protocol, channels=48), nn.build(name, 48, **options)
    for (key, x), y in zip(block.state_dict().items(), other.state_dict().values(), strict=True):
        if (y == y.flatten()[0]).all() and y.numel() > 1:
            assert torch.equal(x, y), key
        elif key == "gamma" or key.endswith("num_batches_tracked"):
            assert x == y == 0, key
        else:  # drawn
            assert x.isfinite().all() and (x != y).any(), key
        if x.numel() >= 500 and y.std() > 0:
            for statistic in (torch.std, lambda x: x.abs().mean()):  # their ratio tells a normal one from others
                torch.testing.assert_close(statistic(x), statistic(y), rtol=0.1, atol=0)
            assert x.mean().abs() < 4 * y.std() / x.numel() ** 0.5, key
    if identity:
        image = torch.randn(2, 48, *SIDES[block.dims])
        assert torch.equal(block(image), image)


@each_block
def test_copies_initialise_themselves_too(name, options, identity):
    block = nn.build(name, 16, **options)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    copies = copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(file, weights_only=False)
    for each in copies:
        assert repr(each) == repr(block)
        for a, b in zip(tensors(each), tensors(block), strict=True):
            assert torch.equal(a, b) and a is not b
        torch.manual_seed(3)
        each.reset_parameters()
    for a, b in itertools.pairwise(copies):
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_layers_are_what_users_look_for():
    block = nn.NonLocal(16, norm="batch")
    layers = [block.query, block.key, block.value, block.proj]
    assert all(isinstance(layer, torch.nn.Conv2d) for layer in [*layers, nn.NonLocal(16).proj])
    assert isinstance(block.norm, torch.nn.BatchNorm2d)
    assert isinstance(nn.ChannelizedAxialAttention(16).column_gate, torch.nn.ParameterList)
    for dims, conv in ((1, torch.nn.Conv1d), (3, torch.nn.Conv3d)):
        other = nn.NonLocal(16, norm="batch", dims=dims)
        assert all(isinstance(layer, conv) for layer in [other.query, other.value, other.proj])
        assert isinstance(other.norm, getattr(torch.nn, f"BatchNorm{dims}d"))
    assert "Conv2d(16, 8, kernel_size=(1, 1), stride=(1, 1))" in repr(block)
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert isinstance(synced.norm, torch.nn.SyncBatchNorm) and not synced.norm.weight.any()
