"""Segment pictures: writes each one with its classes as colours laid over it, and a legend.

python -m examples.segmentation.predict runs/segmentation/checkpoint.pt street.jpg --out predictions
python -m examples.segmentation.predict runs/segmentation/checkpoint.pt --shape 0   # the first picture of shapes
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from .checkpoint import Checkpoint
from .cli import device_of, main_of, pictures_of
from .evaluate import probabilities

OPACITY = 0.6


def overlay(image: np.ndarray, prediction: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return a picture uint8 [H, W, 3] under the colours of its classes [H, W]."""
    return ((1 - OPACITY) * image + OPACITY * palette[prediction]).round().astype(np.uint8)


def draw(path: Path, image: np.ndarray, prediction: np.ndarray, classes: list[str], palette: np.ndarray) -> None:
    """Write the picture, the picture under its classes, and a legend of those that occur, the largest first."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axis, picture in zip(axes, (image, overlay(image, prediction, palette)), strict=True):
        axis.imshow(picture)
        axis.set_axis_off()
    counts = np.bincount(prediction.ravel(), minlength=len(classes))
    found = [i for i in np.argsort(-counts) if counts[i]]
    handles = [Patch(facecolor=palette[i] / 255, edgecolor="grey", label=classes[i]) for i in found]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[np.ndarray]:
    parser = argparse.ArgumentParser(
        prog="predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", nargs="*", type=Path, help="picture files")
    parser.add_argument("--shape", nargs="+", action="extend", type=int, default=[], help="validation shapes by number")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write (predictions)")
    options = parser.parse_args(arguments)
    checkpoint = Checkpoint.load(options.checkpoint)
    config = checkpoint.settings()
    pictures = pictures_of(options.images, options.shape, config)
    model = checkpoint.segmenter().to(device_of())
    options.out.mkdir(parents=True, exist_ok=True)
    predictions = []
    for name, image in pictures.items():
        prediction = probabilities(model, image, config).argmax(0).cpu().numpy()
        draw(path := options.out / f"{name}.png", image, prediction, checkpoint.classes, checkpoint.colours)
        print(path)
        predictions.append(prediction)
    return predictions


if __name__ == "__main__":
    main_of(main)
