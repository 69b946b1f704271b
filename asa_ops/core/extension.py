"""The compiled extension ``_C.abi3.so``: loaded on import if it can be, never required.

The library works without it (``impl="blocked"`` and ``"reference"`` are plain PyTorch); ``WHY_MISSING`` keeps the
reason for :func:`asa_ops.explain`.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .contracts import NAMESPACE, OPS, constant_under_compile

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"


def load(library: Path) -> str | None:
    """Load the extension; return None if it is usable, otherwise the reason why not."""
    if not library.exists():
        return (
            "the compiled extension is missing, asa_ops was installed without a working C++ compiler: install one "
            "(Debian: apt install g++), then asa_ops again, with ASA_OPS_REQUIRE_EXT=1 to hear why it fails"
        )
    try:
        torch.ops.load_library(library)
        number = OPS.extension_version()
    except (OSError, AttributeError, RuntimeError) as error:
        return (
            f"the compiled extension cannot be loaded ({error.__cause__ or error})"  # the cause names what is missing
        )
    built = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    try:
        wanted = version(NAMESPACE)
    except PackageNotFoundError:  # a source tree on the path, not an installed package
        wanted = built
    return None if built == wanted else f"the compiled extension is of version {built}, asa_ops is {wanted}: reinstall"


WHY_MISSING = load(LIBRARY)


@constant_under_compile
def has(op: str, key: str) -> bool:
    """Return whether the op ``asa_ops::<op>`` has a kernel for ``key``, "CPU" or "CUDA": a schema does not tell."""
    if WHY_MISSING or not hasattr(OPS, op):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)


def cuda_architectures() -> tuple[str, ...]:
    """Return the GPUs that the extension holds machine code for, 10 * compute capability, ascending.

    "90a" is code for compute capability 9.0 alone. Of the last without a letter it also holds PTX, which newer GPUs
    compile. Empty: it was built without CUDA, or cannot be loaded.
    """
    listed = "" if WHY_MISSING else OPS.cuda_architectures()
    return tuple(arch for arch in listed.split(";") if arch)


def cuda_versions() -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the newest CUDA that the driver here runs, (0, 0) without one, and the CUDA of the extension's kernels."""
    driver, built = OPS.cuda_versions()
    return (driver // 1000, driver % 1000 // 10), (built // 1000, built % 1000 // 10)
