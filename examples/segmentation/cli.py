"""What the command lines share."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from .. import files, pictures
from ..ranks import leave
from . import data
from .checkpoint import CheckpointError
from .config import Config, ConfigError
from .sample import DataError


def main_of(main: Callable[[], object]) -> None:
    """Run a command; what a user can put right ends it with one line."""
    files.run(main, CheckpointError, ConfigError, DataError, pictures.PictureError)
    if dist.is_initialized():
        leave()


def device_of() -> torch.device:
    """Return the GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pictures_of(paths: Sequence[Path], shapes: Sequence[int], config: Config) -> dict[str, Callable[[], np.ndarray]]:
    """Return by name what reads a picture uint8 [H, W, 3]: a file, or one of the shapes to validate on by number.

    Raises:
        ConfigError: no picture is asked for, two have the same name, or there is no such shape.
    """
    if not paths and not shapes:
        raise ConfigError("no picture: expected files, or --shape NUMBER")
    named = [(path.stem, path, partial(pictures.read, path, "RGB", upright=True)) for path in paths]
    if shapes:
        if config.data != "shapes":
            raise ConfigError(f"--shape is for networks trained on shapes, this one is for {config.data}")
        samples = data.build(config, None, training=False)
        for number in dict.fromkeys(shapes):
            if not 0 <= number < len(samples):
                raise ConfigError(f"--shape must be from 0 to {len(samples) - 1}, got {number}")
            named.append((f"shape{number}", f"--shape {number}", lambda number=number: samples[number].image))
    told, found = {}, {}
    for name, source, read in named:
        if name in told:  # what is written for one would replace what is written for the other
            raise ConfigError(f"two pictures are named {name!r}, {told[name]} and {source}")
        told[name], found[name] = source, read
    return found


def tell(broken: Sequence[str]) -> None:
    """Raise DataError if there are pictures that could not be read, with the line of each."""
    if broken:
        title = [f"{len(broken)} pictures were left out:"] if len(broken) > 1 else []
        raise DataError("\n".join([*title, *broken]))
