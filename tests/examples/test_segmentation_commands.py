"""The segmentation commands: the pictures that they draw, the arguments that they refuse, their help."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import segmentation_cases as cases
import torch

from asa_ops import asa_attention
from examples.segmentation import ablation, attend, cli, data, evaluate, predict, train
from examples.segmentation.checkpoint import Checkpoint
from examples.segmentation.pipeline import normalise

COMMANDS = {"ablation": ablation, "train": train, "evaluate": evaluate, "predict": predict, "attend": attend}

pytestmark = pytest.mark.usefixtures("one_thread")


def test_predict_writes_overlays(checkpoint, tmp_path, capsys, monkeypatch):
    picture, out = tmp_path / "street.jpg", tmp_path / "out"
    cases.write(picture, np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    drawn, draw = [], predict.draw
    monkeypatch.setattr(predict, "draw", lambda *arguments: drawn.append(arguments[2]) or draw(*arguments))
    predict.main([str(checkpoint), str(picture), "--shape", "2", "0", "--shape", "1", "--out", str(out)])
    assert [x.shape for x in drawn] == [(70, 90), *[(64, 64)] * 3] and max(x.max() for x in drawn) < 5
    names = ("street.png", "shape2.png", "shape0.png", "shape1.png")
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert all(np.asarray(PIL.Image.open(out / name)).std() > 1 for name in names)
    image, palette = np.full((1, 2, 3), 100, np.uint8), np.array([(0, 0, 0), (200, 100, 0)], np.uint8)
    np.testing.assert_array_equal(predict.overlay(image, np.array([[0, 1]]), palette), [[(40,) * 3, (160, 100, 40)]])


def test_attend_shows_what_the_block_does(checkpoint, tmp_path):
    """The weights of the last map give the block's output, and the numbers of survivors are the library's."""
    loaded = Checkpoint.load(checkpoint)
    network = loaded.segmenter()
    block = network.head.block
    with torch.no_grad():
        block.alpha.weight.zero_()
        block.alpha.bias.fill_(1.0)  # about as many weigh more than the mean as less
    image = data.build(loaded.settings(), None, training=False)[0].image
    x = attend.block_input(network, normalise(image)[None])
    tokens = block.tokens(x)
    _, stats = asa_attention(**tokens | {"beta": None}, return_stats=True)
    keep_some = stats.survivors[0, 0].nonzero().flatten().tolist()
    positions = [divmod(i, 16) for i in (keep_some[0], keep_some[-1])]
    for (row, column), maps in zip(positions, attend.weight_maps(block, x, positions), strict=True):
        _, adaptive, reciprocal, local = maps
        counts = [np.count_nonzero(weights) for weights in maps]
        assert counts[0] == 256 > counts[1] >= counts[2] > 0 and counts[2] <= counts[3] <= counts[2] + 9
        assert (adaptive[reciprocal > 0] > 0).all() and (local[reciprocal > 0] > 0).all()
        np.testing.assert_allclose([weights.sum() for weights in maps], 1, rtol=0, atol=1e-5)
        value = tokens["value"][0, 0]
        out = block.proj((torch.from_numpy(local).flatten() @ value)[None, :, None, None])[0, :, 0, 0]
        torch.testing.assert_close(x[0, :, row, column] + out, block(x)[0, :, row, column])
    path = tmp_path / "attend.png"
    maps = attend.main(f"{checkpoint} --shape 1 --out {path} --pixel 8,60 --pixel 63,0".split())
    assert list(maps) == [(8, 60), (63, 0)] and all(w.shape == (16, 16) for of in maps.values() for w in of)
    assert np.asarray(PIL.Image.open(path)).std() > 1


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--accumulate", "0"], "--accumulate must be at least 1, got 0"),
        ("train", ["--checkpoint-every", "0"], "--checkpoint-every must be at least 1, got 0"),
        ("train", ["--set", "steps"], "--set takes NAME=VALUE, got 'steps'"),
        ("train", ["--set", "crop=64"], "crop must be two integers >= 1, got crop=64"),
        ("train", ["--accumulate", "3", "--steps", "1"], "multiple of processes * accumulate = 1 * 3, got 8"),
        ("train", ["--shard", "--steps", "1"], "--shard needs several processes: start them with torchrun"),
        ("train", ["--resume"], "there is no checkpoint"),
        ("train", ["--set", "learning_rate=1e30", "--steps", "3"], "lower learning_rate"),
        ("evaluate", ["--scales", "0"], "--scales must be > 0 and finite, got 0"),
        ("evaluate", ["--scales", "1", "nan"], "--scales must be > 0 and finite, got nan"),
        ("evaluate", ["--window", "32", "32"], "stride must be given if and only if window is"),
        ("predict", [], "no picture: expected files, or --shape NUMBER"),
        ("predict", ["--shape", "3"], "--shape must be from 0 to 2, got 3"),
        ("predict", ["--shape", "0", "--out", __file__], f"{__file__} is no folder"),
        ("attend", ["--pixel", "0,0"], "expected one picture: a file or --shape NUMBER"),
        ("attend", ["--shape", "0"], "no window to click in here: give --pixel ROW,COLUMN"),
        ("attend", ["--shape", "0", "--pixel", "64,0"], "pixel 64,0 lies outside the picture of 64 x 64"),
        ("attend", ["--shape", "0", "--pixel", "5"], "--pixel"),
        ("attend", ["--shape", "0", "--pixel", "5,5", "--out", "no/such.png"], "there is no folder 'no'"),
        ("attend", ["--shape", "0", "--pixel", "5,5", "--out", "such.txt"], "--out must end in .png, .jpg, .pdf"),
        ("ablation", ["--seeds", "0"], "--seeds must be at least 1, got 0"),
        ("ablation", ["--variants", "nothing"], "invalid choice: 'nothing'"),
        ("ablation", ["--one", "asa", "x"], "--one takes a variant and a seed, got 'asa' 'x'"),
    ],
)
def test_commands_that_cannot_be(command, arguments, message, checkpoint, tmp_path, capsys):
    given = ["--out", str(tmp_path)] if command in ("train", "ablation") else [str(checkpoint)]
    with pytest.raises(SystemExit) as error:
        cli.main_of(lambda: COMMANDS[command].main([*given, *arguments]))
    assert message in f"{error.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        COMMANDS[command].main(["--help"])
    assert end.value.code == 0 and "python -m examples.segmentation" in capsys.readouterr().out


@pytest.mark.slow  # loads everything once more
def test_runs_as_documented():
    command = [sys.executable, "-m", "examples.segmentation.train", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert result.returncode == 0 and "--block" in result.stdout
