"""The compiled extension ``_C.abi3.so``: loaded on import if it can be, never required.

The library works without it (``impl="blocked"`` and ``"reference"`` are plain PyTorch); ``WHY_MISSING`` keeps the
reason for :func:`asa_ops.explain`.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")


def load(library: Path) -> str | None:
    """Load the extension; return None if it is usable, otherwise the reason why not."""
    if not library.exists():
        return "the compiled extension is missing (no working C++ compiler when asa_ops was installed: reinstall)"
    try:
        torch.ops.load_library(library)
        number = torch.ops.asa_ops.extension_version()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"the compiled extension cannot be loaded ({error})"
    built = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    try:
        wanted = version("asa_ops")
    except PackageNotFoundError:  # a source tree on the path, not an installed package
        wanted = built
    return None if built == wanted else f"the compiled extension is of version {built}, asa_ops is {wanted}: reinstall"


WHY_MISSING = load(LIBRARY)


def has(op: str) -> bool:
    """Return whether the extension is loaded and holds the op ``asa_ops::<op>``."""
    return WHY_MISSING is None and hasattr(torch.ops.asa_ops, op)
