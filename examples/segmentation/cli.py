"""What the command lines share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from . import data
from .checkpoint import CheckpointError
from .config import Config, ConfigError
from .sample import DataError


def main_of(main: Callable[[], object]) -> None:
    """Run a command; what a user can put right ends it with one line."""
    try:
        main()
    except (CheckpointError, ConfigError, DataError) as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        if error.filename is None:  # not about a file of the user's
            raise
        raise SystemExit(f"error: {error.filename}: {error.strerror}") from error


def device_of() -> torch.device:
    """Return the GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pictures_of(files: Sequence[Path], shapes: Sequence[int], config: Config) -> dict[str, np.ndarray]:
    """Return pictures uint8 [H, W, 3] by name: of files, and of the shapes to validate on by number.

    Raises:
        ConfigError: no picture is asked for, two have the same name, or there is no such shape.
        DataError: a file that is no picture.
    """
    if not files and not shapes:
        raise ConfigError("no picture: expected files, or --shape NUMBER")
    pictures = {}
    for path in files:
        if path.stem in pictures:  # what is written for one would replace what is written for the other
            raise ConfigError(f"two pictures are named {path.stem!r}, the second is {path}")
        pictures[path.stem] = data.read(path, "RGB", upright=True)
    if shapes:
        if config.data != "shapes":
            raise ConfigError(f"--shape is for networks trained on shapes, this one is for {config.data}")
        samples = data.build(config, None, training=False)
        for number in shapes:
            if not 0 <= number < len(samples):
                raise ConfigError(f"--shape must be from 0 to {len(samples) - 1}, got {number}")
            pictures[f"shape{number}"] = samples[number].image
    return pictures
