"""Sets of crops of photographs: what is in which part, and what is left out."""

import numpy as np
import PIL.Image
import pytest
import torch

from examples import files, photographs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five photographs, one of them twice, and what none can be made of."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for i in range(5):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        image = PIL.Image.fromarray(coarse).resize((160 + i, 120), PIL.Image.Resampling.BICUBIC)
        image.save(folder / f"{i}.png")
    image.resize((82, 60)).save(folder / "more" / "small.jpg")
    PIL.Image.new("RGB", (200, 10)).save(folder / "narrow.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder


def make(folder, tmp_path, *options):
    out = tmp_path / "set.npz"
    arguments = ["--side", "16", "--short", "48", "96", "--crops", "9", "--test", "2", "--out", str(out)]
    made = photographs.main([str(folder), *arguments, *options])
    return made, photographs.Photographs.load(out)


def test_photographs_are_split_and_nothing_overlaps(folder, tmp_path, capsys):
    made, loaded = make(folder, tmp_path)
    assert (len(made.train.names), len(made.test.names)) == (3, 2)
    assert sorted([*made.train.names, *made.test.names]) == [f"{i}.png" for i in range(5)]
    for part, again in ((made.train, loaded.train), (made.test, loaded.test)):
        assert part.crops.shape == (9 * len(part.names), 3, 16, 16) and part.crops.dtype == torch.uint8
        assert part.of.bincount().tolist() == [9] * len(part.names)
        assert torch.equal(part.crops, again.crops) and torch.equal(part.of, again.of) and part.names == again.names
        flat = part.crops.flatten(1).float()
        assert torch.pdist(flat).min() > 1
    text = capsys.readouterr().out
    for row in ("left out: the photograph of 4.png", "narrow.png", "shorter than 16", "broken.jpg", "cannot read"):
        assert row in text
    assert "notes.txt" not in text and "train: 27 crops of 3 photographs" in text


def test_crops_of_a_size_are_cells_of_a_grid():
    numbered = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50)
    x = np.stack([numbered % 256, numbered // 256, np.zeros_like(numbered)], -1).astype(np.uint8)
    crops = photographs.crops_of(PIL.Image.fromarray(x), 10, [40, 80], 100, np.random.default_rng(0))
    assert len(crops) == 4 * 5  # of one size: it is not enlarged
    pixels = crops[:, 0].astype(int) + 256 * crops[:, 1].astype(int)
    assert len(np.unique(pixels)) == pixels.size  # none is in two


def test_the_same_command_makes_the_same_set(folder, tmp_path):
    first, again = (make(folder, tmp_path)[0] for _ in range(2))
    other, _ = make(folder, tmp_path, "--seed", "1")
    assert torch.equal(first.train.crops, again.train.crops) and first.test.names == again.test.names
    assert not torch.equal(first.train.crops, other.train.crops)


def test_a_list_names_what_is_taken(folder, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("file,author\n0.png,A\n2.png,B\nmore/small.jpg,C\n")
    made, _ = make(folder, tmp_path, "--list", str(table))
    assert sorted([*made.train.names, *made.test.names]) == ["0.png", "2.png", "more/small.jpg"]


def test_means_of_photographs():
    part = photographs.Part(["a", "b"], torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1]))
    assert part.by_photograph(torch.tensor([1.0, 2.0, 4.0])) == {"a": 1.0, "b": 3.0}


def test_the_committed_list_names_authors_and_licences():
    lines = (photographs.Path(photographs.__file__).parent / "photographs.csv").read_text().splitlines()
    assert lines[0] == "file,package,author,licence" and len(lines) == 82
    assert len(photographs.listed(photographs.Path(photographs.__file__).parent / "photographs.csv")) == 81


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--side", "7"], "--side must be at least 8, got 7"),
        (["--crops", "0"], "--crops must be at least 1, got 0"),
        (["--short", "40", "15"], "--short must be at least --side = 16, got 15"),
        (["--out", "set.txt"], "--out must end in .npz"),
    ],
)
def test_options_that_cannot_be(folder, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        make(folder, tmp_path, *options)
    assert message in capsys.readouterr().err


def test_photographs_that_make_no_set(folder, tmp_path):
    with pytest.raises(photographs.PhotographsError, match="has 5 photographs that can be taken, expected more than"):
        make(folder, tmp_path, "--test", "5")
    with pytest.raises(photographs.PhotographsError, match="no folder 'nowhere'"):
        make("nowhere", tmp_path)
    table = tmp_path / "list.csv"
    table.write_text("file\n9.png\n8.png\n")
    with pytest.raises(photographs.PhotographsError, match=r"lacks '9\.png' and 1 more of the list"):
        make(folder, tmp_path, "--list", str(table))
    table.write_text("name\n9.png\n")
    with pytest.raises(photographs.PhotographsError, match="a CSV file with a column 'file'"):
        make(folder, tmp_path, "--list", str(table))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"text"])
def test_files_that_hold_no_set(tmp_path, content):
    path = tmp_path / "set.npz"
    path.write_bytes(content)
    with pytest.raises(photographs.PhotographsError, match="holds no photographs, expected what"):
        photographs.Photographs.load(path)
    with pytest.raises(FileNotFoundError):
        photographs.Photographs.load(tmp_path / "missing.npz")


def test_a_set_never_replaces_the_list(folder, tmp_path):
    table = tmp_path / "set.npz"
    table.write_text("file\n0.png\n")
    with pytest.raises(files.FileError, match="would replace"):
        make(folder, tmp_path, "--list", str(table))
    assert table.read_text() == "file\n0.png\n"
