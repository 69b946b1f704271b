"""Reading pictures, whatever is in their files."""

import logging
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from asa_ops.explore.pictures import silence

logging.getLogger("PIL").addHandler(logging.NullHandler())  # without one logging prints its errors


class PictureError(Exception):
    """A file that is no picture, or none that can be taken; the message names it."""


def read(path: Path, mode: str | None, upright: bool = False) -> np.ndarray:
    """Return a picture file as an array, converted to ``mode``; None: as stored, a palette's indices.

    ``upright`` turns it as its camera noted. Of the data sets the labels are those of the stored pixels.

    Raises:
        PictureError: the file is no picture or a too large one, or its values do not fit into 8 bits, where converting
            would clip them.
    """
    try:
        with silence(), PIL.Image.open(path) as file:
            if mode is not None and file.mode.startswith(("I", "F")):
                raise PictureError(f"{path} must have 8 bits a channel, got a picture of mode {file.mode}")
            if upright:
                PIL.ImageOps.exif_transpose(file, in_place=True)
            return np.asarray(file if mode in (None, file.mode) else file.convert(mode))
    except PictureError:
        raise
    except PIL.Image.DecompressionBombError as error:
        most = 2 * PIL.Image.MAX_IMAGE_PIXELS
        raise PictureError(f"{path} has more than {most:,} pixels: shrink it, or cut it into parts") from error
    except Exception as error:  # Pillow raises whatever a broken file makes happen
        told = isinstance(error, OSError | SyntaxError | ValueError)  # of a KeyError the text alone is a riddle
        reason = getattr(error, "strerror", None) or (str(error) if told else repr(error))
        raise PictureError(f"cannot read {path} as a picture: {reason:.200}") from error
