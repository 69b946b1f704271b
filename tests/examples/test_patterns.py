"""The pictures of what a pixel attends to: the weights in them are those of the formulas."""

import patterns
import pytest
import torch


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    picture = tmp_path_factory.mktemp("patterns") / "patterns.png"
    found = patterns.main(["--size", "16", "--out", str(picture)])
    assert picture.stat().st_size > 1000
    return {title.split("\n")[0]: x.reshape(16, 16) for title, x in found.items()}


def test_weights_are_means(weights):
    for title, x in weights.items():
        if title != "salient_positions":
            assert (x >= 0).all()
            torch.testing.assert_close(x.sum(), torch.tensor(1.0), rtol=1e-4, atol=1e-4, msg=title)


def test_weights_lie_where_the_formulas_say(weights):
    row, column = 11, 4  # the pixel
    r, c = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    assert torch.equal(weights["criss_cross, once"] != 0, (r == row) | (c == column))
    assert (weights["criss_cross, twice"] != 0).all()
    assert torch.equal(weights["interlaced_sparse, long"] != 0, (r % 8 == row % 8) & (c % 8 == column % 8))
    assert not weights["interlaced_sparse, short"][(r // 8 != row // 8) | (c // 8 != column // 8)].any()
    assert torch.equal(weights["squeeze_and_attention"] != 0, (r // 2 == row // 2) & (c // 2 == column // 2))
    assert 1 < (weights["asa"] > 0).sum() < 128
    assert (weights["salient_positions"] > 0).sum() == 32
    for title in ("linear_attention", "efficient_attention"):
        assert (weights[title] > 0).all()


def test_names_that_no_picture_has(tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(patterns, "load")
    with pytest.raises(SystemExit, match="2"):
        patterns.main(["--out", str(tmp_path / "patterns.txt")])
    assert "--out must end in .png, .jpg, .pdf, .svg, got" in capsys.readouterr().err
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(patterns.files.FileError, match=r"folder\.png cannot be written: it is there and no file"):
        patterns.main(["--out", str(tmp_path / "folder.png")])
