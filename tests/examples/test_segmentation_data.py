"""The segmentation example's data: folder layouts and labels, what training sees of them, and the shapes."""

import itertools
import re

import numpy as np
import pytest
import segmentation_cases as cases
import torch
from torch import nn

from examples.files import FileError
from examples.pictures import PictureError
from examples.segmentation import data, pipeline, shapes, train
from examples.segmentation.config import NAMES, Config, ConfigError
from examples.segmentation.sample import IGNORE, DataError, Sample

REAL = tuple(cases.LAYOUTS)


# The layouts of the real data sets.


@pytest.mark.parametrize(
    ("name", "stored", "expected", "classes", "count", "pictures", "held_out"),
    [
        ("cityscapes", [7, 8, 33, 0, 9, 255], [0, 1, 18, *3 * [IGNORE]], ("road", "sidewalk", "bicycle"), 19, 3, "val"),
        ("ade20k", [1, 150, 0], [0, 149, IGNORE], ("name1", "name2", "name150"), 150, 2, "val"),
        ("voc2012", [0, 20, 255], [0, 20, IGNORE], ("background", "aeroplane", "tvmonitor"), 21, 3, "2007_9"),
    ],
    ids=REAL,
)
def test_labels_become_classes(name, stored, expected, classes, count, pictures, held_out, tmp_path):
    root = cases.LAYOUTS[name](tmp_path, stored)
    samples, validation = (data.build(Config.load(name), root, training) for training in (True, False))
    assert (samples.classes[0], samples.classes[1], samples.classes[-1]) == classes
    assert len(samples.classes) == len(samples.palette) == len(np.unique(samples.palette, axis=0)) == count
    assert len(samples) == pictures and len(validation) == 1 and held_out in validation[0].name
    for i in range(pictures):
        sample = samples[i]
        assert sample.image.shape == (*cases.SIZE, 3) and sample.image.dtype == np.uint8
        np.testing.assert_array_equal(sample.label, cases.label_of(expected))


def test_other_splits(tmp_path):
    config = Config.load("voc2012").replace(data_options={"train_split": "train"})
    assert len(data.build(config, cases.voc2012(tmp_path, [0]), training=True)) == 2


def test_labels_of_voc_go_before_augmented_ones(tmp_path):
    """Archives of augmented labels have some of the pictures in train.txt too."""
    root = cases.voc2012(tmp_path, [3])
    for name in ("2007_1", "2007_2", "2008_3"):
        cases.write(root / "SegmentationClassAug" / f"{name}.png", cases.label_of([5]))
    samples = data.build(Config.load("voc2012"), root, training=True)
    assert [samples[i].label.max() for i in range(3)] == [3, 3, 5]


def test_palette_of_voc():
    colours = [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
    ]  # as its pictures have
    np.testing.assert_array_equal(data.colours(7), colours)


MISSING = [
    ("cityscapes", "leftImg8bit/train", "leftImg8bit/train is missing"),
    ("cityscapes", "leftImg8bit/train/*/*", "no pictures: expected"),
    ("cityscapes", "gtFine/train/bochum/*labelIds*", "2 of 3 label pictures are missing, the first is"),
    ("cityscapes", "leftImg8bit/train/bochum/*", "2 label pictures have no picture, the first is"),
    ("ade20k", "images/training", "images/training is missing"),
    ("ade20k", "images/training/ADE_train_1.jpg", "1 label pictures have no picture, the first is"),
    ("ade20k", "annotations/training/ADE_train_2.png", "1 of 2 label pictures are missing, the first is"),
    ("ade20k", "objectInfo150.txt", "objectInfo150.txt, which lists the classes, is missing"),
    ("voc2012", "ImageSets/Segmentation/trainaug.txt", "which lists the pictures of split 'trainaug', is missing"),
    ("voc2012", "ImageSets/Segmentation/train.txt", "which lists the pictures of split 'train', is missing"),
    ("voc2012", "SegmentationClass", "SegmentationClass is missing"),
    ("voc2012", "SegmentationClassAug", "SegmentationClassAug is missing"),
    ("voc2012", "JPEGImages", "JPEGImages is missing"),
    ("voc2012", "JPEGImages/2008_3.jpg", "1 of 3 pictures are missing, the first is"),
]


@pytest.mark.parametrize(("name", "gone", "message"), MISSING, ids=[f"{name} {gone}" for name, gone, _ in MISSING])
def test_what_is_missing_is_named(name, gone, message, tmp_path):
    root = cases.LAYOUTS[name](tmp_path, [1])
    found = list(root.glob(gone))
    assert found
    for path in found:
        path.rename(path.with_name(f"away-{path.stem}"))
    with pytest.raises(DataError) as error:
        data.build(Config.load(name), root, training=True)
    assert message in str(error.value) and str(root) in str(error.value)


def test_a_list_of_fewer_classes(tmp_path):
    listed = cases.ade20k(tmp_path, [1]) / "objectInfo150.txt"
    listed.write_text("".join(listed.read_text().splitlines(keepends=True)[:100]))
    with pytest.raises(DataError, match=r"objectInfo150\.txt must list 150 classes below its title line, got 99"):
        data.build(Config.load("ade20k"), tmp_path, training=True)


@pytest.mark.parametrize(
    ("name", "stored", "expected"),
    [("cityscapes", 34, "0 to 33, 255"), ("ade20k", 151, "0 to 150"), ("voc2012", 21, "0 to 20, 255")],
    ids=REAL,
)
def test_labels_out_of_range(name, stored, expected, tmp_path):
    samples = data.build(Config.load(name), cases.LAYOUTS[name](tmp_path, [1, stored]), training=True)
    with pytest.raises(DataError, match=rf"\.png holds the label {stored}, expected {expected}"):
        samples[0]


def test_files_that_are_no_labels(tmp_path):
    samples = data.build(Config.load("ade20k"), cases.ade20k(tmp_path, [1]), training=True)
    image, label = samples.pairs[0]
    cases.write(label, cases.photograph(0))
    with pytest.raises(DataError, match=r"1\.png must have one 8 bit number per pixel, got uint8 \(12, 20, 3\)"):
        samples[0]
    cases.write(label, np.ones((5, 6), np.uint8))
    with pytest.raises(DataError, match=r"ADE_train_1\.png is 5 x 6, its picture 12 x 20"):
        samples[0]
    image.write_bytes(image.read_bytes()[:200])  # a download that broke off
    with pytest.raises(PictureError, match=r"cannot read .*ADE_train_1\.jpg as a picture"):
        samples[0]


@pytest.mark.parametrize(
    ("name", "root", "options", "message"),
    [
        ("ade20k", None, {}, "ade20k needs --root"),
        ("ade20k", "nowhere", {}, "nowhere is missing"),
        ("ade20k", ".", {"size": 64}, "data_options of ade20k are train_split, val_split, got 'size'"),
        ("shapes", ".", {}, "shapes are made, not read: leave --root out, got '.'"),
        ("shapes", None, {"size": 65}, "must be a multiple of 16 from 64 to 256, got 65"),
        ("shapes", None, {"size": 512}, "must be a multiple of 16 from 64 to 256, got 512"),
        ("shapes", None, {"pictures": 0}, "must be an integer >= 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit(name, root, options, message):
    with pytest.raises((ConfigError, DataError), match=re.escape(message)):
        data.build(Config.load(name).replace(data_options=options), root, training=False)


# Settings.


@pytest.mark.parametrize("name", NAMES)
def test_settings_survive_json(name):
    config = Config.load(name)
    assert config.data == name and Config.of(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "crop", "steps", "batch_size"),
    [
        ("cityscapes", (512, 1024), 80_000, 8),
        ("ade20k", (512, 512), 80_000, 16),
        ("voc2012", (512, 512), 40_000, 16),
    ],
)
def test_published_settings(name, crop, steps, batch_size):
    config = Config.load(name)
    assert (config.crop, config.steps, config.batch_size) == (crop, steps, batch_size)
    assert config.backbone["depths"] == [3, 4, 23, 3] and config.output_stride == 8
    assert (config.channels, config.auxiliary_channels, config.auxiliary_weight) == (512, 256, 0.4)
    assert (config.optimizer, config.learning_rate, config.min_learning_rate) == ("sgd", 0.01, 1e-4)
    assert (config.weight_decay, config.ratio, config.dropout) == (5e-4, (0.5, 2.0), 0.1)
    optimizer = train.optimizer_of(config, nn.Linear(1, 1))
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9
    assert train.learning_rate(config, steps // 2) == pytest.approx(0.0099 * 0.5**0.9 + 1e-4)
    for block, options in (("asa", {"norm": "batch"}), ("non_local", {"norm": "batch"}), ("criss_cross", {})):
        assert config.replace(block=block).options == options


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "unknown setting 'learning_rat'"),
        ({"data": "coco"}, "data must be one of shapes, cityscapes, ade20k, voc2012, got data='coco'"),
        ({"block": "asaa"}, "block must be one of none, asa,"),
        ({"crop": [64]}, "crop must be two integers >= 1, got crop=(64,)"),
        ({"ratio": [2, 1]}, "ratio must be [low, high] with 0 < low <= high, got ratio=(2, 1)"),
        ({"ratio": 2}, "ratio must be [low, high]"),
        ({"steps": 0}, "steps must be an integer >= 1, got steps=0"),
        ({"batch_size": 2.5}, "batch_size must be an integer >= 1"),
        ({"learning_rate": -1}, "learning_rate must be a number >= 0, got learning_rate=-1"),
        ({"dropout": 1}, "dropout must be in [0, 1)"),
        ({"window": [64, 64]}, "stride must be given if and only if window is"),
        ({"window": [64, 64], "stride": [65, 32]}, "stride must be at most window = [64, 64], got stride=(65, 32)"),
        ({"optimizer": "adam"}, 'optimizer must be "sgd" or "adamw"'),
        ({"block_options": 3}, "block_options must be an object of options"),
        ({"options_by_block": {"asaa": {}}}, "options_by_block must be an object of blocks, each with an object of"),
        ({"options_by_block": {"asa": 3}}, "options_by_block must be an object of blocks, each with an object of"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        cases.tiny(**settings)


def test_files_of_settings_that_do_not_fit(tmp_path):
    with pytest.raises(FileError, match=r"nowhere\.json: No such file or directory"):
        Config.load("nowhere.json")
    path = tmp_path / "mine.json"
    for text, message in (
        ("{", "mine.json: "),
        ("[1]", r"mine.json: settings must be an object of names and values, got \[1\]"),
        ('{"data": "shapes"}', "setting 'auxiliary_channels' is missing"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Config.load(path)


# What training sees.


def coded(height: int, width: int) -> Sample:
    """A picture that tells where a pixel came from: red is 2 * row, green 2 * column, its label the sum modulo 5."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([2 * rows, 2 * columns, np.full_like(rows, 7)], -1).astype(np.uint8)
    return Sample(image, ((rows + columns) % 5).astype(np.uint8), "coded")


def test_crops_are_cut_and_flipped_with_their_labels():
    config = cases.tiny(crop=(24, 32), ratio=(1.0, 1.0), distort=False)
    seen = set()
    for seed in range(40):
        image, label = pipeline.augment(coded(40, 60), config, np.random.default_rng(seed))
        assert image.shape == (24, 32, 3) and label.shape == (24, 32) and label.dtype == np.uint8
        rows, columns = image[..., 0] // 2, image[..., 1] // 2
        np.testing.assert_array_equal(label, (rows.astype(int) + columns) % 5)
        flipped = bool(columns[0, 0] > columns[0, 1])
        np.testing.assert_array_equal(np.diff(columns.astype(int), axis=1), -1 if flipped else 1)
        seen.add((flipped, int(rows[0, 0]), int(columns.min())))
    assert {flipped for flipped, *_ in seen} == {True, False}
    assert len({row for _, row, _ in seen}) > 5 and len({column for *_, column in seen}) > 5
    assert max(row for _, row, _ in seen) <= 16 and max(column for *_, column in seen) <= 28


def test_scales_are_drawn_from_the_ratio():
    """A square of a known size, wherever the crop has it, tells how much it was enlarged."""
    image, label = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8)
    label[15:25, 15:25] = 1
    config = cases.tiny(crop=(80, 80), ratio=(0.5, 2.0), distort=False)
    sample = Sample(image, label, "")
    labels = [pipeline.augment(sample, config, np.random.default_rng(i))[1] for i in range(60)]
    sides = [np.sqrt((label == 1).sum()) for label in labels]
    assert 4 <= min(sides) < 8 and 17 < max(sides) <= 20.1


def test_small_pictures_are_padded():
    config = cases.tiny(crop=(24, 32), ratio=(1.0, 1.0), distort=False)
    image, label = pipeline.augment(coded(16, 60), config, np.random.default_rng(0))
    assert (label[16:] == IGNORE).all() and (label[:16] != IGNORE).all()
    assert pipeline.normalise(image[16:]).abs().max() < 0.01  # the mean colour, 0 to the network


def test_a_crop_larger_than_the_picture():
    config = cases.tiny(crop=(24, 32), ratio=(0.5, 1.5))
    with pytest.raises(ConfigError, match=r"crop \[24, 32\] is larger than coded, at most \[15, 30\] here"):
        pipeline.augment(coded(10, 20), config, np.random.default_rng(0))


def test_resize_limits_the_sides():
    assert pipeline.size_within((1000, 500), (2048, 512)) == (1024, 512)
    assert pipeline.size_within((500, 4000), (2048, 512)) == (256, 2048)
    assert pipeline.size_within((1024, 2048), (2048, 1024), 0.5) == (512, 1024)
    assert pipeline.size_within((30, 40), None, 2.0) == (60, 80)


def test_crops_avoid_a_single_class():
    label = np.zeros((60, 60), np.uint8)
    label[:20, :20] = 1
    windows = [pipeline.window_of(label, (20, 20), np.random.default_rng(i)) for i in range(50)]
    at_random = [(slice(r, r + 20), slice(c, c + 20)) for r, c in np.random.default_rng(0).integers(0, 41, (50, 2))]
    mixed, mixed_at_random = (sum(0.25 < (label[w] == 1).mean() < 0.75 for w in of) for of in (windows, at_random))
    assert mixed > 2 * mixed_at_random


def test_distortion_changes_colours_only():
    image = np.random.default_rng(0).integers(60, 200, (8, 9, 3), np.uint8)
    results = [pipeline.distort(image, np.random.default_rng(i)) for i in range(60)]
    assert all(x.shape == image.shape and x.dtype == np.uint8 for x in results)
    changes = np.array([np.abs(x.astype(int) - image).mean() for x in results])
    assert 1 <= (changes < 3).sum() < 30  # now and then nothing happens, but for the rounding of hue and saturation
    assert changes.max() > 20
    grey = np.full((4, 4, 3), 128, np.uint8)
    assert all(np.ptp(pipeline.distort(grey, np.random.default_rng(i)), axis=-1).max() == 0 for i in range(20))


def test_every_picture_once_a_round_in_another_order():
    seen = []

    class Watched(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    positions = pipeline.Positions(Watched([coded(64, 64)] * 7), cases.tiny())
    for position in range(21):
        positions[position]
    rounds = [seen[i : i + 7] for i in (0, 7, 14)]
    assert [sorted(x) for x in rounds] == [list(range(7))] * 3 and rounds[0] != rounds[1] != rounds[2]


def test_processes_share_the_batches():
    config = cases.tiny(batch_size=8, steps=5)
    alone = [list(x) for x in pipeline.Parts(config, 2, process=0, processes=1, accumulate=1)]
    assert alone == [list(range(8 * step, 8 * step + 8)) for step in (2, 3, 4)]
    accumulated = list(pipeline.Parts(config, 2, 0, 1, accumulate=4))
    shared = [list(pipeline.Parts(config, 2, process, 2, accumulate=2)) for process in (0, 1)]
    for i, step in enumerate(alone):
        assert list(itertools.chain(*accumulated[4 * i : 4 * i + 4])) == step
        assert list(itertools.chain(*(part for of in shared for part in of[2 * i : 2 * i + 2]))) == step
    assert len(pipeline.Parts(config, 2, 0, 2, 2)) == 6
    with pytest.raises(ConfigError, match=r"batch_size must be a multiple of processes \* accumulate = 3 \* 1, got 8"):
        pipeline.Parts(config, 0, 0, processes=3, accumulate=1)


def test_workers_change_nothing():
    config = cases.tiny(steps=3, batch_size=2)
    samples = data.build(config, None, training=True)
    alone, helped = (
        list(pipeline.loader(samples, config, pipeline.Parts(config, 0, 0, 1, 1), workers, pin_memory=False))
        for workers in (0, 2)
    )
    torch.testing.assert_close(helped, alone, rtol=0, atol=0)


# Shapes.


@pytest.mark.parametrize("size", [64, 128, 256])
def test_shapes_are_a_function_of_seed_and_number(size):
    samples = shapes.Shapes(size, 10, seed=3)
    first, again = samples[4], shapes.Shapes(size, 5, seed=3)[4]
    assert first.image.shape == (size, size, 3) and first.label.shape == (size, size)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.label, again.label)
    for other in (samples[5], shapes.Shapes(size, 10, seed=4)[4]):
        assert not np.array_equal(first.label, other.label)
    with pytest.raises(IndexError, match="picture 10 of 10"):
        samples[10]


def test_all_classes_occur():
    labels = np.stack([sample.label for sample in shapes.Shapes(64, 50, seed=0)])
    parts = np.bincount(labels.ravel(), minlength=5) / labels.size
    assert len(parts) == len(shapes.CLASSES) and parts[0] < 0.9 and (parts[1:] > 0.02).all()


@pytest.mark.parametrize("side", [4, 8, 16])
def test_what_shows_a_plain_shapes_class_is_far_away(side):
    for seed in range(30):
        placed = shapes.arrange(side, np.random.default_rng(seed))
        assert len({cell for cell, *_ in placed}) == len(placed)
        plain = [(cell, colour) for cell, colour, is_plain in placed if is_plain]
        assert plain
        for cell, colour in plain:
            shown = [other for other, of, is_plain in placed if of == colour and not is_plain]
            assert shown and min(shapes.distance(cell, other) for other in shown) >= shapes.FAR
        families = {colour for _, colour in plain}
        assert {colour for _, colour, is_plain in placed if not is_plain} - families  # distractors


def test_a_colour_alone_tells_nothing():
    """The class of plain red shapes, say, is another one in another picture."""
    of_colour = {}
    for i in range(80):
        rng = np.random.default_rng([0, i])
        class_of = rng.integers(1, len(shapes.CLASSES), len(shapes.COLOURS))
        sample = shapes.Shapes(64, 80, seed=0)[i]
        for cell, colour, plain in shapes.arrange(4, rng):
            rows, columns = (slice(16 * k, 16 * k + 16) for k in cell)
            assert set(np.unique(sample.label[rows, columns])) == {0, class_of[colour]}
            if plain:
                of_colour.setdefault(colour, set()).add(int(class_of[colour]))
                inside = sample.label[rows, columns] > 0
                assert sample.image[rows, columns][inside].std(0).max() < 255 * 2 * shapes.NOISE
    assert all(len(classes) == 4 for classes in of_colour.values()) and len(of_colour) == len(shapes.COLOURS)


def test_patterns_look_the_same_in_a_mirror():
    """The random flip must not turn one class into another: rows stay rows."""
    for name in shapes.CLASSES[1:]:
        wave = shapes.pattern(name, np.random.default_rng(0))
        spectrum, mirrored = (np.abs(np.fft.fft2(x - x.mean())) for x in (wave, wave[:, ::-1]))
        np.testing.assert_allclose(spectrum[:, 1:], mirrored[:, 1:][:, ::-1], atol=1e-9)
        others = [shapes.pattern(other, np.random.default_rng(0)) for other in shapes.CLASSES[1:] if other != name]
        assert all(np.abs(wave - other).mean() > 0.1 for other in others)
