"""Write a page to explore who attends to whom in a picture: one HTML file, for any browser, without a network.

Every pixel is described by the patch around it, which is its query and its key; the score of two pixels falls with the
distance between their patches. A saved graph is shown as it is: an .npz or .pt file with row_offsets, col_indices and
grid = (H, W), and, if there are, weights of the columns and a picture, uint8 [height, width, 3].

    python -m asa_ops.explore photo.jpg                           # writes photo-explore.html
    python -m asa_ops.explore photo.jpg --size 128 --alpha 2 8    # a larger map at two levels of alpha
    python -m asa_ops.explore graph.npz --out graph.html
"""

import argparse
import contextlib
import math
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..asa import NeighborGraph, reciprocal_neighbors
from ..core import checks
from . import page, page_of_graph, pictures
from .pairs import LEVELS

SIZES = (96, 80, 64, 56, 48, 40, 32, 24)  # of the long side, tried in turn
MAX_SIZE = 256  # 65,536 pixels: their graph takes N^2 / 8 bytes, 0.5 GB, while it is made
PAIRS = 4_000_000  # survivors at the lowest alpha with which the page is a few MB
GRAPHS = (".npz", ".pt")


class Problem(Exception):
    """What ends the command; the message says what came and what was expected."""


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        prog="python -m asa_ops.explore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a picture, or a graph in an .npz or .pt file")
    parser.add_argument("--out", type=Path, help="the page to write (the file's name, then -explore.html, here)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it is there")
    of_picture = parser.add_argument_group("pictures")
    of_picture.add_argument("--size", type=int, help="pixels of the map's long side (what keeps the page at a few MB)")
    of_picture.add_argument("--patch", type=int, default=5, help="odd side of the patches (5)")
    of_picture.add_argument(
        "--width",
        type=float,
        default=0.2,
        help="distance of patches at which a weight is 1/e, in units of their distance from the mean patch (0.2)",
    )
    of_picture.add_argument("--alpha", type=float, nargs="+", default=[1, 2, 4, 8, 16], help="levels (1 2 4 8 16)")
    of_picture.add_argument("--beta", type=float, nargs="*", default=[0.5, 1, 2], help="levels (0.5 1 2), or none")
    of_picture.add_argument("--window", type=int, default=3, help="odd side of the local window (3)")
    of_graph = parser.add_argument_group("saved graphs")
    of_graph.add_argument("--map", type=int, default=0, help="which map of several, batch * heads + head (0)")
    of_graph.add_argument("--picture", type=Path, help="a picture to show beneath")
    options = parser.parse_args(arguments)
    check(parser, options)
    out = options.out or Path(f"{options.file.stem}-explore.html")
    check_out(out, options)
    text = of_saved_graph(options) if options.file.suffix.lower() in GRAPHS else of_a_picture(options)
    write(out, text)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")
    return out


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the command where an option cannot be what it is."""
    if options.size is not None and not 2 <= options.size <= MAX_SIZE:
        parser.error(f"--size must be 2 to {MAX_SIZE}, got {options.size}")
    for name in ("patch", "window"):
        value = getattr(options, name)
        if value < 1 or value % 2 == 0:
            parser.error(f"--{name} must be odd and at least 1, got {value}")
    if not 0 < options.width < math.inf:
        parser.error(f"--width must be > 0 and finite, got {options.width}")
    for name in ("alpha", "beta"):
        levels = getattr(options, name)
        if not all(level >= 0 for level in levels):
            parser.error(f"--{name} must be numbers >= 0, got {' '.join(map(str, levels))}")
        if len(set(levels)) > LEVELS:
            parser.error(f"--{name} takes at most {LEVELS} levels, got {len(set(levels))}")
    if options.map < 0:
        parser.error(f"--map must be at least 0, got {options.map}")


def check_out(out: Path, options: argparse.Namespace) -> None:
    """Raise Problem where the page cannot be written, or would replace what must stay."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise Problem(f"--out must end in .html or .htm, got {str(out)!r}")
    if not out.parent.is_dir():
        raise Problem(f"--out: there is no folder {str(out.parent)!r}")
    if not out.exists():
        return
    for read in (options.file, options.picture):
        if read is not None and read.exists() and out.samefile(read):
            raise Problem(f"{out} would replace {read}, which is read: give --out another name")
    if not out.is_file():
        raise Problem(f"{out} is there and no file: give --out another name")
    if not options.overwrite:
        raise Problem(f"{out} is there: give --out another name, or --overwrite to replace it")


def of_a_picture(options: argparse.Namespace) -> str:
    """Return the page of a picture."""
    picture = pictures.read(options.file)
    least = min(options.alpha)

    def features(side: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
        small = pictures.shrunk(picture, side)
        return *pictures.patches(small, options.patch, options.width), (small.shape[0], small.shape[1])

    for side in [options.size] if options.size else SIZES:
        query, key, grid = features(side)
        say(f"{grid[0]} x {grid[1]} pixels")
        if options.size or side == SIZES[-1]:
            break
        if len(reciprocal_neighbors(query, key, least, scale=1.0).col_indices) <= PAIRS:
            break
    return page(
        query,
        key,
        grid=grid,
        alpha=options.alpha,
        beta=options.beta,
        window=options.window,
        scale=1.0,
        picture=picture,
        title=f"Who attends to whom in {options.file.name}",
        progress=say,
    )


def of_saved_graph(options: argparse.Namespace) -> str:
    """Return the page of a graph in a file."""
    file = options.file
    saved = load(file)
    missing = [name for name in ("row_offsets", "col_indices", "grid") if name not in saved]
    if missing:
        raise Problem(f"{file} must hold row_offsets, col_indices and grid, got {', '.join(saved) or 'nothing'}")
    grid = tuple(int(side) for side in torch.as_tensor(saved["grid"]).flatten())
    offsets, columns, weights = saved["row_offsets"], saved["col_indices"], saved.get("weights")
    n = math.prod(grid)
    checks.check_tensor("row_offsets", offsets, "[rows + 1]")
    checks.check_tensor("col_indices", columns, "[nnz]")
    maps, rest = divmod(len(offsets) - 1, n) if n > 0 else (0, 0)
    if rest or not maps:
        raise Problem(f"{file} has {len(offsets) - 1} rows, no multiple of the {n} pixels of its grid {grid}")
    if options.map >= maps:
        raise Problem(f"--map must be less than the number of maps in {file}, {maps}, got {options.map}")
    offsets = offsets[options.map * n : (options.map + 1) * n + 1]
    begin, end = int(offsets[0]), int(offsets[-1])
    graph = NeighborGraph(offsets - begin, columns[begin:end])
    picture = pictures.read(options.picture) if options.picture else saved.get("picture")
    title = f"Who attends to whom in {file.name}"
    return page_of_graph(
        graph, grid=grid, weights=None if weights is None else weights[begin:end], picture=picture, title=title
    )


def load(path: Path) -> dict[str, Any]:
    """Return the tensors in an .npz or .pt file by name. Nothing in it is run.

    Raises:
        Problem: the file cannot be read, or holds something else.
        ImportError: the file is an .npz and there is no NumPy.
    """
    if path.suffix.lower() == ".npz":
        try:
            import numpy as np
        except ImportError as error:
            raise ImportError(".npz files need NumPy: pip install numpy") from error
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both raise whatever a broken file makes happen
        reason = getattr(error, "strerror", None) or (str(error) or repr(error)).splitlines()[0]
        raise Problem(f"cannot read {path} as a saved graph: {reason:.200}") from error
    if not isinstance(saved, dict):
        raise Problem(f"{path} must hold a dict of tensors, got {type(saved).__name__}")
    return saved


def write(path: Path, text: str) -> None:
    """Write the page whole or not at all."""
    unfinished = path.with_name(f".{secrets.token_hex(8)}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="replace")
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run() -> None:
    """Run the command; what is wrong with a file or an option ends it with a message alone."""
    try:
        main()
    except OSError as error:
        if error.filename is None:  # not about a file of the user's
            raise
        raise SystemExit(f"error: {error.filename}: {error.strerror}") from error
    except (Problem, ValueError, TypeError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    run()
