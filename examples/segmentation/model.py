"""The network: a dilated ResNet, an attention block between convolutions, an auxiliary head.

As published for NLNet and for adaptive sparse attention: backbone, 3x3 convolution, block, 3x3 convolution, what this
gives beside what the backbone gave, 3x3 convolution, classifier; and in training a second classifier on the stage
before.
"""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetBackbone, ResNetConfig

from asa_ops import nn as blocks
from asa_ops.nn.common import conv_norm_relu

from .config import NO_BLOCK, Config, ConfigError
from .sample import IGNORE


class Segmenter(nn.Module):
    """Pictures [B, 3, H, W] to class scores.

    In training mode a pair of maps [B, classes, H / output_stride, W / output_stride], of the attention head and of the
    auxiliary one; in evaluation mode the first alone.

    Args:
        config: its ``backbone``, ``pretrained`` and what concerns the heads.
        classes: number of classes.

    Raises:
        ConfigError: an option that the backbone or the block does not take, or a checkpoint that does not fit.
    """

    def __init__(self, config: Config, classes: int):
        super().__init__()
        self.backbone = build_backbone(config)
        *_, auxiliary, last = self.backbone.channels
        self.head = AttentionHead(config, last, classes)
        self.auxiliary = FCNHead(config, auxiliary, classes)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        auxiliary, last = self.backbone(image).feature_maps
        scores = self.head(last)
        return (scores, self.auxiliary(auxiliary)) if self.training else scores


class AttentionHead(nn.Module):
    """3x3 convolution, block, 3x3 convolution, concatenated with the input, 3x3 convolution, classifier."""

    def __init__(self, config: Config, in_channels: int, classes: int):
        super().__init__()
        self.before = conv_norm_relu(in_channels, config.channels, 3)
        try:
            known = config.block != NO_BLOCK
            self.block = blocks.build(config.block, config.channels, **config.options) if known else nn.Identity()
        except (TypeError, ValueError) as error:
            raise ConfigError(f"block {config.block!r} with block_options {config.options}: {error}") from error
        self.after = conv_norm_relu(config.channels, config.channels, 3)
        self.join = conv_norm_relu(in_channels + config.channels, config.channels, 3)
        self.classifier = nn.Sequential(nn.Dropout2d(config.dropout), nn.Conv2d(config.channels, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        context = self.after(self.block(self.before(x)))
        return self.classifier(self.join(torch.cat([x, context], 1)))


class FCNHead(nn.Sequential):
    """3x3 convolution and classifier."""

    def __init__(self, config: Config, in_channels: int, classes: int):
        super().__init__(
            conv_norm_relu(in_channels, config.auxiliary_channels, 3),
            nn.Dropout2d(config.dropout),
            nn.Conv2d(config.auxiliary_channels, classes, 1),
        )


def build_backbone(config: Config) -> ResNetBackbone:
    """Return a ResNet that gives its last two stages, from scratch or from ``config.pretrained``."""
    if unknown := sorted(config.backbone.keys() - ResNetConfig().to_dict().keys()):
        raise ConfigError(f"backbone has an option that transformers.ResNetConfig has not: {unknown[0]!r}")
    depths, sizes = (config.backbone.get(name) for name in ("depths", "hidden_sizes"))
    if not (isinstance(depths, list) and isinstance(sizes, list) and len(depths) == len(sizes) >= 2):
        raise ConfigError(f"backbone must have depths and hidden_sizes of two stages or more, got {config.backbone}")
    try:
        settings = ResNetConfig(**config.backbone, out_features=[f"stage{len(depths) - i}" for i in (1, 0)])
        backbone = ResNetBackbone(settings)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"backbone {config.backbone} does not fit: {error}") from error
    if config.pretrained is not None:
        backbone = load_backbone(config.pretrained, settings)
    return dilate(backbone, config.output_stride)


def load_backbone(folder: str, settings: ResNetConfig) -> ResNetBackbone:
    """Return the ResNet of a ``transformers`` checkpoint, which may have a classifier besides.

    Raises:
        ConfigError: no folder, a broken file, a ResNet of other depth or width, or another network.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"pretrained must be the folder of a transformers checkpoint, got {folder!r}")
    try:
        backbone, info = ResNetBackbone.from_pretrained(
            folder, config=settings, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"pretrained {folder!r} does not fit the backbone: {error}") from error
    # what is missing stays random without a word; of batch norm's counters nothing depends, and old files have none
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("num_batches_tracked"))
    more = sorted(key for key in info["unexpected_keys"] if "encoder.stages." in key)
    for fault, keys in (("lacks", missing), ("has more layers, namely", more)):
        if keys:
            others = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ConfigError(f"pretrained {folder!r} does not fit the backbone: it {fault} {keys[0]}{others}")
    return backbone


def dilate(backbone: ResNetBackbone, output_stride: int) -> ResNetBackbone:
    """Turn the strides beyond ``output_stride`` into dilation, in place, which leaves the weights valid.

    The first layer of a stage that no longer strides sees the grid of the stage before, so it keeps that dilation.

    Raises:
        ConfigError: an ``output_stride`` that no stage has.
    """
    stride, dilation, reached = 4, 1, {4}  # the stem strides twice
    for stage in backbone.encoder.stages:
        for i, layer in enumerate(stage.layers):
            convolutions = [m for m in layer.modules() if isinstance(m, nn.Conv2d)]
            strided = [conv for conv in convolutions if conv.stride != (1, 1)]
            before = dilation
            if strided and stride * 2 > output_stride:
                for conv in strided:
                    conv.stride = (1, 1)
                dilation *= 2
            elif strided:
                stride *= 2
            for conv in convolutions:
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (before if i == 0 else dilation,) * 2
        reached.add(stride * dilation)
    if output_stride not in reached:
        raise ConfigError(f"output_stride must be one of {sorted(reached)} for this backbone, got {output_stride}")
    return backbone


def loss_of(outputs: tuple[Tensor, Tensor], label: Tensor, auxiliary_weight: float) -> Tensor:
    """Return the mean cross entropy of both heads' scores at the size of ``label`` [B, H, W].

    Ignored pixels count as 0, as published, so that a crop that holds nothing else does no harm.
    """
    losses = []
    for scores in outputs:
        scores = F.interpolate(scores, size=label.shape[-2:], mode="bilinear", align_corners=False)
        losses.append(F.cross_entropy(scores.float(), label, ignore_index=IGNORE, reduction="none").mean())
    return losses[0] + auxiliary_weight * losses[1]
