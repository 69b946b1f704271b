"""Show what pixels of a picture attend to: dense weights, adaptive neighbours, reciprocal survivors, local ones too.

    python -m examples.segmentation.attend runs/segmentation/checkpoint.pt street.jpg --pixel 120,200 --pixel 40,310
    python -m examples.segmentation.attend runs/segmentation/checkpoint.pt street.jpg   # click on pixels in a window

The checkpoint's block must be `asa`. Weights are of positions, `output_stride` pixels apart.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.backends import BackendFilter, backend_registry
from matplotlib.colors import LogNorm
from torch import Tensor

from asa_ops import reciprocal_neighbors
from asa_ops.nn import AdaptiveSparseAttention

from .. import files
from .checkpoint import Checkpoint
from .cli import device_of, main_of, pictures_of
from .config import ConfigError
from .model import Segmenter
from .pipeline import normalise, scaled

NAMES = ("dense weights", "adaptive neighbours", "reciprocal survivors", "with the local window")


@torch.no_grad()
def block_input(model: Segmenter, image: Tensor) -> Tensor:
    """Return the map [B, C, h, w] that the block gets when ``model`` sees ``image`` [B, 3, H, W]."""
    seen = []
    handle = model.head.block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    try:
        model(image)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def weight_maps(
    block: AdaptiveSparseAttention, x: Tensor, positions: Sequence[tuple[int, int]]
) -> list[list[np.ndarray]]:
    """Return what each of ``positions`` attends to, the mean over heads: maps [h, w] in the order of ``NAMES``.

    Each map is a softmax over those that are kept so far, 0 everywhere where nobody is.

    Args:
        block: the attention block.
        x: its input [1, C, h, w].
        positions: rows and columns in ``x``.
    """
    height, width = x.shape[-2:]
    n = height * width
    tokens = {name: value for name, value in block.tokens(x).items() if name != "value"}
    numbers = [row * width + column for row, column in positions]
    scores = [tokens["scale"] * (tokens["key"][0] @ tokens["query"][0, :, i, :, None])[..., 0] for i in numbers]
    maps = [[of_heads.softmax(-1).mean(0)] for of_heads in scores]  # of_heads is [heads, N]
    without_window = tokens | {"beta": None}
    for options in (without_window | {"reciprocal": False}, without_window, tokens):
        graph = reciprocal_neighbors(**options)  # of all positions, up to gigabytes: one at a time
        for of_position, of_heads, i in zip(maps, scores, numbers, strict=True):
            kept = torch.zeros_like(of_heads, dtype=torch.bool)
            for head in range(len(kept)):
                first, last = graph.row_offsets[head * n + i : head * n + i + 2].tolist()
                kept[head, graph.col_indices[first:last].long()] = True
            of_position.append(of_heads.masked_fill(~kept, -torch.inf).softmax(-1).nan_to_num().mean(0))
        del graph
    return [[weights.view(height, width).cpu().numpy() for weights in of_position] for of_position in maps]


def attend(
    checkpoint: Checkpoint, image: np.ndarray, pixels: list[tuple[int, int]]
) -> dict[tuple[int, int], list[np.ndarray]]:
    """Return the :func:`weight_maps` of pixels (row, column) of a picture uint8 [H, W, 3].

    Raises:
        ConfigError: another block than `asa`, or a pixel outside the picture.
    """
    config = checkpoint.settings()
    if config.block != "asa":
        raise ConfigError(f"attend shows block 'asa', the checkpoint has {config.block!r}")
    height, width, _ = image.shape
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            raise ConfigError(f"pixel {row},{column} lies outside the picture of {height} x {width}")
    model = checkpoint.segmenter().to(device_of())
    x = block_input(model, normalise(scaled(image, config))[None].to(device_of()))
    h, w = x.shape[-2:]
    positions = [(r * h // height, c * w // width) for r, c in pixels]
    return dict(zip(pixels, weight_maps(model.head.block, x, positions), strict=True))


def is_interactive() -> bool:
    """Whether matplotlib can open a window here."""
    windows = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
    return matplotlib.get_backend().lower() in windows


def clicked(image: np.ndarray) -> list[tuple[int, int]]:
    """Show the picture and return the pixels that are clicked on, until Enter."""
    plt.imshow(image)
    plt.title("click on pixels, then press Enter")
    pixels = [(round(y), round(x)) for x, y in plt.ginput(n=-1, timeout=0)]
    plt.close()
    return pixels


def draw(path: Path, image: np.ndarray, maps: dict[tuple[int, int], list[np.ndarray]]) -> None:
    """Write a row of pictures for every pixel: where it is, and what it attends to at each stage."""
    figure, axes = plt.subplots(
        len(maps), 1 + len(NAMES), figsize=(15, 3.2 * len(maps)), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    norm = LogNorm(1e-6, 1, clip=True)
    for row, ((r, c), weights) in zip(axes, maps.items(), strict=True):
        row[0].imshow(image)
        row[0].plot(c, r, "o", markersize=9, markerfacecolor="none", markeredgecolor="red", markeredgewidth=2)
        row[0].set_title(f"pixel ({r}, {c})", fontsize=9)
        for axis, name, w in zip(row[1:], NAMES, weights, strict=True):
            shown = axis.imshow(np.ma.masked_equal(w, 0), norm=norm, cmap="viridis")
            axis.set_title(f"{name}: {np.count_nonzero(w)}", fontsize=9)
        figure.colorbar(shown, ax=row[-1], label="weight")
    files.save(figure, path, dpi=110)
    plt.close(figure)


def pixel(text: str) -> tuple[int, int]:
    """Read "row,column"."""
    row, column = text.split(",")
    return int(row), int(column)


def main(arguments: list[str] | None = None) -> dict[tuple[int, int], list[np.ndarray]]:
    parser = argparse.ArgumentParser(
        prog="attend", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("image", nargs="?", type=Path, help="a picture file")
    parser.add_argument("--shape", type=int, help="a validation shape, by number, instead")
    parser.add_argument("--pixel", type=pixel, action="append", metavar="ROW,COLUMN", help="of the picture; repeatable")
    parser.add_argument("--out", type=Path, default=Path("attend.png"), help="the picture to write (attend.png)")
    options = parser.parse_args(arguments)
    if (options.image is None) == (options.shape is None):
        parser.error("expected one picture: a file or --shape NUMBER")
    files.check_out(parser, options.out, *files.FIGURES)
    if options.pixel is None and not is_interactive():
        parser.error("no window to click in here: give --pixel ROW,COLUMN")
    images = [] if options.image is None else [options.image]
    numbers = [] if options.shape is None else [options.shape]
    files.check([options.out], [options.checkpoint, *images])
    checkpoint = Checkpoint.load(options.checkpoint)
    (read,) = pictures_of(images, numbers, checkpoint.settings()).values()
    image = read()
    maps = attend(checkpoint, image, options.pixel or clicked(image))
    if not maps:
        parser.error("no pixel was clicked on")
    draw(options.out, image, maps)
    print(options.out)
    return maps


if __name__ == "__main__":
    main_of(main)
