"""The table of tiles of volumes."""

import math

import numpy as np
import pytest
import torch

from bench import accounting, tiles


def test_orders():
    grid = (8, 12, 4)
    assert torch.equal(tiles.by_tiles(grid, (4, 4, 4)), accounting.tile_order(grid))
    for order in (tiles.by_tiles((3, 5, 7), (2, 4, 8)), tiles.by_content(torch.randn(500, 6))):
        assert torch.equal(order.sort().values, torch.arange(len(order)))


def test_content_puts_alike_keys_together():
    kind = torch.randint(4, (512,), generator=torch.Generator().manual_seed(0))
    order = tiles.by_content(torch.eye(4)[kind] * torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert kind[order].diff().ne(0).sum() < 8


def test_active_tiles_are_counted():
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(200, generator=generator)
    rows, columns = torch.randint(200, (2, 5), generator=generator)
    place = {int(token): at // 64 for at, token in enumerate(order)}
    expected = len({(place[int(i)], place[int(j)]) for i, j in zip(rows, columns, strict=True)}) / 16
    assert tiles.active(rows, columns, order) == expected


def test_the_table(tmp_path, capsys):
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).random((6, 9, 20)))
    rows = tiles.main([str(tmp_path / "noise.npy"), "--size", "4", "8", "8"])
    assert [row[0] for row in rows] == ["noise, patches", "noise, features"]
    assert all(0 < float(share) <= 1 for row in rows for share in row[2:])
    assert "| noise, patches |" in capsys.readouterr().out
    np.save(tmp_path / "map.npy", np.ones((3, 4)))
    with pytest.raises(tiles.files.FileError, match=r"must hold a volume \[T, H, W\], got float64 \[3, 4\]"):
        tiles.read(str(tmp_path / "map.npy"), (1, 1, 1))
    assert math.prod(tiles.read(tiles.SAMPLE, (3, 4, 5)).shape) == 60
