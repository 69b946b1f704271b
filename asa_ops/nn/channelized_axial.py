"""The channelized axial attention block."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.types import Device

from ..blocks.channelized_axial import channelized_axial_attention
from ..core import checks
from .common import GLOROT_CONV, Block, Factory, conv_norm_relu, rename

_UPSTREAM = {"v_querykey_convbnrelu": "column", "h_querykey_convbnrelu": "row", "value_convbnrelu": "value"}
_SLOPE = 0.20000000298023224  # 0.2 rounded to float32, as in the published code
_PARAMETERS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


class ChannelizedAxialAttention(Block):
    """Attention along columns, then along rows, with a gate per channel after each.

    In three dimensions along time, columns and rows, with layers ``time`` and ``time_gate`` besides; in one dimension,
    where a sequence is one row, along it, with ``row`` and ``row_gate`` alone.

    ``channelized_axial_attention(column(x), row(x), value(x), gates)`` with 1x1 convolutions, batch norm and ReLU
    around :func:`asa_ops.channelized_axial_attention`. Like the published block, it has no residual connection, and
    its convolutions and gates start as Glorot uniform. Source: Huang, Kang, Jia, He and Liu, AAAI 2022.

    Args:
        in_channels: channels of the input.
        out_channels: C, channels of value and output, default ``in_channels``.
        key_channels: channels of query and key (one map is both), for columns and for rows.
        hidden_layers: hidden layers of a gate, 0 or more; a gate has one layer more.
        hidden_ratio: channels of a hidden layer over C, at least 1 channel.
        channel_attention: False: no gates, plain axial attention.
        dims: dimensions of the maps: 1, [B, C, L], 2, [B, C, H, W], or 3, [B, C, T, H, W].
        device, dtype: of all parameters and buffers, as torch's layers take them.

    Raises:
        ValueError: options that do not fit, and in ``forward`` an input that is not [B, in_channels, H, W], or as
            ``dims`` says.

    Example:
        >>> import torch
        >>> from asa_ops.nn import ChannelizedAxialAttention
        >>> ChannelizedAxialAttention(64, key_channels=16)(torch.randn(2, 64, 24, 32)).shape
        torch.Size([2, 64, 24, 32])
        >>> ChannelizedAxialAttention(64, key_channels=16, dims=3)(torch.randn(1, 64, 4, 12, 16)).shape
        torch.Size([1, 64, 4, 12, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        key_channels: int = 64,
        hidden_layers: int = 5,
        hidden_ratio: float = 0.25,
        channel_attention: bool = True,
        dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        out_channels = in_channels if out_channels is None else out_channels
        in_channels, out_channels, key_channels = checks.as_positive_ints(
            in_channels=in_channels, out_channels=out_channels, key_channels=key_channels
        )
        hidden_layers = checks.as_int("hidden_layers", hidden_layers, at_least=0)
        hidden_ratio = checks.as_positive_number("hidden_ratio", hidden_ratio)
        self.dims, self.in_channels, self.channel_attention = checks.as_dims(dims), in_channels, channel_attention
        for name in (*self._axes, "value"):
            channels = out_channels if name == "value" else key_channels
            layers = conv_norm_relu(in_channels, channels, eps=1e-3, conv=GLOROT_CONV, dims=self.dims, **factory)
            self.add_module(name, layers)
        if channel_attention:
            hidden = max(int(out_channels * hidden_ratio), 1)
            sizes = [out_channels, *[hidden] * hidden_layers, out_channels]
            for axis in self._axes:
                gate = _Gate(torch.empty(*shape, **factory) for shape in zip(sizes[1:], sizes[:-1], strict=True))
                self.add_module(f"{axis}_gate", gate)

    @property
    def _axes(self) -> tuple[str, ...]:
        """The axes along which it attends, in this order."""
        return ("time", "column", "row")[-self.dims :]

    def attend(self, x: Tensor) -> Tensor:
        tensors: dict[str, Any] = {name: self.get_submodule(name)(x) for name in (*self._axes, "value")}
        if self.dims == 1:  # a row: attention along columns of one pixel changes nothing
            tensors = {name: each.unsqueeze(2) for name, each in tensors.items()}
            tensors["column"] = tensors["row"]
        if self.channel_attention:
            names = [f"{axis}_gate" for axis in self._axes]
            tensors |= {name: list(cast(_Gate, self.get_submodule(name))) for name in names}
        out = channelized_axial_attention(**tensors, negative_slope=_SLOPE)
        return out.squeeze(2) if self.dims == 1 else out

    def extra_repr(self) -> str:
        return f"{self.in_channels}, channel_attention={self.channel_attention}, dims={self.dims}"

    @staticmethod
    def from_upstream(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename a published block's variables to this module's keys, and put their axes in torch's order.

        Keys are attribute paths ("v_querykey_convbnrelu.conv.kernel"), kernels in the layouts of Keras: [height, width,
        in, out] and [in, out]. The published block has ``dims=2``.

        Raises:
            ValueError: a key that no published block has.

        Example:
            >>> block.load_state_dict(ChannelizedAxialAttention.from_upstream(published))  # doctest: +SKIP
        """
        modules = {f"{name}.conv": f"{ours}.0" for name, ours in _UPSTREAM.items()}
        modules |= {f"{name}.bn": f"{ours}.1" for name, ours in _UPSTREAM.items()}
        for name, ours in (("v_c_attention", "column_gate"), ("h_c_attention", "row_gate")):
            hidden = sum(key.startswith(f"{name}.denses.") for key in state_dict)
            modules |= {f"{name}.denses.{i}": f"{ours}.{i}" for i in range(hidden)}
            modules[f"{name}.dense_end"] = f"{ours}.{hidden}"
        renamed = {}
        for key, tensor in rename(state_dict, modules).items():
            module, _, parameter = key.rpartition(".")
            if "gate" in key:
                renamed[module] = tensor.mT
                continue
            name = _PARAMETERS.get(parameter, parameter)
            renamed[f"{module}.{name}"] = tensor.permute(3, 2, 0, 1) if parameter == "kernel" else tensor
            if name == "running_mean":
                renamed[f"{module}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
        return renamed


class _Gate(nn.ParameterList):
    """The weights of a gate's linear layers, which start as Glorot uniform."""

    def __init__(self, weights: Iterable[Tensor] = ()):
        super().__init__(weights)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self:
            nn.init.xavier_uniform_(weight)
