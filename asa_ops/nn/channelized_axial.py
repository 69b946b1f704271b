"""The channelized axial attention block."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..blocks.channelized_axial import channelized_axial_attention
from ..core import checks
from .common import Block, GlorotConv2d, conv_norm_relu, rename

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

    Raises:
        ValueError: options that do not fit, and in ``forward`` an input that is not [B, in_channels, H, W].

    Example:
        >>> import torch
        >>> from asa_ops.nn import ChannelizedAxialAttention
        >>> ChannelizedAxialAttention(64, key_channels=16)(torch.randn(2, 64, 24, 32)).shape
        torch.Size([2, 64, 24, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        key_channels: int = 64,
        hidden_layers: int = 5,
        hidden_ratio: float = 0.25,
        channel_attention: bool = True,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        in_channels, out_channels, key_channels = checks.as_positive_ints(
            in_channels=in_channels, out_channels=out_channels, key_channels=key_channels
        )
        hidden_layers = checks.as_int("hidden_layers", hidden_layers, at_least=0)
        hidden_ratio = checks.as_positive_number("hidden_ratio", hidden_ratio)
        self.in_channels, self.channel_attention = in_channels, channel_attention
        self.column, self.row, self.value = (
            conv_norm_relu(in_channels, channels, eps=1e-3, conv=GlorotConv2d)
            for channels in (key_channels, key_channels, out_channels)
        )
        if channel_attention:
            hidden = max(int(out_channels * hidden_ratio), 1)
            sizes = [out_channels, *[hidden] * hidden_layers, out_channels]
            self.column_gate, self.row_gate = (
                _Gate(torch.empty(*shape) for shape in zip(sizes[1:], sizes[:-1], strict=True)) for _ in range(2)
            )

    def attend(self, x: Tensor) -> Tensor:
        gates = (list(self.column_gate), list(self.row_gate)) if self.channel_attention else ()
        maps = self.column(x), self.row(x), self.value(x)
        return channelized_axial_attention(*maps, *gates, negative_slope=_SLOPE)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, channel_attention={self.channel_attention}"

    @staticmethod
    def from_upstream(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename a published block's variables to this module's keys, and put their axes in torch's order.

        Keys are attribute paths ("v_querykey_convbnrelu.conv.kernel"), kernels in the layouts of Keras: [height, width,
        in, out] and [in, out].

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
