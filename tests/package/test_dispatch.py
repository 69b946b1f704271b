"""Which implementation is taken on machines that are not this one: calls are made of their description."""

import pytest
import torch

import asa_ops
from asa_ops.core import devices, dispatch, extension


@pytest.fixture
def machine(monkeypatch):
    """Return a function that sets what is found: a GPU with its driver, and an extension with CUDA kernels."""

    def found(capability=(9, 0), driver=(13, 0), images=("80", "90a", "100"), kernels=("CUDA",), missing=None):
        monkeypatch.setattr(extension, "WHY_MISSING", missing)
        monkeypatch.setattr(extension, "cuda_architectures", lambda: images)
        monkeypatch.setattr(extension, "cuda_versions", lambda: (driver, (13, 0)))
        monkeypatch.setattr(extension, "has", lambda op, key: op == f"asa_{key.lower()}_fwd" or key in kernels)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    monkeypatch.setattr(devices, "_why_no_cuda_on", devices._why_no_cuda_on.__wrapped__)
    monkeypatch.setattr(devices, "_why_no_triton_on", lambda device: None)
    return found


def call(device="cuda", dtype=torch.bfloat16, dim=64):
    return dispatch.Call("asa_attention", "asa", torch.device(device), dtype, dim)


REASONS = {
    "float64": ({}, {"dtype": torch.float64}, "take float16, bfloat16 and float32, not float64: impl='reference' does"),
    "wide": ({}, {"dim": 257}, "CUDA kernels take head dims up to 256, got 257: impl='blocked' takes any"),
    "missing": ({"missing": "it was never built"}, {}, "it was never built"),
    "built without": ({"images": ()}, {}, "this build of the extension holds no CUDA kernels"),
    "no driver": ({"driver": (0, 0)}, {}, "there is no NVIDIA driver here"),
    "old driver": ({"driver": (12, 8)}, {}, "runs CUDA 12.8 at most, the CUDA kernels were built with 13.0: update it"),
    "no device": ({"capability": None}, {}, "finds no CUDA device here"),
    "old device": ({"capability": (7, 5)}, {}, r"need compute capability >= \(8, 0\), this device has \(7, 5\)"),
    "no image": (
        *({"capability": (8, 6), "images": ("90",)}, {}),
        r"this device has compute capability \(8, 6\), this build holds CUDA kernels for \(9, 0\) and newer ones only",
    ),
    "minor": (
        *({"capability": (8, 0), "images": ("86", "90")}, {}),
        r"this device has compute capability \(8, 0\), this build holds CUDA kernels for \(8, 6\), \(9, 0\) and newer",
    ),
    "for another alone": (
        *({"capability": (10, 0), "images": ("90a",)}, {}),
        r"this device has compute capability \(10, 0\), this build holds CUDA kernels for \(9, 0\) only",
    ),
    "between": (
        *({"capability": (9, 0), "images": ("100",)}, {}),
        r"this device has compute capability \(9, 0\), this build holds CUDA kernels for \(10, 0\) and newer ones only",
    ),
    "on the cpu": ({}, {"device": "cpu"}, "CUDA kernels need CUDA tensors, these are on cpu"),
    "on meta": ({}, {"device": "meta"}, "CUDA kernels need CUDA tensors, these are on meta"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_cuda_kernels_cannot_run_is_explained(name, machine):
    found, asked, reason = REASONS[name]
    machine(**found)
    with pytest.raises(RuntimeError, match=f"impl='cuda' cannot run this asa_attention call: .*{reason}"):
        dispatch.resolve(call(**asked), "cuda")
    assert dispatch.resolve(call(**asked), "auto") != "cuda"


@pytest.mark.parametrize("images", [("80", "90a", "100"), ("80", "90a"), ("80", "90")], ids="-".join)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)])
def test_devices_that_an_image_serves(capability, images, machine):
    """Machine code of sm_80 on 8.x, of sm_90 or sm_90a on 9.0, PTX of the last without a letter on what came later."""
    machine(capability=capability, images=images)
    assert dispatch.resolve(call(), "cuda") == "cuda"


def test_auto_takes_what_was_measured_faster(machine, monkeypatch):
    machine()
    assert dispatch.resolve(call(), "auto") == "triton"
    entry = dispatch.Measurement("cuda", "gpu.json", "0123456")
    monkeypatch.setitem(dispatch.MEASUREMENTS, ("asa", 64, torch.bfloat16, (9, 0)), entry)
    assert dispatch.resolve(call(), "auto") == dispatch.resolve(call(dim=40), "auto") == "cuda"
    assert "cuda       runs" in dispatch.explain(call(), "auto")
    for other in (call(dim=65), call(dtype=torch.float16)):
        assert dispatch.resolve(other, "auto") == "triton"
    machine(capability=(8, 0))
    assert dispatch.resolve(call(), "auto") == "triton"


def test_auto_takes_cuda_where_triton_cannot(machine, monkeypatch):
    machine()
    monkeypatch.setattr(devices, "_why_no_triton_on", lambda device: "no Triton")
    assert dispatch.resolve(call(), "auto") == "cuda"


def test_an_emulation_runs_only_when_it_is_asked_for(machine):
    machine(capability=None, driver=(0, 0), kernels=("CPU",))
    assert dispatch.resolve(call("cpu"), "cuda") == "cuda"
    assert dispatch.resolve(call("cpu"), "auto") == "cpu"


def test_measurements_name_known_kernels_and_files():
    for (stem, dim, _, _), measurement in dispatch.MEASUREMENTS.items():
        assert {"triton", "cuda"} <= set(dispatch.IMPLEMENTATIONS[stem]) and dim in (64, 128, 256)
        assert measurement.faster in ("triton", "cuda")
        assert measurement.results and measurement.commit


def test_explain_names_what_runs_and_why_the_others_do_not(monkeypatch):
    monkeypatch.setattr(devices, "triton_is_interpreted", lambda: False)
    monkeypatch.setattr(devices, "_why_no_triton_on", devices._why_no_triton_on.__wrapped__)
    monkeypatch.setattr(extension, "has", lambda op, key, has=extension.has: "emulated" not in op and has(op, key))
    query = torch.randn(1, 1, 16, 8)
    lines = asa_ops.explain(query).splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names == list(dispatch._PREDICATES)
    start, chosen = lines[0].rsplit(" ", 1)
    assert start == "asa_attention on cpu, torch.float32, impl='auto':"
    assert lines[1 + names.index(chosen)].endswith("runs")
    assert "need CUDA tensors" in lines[1 + names.index("triton")]
    with pytest.raises(TypeError, match="unexpected keyword argument 'windw'"):
        asa_ops.explain(query, windw=3)
    assert "an error" in asa_ops.explain(query, impl="cuda").splitlines()[0]


def test_explain_says_why_the_extension_is_missing(monkeypatch):
    monkeypatch.setattr(extension, "WHY_MISSING", "it was never built")
    monkeypatch.setattr(dispatch, "remembered", dispatch.resolve)
    x = torch.randn(1, 1, 16, 8)
    assert "cpu        it was never built" in asa_ops.explain(x)
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run this asa_attention call: it was never built"):
        asa_ops.asa_attention(x, x, x, impl="cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_call_that_the_missing_extension_would_run_warns_once(device, machine, monkeypatch):
    machine(missing="it was never built")
    monkeypatch.setattr(devices, "_why_no_triton_on", lambda device: "there is no Triton")
    dispatch._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch, which is slower: it was never built") as caught:
        assert [dispatch.choose(call(device, dim=dim), "auto") for dim in (64, 128)] == ["blocked"] * 2
    assert len(caught) == 1
    dispatch._warn_once.cache_clear()


@pytest.mark.parametrize("missing", [None, "it was never built"])
def test_other_calls_do_not_warn_of_the_extension(missing, machine, recwarn):
    machine(missing=missing)
    dispatch._warn_once.cache_clear()
    assert dispatch.choose(call("cuda"), "auto") == "triton"
    assert dispatch.choose(call("cpu")._replace(no_kernels="there are none"), "auto") == "blocked"
    assert dispatch.choose(call("cpu"), "blocked") == "blocked"
    assert not recwarn.list
