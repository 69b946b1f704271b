"""The HTML file: what is stored in it, and how.

Two elements of the page hold the data. ``header`` is JSON. ``data`` is a zlib stream in base64 of these arrays of
bytes, one after the other, with lengths in ``header["streams"]``; page/decode.js reads them.

=============  ==========================================================================================
counts         for each pixel i how many pairs (i, j), j >= i, there are; numbers of 7 bits a byte, the
               lowest first, the highest bit set where more follow
steps          for each pair j less the j before it in its row, the first less i; numbers of the same form
alpha          for each pair the levels of alpha at which i keeps j, one bit each
alpha_back     the same of j keeping i, XOR ``alpha``: zeros where neighbours are mutual
beta           as alpha
beta_back      as alpha_back
weight         for each pair w, the weight of j in row i being exp(-w * step) times the largest of all
weight_back    the same of i in row j, less ``weight`` and the difference of ``base`` of j and i, modulo 256:
               nearly always -1, 0 or 1 where scores are symmetric
base           for each pixel a number modulo 256, which grows with the log-sum-exp of its row
=============  ==========================================================================================
"""

import base64
import html
import io
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import pictures
from .pairs import Levels, Pairs, Weights

PAGE = Path(__file__).with_name("page")
FLOOR = 18.4  # log weights this much below the largest are stored as if they were there: a factor of 1e8
STEPS = 255
PICTURE_SIDE = 768  # pixels of the long side of the picture beneath


def render(
    title: str,
    grid: tuple[int, int],
    levels: Levels | None,
    window: Sequence[int],
    pairs: Pairs,
    weights: Weights,
    picture: Tensor | None,
    weighted: bool = True,
) -> str:
    """Return the text of the page; without ``levels`` that of one graph."""
    streams, step = arrays(pairs, weights)
    header = {
        "title": title,
        "grid": grid,
        "alpha": [number(x) for x in levels.alpha] if levels else [],
        "beta": [number(x) for x in levels.beta] if levels else [],
        "window": list(window),
        "pairs": len(pairs.codes),
        "step": step,
        "weighted": weighted,
        "streams": {name: len(stream) for name, stream in streams.items()},
    }
    parts = {
        "title": html.escape(title),
        "style": (PAGE / "page.css").read_text(encoding="utf-8"),
        "header": json.dumps(header).replace("<", "\\u003c"),
        "data": base64.b64encode(zlib.compress(b"".join(streams.values()), 9)).decode(),
        "picture": "" if picture is None else jpeg(picture),
        "decode": (PAGE / "decode.js").read_text(encoding="utf-8"),
        "script": (PAGE / "page.js").read_text(encoding="utf-8"),
    }
    template = (PAGE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def number(x: float) -> str:
    """Return a level as it is shown: 0.5, 2, inf."""
    return str(x).removesuffix(".0")


def arrays(pairs: Pairs, weights: Weights) -> tuple[dict[str, bytes], float]:
    """Return the arrays of the page, and the step between the logarithms of weights."""
    first, second = pairs.first, pairs.second
    starts = torch.ones(len(first), dtype=torch.bool)
    starts[1:] = first.diff() > 0
    before = torch.where(starts, first, second.roll(1))
    logs = torch.cat([x[~x.isnan()] for x in weights[:2]])
    top = float(logs.max()) if len(logs) else 0.0
    lowest = max(float(logs.min()), top - FLOOR) if len(logs) else 0.0
    step = (top - lowest) / STEPS
    unit = step or 1.0
    # What is not known is not shown either, but the other weight of the pair is stored beside it.
    forward, backward = (((top - x) / unit).round().clamp(0, STEPS).nan_to_num(nan=0) for x in weights[:2])
    base = (weights.lse / unit).round()
    back = backward - forward - (base[second] - base[first])
    counts = first.bincount(minlength=pairs.n)
    streams = {"counts": numbers_of_7_bits(counts), "steps": numbers_of_7_bits(second - before)}
    for name in ("alpha", "beta"):
        streams[name] = as_bytes(pairs.bits[name, "forward"])
        streams[f"{name}_back"] = as_bytes(pairs.bits[name, "forward"] ^ pairs.bits[name, "backward"])
    for name, numbers in (("weight", forward), ("weight_back", back), ("base", base)):
        streams[name] = as_bytes(numbers.long())
    return streams, step


def numbers_of_7_bits(x: Tensor) -> bytes:
    """Return whole numbers >= 0, 7 bits a byte, the lowest first, the highest bit set where more follow."""
    lengths = torch.ones_like(x)
    for bits in (7, 14, 21):
        lengths += x >= 1 << bits
    places = torch.arange(int(lengths.max()) if len(x) else 1)
    digits = (x[:, None] >> 7 * places & 127) | (places < lengths[:, None] - 1) * 128
    return as_bytes(digits[places < lengths[:, None]])


def as_bytes(x: Tensor) -> bytes:
    """Return whole numbers modulo 256 as bytes."""
    return pictures.bytes_of((x & 255).to(torch.uint8))


def jpeg(picture: Tensor) -> str:
    """Return a picture, made smaller where it is large, as a data URL."""
    file = io.BytesIO()
    pictures.to_image(pictures.shrunk(picture, PICTURE_SIDE)).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
