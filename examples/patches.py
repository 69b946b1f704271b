"""What commands that denoise by non-local means share: the photographs, and their patches as queries and keys."""

from pathlib import Path

import numpy as np
import pictures
import PIL.Image
import skimage
import torch
from torch import Tensor

PATCH = 5
SAMPLES = ("astronaut", "coffee", "chelsea", "rocket")


def photograph(name: str) -> np.ndarray:
    """Return a sample's or a file's photograph, uint8 [H, W, 3]."""
    if name in SAMPLES:
        return getattr(skimage.data, name)()
    if not Path(name).is_file():
        raise pictures.PictureError(f"no photograph {name!r}: expected a file or one of {', '.join(SAMPLES)}")
    picture = PIL.Image.fromarray(pictures.read(Path(name), "RGBA", upright=True))
    white = PIL.Image.new("RGBA", picture.size, "white")  # behind what is transparent
    return np.asarray(PIL.Image.alpha_composite(white, picture).convert("RGB"))


def patches_of(x: Tensor) -> Tensor:
    """Return the patches of a picture [1, 3, H, W] that lie within it, [N, PATCH * PATCH * 3]."""
    return torch.nn.functional.unfold(x, PATCH)[0].mT


def query_and_key(p: Tensor) -> tuple[Tensor, Tensor]:
    """Return query and key [1, 1, N, .] with <q_i, k_j> = -||p_i - p_j||^2."""
    square, one = p.square().sum(-1, keepdim=True), torch.ones(len(p), 1)
    query = torch.cat([2 * p, -square, one], -1)
    key = torch.cat([p, one, -square], -1)
    return query[None, None], key[None, None]
