"""Input errors that quote what came and what was expected, raised before any work.

Values inside tensors (a negative ``alpha``, a NaN score) are data, not arguments: they are never checked here, because
that would force a device synchronisation. They surface as NaN rows of their own image (see ``asa_ops.asa``).
"""

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(x: object) -> str:
    """Return a short description of an argument for an error message."""
    if isinstance(x, Tensor):
        return f"a {x.dtype} tensor of shape {list(x.shape)} on {x.device}"
    return f"{x!r} of type {type(x).__name__}"


def check_tensor(name: str, x: object, layout: str) -> None:
    """Check that ``x`` is a tensor with as many dimensions as ``layout`` ("[B, heads, N, D]") names."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {describe(x)}")
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} must have the {layout.count(',') + 1} dimensions {layout}, got {describe(x)}")


def check_positive_int(name: str, x: object) -> None:
    """Check that ``x`` is an integer of at least 1."""
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt):
        raise TypeError(f"{name} must be an integer >= 1, got {describe(x)}")
    if x < 1:
        raise ValueError(f"{name} must be >= 1, got {name}={x}")


def check_number(name: str, x: object) -> None:
    """Check that ``x`` is a real number."""
    if isinstance(x, bool) or not isinstance(x, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name} must be a number, got {describe(x)}")


def check_window(window: object) -> None:
    """Check that ``window`` is an odd integer >= 1."""
    check_positive_int("window", window)
    if window % 2 == 0:
        raise ValueError(f"window must be odd, got window={window}")


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check rank, batch, heads, lengths, head dim, dtype and device of an attention triple.

    ``query`` [B, heads, N_q, D], ``key`` [B, heads, N_k, D], ``value`` [B, heads, N_k, Dv].
    """
    check_tensor("query", query, "[B, heads, N_q, D]")
    check_tensor("key", key, "[B, heads, N_k, D]")
    check_tensor("value", value, "[B, heads, N_k, Dv]")
    check_floating("query", query)
    for name, x in (("key", key), ("value", value)):
        check_like(name, x, query)
        if x.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"{name} must have the batch and heads of query, {list(query.shape[:2])}, got {describe(x)}"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key must have the head dim of query, D = {query.shape[-1]}, got D = {key.shape[-1]} in {describe(key)}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value must have one row per key, N_k = {key.shape[-2]}, got N_k = {value.shape[-2]} in {describe(value)}"
        )
    if query.shape[-1] < 1:
        raise ValueError(f"query must have a head dim D >= 1, got {describe(query)}")


def check_maps(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check rank, shape, dtype and device of the maps ``query``, ``key`` [B, D, H, W] and ``value`` [B, Dv, H, W]."""
    for name, x, layout in (
        ("query", query, "[B, D, H, W]"),
        ("key", key, "[B, D, H, W]"),
        ("value", value, "[B, Dv, H, W]"),
    ):
        check_tensor(name, x, layout)
        if 0 in x.shape[1:]:
            raise ValueError(f"{name} must have channels, H and W >= 1, got {describe(x)}")
    check_floating("query", query)
    check_like("key", key, query)
    check_like("value", value, query)
    if key.shape != query.shape:
        raise ValueError(f"key must have the shape of query, {list(query.shape)}, got {describe(key)}")
    if value.shape[0] != query.shape[0] or value.shape[2:] != query.shape[2:]:
        batch, _, height, width = query.shape
        raise ValueError(f"value must be [B, Dv, H, W] = [{batch}, Dv, {height}, {width}], got {describe(value)}")


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


def check_threshold(name: str, x: Tensor | None, query: Tensor) -> None:
    """Check a per-row threshold multiplier [B, heads or 1, N_q] in the dtype of ``query`` or float32."""
    if x is None:
        return
    check_tensor(name, x, "[B, heads or 1, N_q]")
    if x.dtype not in (query.dtype, torch.float32):
        expected = " or ".join(dict.fromkeys(map(str, (query.dtype, torch.float32))))
        raise TypeError(f"{name} must be {expected}, got {describe(x)}")
    check_device(name, x, query)
    batch, heads, n = query.shape[:3]
    if x.shape[0] != batch or x.shape[1] not in (1, heads) or x.shape[2] != n:
        raise ValueError(f"{name} must be [B, heads or 1, N_q] = [{batch}, {heads} or 1, {n}], got {describe(x)}")


def check_grid(grid: object, n: int) -> None:
    """Check that ``grid`` is (H, W) with H * W == n."""
    if not isinstance(grid, tuple | list) or len(grid) != 2:
        raise TypeError(f"grid must be (H, W), got {describe(grid)}")
    for side in grid:
        if isinstance(side, bool) or not isinstance(side, int | torch.SymInt):
            raise TypeError(f"grid must hold two integers (H, W), got {describe(grid)}")
    height, width = grid
    if height < 0 or width < 0 or height * width != n:
        raise ValueError(f"grid must be (H, W) with H * W = N = {n}, got {height} * {width} = {height * width}")


def check_padding_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    """Check a boolean [B, N_k] mask, True at real positions."""
    if mask is None:
        return
    check_tensor("key_padding_mask", mask, "[B, N_k]")
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be torch.bool (True = a real position), got {describe(mask)}")
    check_device("key_padding_mask", mask, query)
    if mask.shape[0] != key.shape[0] or mask.shape[1] != key.shape[2]:
        raise ValueError(f"key_padding_mask must be [B, N_k] = [{key.shape[0]}, {key.shape[2]}], got {describe(mask)}")


def check_same_map(name: str, x: Tensor, other: Tensor, of: str) -> None:
    """Check that two maps [B, C, H, W] have the same B, H and W; ``other`` is an argument called ``of``."""
    if x.shape[:1] + x.shape[2:] != other.shape[:1] + other.shape[2:]:
        raise ValueError(
            f"{name} must have the B, H, W of {of}, {[other.shape[0], *other.shape[2:]]}, got {describe(x)}"
        )


def check_pair(name: str, x: object) -> None:
    """Check that ``x`` is two integers of at least 1."""
    if not isinstance(x, tuple | list) or len(x) != 2:
        raise TypeError(f"{name} must be two integers, got {describe(x)}")
    for part in x:
        check_positive_int(f"each of {name}", part)


def check_factors(factors: object, grid: tuple[int, int]) -> None:
    """Check that ``factors`` is two integers, neither larger than its side of the map."""
    check_pair("factors", factors)
    if factors[0] > grid[0] or factors[1] > grid[1]:
        raise ValueError(f"factors must be at most (H, W) = {tuple(grid)}, got factors={tuple(factors)}")


def check_at_most(name: str, x: int, limit: int, what: str) -> None:
    """Check that the integer ``x`` is at most ``limit``, which is ``what``."""
    if x > limit:
        raise ValueError(f"{name} must be at most {what} = {limit}, got {name}={x}")


def check_divisible(name: str, channels: int, heads: int) -> None:
    """Check that ``channels``, described by ``name``, split into ``heads`` equal parts."""
    if channels % heads:
        raise ValueError(f"{name} = {channels} must be divisible by heads = {heads}")


def check_choice(name: str, x: object, choices: tuple) -> None:
    """Check that ``x`` is one of ``choices``."""
    if x not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {x!r}")


def check_feature_map(x: object, channels: int) -> None:
    """Check that ``x`` is a feature map [B, C, H, W] with C = ``channels``."""
    check_tensor("x", x, "[B, C, H, W]")
    if x.shape[1] != channels:
        raise ValueError(f"x must have C = in_channels = {channels} channels, got {describe(x)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have H, W >= 1, got {describe(x)}")
