"""Examples in docstrings run, and so does what README and docs/ show; their links, commands and figures are true."""

import doctest
import importlib.util
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import PIL.Image
import pytest

import asa_ops
import asa_ops.explore

ROOT = Path(__file__).parents[2]
MODULES = [name for _, name, _ in pkgutil.walk_packages(asa_ops.__path__, "asa_ops.") if not name.endswith("._C")]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/segmentation/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
RESULTS = ROOT / "bench" / "results"
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=named)


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command in the page's shell blocks, without comments."""
    lines = re.split(r"\n| && ", "\n".join(fenced(page, "bash")).replace("\\\n", " "))
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_functions_have_examples():
    public = [getattr(module, name) for module in (asa_ops, asa_ops.nn, asa_ops.explore) for name in module.__all__]
    for function in public:
        if function not in (asa_ops.nn, asa_ops.AsaStats, asa_ops.NeighborGraph):
            assert ">>>" in function.__doc__, function


# Those of api.md are signatures: its examples are the docstrings'.
WITH_PYTHON = [page for page in PAGES if fenced(page, "python") and page.name != "api.md"]


HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def compiles(block: str) -> bool:
    return any(call in block for call in ("torch.compile(", "aoti_compile", "torch.onnx.export("))


def programs():
    """Yield every page without what is compiled, and slow ones with it."""
    header = Path(sysconfig.get_path("include"), "Python.h").exists()
    needs = pytest.mark.skipif(not header, reason="Inductor needs Python.h (Debian: apt install python3-dev)")
    for page in WITH_PYTHON:
        blocks = [block for block in fenced(page, "python") if HAS_ONNX or "onnxruntime" not in block]
        plain = [block for block in blocks if not compiles(block)]
        # Programs of two processes each; exports and traces.
        takes_long = [pytest.mark.slow] if page.name in ("distributed.md", "deploy.md") else []
        yield pytest.param(page, plain, id=named(page), marks=takes_long)
        if plain != blocks:
            yield pytest.param(page, blocks, id=f"{named(page)}, compiled", marks=[pytest.mark.slow, needs])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # of torch.jit.trace
@pytest.mark.parametrize(("page", "blocks"), programs())
def test_python_blocks_run(page, blocks, tmp_path, monkeypatch):
    """One after the other, as one program; a block that begins with "# <name>.py" is a file, for a command below it."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks:
        if name := re.match(r"# (\w+\.py)\n", block):
            Path(name[1]).write_text(block)
        else:
            exec(compile(block, page.name, "exec"), namespace)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    PIL.Image.effect_noise((24, 16), 100).save("photo.jpg")
    for words in commands(page):
        if Path(words[-1]).is_file():
            if words[0] == "python":  # in this process: importing torch takes longer than most of them
                module = words[1] == "-m"
                monkeypatch.setattr(sys, "argv", words[1 + module :])
                monkeypatch.delitem(sys.modules, f"{words[2]}.__main__" if module else "", raising=False)
                (runpy.run_module if module else runpy.run_path)(words[1 + module], run_name="__main__")
                continue
            assert words[0] == "torchrun"
            run = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
            subprocess.run(run, check=True, env=environment, capture_output=True, timeout=120)


def test_pages_with_python_are_found():
    assert {"README.md", "docs/method.md", "docs/blocks.md", "docs/deploy.md"} <= set(map(named, WITH_PYTHON))


@each_page
def test_commands_name_what_there_is(page):
    variables = "".join((ROOT / name).read_text() for name in ("Makefile", "setup.py"))
    for words in commands(page):
        if words[0] == "make":
            for word in words[1:]:
                name, assigned, _ = word.partition("=")
                assert name in TARGETS or (assigned and name in variables), words
        elif words[0] == "torchrun":
            script = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
            check_python_command(words[script:], page)
        elif re.fullmatch(r"(\.venv/bin/)?python3?", words[0]):
            check_python_command(words[1:], page)
        else:
            assert words[:2] in (["pip", "install"], ["pip", "wheel"]), f"{named(page)}: unknown command {words}"


def test_workflows_call_what_there_is():
    steps = "".join(path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml"))
    runs = re.findall(r"- run: (.*)", steps)
    assert runs and "${{ secrets" not in steps and "\npermissions:\n  contents: read\n" in steps
    for words in map(str.split, runs):
        if words[0] == "make":
            assert set(words[1:]) <= TARGETS
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] == "pip" or (ROOT / words[0]).is_file()


def check_python_command(words: list[str], page: Path) -> None:
    """Fail unless the module or the file is there and its folder's sources name every option."""
    if words[:2] == ["-m", "build"] or f"# {words[0]}\n" in "".join(fenced(page, "python")):
        return  # of others: `pip install build`; or a file that a block above writes
    name, arguments = (f"{words[1].replace('.', '/')}.py", words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if words[0] == "-m" and not (ROOT / name).is_file():
        name = f"{name.removesuffix('.py')}/__main__.py"
    assert (ROOT / name).is_file(), words
    sources = "".join(source.read_text() for source in (ROOT / name).parent.glob("*.py"))
    for word in arguments:
        assert not word.startswith("--") or word == "--help" or f'"{word}"' in sources, words


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = [re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.*)", text, re.MULTILINE)]
    return {title.strip().replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT) and file.exists(), target
        assert not anchor or anchor in anchors(file), target


@each_page
def test_files_and_targets_that_are_named_exist(page):
    """Names in backticks that begin with a folder of the repository, and those of make."""
    text = page.read_text()
    assert set(re.findall(r"`make ([\w-]+)[ `]", text)) <= TARGETS
    for path in re.findall(r"`((?:asa_ops|bench|csrc|docs|examples|tests)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_page_is_on_the_site():
    """Their links are checked when it is built: `make docs`."""
    navigation = runpy.run_path(str(ROOT / "docs" / "conf.py"))["NAVIGATION"]
    listed = {f"{name}.md" for names in navigation.values() for name in names}
    assert {named(page) for page in PAGES} - {"README.md", "CONTRIBUTING.md"} <= listed
    assert all(list(ROOT.glob(page)) for page in listed)


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_api_page_is_that_of_the_docstrings(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    page = ROOT / "docs" / "api.md"
    rendered = runpy.run_path(str(page.with_name("generate.py")))["render"]()
    assert page.read_text() == rendered, "run: python docs/generate.py"
    for module in (asa_ops, asa_ops.nn, asa_ops.explore):
        assert all(f"{name}`" in rendered for name in module.__all__ if name != "nn")


DOCSTRING = """Do it for :func:`asa_ops.f` and ``x``.

    With a * b::

        a_i = <b, c>

    Args:
        x: first
            and second.
        y: third.

    Returns: a number.

    Example:
        >>> f(1)

        >>> f(2)
    """
MARKDOWN = """Do it for `f` and `x`.

With a \\* b:

```text
a_i = <b, c>
```

**Arguments**

- `x`: first
  and second.
- `y`: third.

**Returns** a number.

**Example**

```pycon
>>> f(1)

>>> f(2)
```"""


def test_api_page_translates_docstrings():
    assert runpy.run_path(str(ROOT / "docs" / "generate.py"))["markdown"](DOCSTRING) == MARKDOWN


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def section_of(page: Path, heading: str) -> str:
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page.read_text(), re.DOTALL | re.MULTILINE)[1]


def gains_on_gpu(heading: str) -> dict[tuple[str, str, str], float]:
    """Return by inputs, map and mode how many times faster Triton's kernels are than flash or cuDNN attention."""
    rows = rows_of(section_of(RESULTS / "nvidia-h200-summary.md", heading))
    slower = {
        (inputs, size, mode): max(float(cell.split()[0]) for cell in peers[:2])  # times of ASA over theirs
        for inputs, size, _, mode, _, *peers in rows[2:]
        if "-" not in peers[:2]
    }
    return {case: round(1 / ratio, 2) for case, ratio in slower.items()}


def test_the_first_page_quotes_the_measurements():
    """Its table of gains is that of the pages of results, rounded."""
    readme = rows_of((ROOT / "README.md").read_text())
    shown = {row[0].split(",")[0]: list(map(float, row[1:])) for row in readme if "%" in row[0]}
    timed = reversed(rows_of((RESULTS / "amd-epyc-family-26-model-2.md").read_text()))  # the first table counts
    cpu = {tuple(row[:4]): row[5] for row in timed if row[1:3] == ["64x64", "256"]}
    gpu = gains_on_gpu("Time")
    names = {"label map": ("labels", "labels"), "photograph": ("photo", "photo"), "nearly all": ("near-dense", "dense")}
    assert shown.keys() == names.keys()
    for name, (on_cpu, on_gpu) in names.items():
        times = [cpu[on_cpu, "64x64", "256", mode] for mode in ("fwd", "fwd+bwd")]
        gains = [round(1 / float(time.split()[0]), 1) for time in times]
        assert shown[name] == gains + [gpu[on_gpu, "97x97", f"{mode}, triton"] for mode in ("fwd", "fwd+bwd")]


RUNS = "examples/segmentation/results"
QUOTES = [  # page, section, whether its tables alone, how many figures at least, of what form, where they are from
    (
        *("docs/speed.md", "On a CPU", True, 30, r"[+-]?\d+\.\d+"),
        ["bench/results/amd-epyc-family-26-model-2.md", "bench/results/amd-epyc-family-25-model-1.md"],
    ),
    ("docs/blocks.md", "Speed", True, 11, r"[+-]?\d+\.\d+", ["bench/results/amd-epyc-family-25-model-17.md"]),
    ("docs/evidence.md", "The demo", True, 41, r"[+-]?\d+\.\d+", ["examples/results/denoise.txt"]),
    ("docs/integrations.md", "From dense to sparse", True, 5, r"\d+\.\d+", ["examples/results/sparsify.txt"]),
    ("docs/evidence.md", "A volume", True, 7, r"[+-]?\d+\.\d+", ["examples/results/volume.txt"]),
    (
        *("docs/evidence.md", r"Do thresholds learn\?", False, 90, r"[+-]?\d+\.\d+"),
        ["examples/results/*.md", f"{RUNS}/1500/ablation.md"],
    ),
    ("examples/segmentation/README.md", "What came out", False, 21, r"[+-]?\d+\.\d\d", [f"{RUNS}/*/ablation.md"]),
]


@pytest.mark.parametrize(("page", "heading", "tables", "least", "form", "sources"), QUOTES)
def test_pages_quote_the_measurements(page, heading, tables, least, form, sources):
    section = section_of(ROOT / page, heading)
    quoted = set(re.findall(form, str(rows_of(section)) if tables else section))
    measured = "".join(path.read_text() for source in sources for path in ROOT.glob(source))
    assert len(quoted) >= least and quoted <= set(re.findall(r"[+-]?\d+\.\d+", measured))


def test_the_table_of_the_gpu_quotes_the_measurements():
    called, replayed = gains_on_gpu("Time"), gains_on_gpu("Time in CUDA graphs")
    names = {"label map": "labels", "photograph": "photo", "all survive": "dense"}
    sizes = {"8,192": "64x128", "9,409": "97x97"}
    rows = [row for row in rows_of(section_of(ROOT / "docs/speed.md", "On a GPU")) if row[0] in names]
    assert len(rows) == 4
    for inputs, tokens, *gains in rows:
        cases = [(names[inputs], sizes[tokens], f"{mode}, triton") for mode in ("fwd", "fwd+bwd")]
        assert list(map(float, gains)) == [table[case] for table in (called, replayed) for case in cases]


def test_the_first_page_quotes_the_demo():
    printed = (ROOT / "examples" / "results" / "denoise.txt").read_text()
    psnr = re.findall(r"^(?:ASA|scikit-image, h).*? (\d\d\.\d\d) ", printed, re.MULTILINE)[:2]
    readme = (ROOT / "README.md").read_text()
    assert all(f"{float(value):.1f}" in readme for value in psnr)


def test_versions_agree():
    """The newest released version of the changelog is that of the citation."""
    changes, citation = ((ROOT / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff"))
    released = re.search(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)", changes, re.MULTILINE)
    assert f"\nversion: {released[1]}\n" in citation and f"\ndate-released: {released[2]}\n" in citation


def test_source_archive_holds_what_a_build_reads(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "dist", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    program = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=source, capture_output=True)
    (archive,) = (source / "dist").glob("asa_ops-*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2]: name for name in file.getnames()}
        metadata = file.extractfile(held["PKG-INFO"]).read().decode()
    needed = {"README.md", "LICENSE", "setup.py", "pyproject.toml"}
    files = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "asa_ops").rglob("*.py")]
    files += (ROOT / "asa_ops" / "explore" / "page").glob("*.*")
    assert needed | set(map(named, files)) <= held.keys()
    assert "Description-Content-Type: text/markdown" in metadata
    assert (ROOT / "README.md").read_text().strip() in metadata
