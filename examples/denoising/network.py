"""A small residual network for denoising with one attention block at full resolution, or none."""

import torch
from torch import Tensor, nn

from asa_ops.nn import build

from .attention import convolution

CHANNELS = 40
OPTIONS = {"interlaced_sparse": {"factors": [4, 4]}}  # of blocks: as many positions as the others, 8 x 8 regions


class Residual(nn.Module):
    """x + convolution(activation(convolution(x)))."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(convolution(CHANNELS, CHANNELS), nn.GELU(), convolution(CHANNELS, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class DenoisingNetwork(nn.Module):
    """A denoiser of about 100,000 parameters: pictures [B, 3, H, W] and the noise of each [B] in, pictures out.

    Args:
        block: a name of :func:`asa_ops.nn.available`, for the middle of the network; None for no block.
        options: of the block.
    """

    def __init__(self, block: str | None, **options):
        super().__init__()
        middle = build(block, CHANNELS, **OPTIONS.get(block, {}), **options) if block else nn.Identity()
        self.layers = nn.Sequential(
            convolution(4, CHANNELS), Residual(), middle, Residual(), Residual(), convolution(CHANNELS, 3)
        )

    def forward(self, noisy: Tensor, noise: Tensor) -> Tensor:
        level = noise.view(-1, 1, 1, 1).expand_as(noisy[:, :1])
        return noisy + level * self.layers(torch.cat([noisy - 0.5, level], 1))
