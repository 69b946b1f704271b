"""Examples in docstrings and in the README run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import asa_ops

MODULES = [name for _, name, _ in pkgutil.walk_packages(asa_ops.__path__, "asa_ops.") if not name.endswith("._C")]
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_functions_have_examples():
    for function in (
        asa_ops.asa_attention,
        asa_ops.reciprocal_neighbors,
        asa_ops.explain,
        asa_ops.criss_cross_attention,
        asa_ops.nn.AdaptiveSparseAttention,
        asa_ops.nn.CrissCrossAttention,
    ):
        assert ">>>" in function.__doc__


def test_readme_examples():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
