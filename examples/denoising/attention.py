"""Non-local means as attention, of which everything may be learned: thresholds, the width h, and what is compared.

Every pixel averages the colours of the pixels whose 5 x 5 patches are like its own (Buades, Coll and Morel, "A
non-local algorithm for image denoising", CVPR 2005): attention with s_ij = -||p_i - p_j||^2 / h_i^2, patches p as
queries and keys and colours as values. Dense attention averages over all pixels, adaptive sparse attention over
reciprocal neighbours above the threshold alpha_i of both, which may be told by what it leaves out of a row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa_ops import asa_attention

PATCH = 5
VALUES = 3 * PATCH * PATCH  # of a patch
SCALES = (5, 11)  # windows of the local variance, pixels
FEATURES = 32  # of the embedding
LIMIT_REACH, WIDTH_REACH = 4.0, 1.0  # alpha, or tail / (1 - tail), and h stay within e^+-reach of the best fixed ones
HEAVIEST = 0.6  # of a row's largest weight, the pixel's own, is the most that a threshold may be, fixed alphas apart


@dataclass(frozen=True)
class Constants:
    """What is best for all pixels of one noise level.

    Attributes:
        width: h, in units of noise * sqrt(VALUES), the length of a patch of noise.
        alpha: None for dense attention, and with a tail.
        tail: in place of alpha, see :func:`alpha_of_tail`.
    """

    width: float
    alpha: float | None = None
    tail: float | None = None

    @property
    def limit(self) -> str | None:
        """Return the name of what says who is left out, None where nobody is."""
        return "alpha" if self.alpha is not None else "tail" if self.tail is not None else None


class Predictor(nn.Module):
    """What of every pixel deviates from a constant, from the noisy pixels around it: at first nothing.

    It sees the colours and, in windows of several sizes, the local variance beside that of the noise, which tells flat
    from textured.
    """

    def __init__(self, outputs: int, channels: int = 24):
        super().__init__()
        self.layers = nn.Sequential(
            convolution(3 + 2 * len(SCALES) + 1, channels),
            nn.GELU(),
            convolution(channels, channels),
            nn.GELU(),
            convolution(channels, channels, dilation=2),
            nn.GELU(),
            convolution(channels, outputs),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, noisy: Tensor, noise: Tensor) -> Tensor:
        """Return the logarithms of factors, [B, outputs, H, W], for noisy [B, 3, H, W] and noise [B]."""
        return self.layers(torch.cat([noisy - 0.5, *texture(noisy, noise)], 1))


def convolution(inputs: int, outputs: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, padding_mode="reflect")


def texture(noisy: Tensor, noise: Tensor) -> list[Tensor]:
    """Return what tells texture from noise: maps [B, 1, H, W], of every scale the variance beyond that of the noise."""
    noise = noise.view(-1, 1, 1, 1)
    maps = [noise.log().expand_as(noisy[:, :1]) + 2.3]  # about 0 in the middle
    for side in SCALES:
        padded = F.pad(noisy, [side // 2] * 4, mode="reflect")
        mean = F.avg_pool2d(padded, side, 1)
        variance = (F.avg_pool2d(padded.square(), side, 1) - mean.square()).mean(1, keepdim=True).clamp(min=0)
        ratio = variance / noise.square()
        maps += [(0.2 * (ratio - 1)).clamp(max=4), ratio.sqrt().log1p()]
    return maps


def bounded(output: Tensor, reach: float) -> Tensor:
    """Return an output near 0, and never beyond ``reach``."""
    return reach * (output / reach).tanh()


@torch.no_grad()
def heaviest(query: Tensor, key: Tensor) -> Tensor:
    """Return the alpha that would keep of a row what weighs as much as itself, [B, N], for query and key [B, N, D].

    No weight of a row is above that of the pixel itself, so that larger alphas keep nobody: where all patches are
    alike, as in the sky, this is near 1, in texture it is in the hundreds.
    """
    _, stats = asa_attention(query[:, None], key[:, None], key[:, None, :, :1], scale=1.0, return_stats=True)
    own = (query * key).sum(-1)
    return (own - stats.lse[:, 0] + math.log(query.shape[1])).exp()


def alpha_of_tail(query: Tensor, key: Tensor, tail: Tensor) -> Tensor:
    """Return the alpha that leaves out the lightest keys of a row, [B, N], for query and key [B, N, D], tail [B, N].

    These have at least the share ``tail``, below 1, of what all but the heaviest key of the row weigh together; the
    heaviest, the pixel itself, stays. Alpha lies halfway, in logarithms, between the heaviest weight that is left out
    and the lightest that is kept. Its derivative is a difference quotient over a tenth around ``tail``; query and key
    get none.
    """
    with torch.no_grad():
        weights = (query @ key.mT).softmax(-1).sort(-1).values
        logs = weights.clamp(min=1e-30).log()
        between = (logs[..., 1:] + logs[..., :-1]) / 2
        sums = weights[..., :-1].cumsum(-1)  # of the lightest one, two, ...

        def find(share: Tensor) -> Tensor:
            left_out = torch.searchsorted(sums, share[..., None] * sums[..., -1:]).clamp(max=sums.shape[-1] - 1)
            return between.gather(-1, left_out)[..., 0]

        low, high = tail / 1.1, torch.minimum(1.1 * tail, (1 + tail) / 2)
        slope = (find(high) - find(low)) / (high / low).log()
        log_alpha = find(tail) + math.log(key.shape[1])
    return (log_alpha + slope * (tail.log() - tail.detach().log())).exp()


def patches_of(noisy: Tensor) -> Tensor:
    """Return the patch around every pixel, [B, N, VALUES], less its mean over the picture, which no score sees."""
    patches = F.unfold(F.pad(noisy, [PATCH // 2] * 4, mode="reflect"), PATCH).mT
    return patches - patches.mean(1, keepdim=True)


class NonLocalMeans(nn.Module):
    """A denoiser: pictures [B, 3, H, W] and the noise of each [B] in, pictures out.

    Args:
        constants: by noise level, where learning starts.
        learns: of "h" and "alpha", or "tail", what is predicted for every pixel.
        embeds: whether features of three convolutions stand beside the patches, and patches are weighted.
        band: ``threshold_band`` of :func:`asa_ops.asa_attention`.
    """

    def __init__(
        self,
        constants: dict[float, Constants],
        learns: tuple[str, ...] = (),
        embeds: bool = False,
        band: float = 1.0,
    ):
        super().__init__()
        self.constants, self.learns, self.band = constants, learns, band
        limits = {each.limit for each in constants.values()}
        if len(limits) != 1 or not set(learns) <= {"h", *limits}:
            raise ValueError(f"expected constants of one kind, and of these or 'h' what learns, got {limits}, {learns}")
        (self.limit,) = limits
        self.predictor = Predictor(len(learns)) if learns else None
        self.embedding = Embedding() if embeds else None
        self.survivors: Tensor | None = None  # of the last call without a gradient, [B], means over rows

    def forward(self, noisy: Tensor, noise: Tensor) -> Tensor:
        width = self.constant("width", noise) * math.sqrt(VALUES) * noise[:, None]
        limit = None if self.limit is None else self.constant(self.limit, noise)
        if self.predictor is not None:
            outputs = self.predictor(noisy, noise).flatten(2)
            for name, output in zip(self.learns, outputs.unbind(1), strict=True):
                if name == "h":
                    width = width * bounded(output, WIDTH_REACH).exp()
                elif name == "alpha":
                    limit = limit * bounded(output, LIMIT_REACH).exp()
                else:
                    limit = (limit.logit() + bounded(output, LIMIT_REACH)).sigmoid()
        patches = patches_of(noisy)
        if self.embedding is not None:
            patches = self.embedding(noisy, noise, patches)
        n = patches.shape[1]
        return self.attend(patches, width.expand(-1, n), limit if limit is None else limit.expand(-1, n), noisy)

    def attend(self, patches: Tensor, width: Tensor, limit: Tensor | None, noisy: Tensor) -> Tensor:
        """Return the attention of tokens [B, N, D] whose h and alpha, or tail, are [B, N]."""
        scale = width.square().reciprocal()[..., None]
        query = torch.cat([2 * patches, -torch.ones_like(scale)], -1) * scale  # 2 <p_i, p_j> - ||p_j||^2
        key = torch.cat([patches, patches.square().sum(-1, keepdim=True)], -1)
        alpha = alpha_of_tail(query, key, limit) if self.limit == "tail" else limit
        if self.limit in (*self.learns, "tail"):
            alpha = torch.minimum(alpha, HEAVIEST * heaviest(query, key))
        query, key, value = query[:, None], key[:, None], noisy.flatten(2).mT[:, None]
        if alpha is None:
            value = F.pad(value, (0, query.shape[-1] - 3))  # as long as keys: torch's fused kernel asks for it
            out = F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :3]
        else:
            learns = torch.is_grad_enabled()
            out, stats = asa_attention(
                query,
                key,
                value,
                alpha[:, None],
                scale=1.0,
                grid=noisy.shape[-2:],
                threshold_grad="straight_through" if learns else None,
                threshold_band=self.band,
                return_stats=True,
            )
            self.survivors = None if learns else stats.survivors.double().mean((1, 2))
        return out[:, 0].mT.unflatten(2, noisy.shape[-2:])

    def constant(self, name: str, noise: Tensor) -> Tensor:
        """Return a constant for pictures of these noise levels, [B, 1]."""
        levels = torch.tensor(list(self.constants), dtype=noise.dtype)
        values = torch.tensor([getattr(each, name) for each in self.constants.values()], dtype=noise.dtype)
        return values[(levels - noise[:, None]).abs().argmin(1)][:, None]


class Embedding(nn.Module):
    """Tokens to compare: the patches, of weights that are learned, features of three convolutions, and the place."""

    def __init__(self, channels: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            convolution(4, channels),
            nn.GELU(),
            convolution(channels, channels),
            nn.GELU(),
            convolution(channels, FEATURES),
        )
        nn.init.normal_(self.layers[-1].weight, std=0.02)
        self.weights = nn.Parameter(torch.zeros(VALUES))  # logarithms
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, noisy: Tensor, noise: Tensor, patches: Tensor) -> Tensor:
        level = noise.view(-1, 1, 1, 1).expand_as(noisy[:, :1])
        features = self.layers(torch.cat([noisy - 0.5, level], 1)).flatten(2).mT
        height, width = noisy.shape[-2:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        place = torch.stack([rows, columns], -1).view(1, -1, 2).to(noisy) / 100
        place = (place - place.mean(1, keepdim=True)).expand(len(noisy), -1, -1)
        scale = 10 * noise[:, None, None]  # as h, which scores are divided by, grows with the noise
        return torch.cat([patches * self.weights.exp(), scale * features, scale * self.place * place], -1)
