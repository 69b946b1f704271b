"""The benchmark of the blocks compares them with what it says."""

import importlib.util
import sys
from pathlib import Path

import pytest

from asa_ops import nn

FOLDER = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def blocks():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("blocks", FOLDER / "blocks.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


def test_eager_forms_equal_the_blocks(blocks):
    """In the mode of the benchmark, training: batch norm takes the statistics of the batch."""
    named = {name for name, _ in blocks.CASES}
    assert named >= set(nn.available()) - {"asa"}
    for name, options in blocks.CASES:
        if name in nn.available():
            blocks.check(name, options, "cpu")


def test_a_case_tells_seconds_and_bytes(blocks):
    result = blocks.case("efficient_attention", {"heads": 2}, "16x16x8", True, rounds=2, device="cpu")
    assert all(len(result["seconds"][form]) == 2 and result["memory"][form] >= 0 for form in ("ours", "eager"))
    assert blocks.row(result).startswith("| efficient_attention heads=2 | 16x16x8 | fwd+bwd |")
