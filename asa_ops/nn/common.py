"""What several blocks share: layers, initialisation, and the renaming of published state dicts.

Every layer initialises itself, in its constructor and in ``reset_parameters`` alike. So whoever builds a block on the
meta device may afterwards call ``reset_parameters`` of the block, or of every module that owns tensors, parents first,
as FSDP does: a layer with torch's own ``reset_parameters`` would lose there what its block had written into it.

Layers come for maps of one, two and three dimensions, as torch's do, and tables find the one for ``dims``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..core import checks


def as_leaf(module: nn.Module, x: Any, *others: Any) -> Any:
    """Return a module's call as one node of torch.fx: sizes are checked when there are some.

    Raises:
        RuntimeError: the module itself is traced.
    """
    if x.tracer.root is module:
        name = type(module).__name__
        raise RuntimeError(f"{name} is a leaf of torch.fx: trace what contains it, as nn.Sequential({name}(..))")
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x, *others), {})


class Block(nn.Module):
    """A module of feature maps whose layers initialise themselves."""

    in_channels: int
    dims: int = 2  # also of a block that was saved before there were others

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H, W], as many channels if there is no such argument.

        With ``dims=1`` maps are [B, in_channels, L], with ``dims=3`` [B, in_channels, T, H, W]. One map may come
        without B, and is returned so.
        """
        if isinstance(x, torch.fx.Proxy):
            return as_leaf(self, x)
        checks.check_feature_map(x, self.in_channels, self.dims)
        return self.attend(x) if x.dim() == self.dims + 2 else self.attend(x[None])[0]

    def attend(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W], or the like, which is checked."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise again, as the constructor does."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()


class _Normal(_ConvNd):
    """A convolution whose weight starts as N(0, 0.01^2) and its bias as 0."""

    bias: nn.Parameter

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


class _Zero(_ConvNd):
    """A convolution that starts as 0."""

    bias: nn.Parameter

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class _Glorot(_ConvNd):
    """A convolution without bias whose weight starts as Glorot uniform."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)


class _ZeroNorm(_BatchNorm):
    """A batch norm whose output starts as 0."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)


class NormalConv1d(_Normal, nn.Conv1d): ...


class NormalConv2d(_Normal, nn.Conv2d): ...


class NormalConv3d(_Normal, nn.Conv3d): ...


class ZeroConv1d(_Zero, nn.Conv1d): ...


class ZeroConv2d(_Zero, nn.Conv2d): ...


class ZeroConv3d(_Zero, nn.Conv3d): ...


class GlorotConv1d(_Glorot, nn.Conv1d): ...


class GlorotConv2d(_Glorot, nn.Conv2d): ...


class GlorotConv3d(_Glorot, nn.Conv3d): ...


class ZeroBatchNorm1d(_ZeroNorm, nn.BatchNorm1d): ...


class ZeroBatchNorm2d(_ZeroNorm, nn.BatchNorm2d): ...


class ZeroBatchNorm3d(_ZeroNorm, nn.BatchNorm3d): ...


Factory = dict[str, Any]  # device and dtype of a layer's tensors, as torch's layers take them
Layers = Mapping[int, Callable[..., Any]]  # by the number of dimensions
CONV: Layers = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMAL_CONV: Layers = {1: NormalConv1d, 2: NormalConv2d, 3: NormalConv3d}
ZERO_CONV: Layers = {1: ZeroConv1d, 2: ZeroConv2d, 3: ZeroConv3d}
GLOROT_CONV: Layers = {1: GlorotConv1d, 2: GlorotConv2d, 3: GlorotConv3d}
BATCH_NORM: Layers = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ZERO_BATCH_NORM: Layers = {1: ZeroBatchNorm1d, 2: ZeroBatchNorm2d, 3: ZeroBatchNorm3d}


def conv_norm_relu(
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    bias: bool = False,
    eps: float = 1e-5,
    conv: Layers = CONV,
    dims: int = 2,
    **factory: Any,
) -> nn.Sequential:
    """Return a convolution that keeps the size of the map, batch norm and ReLU."""
    first = conv[dims](in_channels, out_channels, kernel, padding=kernel // 2, bias=bias, **factory)
    return nn.Sequential(first, BATCH_NORM[dims](out_channels, eps=eps, **factory), nn.ReLU())


def last_layers(
    in_channels: int, out_channels: int, norm: str | None, dims: int, **factory: Any
) -> tuple[nn.Module, nn.Module]:
    """Return the output projection and what follows it, batch norm or nothing; their result starts as 0."""
    if norm is None:
        return ZERO_CONV[dims](in_channels, out_channels, 1, **factory), nn.Identity()
    proj = CONV[dims](in_channels, out_channels, 1, bias=False, **factory)
    return proj, ZERO_BATCH_NORM[dims](out_channels, **factory)


def max_pool(x: Tensor, ceil_mode: bool = True) -> Tensor:
    """Return the maxima of 2 x 2 pixels [B, C, H, W], of every frame [B, C, T, H, W], or of pairs [B, C, L].

    With ``ceil_mode`` what is left over at the end of an odd side is a window too.
    """
    if x.dim() == 5:
        return F.max_pool3d(x, (1, 2, 2), ceil_mode=ceil_mode)
    if x.dim() == 3:  # as a map of one row: F.max_pool1d would tie an exported program to the length of its sample
        return F.max_pool2d(x.unsqueeze(2), (1, 2), ceil_mode=ceil_mode).squeeze(2)
    return F.max_pool2d(x, 2, ceil_mode=ceil_mode)


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
