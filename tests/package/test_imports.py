"""Imports point one way. Read from the source of every file, imports within functions included."""

import ast
import itertools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from asa_ops.core import dispatch

ROOT = Path(__file__).parents[2]
# A file may import what stands in a later group; within a group, only its own package.
LAYERS = [["asa_ops.nn"], ["asa_ops.asa", "asa_ops.criss_cross", "asa_ops.blocks"], ["asa_ops.core"]]
# Whoever imports triton; core.devices asks within a function whether there is one.
TRITON = ["asa_ops.asa.triton", "asa_ops.criss_cross.triton", "asa_ops.core.triton_launch", "asa_ops.core.devices"]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted((ROOT / "asa_ops").rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Return the modules that a file imports: those of ours as files, of others the package."""
    path = FILES[name]
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base)
    return {module if module in FILES else module.split(".")[0] for module in found} - {name}


GRAPH = {name: imports(name) for name in FILES}


def within(name: str, packages: list[str]) -> str | None:
    return next((package for package in packages if name == package or name.startswith(f"{package}.")), None)


def test_there_is_no_circle():
    TopologicalSorter({name: found & set(FILES) for name, found in GRAPH.items()}).prepare()  # raises CycleError


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    level = next((i for i, packages in enumerate(LAYERS) if within(name, packages)), None)
    for module in GRAPH[name] & set(FILES):
        if level is None:  # asa_ops itself
            continue
        own = within(name, LAYERS[level])
        assert within(module, [own, *itertools.chain(*LAYERS[level + 1 :])]), f"{name} imports {module}"


@pytest.mark.parametrize("name", FILES)
def test_the_package_needs_torch_alone(name):
    others = GRAPH[name] - set(FILES)
    assert within(name, TRITON) or "triton" not in others
    for optional in ("numpy", "torchvision", "timm", "transformers", "matplotlib", "skimage"):
        assert optional not in others


def test_blocked_is_written_without_the_reference():
    """They are compared with each other: what one took from the other could not show."""
    for stem in dispatch.IMPLEMENTATIONS:
        assert f"asa_ops.{stem}.reference" not in GRAPH[f"asa_ops.{stem}.blocked"]


def test_every_implementation_is_in_the_table():
    """A file that is missing, or missing in the table, is an error here, not an implementation that nobody finds."""
    functions = {"asa": ("fwd", "bwd", "neighbor_graph"), "criss_cross": ("fwd", "bwd")}
    for stem, table in dispatch.IMPLEMENTATIONS.items():
        assert set(table) <= set(dispatch.NAMES) - {"auto"}
        for impl, module in table.items():
            assert module == f"asa_ops.{stem}.{impl}" and module in FILES
            loaded = dispatch.load(stem, impl)
            expected = (f"{stem}_attention",) if impl == "reference" else functions[stem]
            assert all(callable(getattr(loaded, function)) for function in expected)
        unlisted = [name for name in FILES if name.startswith(f"asa_ops.{stem}.") and name not in table.values()]
        for name in unlisted:
            if "def fwd(" in FILES[name].read_text():
                assert within(name, list(table.values())), f"{name} is in no table"
