"""The vision transformer that is fine-tuned to sparse attention, small."""

import pytest
import sparsify
import torch

SMALL = ["--steps", "16", "--seed", "3"]


@pytest.fixture
def smaller(monkeypatch):
    size = {"hidden_size": 24, "num_hidden_layers": 2, "patch_size": 8}
    monkeypatch.setattr(sparsify, "MODEL", sparsify.MODEL | size)
    for name, value in (("BATCH", 8), ("TEST", 40), ("POINTS", 4), ("THRESHOLD_RATE", 1000.0)):
        monkeypatch.setattr(sparsify, name, value)


def test_a_dense_model_becomes_sparse(smaller, tmp_path, capsys, one_thread):
    figure = tmp_path / "sparse.png"
    runs = sparsify.main([*SMALL, "--out", str(figure)])
    assert figure.stat().st_size > 10_000 and [path.name for path in tmp_path.iterdir()] == ["sparse.png"]
    dense, tuned, sparse = (runs[name] for name in ("dense", "dense, fine-tuned as long", "sparse"))
    assert [step for step, _, _ in dense.curve] == [0, 4, 8, 12, 16]
    assert [step for step, _, _ in sparse.curve] == [16, 18, 20, 22, 24]
    assert sparse.curve[0][1] == tuned.curve[0][1] == dense.curve[-1][1]  # it starts as it was
    survivors = [sum(densities.values()) for _, _, densities in sparse.curve]
    assert survivors[0] == 2 and survivors[-1] < 1.9  # two layers
    assert sparse.alphas().shape == (2, 3) and (sparse.alphas() > 0.5).all()
    printed = capsys.readouterr().out
    assert f"{'sparse at first':<28}{100 * sparse.curve[0][1]:>12.1f}{100.0:>13.1f}" in printed
    again = sparsify.main([*SMALL, "--penalty", "0", "--out", str(figure)])
    assert [point[1] for point in again["dense"].curve] == [point[1] for point in dense.curve]  # the same seed
    assert again["sparse"].alphas().max() == 0  # nothing else moves them
    assert [x for _, x, _ in again["sparse"].curve] == [x for _, x, _ in tuned.curve]  # dense, on the same pictures


def test_pictures_of_digits():
    pictures, labels = sparsify.Digits(0).draw(50)
    assert pictures.shape == (50, 1, 32, 32) and set(labels.tolist()) <= set(range(10))
    assert torch.equal(sparsify.Digits(0).draw(50)[0], pictures)
    assert not torch.equal(sparsify.Digits(1).draw(50)[0], pictures)
    assert pictures[:, :, 8:24, 8:24].std() > 1.5 * pictures[:, :, :4].std()  # the digit is in the middle


@pytest.mark.parametrize("wrong", [["--steps", "9"], ["--penalty", "-1"], ["--seed", "-1"], ["--out", "x.txt"]])
def test_wrong_options_end_before_any_work(wrong, monkeypatch, capsys):
    monkeypatch.delattr(sparsify, "Digits")
    with pytest.raises(SystemExit, match="2"):
        sparsify.main(wrong)
    assert f"{wrong[0]} must" in capsys.readouterr().err
