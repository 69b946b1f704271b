"""The volume that is denoised at once and slice by slice."""

import denoise_volume
import numpy as np
import pytest
import skimage.io

QUICK = ["--size", "6", "20", "20"]


@pytest.fixture(autouse=True)
def fewer_settings(monkeypatch):
    for name in ("WIDTHS", "NEARBY_WIDTHS"):
        monkeypatch.setattr(denoise_volume, name, (0.7,))
    monkeypatch.setattr(denoise_volume, "ALPHAS", (1.0,))
    monkeypatch.setattr("denoise.TIMING", 0.0)


def test_the_third_dimension_helps(tmp_path, capsys):
    picture = tmp_path / "volume.png"
    results = denoise_volume.main([*QUICK, "--out", str(picture)])
    assert picture.stat().st_size > 1000
    assert results["noisy"] < 21 < results["ASA, slice by slice"] < results["ASA, volume"]
    printed = capsys.readouterr().out
    for name, value in results.items():
        assert f"{name:<34}{value:>9.2f}" in printed
    gain = results["ASA, volume"] - results["ASA, slice by slice"]
    assert f"gains {gain:+.2f} dB" in printed


def test_a_volume_is_one_attention():
    """By loops: each voxel averages those whose patches are alike in all three dimensions."""
    volume = np.random.default_rng(0).random((3, 4, 5))
    found = denoise_volume.attend(volume, (3, 3, 3), 0.8, None)
    padded = np.pad(volume, 1, mode="symmetric")
    patches = [padded[t : t + 3, y : y + 3, x : x + 3] for t, y, x in np.ndindex(volume.shape)]
    expected = []
    for mine in patches:
        weights = np.exp([-(((mine - other) / 0.8) ** 2).sum() for other in patches])
        expected.append((weights / weights.sum() * volume.ravel()).sum())
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-5)


def test_files_of_volumes(tmp_path):
    stack = (np.random.default_rng(0).random((5, 6, 7)) * 200).astype(np.uint8)
    np.save(tmp_path / "stack.npy", stack)
    skimage.io.imsave(tmp_path / "stack.tif", stack, check_contrast=False)
    volumes = [denoise_volume.read(str(tmp_path / name)) for name in ("stack.npy", "stack.tif")]
    assert volumes[0].shape == (5, 6, 7) and np.array_equal(*volumes)
    assert volumes[0].min() == 0 and volumes[0].max() == 1
    assert denoise_volume.centre(volumes[0], (3, 99, 2)).shape == (3, 6, 2)
    np.save(tmp_path / "picture.npy", stack[0])
    np.save(tmp_path / "colours.npy", np.zeros((8, 9, 3), np.uint8))
    (tmp_path / "broken.nii").write_bytes(b"no volume")
    for name, message in (
        ("picture.npy", r"must hold a volume \[T, H, W\] of numbers, got uint8 \[6, 7\]"),
        ("colours.npy", r"must hold a volume .*, got a picture in colours \[8, 9, 3\]"),
        ("broken.nii", "cannot read .*broken.nii as a volume"),
        ("none.tif", "cannot read .*none.tif as a volume"),
    ):
        with pytest.raises(denoise_volume.pictures.PictureError, match=message):
            denoise_volume.read(str(tmp_path / name))


@pytest.mark.parametrize("wrong", [["--size", "2", "9", "9"], ["--noise", "0"], ["--seed", "-1"], ["--out", "x.txt"]])
def test_wrong_arguments_end_before_any_work(wrong, monkeypatch, capsys):
    monkeypatch.delattr(denoise_volume, "read")
    with pytest.raises(SystemExit, match="2"):
        denoise_volume.main(wrong)
    assert f"{wrong[0]} must" in capsys.readouterr().err
