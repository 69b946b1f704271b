"""A picture denoised by several processes: the same for any number of them, and what one attention gives by itself."""

import math
import os
import subprocess
import sys
from pathlib import Path

import large_map
import numpy as np
import PIL.Image
import pytest
import tifffile
import torch
from large_map import Settings
from patches import photograph

from asa_ops import asa_attention

ROOT = Path(__file__).parents[2]
SMALL = Settings(side=14, h=0.8, alpha=2.0, seed=3)
pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture
def picture(tmp_path):
    """A photograph of 33 x 25 pixels: maps of 3 x 2, of different sizes."""
    path = tmp_path / "picture.png"
    PIL.Image.fromarray(photograph("coffee")[150:183, 200:225]).save(path)
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(path))


def by_itself(clean: np.ndarray, settings: Settings) -> np.ndarray:
    """Denoise map by map, with patches cut out of the whole picture one by one."""
    height, width, _ = clean.shape
    noisy = clean / 255 + large_map.noise_of(range(height), width, settings)
    around = np.pad(noisy, ((2, 2), (2, 2), (0, 0)), mode="reflect").astype(np.float32)
    out = np.empty_like(clean)
    unit = settings.h * settings.noise * math.sqrt(75)
    for top, bottom in large_map.cut(height, settings.side):
        for left, right in large_map.cut(width, settings.side):
            patches = [
                torch.from_numpy(around[i : i + 5, j : j + 5] - np.float32(0.5)).permute(2, 0, 1).flatten()
                for i in range(top, bottom)
                for j in range(left, right)
            ]
            p = torch.stack(patches) / unit
            square, one = p.square().sum(-1, keepdim=True), torch.ones(len(p), 1)
            query, key = torch.cat([2 * p, -square, one], -1), torch.cat([p, one, -square], -1)
            value = torch.from_numpy(noisy[top:bottom, left:right]).float().reshape(-1, 3)
            tokens = asa_attention(query[None, None], key[None, None], value[None, None], settings.alpha, scale=1.0)
            tile = tokens.view(bottom - top, right - left, 3).numpy()
            out[top:bottom, left:right] = np.rint(tile.clip(0, 1) * 255)
    return out


def of_process(group, rank: int, name: str, out: Path, settings: Settings):
    try:
        return large_map.denoise(name, out, settings, group=group)
    except (Exception, SystemExit) as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("side", [14, None])
def test_pixel_for_pixel_for_any_number_of_processes(processes, picture, side):
    settings, clean = Settings(side, h=0.8, alpha=2.0, seed=3), pixels(picture)
    expected, told = by_itself(clean, settings), set()
    for size in (1, 2, 3, 4):
        out = picture.with_name(f"{size}.png")
        told.update(processes.run(size, of_process, str(picture), out, settings))
        assert np.array_equal(pixels(out), expected), size
    ((before, after),) = told
    assert after == pytest.approx(10 * math.log10(255**2 / np.square(expected - clean.astype(float)).mean()))
    noisy = large_map.to_bytes(clean / 255 + large_map.noise_of(range(33), 25, settings))
    assert before == pytest.approx(10 * math.log10(255**2 / np.square(noisy - clean.astype(float)).mean()))
    assert after > before + 1


def test_more_processes_than_rows(processes, picture):
    settings = Settings(side=10)
    rows = photograph("coffee")[:10, :30]
    PIL.Image.fromarray(rows).save(picture)
    out = picture.with_name("out.png")
    assert [share.end - share.begin for rank in range(16) for share in large_map.shares(10, 10, rank, 16)].count(0) == 6
    processes.run(4, of_process, str(picture), out, settings)
    assert np.array_equal(pixels(out), by_itself(rows, settings))


@pytest.mark.parametrize("size", [1, 3, 7, 40])
@pytest.mark.parametrize("side", [10, 13, None])
def test_shares_are_all_rows_once(side, size):
    rows, reads = [], []
    for i in range(len(large_map.cut(33, side))):
        for rank in range(size):
            share = large_map.shares(33, side, rank, size)[i]
            rows += range(share.begin, share.end)
            reads.append(share.last - share.first - (share.end - share.begin))
    assert rows == list(range(33)) and max(reads) == (0 if (side, size) == (None, 1) else 4)
    lengths = [end - begin for begin, end in large_map.cut(33, side)]
    assert max(lengths) <= (side or 33) and max(lengths) - min(lengths) <= 1


def test_tiff_is_read_and_written_in_pieces(processes, picture):
    clean = pixels(picture)
    tiff, out = picture.with_name("picture.tif"), picture.with_name("out.tiff")
    tifffile.imwrite(tiff, clean, photometric="rgb")
    processes.run(2, of_process, str(tiff), out, SMALL)
    assert np.array_equal(pixels(out), by_itself(clean, SMALL)) and isinstance(large_map.mapped(out), np.memmap)
    shape, own, strips = large_map.read(str(tiff), 14, 1, 2)
    assert shape == (33, 25)
    for share, strip in zip(own, strips, strict=True):
        assert isinstance(strip, np.memmap) and np.array_equal(strip, clean[share.first : share.last])
    for share, strip in zip(*large_map.read(str(picture), 14, 1, 2)[1:], strict=True):
        assert strip.base is None and np.array_equal(strip, clean[share.first : share.last])  # nothing else is kept


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda x: x[..., 0], {"photometric": "minisblack"}),
        (lambda x: x, {"photometric": "rgb", "compression": "zlib"}),
        (lambda x: np.dstack([x, np.full(x.shape[:2], 255, np.uint8)]), {"photometric": "rgb", "extrasamples": [2]}),
        (lambda x: x[::-1], {"photometric": "rgb", "extratags": [(274, "H", 1, 4, False)]}),
    ],
    ids=["grey", "compressed", "alpha", "turned"],
)
def test_other_tiffs_are_decoded(picture, change, options):
    clean, tiff = pixels(picture), picture.with_name("picture.tif")
    tifffile.imwrite(tiff, change(clean), **options)
    assert large_map.mapped(tiff) is None
    _, _, (found,) = large_map.read(str(tiff), None, 0, 1)
    assert np.array_equal(found, np.repeat(clean[..., :1], 3, 2) if "min" in options["photometric"] else clean)


def test_noise_is_that_of_the_place():
    noise = large_map.noise_of(range(50), 60, Settings(noise=0.2, seed=1))
    assert np.array_equal(large_map.noise_of(range(20, 23), 60, Settings(noise=0.2, seed=1)), noise[20:23])
    assert noise.std() == pytest.approx(0.2, rel=0.03) and abs(noise.mean()) < 0.01
    assert np.abs(np.corrcoef(noise.reshape(50, -1)) - np.eye(50)).max() < 0.4
    assert not np.isclose(noise, large_map.noise_of(range(50), 60, Settings(noise=0.2, seed=2))).any()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("no-such.png", "PictureError", "no photograph 'no-such.png'"),
        ("text.tif", "PictureError", "cannot read"),
        ("thin.png", "PictureError", "thin.png must have sides of at least 10 pixels, got 40 x 9"),
        ("out.png", "PictureError", "out.png would replace"),
    ],
)
def test_errors_are_told_once(processes, tmp_path, monkeypatch, name, kind, message):
    (tmp_path / "text.tif").write_text("no picture")
    for written, shape in (("thin.png", (9, 40, 3)), ("out.png", (40, 40, 3))):
        PIL.Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / written)
    path = name if name.startswith("no") else str(tmp_path / name)
    (first, text), *others = processes.run(3, of_process, path, tmp_path / "out.png", SMALL)
    assert first == kind and message in text
    assert others == 2 * [("SystemExit", "1")]


def of_its_own_file(group, rank: int, folder: Path):
    return of_process(group, rank, str(folder / f"{rank}.png"), folder / "out.png", SMALL)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (None, "process 1: no photograph"),
        ((20, 31, 3), "the processes read pictures of different sizes (H, W): [(20, 30), (20, 31)]"),
    ],
)
def test_processes_that_read_different_files(processes, tmp_path, second, message):
    PIL.Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "0.png")
    if second:
        PIL.Image.fromarray(np.zeros(second, np.uint8)).save(tmp_path / "1.png")
    (kind, text), other = processes.run(2, of_its_own_file, tmp_path)
    assert kind == "PictureError" and message in text and other == ("SystemExit", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--map", "9"], "--map must be a number of at least 10, or whole, got 9"),
        (["--map", "half"], "--map must be a number of at least 10, or whole, got half"),
        (["--noise", "0"], "--noise must be > 0 and finite, got 0.0"),
        (["--h", "inf"], "--h must be > 0 and finite, got inf"),
        (["--alpha", "nan"], "--seed and --alpha must be >= 0, got 0 and nan"),
        (["--out", "out.jpg"], "--out must end in .png, .tif, .tiff, got 'out.jpg'"),
        (["--out", "no/such/out.png"], "--out: there is no folder 'no/such'"),
    ],
)
def test_large_map_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        large_map.parse(arguments, first=True)
    assert message in capsys.readouterr().err
    if "--out" in arguments:  # that of the first process alone counts
        large_map.parse(arguments, first=False)
    else:
        with pytest.raises(SystemExit, match="2"):
            large_map.parse(arguments, first=False)
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_large_map_runs_with_and_without_torchrun(picture):
    """With torchrun and without."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = []
    for name, launcher in (("one", []), ("two", torchrun)):
        out = picture.with_name(f"{name}.png")
        options = [picture, "--map", "14", "--h", "0.8", "--alpha", "2", "--seed", "3", "--out", out]
        command = [sys.executable, *launcher, ROOT / "examples" / "large_map.py", *options]
        run = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=120)
        assert np.array_equal(pixels(out), by_itself(pixels(picture), SMALL))
        assert "6/6" in run.stderr and run.stdout.count("PSNR") == 1
        told.append(run.stdout.partition(" denoised")[0])
    assert told[0] == told[1]
