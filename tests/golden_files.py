"""Golden files, numbers from the authors' code (golden/README.md): which there are, and the block that each is of.

``ASA_GOLDEN_DIR`` names another folder of files in the same format. Names of files mean nothing: a file says itself
what it is of. Whatever is wrong with a folder or a file is a GoldenError of one line that names it.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch

from asa_ops import nn
from asa_ops.nn.common import conv_norm_relu

OWN = Path(__file__).resolve().with_name("golden")
FOLDER = Path(os.environ.get("ASA_GOLDEN_DIR", OWN)).resolve()
MANIFEST = "MANIFEST.json"


class GoldenError(Exception):
    """What is wrong with a folder or a file."""


class Content(dict):
    """What a file holds; what it lacks is told with its name."""

    def __init__(self, where: str, *args):
        super().__init__(*args)
        self.where = where

    def __missing__(self, key):
        raise GoldenError(f"{self.where}: there is no {key!r}, only {sorted(self)}")


def check_folder(folder: Path, whole: bool = True) -> None:
    """Check that the manifest of a folder lists its files and, if ``whole``, no others.

    Of somebody's own choice of files the manifest may be that of all files, or be missing.

    Raises:
        GoldenError: it does not, or there is no such folder, or no file in it.
    """
    if not folder.is_dir():
        raise GoldenError(f"{folder} is no folder")
    present = {path.name for path in files(folder)}
    if not present:
        raise GoldenError(f"no *.npz in {folder}")
    if not whole and not (folder / MANIFEST).exists():
        return
    listed = _listed(folder / MANIFEST)
    if unlisted := sorted(present - listed):
        raise GoldenError(f"{folder / MANIFEST} has no entry for {unlisted}")
    if whole and (missing := sorted(listed - present)):
        raise GoldenError(f"{folder / MANIFEST} has an entry for {missing}, but there is no such file")


def _listed(path: Path) -> set[str]:
    """Return the names in a manifest, {"files": [{"file": name}, ...]}; it may say more."""
    if not path.exists():
        raise GoldenError(f"there is no {path.name} in {path.parent}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GoldenError(f"{path} is no JSON: {error}") from error
    try:
        return {entry["file"] for entry in manifest["files"]}
    except (TypeError, KeyError) as error:
        raise GoldenError(f'{path} must be {{"files": [{{"file": name}}, ...]}}, but: {error}') from error


def files(folder: Path, system: str | None = None) -> list[Path]:
    """Return the files of a folder: all, or those that can be read and are of one system."""
    return [path for path in sorted(folder.glob("*.npz")) if system is None or _system(path) == system]


def _system(path: Path) -> str | None:
    try:
        return load(path, only=("meta",))["meta"]["system"]
    except GoldenError:  # told by the tests of all files
        return None


def load(path: Path, only: tuple[str, ...] = ()) -> Content:
    """Return the arrays of a file, and its "meta"."""
    golden = Content(str(path))
    try:
        with np.load(path, allow_pickle=False) as file:
            golden.update({key: file[key] for key in file.files if not only or key in only})
        meta = json.loads(str(golden["meta"][0]))
        golden["meta"] = Content(f"the meta of {path}", meta)
        golden["meta"]["hyper"] = Content(f"the hyperparameters of {path}", golden["meta"]["hyper"])
    except GoldenError:
        raise
    except Exception as error:  # NumPy, zipfile, zlib and json have many
        raise GoldenError(f"{path} is no golden file: {error}") from error
    return Content(str(path), {key: x if key == "meta" else torch.from_numpy(x) for key, x in golden.items()})


def group(golden: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def build(golden: Content, **options) -> torch.nn.Module:
    """Return the block that a file is of, with its parameters; ``options`` replace those that the file asks for."""
    meta = golden["meta"]
    system, hyper = meta["system"], meta["hyper"]
    if system not in SYSTEMS:
        raise GoldenError(f"{meta.where} has the system {system!r}, known are {sorted(SYSTEMS)}")
    block_class, same, others = HEADS[system] if "use_image_level" in hyper else SYSTEMS[system]
    its_options = {name: hyper[name] for name in same}
    for name, x in others.items():
        its_options[name] = x(hyper) if callable(x) else hyper[x] if isinstance(x, str) else x
    block = block_class(golden["x"].shape[1], **(its_options | options)).double().train(meta["mode"] == "train")
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = hyper.get("bn_eps", module.eps)
    block.load_state_dict(block.from_upstream(group(golden, "param/") | group(golden, "buffer/")))
    return block


class CaaHead(torch.nn.Module):
    """The head that channelized axial attention was published in: 3x3 entry, block, 1x1 end, beside the mean image."""

    def __init__(self, channels: int, image_level: bool, **options):
        super().__init__()
        inner = options["out_channels"]
        self.entry = conv_norm_relu(channels, inner, kernel=3, eps=1e-3)
        self.block = nn.ChannelizedAxialAttention(inner, **options)
        self.end = conv_norm_relu(inner, inner, eps=1e-3)
        self.image = conv_norm_relu(channels, inner, eps=1e-3) if image_level else None

    def forward(self, x):
        y = self.end(self.block(self.entry(x)))
        if self.image is None:
            return y
        return torch.cat([y, self.image(x.mean((2, 3), keepdim=True)).expand_as(y)], 1)

    @staticmethod
    def from_upstream(state_dict: dict) -> dict:
        renamed = {}
        parts = {"entry_convbnrelu": "entry", "ca_blocks.0": "block", "end_convbnrelu": "end"}
        for theirs, ours in (parts | {"image_level_block.convbnrelu": "image"}).items():
            part = group(state_dict, f"{theirs}.")
            if ours != "block":  # the block knows how to rename a layer like these: its value
                part = {f"value_convbnrelu.{key}": x for key, x in part.items()}
            new = nn.ChannelizedAxialAttention.from_upstream(part)
            renamed |= {f"{ours}.{key if ours == 'block' else key.removeprefix('value.')}": x for key, x in new.items()}
        return renamed


def norm(hyper: Content) -> str | None:
    return None if hyper["norm_cfg"] is None else "batch"


def window(hyper: Content) -> int:
    rows, columns = hyper["neighbor_size"]
    if rows != columns:
        raise GoldenError(f"{hyper.where} has neighbor_size {hyper['neighbor_size']}, windows are square")
    return rows


CAA = {
    "out_channels": "filters",
    "key_channels": "guided_filters",
    "hidden_layers": "hidden_layers_count",
    "hidden_ratio": "hidden_layer_ratio",
    "channel_attention": "use_channel_attention",
}
SYSTEMS = {  # the class; options that are hyperparameters of the same name; others, of another name or made of them
    "asa": (
        nn.AdaptiveSparseAttention,
        ("reduction", "mode", "use_scale"),
        {"norm": norm, "window": window, "published": True},
    ),
    "caa": (nn.ChannelizedAxialAttention, (), CAA),
    "ccnet": (nn.CrissCrossAttention, ("recurrence",), {}),
    "efficient_attention": (
        nn.EfficientAttention,
        ("key_channels", "value_channels"),
        {"heads": "head_count", "published": True},
    ),
    "isa": (
        nn.InterlacedSparseAttention,
        ("key_channels", "value_channels", "out_channels", "dropout"),
        {"factors": "down_factors", "published": True},
    ),
    "lam_channel": (nn.LinearAttention, ("eps",), {"kind": lambda h: "channel"}),
    "lam_position": (nn.LinearAttention, ("eps",), {"kind": lambda h: "position"}),
    "nl": (nn.NonLocal, ("reduction", "mode", "use_scale", "sub_sample"), {"norm": norm, "published": True}),
    "sanet": (
        nn.SqueezeAndAttention,
        ("pool",),
        {
            "out_channels": "ch_out",
            "activation": lambda h: "sigmoid" if h["sigmoid"] else None,
            "upsample": lambda h: h["upsample"].split()[0],
        },
    ),
    "spanet": (
        nn.SalientPositionsAttention,
        ("sub_sample",),
        {"inner_channels": "inter_channels", "topk": lambda h: None if h["adaptive"] else h["k"]},
    ),
}
HEADS = {"caa": (CaaHead, (), CAA | {"image_level": "use_image_level"})}  # of files with a whole head
