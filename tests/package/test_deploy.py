"""Packages of AOTInductor: they run without Python, in a program that loads the extension and nothing else of ours."""

import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from block_cases import alive
from cases import with_grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.cpp_extension import get_cxx_compiler

from asa_ops import asa_attention, nn
from asa_ops.core import extension

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(bool(extension.WHY_MISSING), reason=str(extension.WHY_MISSING)),
    pytest.mark.skipif(
        not Path(sysconfig.get_path("include"), "Python.h").exists(),
        reason="Inductor needs Python.h (Debian: apt install python3-dev)",
    ),
    pytest.mark.xdist_group("deploy"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """Build the example by the command that it names."""
    source = ROOT / "examples" / "deploy" / "run.cpp"
    lines = re.search(r"//   g\+\+(.*?)\n\n", source.read_text(), re.DOTALL)[1].replace("\\\n//", "")
    words = lines.replace("$TORCH", str(Path(torch.__file__).parent)).replace("-O2", "-O0").split()
    run = tmp_path_factory.mktemp("deploy") / "run"
    words[words.index("run.cpp")], words[words.index("run")] = str(source), str(run)
    subprocess.run([*shlex.split(get_cxx_compiler()), *words], check=True)
    return run


def packaged(exported, path: Path) -> Path:
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    return path


def run_alone(program: Path, package: Path, inputs: list[torch.Tensor], folder: Path) -> tuple[torch.Tensor, ...]:
    torch.save(inputs, folder / "inputs.pt")
    command = [program, extension.LIBRARY, package, folder / "inputs.pt", folder / "outputs.pt"]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return torch.load(folder / "outputs.pt")


@pytest.mark.slow
def test_a_block_for_maps_of_any_size(program, tmp_path):
    block = alive(nn.AdaptiveSparseAttention(8)).eval().requires_grad_(False)
    any_size = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(block, (torch.randn(1, 8, 6, 8),), dynamic_shapes=(any_size,))
    package = packaged(exported, tmp_path / "block.pt2")
    for size in ((6, 8), (17, 9)):
        x = torch.randn(1, 8, *size)
        (out,) = run_alone(program, package, [x], tmp_path)
        torch.testing.assert_close(out, block(x), rtol=1e-4, atol=1e-5)
    # In Python too nothing but the extension is needed.
    torch.save(x, tmp_path / "x.pt")
    script = f"""
import sys, torch
torch.ops.load_library({str(extension.LIBRARY)!r})
out = torch._inductor.aoti_load_package({str(package)!r})(torch.load({str(tmp_path / "x.pt")!r}))
assert "asa_ops" not in sys.modules
torch.save(out, {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=100)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), out)


def gradients(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the output and the gradients of query, key, value and alpha; the last input is that of the output."""
    *leaves, grad_out = inputs
    leaves = with_grad(leaves)
    out = asa_attention(*leaves, threshold_grad="straight_through")
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


@pytest.mark.slow
def test_the_gradient_as_a_function(program, tmp_path):
    inputs = [*torch.randn(3, 1, 2, 70, 8), torch.ones(1, 1, 70), torch.randn(1, 2, 70, 8)]
    exported = torch.export.export(make_fx(gradients)(*inputs), tuple(inputs))
    assert {"asa_fwd", "asa_bwd"} <= {
        str(node.target).split(".")[1] for node in exported.graph.nodes if "asa" in str(node.target)
    }
    package = packaged(exported, tmp_path / "gradients.pt2")
    for_any_size = make_fx(gradients, tracing_mode="symbolic")(*inputs)
    larger = [*torch.randn(3, 1, 2, 90, 8), torch.ones(1, 1, 90), torch.randn(1, 2, 90, 8)]
    torch.testing.assert_close(for_any_size(*larger), gradients(*larger))
    other = [x + 0.1 * torch.randn_like(x) for x in inputs]
    torch.testing.assert_close(run_alone(program, package, other, tmp_path), gradients(*other), rtol=1e-4, atol=1e-5)
