"""What training sees: pictures scaled, distorted, cut and flipped at random, in batches that processes share.

Everything random about a training picture is a function of the seed and of its position in training, so neither the
number of workers and processes nor an interruption changes what is seen.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..pictures import PictureError
from .config import Config, ConfigError
from .sample import IGNORE, DataError, Sample, Samples

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet
LARGEST_PART = 0.75  # a crop of which one class covers more is drawn again
TRIES = 10


def normalise(image: np.ndarray) -> Tensor:
    """Return a picture uint8 [H, W, 3] as the network takes it, float32 [3, H, W]."""
    return ((torch.from_numpy(image.astype(np.float32) / 255) - MEAN) / STD).permute(2, 0, 1).contiguous()


def size_within(size: tuple[int, int], limits: tuple[int, int] | None, factor: float = 1.0) -> tuple[int, int]:
    """Return [H, W] scaled to fit into [long side, short side] times ``factor``; None: only by ``factor``."""
    if limits is not None:
        factor *= min(max(limits) / max(size), min(limits) / min(size))
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def resize(pixels: np.ndarray, size: tuple[int, int], resample: PIL.Image.Resampling) -> np.ndarray:
    """Return a picture or a label picture at another [H, W]."""
    return np.asarray(PIL.Image.fromarray(pixels).resize(size[::-1], resample))


def scaled(image: np.ndarray, config: Config, factor: float = 1.0) -> np.ndarray:
    """Return a picture at the size that ``config.resize`` gives, times ``factor``."""
    size = size_within(image.shape[:2], config.resize, factor)
    return image if size == image.shape[:2] else resize(image, size, PIL.Image.Resampling.BILINEAR)


def augment(sample: Sample, config: Config, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a random crop, uint8 [*config.crop, 3] and its label [*config.crop], as published for NLNet.

    Raises:
        ConfigError: the crop is larger than the picture in both directions, however much it is enlarged.
    """
    image, label = sample.image, sample.label
    largest = size_within(label.shape, config.resize, config.ratio[1])
    if all(have < need for have, need in zip(largest, config.crop, strict=True)):
        raise ConfigError(f"crop {list(config.crop)} is larger than {sample.name}, at most {list(largest)} here")
    size = size_within(label.shape, config.resize, rng.uniform(*config.ratio))
    if size != label.shape:
        image = resize(image, size, PIL.Image.Resampling.BILINEAR)
        label = resize(label, size, PIL.Image.Resampling.NEAREST)
    window = window_of(label, config.crop, rng)
    image, label = image[window], label[window]
    if rng.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    if config.distort:
        image = distort(image, rng)
    missing = [(0, need - have) for need, have in zip(config.crop, label.shape, strict=True)]
    mean = (MEAN * 255).round().byte().numpy()
    padded = np.broadcast_to(mean, (*config.crop, 3)).copy()
    padded[: label.shape[0], : label.shape[1]] = image
    return padded, np.pad(label, missing, constant_values=IGNORE)


def window_of(label: np.ndarray, crop: tuple[int, int], rng: np.random.Generator) -> tuple[slice, slice]:
    """Return the slices of a random window in which, if a few tries find it, no class covers nearly all."""
    for _ in range(TRIES):
        corner = [int(rng.integers(max(have - need, 0) + 1)) for have, need in zip(label.shape, crop, strict=True)]
        window = tuple(slice(start, start + need) for start, need in zip(corner, crop, strict=True))
        counts = np.bincount(label[window].ravel(), minlength=IGNORE + 1)[:IGNORE]
        if np.count_nonzero(counts) > 1 and counts.max() < LARGEST_PART * counts.sum():
            break
    return window


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, each half of the time, contrast before or after the colours."""

    def contrast(x):
        return x * rng.uniform(0.5, 1.5) if rng.random() < 0.5 else x

    x = image.astype(np.float32)
    if rng.random() < 0.5:
        x = x + rng.uniform(-32, 32)
    contrast_first = rng.random() < 0.5
    if contrast_first:
        x = contrast(x)
    hsv = np.asarray(PIL.Image.fromarray(to_bytes(x)).convert("HSV")).astype(np.float32)
    if rng.random() < 0.5:
        hsv[..., 1] *= rng.uniform(0.5, 1.5)
    if rng.random() < 0.5:
        hsv[..., 0] = (hsv[..., 0] + rng.uniform(-0.1, 0.1) * 256) % 256
    x = np.asarray(PIL.Image.fromarray(to_bytes(hsv), "HSV").convert("RGB")).astype(np.float32)
    return to_bytes(x if contrast_first else contrast(x))


def to_bytes(x: np.ndarray) -> np.ndarray:
    return x.clip(0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=2)  # a batch may end one round and begin the next
def order_of(seed: int, round_: int, length: int) -> np.ndarray:
    """Return the order in which the pictures are seen in a round."""
    return np.random.default_rng([seed, 0, round_]).permutation(length)


class Positions(Dataset):
    """Training as one long list: item p is the p-th picture seen, in a new order each time round."""

    def __init__(self, samples: Samples, config: Config):
        self.samples, self.config = samples, config

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        round_, place = divmod(position, len(self.samples))
        order = order_of(self.config.seed, round_, len(self.samples))
        rng = np.random.default_rng([self.config.seed, 1, position])
        image, label = augment(self.samples[int(order[place])], self.config, rng)
        return normalise(image), torch.from_numpy(label).long()

    def __getitems__(self, positions: Sequence[int]) -> list[tuple[Tensor, Tensor]] | Exception:
        """Return the items of a batch, or the error that one of them raised.

        Raised in a worker it would arrive as another one, whose message is a traceback.
        """
        try:
            return [self[position] for position in positions]
        except (ConfigError, DataError, PictureError) as error:
            return error


class Parts:
    """The batches of one process: of every step's ``batch_size`` positions its share, in ``accumulate`` parts."""

    def __init__(self, config: Config, first_step: int, process: int, processes: int, accumulate: int):
        count = processes * accumulate
        if config.batch_size % count:
            raise ConfigError(
                f"batch_size must be a multiple of processes * accumulate = {processes} * {accumulate}, "
                f"got {config.batch_size}"
            )
        self.steps, self.size = range(first_step, config.steps), config.batch_size // count
        self.batch_size, self.parts = config.batch_size, range(process * accumulate, (process + 1) * accumulate)

    def __len__(self) -> int:
        return len(self.steps) * len(self.parts)

    def __iter__(self) -> Iterator[range]:
        for step in self.steps:
            for part in self.parts:
                start = step * self.batch_size + part * self.size
                yield range(start, start + self.size)


def loader(
    samples: Samples, config: Config, parts: Parts, workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches (image [b, 3, h, w], label [b, h, w]) of ``parts``.

    Raises:
        ConfigError, DataError, PictureError: a picture that does not fit or cannot be read.
    """
    batches = DataLoader(
        Positions(samples, config),
        batch_sampler=parts,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=False,
    )
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def collate(items: list[tuple[Tensor, Tensor]] | Exception) -> list[Tensor] | Exception:
    """Return a batch; an error passes through."""
    return items if isinstance(items, Exception) else default_collate(items)
