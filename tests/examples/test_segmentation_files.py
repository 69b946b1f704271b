"""The segmentation commands and the files of a user: what is read, what is replaced, and what is broken."""

import dataclasses
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import segmentation_cases as cases
import torch
from torch import nn

from examples import pictures
from examples.files import FileError
from examples.segmentation import attend, cli, data, evaluate, predict, train
from examples.segmentation.checkpoint import Checkpoint, CheckpointError
from examples.segmentation.config import NO_BLOCK, Config, ConfigError

TINY = cases.tiny(steps=1, block=NO_BLOCK)
ADE = {"data": "ade20k", "data_options": {}, "crop": (12, 16)}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The current folder, with pictures."""
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    for name in ("street.png", "park.png", "land.jpg", "land.png"):
        cases.write(Path(name), cases.photograph(0))
    return tmp_path / "photos"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Nothing replaces what is read.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["park.png", "street.png", "--out", "."], r"^park\.png would replace park\.png, which is read"),
        (["--shape", "0", "--out", "../run"], r"^\.\./run/shape0\.png would replace \.\./run/shape0\.png"),
        (["land.jpg", "--out", "../photos"], r"^\.\./photos/land\.png is there, beside a picture that is read"),
        (["street.png", "../other/street.png"], r"^two pictures are named 'street', street\.png and \.\./other/street"),
        (["street.png", "street.png"], r"^two pictures are named 'street', street\.png and street\.png$"),
        (["shape1.jpg", "--shape", "1"], r"^two pictures are named 'shape1', shape1\.jpg and --shape 1$"),
    ],
)
def test_predict_replaces_nothing_that_it_reads(arguments, message, checkpoint, photos, monkeypatch):
    """And says so before it looks into a picture."""
    (photos.parent / "run").mkdir()
    (photos.parent / "run" / "shape0.png").write_bytes(checkpoint.read_bytes())
    before = [content(folder) for folder in photos.parent.iterdir()]
    monkeypatch.setattr(pictures, "read", lambda *arguments, **options: pytest.fail("a picture was read"))
    with pytest.raises((FileError, ConfigError), match=message):
        predict.main(["../run/shape0.png", *arguments])
    assert [content(folder) for folder in photos.parent.iterdir()] == before


@pytest.mark.parametrize("out", ["street.png", "../photos/street.png", "checkpoint.png"])
def test_attend_replaces_nothing_that_it_reads(out, photos):
    Path("checkpoint.png").write_bytes(b"weights")
    before = content(photos)
    with pytest.raises(FileError, match=r"\.png would replace (street|checkpoint)\.png, which is read"):
        attend.main(["checkpoint.png", "street.png", "--pixel", "0,0", "--out", out])
    assert content(photos) == before


def test_training_replaces_nothing_that_it_reads(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text(json.dumps(TINY.to_dict()))
    with pytest.raises(FileError, match=r"log\.jsonl would replace .*log\.jsonl, which is read"):
        train.main(["--config", str(out / "log.jsonl"), "--out", str(out)])
    root = cases.ade20k(tmp_path / "ade", [1])
    for read in ("images/training/ADE_train_1.jpg", "annotations/validation/ADE_val_1.png", "objectInfo150.txt"):
        (out / "checkpoint.pt").unlink(missing_ok=True)
        (out / "checkpoint.pt").symlink_to(root / read)
        with pytest.raises(FileError, match=rf"checkpoint\.pt would replace .*{read}, which is read"):
            train.train(TINY.replace(**ADE), out, root, overwrite=True)
        assert (root / read).stat().st_size


# What is broken costs only itself.


def test_predict_does_the_others_where_pictures_are_broken(checkpoint, photos, monkeypatch, capsys):
    Path("cut.png").write_bytes(Path("street.png").read_bytes()[:300])
    cases.write(Path("large.png"), np.zeros((99, 99, 3), np.uint8))
    monkeypatch.setattr(pictures.PIL.Image, "MAX_IMAGE_PIXELS", 4000)
    given = ["cut.png", "street.png", "large.png", "missing.png", "park.png"]
    with pytest.raises(SystemExit) as end:
        cli.main_of(lambda: predict.main([str(checkpoint), *given, "--out", "out"]))
    title, *lines = end.value.code.splitlines()
    assert title == "error: 3 pictures were left out:"
    messages = ("cannot read cut.png", "large.png has more than 8,000", "missing.png as a picture: No such file")
    for line, message in zip(lines, messages, strict=True):
        assert message in line
    assert capsys.readouterr().out.split() == ["out/street.png", "out/park.png"]
    assert sorted(content(photos / "out")) == ["park.png", "street.png"]
    with pytest.raises(SystemExit, match=r"^error: cannot read cut\.png as a picture: .*$"):
        cli.main_of(lambda: predict.main([str(checkpoint), "cut.png", "--out", "new"]))
    assert not Path("new").exists()


def test_predict_has_one_picture_at_a_time(checkpoint, photos, monkeypatch):
    """Each is written before the next is read, and then given up."""
    events, images, read = [], [], pictures.read

    def watched(path, *arguments, **options):
        assert sum(image() is not None for image in images) <= 1  # the last one, until this one takes its name
        events.append(f"read {path}")
        image = read(path, *arguments, **options)
        images.append(weakref.ref(image))
        return image

    monkeypatch.setattr(pictures, "read", watched)
    monkeypatch.setattr(predict, "draw", lambda path, *rest: events.append(f"write {path}"))
    for i in range(4):
        cases.write(Path(f"{i}.png"), cases.photograph(i))
    predict.main([str(checkpoint), *(f"{i}.png" for i in range(4)), "--out", "out"])
    assert events == [f"{did}{i}.png" for i in range(4) for did in ("read ", "write out/")]


@pytest.fixture
def ade(tmp_path):
    """A data set whose validation pictures are a good one, one cut short, and one with a label out of range."""
    root = cases.ade20k(tmp_path / "ade", [1, 2])
    for name, label in (("cut", 1), ("label", 151)):
        cases.write(root / "images" / "validation" / f"{name}.jpg", cases.photograph(0))
        cases.write(root / "annotations" / "validation" / f"{name}.png", cases.label_of([label]))
    cut = root / "images" / "validation" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    return root


def test_figures_are_those_of_the_pictures_that_can_be_read(ade, tmp_path, capsys):
    """Evaluation after training tells of the others too, when all is written."""
    command = [*cases.in_a_file(TINY.replace(**ADE), tmp_path), "--root", str(ade), "--out", str(tmp_path / "run")]
    message = r"^error: 2 pictures were left out:\n.*cut\.jpg as a picture: .*\n.*label\.png holds the label 151"
    with pytest.raises(SystemExit, match=message):
        cli.main_of(lambda: train.main(command))
    trained = capsys.readouterr().out
    assert "pixel accuracy" in trained and (tmp_path / "run" / "checkpoint.pt").exists()
    command = [str(tmp_path / "run" / "checkpoint.pt"), "--root", str(ade)]
    with pytest.raises(SystemExit, match=message):
        cli.main_of(lambda: evaluate.main(command))
    told = capsys.readouterr().out
    assert "1 of 3 pictures" in told and told.split("\n\n")[1] == trained.split("\n\n")[1]
    for path in ade.rglob("validation/*"):
        if "ADE" not in path.name:
            path.unlink()
    evaluate.main(command)
    assert capsys.readouterr().out == told.replace("1 of 3 pictures", "1 pictures")


def test_no_picture_that_can_be_read(ade, recwarn):
    for path in ade.glob("annotations/validation/*"):
        path.write_bytes(b"")
    config = TINY.replace(**ADE)
    samples = data.build(config, ade, training=False)
    report = evaluate.evaluate(nn.Linear(1, 1), samples, config)
    assert len(report.broken) == 3 and "mean                 -" in str(report)
    assert not [each for each in recwarn if issubclass(each.category, RuntimeWarning)]


# Files are written whole or not at all.


def test_a_full_disk_leaves_the_last_checkpoint(checkpoint, tmp_path, full_disk):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"before")
    with full_disk(), pytest.raises(FileError, match=r"checkpoint\.pt: File too large$"):
        Checkpoint.load(checkpoint).save(path)
    assert content(tmp_path) == {"checkpoint.pt": b"before"}


def test_a_full_disk_leaves_the_log(trained, full_disk, monkeypatch):
    before = content(trained[0])
    monkeypatch.setattr(train, "log_line", lambda *arguments: 200 * " ")
    with full_disk(), pytest.raises(FileError, match=r"log\.jsonl: File too large$"):
        train.train(cases.tiny(block="asa"), trained[0], resume=True)
    assert content(trained[0]) == before


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.delattr(train, "Segmenter")
    with pytest.raises(FileError, match=r"checkpoint\.pt cannot be written: .*file is no folder"):
        train.train(TINY, tmp_path / "file" / "run")


# Text that users write.


@pytest.fixture
def texts(tmp_path):
    """Texts that users may write, and what reads them."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY.to_dict(), indent=1))
    return {
        config: lambda: Config.load(config),
        cases.ade20k(tmp_path, [1]) / "objectInfo150.txt": lambda: data.build(Config.load("ade20k"), tmp_path, True),
        cases.voc2012(tmp_path, [1]) / "ImageSets/Segmentation/trainaug.txt": lambda: data.build(
            Config.load("voc2012"), tmp_path, True
        ),
    }


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_of_other_editors(mark, texts):
    for path in texts:
        path.write_bytes(mark + path.read_bytes().replace(b"\n", b"\r\n"))
    config, ade, voc = (read() for read in texts.values())
    assert config == TINY and len(voc) == 3
    assert (ade.classes[0], ade.classes[-1], len(ade.classes)) == ("name1", "name150", 150)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_in_other_encodings_is_named(encoding, texts):
    for path, read in texts.items():
        path.write_text("2007_1\nfür", encoding=encoding)
        with pytest.raises(FileError, match=rf"{path} must be text in UTF-8, got byte 0x"):
            read()


# Checkpoints and logs.


class Foreign:
    pass


BROKEN = [  # what is written in place of a checkpoint, given a good one
    (lambda good, bad: None, "there is no checkpoint"),
    (lambda good, bad: bad.write_bytes(good.read_bytes()[:-1000]), "is broken or no checkpoint"),
    (lambda good, bad: bad.write_text("not weights"), "is broken or no checkpoint:"),
    (lambda good, bad: bad.write_bytes(b""), "bad.pt' is broken or no checkpoint: it ends too early"),
    (lambda good, bad: torch.save(Foreign(), bad), "is broken or no checkpoint: Weights only"),
    (lambda good, bad: torch.save({"state_dict": {}}, bad), "is not from this example: expected kind"),
    (lambda good, bad: torch.save([1], bad), "is not from this example"),
    (
        lambda good, bad: torch.save({k: v for k, v in torch.load(good).items() if k != "step"}, bad),
        "has other entries than a checkpoint, namely step",
    ),
]


@pytest.mark.parametrize(("write", "message"), BROKEN)
def test_checkpoints_that_cannot_be_read(write, message, checkpoint, tmp_path):
    write(checkpoint, bad := tmp_path / "bad.pt")
    with pytest.raises(CheckpointError) as error:
        Checkpoint.load(bad)
    assert message in str(error.value) and "bad.pt" in str(error.value)


MISMATCH = "do not fit its config: size mismatch for head"
UNFIT = [  # what is changed in a checkpoint, what it is used for
    ({"classes": list("abcd")}, evaluate, r"has 4 classes \(a, ..., d\), the data 5 \(.*, rings\)"),
    ({"classes": list("abcd")}, predict, rf"{MISMATCH}\.classifier"),
    ({"config": {"channels": 8}}, predict, rf"{MISMATCH}\.before.*, and \d+ more"),
    ({"config": {"sharpness": 8}}, predict, "config does not fit: unknown setting 'sharpness'"),
    ({"config": None}, predict, "does not fit: settings must be an object"),
    ({"config": {"block": NO_BLOCK}}, attend, "attend shows block 'asa', the checkpoint has 'none'"),
]


@pytest.mark.parametrize(("changes", "command", "message"), UNFIT)
def test_checkpoints_that_do_not_fit(changes, command, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = Checkpoint.load(checkpoint)
    if changes.get("config"):
        changes = {"config": good.config | changes["config"]}
    dataclasses.replace(good, **changes).save(tmp_path / "changed.pt")
    arguments = {evaluate: [], predict: ["--shape", "0"], attend: ["--shape", "0", "--pixel", "0,0"]}[command]
    with pytest.raises(ConfigError if command is attend else CheckpointError, match=message):
        command.main(["changed.pt", *arguments])


def test_a_log_that_is_none(tmp_path):
    for line in ("3", '{"loss"', '{"step": 0}'):
        (tmp_path / "log.jsonl").write_text(line)
        with pytest.raises(CheckpointError, match=r"log\.jsonl is broken: "):
            train.read_log(tmp_path / "log.jsonl", 1)
