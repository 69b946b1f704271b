"""Checkpoints: a dict of tensors, numbers and strings that says how to rebuild the network it belongs to."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import files
from .config import Config, ConfigError
from .model import Segmenter
from .sample import Samples

KIND = "asa_ops.examples.segmentation"


class CheckpointError(Exception):
    """A file that is no checkpoint of this example, or one that does not fit."""


@dataclass(frozen=True)
class Checkpoint:
    """``model`` and ``optimizer`` are state dicts after ``step`` steps, ``palette`` the colours of ``classes``.

    ``arithmetic`` is what losses depend on besides ``config``.
    """

    config: dict
    arithmetic: dict
    classes: list[str]
    palette: list[list[int]]
    step: int
    model: dict[str, Tensor]
    optimizer: dict
    kind: str = KIND

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        with files.whole(path) as file:
            try:
                torch.save({name: getattr(self, name) for name in self.__dataclass_fields__}, file)
            except RuntimeError as error:  # that its end is not where it should be, after writing has failed
                raise error.__context__ or error from None

    @classmethod
    def load(cls, path: str | Path) -> "Checkpoint":
        """Read a file, which can hold nothing but data (``weights_only``).

        Raises:
            CheckpointError: there is no such file, it is broken, or something else wrote it.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"there is no checkpoint {str(path)!r}")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).split("\n")[0].split(". ")[0] or "it ends too early"  # torch's first sentence
            raise CheckpointError(f"{str(path)!r} is broken or no checkpoint: {reason}") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise CheckpointError(f"{str(path)!r} is not from this example: expected kind {KIND!r}")
        if content.keys() != cls.__dataclass_fields__.keys():
            missing = sorted(cls.__dataclass_fields__.keys() ^ content.keys())
            raise CheckpointError(f"{str(path)!r} has other entries than a checkpoint, namely {', '.join(missing)}")
        return cls(**content)

    def settings(self) -> Config:
        """Return the config of the run, without the weights that it started from."""
        try:
            return Config.of(self.config).replace(pretrained=None)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"the checkpoint's config does not fit: {error}") from error

    def segmenter(self) -> Segmenter:
        """Return the network with its weights, in evaluation mode."""
        model = Segmenter(self.settings(), len(self.classes))
        try:
            model.load_state_dict(self.model)
        except RuntimeError as error:
            _, first, *more = str(error).splitlines()
            others = f", and {len(more)} more" if more else ""
            raise CheckpointError(
                f"the checkpoint's weights do not fit its config: {first.strip().rstrip('.')}{others}"
            ) from error
        return model.eval()

    def check_classes(self, samples: Samples) -> None:
        """Raise CheckpointError unless the checkpoint has the classes of ``samples``."""
        if self.classes != list(samples.classes):
            raise CheckpointError(
                f"the checkpoint has {len(self.classes)} classes ({self.classes[0]}, ..., {self.classes[-1]}), the "
                f"data {len(samples.classes)} ({samples.classes[0]}, ..., {samples.classes[-1]})"
            )

    @property
    def colours(self) -> np.ndarray:
        """The palette as uint8 [classes, 3]."""
        return np.array(self.palette, np.uint8)
