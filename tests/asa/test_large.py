"""Large N: memory stays linear but for one bit per pair. Each case runs in a process of its own."""

import subprocess
import sys

import pytest
from implementations import slow

PROGRAM = """
import pathlib, sys, torch
from asa_ops import asa_attention
n, backward, impl = int(sys.argv[1]), sys.argv[2] != "forward", sys.argv[3]
torch.set_num_threads(2)  # each has buffers of its own
learn = "straight_through" if sys.argv[2] == "learning" else None
q, k, v = torch.randn(3, 1, 1, n, 80)
v = v[..., :3].contiguous()
alpha = torch.full((1, 1, n), 2.0, requires_grad=learn is not None)
asa_attention(q[:, :, :512], k[:, :, :512], v[:, :, :512], alpha[..., :512], impl=impl)  # first-use buffers
def peak():  # ru_maxrss would include the parent's
    return 1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
leaves = [x.requires_grad_(backward) for x in (q, k, v)]
out, stats = asa_attention(*leaves, alpha, threshold_grad=learn, impl=impl, return_stats=True)
if backward:
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
assert out.isfinite().all() and (stats.survivors > 0).any()
print(peak() - before)
"""


def extra_memory(n: int, direction: str, impl: str) -> int:
    command = [sys.executable, "-c", PROGRAM, str(n), direction, impl]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("impl", "direction", "blocks"),
    [
        slow("cpu", "forward", 50e6),
        slow("cpu", "backward", 80e6),
        ("cpu", "learning", 120e6),  # which has the others in it
        slow("blocked", "forward", 50e6),
        slow("blocked", "backward", 80e6),
        slow("blocked", "learning", 120e6),
    ],
)
def test_memory_at_9216(impl, direction, blocks):
    bits = 9216**2 / 8
    assert 0 < extra_memory(9216, direction, impl) < bits + blocks  # one dense float32 matrix: 340 MB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("impl", "limit"), [("blocked", 2e9), ("cpu", 1.2e9)])
def test_memory_at_65536(impl, limit):
    assert 0 < extra_memory(65536, "forward", impl) < limit  # one dense float32 matrix: 17 GB
