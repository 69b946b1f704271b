"""Segmentation among distractors: the pictures, one run, what is kept of runs, and the table and the plot of them."""

import argparse
import importlib
import json
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from asa_ops import nn as blocks
from examples import files
from examples.distractors import pictures, report, train
from examples.distractors.pictures import FAMILIES, MARKED, MOST, PLAIN, SIDE, TILE, VOID

study = importlib.import_module("examples.distractors.__main__")
RESULTS = Path(study.__file__).parents[1] / "results"


def tiles_of(image: np.ndarray) -> np.ndarray:
    """Return the pixels of every tile of pictures [B, 3, SIDE * TILE, SIDE * TILE], [B, SIDE, SIDE, pixels]."""
    tiles = image.reshape(-1, 3, SIDE, TILE, SIDE, TILE).transpose(0, 2, 4, 1, 3, 5)
    return tiles.reshape(-1, SIDE, SIDE, 3 * TILE * TILE)


def changed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (tiles_of(a) != tiles_of(b)).any(-1)


# The pictures.


def test_pictures_among_distractors_are_of_seed_and_index():
    both = pictures.make((3, 1), [7, 4], np.array([30, 80]))
    for i, (index, count) in enumerate(((7, 30), (4, 80))):
        for one, of_both in zip(pictures.make((3, 1), [index], count), both, strict=True):
            np.testing.assert_array_equal(one[0], of_both[i])
    assert (pictures.make((3, 2), [7], 30).family != both.family[0]).any()
    assert both.image.shape == (2, 3, SIDE * TILE, SIDE * TILE) and both.image.dtype == np.float32
    assert both.image.min() >= 0 and both.image.max() <= 1


def test_the_number_of_distractors():
    made = {count: pictures.make((0,), range(3), count) for count in (0, 40, 41, MOST)}
    for count, each in made.items():
        assert ((each.family == FAMILIES).sum((1, 2)) == count).all()
        for family in range(FAMILIES):
            of_family = each.family == family
            assert ((of_family & (each.label != VOID)).sum((1, 2)) == PLAIN).all()
            assert ((of_family & (each.mark != VOID)).sum((1, 2)) == MARKED).all()
        np.testing.assert_array_equal(each.label, made[0].label)
    assert (made[MOST].family >= 0).all()
    one = changed(made[40].image, made[41].image)  # they are the same with one more
    assert (one.sum((1, 2)) == 1).all() and (made[41].family[one] == FAMILIES).all()


def test_far_marks_alone_tell_the_class(monkeypatch):
    """Another class of a family changes the marks of its tiles on the right and the labels on the left, no more."""
    before = pictures.make((0,), range(4), 100)
    draw = pictures.draw

    def another(*arguments) -> pictures.Draw:
        told = draw(*arguments)
        told.classes[2] = (told.classes[2] + 1) % pictures.CLASSES
        return told

    monkeypatch.setattr(pictures, "draw", another)
    after = pictures.make((0,), range(4), 100)
    of_family = before.family == 2
    plain, marked = of_family & (before.label != VOID), of_family & (before.mark != VOID)
    np.testing.assert_array_equal(after.label != before.label, plain)
    np.testing.assert_array_equal(after.label[plain], (before.label[plain] + 1) % pictures.CLASSES)
    np.testing.assert_array_equal(changed(before.image, after.image), marked)
    columns = [np.nonzero(each)[2] for each in (plain, marked)]
    assert columns[1].min() - columns[0].max() > SIDE - 2 * pictures.BAND

    torch.manual_seed(0)
    images = [torch.from_numpy(np.ascontiguousarray(each.image)) for each in (before, after)]
    for block, sees in ((None, False), ("non_local", True)):
        model = train.Network(block)
        if block:
            nn.init.normal_(model.block.proj.weight)
        a, b = (model(image).detach().movedim(1, -1)[torch.from_numpy(plain)] for image in images)
        assert torch.equal(a, b) != sees


def test_like_codes_find_the_class(monkeypatch):
    """Without noise and with one light the most alike marked tile is of a plain tile's family."""
    for name in ("NOISE", "LIGHT"):
        monkeypatch.setattr(pictures, name, 0.0)
    made = pictures.make((0,), range(2), MOST)
    for i in range(2):
        corners = made.image[i].reshape(3, SIDE, TILE, SIDE, TILE)[:, :, :: TILE - 1, :, :: TILE - 1]
        code = corners.transpose(1, 3, 0, 2, 4).reshape(SIDE, SIDE, -1)
        plain, marked = made.label[i] != VOID, made.mark[i] != VOID
        distance = np.linalg.norm(code[plain][:, None] - code[marked], axis=-1)
        np.testing.assert_array_equal(made.mark[i][marked][distance.argmin(1)], made.label[i][plain])


# One run.


def test_all_blocks_are_among_the_variants():
    assert {settings["block"] for settings in train.VARIANTS.values()} == {None, *blocks.available()}
    image = torch.rand(2, 3, SIDE * TILE, SIDE * TILE)
    for settings in train.VARIANTS.values():
        network = train.Network(**{name: x for name, x in settings.items() if name != "threshold_rate"})
        assert network(image).shape == (2, pictures.CLASSES, SIDE, SIDE)


def test_alpha_starts_where_a_variant_says():
    network = train.Network("asa", start=1.0)
    alpha = network.block.tokens(torch.zeros(1, train.CHANNELS, SIDE, SIDE))["alpha"]
    assert torch.equal(alpha, torch.ones_like(alpha))


def test_miou_of_a_confusion():
    # Of class 0 two are right and one is taken for class 1, which is always right: 2 / 3 and 3 / 4.
    assert train.miou(torch.tensor([[2, 1], [0, 3]])) == pytest.approx((2 / 3 + 3 / 4) / 2)


@pytest.mark.parametrize("optimizer", train.RATES)
def test_a_run_learns_and_repeats(optimizer, one_thread):
    told = train.Run("asa", optimizer, 0.01, 0, 3)
    first, again = (train.run(told, [0, 200], 5, 5) for _ in range(2))
    assert first.pop("seconds") > 0 and again.pop("seconds") > 0 and first == again
    assert all(0 <= score <= 1 for name in ("validation", "test") for score in first[name])
    assert len(first["survivors"]) == 2 and all(0 < count <= SIDE * SIDE for count in first["survivors"])
    assert first["alpha"] == sorted(first["alpha"]) and first["loss"] > 0
    assert all(0 <= score <= 1 for each in train.WITHOUT for score in first["without"][each])
    assert train.run(train.Run("none", optimizer, 0.01, 0, 1), [0], 5, 5)["survivors"] is None


def test_a_block_with_other_arguments():
    """Without any, it is the block; without thresholds, the dense block of the same weights."""
    torch.manual_seed(0)
    block = train.Network("asa", {"norm": "batch"}, start=1.0).block.eval()
    nn.init.ones_(block.norm.weight)
    x = torch.randn(2, train.CHANNELS, 6, 5)
    torch.testing.assert_close(train.Changed(block, {})(x), block(x))
    dense = blocks.build("non_local", train.CHANNELS, norm="batch").eval()
    dense.load_state_dict(block.state_dict(), strict=False)
    kept = train.Changed(block, train.WITHOUT["thresholds"])(x)
    torch.testing.assert_close(kept, dense(x))
    apart = [kept, block(x), train.Changed(block, train.WITHOUT["reciprocity"])(x)]
    assert not any(torch.allclose(apart[i], apart[i - 1]) for i in range(3))


def test_a_run_whose_loss_is_no_number_ends():
    told = train.run(train.Run("non_local", "sgd", 1e30, 0, 6), [0], 5, 5)
    assert told["loss"] is None and told["test"][0] < 0.3
    json.dumps(told, allow_nan=False)


# All of them.

MACHINE = {"commit": "abc", "processor": "one", "torch": "2"}


def made_up(variant: str, seed: int, test: float, rate: float = 0.01, **changes) -> dict:
    survivors = [30.0 + seed, 20.0] if variant.startswith("asa") else None
    return {
        "variant": variant, "optimizer": "adamw", "rate": rate, "seed": seed, "steps": 600, "distractors": [0, 200],
        "validation": [0.9, 0.5], "test": [0.9, test], "survivors": survivors, "alpha": None, "loss": 0.1,
        "without": None,
        "seconds": 0.02 + 0.001 * seed,
    } | MACHINE | changes  # fmt: skip


def other_rates(variant: str, **changes) -> list[dict]:
    """Return runs of seed 0 that are worse in validation than those above, and better where it must not count."""
    rates = [rate for rate in train.RATES["adamw"] if rate != 0.01]
    return [made_up(variant, 0, 0.99, rate, **({"validation": [0.9, 0.4]} | changes)) for rate in rates]


def put(path: Path, *runs: dict) -> Path:
    path.write_text("".join(json.dumps(told) + "\n" for told in runs))
    return path


def test_the_table_of_distractors_is_of_the_runs(tmp_path):
    scores = {"non_local": (0.5, 0.52, 0.54), "asa": (0.62, 0.62, 0.65), "none": (0.2,)}
    runs = [made_up(variant, seed, x) for variant, of_seeds in scores.items() for seed, x in enumerate(of_seeds)]
    runs += [each for variant in scores for each in other_rates(variant)]
    runs.append(made_up("linear_attention", 0, 0.3))  # not all rates of it have run yet
    lines = report.read(put(tmp_path / "runs.jsonl", *runs))
    text = report.page(lines)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[:3] for row in rows] == [["none", "0.01", "1"], ["non_local", "0.01", "3"], ["asa", "0.01", "3"]]
    # half of the interval: t(0.975, 2 degrees of freedom) = 4.303 times the deviation over sqrt(3)
    assert rows[1][3:] == [
        "90.0 ± 0.0", f"52.0 ± {4.303 * 2 / math.sqrt(3):.1f}", "+0.0 ± 0.0", "+11.0 ± 2.5", "-", "-", "21.0"
    ]  # fmt: skip
    assert rows[0][3:] == ["90.0", "20.0", "+0.0", "+42.0", "-", "-", "20.0"]  # one seed has no interval
    assert rows[2][5:] == ["-", "-", "31", "20", "21.0"]
    assert "one, torch 2, commit abc" in text and "reciprocity |" not in text
    assert "Not all learning rates have run of linear_attention: left out." in text
    for run, told in lines.items():
        if run.variant == "asa":
            told["without"] = {"reciprocity": [0.9, 0.5 + told["test"][1]], "thresholds": [0.8, 0.0]}
    assert "| asa | reciprocity | 3 | +0.0 ± 0.0 | +50.0 ± 0.0 |" in report.page(lines)
    assert "| asa | thresholds | 3 | -10.0 ± 0.0 | -63.0 ± 4.3 |" in report.page(lines)
    report.draw(tmp_path / "plot.png", lines)
    assert np.asarray(PIL.Image.open(tmp_path / "plot.png")).std() > 1


def test_the_rate_is_chosen_in_validation_on_seed_0():
    runs = [*other_rates("asa"), made_up("asa", 1, 0.9, 0.003, validation=[1.0, 1.0])]
    lines = {train.Run(*(told[name] for name in train.Run.__dataclass_fields__)): told for told in runs}
    assert report.best_rate(lines, "asa", "adamw", 600) == (None, train.Run("asa", "adamw", 0.01, 0, 600))
    lines |= {train.Run("asa", "adamw", 0.01, 0, 600): made_up("asa", 0, 0.1)}
    assert report.best_rate(lines, "asa", "adamw", 600) == (0.01, None)
    ablation = made_up("asa, rate 1", 0, 0.1)
    lines |= {train.Run("asa, rate 1", "adamw", 0.01, 0, 600): ablation}
    assert report.choose(lines, "adamw")["asa, rate 1"] == (0.01, {0: ablation})


@pytest.mark.parametrize(
    ("scores", "best", "tried"),
    [
        ({0.1: 0.2, 0.2: 0.5, 0.4: 0.3}, 0.2, [0.1, 0.2, 0.4]),
        ({0.1: 0.5, 0.2: 0.4, 0.4: 0.3, 0.05: 0.4}, 0.1, [0.1, 0.2, 0.4, 0.05]),
        ({0.1: 0.5, 0.2: 0.4, 0.4: 0.3, 0.05: 0.6, 0.025: 0.7}, 0.025, [0.1, 0.2, 0.4, 0.05, 0.025]),
        ({0.1: 0.3, 0.2: 0.4, 0.4: 0.5, 0.8: 0.6, 1.6: 0.7}, 1.6, [0.1, 0.2, 0.4, 0.8, 1.6]),
    ],
    ids=["within", "least", "smallest", "largest"],
)
@pytest.mark.parametrize("variants", [["asa", "asa, rate 1"], ["asa, rate 1"]], ids=["all", "ablation"])
def test_rates_run_until_the_best_lies_within(scores, best, tried, variants):
    """And go on from any of the runs."""
    options = argparse.Namespace(seeds=2, optimizers=["sgd"], variants=variants, steps=600)

    def run(lines, most):
        ran = []
        for each in study.missing(lines, options):
            if len(ran) == most:
                break
            ran.append(each)
            lines[each] = {"validation": [scores[each.rate] if each.variant == "asa" else 1.0]}
        return ran

    lines = {}
    ran = run(lines, 99)
    assert [each.rate for each in ran if (each.variant, each.seed) == ("asa", 0)] == tried
    assert {(each.variant, each.rate, each.seed) for each in ran} == {
        *(("asa", rate, 0) for rate in tried),
        *((variant, best, seed) for variant in variants for seed in range(2)),
    }
    assert report.best_rate(lines, "asa", "sgd", 600) == (best, None) and not run(lines, 99)
    again = {}
    assert [each for most in [1, 2, 99] for each in run(again, most)] == ran


def test_runs_among_distractors_go_on(tmp_path, monkeypatch, capsys, one_thread):
    """An interrupted command, given again, leaves what an uninterrupted one does, and then runs nothing more."""
    drawn = []
    monkeypatch.setattr(report, "draw", lambda path, lines: drawn.append((path, len(lines))))
    monkeypatch.setattr(study, "VALIDATION", 2)
    monkeypatch.setattr(study, "TEST", 2)
    monkeypatch.setitem(train.RATES, "adamw", (0.01, 0.03))
    monkeypatch.setitem(train.FURTHER, "adamw", ((), ()))
    command = ["--variants", "none", "asa", "--optimizers", "adamw", "--seeds", "2", "--steps", "2"]
    command += ["--distractors", "50"]
    whole, parts = (tmp_path / name / "runs.jsonl" for name in ("whole", "parts"))
    study.main([*command, "--out", str(whole)])
    page = capsys.readouterr().out.strip()
    assert page == whole.with_suffix(".md").read_text().strip()
    assert drawn == [(whole.with_suffix(".png"), 6)]

    started = []

    def interrupted(run, *others):
        started.append(run)
        if len(started) == 4:
            raise KeyboardInterrupt
        return train.run(run, *others)

    monkeypatch.setattr(study, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.main([*command, "--out", str(parts)])
    assert len(report.read(parts)) == 3
    for _ in range(2):
        study.main([*command, "--out", str(parts)])
    a, b = ([told | {"seconds": 0} for told in report.read(path).values()] for path in (whole, parts))
    assert a == b and len(a) == 6 and len(started) == 7
    study.main(["--report", "--out", str(parts)])
    assert len(started) == 7
    with pytest.raises(report.ResultError, match=r"runs\.jsonl has steps 2, not 4: name another --out"):
        study.main([*command, "--steps", "4", "--out", str(parts)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"runs\.jsonl, line 2, is broken"),
        ("[1]", r"line 2, must be a JSON object, got '\[1\]'"),
        ("{}", "line 2, is not of this experiment: it has no commit, distractors,"),
        (json.dumps(made_up("nothing", 1, 0.5)), "line 2, is of 'nothing', expected one of none, non_local"),
        (json.dumps(made_up("none", 0, 0.6)), r"line 2, has Run\(variant='none'.* again: remove one"),
        (json.dumps(made_up("none", 1, 0.5, steps=30)), "line 2, has steps 30, the first line 600"),
        (json.dumps(made_up("none", 1, 0.5, distractors=[1])), r"line 2, has distractors \[1\], the first"),
    ],
    ids=["broken", "no object", "foreign", "unknown", "twice", "steps", "distractors"],
)
def test_lines_that_do_not_fit(line, message, tmp_path):
    path = put(tmp_path / "runs.jsonl", made_up("none", 0, 0.5))
    files.append(path, line + "\n")
    with pytest.raises((files.FileError, report.ResultError), match=message):
        report.read(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--distractors 5 1000", f"--distractors must be from 0 to {MOST}, got 1000"),
        ("--variants dense", "invalid choice: 'dense'"),
        ("--out runs.md", "the table and the plot go beside it: got 'runs.md'"),
    ],
)
def test_options_of_the_study(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        study.main(arguments.split())
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["distractors", "distractors-1800"])
def test_the_committed_page_is_of_the_committed_runs(name):
    lines = report.read(RESULTS / f"{name}.jsonl")
    assert report.page(lines) == (RESULTS / f"{name}.md").read_text()
    assert (RESULTS / f"{name}.png").stat().st_size > 10_000
