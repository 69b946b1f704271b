"""Draw what one pixel attends to in every block: the weights that the real ops give it, on a photograph.

Queries and keys are 5 x 5 patches of scikit-image's astronaut. An op is applied to one-hot values, value j being 1 at
pixel j alone, so that row i of its output is the weights of pixel i. Where an op has no values in this sense the weight
of a pixel is the length of the gradient that it gets from pixel i.

    python examples/patterns.py                         # writes examples/patterns.png
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import files
import matplotlib.pyplot as plt
import numpy as np
import torch
from denoise import attention_inputs, load, patch_tokens
from matplotlib.colors import LogNorm
from torch import Tensor

import asa_ops
from asa_ops.core.layout import to_map, to_tokens

SHARPNESS = 0.75  # h of the squared distances between patches


class Inputs:
    """Queries, keys [1, 1, N, D] and one-hot values [1, 1, N, N] of a photograph, and its patches."""

    def __init__(self, image: np.ndarray):
        self.grid = image.shape[:2]
        self.query, self.key, _ = attention_inputs(image, SHARPNESS)
        self.one_hot = torch.eye(self.query.shape[2])[None, None]
        self.patches = patch_tokens(image)[None, None]


def asa(x: Inputs) -> Tensor:
    ones = torch.ones(1, 1, x.one_hot.shape[2])
    return asa_ops.asa_attention(x.query, x.key, x.one_hot, 2 * ones, ones, grid=x.grid, scale=1.0)


def non_local(x: Inputs) -> Tensor:
    return asa_ops.non_local_attention(x.query, x.key, x.one_hot, scale=1.0)


def linear_attention(x: Inputs) -> Tensor:
    return asa_ops.linear_attention(x.patches, x.patches, x.one_hot)


def efficient_attention(x: Inputs) -> Tensor:
    return asa_ops.efficient_attention(3 * x.patches, 3 * x.patches, x.one_hot)


def criss_cross(x: Inputs, recurrence: int = 1) -> Tensor:
    query, key, value = (to_map(tokens, x.grid) for tokens in (x.query, x.key, x.one_hot))
    for _ in range(recurrence):
        value = asa_ops.criss_cross_attention(query, key, value)
    return to_tokens(value)


def channelized_axial(x: Inputs) -> Tensor:
    patches, value = to_map(x.patches, x.grid), to_map(x.one_hot, x.grid)
    return to_tokens(asa_ops.channelized_axial_attention(patches, patches, value))


def squeeze_and_attention(x: Inputs) -> Tensor:
    value = to_map(x.one_hot, x.grid)
    squeezed = torch.nn.functional.avg_pool2d(value, 2)  # the block's convolutions in between would widen it
    return to_tokens(asa_ops.squeeze_and_attention(0 * value, squeezed, activation=None))


def interlaced_sparse(x: Inputs, spans: tuple[str, ...] = ("long",)) -> Tensor:
    value = x.one_hot
    for span in spans:
        value = asa_ops.interlaced_sparse_attention(x.query, x.key, value, grid=x.grid, span=span, scale=1.0)
    return value


def salient_positions(x: Inputs, pixel: int) -> Tensor:
    patches = x.patches.clone().requires_grad_()
    out = asa_ops.salient_positions_attention(patches, x.patches, topk=32)[0, 0, pixel]
    (gradient,) = torch.autograd.grad(out.square().sum(), patches)
    return gradient[0, 0].norm(dim=-1)


def panels(x: Inputs, pixel: int) -> dict[str, Tensor]:
    """Return the weights [N] of one pixel by the title of their picture."""
    patterns: dict[str, Callable] = {
        "asa": asa,
        "non_local": non_local,
        "linear_attention": linear_attention,
        "efficient_attention": efficient_attention,
        "criss_cross, once": criss_cross,
        "criss_cross, twice": lambda x: criss_cross(x, 2),
        "channelized_axial": channelized_axial,
        "squeeze_and_attention\n(without its convolutions)": squeeze_and_attention,
        "interlaced_sparse, long": interlaced_sparse,
        "interlaced_sparse, short": lambda x: interlaced_sparse(x, ("short",)),
        "interlaced_sparse": lambda x: interlaced_sparse(x, ("long", "short")),
    }
    weights = {title: pattern(x)[0, 0, pixel] for title, pattern in patterns.items()}
    weights["salient_positions\n(gradients)"] = salient_positions(x, pixel)
    return weights


def draw(path: Path, image: np.ndarray, weights: dict[str, Tensor], pixel: tuple[int, int]) -> None:
    columns = (len(weights) + 2) // 2
    figure, axes = plt.subplots(2, columns, figsize=(1.5 * columns, 3.6), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    axes.flat[0].imshow(image)
    axes.flat[0].set_title(f"pixel {pixel}", fontsize=7)
    for axis, (title, x) in zip(axes.flat[1:], weights.items(), strict=False):
        x = (x / x.max()).reshape(image.shape[:2]).clamp(min=0).masked_fill(x.reshape(image.shape[:2]) == 0, torch.nan)
        axis.imshow(image.mean(-1), cmap="gray", vmin=-2, vmax=1)
        axis.imshow(x.numpy(), norm=LogNorm(1e-3, 1, clip=True), cmap="viridis", interpolation="nearest")
        axis.set_title(title, fontsize=7)
    for axis in axes.flat[: len(weights) + 1]:
        axis.plot(*pixel[::-1], "o", color="red", markersize=9, markeredgewidth=0.8, fillstyle="none")
    files.save(figure, path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Tensor]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("patterns.png"))
    options = parser.parse_args(arguments)
    files.check_out(parser, options.out, *files.FIGURES)
    files.check([options.out])
    image = load("astronaut", options.size)
    pixel = options.size * 7 // 10, options.size * 3 // 10
    weights = panels(Inputs(image), pixel[0] * options.size + pixel[1])
    draw(options.out, image, weights, pixel)
    return weights


if __name__ == "__main__":
    files.run(main)
