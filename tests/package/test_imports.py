"""Imports point one way. Read from the source of every file, imports within functions included."""

import ast
import functools
import itertools
import re
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from asa_ops.core import dispatch

ROOT = Path(__file__).parents[2]
# A file may import what stands in a later group; within a group, only its own package.
LAYERS = [
    ["asa_ops.explore"],
    ["asa_ops.nn"],
    ["asa_ops.asa", "asa_ops.criss_cross", "asa_ops.blocks"],
    ["asa_ops.core"],
]
# Whoever imports triton; core.devices asks within a function whether there is one.
TRITON = ["asa_ops.asa.triton", "asa_ops.criss_cross.triton", "asa_ops.core.triton_launch", "asa_ops.core.devices"]
# What else a file may import, within a function that says how to install it.
OPTIONAL = {"asa_ops.explore.pictures": {"PIL"}, "asa_ops.explore.__main__": {"numpy"}}


# Beside asa_ops and its own folder: what files of bench, examples and tests import of the others.
ACROSS = {
    "bench": [  # files, machines, memory and tables there and here
        *("examples.files", "examples.machine", "examples.memory", "examples.pages"),
    ],
    "bench.cuda": ["tests.simt"],  # the emulation of the kernels
    "tests.asa.test_whole": ["bench.workloads"],  # whose cases are counted there
    "tests.bench": ["bench", "examples.files", "examples.memory"],
    "tests.bench_cases": ["bench"],
    "tests.examples": ["examples"],
    "tests.segmentation_cases": ["examples"],
    "tests.segmentation_ranks": ["examples"],
}
IMPORTED = re.compile(r"^(?:import|from) (\S+)")  # not within a function
FOLDERS = ("asa_ops", "bench", "examples", "tests")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
PACKAGE = [name for name in FILES if name.startswith("asa_ops")]


@functools.cache
def imports(name: str) -> set[str]:
    """Return the modules that a file imports: those of ours as files, of others the package."""
    path = FILES[name]
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    top = name.split(".")[0]
    found = set()

    def add(module: str, *names: str) -> None:
        if f"{top}.{module}" in FILES and top != "asa_ops":  # beside a script, or of pytest's pythonpath
            module = f"{top}.{module}"
        found.update(f"{module}.{x}" if f"{module}.{x}" in FILES else module for x in names or [""])

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            add(".".join([*base, *([node.module] if node.module else [])]), *(alias.name for alias in node.names))
    return {module if module in FILES else module.split(".")[0] for module in found} - {name}


def within(name: str, packages: list[str]) -> str | None:
    return next((package for package in packages if name == package or name.startswith(f"{package}.")), None)


def test_there_is_no_circle():
    TopologicalSorter({name: imports(name) & set(FILES) for name in FILES}).prepare()  # raises CycleError


@pytest.mark.parametrize("name", PACKAGE)
def test_imports_point_down(name):
    level = next((i for i, packages in enumerate(LAYERS) if within(name, packages)), None)
    for module in imports(name) & set(FILES):
        if level is None:  # asa_ops itself
            continue
        own = within(name, LAYERS[level])
        assert within(module, [own, *itertools.chain(*LAYERS[level + 1 :])]), f"{name} imports {module}"


@pytest.mark.parametrize("name", PACKAGE)
def test_the_package_needs_torch_alone(name):
    others = imports(name) - set(FILES)
    assert within(name, TRITON) or "triton" not in others
    for optional in (
        "numpy",
        "torchvision",
        "timm",
        "transformers",
        "matplotlib",
        "skimage",
        "PIL",
        "onnx",
        "onnxscript",
    ):
        of_integration = name == f"asa_ops.integrations.{optional}"
        assert optional not in others - OPTIONAL.get(name, set()) or of_integration
    assert not [module for module in imports(name) if within(module, ["asa_ops.integrations"])]
    at_once = {word.split(".")[0] for line in FILES[name].read_text().splitlines() for word in IMPORTED.findall(line)}
    assert not at_once & OPTIONAL.get(name, set())


def test_what_is_around_the_package_imports_the_package_and_what_the_table_says():
    for name in FILES:
        allowed = ["asa_ops", name.split(".")[0]] * (name not in PACKAGE)
        allowed += [module for importer, across in ACROSS.items() if within(name, [importer]) for module in across]
        for module in imports(name) & set(FILES):
            assert name in PACKAGE or within(module, allowed), f"{name} imports {module}"


def test_tests_import_no_test_file():
    for name in FILES:
        assert not [module for module in imports(name) if module.rpartition(".")[2].startswith("test_")], name


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in (ROOT / "tests").rglob("test_*.py")}), ids=lambda path: path.name
)
def test_no_test_name_stands_twice_in_a_folder(folder):
    nodes = itertools.chain(*(ast.walk(ast.parse(path.read_text())) for path in folder.glob("test_*.py")))
    names = Counter(node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []


def test_blocked_is_written_without_the_reference():
    """They are compared with each other: what one took from the other could not show."""
    for stem in dispatch.IMPLEMENTATIONS:
        assert f"asa_ops.{stem}.reference" not in imports(f"asa_ops.{stem}.blocked")


def test_every_implementation_is_in_the_table():
    """A file that is missing, or missing in the table, is an error here, not an implementation that nobody finds."""
    functions = {"asa": ("fwd", "bwd", "neighbor_graph"), "criss_cross": ("fwd", "bwd")}
    for stem, table in dispatch.IMPLEMENTATIONS.items():
        assert set(table) <= set(dispatch.NAMES) - {"auto"}
        for impl, module in table.items():
            if module == f"csrc/{impl}/{stem}":
                assert list((ROOT / module).glob("call.c*"))
                continue
            assert module == f".{stem}.{impl}" and f"asa_ops{module}" in FILES
            loaded = dispatch.load(stem, impl)
            expected = (f"{stem}_attention",) if impl == "reference" else functions[stem]
            assert all(callable(getattr(loaded, function)) for function in expected)
        modules = [f"asa_ops{module}" for module in table.values()]
        unlisted = [name for name in FILES if name.startswith(f"asa_ops.{stem}.") and name not in modules]
        for name in unlisted:
            if "def fwd(" in FILES[name].read_text():
                assert within(name, modules), f"{name} is in no table"
