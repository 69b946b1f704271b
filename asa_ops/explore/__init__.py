"""A page to explore who attends to whom: one HTML file, for any browser, without a network.

    python -m asa_ops.explore photo.jpg         # writes photo-explore.html
    python -m asa_ops.explore graph.npz         # of a saved NeighborGraph

The page shows the survivors of the pixel under the mouse, the finger or the arrow keys, with their weights, how many
survivors every pixel has, and how far away they are, at each of the computed levels of alpha and beta. It is exact:
for every pair it stores at which levels :func:`asa_ops.reciprocal_neighbors` kept it. Weights are rounded to one of 256
steps on a logarithmic scale, by at most what the page says at its end; those of less than 1e-8 of the largest are shown
as so much.

Reading pictures takes Pillow, reading .npz files NumPy: ``pip install pillow numpy``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..asa import NeighborGraph, reciprocal_neighbors
from ..core import checks
from . import pictures
from .document import render
from .pairs import LEVELS, Levels, Pairs, check_graph, softmax_weights

__all__ = ["page", "page_of_graph"]


@torch.no_grad()
def page(
    query: Tensor,
    key: Tensor,
    *,
    grid: Sequence[int],
    alpha: Sequence[float] = (1, 2, 4, 8, 16),
    beta: Sequence[float] = (0.5, 1, 2),
    window: int | Sequence[int] = 3,
    scale: float | None = None,
    picture: Tensor | None = None,
    title: str = "Who attends to whom",
    progress: Callable[[str], None] | None = None,
) -> str:
    """Return an HTML page that shows the survivors of every pixel at levels of alpha and beta.

    It has a slider of alpha and one of beta. It shows what :func:`asa_ops.reciprocal_neighbors` gives for the two
    levels, and with beta off what it gives without one. The page grows with the pairs that survive at the lowest alpha,
    by about 2 bytes for two mutual neighbours.

    Args:
        query: [1, 1, N, D], finite.
        key: [1, 1, N, D], finite.
        grid: (H, W) with H * W = N.
        alpha: levels, 1 to 8 numbers >= 0, which may be inf.
        beta: levels, at most 8.
        window: odd side of the local window, or one for each side of the grid.
        scale: factor of the scores, default D**-0.5.
        picture: uint8 [any height, any width, 3], shown beneath; needs Pillow.
        title: heading of the page.
        progress: called with a line of text before each step of the work.

    Returns:
        The text of an HTML file.

    Raises:
        ValueError: shapes, sizes or numbers that do not fit; more than 40 million pairs to store.
        TypeError: dtypes that do not.
        ImportError: there is a picture and no Pillow.

    Example:
        >>> import torch
        >>> from asa_ops import explore
        >>> query, key = torch.randn(2, 1, 1, 6 * 8, 16)
        >>> explore.page(query, key, grid=(6, 8), title="Random tokens").splitlines()[0]
        '<!doctype html>'
    """
    checks.check_qkv(query, key, key)
    if query.shape[:2] != (1, 1) or query.shape != key.shape:
        raise ValueError(
            f"query and key must be [1, 1, N, D] of one map and one head, got {list(query.shape)} and {list(key.shape)}"
        )
    height, width = checks.as_grid(grid, query.shape[2], 2)
    if not height * width:
        raise ValueError(f"grid must have at least one pixel, got {grid}")
    sides = checks.as_window(window, 2)
    levels = Levels(as_levels("alpha", alpha, 1), as_levels("beta", beta, 0))
    if not (query.isfinite().all() and key.isfinite().all()):
        raise ValueError("query and key must be finite, got NaN or inf among their numbers")
    check_picture(picture)
    say = progress or (lambda text: None)
    pairs = Pairs(height * width)
    for place, level in enumerate(levels.alpha):
        say(f"alpha = {level:g}")
        pairs.add("alpha", place, reciprocal_neighbors(query, key, level, scale=scale))
    for place, level in enumerate(levels.beta):
        say(f"beta = {level:g}")
        graph = reciprocal_neighbors(query, key, None, level, grid=(height, width), window=sides, scale=scale)
        pairs.add("beta", place, graph)
    say(f"weights of {len(pairs.codes):,} pairs")
    weights = softmax_weights(query[0, 0], key[0, 0], pairs, checks.as_scale(scale, query))
    return render(title, (height, width), levels, sides, pairs, weights, picture)


@torch.no_grad()
def page_of_graph(
    graph: NeighborGraph,
    *,
    grid: Sequence[int],
    weights: Tensor | None = None,
    picture: Tensor | None = None,
    title: str = "Who attends to whom",
) -> str:
    """Return an HTML page that shows a graph, for example one of a trained network.

    Args:
        graph: of one map and one head: a row for each pixel, its columns ascending.
        grid: (H, W), of as many pixels.
        weights: [nnz], > 0: of each column, in any unit; the page divides them by the sum of their row. None: all of a
            row are alike.
        picture: uint8 [any height, any width, 3], shown beneath; needs Pillow.
        title: heading of the page.

    Returns:
        The text of an HTML file.

    Raises:
        ValueError: shapes or numbers that do not fit; more than 40 million pairs to store.
        TypeError: dtypes that do not.
        ImportError: there is a picture and no Pillow.

    Example:
        >>> import torch
        >>> from asa_ops import explore, reciprocal_neighbors
        >>> tokens = torch.randn(1, 1, 6 * 8, 16)
        >>> graph = reciprocal_neighbors(tokens, tokens, 2.0, topk=5)
        >>> "<html" in explore.page_of_graph(graph, grid=(6, 8))
        True
    """
    height, width = checks.as_sides(grid, 2)
    graph = check_graph(graph, height * width)
    check_picture(picture)
    if weights is not None:
        checks.check_tensor("weights", weights, "[nnz]")
        checks.check_floating("weights", weights)
        if len(weights) != len(graph.col_indices):
            raise ValueError(
                f"weights must have one number for each of the {len(graph.col_indices)} columns, got {len(weights)}"
            )
        if not (weights.isfinite() & (weights > 0)).all():
            raise ValueError("weights must be > 0 and finite, got others among them")
    pairs = Pairs(height * width)
    pairs.add("alpha", 0, graph)
    logs = torch.zeros(len(graph.col_indices)) if weights is None else weights.detach().cpu().log()
    found = pairs.weights_of(graph, logs)
    return render(title, (height, width), None, (1, 1), pairs, found, picture, weighted=weights is not None)


def as_levels(name: str, levels: Sequence[float], at_least: int) -> list[float]:
    """Return levels as ascending numbers, each once."""
    numbers = sorted({checks.as_number(f"{name} level", level) for level in levels})
    if not at_least <= len(numbers) <= LEVELS:
        raise ValueError(f"{name} must be {at_least} to {LEVELS} different levels, got {len(numbers)}: {levels}")
    if not all(number >= 0 for number in numbers):
        raise ValueError(f"levels of {name} must be >= 0, got {levels}")
    return numbers


def check_picture(picture: Tensor | None) -> None:
    """Check that a picture is uint8 [height, width, 3], and that there is Pillow to store it."""
    if picture is None:
        return
    checks.check_tensor("picture", picture, "[height, width, 3]")
    if picture.dtype != torch.uint8:
        raise TypeError(f"picture must be uint8 [height, width, 3], got {checks.describe(picture)}")
    if picture.shape[2] != 3 or 0 in picture.shape:
        raise ValueError(f"picture must be uint8 [height, width, 3], got {checks.describe(picture)}")
    pictures.pillow()
