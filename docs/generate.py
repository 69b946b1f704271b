"""Write docs/api.md from the docstrings of everything public.

    python docs/generate.py

The docstrings are in Google's style with some of reStructuredText's marks; what they use of both is translated. The
library griffe2md would list private modules too, and leaves the marks of reStructuredText as they are.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, UnionType
from typing import Union, get_args, get_origin

import asa_ops
import asa_ops.distributed
import asa_ops.explore
import asa_ops.integrations.transformers

PAGE = Path(__file__).with_name("api.md")
HEAD = """# API

Written by `python docs/generate.py` from the docstrings; a test fails where the two differ. Functions take tokens
[B, heads, N, D] or maps [B, C, H, W]; the modules take and return maps, one of them tokens.
`help(asa_ops.asa_attention)` shows the same in Python."""
FIRST = ["asa_attention", "reciprocal_neighbors", "explain", "AsaStats", "NeighborGraph"]
TITLES = {"Args": "Arguments", "Example": "Example", "Raises": "Raises", "Returns": "Returns", "Attributes": "Fields"}


def render() -> str:
    """Return the page."""
    names = FIRST + [name for name in asa_ops.__all__ if name not in FIRST]
    public = [(name, getattr(asa_ops, name)) for name in names if name != "nn"]
    modules = [(f"nn.{name}", getattr(asa_ops.nn, name)) for name in asa_ops.nn.__all__]
    spread = [(f"distributed.{name}", getattr(asa_ops.distributed, name)) for name in asa_ops.distributed.__all__]
    pages = [(f"explore.{name}", getattr(asa_ops.explore, name)) for name in asa_ops.explore.__all__]
    hub = asa_ops.integrations.transformers
    models = [(f"integrations.transformers.{name}", getattr(hub, name)) for name in hub.__all__]
    contents = " · ".join(f"[`{name}`](#{anchor(name)})" for name, _ in public + modules + spread + models + pages)
    parts = [HEAD, contents, "## Functions"]
    for position, (name, obj) in enumerate(public):
        parts += [f"### `{name}`", *body(name, obj)]
        module = home(obj)
        if all(home(later) is not module for _, later in public[position + 1 :]):
            parts += [f"#### Formulas of `{module.__name__}`", markdown(module.__doc__)]
    parts += ["## Modules", markdown(asa_ops.nn.__doc__)]
    for name, obj in modules:
        parts += [f"### `{name}`", *body(name, obj)]
    parts += ["## One map over several processes", markdown(asa_ops.distributed.__doc__)]
    for name, obj in spread:
        parts += [f"### `{name}`", *body(name, obj)]
    parts += ["## A page to explore", markdown(asa_ops.explore.__doc__)]
    for name, obj in pages:
        parts += [f"### `{name}`", *body(name, obj)]
    parts += ["## Models of transformers", markdown(hub.__doc__)]
    for name, obj in models:
        parts += [f"### `{name}`", *body(name, obj)]
    return "\n\n".join(parts) + "\n"


def anchor(name: str) -> str:
    """Return the anchor that GitHub gives the heading of ``name``."""
    return name.lower().replace(".", "")


def home(obj: Callable) -> ModuleType:
    """Return the module whose docstring has the formulas of ``obj``: its own, or the package of its steps."""
    module = sys.modules[obj.__module__]
    package = sys.modules[module.__package__]
    steps = ("api", "types")
    return package if module.__name__.rpartition(".")[2] in steps else module


def body(name: str, obj: Callable) -> Iterator[str]:
    """Yield the signature and the docstring of ``obj``, and of the public methods that it defines itself."""
    yield f"```python\n{signature(name, obj)}\n```"
    yield markdown(obj.__doc__)
    if not inspect.isclass(obj) or issubclass(obj, tuple):
        return
    for method, value in vars(obj).items():
        function = getattr(value, "__func__", value)  # of a static method
        if inspect.isfunction(function) and function.__doc__ and not method.startswith("_"):
            yield f"**`{method}`**"
            yield f"```python\n{signature(method, function)}\n```"
            yield markdown(function.__doc__)


def signature(name: str, obj: Callable) -> str:
    """Return the signature, each parameter on a line of its own where all of them do not fit into one."""
    parameters = []
    found = inspect.signature(obj)
    starred = False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "_cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parameters.append("*")
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        shown = re.sub(r":.*", "", str(parameter.replace(default=parameter.empty)))  # with its stars
        if parameter.annotation is not parameter.empty:
            shown += f": {plain(parameter.annotation)}"
        parameters.append(shown if parameter.default is parameter.empty else f"{shown} = {parameter.default!r}")
    returned = found.return_annotation
    shown = "" if inspect.isclass(obj) or returned is found.empty else plain(returned)
    result = shown and f" -> {shown}"
    line = f"{name}({', '.join(parameters)}){result}"
    listed = "".join(f"    {parameter},\n" for parameter in parameters)
    return line if len(line) <= 100 else f"{name}(\n{listed}){result}"


def plain(annotation: object) -> str:
    """Return an annotation without the modules of its names, and the same under every Python."""
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(plain, get_args(annotation)))
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", inspect.formatannotation(annotation)).replace("NoneType", "None")


def markdown(docstring: str) -> str:
    """Return a docstring as Markdown."""
    blocks, lines, section = [], inspect.cleandoc(docstring).splitlines(), None
    while lines:
        line = lines.pop(0)
        title, _, rest = line.partition(":")
        if title in TITLES and not line.startswith(" "):
            section = title
            blocks.append(f"**{TITLES[title]}**{inline(rest)}" if rest.strip() else f"**{TITLES[title]}**\n")
        elif line.endswith("::"):
            blocks += [inline(line[:-1]), fenced("text", lines)]
        elif section == "Example" and line.startswith("    "):
            blocks.append(fenced("pycon", [line, *lines]))
            lines = []
        elif section in ("Args", "Raises", "Attributes") and re.match(r"    [\w, ]+: ", line):
            item, _, rest = line.strip().partition(": ")
            blocks.append(f"- `{item}`: {inline(rest)}")
        elif section in ("Args", "Raises", "Attributes") and line.startswith("        "):
            blocks.append(f"  {inline(line.strip())}")
        else:
            blocks.append(inline(line.strip()))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(blocks)).strip()


def fenced(language: str, lines: list[str]) -> str:
    """Take the indented block that ``lines`` begin with away from them, and return it as code."""
    taken = []
    while lines and (lines[0].startswith("    ") or not lines[0].strip()):
        taken.append(lines.pop(0))
    code = textwrap.dedent("\n".join(taken)).strip("\n")
    return f"\n```{language}\n{code}\n```\n"


def inline(text: str) -> str:
    """Return running text with names as code, and what Markdown would take for marks as it stands."""
    text = re.sub(r":\w+:`(?:[\w.]*\.)?(\w+)`", r"``\1``", text)
    pieces = re.split(r"(``.*?``)", text)
    return "".join(
        f"`{piece[2:-2]}`" if piece.startswith("``") else re.sub(r"([*<|])", r"\\\1", piece) for piece in pieces
    )


if __name__ == "__main__":
    PAGE.write_text(render())
