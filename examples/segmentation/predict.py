"""Segment pictures: writes each one with its classes as colours laid over it, and a legend.

python -m examples.segmentation.predict runs/segmentation/checkpoint.pt street.jpg --out predictions
python -m examples.segmentation.predict runs/segmentation/checkpoint.pt --shape 0   # the first picture of shapes

Pictures are read one at a time. Those that cannot be are told at the end.
"""

import argparse
import gc
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from .. import files
from ..pictures import PictureError
from .checkpoint import Checkpoint
from .cli import device_of, main_of, pictures_of, tell
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
    files.save(figure, path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
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
    pictures = {options.out / f"{name}.png": read for name, read in pictures.items()}
    files.check(pictures, [options.checkpoint, *options.images])
    folders = {files.identity(image.parent) for image in options.images}
    if others := [path for path in pictures if path.exists() and files.identity(path.parent) in folders]:
        raise files.FileError(f"{others[0]} is there, beside a picture that is read: expected another --out")
    model = checkpoint.segmenter().to(device_of())
    broken = []
    for path, read in pictures.items():
        try:
            image = read()
        except PictureError as error:
            broken.append(str(error))
            continue
        prediction = probabilities(model, image, config).argmax(0).cpu().numpy()
        options.out.mkdir(parents=True, exist_ok=True)
        draw(path, image, prediction, checkpoint.classes, checkpoint.colours)
        gc.collect()  # figures refer to themselves: they would pile up
        print(path)
    tell(broken)


if __name__ == "__main__":
    main_of(main)
