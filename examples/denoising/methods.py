"""What is compared: attention with and without learned parts, networks, and denoisers made for the task."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from skimage.restoration import denoise_nl_means
from torch import Tensor

from .attention import PATCH, Constants, NonLocalMeans
from .network import DenoisingNetwork

NEARBY = 11  # how far scikit-image's non-local means looks, pixels (its default)
ATTENTION, NETWORK, PEER = "attention", "network", "peer"
KINDS = ("dense", "asa", "tail", "nearby")
Tuned = dict[str, dict[float, Constants]]  # of each of KINDS what is best at a noise level
Denoiser = Callable[[Tensor, Tensor], Tensor]  # of pictures [B, 3, H, W] and the noise of each [B]


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        group: of methods that are compared in one table.
        build: makes the denoiser from what was tuned; a module is trained if it has parameters.
        threshold_rate: see :func:`asa_ops.nn.parameter_groups`.
        longer: how many times as many steps it is trained for.
    """

    group: str
    build: Callable[[Tuned], Denoiser]
    threshold_rate: float = 1.0
    longer: int = 1


def attention(kind: str, *learns: str, **options) -> Method:
    """Return non-local means by "dense" attention, by "asa", or by ASA with a "tail"; see :class:`NonLocalMeans`."""
    return Method(ATTENTION, lambda tuned: NonLocalMeans(tuned[kind], learns, **options))


def network(block: str | None, **options) -> Method:
    return Method(NETWORK, lambda _: DenoisingNetwork(block, **options), threshold_rate=0.1, longer=4)


def each(denoise: Callable[[np.ndarray, float], np.ndarray]) -> Denoiser:
    """Return what denoises pictures one by one with a function of an array [H, W, 3] and its noise."""

    def call(noisy: Tensor, noise: Tensor) -> Tensor:
        arrays = noisy.permute(0, 2, 3, 1).double().numpy()
        results = [denoise(x, level.item()) for x, level in zip(arrays, noise.double(), strict=True)]
        return torch.from_numpy(np.stack(results)).float().permute(0, 3, 1, 2)

    return call


def nearby(constants: dict[float, Constants]) -> Denoiser:
    """Return scikit-image's non-local means over the pixels at most NEARBY away, given the noise."""

    def denoise(x: np.ndarray, noise: float) -> np.ndarray:
        width = min(constants.items(), key=lambda item: abs(item[0] - noise))[1].width
        options = {"patch_size": PATCH, "patch_distance": NEARBY, "fast_mode": False, "channel_axis": 2}
        return denoise_nl_means(x, h=width * noise, sigma=noise, **options)

    return each(denoise)


def bm3d() -> Denoiser:
    """Return BM3D in colour, given the noise.

    Raises:
        ModuleNotFoundError: the package is missing.
    """
    try:
        from bm3d import BM3DProfile, bm3d_rgb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("BM3D needs a package that only research may use: pip install bm3d") from error
    profile = BM3DProfile()
    profile.num_threads = 1  # with more, results differ from call to call
    return each(lambda x, noise: bm3d_rgb(x, noise, profile))


REFERENCE = "ASA, best fixed alpha and h"
METHODS: dict[str, Method] = {
    "noisy": Method(PEER, lambda _: lambda noisy, noise: noisy),
    "scikit-image": Method(PEER, lambda tuned: nearby(tuned["nearby"])),
    "BM3D": Method(PEER, lambda _: bm3d()),
    "dense, best fixed h": attention("dense"),
    REFERENCE: attention("asa"),
    "dense, h learned": attention("dense", "h"),
    "ASA, h learned": attention("asa", "h"),
    "ASA, alpha learned": attention("asa", "alpha"),
    "ASA, alpha and h learned": attention("asa", "alpha", "h"),
    "ASA, best fixed tail and h": attention("tail"),
    "ASA, tail and h learned": attention("tail", "tail", "h"),
    "dense, embedding and h learned": attention("dense", "h", embeds=True),
    "ASA, embedding and h learned": attention("asa", "h", embeds=True),
    "ASA, embedding, alpha and h learned": attention("asa", "alpha", "h", embeds=True),
    **{
        f"network, {block or 'no block'}": network(block)
        for block in (
            None,
            "asa",
            "non_local",
            "linear_attention",
            "efficient_attention",
            "criss_cross",
            "channelized_axial",
            "squeeze_and_attention",
            "interlaced_sparse",
            "salient_positions",
        )
    },
    "network, asa, published": network("asa", published=True),
}
