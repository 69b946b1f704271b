"""Do thresholds that learn denoise better than thresholds that were tuned? Non-local means, as in denoise.py.

A small convolution sees the noisy picture and predicts alpha (and beta, and h) of every pixel; it is trained on some
photographs, through ``asa_attention(threshold_grad="straight_through")``, and tested on others. It starts at the
constants that are best on the training photographs, so that whatever it gains is due to learning, and is compared with
those constants, with dense attention at its best h, with thresholds "trained" without a gradient, as published, and
with h learned alone. Nothing is chosen on the photographs of the test.

How far the gradient itself goes, where nothing has to be predicted, is measured besides: an alpha of every test pixel
is fitted to the clean picture, which no denoiser has.

A seed draws the noise, the crops and the initialisation, and holds out two of the eight photographs; all methods of a
seed see the same. Runs are kept in the JSON file as they end: the same command goes on where it was interrupted, and
where nothing is missing only writes the table and the plot again.

    python examples/thresholds.py                       # 5 seeds: about an hour on one thread
    python examples/thresholds.py --steps 1500 --methods dense "learned alpha" --out long.json
    python examples/thresholds.py --seeds 2 --steps 5 --side 24 --out quick.json
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import files
import matplotlib.pyplot as plt
import numpy as np
import pages
import skimage
import torch
from confidence import interval
from denoise import PATCH, attention_inputs
from torch import Tensor, nn
from tqdm import tqdm

from asa_ops import asa_attention

# Seed i holds out the i-th and the (i + 3)-th, in a circle.
PHOTOGRAPHS = (
    "astronaut",
    "coffee",
    "chelsea",
    "rocket",
    "stereo_motorcycle",
    "immunohistochemistry",
    "hubble_deep_field",
    "retina",
)
GREY = ("brick", "camera", "cell", "clock", "coins", "grass", "gravel", "moon")  # --grey: to train on besides
SIZE = 128  # side of a photograph, from which tiles are cut
GRID = {  # what is tried for the constants
    "h": [0.7 + 0.05 * i for i in range(11)],  # in units of noise * sqrt(values in a patch)
    "alpha": [2 ** (i / 4) for i in range(-4, 7)],
    "beta": [0.125, 0.25, 0.5, 1.0, 2.0],
}
NEAR_DENSE = 0.1  # an alpha that keeps nearly every pair
RATE, BATCH = 3e-3, 2  # learning rate of Adam, tiles a step
FIT_RATE, FIT_STEPS = 0.05, 100  # the same where alpha is fitted
CHECKS = 20  # intervals of a learning curve
DIGITS = 7  # significant ones in the results: those of float32
BANDS = (0.5, 1.0, 2.0, 4.0)

Settings = dict[str, float | Tensor]  # of "h", "alpha", "beta": a constant or [B, 1, N]; without alpha: dense


@dataclass(frozen=True)
class Method:
    """What is learned, from which constants, and how."""

    constants: tuple[str, ...]  # tuned on the training photographs, where learning starts
    learns: tuple[str, ...] = ()
    threshold_grad: str | None = "straight_through"
    band: float = 1.0
    activation: str = "exp"
    near_dense: bool = False  # start at NEAR_DENSE instead of the tuned alpha
    fitted: bool = False  # every pixel of the test has a parameter, fitted to the clean tile: a limit, not a method


H, ALPHA, BOTH = ("h",), ("h", "alpha"), ("h", "alpha", "beta")
METHODS = {
    "dense": Method(H),
    "dense, learned h": Method(H, ("h",)),
    "fixed alpha": Method(ALPHA),
    "fixed alpha, beta": Method(BOTH),
    "no gradient (as published)": Method(BOTH, ("alpha", "beta"), threshold_grad=None),
    "learned h": Method(ALPHA, ("h",)),
    "learned alpha": Method(ALPHA, ("alpha",)),
    "learned alpha, beta": Method(BOTH, ("alpha", "beta")),
    "learned alpha, h": Method(ALPHA, ("alpha", "h")),
    "learned alpha, beta, h": Method(BOTH, BOTH),
    **{f"learned alpha, band {band:g}": Method(ALPHA, ("alpha",), band=band) for band in BANDS if band != 1},
    "learned alpha, softplus": Method(ALPHA, ("alpha",), activation="softplus"),
    "learned alpha, ReLU": Method(ALPHA, ("alpha",), activation="relu"),
    "near-dense, no gradient": Method(ALPHA, ("alpha",), threshold_grad=None, near_dense=True),
    "near-dense, learned alpha": Method(ALPHA, ("alpha",), near_dense=True),
}
for near, band in product((False, True), BANDS):
    name = f"{'near-dense, ' * near}fitted to the clean, band {band:g}"
    METHODS[name] = Method(ALPHA, ("alpha",), band=band, near_dense=near, fitted=True)
REFERENCE = "fixed alpha"  # what the others' gains are measured from


def photograph(name: str) -> np.ndarray:
    """Return one of scikit-image's photographs as float64 [SIZE, SIZE, 3] in [0, 1]."""
    image = getattr(skimage.data, name)()
    image = image[0] if isinstance(image, tuple) else image  # the left one of a stereo pair
    image = image if image.ndim == 3 else np.stack(3 * [image], -1)
    return skimage.transform.resize(skimage.util.img_as_float(image), (SIZE, SIZE), anti_aliasing=True).clip(0, 1)


class Tiles:
    """Noisy tiles of photographs: as pictures, as tokens of an attention with h = 1, and what they should become.

    Args:
        clean: pictures [S, S, 3].
        noise: its standard deviation.
        rng: draws the noise.
    """

    def __init__(self, clean: list[np.ndarray], noise: float, rng: np.random.Generator):
        noisy = [x + rng.normal(0, noise, x.shape) for x in clean]
        self.unit = noise * math.sqrt(PATCH * PATCH * 3)  # of h: the length of a patch of noise
        self.grid = clean[0].shape[:2]
        self.pictures = torch.from_numpy(np.stack(noisy)).float().permute(0, 3, 1, 2)  # [B, 3, S, S]
        self.clean = torch.from_numpy(np.stack(clean)).float().flatten(1, 2)[:, None]  # [B, 1, N, 3]
        tokens = zip(*(attention_inputs(x, 1.0) for x in noisy), strict=True)
        self.query, self.key, self.value = (torch.cat(x) for x in tokens)  # [B, 1, N, .]

    def psnr(self, settings: Settings, threshold_grad: str | None = None, band: float = 1.0) -> Tensor:
        """Return the PSNR [B] of the tiles denoised with ``settings``, in dB.

        Args:
            settings: what h (in units of :attr:`unit`), alpha and beta are; dense attention without the last two.
            threshold_grad: see :func:`asa_ops.asa_attention`.
            band: its ``threshold_band``.
        """
        full = {name: x if isinstance(x, Tensor) else self.constant(x) for name, x in settings.items()}
        out = asa_attention(
            self.query / (full["h"] * self.unit).square()[..., None],
            self.key,
            self.value,
            full.get("alpha"),
            full.get("beta"),
            grid=self.grid,
            scale=1.0,
            threshold_grad=threshold_grad,
            threshold_band=band,
        )
        return -10 * (out.clamp(0, 1) - self.clean).square().mean((1, 2, 3)).log10()

    def constant(self, x: float) -> Tensor:
        """Return ``x`` for every pixel, [B, 1, N]."""
        return torch.full(self.query.shape[:3], float(x))


def cut(photographs: Iterable[np.ndarray], side: int) -> list[np.ndarray]:
    """Return the whole tiles of every photograph, row by row."""
    starts = range(0, SIZE - side + 1, side)
    return [x[r : r + side, c : c + side] for x in photographs for r, c in product(starts, starts)]


def random_crop(photographs: list[np.ndarray], side: int, rng: np.random.Generator) -> np.ndarray:
    """Return a crop at random, turned, mirrored, with its colours permuted and perhaps inverted.

    A few photographs are all there is to learn from: without this a network learns what their colours mean.
    """
    picture = photographs[rng.integers(len(photographs))]
    r, c = rng.integers(SIZE - side + 1, size=2)
    crop = np.rot90(picture[r : r + side, c : c + side], rng.integers(4))
    crop = crop[:: rng.choice((1, -1)), :, rng.permutation(3)]
    return 1 - crop if rng.integers(2) else crop


def tune(tiles: Tiles, names: tuple[str, ...], fixed: Settings) -> Settings:
    """Return the constants of the grid that denoise the tiles best, ``fixed`` besides."""
    tried = [fixed | dict(zip(names, x, strict=True)) for x in product(*(GRID[name] for name in names))]
    return max(tried, key=lambda settings: tiles.psnr(settings).mean().item())


def tuned(tiles: Tiles) -> dict[tuple[str, ...], Settings]:
    """Return the best constants for dense attention, for thresholds alpha, and for alpha and beta."""
    best = tune(tiles, ALPHA, {})
    return {H: tune(tiles, H, {}), ALPHA: best, BOTH: tune(tiles, ("alpha", "beta"), {"h": best["h"]})}


def around(start: float, activation: str) -> Callable[[Tensor], Tensor]:
    """Return the function from a network's output to a threshold that takes 0 to ``start``."""
    if activation == "exp":
        return lambda x: start * x.exp()
    if activation == "softplus":
        return lambda x: nn.functional.softplus(x + math.log(math.expm1(start)))
    return lambda x: nn.functional.relu(x + start)


class Predictor(nn.Module):
    """Thresholds and h of every pixel from the 7 x 7 noisy pixels around it; at first the constants of ``start``.

    Args:
        start: the constants, of which ``method.learns`` are replaced by what the network predicts.
        method: what is learned, through which activation.
    """

    def __init__(self, start: Settings, method: Method):
        super().__init__()
        self.start, self.learns = start, method.learns
        # h, always positive and learned as usual, does not take part in the comparison of activations.
        self.activations = [around(start[x], "exp" if x == "h" else method.activation) for x in method.learns]
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 5, padding=2, padding_mode="reflect"),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
            nn.ReLU(),
            nn.Conv2d(16, len(method.learns), 1),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, tiles: Tiles) -> Settings:
        outputs = self.layers(tiles.pictures - 0.5).flatten(2).split(1, 1)
        learned = (activate(x) for activate, x in zip(self.activations, outputs, strict=True))
        return self.start | dict(zip(self.learns, learned, strict=True))


class Seed:
    """What all methods of one seed share: photographs, noise, tuned constants.

    Args:
        seed: of everything random. It holds out two photographs; seeds 0 to 7 hold out each photograph twice.
        side: of a tile.
        noise: standard deviation.
        grey: learn from :data:`GREY` besides. Tuning, and the figures of training, remain those of the coloured ones.
    """

    def __init__(self, seed: int, side: int, noise: float, grey: bool = False):
        self.seed, self.side, self.noise = seed, side, noise
        self.held_out = [PHOTOGRAPHS[i % len(PHOTOGRAPHS)] for i in (seed, seed + 3)]
        coloured = [photograph(name) for name in PHOTOGRAPHS if name not in self.held_out]
        self.photographs = coloured + [photograph(name) for name in GREY if grey]
        self.train = Tiles(cut(coloured, side), noise, self.rng("tuning"))
        self.test = Tiles(cut(map(photograph, self.held_out), side), noise, self.rng("test"))
        self.constants = tuned(self.train)

    def rng(self, purpose: str) -> np.random.Generator:
        """Return a generator of its own for every purpose, so that no draw depends on how many came before."""
        return np.random.default_rng([self.seed, ("tuning", "test", "training").index(purpose)])

    def run(self, method: Method, steps: int) -> dict:
        """Train ``method`` for some steps and return its figures, the last ones of training, none chosen.

        Returns:
            The :meth:`figures` and the constants it started from; if it learns, also how far the parameter that moved
            most did, quantiles of what it predicts on the test tiles, and the test PSNR at :func:`checks`. If it is
            fitted: see :meth:`fit`.
        """
        start = self.constants[method.constants] | ({"alpha": NEAR_DENSE} if method.near_dense else {})
        if method.fitted:
            return self.fit(start, method) | {"start": start}
        if not method.learns:
            return self.figures(start) | {"start": start}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Predictor(start, method)
        before = [x.detach().clone() for x in model.parameters()]
        optimizer = torch.optim.Adam(model.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        rng, curve = self.rng("training"), []
        for step in range(steps):
            if step in checks(steps):
                with torch.no_grad():
                    curve.append(self.test.psnr(model(self.test)).mean().item())
            crops = [random_crop(self.photographs, self.side, rng) for _ in range(BATCH)]
            tiles = Tiles(crops, self.noise, rng)
            loss = -tiles.psnr(model(tiles), method.threshold_grad, method.band).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            settings = model(self.test)
            figures = self.figures(settings, model(self.train))
        curve.append(figures["test"])
        moved = max((x - y).abs().max().item() for x, y in zip(model.parameters(), before, strict=True))
        spread = {x: quantiles(settings[x]) for x in method.learns}
        return figures | {"start": start, "moved": moved, "quantiles": spread, "curve": curve}

    def fit(self, start: Settings, method: Method) -> dict:
        """Fit an alpha of every test pixel to the clean tiles and return the figures of the test.

        Nobody could denoise so: it tells how far the gradient goes where nothing has to be predicted, and, as a few
        survivors' noise can be chosen to cancel, more than could be predicted.
        """
        logarithm = torch.full_like(self.test.constant(0), math.log(start["alpha"])).requires_grad_()
        optimizer = torch.optim.Adam([logarithm], FIT_RATE)
        for _ in range(FIT_STEPS):
            settings = start | {"alpha": logarithm.exp()}
            loss = -self.test.psnr(settings, method.threshold_grad, method.band).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        alpha = logarithm.detach().exp()
        return self.scores(start | {"alpha": alpha}) | {"quantiles": {"alpha": quantiles(alpha)}}

    def figures(self, test: Settings, train: Settings | None = None) -> dict:
        """Return the mean PSNR of the tiles of both, by photograph of the test too."""
        with torch.no_grad():
            trained = self.train.psnr(test if train is None else train).mean().item()
        return self.scores(test) | {"train": trained}

    @torch.no_grad()
    def scores(self, settings: Settings) -> dict:
        """Return the mean PSNR of the test tiles, and by photograph."""
        by_tile = self.test.psnr(settings)
        by_photograph = dict(zip(self.held_out, by_tile.view(2, -1).mean(1).tolist(), strict=True))
        return {"test": by_tile.mean().item(), "by photograph": by_photograph}

    @torch.no_grad()
    def ceiling(self) -> float:
        """Return what the best alpha of every test tile, chosen by looking at the clean one, gains over the tuned."""
        settings = self.constants[ALPHA]
        by_alpha = torch.stack([self.test.psnr(settings | {"alpha": alpha}) for alpha in GRID["alpha"]])
        return (by_alpha.amax(0) - self.test.psnr(settings)).mean().item()

    def derivatives(self) -> list[dict]:
        """Return d PSNR / d log alpha, alpha common to all pixels: a difference quotient, and straight-through's."""
        h, tiles, rows = self.constants[ALPHA]["h"], self.test, []
        for alpha in (2 ** (i / 2) for i in range(-4, 4)):
            with torch.no_grad():
                up, down = (tiles.psnr({"h": h, "alpha": alpha * math.exp(x)}).mean().item() for x in (0.1, -0.1))
            row = {"alpha": alpha, "difference": (up - down) / 0.2}
            for band in BANDS:
                log_alpha = torch.tensor(math.log(alpha), requires_grad=True)
                settings = {"h": h, "alpha": tiles.constant(1.0) * log_alpha.exp()}
                tiles.psnr(settings, "straight_through", band).mean().backward()
                row[f"{band:g}"] = log_alpha.grad.item()
            rows.append(row)
        return rows


def quantiles(x: Tensor) -> list[float]:
    """Return the 5 %, 50 % and 95 % quantiles."""
    return x.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()


def checks(steps: int) -> list[int]:
    """Return the steps before which the learning curve is taken; the last is the end."""
    return sorted({math.ceil(i * steps / CHECKS) for i in range(CHECKS + 1)})


def rounded(x: object) -> object:
    """Return results with DIGITS significant digits; what is not exactly 0 never becomes 0."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.{DIGITS}g}") if isinstance(x, float) else x


def finished(results: dict) -> dict:
    """Return the runs of the seeds that have one of every method that the settings name."""
    methods = results["settings"]["methods"].keys()
    return {i: runs for i, runs in results["runs"].items() if runs.keys() >= methods}


def gains(runs: dict, name: str, field: str) -> list[float]:
    """Return by how many dB a method beats the reference, seed by seed."""
    return [seed[name][field] - seed[REFERENCE][field] for seed in runs.values()]


def by_photograph(runs: dict, name: str) -> list[float]:
    """Return the same on the test, photograph by photograph."""
    pairs = ((seed[name]["by photograph"], seed[REFERENCE]["by photograph"]) for seed in runs.values())
    return [scores[photograph] - fixed[photograph] for scores, fixed in pairs for photograph in fixed]


def table(results: dict) -> str:
    """Return the figures of the finished seeds as Markdown."""
    options, runs = results["settings"], finished(results)
    lines = [
        f"Test PSNR of {len(runs)} seeds, {options['side']} x {options['side']} tiles, noise {options['noise']:g},",
        f"{options['steps']} steps{' with grey photographs too' * options['grey']};",
        f"gains over `{REFERENCE}` are paired (same photographs, same noise); ± is half of a",
        "95 % confidence interval (t distribution, seeds as if independent, though they share training photographs);",
        "better on: how many of the seeds' test photographs, and the least and the largest gain on one, dB;",
        "alpha: median of the test tiles' pixels (5 % to 95 %), mean of seeds.",
        "",
    ]
    header = "method", "test, dB", "gain on the test, dB", "better on", "gain on the training photographs, dB", "alpha"
    rows = []
    for name in options["methods"]:
        score = interval([seed[name]["test"] for seed in runs.values()])
        gained = interval(gains(runs, name, "test"))
        cells = [name, "{:.2f} ± {:.2f}".format(*score), "{:+.3f} ± {:.3f}".format(*gained)]
        each = by_photograph(runs, name)
        better = f"{sum(x > 0 for x in each)} of {len(each)} ({min(each):+.2f} to {max(each):+.2f})"
        cells.append("-" if name == REFERENCE else better)
        trained = None if METHODS[name].fitted else interval(gains(runs, name, "train"))
        cells.append("{:+.3f} ± {:.3f}".format(*trained) if trained else "-")
        if "alpha" in METHODS[name].learns:
            spread = np.mean([seed[name]["quantiles"]["alpha"] for seed in runs.values()], 0)
            cells.append("{1:.2f} ({0:.2f} to {2:.2f})".format(*spread))
        elif "alpha" in METHODS[name].constants:
            cells.append(f"{np.mean([seed[name]['start']['alpha'] for seed in runs.values()]):.2f}")
        else:
            cells.append("-")
        rows.append(cells)
    ceiling = "{:+.2f} ± {:.2f}".format(*interval([results["ceilings"][i] for i in runs]))
    lines += [
        pages.table(header, rows),
        "",
        "An oracle that gives every test tile the alpha of the grid that is best for it, by looking at the clean tile,",
        f"would gain {ceiling} dB.",
    ]
    moved = [seed[name]["moved"] for seed in runs.values() for name in options["methods"] if "no gradient" in name]
    if moved:
        lines.append(f"The largest change of a parameter without a gradient was {max(moved):g}.")
    return "\n".join(lines) + "\n"


def draw(path: Path, results: dict) -> None:
    """Draw the gains, the learning curves from a near-dense start, and the derivatives of the first seed."""
    runs, methods = finished(results), results["settings"]["methods"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained", width_ratios=(1.3, 1, 1))
    shown = [name for name in methods if name != REFERENCE and not name.startswith(("dense", "near", "fitted"))]
    for y, name in enumerate(reversed(shown)):
        for field, colour, shift in (("test", "C0", 0.12), ("train", "C7", -0.12)):
            mean, half = interval(gains(runs, name, field))
            label = {"test": "test photographs", "train": "training photographs"}[field] if y == 0 else None
            axes[0].errorbar(mean, y + shift, xerr=np.nan_to_num(half), fmt="o", color=colour, capsize=3, label=label)
    axes[0].set_yticks(range(len(shown)), reversed(shown))
    axes[0].axvline(0, color="black", linewidth=0.8)
    axes[0].set_xlabel(f"gain over {REFERENCE}, dB")
    axes[0].legend()

    for name in ("near-dense, no gradient", "near-dense, learned alpha", "learned alpha", "learned alpha, beta, h"):
        if name in methods:
            curves = np.array([seed[name]["curve"] for seed in runs.values()])
            axes[1].plot(checks(results["settings"]["steps"]), curves.mean(0), marker=".", label=name)
    if "dense" in methods:
        level = np.mean([seed["dense"]["test"] for seed in runs.values()])
        axes[1].axhline(level, color="C7", linestyle=":", label="dense")
    axes[1].set_xlabel("step")
    axes[1].set_ylabel("test PSNR, dB")
    if axes[1].lines:
        axes[1].legend()

    rows = results["derivatives"]
    alphas = [row["alpha"] for row in rows]
    axes[2].plot(alphas, [row["difference"] for row in rows], color="black", linewidth=2, label="difference quotient")
    for band in BANDS:
        axes[2].plot(alphas, [row[f"{band:g}"] for row in rows], marker=".", label=f"straight-through, band {band:g}")
    axes[2].axhline(0, color="C7", linewidth=0.8)
    axes[2].set_xscale("log", base=2)
    axes[2].set_xlabel("alpha, the same for all pixels")
    axes[2].set_ylabel("d PSNR / d log alpha, dB")
    axes[2].legend()
    files.save(figure, path, dpi=90)
    plt.close(figure)


def resume(path: Path, settings: dict) -> dict:
    """Return the results that a file holds, or new ones; SystemExit if it is not of the same experiment."""
    if not path.exists():
        return {"settings": settings, "runs": {}, "ceilings": {}}
    try:
        results = json.loads(files.read(path))
        found, _, _ = dict(results["settings"]), dict(results["runs"]), dict(results["ceilings"])
        methods = dict(found["methods"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"thresholds: {str(path)!r} holds no results of this script ({error!r}): remove it") from error
    if found != settings:
        others = methods | settings["methods"]
        differing = [name for name in others if methods.get(name) != settings["methods"].get(name)]
        parts = [f"other methods ({', '.join(differing)})"] if differing else []
        values = ((name, found.get(name), settings.get(name)) for name in found | settings if name != "methods")
        parts += [f"{name} {was!r} instead of {now!r}" for name, was, now in values if was != now]
        raise SystemExit(
            f"thresholds: {str(path)!r} is of other settings: {', '.join(parts)}: remove it, or name another with --out"
        )
    return results


def layout(x: object, indent: str = "") -> str:
    """Return JSON with a line for every run, method and derivative."""
    deeper, items = indent + " ", x.values() if isinstance(x, dict) else x
    if len(indent) == 3 or not isinstance(x, dict | list) or not any(isinstance(item, dict | list) for item in items):
        return json.dumps(x)
    if isinstance(x, list):
        return "[\n" + ",\n".join(deeper + layout(item, deeper) for item in x) + f"\n{indent}]"
    lines = (f"{deeper}{json.dumps(name)}: {layout(item, deeper)}" for name, item in x.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of a command line, or exit with what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many (5)")
    parser.add_argument("--steps", type=int, default=300, help="of training (300)")
    parser.add_argument("--side", type=int, default=48, help="of the square tiles; SIDE^2 tokens (48)")
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation of the noise, colours in [0, 1]")
    parser.add_argument("--grey", action="store_true", help=f"learn from {len(GREY)} grey photographs too")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    default = Path(__file__).parent / "results" / "thresholds.json"
    parser.add_argument("--out", type=Path, default=default, help="results; a .md and a .png are written beside them")
    options = parser.parse_args(arguments)
    for name in ("seeds", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not 2 * PATCH <= options.side <= SIZE:
        parser.error(f"--side must be from {2 * PATCH} to {SIZE}, got {options.side}")
    if not 0 < options.noise < math.inf:
        parser.error(f"--noise must be > 0 and finite, got {options.noise}")
    files.check_out(parser, options.out, ".json")
    files.check([options.out, options.out.with_suffix(".md"), options.out.with_suffix(".png")])
    return options


def main(arguments: list[str] | None = None) -> dict:
    options = parse(arguments)
    settings = {name: getattr(options, name) for name in ("steps", "side", "noise", "grey")}
    methods = {name: asdict(x) for name, x in METHODS.items() if name in (*options.methods, REFERENCE)}
    settings |= {"rate": RATE, "batch": BATCH, "methods": methods}
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in a file
    results = resume(options.out, settings)
    with tqdm(total=options.seeds * len(methods), unit="run") as bar:
        for i in range(options.seeds):
            done = results["runs"].setdefault(str(i), {})
            bar.update(len(done))
            missing = [name for name in methods if name not in done]
            if not missing:
                continue
            bar.set_description(f"seed {i}, tuning")
            seed = Seed(i, options.side, options.noise, options.grey)
            results["ceilings"][str(i)] = rounded(seed.ceiling())
            if "derivatives" not in results:
                results["derivatives"] = rounded(seed.derivatives())
            for name in missing:
                bar.set_description(f"seed {i}, {name}")
                done[name] = rounded(seed.run(METHODS[name], options.steps))
                files.write(options.out, layout(results) + "\n")
                bar.update()
    text = table(results)
    print(text)
    files.write(options.out.with_suffix(".md"), text)
    draw(options.out.with_suffix(".png"), results)
    return results


if __name__ == "__main__":
    files.run(main)
