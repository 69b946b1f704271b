"""What all Triton kernels of asa_ops share: how they are compiled and launched, and what they do about rounding.

Scores are formed more than once: by the backward, and in adaptive sparse attention by later steps of the forward too,
in tiles of another shape. A score may then differ in its last bits from what an earlier kernel saw, and large scores
have large last bits: :func:`last_bits` bounds the difference, :func:`top_of` keeps exponentials clear of it.
"""

import functools
import logging

import torch
import triton
import triton.language as tl

from .contracts import NAMESPACE, allows_tf32

SLOW = 2.0  # seconds of compiling after which a process is told what it waits for


class CompileListener:
    """Says, once in a process, that it waits for Triton to compile kernels of ours.

    Triton calls it after every compilation and every look into its cache, never when it launches what it has. A line of
    the logger "asa_ops" reaches stderr unless somebody asks for less.
    """

    def __init__(self, others):
        self.others, self.seconds = others, 0.0

    def __call__(self, *, src, times, cache_hit, **more) -> None:
        if self.others is not None:
            self.others(src=src, times=times, cache_hit=cache_hit, **more)
        if cache_hit or not getattr(getattr(src, "fn", None), "__module__", "").startswith(f"{NAMESPACE}."):
            return
        was_told = self.seconds > SLOW
        self.seconds += times.total / 1e6
        if self.seconds > SLOW and not was_told:
            logging.getLogger("asa_ops").warning(
                "asa_ops: Triton compiles kernels for this kind of call, once on this machine: it keeps them in its "
                "cache. %.0f s so far.",
                self.seconds,
            )


triton.knobs.compilation.listener = CompileListener(triton.knobs.compilation.listener)


@functools.cache
def architecture(device: torch.device) -> int:
    """Return the row of the configuration tables for ``device``: 80, 90 or 100; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    if torch.version.hip is not None:
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


@functools.cache
def processors(device: torch.device) -> int:
    """Return how many programs ``device`` runs side by side, at one a multiprocessor."""
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def compile_options(warps: int = 4, stages: int = 1, registers: int | None = None) -> dict[str, int | bool | None]:
    """Return how kernels are compiled.

    Products and sums are never fused: the same score must be the same number in every kernel. ``registers``: as many as
    a thread may use; left to itself, ptxas may spill some to fit a second program.
    """
    return {"num_warps": warps, "num_stages": stages, "maxnreg": registers, "enable_fp_fusion": False}


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are formed: as torch's own."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def launch(
    kernel, grid: tuple[int, ...], *args, warps: int = 4, stages: int = 1, registers: int | None = None, **constants
) -> None:
    """Launch a Triton kernel: arguments by position, constexprs by name."""
    kernel[grid](*args, **constants, **compile_options(warps, stages, registers))


@triton.jit
def last_bits(score):
    """How far two kernels' values of a score of this size may be apart: eight units in the last place each."""
    return tl.abs(score) * 0.0000019073486328125  # 2^-19


@triton.jit
def top_of(largest):
    """Where the exponentials of a row begin, given its largest score: scores from here on weigh as much as that one.

    It is the largest itself, unless scores are so large that their last bits decide between everything and nothing.
    """
    return largest - tl.maximum(2 * last_bits(largest) - 1, 0)
