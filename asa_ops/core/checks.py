"""Input errors that quote what came and what was expected, raised before any work.

``check_*`` only look; ``as_*`` also return an option as the plain Python number that the operations below want. They
take what torch's own functions take: an integer is whatever has ``__index__`` (NumPy's integers, tensors of one
integer, which sizes are under torch.jit.trace), a number any real one, or a tensor of one without a gradient. A bool is
no integer to torch (``max_pool2d`` refuses True) but a number (``dropout`` takes it for 1), and so it is here.

Values inside tensors (a negative ``alpha``, a NaN score) are data, not arguments: they are never checked here, because
that would force a device synchronisation. They surface as NaN rows of their own image (see ``asa_ops.asa``).
"""

import math
import numbers
import operator
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(x: object) -> str:
    """Return a short description of an argument for an error message, on one line."""
    if isinstance(x, Tensor):
        shape = "different lengths" if x.is_nested else f"shape {list(x.shape)}"
        return f"a {x.dtype} tensor of {shape} on {x.device}"
    return f"{' '.join(repr(x).split())} of type {type(x).__name__}"


def is_dtensor(x: object) -> bool:
    """Return whether ``x`` is a DTensor. Whoever has one has imported their module, which is slow to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def check_plain(name: str, x: object) -> None:
    """Check that ``x`` is no DTensor, where the first argument, whose kind decides, is none."""
    if is_dtensor(x):
        raise TypeError(f"{name} is a DTensor among plain tensors: pass DTensors alone, or {name}.to_local()")


def check_tensor(name: str, x: object, layout: str) -> None:
    """Check that ``x`` is a tensor with as many dimensions as ``layout`` ("[B, heads, N, D]") names."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {describe(x)}")
    if x.is_nested:
        raise TypeError(f"{name} must be no nested tensor: pad its parts to {layout} and pass a key_padding_mask")
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} must have the {layout.count(',') + 1} dimensions {layout}, got {describe(x)}")


def _integer(x: Any) -> int | None:
    """Return ``x`` as a plain int, or a symbolic one as it is; None if it is no integer."""
    if type(x) is int or isinstance(x, torch.SymInt):
        return cast(int, x)
    if isinstance(x, bool) or (isinstance(x, Tensor) and x.dtype == torch.bool):
        return None
    try:
        return operator.index(x)
    except TypeError:
        return None


def as_int(name: str, x: object, at_least: int) -> int:
    """Return ``x`` as an integer of at least ``at_least``."""
    number = _integer(x)
    if number is None:
        raise TypeError(f"{name} must be an integer >= {at_least}, got {describe(x)}")
    if number < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {name}={number}")
    return number


def as_positive_int(name: str, x: object) -> int:
    """Return ``x`` as an integer of at least 1."""
    return as_int(name, x, at_least=1)


def as_positive_ints(**options: object) -> list[int]:
    """Return ``options``, in this order, as integers of at least 1."""
    return [as_positive_int(name, x) for name, x in options.items()]


def as_number(name: str, x: Any) -> float:
    """Return the real number ``x`` as a float."""
    if type(x) is float:
        return x
    if isinstance(x, int):
        return float(x)
    if isinstance(x, torch.SymFloat | torch.SymInt):
        return cast(float, torch.sym_float(x))
    if isinstance(x, Tensor) and x.requires_grad:
        raise TypeError(f"{name} must be a number, got {describe(x)} that requires a gradient, and would get none")
    if not isinstance(x, numbers.Real) and not (isinstance(x, Tensor) and x.dim() == 0 and not x.is_complex()):
        raise TypeError(f"{name} must be a number, got {describe(x)}")
    return float(x)


def as_positive_number(name: str, x: object) -> float:
    """Return the real number ``x``, which is positive and finite, as a float."""
    number = as_number(name, x)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be > 0 and finite, got {number}")
    return number


def as_scale(scale: object, query: Tensor) -> float:
    """Return the factor of the scores of ``query`` [.., D] as a float; None stands for D**-0.5."""
    # Under torch.jit.trace the size is a tensor, and its power would be one of float32.
    return cast(int, _integer(query.shape[-1])) ** -0.5 if scale is None else as_number("scale", scale)


def as_each_side(name: str, x: object, dims: int, kind: str = "an integer") -> tuple[int, ...]:
    """Return ``x``, one integer of at least 1 or one for each of ``dims`` sides of a grid, as ``dims`` of them."""
    given = x if isinstance(x, tuple | list) else [x] * dims
    if len(given) != dims:
        raise ValueError(f"{name} must be {kind}, or {dims} of them, one for each side, got {name}={x}")
    return tuple(as_positive_int(name if given is not x else f"each side of {name}", side) for side in given)


def as_window(window: object, dims: int) -> tuple[int, ...]:
    """Return ``window``, one odd integer or one for each of ``dims`` sides of a grid, as ``dims`` of them."""
    sides = as_each_side("window", window, dims, "an odd integer")
    if any(side % 2 == 0 for side in sides):
        raise ValueError(f"window must be odd, got window={window}")
    return sides


def check_qkv(query: Tensor, key: Tensor, value: Tensor, grouped: bool = False) -> None:
    """Check rank, batch, heads, lengths, head dim, dtype and device of an attention triple.

    ``query`` [B, heads, N_q, D], ``key`` [B, heads, N_k, D], ``value`` [B, heads, N_k, Dv]; if ``grouped``, those of
    ``query`` may be a multiple of the heads of the others.
    """
    if _fit(query, key, value, grouped):  # asked at once: every call asks, and finding out what is wrong takes longer
        return
    check_tensor("query", query, "[B, heads, N_q, D]")
    check_tensor("key", key, "[B, heads, N_k, D]")
    check_tensor("value", value, "[B, heads, N_k, Dv]")
    check_floating("query", query)
    for name, x in (("key", key), ("value", value)):
        check_like(name, x, query)
        if grouped:
            if x.shape[0] != query.shape[0] or (query.shape[1] % x.shape[1] if x.shape[1] else query.shape[1]):
                raise ValueError(
                    f"{name} must have the batch of query, and heads of which query's are a multiple, "
                    f"{list(query.shape[:2])}, got {describe(x)}"
                )
        elif x.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"{name} must have the batch and heads of query, {list(query.shape[:2])}, got {describe(x)}"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key must have the head dim of query, D = {query.shape[-1]}, got D = {key.shape[-1]} in {describe(key)}"
        )
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value must have the heads of key, {key.shape[1]}, got {describe(value)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value must have one row per key, N_k = {key.shape[-2]}, got N_k = {value.shape[-2]} in {describe(value)}"
        )
    if query.shape[-1] < 1:
        raise ValueError(f"query must have a head dim D >= 1, got {describe(query)}")


def _fit(query: object, key: object, value: object, grouped: bool) -> bool:
    """Return whether nothing is wrong with an attention triple."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return False
    if query.is_nested or key.is_nested or value.is_nested:
        return False
    q, k, v, dtype, device = query.shape, key.shape, value.shape, query.dtype, query.device
    if not len(q) == len(k) == len(v) == 4:
        return False
    return (
        q[0] == k[0] == v[0]
        and k[1] == v[1]
        and (q[1] == k[1] or (grouped and k[1] > 0 and q[1] % k[1] == 0))
        and k[2] == v[2]
        and q[3] == k[3]
        and q[3] >= 1
        and dtype in _DTYPES
        and key.dtype == dtype == value.dtype
        and key.device == device == value.device
    )


def check_maps(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check rank, shape, dtype and device of the maps ``query``, ``key`` [B, D, H, W] and ``value`` [B, Dv, H, W].

    Or with T before H, all of them.
    """
    dims = as_map_dims("query", query, 2, 3, channels="D")
    for name, x, channels in (("query", query, "D"), ("key", key, "D"), ("value", value, "Dv")):
        check_tensor(name, x, map_layout(dims, channels))
        if 0 in x.shape[1:]:
            raise ValueError(f"{name} must have channels, {' and '.join(SIDES[dims])} >= 1, got {describe(x)}")
    check_floating("query", query)
    check_like("key", key, query)
    check_like("value", value, query)
    if key.shape != query.shape:
        raise ValueError(f"key must have the shape of query, {list(query.shape)}, got {describe(key)}")
    if value.shape[0] != query.shape[0] or value.shape[2:] != query.shape[2:]:
        expected = ", ".join(map(str, (query.shape[0], "Dv", *query.shape[2:])))
        raise ValueError(f"value must be {map_layout(dims, 'Dv')} = [{expected}], got {describe(value)}")


def check_floating(name: str, x: Tensor) -> None:
    """Check that ``x`` has a dtype that the ops take."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be one of {_DTYPES}, got {describe(x)}")


def check_like(name: str, x: Tensor, other: Tensor, of: str = "query") -> None:
    """Check that ``x`` has the dtype and the device of ``other``, an argument called ``of``."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {of}, {other.dtype}, got {describe(x)}")
    check_device(name, x, other, of)


def check_device(name: str, x: Tensor, other: Tensor, of: str = "query") -> None:
    """Check that ``x`` lies on the device of ``other``, an argument called ``of``."""
    if x.device != other.device:
        raise ValueError(f"{name} must lie on the device of {of}, {other.device}, got {describe(x)}")


def as_threshold(name: str, x: Tensor | float | None, query: Tensor) -> Tensor | None:
    """Return a threshold multiplier, a number or a tensor that broadcasts to [B, heads, N_q], with three dimensions."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        if not isinstance(x, numbers.Real | torch.SymInt | torch.SymFloat):
            raise TypeError(f"{name} must be a number or a tensor, got {describe(x)}")
        return query.new_full((1, 1, 1), as_number(name, x), dtype=torch.promote_types(query.dtype, torch.float32))
    if type(x) is not Tensor:
        check_plain(name, x)
    if x.dtype != query.dtype and x.dtype != torch.float32:
        expected = " or ".join(dict.fromkeys(map(str, (query.dtype, torch.float32))))
        raise TypeError(f"{name} must be {expected}, got {describe(x)}")
    check_device(name, x, query)
    if x.dim() < 3:
        x = x[(None,) * (3 - x.dim())]
    rows = query.shape[:3]
    if x.shape != rows and (x.dim() > 3 or any(n not in (1, wanted) for n, wanted in zip(x.shape, rows, strict=True))):
        raise ValueError(f"{name} must broadcast to [B, heads, N_q] = {list(rows)}, got {describe(x)}")
    return x


SIDES = {1: ("L",), 2: ("H", "W"), 3: ("T", "H", "W")}  # of a grid, by the number of its dimensions
_GRIDS = {dims: str(sides).replace("'", "") for dims, sides in SIDES.items()}


def as_dims(dims: object) -> int:
    """Return the number of dimensions of the maps that a block takes."""
    number = _integer(dims)
    if number is None:
        raise TypeError(f"dims must be an integer, 1, 2 or 3, got {describe(dims)}")
    if number not in SIDES:
        raise ValueError(f"dims must be 1, 2 or 3, got dims={number}")
    return number


def map_layout(dims: int, channels: str = "C") -> str:
    """Return the layout of a map of ``dims`` dimensions, "[B, C, H, W]"."""
    return f"[{', '.join(('B', channels, *SIDES[dims]))}]"


def as_map_dims(name: str, x: object, *dims: int, channels: str = "C") -> int:
    """Return the number of dimensions, one of ``dims``, of the map ``x``, beside its batch and channels."""
    layouts = " or ".join(map(map_layout, dims, [channels] * len(dims)))
    if not isinstance(x, Tensor) or x.is_nested:
        check_tensor(name, x, layouts)
    assert isinstance(x, Tensor)
    if x.dim() - 2 not in dims:
        raise ValueError(f"{name} must have the dimensions {layouts}, got {describe(x)}")
    return x.dim() - 2


def as_sides(grid: object, *dims: int) -> tuple[int, ...]:
    """Return ``grid`` as integers, as many as one of ``dims``."""
    kinds = " or ".join(_GRIDS[d] for d in dims)
    if not isinstance(grid, tuple | list) or len(grid) not in dims:
        raise TypeError(f"grid must be {kinds}, got {grid if isinstance(grid, tuple | list) else describe(grid)}")
    sides = [_integer(side) for side in grid]
    for side, given in zip(sides, grid, strict=True):
        if side is None:
            raise TypeError(f"grid must hold integers {kinds}, got {describe(given)} in grid={grid}")
    return tuple(cast(list[int], sides))


def as_grid(grid: object, n: int, *dims: int, extra_tokens: int = 0) -> tuple[int, ...]:
    """Return ``grid`` as integers whose product is n, without extra tokens, as many as one of ``dims``."""
    sides = as_sides(grid, *dims)
    negative = any(side < 0 for side in sides)
    if negative or math.prod(sides) != n - extra_tokens:
        kind, product = _GRIDS[len(sides)], " * ".join(SIDES[len(sides)])
        given = " * ".join(map(str, sides)) + (f" = {math.prod(sides)}" if len(sides) > 1 else "")
        wanted = f"N - extra_tokens = {n} - {extra_tokens}" if extra_tokens else f"N = {n}"
        raise ValueError(f"grid must be {kind} with {product} = {wanted}, got {given}")
    return sides


def check_padding_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    """Check a boolean [B, N_k] mask, True at real positions."""
    if mask is None:
        return
    check_tensor("key_padding_mask", mask, "[B, N_k]")
    check_plain("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be torch.bool (True = a real position), got {describe(mask)}")
    check_device("key_padding_mask", mask, query)
    if mask.shape[0] != key.shape[0] or mask.shape[1] != key.shape[2]:
        raise ValueError(f"key_padding_mask must be [B, N_k] = [{key.shape[0]}, {key.shape[2]}], got {describe(mask)}")


def check_same_map(name: str, x: Tensor, other: Tensor, of: str) -> None:
    """Check that two maps [B, C, H, W] have the same B, H and W; ``other`` is an argument called ``of``.

    Or maps of one dimension, or of three.
    """
    if x.shape[:1] + x.shape[2:] != other.shape[:1] + other.shape[2:]:
        sides = ", ".join(SIDES[other.dim() - 2])
        raise ValueError(
            f"{name} must have the B, {sides} of {of}, {[other.shape[0], *other.shape[2:]]}, got {describe(x)}"
        )


def as_tuple(name: str, x: object, length: int) -> tuple[int, ...]:
    """Return ``x`` as a tuple of ``length`` integers of at least 1, up to three."""
    if not isinstance(x, tuple | list) or len(x) != length:
        kind = ("a tuple of one integer", "two integers", "three integers")[length - 1]
        raise TypeError(f"{name} must be {kind}, got {describe(x)}")
    return tuple(as_positive_int(f"each of {name}", part) for part in x)


def as_factors(factors: object, grid: Sequence[int]) -> tuple[int, ...]:
    """Return ``factors`` as integers, one for each side of the map and none larger than it."""
    steps = as_tuple("factors", factors, len(grid))
    if any(step > side for step, side in zip(steps, grid, strict=True)):
        raise ValueError(f"factors must be at most {_GRIDS[len(grid)]} = {tuple(grid)}, got factors={steps}")
    return steps


def check_at_most(name: str, x: int, limit: int, what: str) -> None:
    """Check that the integer ``x`` is at most ``limit``, which is ``what``."""
    if x > limit:
        raise ValueError(f"{name} must be at most {what} = {limit}, got {name}={x}")


def check_divisible(name: str, channels: int, heads: int) -> None:
    """Check that ``channels``, described by ``name``, split into ``heads`` equal parts."""
    if channels % heads:
        raise ValueError(f"{name} = {channels} must be divisible by heads = {heads}")


def check_choice(name: str, x: object, choices: Sequence[str | None]) -> None:
    """Check that ``x`` is one of ``choices``."""
    if not (x is None or isinstance(x, str)):
        raise ValueError(f"{name} must be one of {list(choices)}, got {describe(x)}")
    if x not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {x!r}")


def check_feature_map(x: Tensor, channels: int, dims: int = 2) -> None:
    """Check that ``x`` is a feature map of ``dims`` dimensions, [B, C, H, W], or [C, H, W], with C = ``channels``."""
    if not isinstance(x, Tensor) or x.dim() != dims + 1:
        check_tensor("x", x, map_layout(dims))
    if x.shape[-dims - 1] != channels:
        raise ValueError(f"x must have C = in_channels = {channels} channels, got {describe(x)}")
    if 0 in x.shape[-dims:]:
        raise ValueError(f"x must have {', '.join(SIDES[dims])} >= 1, got {describe(x)}")
