"""The segmentation example's ablation: figures of made-up runs, and a real one of two steps."""

import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from asa_ops import nn as blocks
from examples.segmentation import ablation, cli
from examples.segmentation.config import NO_BLOCK, Config, ConfigError


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_up(folder, name: str, seed: int, miou: float, **changes) -> None:
    told = {
        "variant": name, "seed": seed, "steps": 40, "miou": miou, "iou": [miou] * 5, "loss": 0.5, "seconds": 0.1,
        "bytes": 2_000_000, "curve": [],
    }  # fmt: skip
    ablation.path_of(folder, name, seed).write_text(json.dumps(told | changes))


def test_interval_by_hand():
    """Of 1, 2, 3: the deviation is 1, Student's t of 2 degrees of freedom 4.3027."""
    mean, half = ablation.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert ablation.interval([5.0])[0] == 5 and math.isnan(ablation.interval([5.0])[1])


def test_table_and_plot_of_made_up_runs(tmp_path, capsys):
    for seed, miou in enumerate((0.5, 0.6)):
        curve = [[2, 100 + seed, 0.1, 0.2, 0.3], [40, 10 + seed, 0.5, 1.0 + seed, 3.0]]
        made_up(tmp_path, "asa, no gradient", seed, miou)
        made_up(tmp_path, "asa", seed, miou + 0.01 * (seed + 1), curve=curve, seconds=0.2)
    made_up(tmp_path, "none", 1, 0.4, bytes=None, seconds=None)
    made_up(tmp_path, "none", 2, 0.3)  # a seed that the reference has not: no part of the gain
    ablation.main(["--variants", "asa", "--seeds", "2", "--out", str(tmp_path)])  # all there: nothing runs
    text = (tmp_path / "ablation.md").read_text()
    assert text in capsys.readouterr().out
    size, pictures = (Config.load("shapes").data_options[name] for name in ("size", "pictures"))
    assert f"{size} x {size}, 40 steps, validated on {pictures} pictures" in text and "of 256," in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == ["none", "asa, no gradient", "asa"]  # in the order of VARIANTS
    of = {row[0]: row[1:] for row in rows[1:]}
    # 51 and 62: the deviation is 7.778, Student's t of one degree of freedom 12.706; the gains are 1 and 2
    assert of["asa"] == ["2", "56.50 ± 69.88", "+1.50 ± 6.35", "100", "10", "1.50 (0.50 to 3.00)", "200", "2"]
    assert of["asa, no gradient"] == ["2", "55.00 ± 63.53", "-", "-", "-", "-", "100", "2"]
    assert of["none"] == ["2", "35.00 ± 63.53", "-20.00 ± nan", "-", "-", "-", "100", "2"]
    assert np.asarray(PIL.Image.open(tmp_path / "ablation.png")).std() > 1


def test_runs_that_do_not_fit(tmp_path):
    made_up(tmp_path, "asa", 0, 0.5)
    made_up(tmp_path, "asa", 1, 0.5, steps=50)
    with pytest.raises(ConfigError, match=r"runs of different lengths, {40: 'asa-0\.json', 50: 'asa-1\.json'}"):
        ablation.read(tmp_path)
    path = ablation.path_of(tmp_path, "asa", 1)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"asa-1\.json is broken"):
        ablation.read(tmp_path)
    path.write_text('{"steps": 40}')
    with pytest.raises(ConfigError, match=r"asa-1\.json is not of this experiment"):
        ablation.read(tmp_path)


def test_a_run_of_two_steps(tmp_path):
    """What it leaves is what the table reads; survivors and thresholds are those of a near-dense start."""
    command = ["--steps", "2", "--out", str(tmp_path)]
    ablation.main(["--one", "asa", "3", *command])
    assert [path.name for path in tmp_path.iterdir()] == ["asa-3.json"]
    ((name, runs),) = ablation.read(tmp_path).items()
    told = runs[3]
    assert (name, told["steps"]) == ("asa", 2) and 0 <= told["miou"] <= 1 and len(told["iou"]) == 5
    assert told["seconds"] > 0 and (told["bytes"] is None or told["bytes"] > 0)
    ((step, survivors, low, median, high),) = told["curve"]  # the first step gives the block's input
    assert step == 2 and 128 < survivors <= 256 and 0 <= low <= median <= high
    assert "| asa | 1 | " in ablation.table({name: runs})


def test_variants_are_what_they_say():
    """Every block of the library is among them, and the names that say so have thresholds without a gradient."""
    assert {block for block, _ in ablation.VARIANTS.values()} == {NO_BLOCK, *blocks.available()}
    assert ablation.REFERENCE in ablation.VARIANTS
    x = torch.randn(1, 8, 6, 6)
    for name, (block, options) in ablation.VARIANTS.items():
        if block != "asa":
            continue
        module = blocks.build(block, 8, **options)
        nn.init.normal_(module.proj.weight)
        module(x).square().sum().backward()
        learns = module.alpha.weight.grad is not None and bool(module.alpha.weight.grad.any())
        assert learns == (not any(word in name for word in ("published", "no gradient"))), name


def test_what_went_wrong_is_told(tmp_path, monkeypatch, capsys):
    def half_of_them(name, seed, steps, path):
        if seed == 1:
            return f"{name}, seed 1: no memory"
        made_up(path.parent, name, seed, 0.5)
        return None

    monkeypatch.setattr(ablation, "run_in_process", half_of_them)
    with pytest.raises(SystemExit, match="error: 1 of 2 runs failed"):
        ablation.main(["--variants", "none", "--seeds", "2", "--out", str(tmp_path)])
    told = capsys.readouterr()
    assert "none, seed 1: no memory" in told.out + told.err
    assert "| none | 1 |" in (tmp_path / "ablation.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--one", "sparse", "0"], "--one takes a variant and a seed, got 'sparse' '0'"),
        (["--one", "asa", "x"], "--one takes a variant and a seed, got 'asa' 'x'"),
        (["--variants", "sparse"], "invalid choice: 'sparse'"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main_of(lambda: ablation.main([*arguments, "--out", str(tmp_path)]))
    assert message in capsys.readouterr().err
