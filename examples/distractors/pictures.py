"""Pictures in which few far places tell the class of a tile, among as many distractors as one likes.

A picture is a grid of SIDE x SIDE tiles of TILE x TILE pixels. A tile has a code, the colours of its four corners, and
may have a mark, the colour of its middle. FAMILIES codes are those of families: PLAIN plain tiles on the left, without
a mark, and MARKED tiles on the right, whose mark is the family's class. A plain tile is of its family's class, which
only tiles of like corners on the other side of the picture tell. Distractors are marked tiles with codes of their own,
anywhere. All other tiles are grey, and all are void but the plain ones.

Pixels are noisy, and light differs from tile to tile: it stretches a code. So likeness is a matter of degree, and to
the product of two codes a bright tile that is a little alike is as like as a dark one of the same family.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

SIDE, TILE = 16, 3
TILES, CODES = SIDE * SIDE, 4 * 3  # of a picture, of a tile
MIDDLE = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.float32)[..., None]  # of a tile: all but its corners
MARKS = np.array([(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, -1)])  # red, green, blue, yellow: one a class
CLASSES = len(MARKS)
FAMILIES, PLAIN, MARKED = 6, 4, 4
BAND = SIDE // 3  # columns on the left for plain tiles, and on the right for their families' marked ones
MOST = TILES - FAMILIES * (PLAIN + MARKED)  # distractors that there is room for
CODE, MARK, NOISE = 0.15, 0.25, 0.06  # deviations of a corner's colours and of a middle's from grey, of a pixel
LIGHT = 0.3  # deviation of the logarithm of a tile's light
VOID = 255


class Pictures(NamedTuple):
    """Pictures, and where their tiles are from."""

    image: np.ndarray  # [B, 3, SIDE * TILE, SIDE * TILE], float32
    label: np.ndarray  # [B, SIDE, SIDE], classes, VOID where there is none
    family: np.ndarray  # [B, SIDE, SIDE], 0 to FAMILIES - 1, FAMILIES: a distractor, -1: nothing
    mark: np.ndarray  # [B, SIDE, SIDE], classes, VOID where there is none


class Draw(NamedTuple):
    """All that is random in a picture."""

    order: np.ndarray  # [TILES], in which tiles are taken
    classes: np.ndarray  # [FAMILIES]
    codes: np.ndarray  # [FAMILIES, CODES]
    others: np.ndarray  # [TILES, CODES], of distractors
    marks: np.ndarray  # [TILES], of distractors
    light: np.ndarray  # [TILES]
    noise: np.ndarray  # [SIDE, TILE, SIDE, TILE, 3]


def draw(seed: tuple[int, ...], index: int) -> Draw:
    rng = np.random.default_rng([*seed, index])
    return Draw(
        rng.permutation(TILES),
        rng.integers(CLASSES, size=FAMILIES),
        rng.standard_normal((FAMILIES, CODES), np.float32),
        rng.standard_normal((TILES, CODES), np.float32),
        rng.integers(CLASSES, size=TILES),
        rng.standard_normal(TILES, np.float32),
        rng.standard_normal((SIDE, TILE, SIDE, TILE, 3), np.float32),
    )


def make(seed: tuple[int, ...], indices: Iterable[int], distractors: int | np.ndarray) -> Pictures:
    """Return the pictures of these indices; with more distractors they are the same with more of them.

    Example:
        >>> make((0,), range(8), distractors=100).label.shape
        (8, 16, 16)
    """
    order, classes, codes, others, marks, light, noise = (
        np.stack(each) for each in zip(*(draw(seed, index) for index in indices), strict=True)
    )
    rows = np.arange(len(order))[:, None]
    family = np.full(order.shape, -1)
    mark, label = (np.full(order.shape, VOID, np.uint8) for _ in range(2))
    column = order % SIDE
    for side, count, to in ((column < BAND, PLAIN, label), (column >= SIDE - BAND, MARKED, mark)):
        tiles = order[side].reshape(len(order), -1)[:, : FAMILIES * count]
        family[rows, tiles] = of = np.repeat(np.arange(FAMILIES), count)
        to[rows, tiles] = classes[:, of]
    taken = np.take_along_axis(family, order, 1) >= 0
    free = order[~taken].reshape(len(order), -1)
    chosen = np.zeros(order.shape, bool)
    chosen[rows, free] = np.arange(free.shape[1]) < np.reshape(distractors, (-1, 1))
    family[chosen], mark[chosen] = FAMILIES, marks[chosen]
    code = np.where((family < FAMILIES)[..., None], codes[rows, family.clip(0, FAMILIES - 1)], others)
    code *= (CODE * np.exp(LIGHT * light) * (family >= 0))[..., None]
    image = render(code, mark) + NOISE * noise
    image = image.reshape(-1, SIDE * TILE, SIDE * TILE, 3).clip(0, 1).transpose(0, 3, 1, 2)
    return Pictures(image, *(x.reshape(-1, SIDE, SIDE) for x in (label, family, mark)))


def render(code: np.ndarray, mark: np.ndarray) -> np.ndarray:
    """Return pictures [B, SIDE, TILE, SIDE, TILE, 3] of tiles with these corners [B, TILES, CODES] and marks."""
    tiles = np.full((*mark.shape, TILE, TILE, 3), 0.5, np.float32)
    tiles[:, :, :: TILE - 1, :: TILE - 1] += code.reshape(*mark.shape, 2, 2, 3)
    colours = np.concatenate([MARK * MARKS, np.zeros((1, 3))]).astype(np.float32)
    tiles += colours[np.minimum(mark, CLASSES)][:, :, None, None] * MIDDLE
    return tiles.reshape(-1, SIDE, SIDE, TILE, TILE, 3).transpose(0, 1, 3, 2, 4, 5)
