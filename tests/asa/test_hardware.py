"""The hardware layer of kernels for sm_90a (csrc/cuda/hopper/device.h) in its emulation: csrc/testing/hardware.cu.

The program holds every wrapper against numbers from the CPU. On a GPU it is compiled and run as its first lines say.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import simt
import torch
from implementations import slow

SOURCE = simt.ROOT / "csrc/testing/hardware.cu"
WRONG, IN_VAIN = "wrong numbers", "wait in vain, for a barrier in shared memory"
# Of a pipeline with one mistake, what the emulation says in one of its extremes at least.
TOLD = {
    "NoWaitForCopy": "more arrivals at a barrier than it waits for",
    "WrongParityOfFull": IN_VAIN,
    "WrongParityOfEmpty": IN_VAIN,
    "NeverFreed": IN_VAIN,
    "FreedEarly": WRONG,
    "NoFence": "without products_fence",
    "NoCommit": "settled before the wait",
    "NoWaitForProducts": "not waited for at its end",
    "WaitForTooFew": "settled before the wait",
    "WrittenUnderWay": "registers of products under way were written",
    "NoHandOver": "wait in vain, for a barrier in shared memory and registers",
    "HandOverTooSmall": "wait in vain, for a barrier in shared memory and registers",
    "EveryLaneArrives": IN_VAIN,
    "OneArrivalTooMany": IN_VAIN,
    "OneArrivalTooFew": IN_VAIN,
    "NotAnnounced": "without barrier_init_done and __syncthreads",
    "NotSynchronized": "without barrier_init_done and __syncthreads",
    "TooFewBytesExpected": IN_VAIN,
    "TooManyBytesExpected": IN_VAIN,
    "OneWarpLess": "warps of a warpgroup differ",
    "OneLaneLess": "lanes of a warp meet in products and products_commit",
    "MemoryTooSmall": "past the ends of shared memory",
    "NotAligned": WRONG,
    "WrongPanel": "past the ends of shared memory",
    "AnotherCopy": "copies are under way at its end",
    "BarrierOverwritten": "a barrier was written over",
    "BarrierMadeTwice": "a barrier is made twice",
    "NotUniform": "lanes differ in what is uniform",
    "NoSyncWarp": IN_VAIN,
}
emulated = pytest.mark.skipif(not simt.AVAILABLE, reason="no C++ compiler here, or a GPU: kernels run there")
extremes = pytest.mark.parametrize("reversed", [False, True], ids=["late", "early"])


def told(*arguments: str, sanitize: bool = False, **environment: str) -> str:
    command = [simt.build_program(SOURCE, sanitize), *arguments]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@emulated
@pytest.mark.parametrize("reversed", [slow(False, id="late"), pytest.param(True, id="early")])
def test_wrappers_give_the_right_numbers(reversed):
    lines = told(**({"ASA_OPS_SIMT_REVERSED": "1"} if reversed else {})).splitlines()
    assert len(lines) > 60 and all(line.endswith(" ok") for line in lines)


@emulated
def test_products_round_when_asked_to():
    """Sums of whole numbers are exact, and no longer so."""
    run = subprocess.run(simt.build_program(SOURCE), env=os.environ | {"ASA_OPS_SIMT_ULPS": "4"}, capture_output=True)
    assert run.returncode == 1 and re.search(rb"float16 m64n64, left K-major.* WRONG", run.stdout)


@pytest.fixture(scope="module")
def mistakes() -> list[tuple[str, ...]]:
    """Return, for each mistake, what is said of it in either extreme."""
    both = told("faults"), told("faults", ASA_OPS_SIMT_REVERSED="1")
    return list(zip(*(text.splitlines() for text in both), strict=True))


@emulated
def test_every_mistake_has_a_test(mistakes):
    listed = re.search(r"enum Mistake \{(.*?)\}", SOURCE.read_text(), re.S)[1]
    names = re.findall(r"k(\w+),", listed)
    assert names == ["None", *TOLD, "Mistakes"] and len(mistakes) == len(TOLD)


@emulated
@pytest.mark.parametrize("mistake", TOLD)
def test_a_mistake_is_told(mistake, mistakes):
    assert any(TOLD[mistake] in line for line in mistakes[list(TOLD).index(mistake)])


@emulated
@pytest.mark.slow
@extremes
def test_wrappers_stay_in_bounds_under_sanitizers(reversed):
    told(sanitize=True, ASAN_OPTIONS="detect_leaks=0", **({"ASA_OPS_SIMT_REVERSED": "1"} if reversed else {}))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
def test_compiles_for_gpus(tmp_path: Path):
    """Without spills and with products that overlap on compute capability 9.0, and to nothing on others."""
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    run = subprocess.run(["nvcc", *flags, "-c", SOURCE, "-o", tmp_path / "hardware.o"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "C75" not in run.stderr
    spills = re.findall(r"(\d+) bytes spill", run.stderr)
    assert len(spills) > 200 and set(spills) == {"0"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_wrappers_give_the_right_numbers_on_a_gpu(tmp_path: Path):
    if not shutil.which("nvcc") or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no nvcc here, or no GPU of compute capability 9.0")
    flags = ["-std=c++17", "-O3", "--fmad=false", "-arch=sm_90a"]
    subprocess.run(["nvcc", *flags, SOURCE, "-o", tmp_path / "hardware"], check=True)
    run = subprocess.run(tmp_path / "hardware", stdout=subprocess.PIPE, text=True, timeout=60)
    assert run.returncode == 0, run.stdout
