"""What a data set gives."""

from typing import NamedTuple, Protocol

import numpy as np

IGNORE = 255  # the label of pixels that do not count


class DataError(Exception):
    """A folder or a file that is not what its data set should hold."""


class Sample(NamedTuple):
    """``image`` uint8 [H, W, 3], ``label`` uint8 [H, W] with ``IGNORE`` where no class counts, ``name`` for errors."""

    image: np.ndarray
    label: np.ndarray
    name: str


class Samples(Protocol):
    """A data set: ``classes`` are names, ``palette`` uint8 [classes, 3] their colours."""

    classes: tuple[str, ...]
    palette: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...
