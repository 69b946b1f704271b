"""Train a small vision transformer with dense attention, then fine-tune it to sparse attention whose thresholds learn.

It reads digits in clutter. `transformers` makes the model (ViT), `asa_ops.integrations.transformers` switches its
attention: every head of every layer gets a threshold, alpha = 0, which is dense attention exactly. A penalty, the mean
of exp(-alpha), moves them up from there, and the loss of a head that needs many neighbours holds its alpha down. A copy
that is fine-tuned as long with dense attention stands beside.

    python examples/sparsify.py                      # minutes on two cores
    python examples/sparsify.py --penalty 1 --steps 1000 --out sparse.png
"""

import argparse
import copy
import math
from pathlib import Path

import files
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from asa_ops import nn
from asa_ops.integrations import transformers as integration

SIDE = 32  # of a picture
MODEL = {"image_size": SIDE, "patch_size": 4, "num_channels": 1, "num_labels": 10}
MODEL |= {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
FONTS = ("DejaVuS*.ttf", "STIXGeneral*.ttf", "cm[brst]*.ttf")  # of matplotlib's, those with digits
FRAGMENTS = 4  # of other digits, in a picture
NOISE = 0.1
BATCH = 32
TEST = 1000  # pictures
RATE, FINE_RATE = 2e-3, 5e-4  # learning rates of Adam at first, from scratch and in fine-tuning
THRESHOLD_RATE = 10.0  # that of thresholds over FINE_RATE
POINTS = 10  # of a curve


class Digits:
    """Pictures [B, 1, SIDE, SIDE] of a digit among fragments of others, as many as asked for, and which digit it is."""

    def __init__(self, seed: int):
        paths = sorted(path for name in FONTS for path in (Path(matplotlib.get_data_path()) / "fonts/ttf").glob(name))
        fonts = [ImageFont.truetype(path, 26) for path in paths if "Display" not in path.name]
        self.glyphs = torch.stack([torch.stack([glyph(font, digit) for digit in range(10)]) for font in fonts])
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        labels = self._integers(10, count)
        pictures = self._placed(labels, shift=0.1)
        rows = torch.arange(SIDE)
        for _ in range(FRAGMENTS):  # a square of another digit, anywhere
            corners = self._integers(SIDE - 7, 2, count, 1)
            near = ((rows >= corners) & (rows < corners + 8)).float()
            window = near[0][:, None, :, None] * near[1][:, None, None, :]
            pictures = torch.maximum(pictures, self._placed(self._integers(10, count), shift=0.9) * window)
        noise = torch.randn(pictures.shape, generator=self.random)
        return pictures + NOISE * noise - 0.2, labels

    def _integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.random)

    def _placed(self, labels: Tensor, shift: float) -> Tensor:
        """Return each digit in a font, turned and scaled by a little, and shifted by up to ``shift`` half pictures."""
        angle, size, x, y = 2 * torch.rand(4, len(labels), generator=self.random) - 1
        angle, size = angle * math.pi / 18, 1.1 + 0.1 * size
        cos, sin = size * angle.cos(), size * angle.sin()
        places = torch.stack((cos, -sin, x * shift * size, sin, cos, y * shift * size), 1).view(-1, 2, 3)
        chosen = self.glyphs[self._integers(len(self.glyphs), len(labels)), labels][:, None]
        return F.grid_sample(chosen, F.affine_grid(places, chosen.shape, align_corners=False), align_corners=False)


def glyph(font: ImageFont.FreeTypeFont, digit: int) -> Tensor:
    """Return a digit in the middle of a picture [SIDE, SIDE], in [0, 1]."""
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), str(digit), fill=255, font=font, anchor="mm")
    return torch.from_numpy(np.asarray(image, np.float32) / 255)


class Run:
    """A model in training: its accuracy and, where it is watched, its survivors by step."""

    def __init__(self, model: torch.nn.Module, test: tuple[Tensor, Tensor], steps: int, rate: float):
        self.model, self.test, self.steps = model, test, steps
        groups = nn.parameter_groups(model, rate, THRESHOLD_RATE)
        for group in groups:
            group["weight_decay"] = 0.0 if group["name"] == "thresholds" else 0.05
        self.thresholds = [x for group in groups if group["name"] == "thresholds" for x in group["params"]]
        self.optimizer = torch.optim.AdamW(groups)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(  # a short rise, then down to 0 as a cosine
            self.optimizer, [group["lr"] for group in groups], steps, pct_start=0.1, cycle_momentum=False
        )
        self.curve: list[tuple[int, float, dict[str, float]]] = []

    def train(self, digits: Digits, penalty: float, first: int, bar: tqdm) -> None:
        """Train all steps, numbered from ``first``, and note where it stands POINTS times."""
        self.note(first)
        noted = {round(self.steps * i / POINTS) for i in range(1, POINTS + 1)}
        for step in range(1, self.steps + 1):
            self.model.train()
            pictures, labels = digits.draw(BATCH)
            loss = F.cross_entropy(self.model(pictures).logits, labels)
            if self.thresholds:
                loss = loss + penalty * torch.stack([(-x).exp().mean() for x in self.thresholds]).mean()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            bar.update()
            if step in noted:
                self.note(first + step)
                bar.set_postfix(accuracy=f"{self.curve[-1][1]:.3f}")

    @torch.no_grad()
    def note(self, step: int) -> None:
        self.model.eval()
        pictures, labels = self.test
        right, densities = 0, {}
        for part, wanted in zip(pictures.split(500), labels.split(500), strict=True):
            if self.thresholds:
                with nn.monitor(self.model) as watched:
                    right += (self.model(part).logits.argmax(1) == wanted).sum().item()
                    for name, x in watched.statistics().items():
                        if name.endswith("density"):
                            densities[name] = densities.get(name, 0.0) + x * len(part) / len(labels)
            else:
                right += (self.model(part).logits.argmax(1) == wanted).sum().item()
        self.curve.append((step, right / len(labels), densities))

    def alphas(self) -> Tensor:
        """Return the thresholds [layers, heads], as they are used."""
        return torch.stack([x.detach().clamp(min=0) for x in self.thresholds])


def draw(path: Path, pictures: Tensor, dense: Run, tuned: Run, sparse: Run) -> None:
    """Write accuracy and survivors over steps, and some of the pictures."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), width_ratios=(1, 1.4, 1.4), layout="constrained")
    shown = torch.cat([torch.cat(list(pictures[4 * i : 4 * i + 4, 0]), 1) for i in range(4)])
    axes[0].imshow(shown.numpy(), cmap="gray", interpolation="nearest")
    axes[0].set_axis_off()
    axes[0].set_title("digits in clutter")
    for run, label in ((dense, "dense"), (tuned, "dense, fine-tuned as long"), (sparse, "sparse")):
        steps, accuracy, _ = zip(*run.curve, strict=True)
        axes[1].plot(steps, [100 * x for x in accuracy], label=label)
    axes[1].set_ylabel("accuracy, %")
    steps, _, densities = zip(*sparse.curve, strict=True)
    for layer, name in enumerate(densities[0]):
        survivors = [100 * x[name] for x in densities]
        axes[2].plot([0, *steps], [100, *survivors], label=f"layer {layer + 1}")
    axes[2].set_ylabel("survivors, % of all pairs")
    axes[2].set_ylim(0, 105)
    for axis in axes[1:]:
        axis.axvline(sparse.curve[0][0], color="0.7", linestyle="--", zorder=0)
        axis.set_xlabel("step (dashed: thresholds begin to learn)")
        axis.legend()
    files.save(figure, path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of training, and half as many of fine-tuning (1500)")
    parser.add_argument("--penalty", type=float, default=0.3, help="weight of the mean of exp(-alpha) (0.3)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and the model")
    parser.add_argument("--out", type=Path, default=Path("sparsify.png"), help="the figure to write (sparsify.png)")
    options = parser.parse_args(arguments)
    if options.steps < 2 * POINTS:
        parser.error(f"--steps must be at least {2 * POINTS}, got {options.steps}")
    if not 0 <= options.penalty < math.inf:
        parser.error(f"--penalty must be >= 0 and finite, got {options.penalty}")
    if options.seed < 0:
        parser.error(f"--seed must be >= 0, got {options.seed}")
    files.check_out(parser, options.out, *files.FIGURES)
    files.check([options.out])

    integration.register()
    torch.manual_seed(options.seed)
    model = transformers.AutoModelForImageClassification.from_config(transformers.ViTConfig(**MODEL))
    test = Digits(2 * options.seed + 1).draw(TEST)
    steps, fine = options.steps, options.steps // 2
    parameters = sum(x.numel() for x in model.parameters())
    print(f"ViT, {parameters:,} parameters, {(SIDE // MODEL['patch_size']) ** 2} patches and a class token")
    print(f"{torch.get_num_threads()} CPU threads; accuracy on {TEST:,} pictures that are not trained on\n")
    with tqdm(total=steps + 2 * fine, unit="step", leave=False) as bar:
        digits = Digits(2 * options.seed)
        dense = Run(model, test, steps, RATE)
        dense.train(digits, 0.0, 0, bar)
        state = digits.random.get_state()
        sparse_model = copy.deepcopy(model)
        tuned = Run(copy.deepcopy(model), test, fine, FINE_RATE)
        tuned.train(digits, 0.0, steps, bar)
        digits.random.set_state(state)  # the same pictures
        sparse_model.set_attn_implementation("asa")
        integration.add_thresholds(sparse_model)
        sparse = Run(sparse_model, test, fine, FINE_RATE)
        sparse.train(digits, options.penalty, steps, bar)
    runs = {"dense": dense, "dense, fine-tuned as long": tuned, "sparse at first": sparse, "sparse": sparse}
    print(f"{'':<28}{'accuracy %':>12}{'survivors %':>13}")
    for name, run in runs.items():
        _, accuracy, densities = run.curve[0 if name == "sparse at first" else -1]
        share = sum(densities.values()) / len(densities) if densities else 1.0
        print(f"{name:<28}{100 * accuracy:>12.1f}{100 * share:>13.1f}")
    print("\nalpha of the heads:")
    for layer, (alphas, share) in enumerate(zip(sparse.alphas().tolist(), sparse.curve[-1][2].values(), strict=True)):
        print(f"  layer {layer + 1}: {'  '.join(f'{x:.2f}' for x in alphas)}   survivors {100 * share:.1f} %")
    draw(options.out, test[0][:16], dense, tuned, sparse)
    print(f"figure: {options.out}")
    return runs


if __name__ == "__main__":
    files.run(main)
