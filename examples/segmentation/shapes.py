"""`shapes`: pictures whose labels can only be found by comparing regions that lie far apart.

A picture is a grid of cells of 16 pixels, some of which hold a shape. In a picture every colour has one class, in the
next one another. Patterned shapes show it: the class is the pattern, which looks the same in a mirror. Plain shapes do
not: their class is that of the patterned shape of their colour, and that is at least GAP pixels away, further than the
convolutions of `configs/shapes.json` see. Distractors, patterned shapes of other colours, are everywhere in between: an
average over the picture tells which classes occur in it, but not which one is meant.
"""

import numpy as np

from .config import ConfigError
from .sample import Sample

CLASSES = ("background", "rows", "columns", "checks", "rings")
PALETTE = np.array([(0, 0, 0), (230, 80, 60), (250, 200, 60), (80, 170, 90), (70, 120, 210)], np.uint8)
COLOURS = np.array([(1, 0.3, 0.3), (0.3, 1, 0.3), (0.3, 0.45, 1), (1, 1, 0.2), (1, 0.3, 1), (0.2, 1, 1)])
CELL = 16
FAR = 3  # cells, in rows or columns, from a plain shape to any patterned one of its colour
GAP = (FAR - 1) * CELL  # hence at least as many pixels in between
PLAIN = 2  # plain shapes of a family, for one patterned one
PERIOD = 5.0  # of the patterns, in pixels
BRIGHTNESS, CONTRAST = 0.65, 0.35  # of the patterns; plain shapes are as bright
NOISE = 0.05


class Shapes:
    """A data set of ``length`` pictures of ``size`` x ``size`` pixels; picture i is a function of ``seed`` and i.

    Args:
        size: a multiple of 16 from 64 to 256.
        length: number of pictures.
        seed: other seeds give other pictures.

    Raises:
        ConfigError: a size or a length that does not fit.

    Example:
        >>> sample = Shapes(size=64, length=10, seed=0)[3]
        >>> sample.image.shape, sample.label.shape
        ((64, 64, 3), (64, 64))
    """

    classes = CLASSES
    palette = PALETTE

    def __init__(self, size: int, length: int, seed: int):
        if not isinstance(size, int) or size % CELL or not 64 <= size <= 256:
            raise ConfigError(f"the size of shapes must be a multiple of {CELL} from 64 to 256, got {size!r}")
        if not isinstance(length, int) or length < 1:
            raise ConfigError(f"the number of shapes' pictures must be an integer >= 1, got {length!r}")
        self.size, self.length, self.seed = size, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"shapes: picture {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index])
        image = np.full((self.size, self.size, 3), 0.4)
        label = np.zeros((self.size, self.size), np.uint8)
        class_of = rng.integers(1, len(CLASSES), len(COLOURS))
        for cell, colour, plain in arrange(self.size // CELL, rng):
            inside, texture = shape(rng), pattern(CLASSES[class_of[colour]], rng)
            if plain:
                texture = np.full_like(texture, BRIGHTNESS)
            rows, columns = (slice(CELL * i, CELL * (i + 1)) for i in cell)
            image[rows, columns][inside] = texture[inside, None] * COLOURS[colour]
            label[rows, columns][inside] = class_of[colour]
        image += rng.normal(0, NOISE, image.shape)
        name = f"shapes, picture {index} of seed {self.seed}"
        return Sample((image.clip(0, 1) * 255).round().astype(np.uint8), label, name)


def arrange(side: int, rng: np.random.Generator) -> list[tuple[tuple[int, int], int, bool]]:
    """Place families, one patterned shape and far from it PLAIN plain ones of its colour, and distractors.

    Two families and three distractors per 4 x 4 cells, the colours of either half and half. Returns (cell, colour,
    plain) of every shape.
    """
    free = [(int(i) // side, int(i) % side) for i in rng.permutation(side * side)]
    colours = [int(i) for i in rng.permutation(len(COLOURS))]
    of_families, of_distractors = colours[: len(colours) // 2], colours[len(colours) // 2 :]
    placed = []

    def is_far(cell, colour, plain):
        """Whether all plain (or all patterned) shapes of this colour are far from ``cell``."""
        return all(distance(cell, c) >= FAR for c, other, kind in placed if (other, kind) == (colour, plain))

    for i in range(2 * side * side // 16):
        colour = of_families[i % len(of_families)]
        for cell in (cell for cell in free if is_far(cell, colour, plain=True)):
            relatives = [c for c in free if distance(c, cell) >= FAR and is_far(c, colour, plain=False)][:PLAIN]
            if len(relatives) == PLAIN:
                placed += [(cell, colour, False), *((c, colour, True) for c in relatives)]
                free = [c for c in free if c != cell and c not in relatives]
                break
    cells = free[: 3 * side * side // 16]
    return placed + [(cell, of_distractors[i % len(of_distractors)], False) for i, cell in enumerate(cells)]


def distance(a: tuple[int, int], b: tuple[int, int]) -> int:
    """Return how many rows or columns of cells, whichever is more, two cells are apart."""
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]))


def shape(rng: np.random.Generator) -> np.ndarray:
    """Return a disk, a square or a diamond somewhere in a cell, as a mask [CELL, CELL]."""
    radius = rng.integers(5, 8)
    centre = rng.integers(radius, CELL - radius, 2)
    rows, columns = np.abs(np.mgrid[:CELL, :CELL] - centre[:, None, None])
    return (np.hypot(rows, columns), np.maximum(rows, columns) * 1.15, (rows + columns) / 1.3)[
        rng.integers(3)
    ] <= radius


def pattern(name: str, rng: np.random.Generator) -> np.ndarray:
    """Return the brightness [CELL, CELL] of a pattern, shifted at random."""
    rows, columns = 2 * np.pi * (np.mgrid[:CELL, :CELL] / PERIOD + rng.random((2, 1, 1)))
    if name == "rows":
        wave = np.sin(rows)
    elif name == "columns":
        wave = np.sin(columns)
    elif name == "checks":
        wave = np.sign(np.sin(rows) * np.sin(columns))
    else:
        wave = np.sin(np.hypot(rows - rows.mean(), columns - columns.mean()) + 2 * np.pi * rng.random())
    return BRIGHTNESS + CONTRAST * wave
