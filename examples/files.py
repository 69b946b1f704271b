"""What commands do with files: they replace none that they read, and write each one whole or not at all."""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

FIGURES = (".png", ".jpg", ".pdf", ".svg")


class FileError(OSError):
    """A file that cannot be read or written as asked; the message names it."""


def run(main: Callable[[], object], *errors: type[Exception]) -> None:
    """Run a command; ``errors``, and those of files, end it with their messages alone."""
    if sys.stdout:  # names of files may be in another encoding
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        main()
    except (FileError, *errors) as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        if error.filename is None:  # not about a file of the user's
            raise
        raise SystemExit(f"error: {error.filename}: {error.strerror}") from error


def check_out(parser: argparse.ArgumentParser, out: Path, *suffixes: str) -> None:
    """End a command whose ``--out`` has another suffix, if they matter, or lies in no folder."""
    if suffixes and out.suffix.lower() not in suffixes:
        parser.error(f"--out must end in {', '.join(suffixes)}, got {str(out)!r}")
    if not out.parent.is_dir():
        parser.error(f"--out: there is no folder {str(out.parent)!r}")


def check(outputs: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
    """Raise FileError where an output would replace an input or another output, or cannot be written.

    Links and other spellings of a name are seen through. Nothing is opened.
    """
    places: dict[Path, Path] = {}
    there: dict[tuple[int, int], Path] = {}
    for path in outputs:
        place = Path(os.path.realpath(path))
        if place in places:
            raise FileError(f"{path} and {places[place]} are one file, expected one for each output")
        places[place] = path
        folder = next(each for each in place.parents if identity(each))
        if not folder.is_dir():
            raise FileError(f"{path} cannot be written: {folder} is no folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise FileError(f"{path} cannot be written: no permission in {folder}")
        if found := identity(place):
            there[found] = path
            if not place.is_file():
                raise FileError(f"{path} cannot be written: it is there and no file")
            if not os.access(place, os.W_OK):
                raise FileError(f"{path} cannot be written: it is there, and no permission to replace it")
    for path in inputs if there else ():
        if output := there.get(identity(path)):
            raise FileError(f"{output} would replace {path}, which is read: give the output another name")


def identity(path: Path) -> tuple[int, int] | None:
    """Return what all names of a file have in common, None if it is not there."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Give an error of the system the name of the file that it is about."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` once all of it is written, and is gone if that fails."""
    place = Path(os.path.realpath(path))  # what is a link stays one
    unfinished = place.with_name(f".{secrets.token_hex(8)}.unfinished")
    with named(path):
        try:
            with unfinished.open("xb") as file:
                yield file
            if place.exists():
                shutil.copymode(place, unfinished)
            os.replace(unfinished, place)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()


def write(path: Path, text: str) -> None:
    """Write a text file."""
    with whole(path) as file:
        file.write(text.encode())


def save(figure, path: Path, dpi: int) -> None:
    """Write a figure of matplotlib, in the format that the name ends in."""
    with whole(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=dpi)


def read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield where each line of a file stands and the JSON object that it holds; nothing if there is no file.

    Raises:
        FileError: a line holds something else.
    """
    for number, line in enumerate(read(path).splitlines() if path.exists() else [], 1):
        where = f"{path}, line {number},"
        try:
            told = json.loads(line)
        except ValueError as error:
            raise FileError(f"{where} is broken ({error}): remove it") from error
        if not isinstance(told, dict):
            raise FileError(f"{where} must be a JSON object, got {line[:60]!r}: remove it")
        yield where, told


def append(path: Path, text: str) -> None:
    """Add ``text`` to a text file, all of it or nothing, on a line of its own."""
    with named(path):
        before = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a+b") as file:
                if before:
                    file.seek(-1, os.SEEK_END)
                    file.write(b"" if file.read(1) == b"\n" else b"\n")
                file.write(text.encode())
        except BaseException:
            os.truncate(path, before)
            raise


def read(path: Path) -> str:
    """Return a text file, which may be written by hand: in UTF-8, a byte order mark and any ends of lines.

    Raises:
        FileError: it cannot be read, or is in another encoding.
    """
    with named(path):
        content = path.read_bytes()
    at = content.find(0)
    if at < 0:
        try:
            return "\n".join(content.decode("utf-8-sig").split("\r\n"))
        except UnicodeDecodeError as error:
            at = error.start
    raise FileError(f"{path} must be text in UTF-8, got byte {content[at]:#04x} at {at}")
