"""The public function of channelized axial attention."""

from collections.abc import Sequence

from torch import Tensor

from .. import checks
from ..precision import at_least_float32, cast_under_autocast, outside_autocast
from ..softmax_attention import softmax_attention
from .reference import gate


def channelized_axial_attention(
    column: Tensor,
    row: Tensor,
    value: Tensor,
    column_gate: Sequence[Tensor] | None = None,
    row_gate: Sequence[Tensor] | None = None,
    *,
    negative_slope: float = 0.2,
) -> Tensor:
    """Attend along columns, then along rows, and gate every channel of either, without a five-dimensional tensor.

    Formulas: ``asa_ops/channelized_axial/__init__.py``. Source: Huang, Kang, Jia, He and Liu, AAAI 2022.

    Args:
        column: [B, D, H, W], floating point: query and key of the attention along columns.
        row: [B, Dr, H, W]: query and key of the attention along rows.
        value: [B, C, H, W].
        column_gate: weights [out, in] of linear layers that make the gate of a row of pixels from its mean, the first
            with C inputs, the last with C outputs. None: no gate.
        row_gate: the same for columns of pixels.
        negative_slope: of the leaky ReLU between these layers.

    Returns:
        [B, C, H, W] in the dtype of ``value``; contiguous where ``value`` is, else channels last.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that do not.

    Example:
        >>> import torch
        >>> from asa_ops import channelized_axial_attention
        >>> column, row = torch.randn(2, 1, 8, 24, 32)
        >>> value, weights = torch.randn(1, 16, 24, 32), [torch.randn(4, 16), torch.randn(16, 4)]
        >>> channelized_axial_attention(column, row, value, weights, weights).shape
        torch.Size([1, 16, 24, 32])
    """
    column, row, value = cast_under_autocast(column=column, row=row, value=value)
    checks.check_tensor("value", value, "[B, C, H, W]")
    checks.check_floating("value", value)
    for name, x in (("column", column), ("row", row)):
        checks.check_tensor(name, x, "[B, D, H, W]")
        checks.check_like(name, x, value, "value")
        checks.check_same_map(name, x, value, "value")
    column_gate = _check_gate("column_gate", column_gate, value)
    row_gate = _check_gate("row_gate", row_gate, value)
    negative_slope = checks.as_number("negative_slope", negative_slope)
    with outside_autocast(value.device.type):
        p, r, v = at_least_float32(column, row, value)
        pixels = value.shape[2] * value.shape[3]
        p, v = (x.permute(0, 3, 2, 1) for x in (p, v))  # [B, W, H, D]: a column of the map is a sequence
        out = softmax_attention(p, p, v, scale=1.0)
        if column_gate is not None:
            out = out * gate(out.sum(1, keepdim=True) / pixels, column_gate, negative_slope)
        r, out = r.permute(0, 2, 3, 1), out.transpose(1, 2)  # [B, H, W, D]: a row of the map is a sequence
        out = softmax_attention(r, r, out, scale=1.0)
        if row_gate is not None:
            out = out * gate(out.sum(1, keepdim=True) / pixels, row_gate, negative_slope)
        out = out.permute(0, 3, 1, 2).to(value.dtype)
        return out.contiguous() if value.is_contiguous() else out


def _check_gate(name: str, gate: Sequence[Tensor] | None, value: Tensor) -> tuple[Tensor, ...] | None:
    """Check that the layers of a gate follow on one another, from C channels to C; return them cast under autocast."""
    if gate is None:
        return None
    if not isinstance(gate, tuple | list) or not gate:
        raise TypeError(f"{name} must be a sequence of weights [out, in], got {checks.describe(gate)}")
    gate = cast_under_autocast(**{f"{name}[{i}]": weight for i, weight in enumerate(gate)})
    channels = value.shape[1]
    for i, weight in enumerate(gate):
        checks.check_tensor(f"{name}[{i}]", weight, "[out, in]")
        checks.check_like(f"{name}[{i}]", weight, value, "value")
        if weight.shape[1] != channels:
            raise ValueError(f"{name}[{i}] must be [out, in] with in = {channels}, got {checks.describe(weight)}")
        channels = weight.shape[0]
    if channels != value.shape[1]:
        raise ValueError(
            f"{name}[-1] must be [out, in] with out = C = {value.shape[1]}, got {checks.describe(gate[-1])}"
        )
    return gate
