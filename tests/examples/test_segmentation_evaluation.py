"""The segmentation example's evaluation: IoU by hand, sliding windows, flips and scales, and the command."""

import itertools

import numpy as np
import pytest
import segmentation_cases as cases
import torch
from torch import nn

from examples.segmentation import evaluate, model
from examples.segmentation.sample import IGNORE, Sample

pytestmark = pytest.mark.usefixtures("one_thread")


class Coded(nn.Module):
    """Class scores that a picture's red channel spells: class r gets r + 1, once every ``stride`` pixels."""

    def __init__(self, classes: int, stride: int = 1):
        super().__init__()
        self.unused, self.classes, self.stride, self.sizes = nn.Parameter(torch.zeros(())), classes, stride, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(x.shape[-2:]))
        red = ((x[:, 0] * 0.229 + 0.485) * 255).round().long()[:, :: self.stride, :: self.stride]
        return nn.functional.one_hot(red, self.classes).permute(0, 3, 1, 2) * (red[:, None] + 1.0)


class Few(list):
    """Samples of pairs: a red channel and labels."""

    classes, palette = ("a", "b", "c", "d"), np.zeros((4, 3), np.uint8)

    def __init__(self, *pairs):
        pairs = [[np.array(x, np.uint8) for x in pair] for pair in pairs]
        super().__init__(Sample(np.stack([red] * 3, -1), label, "") for red, label in pairs)


def test_miou_by_hand():
    pairs = (
        ([[0, 0, 1], [1, 1, 2]], [[0, 1, 1], [1, IGNORE, 2]]),
        ([[0, 2], [2, 2]], [[0, 2], [0, 1]]),  # of another size
    )
    # without the ignored pixel: class 0 2 of {2 + 1 predicted, 1 missed}, 1: 2 of {2, 2 missed}, 2: 2 of {4}
    report = evaluate.evaluate(Coded(4), Few(*pairs), cases.tiny())
    np.testing.assert_allclose(report.iou, [2 / 4, 2 / 4, 2 / 4, np.nan])
    assert report.miou == 0.5 and report.accuracy == 6 / 9
    report = evaluate.evaluate(Coded(4), Few(pairs[0]), cases.tiny())
    np.testing.assert_allclose(report.iou, [1 / 2, 2 / 3, 1, np.nan])
    assert report.miou == pytest.approx((1 / 2 + 2 / 3 + 1) / 3) and report.accuracy == 4 / 5
    assert str(report).endswith("\nd                    -\nmean             72.22\npixel accuracy   80.00")


def test_sliding_windows_cover_everything_and_are_averaged():
    starts = [(rows.start, columns.start) for rows, columns in evaluate.windows((7, 10), (4, 4), (3, 3))]
    assert starts == list(itertools.product((0, 3), (0, 3, 6)))
    assert [w[0].start for w in evaluate.windows((8, 4), (4, 4), (3, 4))] == [0, 3, 4]
    assert len(list(evaluate.windows((3, 3), (4, 4), (2, 2)))) == 1

    class MeanOfTheWindow(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3), keepdim=True).expand(1, 2, *x.shape[-2:])

    config = cases.tiny(window=[2, 4], stride=[1, 4])
    x = torch.arange(3.0).view(1, 1, 3, 1).expand(1, 3, 3, 4)  # rows 0, 1, 2: windows of rows 0-1 and 1-2
    found = evaluate.scores_of(MeanOfTheWindow(), x, config)
    torch.testing.assert_close(found, torch.tensor([0.5, 1.0, 1.5]).view(1, 1, 3, 1).expand(1, 2, 3, 4))


def test_a_window_of_the_whole_picture_changes_nothing():
    network = model.Segmenter(cases.tiny(), 5).eval()
    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    whole, padded, apart = (
        evaluate.probabilities(network, image, cases.tiny(**settings))
        for settings in ({}, {"window": [64, 64], "stride": [8, 8]}, {"window": [24, 24], "stride": [16, 16]})
    )
    torch.testing.assert_close(padded, whole)
    assert apart.shape == whole.shape and not torch.allclose(apart, whole, atol=1e-4)


def test_flips_and_scales_are_averaged():
    image = np.random.default_rng(0).integers(0, 4, (12, 16, 1)).repeat(3, -1).astype(np.uint8)
    config = cases.tiny()
    network = Coded(4, stride=2)  # what lies between is interpolated, so a mirrored picture gives something else
    plain = evaluate.probabilities(network, image, config)
    mirrored = evaluate.probabilities(network, image[:, ::-1].copy(), config).flip(-1)
    assert not torch.allclose(plain, mirrored)
    torch.testing.assert_close(evaluate.probabilities(network, image, config, flip=True), (plain + mirrored) / 2)
    network.sizes.clear()
    scales = (0.5, 1.0, 1.5)
    several = evaluate.probabilities(network, image, config, scales)
    assert network.sizes == [(6, 8), (12, 16), (18, 24)] and several.shape == plain.shape
    torch.testing.assert_close(several, sum(evaluate.probabilities(network, image, config, [s]) for s in scales) / 3)
    torch.testing.assert_close(several.sum(0), torch.ones(12, 16))
    evaluate.probabilities(network, image, config.replace(resize=[32, 24]))
    assert network.sizes[-1] == (24, 32)


def test_evaluate_gives_the_figures_of_training(trained, checkpoint, capsys):
    expected = trained[1].report.iou
    report = evaluate.main([str(checkpoint)])
    np.testing.assert_array_equal(report.iou, expected)
    text = capsys.readouterr().out
    assert "block asa, 30 steps, 3 pictures" in text and f"{100 * report.iou[0]:.2f}" in text
    for arguments in (["--scales", "1", "1.5", "--flip"], ["--window", "32", "32", "--stride", "16", "32"]):
        assert not np.array_equal(evaluate.main([str(checkpoint), *arguments]).iou, expected)
