"""What several blocks share: layers, initialisation, and the renaming of published state dicts.

Every layer initialises itself, in its constructor and in ``reset_parameters`` alike. So whoever builds a block on the
meta device may afterwards call ``reset_parameters`` of the block, or of every module that owns tensors, parents first,
as FSDP does: a layer with torch's own ``reset_parameters`` would lose there what its block had written into it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core import checks


class Block(nn.Module):
    """A module of feature maps whose layers initialise themselves."""

    in_channels: int

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H, W], as many channels if there is no such argument.

        One map may come without B, and is returned so.
        """
        if isinstance(x, torch.fx.Proxy):  # a leaf of torch.fx by itself: sizes are checked when there are some
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        checks.check_feature_map(x, self.in_channels)
        return self.attend(x) if x.dim() == 4 else self.attend(x[None])[0]

    def attend(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W], which is checked."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise again, as the constructor does."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()


class NormalConv2d(nn.Conv2d):
    """A convolution whose weight starts as N(0, 0.01^2) and its bias as 0."""

    bias: nn.Parameter

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts as 0."""

    bias: nn.Parameter

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class GlorotConv2d(nn.Conv2d):
    """A convolution without bias whose weight starts as Glorot uniform."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)


class ZeroBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose output starts as 0."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)


def conv_norm_relu(
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    bias: bool = False,
    eps: float = 1e-5,
    conv: type[nn.Conv2d] = nn.Conv2d,
) -> nn.Sequential:
    """Return a convolution that keeps the size of the map, batch norm and ReLU."""
    first = conv(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)
    return nn.Sequential(first, nn.BatchNorm2d(out_channels, eps=eps), nn.ReLU())


def last_layers(in_channels: int, out_channels: int, norm: str | None) -> tuple[nn.Conv2d, nn.Module]:
    """Return the output projection and what follows it, batch norm or nothing; their result starts as 0."""
    if norm is None:
        return ZeroConv2d(in_channels, out_channels, 1), nn.Identity()
    return nn.Conv2d(in_channels, out_channels, 1, bias=False), ZeroBatchNorm2d(out_channels)


def rename(state_dict: Mapping[str, Tensor], modules: Mapping[str, str | None]) -> dict[str, Tensor]:
    """Return ``state_dict`` with its keys "module.parameter" renamed by ``modules``; None drops an entry.

    Names without a module ("gamma") are looked up as they are.

    Raises:
        ValueError: a key that no published block has.
    """
    renamed = {}
    for key, tensor in state_dict.items():
        module, _, parameter = key.rpartition(".")
        name, suffix = (module, f".{parameter}") if module else (key, "")
        if name not in modules:
            expected = sorted(f"{name}.*" for name in modules)
            raise ValueError(
                f"unknown key {key!r} in a published block's state dict, expected {expected}; "
                "of a whole network's, pass the block's entries without their prefix"
            )
        if (new_name := modules[name]) is not None:
            renamed[new_name + suffix] = tensor
    return renamed
