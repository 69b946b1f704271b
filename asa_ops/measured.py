"""Which kernels ``impl="auto"`` takes where both Triton's and the CUDA C++ ones can run: those measured faster."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measurement:
    """What was measured, and where to read it."""

    faster: str  # "triton" or "cuda"
    results: str  # file in bench/results
    commit: str  # of this repository, that was measured


# (kernel stem, head dim, dtype, (major, minor) compute capability). By the time on the device, in CUDA graphs: small
# calls, which launching costs most, are faster in CUDA C++ as called.
MEASUREMENTS: dict[tuple[str, int, torch.dtype, tuple[int, int]], Measurement] = {
    ("asa", 256, torch.bfloat16, (9, 0)): Measurement("triton", "nvidia-h200-summary.json", "37018a8"),
}


def faster(stem: str, dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Return "triton" or "cuda"; "triton" where nothing was measured.

    A head dim counts as the next larger one of 64, 128 and 256: kernels work on padded tiles.
    """
    padded = next(size for size in (64, 128, 256) if dim <= size)
    measurement = MEASUREMENTS.get((stem, padded, dtype, torch.cuda.get_device_capability(device)))
    return measurement.faster if measurement else "triton"


# To torch.compile the answer is a constant, as in triton_support.
faster._dynamo_marked_constant = True
