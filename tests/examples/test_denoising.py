"""The study of denoising: its attention, its training, and what is made of the results."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import files
from examples.denoising import __main__ as command
from examples.denoising import attention, methods, network, report, study
from examples.photographs import Part, Photographs

CONSTANTS = {0.1: attention.Constants(0.9, 1.0), 0.2: attention.Constants(0.7, 0.5)}
DENSE = {noise: attention.Constants(each.width) for noise, each in CONSTANTS.items()}
TAILS = {0.1: attention.Constants(0.9, tail=0.3), 0.2: attention.Constants(0.7, tail=0.2)}
LEARNED = "ASA, alpha and h learned"
NETWORKS = {"network, no block": 20.0, "network, asa": 21.0}
RESULTS = Path(command.__file__).parents[1] / "results"


def noisy_pictures(side=9):
    random = torch.Generator().manual_seed(0)
    clean = torch.rand(2, 3, side, side, generator=random)
    noise = torch.tensor([0.1, 0.2])
    return clean, clean + noise[:, None, None, None] * torch.randn(clean.shape, generator=random), noise


def part(seed, count):
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (2 * count, 3, 4, 4), np.uint8)
    crops = torch.from_numpy(coarse.repeat(3, 2).repeat(3, 3))
    return Part([f"{seed}-{i}" for i in range(count)], crops, torch.arange(count).repeat_interleave(2))


@pytest.fixture(autouse=True)
def threads(one_thread):
    """The command takes one."""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(study, "SIDE", 10)
    monkeypatch.setattr(study, "WIDTHS", (0.7, 0.9))
    monkeypatch.setattr(study, "ALPHAS", (0.5, 1.0))
    monkeypatch.setattr(study, "TAILS", (0.2, 0.4))
    monkeypatch.setattr(study, "NOISES", (0.1, 0.2))
    return Photographs(part(0, 3), part(1, 2))


def test_dense_attention_is_non_local_means():
    """Against the formula, patch by patch."""
    _, noisy, noise = noisy_pictures(7)
    out = attention.NonLocalMeans(DENSE)(noisy, noise)
    padded = torch.nn.functional.pad(noisy, [2] * 4, mode="reflect").double()
    for b, each in enumerate(DENSE.values()):
        patches = torch.stack([padded[b, :, i : i + 5, j : j + 5].flatten() for i in range(7) for j in range(7)])
        h = each.width * noise[b].double() * math.sqrt(75)
        weights = (-torch.cdist(patches, patches).square() / h**2).softmax(1)
        expected = weights @ noisy[b].double().flatten(1).mT
        torch.testing.assert_close(out[b].flatten(1).mT.double(), expected, rtol=1e-5, atol=1e-5)


def test_everybody_survives_an_alpha_of_0():
    _, noisy, noise = noisy_pictures()
    every = {level: attention.Constants(each.width, 0.0) for level, each in CONSTANTS.items()}
    sparse = attention.NonLocalMeans(every)
    with torch.no_grad():
        torch.testing.assert_close(sparse(noisy, noise), attention.NonLocalMeans(DENSE)(noisy, noise))
        assert sparse.survivors.tolist() == [81.0, 81.0]
        attention.NonLocalMeans(CONSTANTS)(noisy, noise)


@pytest.mark.parametrize(("limit", "constants"), [("alpha", CONSTANTS), ("tail", TAILS)])
def test_learning_starts_at_the_constants_and_stays_near(limit, constants):
    _, noisy, noise = noisy_pictures()
    fixed = attention.NonLocalMeans(constants)
    learns = attention.NonLocalMeans(constants, (limit, "h"))
    with torch.no_grad():
        assert torch.equal(learns(noisy, noise), fixed(noisy, noise))
        learns.predictor.layers[-1].bias.fill_(-100.0)
        reach = math.exp(-attention.WIDTH_REACH), math.exp(-attention.LIMIT_REACH)
        odds = {"alpha": lambda x: x, "tail": lambda x: x / (1 - x)}[limit]
        back = {"alpha": lambda x: x, "tail": lambda x: x / (1 + x)}[limit]
        far = {
            noise: attention.Constants(each.width * reach[0], **{limit: back(odds(getattr(each, limit)) * reach[1])})
            for noise, each in constants.items()
        }
        torch.testing.assert_close(learns(noisy, noise), attention.NonLocalMeans(far)(noisy, noise))


def test_a_tail_is_what_its_alpha_leaves_out():
    """Of random weights, to one of them; its derivative is that of the quantile, of weights that are known."""
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 400, 8, generator=random), torch.randn(2, 400, 8, generator=random)
    weights = (query @ key.mT).softmax(-1)
    tail = torch.empty(2, 400).uniform_(0.02, 0.99, generator=random)
    dropped = weights <= attention.alpha_of_tail(query, key, tail)[..., None] / 400
    left_out, others = (weights * dropped).sum(-1), 1 - weights.amax(-1)
    heaviest = (weights * dropped).amax(-1)
    assert (left_out > tail * others - 1e-5).all() and (left_out - heaviest < tail * others + 1e-5).all()
    assert not dropped.all(-1).any()

    # Weights proportional to 1 .. n: the lightest k have the share (k / n)^2, so alpha is 2 times the root of the tail.
    key = torch.arange(1, 2001.0).log()[None, :, None]
    tail = torch.full((1, 2000), 0.25, requires_grad=True)
    alpha = attention.alpha_of_tail(torch.ones_like(key), key, tail)
    torch.testing.assert_close(alpha, torch.ones_like(alpha), rtol=2e-3, atol=0)
    (gradient,) = torch.autograd.grad(alpha.sum(), tail)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 2.0), rtol=1e-2, atol=0)


def test_tails_get_a_gradient():
    clean, noisy, noise = noisy_pictures()
    learns = attention.NonLocalMeans(TAILS, ("tail",))
    (learns(noisy, noise) - clean).square().mean().backward()
    assert learns.predictor.layers[-1].bias.grad.abs() > 1e-6


@pytest.mark.parametrize(
    ("constants", "learns"),
    [(DENSE, ("alpha",)), (TAILS, ("alpha", "h")), (CONSTANTS | {0.2: attention.Constants(0.7, tail=0.2)}, ())],
)
def test_settings_that_contradict_each_other(constants, learns):
    with pytest.raises(ValueError, match="expected constants of one kind, and of these or 'h' what learns, got"):
        attention.NonLocalMeans(constants, learns)


@pytest.mark.parametrize(("limit", "constants"), [("alpha", CONSTANTS), ("tail", TAILS)])
def test_learned_thresholds_never_lose_a_row(limit, constants):
    """A flat picture, and one of texture, with the largest alpha that can be learned; and one all the same."""
    noise = torch.tensor([0.1, 0.1])
    random = torch.Generator().manual_seed(0)
    clean = torch.stack([torch.full((3, 12, 12), 0.5), torch.rand(3, 12, 12, generator=random)])
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=random)
    learns = attention.NonLocalMeans(constants, (limit,))
    learns.predictor.layers[-1].bias.data.fill_(100.0)
    with torch.no_grad():
        out = learns(noisy, noise)
    assert (out[0] - 0.5).abs().max() < 0.5 and out.min() > -0.5
    assert (learns.survivors >= 1).all()
    with torch.no_grad():
        torch.testing.assert_close(learns(clean, noise)[0], clean[0])
    patches = attention.patches_of(noisy)
    key = torch.cat([patches, patches.square().sum(-1, keepdim=True)], -1)
    query = torch.cat([2 * patches, -torch.ones(2, 144, 1)], -1)
    weights = (-torch.cdist(patches, patches).square()).softmax(-1)
    torch.testing.assert_close(attention.heaviest(query, key), 144 * weights.amax(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_thresholds_get_the_gradient_of_the_error(alpha):
    """Straight-through, of one alpha for all pixels, beside a difference quotient."""
    coarse = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), np.uint8)
    clean = torch.from_numpy(coarse.repeat(4, 2).repeat(4, 3)).float() / 255
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))

    def error(shift):
        module = attention.NonLocalMeans({0.1: attention.Constants(0.9, alpha)}, ("alpha",), band=0.5)
        bias = module.predictor.layers[-1].bias
        bias.data.fill_(shift)
        return (module(noisy, torch.full((2,), 0.1)) - clean).square().mean((1, 2, 3)).log().mean(), bias

    with torch.no_grad():
        quotient = (error(0.1)[0] - error(-0.1)[0]).item() / 0.2
    value, bias = error(0.0)
    value.backward()
    assert abs(quotient) > 0.005 and bias.grad.item() == pytest.approx(quotient, rel=0.15)


def test_the_embedding_starts_as_patches():
    _, noisy, noise = noisy_pictures()
    module = attention.NonLocalMeans(CONSTANTS, embeds=True)
    torch.nn.init.zeros_(module.embedding.layers[-1].weight)
    torch.nn.init.zeros_(module.embedding.layers[-1].bias)
    with torch.no_grad():
        torch.testing.assert_close(module(noisy, noise), attention.NonLocalMeans(CONSTANTS)(noisy, noise))


def test_texture_tells_flat_from_textured():
    noise = torch.tensor([0.1])
    textured = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for picture, low, high in ((torch.full((1, 3, 12, 12), 0.5), -0.2, 0.0), (textured, 0.5, 4.0)):
        assert all(low <= each.min() and each.max() <= high for each in attention.texture(picture, noise)[1:])


@pytest.mark.parametrize("name", [name for name, method in methods.METHODS.items() if method.group == methods.NETWORK])
def test_networks_have_equal_budgets(name):
    module = methods.METHODS[name].build({})
    count = sum(x.numel() for x in module.parameters())
    assert 80_000 < count < 150_000  # squeeze and attention has 147,000, the others less than 100,000
    clean, noisy, noise = noisy_pictures(16)
    out = module(noisy, noise)
    assert out.shape == clean.shape and len(module.layers) == 6
    assert isinstance(module, network.DenoisingNetwork)


def test_scikit_image_gets_the_noise_of_each_picture():
    clean, noisy, noise = noisy_pictures(16)
    constants = {0.1: attention.Constants(0.6), 0.2: attention.Constants(0.8)}
    out = methods.nearby(constants)(noisy, noise)
    single = methods.nearby({0.2: constants[0.2]})(noisy[1:], noise[1:])
    assert out.shape == clean.shape and torch.equal(out[1:], single)


def test_crops_to_train_on_are_of_the_photographs(small):
    sample, again = (study.Sampler(small.train, 3) for _ in range(2))
    clean, noisy, noise = sample()
    assert clean.shape == noisy.shape == (4, 3, 10, 10) and set(noise.tolist()) <= {0.1, 0.2}.union(
        {torch.tensor(x).item() for x in (0.1, 0.2)}
    )
    assert all(map(torch.equal, again(), (clean, noisy, noise)))
    values = {tuple(sorted(x)) for x in small.train.floats().permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert {tuple(sorted(x)) for x in clean.permute(0, 2, 3, 1).reshape(-1, 3).tolist()} <= values
    assert (noisy - clean).std((1, 2, 3)).div(noise).sub(1).abs().max() < 0.15


def test_training_lowers_the_error(small):
    module = attention.NonLocalMeans(CONSTANTS, ("alpha", "h"), embeds=True)
    told = study.train(module, small.train, 0, 40, 1.0, lambda: None)
    assert len(told["curve"]) == 10 and np.mean(told["curve"][-3:]) > np.mean(told["curve"][:3]) + 0.3


def test_tuning_takes_the_best_constants(small):
    tuned = study.tune(small)
    assert set(tuned) == {"dense", "asa", "tail", "nearby"} and set(tuned["asa"]) == {0.1, 0.2}
    clean = small.train.floats()
    clean = clean[torch.linspace(0, len(clean) - 1, len(clean)).long()]
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))

    def best(settings):
        scores = {}
        for constants in settings:
            with torch.no_grad():
                image = attention.NonLocalMeans({0.1: constants})(noisy, torch.full((len(clean),), 0.1)).clamp(0, 1)
            scores[constants] = -10 * (image - clean).square().mean((1, 2, 3)).log10().mean().item()
        return max(scores, key=scores.get)

    assert tuned["dense"][0.1] == best([attention.Constants(width) for width in study.WIDTHS])
    width = tuned["asa"][0.1].width
    assert tuned["tail"][0.1] == best([attention.Constants(width, tail=tail) for tail in study.TAILS])


def test_a_run_repeats_and_every_seed_has_the_same_test(small):
    tuned = study.tune(small)
    first = study.run(LEARNED, 0, small, tuned, 2)
    torch.manual_seed(7)  # nothing outside the seed matters
    again, other = study.run(LEARNED, 0, small, tuned, 2), study.run(LEARNED, 1, small, tuned, 2)
    for told in (first, again, other):
        del told["step seconds"]
        for each in told["test"].values():
            del each["seconds"]
    assert first == again and first["test"] != other["test"]
    assert list(first["test"]) == ["0.1", "0.2"] and list(first["test"]["0.1"]["psnr"]) == small.test.names
    noisy = study.run("noisy", 0, small, tuned, 2)["test"]["0.1"]["psnr"]
    assert np.mean(list(noisy.values())) == pytest.approx(20, abs=1)  # clipped


def line(name, seed, values, trained=True):
    test = {
        noise: {
            "psnr": {photo: value + i for photo, value in values.items()},
            "ssim": dict.fromkeys(values, 0.5),
            "seconds": 0.25,
            "survivors": 7.0,
        }
        for i, noise in enumerate(("0.1", "0.2"))
    }
    more = {"curve": [20.0, 21.0], "step seconds": 0.5} if trained else {}
    return {"method": name, "seed": seed, "steps": 3, "test": test, "processor": "a processor", "commit": "abc"} | more


def test_gains_are_paired_by_photograph_and_seed():
    runs = {
        report.REFERENCE: {0: line(report.REFERENCE, 0, {"x": 20.0, "y": 30.0}, trained=False)},
        "dense, h learned": {
            0: line("dense, h learned", 0, {"x": 20.0, "y": 30.0}),
            1: line("dense, h learned", 1, {"x": 21.0, "y": 31.0}),
        },
        LEARNED: {
            0: line(LEARNED, 0, {"x": 21.0, "y": 30.5}),
            1: line(LEARNED, 1, {"x": 21.5, "y": 30.5}),
            2: line(LEARNED, 2, {"x": 21.5, "y": 31.0}),
        },
    }
    fixed = report.gains(runs, LEARNED, report.REFERENCE, "0.1")
    assert fixed.tolist() == [[1.0, 0.5], [1.5, 0.5], [1.5, 1.0]]
    assert report.gains(runs, LEARNED, "dense, h learned", "0.2").tolist() == [[1.0, 0.5], [0.5, -0.5]]
    assert report.gains(runs, report.REFERENCE, "dense, h learned", "0.1").tolist() == [[0.0, 0.0], [-1.0, -1.0]]
    text = report.page(
        runs, {"dense": {}, "asa": {}, "nearby": {}}, {"steps": 3, "processors": ["p"], "commits": ["c"]}
    )
    # photographs gain 4 / 3 and 2 / 3: t = 12.7062, s / sqrt(2) = 1 / 3; seeds 0.75, 1, 1.25: t = 4.3027, s = 0.25
    assert (
        f"| {LEARNED} | {report.REFERENCE} | 0.1 | 3 | +1.00 ± 4.24 | +1.00 ± 0.62 | 2 of 2 | +0.67 | +1.33 |" in text
    )
    assert "| dense, h learned | 2 | 25.50 | +0.50 ± 0.00 | +0.50 | 0.500 |" in text
    assert "| y | 31.00 | 31.67 |" in text  # at noise 0.2


def test_networks_have_a_table_and_a_plot(tmp_path):
    runs = {name: {0: line(name, 0, {"x": value, "y": 30.0})} for name, value in NETWORKS.items()}
    about = {"steps": 3, "processors": ["p"], "commits": ["c"]}
    text = report.page(runs, {"dense": {}, "asa": {}, "nearby": {}}, about)
    assert "| network, asa | 1 | 25.50 | +0.50 ± 6.35 | +0.00 | 0.500 | 26.50 |" in text and "| 7 | 500 | 250 |" in text
    assert "## Attention alone" not in text
    for name in ("networks.png", "attention.png"):
        report.draw(tmp_path / name, runs)
        assert (tmp_path / name).stat().st_size > 10_000
        runs = {report.REFERENCE: {0: line(report.REFERENCE, 0, {"x": 20.0, "y": 30.0}, trained=False)}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small study, not to be changed: its set of photographs, and its results."""
    folder = tmp_path_factory.mktemp("study")
    Photographs(part(0, 3), part(1, 2)).save(folder / "set.npz")
    with pytest.MonkeyPatch.context() as monkeypatch:
        settings = {"SIDE": 10, "WIDTHS": (0.7,), "ALPHAS": (1.0,), "NOISES": (0.1, 0.2)}
        for name, value in settings.items():
            monkeypatch.setattr(study, name, value)
        command.main(arguments(folder))
    return folder


def arguments(folder, *more):
    names = ["--methods", "noisy", report.REFERENCE, LEARNED, "--seeds", "2", "--steps", "2"]
    return ["--photographs", str(folder / "set.npz"), "--out", str(folder / "out.jsonl"), *names, *more]


def copy(finished, tmp_path):
    for name in ("set.npz", "out.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    return tmp_path / "out.jsonl"


def test_runs_from_the_command_line(finished, tmp_path, monkeypatch, capsys):
    lines = [json.loads(each) for each in (finished / "out.jsonl").read_text().splitlines()]
    runs = [(told["method"], told["seed"]) for told in lines[1:]]
    assert runs == [("noisy", 0), (report.REFERENCE, 0), (LEARNED, 0), (LEARNED, 1)]  # once what is not trained
    assert all(told["processor"] and told["torch"] == torch.__version__ for told in lines[1:])
    text = (finished / "out.md").read_text()
    assert "nan" not in text and (finished / "out.png").stat().st_size > 10_000
    out = copy(finished, tmp_path)
    monkeypatch.setattr(study, "SIDE", 10)
    monkeypatch.delattr(study, "run")
    command.main(arguments(tmp_path))  # nothing is missing
    assert out.with_suffix(".md").read_text() == text and out.read_bytes() == (finished / "out.jsonl").read_bytes()


def test_goes_on_where_it_stopped(finished, tmp_path, monkeypatch):
    out = copy(finished, tmp_path)
    lines = out.read_text().splitlines()
    out.write_text("\n".join([*lines[:3], lines[4]]))  # without the first seed of what learns, and the end of a line
    monkeypatch.setattr(study, "SIDE", 10)
    monkeypatch.setattr(study, "NOISES", (0.1, 0.2))
    command.main(arguments(tmp_path))
    again = [json.loads(each) for each in out.read_text().splitlines()]
    assert [(told["method"], told["seed"]) for told in again[3:]] == [(LEARNED, 1), (LEARNED, 0)]
    assert again[4]["test"]["0.1"]["psnr"] == json.loads(lines[3])["test"]["0.1"]["psnr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--steps", "-1"], "--steps must be at least 1, got -1"),
        (["--methods", "asa"], "invalid choice: 'asa'"),
        (["--out", "results.txt"], "--out must end in .jsonl, got 'results.txt'"),
        (["--out", "no/such/folder.jsonl"], "there is no folder 'no/such'"),
    ],
)
def test_studies_that_cannot_be(finished, options, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments(finished, *options))
    assert message in capsys.readouterr().err


def test_results_of_another_study(finished, tmp_path, monkeypatch):
    out = copy(finished, tmp_path)
    before = out.read_bytes()
    with pytest.raises(command.StudyError, match="has crops of 12 pixels, expected at least 32"):
        command.main(arguments(tmp_path))
    monkeypatch.setattr(study, "SIDE", 10)
    with pytest.raises(command.StudyError, match="is of steps 2, not 3: name another with --out"):
        command.main(arguments(tmp_path, "--steps", "3"))
    Photographs(part(0, 3), part(2, 2)).save(tmp_path / "set.npz")
    with pytest.raises(command.StudyError, match="is of photographs '"):
        command.main(arguments(tmp_path))
    assert out.read_bytes() == before
    twice = before.decode() + before.decode().splitlines()[-1]
    for text, message in (
        ("no JSON\n", "line 1, is broken"),
        ("{}\n", "line 1, is not of this study: it has "),
        (before.decode().replace('"tail"', '"head"'), "line 1, has no constants of tail: begin another file"),
        (twice, "line 6, 'ASA, alpha and h learned' of seed 1, is of no method, or there before"),
    ):
        out.write_text(text)
        with pytest.raises((files.FileError, command.StudyError), match=message):
            command.main(arguments(tmp_path))
        assert out.read_text() == text
    with pytest.raises(command.StudyError, match="holds no results yet"):
        command.main([*arguments(tmp_path), "--report", "--out", str(tmp_path / "nothing.jsonl")])


SPLITS = ("denoising", "denoising-85")


@pytest.mark.parametrize("name", SPLITS)
def test_committed_tables_are_of_the_committed_results(name, tmp_path, capsys):
    results, path = RESULTS / f"{name}.jsonl", tmp_path / f"{name}.jsonl"
    path.write_bytes(results.read_bytes())
    command.main(["--report", "--out", str(path)])
    assert path.with_suffix(".md").read_text() == results.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_committed_splits_test_on_different_photographs():
    runs = [command.read(RESULTS / f"{name}.jsonl")[1][methods.REFERENCE][0] for name in SPLITS]
    first, second = (told["test"]["0.1"]["psnr"].keys() for told in runs)
    assert len(first) == len(second) == 20 and not first & second
