"""The ablation on shapes: every variant builds, runs are kept, and the table and the plot are of them."""

import json
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import segmentation_cases as cases
import torch
from torch import nn

from asa_ops import nn as blocks
from examples import files
from examples.segmentation import ablation
from examples.segmentation.config import NO_BLOCK, Config, ConfigError
from examples.segmentation.model import Segmenter

RESULTS = Path(ablation.__file__).parent / "results"


def made_up(variant: str, seed: int, miou: float, **changes) -> dict:
    curve = [[10, 200.0, 0.1, 0.2, 0.3], [20, 50.0 + seed, 0.5, 0.6, 0.8]] if variant.startswith("asa") else []
    return {
        "variant": variant, "seed": seed, "steps": 20, "miou": miou, "iou": [miou] * 5, "loss": 0.3, "seconds": 0.1,
        "bytes": 5_000_000, "curve": curve,
    } | changes  # fmt: skip


def put(folder, *runs: dict) -> None:
    for told in runs:
        ablation.path_of(folder, told["variant"], told["seed"]).write_text(json.dumps(told))


@pytest.mark.parametrize("variant", ablation.VARIANTS)
def test_every_variant_builds(variant):
    network = Segmenter(Config.load("shapes").replace(**ablation.VARIANTS[variant]), 5)
    assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5, 16, 16)


def test_the_library_is_among_the_variants():
    """Every block is, and the names that say so have thresholds without a gradient, no others."""
    assert {settings["block"] for settings in ablation.VARIANTS.values()} == {NO_BLOCK, *blocks.available()}
    for name, settings in ablation.VARIANTS.items():
        if settings["block"] == "asa":
            module = blocks.build("asa", 8, **settings["block_options"])
            nn.init.normal_(module.proj.weight)
            module(torch.randn(1, 8, 6, 6)).square().sum().backward()
            gradient = module.alpha.weight.grad
            learns = gradient is not None and bool(gradient.any())
            assert learns == (not name.endswith(("published", "no gradient"))), name


def test_the_table_is_of_the_runs(tmp_path):
    scores = {"none": (0.5, 0.52, 0.54), "asa, no gradient": (0.6, 0.61, 0.62), "asa": (0.62, 0.62, 0.65)}
    scores |= {"asa, softplus": (0.55,) * 3, "asa, softplus, no gradient": (0.53,) * 3}
    for variant, of_seeds in scores.items():
        put(tmp_path, *(made_up(variant, seed, miou) for seed, miou in enumerate(of_seeds)))
    runs = ablation.read(tmp_path)
    assert list(runs) == [name for name in ablation.VARIANTS if name in scores]
    lines = [line.split(" | ") for line in ablation.table(runs).splitlines() if line.startswith("| ")]
    rows = {name.removeprefix("| "): cells for name, *cells in lines}
    assert len(rows) == 7  # with the titles and the line below
    # half of the interval: t(0.975, 2 degrees of freedom) = 4.303 times the deviation over sqrt(3)
    assert rows["none"][:4] == ["3", f"52.00 ± {4.303 * 2 / math.sqrt(3):.2f}", "-9.00 ± 2.48", "-"]
    assert rows["asa, no gradient"][2:5] == ["-", "200", "51"]
    assert rows["asa"][2:6] == ["+2.00 ± 2.48", "200", "51", "0.60 (0.50 to 0.80)"]
    assert rows["asa"][6:] == ["100", "5 |"]
    assert rows["asa, softplus, no gradient"][2] == "-8.00 ± 2.48" and rows["asa, softplus"][2] == "+2.00 ± 0.00"
    ablation.draw(tmp_path / "plot.png", runs)
    assert np.asarray(PIL.Image.open(tmp_path / "plot.png")).std() > 1


def test_a_run_tells_what_it_did(tmp_path, monkeypatch):
    config = cases.tiny()
    monkeypatch.setattr(Config, "load", lambda name: config)
    ablation.run("asa", 0, 6, path := tmp_path / "asa-0.json")
    told = json.loads(path.read_text())
    assert (told["variant"], told["seed"], told["steps"]) == ("asa", 0, 6)
    assert 0 <= told["miou"] <= 1 and len(told["iou"]) == 5 and told["seconds"] > 0
    assert [point[0] for point in told["curve"]] == [2, 3, 4, 5, 6]  # the first step has yet no input to look at
    assert all(0 <= point[1] <= 256 and point[2] <= point[3] <= point[4] for point in told["curve"])
    ablation.run("none", 0, 2, path := tmp_path / "none-0.json")
    assert json.loads(path.read_text())["curve"] == []


def test_finished_runs_are_kept(tmp_path, monkeypatch, capsys):
    started = []

    def run(name, seed, steps, path):
        started.append((name, seed))
        if name == "non_local":
            return "non_local, seed 0: it broke"
        return put(tmp_path, made_up(name, seed, 0.5))

    monkeypatch.setattr(ablation, "run_in_process", run)
    put(tmp_path, made_up("none", 0, 0.4))
    command = ["--variants", "none", "asa", "non_local", "--seeds", "2", "--steps", "20", "--jobs", "1"]
    command += ["--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="2 of 5 runs failed"):
        ablation.main(command)
    assert started == [("asa", 0), ("non_local", 0), ("none", 1), ("asa", 1), ("non_local", 1)]
    text = capsys.readouterr()
    assert "| asa | 2 |" in text.out and "it broke" in text.out + text.err
    assert (tmp_path / "ablation.md").read_text() in text.out and (tmp_path / "ablation.png").stat().st_size > 1000
    assert [path.name for path in tmp_path.glob("*.json")] == ["ablation.json"]
    put(tmp_path, made_up("asa", 2, 0.5))  # one more beside those gathered
    with pytest.raises(SystemExit, match="2 of 2 runs failed"):
        ablation.main(command)
    assert "| asa | 3 |" in (tmp_path / "ablation.md").read_text()


@pytest.mark.parametrize("folder", sorted(RESULTS.iterdir()), ids=lambda folder: folder.name)
def test_committed_tables_are_of_the_committed_runs(folder, tmp_path, monkeypatch):
    """The command runs nothing there, and renders."""
    monkeypatch.delattr(ablation, "run_in_process")
    (tmp_path / "ablation.json").write_bytes((folder / "ablation.json").read_bytes())
    runs = ablation.read(tmp_path)
    assert all(len(seeds) >= 5 for seeds in runs.values())
    ablation.main(["--variants", *runs, "--steps", folder.name, "--out", str(tmp_path)])
    for name in ("ablation.json", "ablation.md"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert (folder / "ablation.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"none-1\.json is broken"),
        ("[{}]", r"none-1\.json is not of this experiment"),
        (json.dumps(made_up("nothing", 1, 0.5)), r"none-1\.json has a run of 'nothing', expected one of none, "),
        (json.dumps(made_up("none", 0, 0.6)), r"none-1\.json has another 'none' of seed 0 than a file beside it"),
        (json.dumps(made_up("none", 1, 0.5, steps=30)), "has runs of different lengths"),
    ],
    ids=["broken", "foreign", "unknown", "twice", "lengths"],
)
def test_runs_that_do_not_fit(content, message, tmp_path):
    put(tmp_path, made_up("none", 0, 0.5))
    (tmp_path / "none-1.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        ablation.read(tmp_path)


def test_a_run_is_not_replaced_by_that_which_its_file_is_named_after(tmp_path, monkeypatch):
    monkeypatch.delattr(ablation, "run_in_process")
    path = ablation.path_of(tmp_path, "none", 0)
    path.write_text(json.dumps(made_up("asa", 3, 0.5)))
    with pytest.raises(files.FileError, match=r"none-0\.json would replace .*none-0\.json, which is read"):
        ablation.main(["--variants", "none", "--seeds", "1", "--steps", "20", "--out", str(tmp_path)])
    assert json.loads(path.read_text()) == made_up("asa", 3, 0.5) and list(tmp_path.iterdir()) == [path]


def test_runs_of_another_length_are_told_before_any_is_started(tmp_path, monkeypatch):
    monkeypatch.delattr(ablation, "run_in_process")
    put(tmp_path, made_up("none", 0, 0.5))
    with pytest.raises(ConfigError, match="has runs of 20 steps, not 30: give --steps or an --out"):
        ablation.main(["--variants", "none", "--steps", "30", "--out", str(tmp_path)])


@pytest.mark.slow
def test_a_process_of_its_own(tmp_path):
    ablation.main(["--variants", "none", "asa", "--seeds", "1", "--steps", "2", "--jobs", "1", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.glob("*.json")} == {"ablation.json"}
    assert {name: list(seeds) for name, seeds in ablation.read(tmp_path).items()} == {"none": [0], "asa": [0]}
