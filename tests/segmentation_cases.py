"""What the tests of examples/segmentation share: a tiny network, and data sets of a few pictures in real layouts."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
from torch import nn

from examples.segmentation.config import Config
from examples.segmentation.evaluate import evaluate
from examples.segmentation.shapes import CLASSES, PALETTE, Shapes

SIZE = (12, 20)  # of the data sets' pictures
TINY = {
    "data_options": {"size": 64, "pictures": 3},
    "backbone": {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "layer_type": "bottleneck"},
    "channels": 16,
    "auxiliary_channels": 8,
    "dropout": 0.1,
    "steps": 30,
    "batch_size": 2,
}


def tiny(**settings) -> Config:
    """Return the settings of `shapes` with a network that takes milliseconds a step."""
    return Config.load("shapes").replace(**TINY | settings)


def deep(depths=(1, 2, 2, 2), **settings) -> Config:
    """Return settings of a narrow ResNet with all four stages."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": list(depths)}
    return tiny(backbone=sizes | {"layer_type": "bottleneck"}, **settings)


def in_a_file(config: Config, folder: Path) -> list[str]:
    """Write settings to a file, and return the arguments of a command that reads them."""
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    return ["--config", str(path)]


class Few(list):
    """Samples in a list, of shapes."""

    classes, palette = CLASSES, PALETTE


def iou_in_the_midst(model: nn.Module, config: Config) -> list[float]:
    """Return the IoU on two pictures, the second four times as large.

    Without running statistics: every process has its own, of the parts that it saw.
    """
    samples = Few(Shapes(size, 1, seed=1)[0] for size in (64, 128))
    before = [buffer.clone() for buffer in model.buffers()]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    iou = evaluate(model, samples, config).iou.tolist()
    for buffer, values in zip(model.buffers(), before, strict=True):
        buffer.copy_(values)
    return iou


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


def photograph(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)


def label_of(stored: list[int]) -> np.ndarray:
    """Return a label picture whose pixels hold these numbers in turn."""
    return np.resize(np.array(stored, np.uint8), SIZE)


def cityscapes(root: Path, stored: list[int]) -> Path:
    """Two training cities and one to validate on, as the archives leftImg8bit_trainvaltest and gtFine unpack."""
    for city, frame in (("train/aachen", 0), ("train/bochum", 0), ("train/bochum", 1), ("val/lindau", 0)):
        name = f"{city}/{city.partition('/')[2]}_{frame:06}_000019"
        write(root / "leftImg8bit" / f"{name}_leftImg8bit.png", photograph(frame))
        for kind in ("labelIds", "instanceIds"):
            write(root / "gtFine" / f"{name}_gtFine_{kind}.png", label_of(stored))
        write(root / "gtFine" / f"{name}_gtFine_color.png", photograph(frame))
    return root


def ade20k(root: Path, stored: list[int]) -> Path:
    """Two pictures to train and one to validate on, as ADEChallengeData2016.zip unpacks."""
    for split, name in (("training", "ADE_train_1"), ("training", "ADE_train_2"), ("validation", "ADE_val_1")):
        write(root / "images" / split / f"{name}.jpg", photograph(0))
        write(root / "annotations" / split / f"{name}.png", label_of(stored))
    lines = [f"{i}\t0.1\t10\t5\tname{i}, synonym{i}" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines]) + "\n")
    return root


def voc2012(root: Path, stored: list[int]) -> Path:
    """Two pictures to train (three augmented) and one to validate on, as VOCdevkit/VOC2012 and the augmented labels.

    Only what is not in train.txt has an augmented label, as published.
    """
    splits = {"train": ["2007_1", "2007_2"], "trainaug": ["2007_1", "2007_2", "2008_3"], "val": ["2007_9"]}
    for split, names in splits.items():
        listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{name}\n" for name in names))
        for name in names:
            write(root / "JPEGImages" / f"{name}.jpg", photograph(0))
            folder = "SegmentationClass" if name in (*splits["train"], *splits["val"]) else "SegmentationClassAug"
            label = PIL.Image.fromarray(label_of(stored))
            label.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())  # indices, in colour
            (root / folder).mkdir(exist_ok=True)
            label.save(root / folder / f"{name}.png")
    return root


LAYOUTS = {"cityscapes": cityscapes, "ade20k": ade20k, "voc2012": voc2012}
