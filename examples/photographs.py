"""Make a set of crops of photographs, some photographs to train on and others to test on.

A photograph is in one part alone, with all of its crops: a method that is tested on it has never seen any of it. Each
is shrunk to several sizes, and of each size crops are cut that do not overlap. A photograph that is there twice, in
another size or format, is taken once.

    python -m examples.photographs ~/Pictures --out build/photographs.npz
    python -m examples.photographs FOLDER --list examples/photographs.csv    # those of the results in docs/evidence.md

The photographs of `photographs.csv`, 81 with authors and licences, come with Debian; none is in this repository:

    mkdir -p build/photographs && cd build/photographs
    apt-get download lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers \\
        kphotoalbum opencv-doc palapeli-data
    for package in *.deb; do dpkg -x "$package" .; done
    cd ../.. && python -m examples.photographs build/photographs --list examples/photographs.csv
"""

import argparse
import csv
import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from tqdm import tqdm

from . import files, pages, pictures

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
DEFAULT = Path("build/photographs.npz")
THUMBNAIL = 16  # side of what tells two photographs apart
ALIKE = 0.99  # correlation of thumbnails of one photograph


class PhotographsError(Exception):
    """Photographs that no set can be made of, or a file that is no set."""


@dataclass(frozen=True)
class Part:
    """Crops of some photographs.

    Attributes:
        names: of the photographs, files within their folder.
        crops: uint8 [M, 3, SIDE, SIDE].
        of: the photograph of every crop, int64 [M].
    """

    names: list[str]
    crops: Tensor
    of: Tensor

    def floats(self) -> Tensor:
        """Return the crops in [0, 1]."""
        return self.crops.float() / 255

    def by_photograph(self, values: Tensor) -> dict[str, float]:
        """Return the mean of one value a crop, [M], for every photograph."""
        return {name: values[self.of == i].double().mean().item() for i, name in enumerate(self.names)}


@dataclass(frozen=True)
class Photographs:
    """A set: what to train on, and what to test on."""

    train: Part
    test: Part

    def save(self, path: Path) -> None:
        """Write the set as arrays of NumPy."""
        parts = {"train": self.train, "test": self.test}
        arrays = {}
        for name, part in parts.items():
            arrays |= {f"{name}_names": np.array(part.names), f"{name}_of": part.of.numpy()}
            arrays[f"{name}_crops"] = part.crops.numpy()
        with files.whole(path) as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Photographs":
        """Read a set.

        Raises:
            PhotographsError: the file holds none.
        """
        try:
            with np.load(path) as arrays:
                parts = [
                    Part(
                        arrays[f"{name}_names"].tolist(),
                        torch.from_numpy(arrays[f"{name}_crops"]),
                        torch.from_numpy(arrays[f"{name}_of"]),
                    )
                    for name in ("train", "test")
                ]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise PhotographsError(
                f"{path} holds no photographs, expected what `python -m examples.photographs` writes ({error})"
            ) from error
        return cls(*parts)


def listed(path: Path) -> list[str]:
    """Return the column ``file`` of a table of photographs.

    Raises:
        PhotographsError: there is none, or a line without.
    """
    rows = list(csv.DictReader(io.StringIO(files.read(path))))
    if not rows or any(not row.get("file") for row in rows):
        raise PhotographsError(f"{path} must be a CSV file with a column 'file', filled in every line")
    return [row["file"] for row in rows]


def find(folder: Path, names: list[str] | None) -> list[str]:
    """Return the pictures within a folder, those ``names`` if given, as names from there.

    Raises:
        PhotographsError: there is no such folder, or a name is missing there.
    """
    if not folder.is_dir():
        raise PhotographsError(f"no folder {str(folder)!r}")
    if names is None:
        found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        return sorted(path.relative_to(folder).as_posix() for path in found)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PhotographsError(f"{folder} lacks {missing[0]!r}{more} of the list")
    return sorted(set(names))


def read(path: Path, short: int) -> PIL.Image.Image:
    """Return a picture in RGB, if its short side is longer than twice ``short`` shrunk to about that."""
    image = PIL.Image.fromarray(pictures.read(path, "RGB", upright=True))
    image.thumbnail([round(2 * short * length / min(image.size)) for length in image.size], reducing_gap=3)
    return image


def thumbnail(image: PIL.Image.Image) -> np.ndarray:
    """Return a tiny picture, of mean 0 and length 1, by which to recognise a photograph."""
    tiny = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.BOX), np.float64).ravel()
    tiny -= tiny.mean()
    return tiny / max(np.linalg.norm(tiny), 1e-9)


def crops_of(image: PIL.Image.Image, side: int, shorts: list[int], most: int, rng: np.random.Generator) -> np.ndarray:
    """Return at most ``most`` crops uint8 [M, 3, side, side], as many of each size.

    Of a size, whose short side is one of ``shorts``, crops are cells of a grid that is shifted at random. Pictures are
    never enlarged: of those whose short side is shorter, what there is is the largest size.
    """
    sizes = sorted({min(short, min(image.size)) for short in shorts if min(short, min(image.size)) >= side})
    found = []
    for i, short in enumerate(sizes):
        factor = short / min(image.size)
        shrunk = image.resize(
            [max(side, round(length * factor)) for length in image.size], PIL.Image.Resampling.LANCZOS
        )
        x = np.asarray(shrunk).transpose(2, 0, 1)
        cells = [length // side for length in x.shape[1:]]
        start = [rng.integers(length - n * side + 1) for length, n in zip(x.shape[1:], cells, strict=True)]
        count = most // len(sizes) + (i < most % len(sizes))
        for cell in rng.permutation(cells[0] * cells[1])[:count]:
            row, column = (first + side * k for first, k in zip(start, divmod(int(cell), cells[1]), strict=True))
            found.append(x[:, row : row + side, column : column + side])
    return np.stack(found) if found else np.empty((0, 3, side, side), np.uint8)


def make(
    folder: Path, names: list[str] | None, side: int, shorts: list[int], most: int, test: int, seed: int
) -> tuple[Photographs, list[tuple[str, str, str, object]]]:
    """Return the set of a folder's photographs, and the rows of a table: name, size, part, number of crops.

    Args:
        folder: where they are, and in folders of it.
        names: which ones; None for all.
        side: of a crop, pixels.
        shorts: short sides that photographs are shrunk to.
        most: crops of a photograph.
        test: how many photographs are kept for testing.
        seed: of the choice of those, and of where crops are cut.

    Raises:
        PhotographsError: there are too few.
    """
    taken: dict[str, np.ndarray] = {}
    seen: list[np.ndarray] = []
    told: dict[str, tuple[str, str]] = {}
    for name in tqdm(find(folder, names), desc="reading", unit="picture", leave=False):
        try:
            name.encode()  # as tables and results have it
            image = read(folder / name, max(shorts))
        except UnicodeEncodeError:
            told[ascii(name)] = "-", "left out: its name is not in UTF-8"
            continue
        except pictures.PictureError as error:
            told[name] = "-", f"left out: {error}"
            continue
        size, tiny = f"{image.width} x {image.height}", thumbnail(image)
        twin = next((other for other, known in zip(taken, seen, strict=True) if tiny @ known > ALIKE), None)
        cut = crops_of(image, side, shorts, most, np.random.default_rng([seed, len(told)]))
        if twin is not None:
            told[name] = size, f"left out: the photograph of {twin}"
        elif not len(cut):
            told[name] = size, f"left out: a side is shorter than {side}"
        else:
            taken[name], told[name] = cut, (size, "")
            seen.append(tiny)
    if len(taken) <= test:
        raise PhotographsError(
            f"{folder} has {len(taken)} photographs that can be taken, expected more than the {test} kept for testing"
        )
    order = np.random.default_rng([seed, len(taken)]).permutation(len(taken))
    chosen = {list(taken)[i] for i in order[:test]}
    rows = [
        (name, size, why or ("test" if name in chosen else "train"), len(taken.get(name, ())))
        for name, (size, why) in told.items()
    ]
    parts = [part({name: x for name, x in taken.items() if (name in chosen) == kept}) for kept in (False, True)]
    return Photographs(*parts), rows


def part(crops: dict[str, np.ndarray]) -> Part:
    """Return the part of these photographs' crops."""
    of = [i for i, each in enumerate(crops.values()) for _ in each]
    return Part(list(crops), torch.from_numpy(np.concatenate(list(crops.values()))), torch.tensor(of))


def main(arguments: list[str] | None = None) -> Photographs:
    parser = argparse.ArgumentParser(
        prog="photographs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of photographs, in folders of it too")
    parser.add_argument("--list", type=Path, help="a CSV file: take those of its column 'file' alone, names in FOLDER")
    parser.add_argument("--side", type=int, default=48, help="of a crop, pixels (48)")
    parser.add_argument("--short", type=int, nargs="+", default=[260, 520], help="sides to shrink to (260 520)")
    parser.add_argument("--crops", type=int, default=12, help="of a photograph, at most (12)")
    parser.add_argument("--test", type=int, default=20, help="photographs kept for testing (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of those, and of where crops are cut (0)")
    parser.add_argument("--out", type=Path, default=DEFAULT, help=f"({DEFAULT})")
    options = parser.parse_args(arguments)
    for name, least in {"side": 8, "crops": 1, "test": 1, "seed": 0}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if min(options.short) < options.side:
        parser.error(f"--short must be at least --side = {options.side}, got {min(options.short)}")
    if options.out == DEFAULT:
        DEFAULT.parent.mkdir(exist_ok=True)
    files.check_out(parser, options.out, ".npz")
    files.check([options.out], [options.list] if options.list else [])
    names = listed(options.list) if options.list else None
    photographs, rows = make(
        options.folder, names, options.side, options.short, options.crops, options.test, options.seed
    )
    print(pages.table(("photograph", "pixels, shrunk", "part", "crops"), rows, even=True))
    for name, each in (("train", photographs.train), ("test", photographs.test)):
        print(f"{name}: {len(each.crops)} crops of {len(each.names)} photographs")
    photographs.save(options.out)
    print(f"set: {options.out}")
    return photographs


if __name__ == "__main__":
    files.run(main, PhotographsError, pictures.PictureError)
