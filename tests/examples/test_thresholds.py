"""What the experiment with learned thresholds rests on, small; and that its table is what its results say."""

import functools
import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
RESULTS = FOLDER / "results" / "thresholds.json"
pytestmark = pytest.mark.xdist_group("thresholds")  # one process, since what the tests share takes time to make
SMALL = ["--seeds", "2", "--steps", "3", "--side", "10"]


@pytest.fixture(scope="module")
def thresholds():
    """The script with small photographs and few constants to try."""
    module = importlib.import_module("thresholds")
    module.SIZE = 20
    module.GRID = {"h": [0.8, 1.0], "alpha": [0.125, 0.25, 0.5, 1.0, 2.0], "beta": [0.5, 1.0]}
    module.photograph = functools.cache(module.photograph)
    return module


@pytest.fixture(scope="module")
def seed(thresholds):
    return thresholds.Seed(1, 10, 0.1)


@pytest.fixture(scope="module")
def finished(thresholds, tmp_path_factory):
    """The results' file of a whole run."""
    path = tmp_path_factory.mktemp("whole") / "out.json"
    thresholds.main([*SMALL, "--out", str(path)])
    return path


@pytest.mark.parametrize("activation", ["exp", "softplus", "relu"])
def test_thresholds_get_a_gradient_only_if_asked_for(thresholds, seed, activation):
    method = thresholds.Method(thresholds.BOTH, ("alpha", "beta"), activation=activation)
    model = thresholds.Predictor(seed.constants[thresholds.BOTH], method)
    predicted = model(seed.train)
    for name in ("alpha", "beta"):  # it starts at the constants
        start = torch.full_like(predicted[name], seed.constants[thresholds.BOTH][name])
        torch.testing.assert_close(predicted[name], start)
    last = model.layers[-1].weight
    seed.train.psnr(predicted, "straight_through").mean().backward()
    assert (last.grad.flatten(1).abs().amax(1) > 1e-6).all()  # of alpha, and of beta
    model.zero_grad()
    seed.train.psnr(model(seed.train)).mean().backward()
    assert not last.grad.any()


def test_without_a_gradient_nothing_moves(thresholds, seed):
    methods = thresholds.METHODS
    published, learned = (seed.run(methods[x], 3) for x in ("no gradient (as published)", "learned alpha, beta"))
    assert published["moved"] == 0 and learned["moved"] > 1e-3
    fixed = seed.run(methods["fixed alpha, beta"], 3)
    assert published["test"] == pytest.approx(fixed["test"], abs=1e-5)
    assert published["curve"][0] == published["curve"][-1] and learned["curve"][0] != learned["curve"][-1]


def test_straight_through_points_where_alpha_denoises_better(thresholds):
    rows = thresholds.Seed(1, 20, 0.1).derivatives()
    steep = [row for row in rows if abs(row["difference"]) > 0.1]
    assert {row["difference"] > 0 for row in steep} == {True, False}
    for row in steep:
        assert all(row[band] * row["difference"] > 0 for band in ("0.5", "1", "2", "4"))
        assert row["0.5"] == pytest.approx(row["difference"], rel=0.1, abs=0.1)


def test_training_and_test_photographs_are_disjoint(thresholds):
    held_out = []
    for i in range(8):
        seed = thresholds.Seed(i, 20, 0.1)
        test, train = (x.clean.flatten(1) for x in (seed.test, seed.train))
        assert len(test) == 2 and len(train) == 6 == len(seed.photographs)
        assert torch.cdist(test, train).min() > 1
        for name, tile in zip(seed.held_out, seed.test.clean, strict=True):
            np.testing.assert_allclose(tile[0].view(20, 20, 3), thresholds.photograph(name), atol=1e-6)
        held_out += seed.held_out
    assert sorted(held_out) == sorted(2 * thresholds.PHOTOGRAPHS)


def test_grey_photographs_are_learned_from(thresholds, seed):
    """And from nothing else: what is tuned on, tested on and starts is as without them."""
    grey = thresholds.Seed(1, 10, 0.1, grey=True)
    assert len(seed.photographs) == 6 and len(grey.photographs) == 14
    for x in grey.photographs[6:]:
        assert x.shape == (20, 20, 3) and x.std() > 0.01 and (x == x[..., :1]).all() and 0 <= x.min() < x.max() <= 1
    assert grey.constants == seed.constants
    assert torch.equal(grey.train.pictures, seed.train.pictures) and torch.equal(grey.test.pictures, seed.test.pictures)
    method = thresholds.METHODS["learned alpha, beta, h"]
    assert grey.run(method, 3)["curve"][0] == seed.run(method, 3)["curve"][0]
    assert grey.run(method, 3)["moved"] != seed.run(method, 3)["moved"]


def test_a_seed_repeats_bitwise(thresholds, seed):
    method = thresholds.METHODS["learned alpha, beta, h"]
    first = seed.run(method, 3)
    torch.manual_seed(7)  # nothing outside the seed matters
    again = thresholds.Seed(1, 10, 0.1)
    assert torch.equal(again.test.pictures, seed.test.pictures) and again.run(method, 3) == first
    other = thresholds.Seed(2, 10, 0.1)
    assert other.run(method, 3)["moved"] != first["moved"]


def test_crops_are_parts_of_photographs(thresholds, monkeypatch):
    photograph = np.arange(5 * 5 * 3).reshape(5, 5, 3) / 75
    monkeypatch.setattr(thresholds, "SIZE", 5)
    crops = [thresholds.random_crop([photograph], 2, np.random.default_rng(i)) for i in range(50)]
    whole = {frozenset(np.round(x * 75) for x in pixel) for pixel in photograph.reshape(-1, 3)}
    inverted = 0
    for crop in crops:
        plain = {frozenset(np.round(x * 75) for x in pixel) for pixel in crop.reshape(-1, 3)}
        back = {frozenset(np.round((1 - x) * 75) for x in pixel) for pixel in crop.reshape(-1, 3)}
        assert plain <= whole or back <= whole
        inverted += not plain <= whole
    assert 0 < inverted < 50


def test_constants_are_the_best_of_the_grid(thresholds, seed):
    grid, train = thresholds.GRID, seed.train
    tried = ({"h": h, "alpha": alpha} for h in grid["h"] for alpha in grid["alpha"])
    best = max(tried, key=lambda constants: train.psnr(constants).mean().item())
    assert {name: seed.constants[thresholds.ALPHA][name] for name in best} == best


def test_the_oracle_is_at_least_as_good_as_one_alpha(thresholds, seed):
    h, alpha = (seed.constants[thresholds.ALPHA][x] for x in ("h", "alpha"))
    tried = torch.stack([seed.test.psnr({"h": h, "alpha": a}) for a in thresholds.GRID["alpha"]])
    best = tried.amax(0).tolist()
    fixed = seed.test.psnr({"h": h, "alpha": alpha}).tolist()
    assert len(fixed) == 8 and all(x >= y for x, y in zip(best, fixed, strict=True))
    assert seed.ceiling() == pytest.approx(np.mean(best) - np.mean(fixed), abs=1e-5)
    assert seed.ceiling() > 0


def test_fitted_thresholds_denoise_better(thresholds, seed, monkeypatch):
    """An alpha of every pixel goes beyond the best one of its tile; without a gradient it stays."""
    monkeypatch.setattr(thresholds, "FIT_STEPS", 40)
    fixed = seed.run(thresholds.METHODS["fixed alpha"], 3)
    figures = seed.run(thresholds.METHODS["fitted to the clean, band 0.5"], 3)
    assert figures["test"] > fixed["test"] + seed.ceiling() and figures["start"] == fixed["start"]
    low, _, high = figures["quantiles"]["alpha"]
    assert low < fixed["start"]["alpha"] < high and "train" not in figures
    published = thresholds.Method(thresholds.ALPHA, ("alpha",), threshold_grad=None, fitted=True)
    assert seed.run(published, 3)["test"] == pytest.approx(fixed["test"], abs=1e-5)


def test_psnr(thresholds):
    clean = np.full((10, 10, 3), 0.5)
    tiles = thresholds.Tiles([clean], 0.1, np.random.default_rng(0))
    nobody = tiles.psnr({"h": 1.0, "alpha": math.inf})  # rows without survivors are 0: an error of 0.5 everywhere
    assert nobody.item() == pytest.approx(-20 * math.log10(0.5), abs=1e-4)
    mean = tiles.pictures.flatten(2).mean(-1) - 0.5
    even = tiles.psnr({"h": 1e3})  # scores of nearly 0: the mean of all pixels
    assert even.item() == pytest.approx(-10 * math.log10(mean.square().mean()), abs=0.01)


def test_interval(thresholds):
    mean, half = thresholds.interval([1.0, 2.0, 4.0, 5.0])
    # s = sqrt((4 + 1 + 1 + 4) / 3), half of the interval is 3.182446 s / sqrt(4)
    assert mean == 3 and half == pytest.approx(3.182446 * math.sqrt(10 / 3) / 2, rel=1e-6)
    mean, half = thresholds.interval([7.0])
    assert mean == 7 and math.isnan(half)


def test_table(thresholds):
    def run(test, train):
        spread = {"alpha": [1.0, 2.0 + test - 20, 3.0]}
        photographs = {"coffee": test - 1, "rocket": test + 1}
        figures = {"test": test, "by photograph": photographs, "train": train, "moved": 0.0}
        return figures | {"start": {"alpha": 1.5}, "quantiles": spread}

    runs = {str(i): {name: run(20.0 + i, 30.0) for name in thresholds.METHODS} for i in range(2)}
    for i in runs:
        del runs[i]["fitted to the clean, band 2"]["train"]
    runs["0"]["learned alpha"], runs["1"]["learned alpha"] = run(20.5, 30.25), run(21.75, 29.75)
    runs["1"]["learned alpha"]["by photograph"] = {"coffee": 19.75, "rocket": 23.75}
    runs["1"]["near-dense, no gradient"]["moved"] = 0.125
    runs["2"] = {"dense": run(50.0, 50.0)}  # interrupted: does not count
    settings = {"steps": 3, "side": 10, "noise": 0.1, "grey": True, "methods": thresholds.METHODS}
    results = {"settings": settings, "runs": runs, "ceilings": {"0": 1.0, "1": 2.0, "2": 9.0}}
    text = thresholds.table(results)
    # gains 0.5 and 0.75: t = 12.7062, s / sqrt(2) = 0.125
    better, same = "3 of 4 (-0.25 to +1.75)", "0 of 4 (+0.00 to +0.00)"
    for row in (
        f"| learned alpha | 21.12 ± 7.94 | +0.625 ± 1.588 | {better} | +0.000 ± 3.177 | 3.12 (1.00 to 3.00) |",
        "| fixed alpha | 20.50 ± 6.35 | +0.000 ± 0.000 | - | +0.000 ± 0.000 | 1.50 |",
        f"| fitted to the clean, band 2 | 20.50 ± 6.35 | +0.000 ± 0.000 | {same} | - | 2.50 (1.00 to 3.00) |",
    ):
        assert row in text.splitlines()
    assert "Test PSNR of 2 seeds, 10 x 10 tiles, noise 0.1,\n3 steps with grey photographs too;" in text
    assert "without a gradient was 0.125." in text and "would gain +1.50 ± 6.35 dB" in text


def test_checks_and_rounding(thresholds):
    assert thresholds.checks(3) == [0, 1, 2, 3]
    assert thresholds.checks(300) == list(range(0, 301, 15))
    assert thresholds.rounded({"a": [0.7999999999999999, 1e-30, 0.0], "b": 3}) == {"a": [0.8, 1e-30, 0.0], "b": 3}


def test_runs_from_the_command_line(thresholds, finished):
    results = json.loads(finished.read_text())
    assert list(results["runs"]) == ["0", "1"] == list(results["ceilings"])
    for runs in results["runs"].values():
        assert list(runs) == list(thresholds.METHODS)
        for name, run in runs.items():
            method = thresholds.METHODS[name]
            assert len(run.get("curve", [])) == 4 * bool(method.learns and not method.fitted)
    text = finished.with_suffix(".md").read_text()
    assert text == thresholds.table(results) and "nan" not in text
    assert skimage.io.imread(finished.with_suffix(".png")).std() > 1
    assert max(len(line) for line in finished.read_text().splitlines()) < 600  # a line for every run
    assert sorted(x.name for x in finished.parent.iterdir()) == ["out.json", "out.md", "out.png"]


def test_runs_some_methods(thresholds, tmp_path):
    """Beside the reference; steps count, and what is not run is missing in the table."""
    path = tmp_path / "out.json"
    results = thresholds.main([*SMALL, "--methods", "learned h", "--out", str(path)])
    assert [list(runs) for runs in results["runs"].values()] == [["fixed alpha", "learned h"]] * 2
    text = path.with_suffix(".md").read_text()
    assert text.count("\n| ") == 4 and "without a gradient" not in text
    assert skimage.io.imread(path.with_suffix(".png")).std() > 1


@pytest.mark.slow
def test_goes_on_where_it_was_interrupted(thresholds, finished, tmp_path, monkeypatch):
    path, run, left = tmp_path / "out.json", thresholds.Seed.run, [len(thresholds.METHODS) + 3]

    def interrupted(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(thresholds.Seed, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        thresholds.main([*SMALL, "--out", str(path)])
    assert [len(x) for x in json.loads(path.read_text())["runs"].values()] == [len(thresholds.METHODS), 3]
    left[0] = len(thresholds.METHODS) - 3  # what is missing, not one more
    thresholds.main([*SMALL, "--out", str(path)])
    assert path.read_bytes() == finished.read_bytes()
    assert path.with_suffix(".md").read_bytes() == finished.with_suffix(".md").read_bytes()


@pytest.mark.parametrize("path", sorted(RESULTS.parent.glob("*.json")), ids=lambda path: path.name)
def test_committed_tables_are_of_the_committed_results(path, thresholds, tmp_path, monkeypatch):
    """The command runs nothing there, and renders; of RESULTS it needs no arguments."""
    monkeypatch.delattr(thresholds.Seed, "__init__")
    monkeypatch.setattr(thresholds, "SIZE", 128)
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    settings = json.loads(path.read_text())["settings"]
    options = [f"--{name}={settings[name]}" for name in ("steps", "side", "noise")] + ["--grey"] * settings["grey"]
    arguments = [] if path == RESULTS else [*options, "--methods", *settings["methods"]]
    thresholds.main([*arguments, "--out", str(copy)])
    assert copy.with_suffix(".md").read_text() == path.with_suffix(".md").read_text()
    assert copy.with_suffix(".png").stat().st_size > 10_000
    assert copy.read_text() == thresholds.layout(json.loads(copy.read_text())) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--steps", "-1"], "--steps must be at least 1, got -1"),
        (["--side", "9"], "--side must be from 10 to 20, got 9"),
        (["--side", "21"], "--side must be from 10 to 20, got 21"),
        (["--noise", "0"], "--noise must be > 0 and finite, got 0.0"),
        (["--noise", "nan"], "--noise must be > 0 and finite, got nan"),
        (["--methods", "learned"], "invalid choice: 'learned'"),
        (["--out", "results.txt"], "--out must end in .json, got 'results.txt'"),
        (["--out", "no/such/folder.json"], "there is no folder 'no/such'"),
    ],
)
def test_experiments_that_cannot_be(thresholds, arguments, message, capsys):
    small = [] if "--side" in arguments else ["--side", "10"]
    with pytest.raises(SystemExit):
        thresholds.main([*small, *arguments])
    assert message in capsys.readouterr().err


def test_results_that_cannot_be_written_are_told_first(thresholds, tmp_path, monkeypatch):
    monkeypatch.delattr(thresholds, "Seed")
    (tmp_path / "out.png").mkdir()
    with pytest.raises(thresholds.files.FileError, match=r"out\.png cannot be written: it is there and no file"):
        thresholds.main([*SMALL, "--out", str(tmp_path / "out.json")])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"settings": {}}',
        '{"settings": 3, "runs": {}, "ceilings": {}}',
        '{"settings": {"methods": 3}, "runs": {}, "ceilings": {}}',
    ],
)
def test_a_file_of_something_else(thresholds, text, tmp_path):
    path = tmp_path / "out.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=re.escape(f"'{path}' holds no results of this script")):
        thresholds.main([*SMALL, "--out", str(path)])
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--steps", "4"], "steps 3 instead of 4: remove it"),
        (["--methods", "learned h", "--noise", "0.2"], r"other methods \(dense, .*\), noise 0.1 instead of 0.2: "),
    ],
)
def test_results_of_other_settings(changes, message, thresholds, finished):
    before = finished.read_bytes()
    with pytest.raises(SystemExit, match=f"is of other settings: {message}"):
        thresholds.main([*SMALL, *changes, "--out", str(finished)])
    assert finished.read_bytes() == before
