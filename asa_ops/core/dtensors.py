"""Functions of DTensors: every process runs the function on its parts of what can be split, and whole tensors beside.

A layout names the dimensions of a tensor by a letter each: "b" the batch, "h" heads (or channels that do not mix), "g"
heads of keys, which those of queries may share, "n" and "m" the tokens of queries and of keys, "." what cannot be
split, as dimensions beyond the letters cannot. A capital: there may be one entry for all. Along a dimension of the mesh
the batch, the heads or all tokens are split, or nothing. A tensor without what is split is whole in every process, and
its gradient is summed.

Imported when the first DTensor arrives: ``torch.distributed.tensor`` is slow to import.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .checks import describe

_NOTHING, _BATCH, _HEADS, _TOKENS = "", "b", "hg", "nm"


class _Argument(NamedTuple):
    name: str
    layout: str  # a letter for each dimension that it has
    x: Any  # a DTensor


def run(
    function: Callable[..., Any],
    layouts: Mapping[str, str],
    out: str,
    args: tuple[Any, ...],
    options: Mapping[str, Any],
    over_tokens: Callable[..., Any] | None = None,
) -> Any:
    """Return ``function(*args, **options)``, the first of which is a DTensor, as DTensors.

    Args:
        layouts: of tensors among the arguments, by name and in the order of ``args``. A tensor of fewer dimensions has
            the last ones.
        out: layout of the results; those of fewer dimensions have the first ones.
        over_tokens: the same function where tokens are split over the processes of a ``group``; None: it cannot.
    """
    names = tuple(layouts)
    given = dict(zip(names, args, strict=False)) | {name: options[name] for name in names if name in options}
    tensors = _tensors(given, layouts)
    mesh = tensors[0].x.device_mesh
    sizes = _sizes(tensors)
    splits = _choose(tensors, sizes, mesh, over_tokens is not None)

    def local(name: str, x: Any) -> Any:
        if isinstance(x, tuple | list):
            return [local(name, part) for part in x]
        return _to_local(x, _dims(layouts[name], x), sizes, splits) if isinstance(x, DTensor) else x

    def whole(x: Any) -> Any:
        if isinstance(x, Tensor):
            return _from_local(x, out, sizes, splits, mesh)
        return type(x)(*map(whole, x)) if hasattr(x, "_fields") else tuple(map(whole, x))

    args = (*(local(name, x) for name, x in zip(names, args, strict=False)), *args[len(names) :])
    options = {name: local(name, x) if name in layouts else x for name, x in options.items()}
    if over_tokens is None or _TOKENS not in splits:
        return whole(function(*args, **options))
    return whole(over_tokens(*args, **options, group=mesh.get_group(splits.index(_TOKENS))))


def _tensors(given: Mapping[str, Any], layouts: Mapping[str, str]) -> list[_Argument]:
    """Return the tensors among the arguments, all DTensors of one mesh."""
    found = [
        _Argument(name, _dims(layouts[name], part), part)
        for name, x in given.items()
        for part in (x if isinstance(x, tuple | list) else [x])
        if isinstance(part, Tensor)
    ]
    first = found[0]
    for name, _, x in found:
        if not isinstance(x, DTensor):
            raise TypeError(
                f"{name} must be a DTensor as {first.name} is, got {describe(x)}: make one with "
                "torch.distributed.tensor.distribute_tensor or DTensor.from_local"
            )
        if x.device_mesh != first.x.device_mesh:
            raise ValueError(f"{name} must lie on the mesh of {first.name}, {first.x.device_mesh}, got {x.device_mesh}")
    return found


def _dims(layout: str, x: Tensor) -> str:
    """Return the letters of the dimensions of an argument."""
    return layout[max(len(layout) - x.dim(), 0) :]


def _sizes(tensors: list[_Argument]) -> dict[str, int]:
    """Return the size that each letter stands for: that of the first tensor that has it."""
    sizes: dict[str, int] = {}
    for _, layout, x in tensors:
        for letter, size in zip(layout, x.shape, strict=False):
            sizes.setdefault(letter.lower(), size)
    return sizes


def _choose(tensors: list[_Argument], sizes: dict[str, int], mesh: DeviceMesh, tokens: bool) -> list[str]:
    """Return what to split along each dimension of the mesh: what a tensor has split there, at the least exchange."""
    splits: list[str] = []
    for along in range(mesh.ndim):
        best = _NOTHING
        for split in (_BATCH, _HEADS, _TOKENS):
            parts = mesh.size(along)
            for other, chosen in enumerate(splits):
                parts *= mesh.size(other) if chosen == split else 1
            wanted = any(_is_split(x, layout, sizes, along, split) for _, layout, x in tensors)
            able = all(_divides(x, layout, sizes, split, parts) for _, layout, x in tensors)
            if not wanted or not able or (split == _TOKENS and (not tokens or split in splits)):
                continue
            more = _exchanged(tensors, sizes, along, split) - _exchanged(tensors, sizes, along, best)
            if more < 0 or (more == 0 and best == _NOTHING):
                best = split
        splits.append(best)
    return splits


def _split_dim(x: Tensor, layout: str, sizes: dict[str, int], split: str) -> int | None:
    """Return which dimension of a tensor is split; None if it has none of them, or one entry for all."""
    for dim, letter in enumerate(layout):
        if letter.lower() in split:
            whole = sizes.get("h", 1) if letter == "g" else sizes[letter.lower()]
            for_all = x.shape[dim] == 1 != whole and (letter == "g" or letter.isupper())
            return None if for_all else dim
    return None


def _placement(x: Tensor, layout: str, sizes: dict[str, int], split: str) -> Placement:
    dim = _split_dim(x, layout, sizes, split)
    return Replicate() if dim is None else Shard(dim)


def _is_split(x: DTensor, layout: str, sizes: dict[str, int], along: int, split: str) -> bool:
    return isinstance(x.placements[along], Shard) and x.placements[along] == _placement(x, layout, sizes, split)


def _divides(x: Tensor, layout: str, sizes: dict[str, int], split: str, parts: int) -> bool:
    """Return whether every part of a tensor belongs to one of the first tensor.

    Where sizes do not fit nothing is split, and every process raises the same error.
    """
    for letter, size in zip(layout, x.shape, strict=False):
        if letter == "g" and letter in split:
            heads = sizes.get("h", 0)  # 0: a query with too few dimensions
            return size == sizes["g"] and (size in (1, heads) or size % parts == heads % parts == 0)
        if letter.lower() in split:
            return size == sizes[letter.lower()] or (size == 1 and letter.isupper())
    return True


def _exchanged(tensors: list[_Argument], sizes: dict[str, int], along: int, split: str) -> float:
    """Return how many numbers a process receives, roughly, when tensors are placed as ``split`` wants them."""
    total = 0.0
    for _, layout, x in tensors:
        placement = _placement(x, layout, sizes, split)
        if not isinstance(x.placements[along], Replicate) and x.placements[along] != placement:
            total += x.numel() if isinstance(placement, Replicate) else x.numel() / x.device_mesh.size(along)
    return total


def _to_local(x: DTensor, layout: str, sizes: dict[str, int], splits: list[str]) -> Tensor:
    """Return this process's part; its gradient comes back in the placements of ``x``."""
    placements = tuple(_placement(x, layout, sizes, split) for split in splits)
    gradients = tuple(
        Partial() if split and isinstance(placement, Replicate) else placement
        for split, placement in zip(splits, placements, strict=True)
    )
    if x.placements != placements or gradients != placements:  # backward, it sums what is partial
        x = x.redistribute(placements=placements)
    return x.to_local(grad_placements=gradients)


def _from_local(x: Tensor, layout: str, sizes: dict[str, int], splits: list[str], mesh: DeviceMesh) -> DTensor:
    """Return a result of which this process has ``x``."""
    shape, strides, placements = list(x.shape), list(x.stride()), []
    for split in splits:
        dim = next((dim for dim, letter in enumerate(layout) if letter in split), None)
        placements.append(Replicate() if dim is None else Shard(dim))
        # Parts may have different sizes: torch could not know those of the whole.
        if dim is not None and shape[dim] != sizes[layout[dim]]:
            part, shape[dim] = max(shape[dim], 1), sizes[layout[dim]]
            for other in range(x.dim()):
                if strides[other] > strides[dim] or (strides[other] == strides[dim] and other < dim):
                    strides[other] = strides[other] // part * shape[dim]
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides))
