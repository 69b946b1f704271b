"""How the CUDA kernels compile: what was built with the extension, one file for sm_90a, and what counts as wrong."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from asa_ops.core import extension
from bench.cuda import budget
from bench.cuda.launches import Launch
from tests import simt

needs_disassembler = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton's disassembler")

# What was compiled.


@needs_disassembler
@pytest.mark.parametrize("source", budget.SOURCES, ids=budget.stem_of)
def test_built_kernels_keep_to_their_budget(source):
    """As they were compiled with the extension, for each of its architectures."""
    built = extension.cuda_architectures()
    compiled = budget.ROOT / "build/cuda" / "-".join(built) / source.relative_to(budget.CSRC).with_suffix(".o")
    archs = [arch for arch in built if budget.is_for(source, arch)]
    if not archs or not compiled.exists():
        pytest.skip("the extension was built without these kernels, or elsewhere")
    for arch in archs:
        kernels, wrong = budget.read(source, compiled, arch)
        assert wrong + [(x.label, reason) for x in kernels for reason in budget.check(source, x)] == [], arch


@needs_disassembler
@pytest.mark.skipif(not shutil.which("nvcc") or not simt.COMPILER, reason="needs nvcc and a C++ compiler")
@pytest.mark.xdist_group("cuda_budget")  # they compile to the same folder
@pytest.mark.slow
@pytest.mark.parametrize("options", [["--quick"], []], ids=["one_file", "all"])
def test_kernels_keep_to_their_budget(options):
    """As `make cuda-kernels` tells."""
    command = [sys.executable, "-m", "bench.cuda.budget", *options]
    run = subprocess.run(command, cwd=budget.ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "\nOK: " in run.stdout, run.stdout[-5000:] + run.stderr[-5000:]


# What counts as wrong, in what the assembler might tell and the disassembler list.

HOPPER, TILES, ROWS = (Path(f"csrc/cuda/asa/{name}.cu") for name in ("hopper/dq", "sums", "finish"))
NAMES = {
    "dq": "_ZN7asa_ops4cuda6hopper12_GLOBAL__N_113asa_dq_kernelINS0_4HalfELi256EEEvi",
    "half": "_ZN7asa_ops4cuda12_GLOBAL__N_115asa_sums_kernelINS0_4HalfELi64ELNS1_4FormE2EEEvi",
    "single": "_ZN7asa_ops4cuda12_GLOBAL__N_115asa_sums_kernelIfLi64ELNS1_4FormE2EEEvi",
    "delta": "_ZN7asa_ops4cuda12_GLOBAL__N_124asa_correct_delta_kernelEi",
}
PRODUCT = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24"
HANDED_OVER = ["USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0", "@P1 USETMAXREG.DEALLOC.CTAPOOL 0x18"]


def made_up(name: str, *instructions: str, registers: int = 168, spills: int = 0, arch: str = "90a", shared: str = ""):
    """Return what the assembler tells of one kernel, and what the disassembler lists."""
    told = f"ptxas info    : Compiling entry function '{NAMES[name]}' for 'sm_{arch}'\n"
    told += f"ptxas info    : Function properties for {NAMES[name]}\n"
    told += f"    {spills} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads\n"
    told += f"ptxas info    : Used {registers} registers, used 4 barriers{shared}\n"
    listing = f"\n\t\tFunction : {NAMES[name]}\n"
    for i, instruction in enumerate(["LDC R1, c[0x0][0x28]", *instructions]):
        listing += f"        /*{16 * i:04x}*/                   {instruction} ;      /* 0x00e0000004b879f0 */\n"
    return told, listing


def kernel_of(*arguments, arch: str = "90a", **options) -> budget.Kernel:
    (kernel,) = budget.kernels_of(*made_up(*arguments, arch=arch, **options), arch)
    return kernel


def test_what_is_read_of_a_kernel():
    kernel = kernel_of("dq", *HANDED_OVER, PRODUCT, "UBLKCP.S.G [UR26], [UR18], UR7", shared=", 48 bytes smem")
    assert kernel == ("hopper::asa_dq_kernel<Half, 256>", 24 + 128, 168, 240, 0, 48, 0, 1, 1)
    kernel = kernel_of("single", "HMMA.16816.F32 R4, R8, R12, R4", "LDGSTS.E.BYPASS.128 [R3], [R6.64]", spills=8)
    assert kernel == ("asa_sums_kernel<float, 64, (Form)2>", 168, 168, 0, 8, 0, 1, 0, 1)
    assert kernel_of("delta").label == "asa_correct_delta_kernel"


def test_one_architecture_of_several_is_read():
    told = made_up("half", registers=100, arch="80")[0] + made_up("half", registers=90, arch="100")[0]
    for arch, registers in (("80", 100), ("100", 90)):
        assert [x.registers for x in budget.kernels_of(told, made_up("half")[1], arch)] == [registers]


@pytest.mark.parametrize("told,listing", [("dq", "half"), ("dq", None), (None, "dq"), (None, None)])
def test_kernels_of_the_assembler_and_of_the_disassembler_are_the_same(told, listing):
    with pytest.raises(ValueError, match="the assembler tells of"):
        budget.kernels_of(made_up(told)[0] if told else "", made_up(listing)[1] if listing else "", "90a")


HMMA, COPY = "HMMA.16816.F32.BF16 R4, R8, R12, R4", "LDGSTS.E.BYPASS.128 [R3], [R6.64]"


@pytest.mark.parametrize(
    "source,name,instructions,numbers,wrong",
    [
        (HOPPER, "dq", [PRODUCT], {}, []),
        (HOPPER, "dq", [PRODUCT], {"spills": 4}, ["4 bytes spilled, at most 0 allowed"]),
        (HOPPER, "dq", [HMMA, COPY], {}, ["no HGMMA instruction"]),
        (HOPPER, "dq", [*HANDED_OVER, PRODUCT, "MOV R239, RZ"], {}, []),
        (HOPPER, "dq", [*HANDED_OVER, PRODUCT.replace("R24", "R120")], {}, ["248 registers, at most 240 allowed"]),
        (TILES, "half", [HMMA, COPY], {"registers": 255}, []),
        (TILES, "half", [HMMA, COPY], {"registers": 256}, ["256 registers, at most 255 allowed"]),
        (TILES, "half", [HMMA, COPY], {"spills": 8}, ["8 bytes spilled, at most 0 allowed"]),
        (TILES, "half", [COPY], {}, ["0 HMMA instructions"]),
        (TILES, "half", [HMMA], {}, ["no asynchronous copy"]),
        (TILES, "single", [COPY], {"spills": 32}, []),
        (TILES, "single", [COPY], {"spills": 36}, ["36 bytes spilled, at most 32 allowed"]),
        (TILES, "single", [COPY, HMMA], {}, ["1 HMMA instructions"]),
        (ROWS, "delta", [], {}, []),
    ],
)
def test_kernels_beyond_their_budget(source, name, instructions, numbers, wrong):
    assert budget.check(source, kernel_of(name, *instructions, **numbers)) == wrong


@pytest.mark.parametrize(
    "line",
    [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to",
        "ptxas info    : (C7519) warpgroup.arrive is injected in around line 27412 by compiler to allow use of",
        "ptxas info    : Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirements.",
    ],
)
def test_products_one_after_another(line):
    told, listing = made_up("dq", PRODUCT)
    kernels = budget.kernels_of(told, listing, "90a")
    assert budget.check_file(HOPPER, told, kernels) == []
    assert budget.check_file(HOPPER, f"{line}\n{told}", kernels) == [line]


def test_kernels_with_tiles_that_have_another_name():
    assert budget.check_file(TILES, "", [kernel_of("half")]) == []
    assert budget.check_file(TILES, "", [kernel_of("delta")]) == ["no kernel is called asa_sums_kernel"]


@pytest.mark.parametrize(
    "arch,registers,threads,shared,fit",
    [
        ("80", 32, 128, 0, 16),  # threads
        ("80", 32, 32, 0, 32),  # programs
        ("80", 128, 128, 0, 4),  # registers, of which every quarter of a multiprocessor has its own
        ("80", 129, 128, 0, 3),
        ("80", 64, 160, 0, 6),
        ("90a", 168, 384, 115956, 1),
        ("80", 64, 128, 81 * 1024, 2),  # shared memory, of which every program takes 1024 bytes more
        ("80", 64, 128, 81 * 1024 + 1, 1),
        ("100", 64, 128, 113 * 1024, 2),
        ("100", 64, 128, 228 * 1024, 0),
    ],
)
def test_programs_of_a_multiprocessor(arch, registers, threads, shared, fit):
    kernel = kernel_of("half", registers=registers, arch=arch)
    assert budget.programs(kernel, Launch(threads, shared), arch) == fit


def test_launches_beyond_what_there_is():
    kernel = kernel_of("half", shared=", 1024 bytes smem")
    assert budget.check_launches(kernel, [Launch(128, 0), Launch(128, 231424)], "90a") == []
    too_much = ["232449 bytes of shared memory, the limit is 232448"]
    assert budget.check_launches(kernel, [Launch(128, 231425), Launch(128, 0)], "90a") == too_much
    assert budget.check_launches(kernel, [], "90a") == ["no call of bench/cuda/launches.py launches it"]
    kernel = kernel_of("half", registers=255)
    assert budget.check_launches(kernel, [Launch(384, 0)], "90a") == ["not one program has room on a multiprocessor"]
