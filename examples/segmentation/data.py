"""The data sets: `shapes`, and the folder layouts of Cityscapes, ADE20K and PASCAL VOC 2012."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import files, pictures
from .config import Config, ConfigError
from .sample import IGNORE, DataError, Sample, Samples
from .shapes import Shapes


@dataclass(frozen=True)
class Files:
    """Pictures and label pictures on disk. ``class_of`` maps a stored label to a class or to ``IGNORE``.

    ``lists`` are the text files that pictures or classes are listed in.
    """

    pairs: list[tuple[Path, Path]]
    classes: tuple[str, ...]
    palette: np.ndarray
    class_of: dict[int, int]
    lists: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image_path, label_path = self.pairs[index]
        image, stored = pictures.read(image_path, "RGB"), pictures.read(label_path, None)
        if stored.ndim != 2 or stored.dtype != np.uint8:
            raise DataError(f"{label_path} must have one 8 bit number per pixel, got {stored.dtype} {stored.shape}")
        if image.shape[:2] != stored.shape:
            sizes = ("{} x {}".format(*x.shape) for x in (stored, image))
            raise DataError("{} is {}, its picture {}".format(label_path, *sizes))
        table = np.full(256, -1, np.int16)
        table[list(self.class_of)] = list(self.class_of.values())
        label = table[stored]
        if (label < 0).any():
            raise DataError(f"{label_path} holds the label {stored[label < 0][0]}, expected {ranges(self.class_of)}")
        return Sample(image, label.astype(np.uint8), str(image_path))


def ranges(values: dict[int, int]) -> str:
    """Return "0 to 20, 255" for the keys of ``values``."""
    keys = sorted(values)
    starts = [k for k in keys if k - 1 not in values]
    ends = [k for k in keys if k + 1 not in values]
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


def colours(count: int) -> np.ndarray:
    """Return PASCAL VOC's colours uint8 [count, 3]: bits of the index go to red, green, blue in turn."""
    index = np.arange(count)[:, None]
    bits = [((index >> (3 * i + np.arange(3))) & 1) << (7 - i) for i in range(8)]
    return sum(bits).astype(np.uint8)


CITYSCAPES = {  # class: (stored label, colour); the other labels do not count
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
VOC2012 = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def cityscapes(root: Path, split: str) -> Files:
    """leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_labelIds.png."""
    folder = existing(root / "leftImg8bit" / split)
    images = sorted(folder.glob("*/*_leftImg8bit.png"))
    labels = [
        root / "gtFine" / split / image.parent.name / image.name.replace("_leftImg8bit", "_gtFine_labelIds")
        for image in images
    ]
    found = (root / "gtFine" / split).glob("*/*_gtFine_labelIds.png")
    class_of = {stored: IGNORE for stored in (*range(34), 255)}
    class_of |= {stored: i for i, (stored, _) in enumerate(CITYSCAPES.values())}
    palette = np.array([colour for _, colour in CITYSCAPES.values()], np.uint8)
    return Files(complete(images, labels, f"{folder}/*/*_leftImg8bit.png", found), tuple(CITYSCAPES), palette, class_of)


def ade20k(root: Path, split: str) -> Files:
    """ADEChallengeData2016: images/<split>/*.jpg, annotations/<split>/*.png, names in objectInfo150.txt."""
    split = {"train": "training", "val": "validation"}.get(split, split)
    folder = existing(root / "images" / split)
    images = sorted(folder.glob("*.jpg"))
    labels = [root / "annotations" / split / f"{image.stem}.png" for image in images]
    found = (root / "annotations" / split).glob("*.png")
    listed = root / "objectInfo150.txt"
    if not listed.is_file():
        raise DataError(f"{listed}, which lists the classes, is missing")
    names = [line.rpartition("\t")[2].split(",")[0].strip() for line in files.read(listed).splitlines()[1:]]
    if len(names) != 150:
        raise DataError(f"{listed} must list 150 classes below its title line, got {len(names)}")
    class_of = {0: IGNORE} | {stored: stored - 1 for stored in range(1, 151)}
    pairs = complete(images, labels, f"{folder}/*.jpg", found)
    return Files(pairs, tuple(names), colours(151)[1:], class_of, (listed,))


def voc2012(root: Path, split: str) -> Files:
    """VOCdevkit/VOC2012: JPEGImages/*.jpg and SegmentationClass/*.png as listed in ImageSets/Segmentation/<split>.txt.

    Of the split "trainaug" the names that are not in train.txt too have the labels of SBD, in SegmentationClassAug:
    where there are both, VOC's own are finer.
    """
    lists = root / "ImageSets" / "Segmentation"
    names = names_in(lists / f"{split}.txt")
    added = set(names) - set(names_in(lists / "train.txt")) if split == "trainaug" else set()
    images = [existing(root / "JPEGImages") / f"{name}.jpg" for name in names]
    labels = [
        existing(root / ("SegmentationClassAug" if name in added else "SegmentationClass")) / f"{name}.png"
        for name in names
    ]
    class_of = {i: i for i in range(len(VOC2012))} | {255: IGNORE}
    pairs = complete(images, labels, f"names in {lists / split}.txt")
    return Files(pairs, VOC2012, colours(len(VOC2012)), class_of, tuple(lists.glob("*.txt")))


def names_in(listed: Path) -> list[str]:
    if not listed.is_file():
        raise DataError(f"{listed}, which lists the pictures of split {listed.stem!r}, is missing")
    return files.read(listed).split()


def existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"folder {folder} is missing")
    return folder


def complete(
    images: list[Path], labels: list[Path], expected: str, found: Iterable[Path] = ()
) -> list[tuple[Path, Path]]:
    """Return pairs of files, all of which exist, and check that each of the label pictures ``found`` is in one."""
    if not images:
        raise DataError(f"no pictures: expected {expected}")
    for kind, paths in (("pictures", images), ("label pictures", labels)):
        if missing := [path for path in paths if not path.is_file()]:
            raise DataError(f"{len(missing)} of {len(paths)} {kind} are missing, the first is {missing[0]}")
    if alone := sorted(set(found) - set(labels)):
        raise DataError(f"{len(alone)} label pictures have no picture, the first is {alone[0]}")
    return list(zip(images, labels, strict=True))


LAYOUTS = {"cityscapes": cityscapes, "ade20k": ade20k, "voc2012": voc2012}


def build(config: Config, root: str | Path | None, training: bool) -> Samples:
    """Return the training or the validation samples of ``config.data``, the real ones from the folder ``root``.

    Of ``config.data_options`` "train_split" and "val_split" name the splits of the real data sets, "size" and
    "pictures" are the size of shapes and the number of those to validate on. Training sees new shapes all the time.

    Raises:
        ConfigError: options that do not fit.
        DataError, FileError: folders or files that are missing, lists that are no text.
    """
    known = ("size", "pictures") if config.data == "shapes" else ("train_split", "val_split")
    if unknown := sorted(config.data_options.keys() - set(known)):
        raise ConfigError(f"data_options of {config.data} are {', '.join(known)}, got {unknown[0]!r}")
    if config.data == "shapes":
        if root is not None:
            raise ConfigError(f"shapes are made, not read: leave --root out, got {str(root)!r}")
        size, pictures = config.data_options.get("size", 64), config.data_options.get("pictures", 200)
        return Shapes(size, 1_000_000, seed=0) if training else Shapes(size, pictures, seed=1)
    if root is None:
        raise ConfigError(f"{config.data} needs --root, the folder that holds it")
    name = "train" if training else "val"
    return LAYOUTS[config.data](existing(Path(root)), config.data_options.get(f"{name}_split", name))


def inputs(samples: Samples) -> list[Path]:
    """Return the files that ``samples`` are read from."""
    return [path for each in (*samples.pairs, samples.lists) for path in each] if isinstance(samples, Files) else []
