"""Large N: memory stays linear but for one bit per pair. Each case runs in a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from asa_ops import asa_attention
n, backward = int(sys.argv[1]), sys.argv[2] == "backward"
q, k, v = torch.randn(3, 1, 1, n, 80)
v = v[..., :3].contiguous()
alpha = torch.full((1, 1, n), 2.0)
asa_attention(q[:, :, :512], k[:, :, :512], v[:, :, :512], alpha[..., :512], impl="blocked")  # first-use buffers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
leaves = [x.requires_grad_(backward) for x in (q, k, v)]
out, stats = asa_attention(*leaves, alpha, impl="blocked", return_stats=True)
if backward:
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
assert out.isfinite().all() and (stats.survivors > 0).any()
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def extra_memory(n: int, direction: str) -> int:
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(n), direction], check=True, capture_output=True, text=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_at_9216(direction):
    bits, blocks = 9216**2 / 8, 160e6
    assert extra_memory(9216, direction) < bits + blocks  # one dense float32 matrix: 340 MB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_memory_at_65536():
    assert extra_memory(65536, "forward") < 2e9  # one dense float32 matrix: 17 GB
