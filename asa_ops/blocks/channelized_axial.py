"""Channelized axial attention: attention along columns, then along rows, each with a gate per channel.

Source: Y. Huang, D. Kang, W. Jia, X. He and L. Liu, Channelized Axial Attention, AAAI 2022.

p and r are the maps ``column`` and ``row``, each query and key at once, without a scale; v is the value, c a channel::

    A_w;hk = softmax_k <p_hw, p_kw>     O_hwc = sum_k A_w;hk v_kwc     s_hc = sum_w O_hwc / (H W)
    O'_hwc = O_hwc gate_column(s_h)_c                                  one gate per row of pixels and channel
    B_h;wl = softmax_l <r_hw, r_hl>     Z_hwc = sum_l B_h;wl O'_hlc    t_wc = sum_h Z_hwc / (H W)
    out_hwc = Z_hwc gate_row(t_w)_c                                    one gate per column of pixels and channel
    gate(s) = sigmoid(D_L lrelu(... lrelu(D_1 s)))                     no biases; slope of the leaky ReLU 0.2

Every axis is one step, attention along it and a gate for each place on it, whose input is the mean over all other axes.
So in three dimensions there are three steps, along time, columns, rows (ours; the paper has two)::

    s_tc = sum_hw O_thwc / (T H W), and likewise s_hc = sum_tw .. / (T H W), s_wc = sum_th .. / (T H W)

and in one dimension, a row, there is one: no axis is left to take the mean over, and every position gates itself, from
s_lc = O_lc / L.

How it is computed: as the formulas say. The published code first forms every product A_w;hk v_kwc, [B, C, H, W, H],
gates the products and then sums them. The gate does not depend on k, and a mean of sums is a sum of means: the sums can
come first.

Cost, D channels of p and r, C of v, and in three dimensions T + H + W for H + W: 2 N (H + W) (D + C) operations, N (H +
W + 2 D + 3 C) memory instead of N (H + W) C; the block's projections add 2 N C (2 D + C) operations, the gates next to
nothing.

What it attends to: the pixels of its column, and through them, row by row, every pixel.

Differences from the published code. With its channel attention on it raises a TypeError (an argument in the wrong
place); here the activation is the intended leaky ReLU (in the block with the published slope, 0.2 rounded to float32).
Its loop over groups of queries, meant to save memory, computes a group for nothing or divides by zero: here there are
no groups. As published, a gate's input is 1 / H of a mean (or 1 / W): it shrinks as the map grows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks
from ..core.contracts import at_least_float32, cast_under_autocast, outside_autocast, takes_dtensors
from .softmax_attention import softmax_attention


@takes_dtensors(column="b", row="b", value="b", column_gate="..", row_gate="..", time="b", time_gate="..", out="b")
def channelized_axial_attention(
    column: Tensor,
    row: Tensor,
    value: Tensor,
    column_gate: Sequence[Tensor] | None = None,
    row_gate: Sequence[Tensor] | None = None,
    *,
    time: Tensor | None = None,
    time_gate: Sequence[Tensor] | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """Attend along columns, then along rows, and gate every channel of either, without a five-dimensional tensor.

    In three dimensions, along time before both.
    Formulas: ``help(asa_ops.blocks.channelized_axial)``. Source: Huang, Kang, Jia, He and Liu, AAAI 2022.

    Args:
        column: [B, D, H, W] or [B, D, T, H, W], floating point: query and key of the attention along columns.
        row: the same with Dr channels: query and key of the attention along rows.
        value: the same with C channels.
        column_gate: weights [out, in] of linear layers that make the gate of a row of pixels from its mean, the first
            with C inputs, the last with C outputs. None: no gate.
        row_gate: the same for columns of pixels.
        time: [B, Dt, T, H, W]: query and key of the attention along time, in three dimensions, and required there.
        time_gate: the same as ``column_gate`` for frames.
        negative_slope: of the leaky ReLU between these layers.

    Returns:
        The shape and the dtype of ``value``; contiguous where ``value`` is, else channels last.

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
    maps = {"column": column, "row": row} if time is None else {"time": time, "column": column, "row": row}
    *axes, value = cast_under_autocast(**maps, value=value)
    dims = checks.as_map_dims("value", value, 2, 3)
    checks.check_floating("value", value)
    if (time is not None) != (dims == 3):
        expected, given = ("time", "none") if dims == 3 else ("no time", checks.describe(time))
        raise ValueError(f"a value {checks.map_layout(dims)} wants {expected}, got {given}")
    if time_gate is not None and dims != 3:
        raise ValueError(f"a value {checks.map_layout(dims)} wants no time_gate, got one")
    for name, x in zip(maps, axes, strict=True):
        checks.check_tensor(name, x, checks.map_layout(dims, "D"))
        checks.check_like(name, x, value, "value")
        checks.check_same_map(name, x, value, "value")
    column_gate = _check_gate("column_gate", column_gate, value)
    row_gate = _check_gate("row_gate", row_gate, value)
    time_gate = _check_gate("time_gate", time_gate, value)
    negative_slope = checks.as_number("negative_slope", negative_slope)
    with outside_autocast(value.device.type):
        *axes, out = (x.movedim(1, -1) for x in at_least_float32(*axes, value))  # [B, H, W, D]
        gates = (time_gate, column_gate, row_gate)[-dims:]
        for axis, (p, weights) in enumerate(zip(axes, gates, strict=True), 1):
            out = _attend_along(axis, p, out, weights, negative_slope)
        out = out.movedim(-1, 1).to(value.dtype)
        return out.contiguous() if value.is_contiguous() else out


def _attend_along(axis: int, p: Tensor, v: Tensor, weights: Sequence[Tensor] | None, negative_slope: float) -> Tensor:
    """Attend along one axis of maps [B, H, W, D] or [B, T, H, W, D], and gate what comes out if there are weights."""
    p, v = (x.movedim(axis, -2) for x in (p, v))  # of columns [B, W, H, D]: a column of the map is a sequence
    others = v.shape[1:-2]
    p, v = (x.flatten(1, -3) for x in (p, v))
    out = softmax_attention(p, p, v, scale=1.0)
    if weights is not None:
        positions = out.shape[1] * out.shape[2]
        out = out * gate(out.sum(1, keepdim=True) / positions, weights, negative_slope)
    return out.unflatten(1, others).movedim(-2, axis)


def _check_gate(name: str, gate: Sequence[Tensor] | None, value: Tensor) -> tuple[Tensor, ...] | None:
    """Check that a gate's layers map C channels to C, one after another; return them cast under autocast."""
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


def reference_channelized_axial_attention(
    column: Tensor,
    row: Tensor,
    value: Tensor,
    column_gate: Sequence[Tensor] | None = None,
    row_gate: Sequence[Tensor] | None = None,
    *,
    time: Tensor | None = None,
    time_gate: Sequence[Tensor] | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """The specification of :func:`channelized_axial_attention`: O(N (H + W) C) memory, differentiable twice."""
    steps = [("h", column, column_gate), ("w", row, row_gate)]
    steps = steps if time is None else [("t", time, time_gate), *steps]
    sides = "".join(side for side, _, _ in steps)
    with outside_autocast(value.device.type):
        (out,) = at_least_float32(value)
        for axis, (side, p, layers) in enumerate(steps, 2):
            (p,) = at_least_float32(p)
            along = sides.replace(side, "k")
            weights = torch.einsum(f"bd{sides},bd{along}->b{sides}k", p, p).softmax(-1)
            products = torch.einsum(f"b{sides}k,bc{along}->bc{sides}k", weights, out)
            if layers is not None:
                mean = products.mean([dim for dim in range(2, products.dim()) if dim != axis])  # [B, C, side]
                shape = [size if dim == axis or dim < 2 else 1 for dim, size in enumerate(products.shape)]
                products = products * gate(mean.mT, layers, negative_slope).mT.reshape(shape)
            out = products.sum(-1)
        return out.to(value.dtype)


def gate(mean: Tensor, weights: Sequence[Tensor], negative_slope: float) -> Tensor:
    """Return the gates [..., C] of the mean products [..., C], by linear layers without bias."""
    *hidden, last = (weight.to(mean.dtype) for weight in weights)
    for weight in hidden:
        mean = F.leaky_relu(F.linear(mean, weight), negative_slope)
    return F.linear(mean, last).sigmoid()
