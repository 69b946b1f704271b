"""The demo, small; and its numbers."""

import re

import denoise
import numpy as np
import pytest
import skimage
import torch


def test_runs_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(denoise, "TIMING", 0)
    picture = tmp_path / "out.png"
    noisy, stored, flash, sparse, nearby, fast = denoise.main(["--size", "40", "--out", str(picture)])
    assert noisy.psnr < stored.psnr < sparse.psnr and noisy.ssim < sparse.ssim
    assert flash.psnr == pytest.approx(stored.psnr, abs=1e-3)
    assert flash.survivors == 1600 and 1 <= sparse.survivors < 800
    assert sparse.flops < flash.flops == 2 * 1600**2 * (77 + 3)
    assert min(nearby.psnr, fast.psnr) > noisy.psnr
    assert stored.memory is None or stored.memory > 0
    pixels = skimage.io.imread(picture)
    assert pixels.std() > 1 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 1000  # no palette
    text = capsys.readouterr().out
    assert "PSNR dB" in text and f"{sparse.psnr:.2f}" in text and f"{nearby.psnr:.2f}" in text
    assert re.search(r"pixel \(9, 17\): \d+ of 1600 above its threshold, \d+ mutual", text)


def test_padded_values_change_nothing_but_memory():
    noisy = denoise.load("coffee", 24) + np.random.default_rng(0).normal(0, 0.1, (24, 24, 3))
    np.testing.assert_allclose(denoise.dense(noisy, 0.8), denoise.dense(noisy, 0.8, padded=False), atol=1e-5)


def test_scores_are_minus_squared_patch_distances():
    image = np.random.default_rng(0).random((9, 8, 3))
    query, key, value = denoise.attention_inputs(image, 1.3)
    patches = denoise.patch_tokens(image)
    expected = -torch.cdist(patches, patches).square() / 1.3**2
    torch.testing.assert_close((query @ key.mT)[0, 0], expected, rtol=1e-4, atol=1e-4)
    assert patches.shape == (72, 75) and torch.equal(value[0, 0, 8], torch.tensor(image[1, 0]).float())
    corner = torch.tensor(image[:3, :3]).float().permute(2, 0, 1)  # the patch at (2, 2) starts at (0, 0)
    centred = denoise.patch_tokens(image)[2 * 8 + 2].view(3, 5, 5)[:, :3, :3]
    assert (centred - corner).flatten(1).std() < 0.2


def test_weights_agree_with_the_library():
    image = denoise.load("coffee", 32)
    noisy = image + np.random.default_rng(0).normal(0, 0.1, image.shape)
    out, stats = denoise.sparse(noisy, 0.8, 2.0)
    for pixel in ((3, 5), (20, 31)):
        weights, adaptive = denoise.weight_map(noisy, 0.8, 2.0, stats, pixel)
        assert np.count_nonzero(weights) == stats.survivors[0, 0, pixel[0] * 32 + pixel[1]]
        assert 1024 > adaptive >= np.count_nonzero(weights) > 0
        colour = (weights[..., None] * noisy).sum((0, 1)).clip(0, 1)
        np.testing.assert_allclose(colour, out[pixel], atol=1e-5)


def test_no_matrix_is_stored_where_it_is_too_large(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(denoise, "TIMING", 0)
    monkeypatch.setattr(denoise, "MATRIX_LIMIT", 10**6)
    monkeypatch.setattr(denoise, "TUNING_SIZE", 20)
    results = denoise.main(["--size", "32", "--out", str(tmp_path / "out.png")])
    names = ["noisy", "dense, flash attention", "ASA", "scikit-image", "scikit-image, fast"]
    assert [result.name.split(", h")[0] for result in results] == names
    text = capsys.readouterr().out
    assert "skipped, one 1024 x 1024 float32 matrix alone is 0.0 GB" in text and "at 20 x 20" in text


def test_draws_a_pixel_that_keeps_itself_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(denoise, "TIMING", 0)
    denoise.main(["--size", "12", "--noise", "1e-4", "--out", str(tmp_path / "out.png")])
    assert "1 of 144 above its threshold, 1 mutual" in capsys.readouterr().out
    assert (tmp_path / "out.png").is_file()


def test_seconds_are_the_median_of_repeated_calls(monkeypatch):
    clock = iter([0.0, 0.4, 1.0, 1.1, 2.0, 2.3])
    monkeypatch.setattr(denoise.time, "perf_counter", lambda: next(clock))
    calls = []
    result, seconds, _ = denoise.measured(lambda: calls.append(1) or len(calls))
    assert result == 3 and seconds == pytest.approx(0.3)


def test_reads_grey_and_transparent_pictures(tmp_path):
    colour = skimage.util.img_as_ubyte(denoise.load("chelsea", 20))
    clear = np.dstack([colour, np.zeros((20, 20), np.uint8)])
    for name, image, expected in (("grey", colour[..., 0], colour[..., :1]), ("rgba", clear, np.array(255))):
        path = tmp_path / f"{name}.png"
        skimage.io.imsave(path, image, check_contrast=False)
        np.testing.assert_allclose(denoise.load(str(path), 20), np.broadcast_to(expected / 255, (20, 20, 3)), atol=0.01)


def test_the_photograph_is_not_replaced(tmp_path):
    photograph = tmp_path / "denoise.png"
    skimage.io.imsave(photograph, np.zeros((20, 20, 3), np.uint8), check_contrast=False)
    before = photograph.read_bytes()
    (tmp_path / "link.png").symlink_to(photograph)
    for out in (photograph, tmp_path / "link.png"):
        with pytest.raises(denoise.files.FileError, match=rf"{out.name} would replace .*denoise\.png, which is read"):
            denoise.main([str(photograph), "--out", str(out)])
    assert photograph.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such.png"], "no photograph 'no-such.png'"),
        ([denoise.__file__], "cannot read"),
        (["--size", "4"], "--size must be at least 10, got 4"),
        (["--noise", "0"], "--noise must be > 0"),
        (["--out", "no/such/folder.png"], "no folder 'no/such'"),
        (["--out", "picture.txt"], "--out must end in .png, .jpg, .pdf, .svg, got 'picture.txt'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        denoise.files.run(lambda: denoise.main(arguments), denoise.pictures.PictureError)
    assert message in f"{error.value} {capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("photograph", "dense_db", "sparse_db", "nearby_db"),
    [
        ("astronaut", 24.7, 25.4, 27.0),
        ("coffee", 26.3, 27.9, 29.1),
        ("chelsea", 26.6, 28.0, 28.6),
        ("rocket", 28.0, 29.8, 31.1),
    ],
)
def test_gains_on_four_photographs(photograph, dense_db, sparse_db, nearby_db, tmp_path):
    """Within 0.3 dB of a dense prototype's figures, and of scikit-image's."""
    _, _, *results, _ = denoise.main([photograph, "--out", str(tmp_path / "out.png")])
    expected = [dense_db, sparse_db, nearby_db]
    np.testing.assert_allclose([result.psnr for result in results], expected, rtol=0, atol=0.3)
