"""What a type checker says of programs that use the public names."""

import subprocess
import sys
from pathlib import Path

import asa_ops

ROOT = Path(__file__).parents[2]
# Of an ignored error that it does not find mypy complains, too: pyproject.toml says so. What that allows within asa_ops
# is not allowed here: public functions have types.
PROGRAM = """
# mypy: disallow-untyped-calls, warn-return-any
import torch
from torch import Tensor
from asa_ops import AsaStats, NeighborGraph, asa_attention, criss_cross_attention, linear_attention, nn
from asa_ops import explain, reciprocal_neighbors

x = torch.randn(1, 1, 64, 8)
out: Tensor = asa_attention(x, x, x)
pair: tuple[Tensor, AsaStats] = asa_attention(x, x, x, grid=(8, 8), return_stats=True)
lse: Tensor = pair[1].lse
wrong: Tensor = asa_attention(x, x, x, return_stats=True)  # type: ignore[assignment]
asa_attention(x, x, x, impl="fast")  # type: ignore[call-overload]
asa_attention(x, x, x, threshold_grad="yes")  # type: ignore[call-overload]


def either(stats: bool) -> Tensor:
    result = asa_attention(x, x, x, return_stats=stats)
    return result if isinstance(result, Tensor) else result[0]


graph: NeighborGraph = reciprocal_neighbors(x, x, impl="blocked")
offsets: Tensor = graph.row_offsets
text: str = explain(x, impl="cpu")
attended: Tensor = criss_cross_attention(x, x, x, impl="blocked")
criss_cross_attention(x, x, x, impl=1)  # type: ignore[arg-type]
linear: Tensor = linear_attention(x, x, x, eps=1e-6)
block = nn.AdaptiveSparseAttention(8, window=5, threshold_grad=None)
nn.AdaptiveSparseAttention(8, threshold_grad="no")  # type: ignore[arg-type]
video = nn.AdaptiveSparseAttention(8, window=(3, 5, 5), dims=3)
nn.SqueezeAndAttention(8, pool=(1, 2, 2), dims=3)
nn.InterlacedSparseAttention(8, factors=[(4,), (8,)], dims=1)
nn.NonLocal(8, sub_sample="output")  # type: ignore[arg-type]
module: torch.nn.Module = nn.build("criss_cross", 8)
nn.NonLocal(8, device="meta", dtype=torch.float64)
nn.NonLocal(8, dtype="float64")  # type: ignore[arg-type]
optimizer = torch.optim.SGD(nn.parameter_groups(module, 0.1))
with nn.monitor(block, tiles=True) as watched:
    statistics: dict[str, float] = watched.statistics()
state: dict[str, int] = nn.ThresholdSchedule(block, 0, 10).state_dict()
"""


def test_programs_are_checked(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    # As `make lint` calls it, whose cache then serves.
    run = subprocess.run([sys.executable, "-m", "mypy", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_package_says_that_it_is_typed():
    assert Path(asa_ops.__file__).with_name("py.typed").exists()
    assert dir(asa_ops) == sorted(asa_ops.__all__)
