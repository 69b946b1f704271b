"""Pictures: their files, and their patches as queries and keys."""

import contextlib
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class PictureError(ValueError):
    """A file that is no picture, or none that can be taken; the message names it."""


def pillow() -> ModuleType:
    """Return PIL.Image.

    Raises:
        ImportError: there is no Pillow; the message says how to install it.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install pillow") from error
    return PIL.Image


def read(path: Path) -> Tensor:
    """Return a picture file, upright and without transparency, as uint8 [H, W, 3].

    Raises:
        PictureError: the file is no picture or a too large one, or its values do not fit into 8 bits.
        ImportError: there is no Pillow.
    """
    image = pillow()
    try:
        with silence(), image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise PictureError(f"{path} must have 8 bits a channel, got a picture of mode {file.mode}")
            import PIL.ImageOps

            PIL.ImageOps.exif_transpose(file, in_place=True)
            picture = file.convert("RGBA")
            white = image.new("RGBA", picture.size, "white")  # behind what is transparent
            return to_tensor(image.alpha_composite(white, picture).convert("RGB"))
    except PictureError:
        raise
    except image.DecompressionBombError as error:
        most = 2 * (image.MAX_IMAGE_PIXELS or 0)
        raise PictureError(f"{path} has more than {most:,} pixels: shrink it, or cut a part out") from error
    except Exception as error:  # Pillow raises whatever a broken file makes happen
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        raise PictureError(f"cannot read {path} as a picture: {reason:.200}") from error


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep off the screen what Pillow's libraries in C print about broken files, and its warnings."""
    with warnings.catch_warnings(), open(os.devnull, "wb") as nowhere:
        warnings.simplefilter("ignore")
        if sys.__stderr__ is None:  # closed: file 2 may be any
            yield
            return
        screen = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def to_tensor(image: Any) -> Tensor:
    """Return an RGB image of Pillow as uint8 [H, W, 3]."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def to_image(picture: Tensor) -> Any:
    """Return uint8 [H, W, 3] as an image of Pillow."""
    height, width, _ = picture.shape
    return pillow().frombytes("RGB", (width, height), bytes_of(picture))


def bytes_of(x: Tensor) -> bytes:
    """Return the numbers of a uint8 tensor, without NumPy."""
    x = x.cpu().contiguous()
    return ctypes.string_at(x.data_ptr(), x.numel())


def shrunk(picture: Tensor, side: int) -> Tensor:
    """Return a picture whose long side has at most ``side`` pixels, each the mean of what it covers."""
    image = to_image(picture)
    factor = min(1.0, side / max(image.size))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return to_tensor(image.resize(size, pillow().Resampling.BOX))


def patches(picture: Tensor, patch: int, width: float) -> tuple[Tensor, Tensor]:
    """Return query and key [1, 1, N, D] of a picture [H, W, 3], with scores <q_i, k_j> = -||p_i - p_j||^2 / h^2.

    p_i is the patch around pixel i, ``patch`` pixels wide, and h is ``width`` times the root mean square distance of
    the patches from their mean: pixels whose surroundings look alike attend to each other.
    """
    x = picture.movedim(-1, 0)[None].float() / 255
    around = torch.nn.functional.pad(x, [patch // 2] * 4, mode="replicate")
    p = torch.nn.functional.unfold(around, patch)[0].mT
    p = p - p.mean(0)  # differences stay as they are, products lose less to rounding
    spread = p.square().sum(-1).mean().sqrt()
    p = p / (width * spread) if spread > 1e-6 else 0 * p  # of one colour: all alike
    square, one = p.square().sum(-1, keepdim=True), torch.ones(len(p), 1)
    query = torch.cat([2 * p, -square, one], -1)
    key = torch.cat([p, one, -square], -1)
    return query[None, None], key[None, None]
