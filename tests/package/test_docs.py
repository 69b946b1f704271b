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
    public = [getattr(module, name) for module in (asa_ops, asa_ops.nn) for name in module.__all__]
    for function in public:
        if function not in (asa_ops.nn, asa_ops.AsaStats, asa_ops.NeighborGraph):
            assert ">>>" in function.__doc__, function


def test_readme_examples():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
