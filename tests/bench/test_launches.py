"""What is known of the launches of asa_ops' Triton kernels: in the interpreter, and on tensors without memory."""

import functools
import subprocess
import sys

import pytest
import torch
from bench_cases import stand_in_for_cuda, tiles
from cases import Case, make
from compare import survivors
from gpu_cases import CONFIGURATIONS, configured

from asa_ops import asa_attention
from asa_ops.core import devices
from bench import measure, report, run, workloads
from bench.record import Record

launches = pytest.importorskip("bench.triton.launches", reason="needs Triton")
tune = pytest.importorskip("bench.triton.tune", reason="needs Triton")
pytestmark = pytest.mark.skipif(not devices.triton_is_interpreted(), reason="not in Triton's interpreter")


SPEC = workloads.Spec("asa", "8x8", 16, 1, 1, "float32", "labels", None)


@pytest.fixture
def on_cpu(monkeypatch):
    """Build the workloads of a GPU on the CPU, with what stands for torch.cuda."""
    build = workloads.build
    monkeypatch.setattr(workloads, "build", lambda spec, device, *others: build(spec, "cpu", *others))
    stand_in_for_cuda(monkeypatch)


def test_operations_of_a_call_are_counted(on_cpu):
    """Of the launches of a real call, backward included; kernels are timed with what stands for torch.cuda."""
    grid, n = (3, 45), 135
    case = Case("small", grid=grid, batch=1, heads=1, dim=16, dim_v=16, sharpness=9.0, beta=None)
    inputs, options = make(case, torch.float32)
    inputs[3][..., 90:] = torch.inf  # some tiles are empty
    leaves = [x.requires_grad_() for x in inputs[:3]]

    def call():
        out = asa_attention(*leaves, inputs[3], **options, impl="triton")
        torch.autograd.grad(out.sum(), leaves)

    flops = launches.operations(call, n)
    assert {"statistics", "mask", "aggregate", "dq"} < set(flops) <= {*launches.MATRIX_KERNELS, "dkv"}
    assert "dkv" in flops or ("dk" in flops and "dv" in flops)
    assert flops["statistics"] == 2 * n * n * 16
    times = launches.kernel_seconds(call, repeats=2)
    assert set(flops) < set(times) and all(seconds > 0 and count > 0 for seconds, count in times.values())
    assert all(times[name][1] == 1 for name in ("statistics", "arrange", "arrange_backward"))
    active = tiles(survivors("reference", inputs, options), grid)
    assert not active.all()
    assert flops["aggregate"] == 2 * (16 + 16) * 64**2 * active.sum()  # the interpreter's blocks are 64 rows


@pytest.mark.slow
def test_a_case_on_a_gpu_has_graphs_kernels_and_bytes(on_cpu, monkeypatch):
    monkeypatch.setattr(run, "REPEATS", 2)
    used = run.measured(SPEC, "mem", "cuda", ["triton"], [], 1)
    assert [used.bytes("asa triton", mode) for mode in ("fwd", "fwd+bwd")] == [2000, 2000]
    case = run.measured(SPEC, "fwd+bwd", "cuda", ["triton"], ["sdpa math", "eager"], 2)
    assert [method.error for method in case.methods.values()] == [None] * 3
    assert [len(case.times(name, "graph")) for name in ("asa triton", "sdpa math", "eager")] == [2, 2, 0]
    assert case.kernels["dq"].flops > 0 and case.kernels["arrange"].flops is None and case.sparsity
    assert "| labels | 8x8 | 16 | fwd+bwd | dq | " in report.sections(Record({}, {}, [case]))


def test_configurations_reach_every_row_of_the_table(monkeypatch):
    """The launches of the calls in test_gpu.py, on tensors without memory, choose every row on a Hopper GPU."""
    from asa_ops.asa.triton import configs

    used = set()

    class Recording(dict):
        def __getitem__(self, row):
            used.add(row)
            return super().__getitem__(row)

    monkeypatch.setattr(configs, "_TABLE", Recording(configs._TABLE))
    made = functools.cache(lambda dim, variant: make(configured(dim, variant), device="meta"))
    for (dim, dtype, arch), variant in CONFIGURATIONS:
        inputs, options = made(dim, variant)
        tensors = [x if x is None else x.to(dtype) for x in inputs]
        with launches.intercepted(lambda launch, run: None, architecture=arch or 90):
            for band in (None, 2.0):
                launches.go_through(tensors, options, band, options.get("key_padding_mask"))
    assert used == set(configs._TABLE)


def test_a_row_of_the_table_is_replaced_for_a_while():
    row = launches.configuration("aggregate", 64, 90)
    tensors = [torch.empty(1, 1, 256, 64, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    tensors += [torch.empty(1, 1, 256, device="meta"), None]
    found = []

    def keep(launch, run):
        if launch.label == "aggregate":
            found.append((launch.named["num_stages"], launch.grid))

    with launches.intercepted(keep, architecture=90):
        for splits in (1, 4):
            with launches.configured("aggregate", 64, 90, row._replace(stages=7), splits):
                launches.go_through(tensors, {"grid": (16, 16)})
        launches.go_through(tensors, {"grid": (16, 16)})
    assert [stages for stages, _ in found] == [7, 7, row.stages] and found[0] != found[1]


def test_candidates_of_the_tuner_fit_and_begin_with_the_row(on_cpu):
    for kernel in tune.KERNELS:
        row = launches.configuration(kernel, 128, 80) or launches.configuration(kernel, 256, 80)
        found = tune.candidates(kernel, 128, row, 101376)
        assert found[0].config == row and len(set(found)) == len(found) > 2 and str(found[0])
        assert all(tune.shared(kernel, x.config, 128) <= 101376 for x in found[1:] if x.config != row)
    x = torch.ones(2, 3)
    assert tune.difference((x, 1.1 * x), (x, x)) == pytest.approx(0.1)
    assert [len(call()) for call in tune.calls_on(SPEC)] == [1, 3]


def test_without_a_device_the_tuner_says_so():
    command = [sys.executable, "-m", "bench.triton.tune"]
    found = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, check=False)
    assert torch.cuda.is_available() or "bench.triton.tune needs a CUDA device" in found.stderr
