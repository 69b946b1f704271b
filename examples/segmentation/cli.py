"""What the command lines share."""

from collections.abc import Callable

import torch

from .checkpoint import CheckpointError
from .config import ConfigError
from .sample import DataError


def main_of(main: Callable[[], object]) -> None:
    """Run a command; what a user can put right ends it with one line."""
    try:
        main()
    except (CheckpointError, ConfigError, DataError) as error:
        raise SystemExit(f"error: {error}") from error


def device_of() -> torch.device:
    """Return the GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
