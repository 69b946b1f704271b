"""The compiled extension ``_C``: loaded once, on first use, never required.

The library works without it (``impl="blocked"`` and ``"reference"`` are plain PyTorch); :func:`why_missing` keeps the
reason for :func:`asa_ops.explain`.
"""

import functools
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_C.abi3.so")


@functools.cache
def why_missing() -> str | None:
    """Load the extension; return None if it is usable, otherwise the reason why not."""
    if not _LIBRARY.exists():
        return "the compiled extension is missing (no C++ compiler was found when asa_ops was installed)"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the compiled extension cannot be loaded ({error})"
    try:
        wanted = version("asa_ops")
    except PackageNotFoundError:  # imported from a source tree that was never installed
        return None
    built = ".".join(str(part) for part in divmod_version(torch.ops.asa_ops.extension_version()))
    if built != wanted:
        return f"the compiled extension is version {built}, asa_ops is {wanted}: install again"
    return None


def divmod_version(number: int) -> tuple[int, int, int]:
    """Split the extension's version number 10000 * major + 100 * minor + patch."""
    return number // 10000, number // 100 % 100, number % 100


def has(op: str) -> bool:
    """Return whether the loaded extension holds the op ``asa_ops::<op>``."""
    return why_missing() is None and hasattr(torch.ops.asa_ops, op)
