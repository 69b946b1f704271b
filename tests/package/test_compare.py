"""The error rule of compare.py: it passes eager PyTorch, and small mistakes in copies of the ops fail."""

import contextlib
from dataclasses import replace

import compare
import pytest
import rounding
import torch
from block_cases import flat, unflat
from block_cases import make as make_block
from block_cases import named as block
from cases import make, named

from asa_ops.asa import reference
from asa_ops.asa.types import AsaStats


def attention(mistakes, query, key, value, alpha, beta, impl=None, return_stats=False, **options):
    """Run the reference in the precision of its inputs, with mistakes at some stages and in their gradients."""

    def hand_on(stage, x):
        if x.requires_grad and (change := mistakes.get(f"gradient of {stage}")):
            x = x.clone()
            x.register_hook(change)
        return mistakes.get(stage, lambda x: x)(x)

    real = reference.real_positions(query, key, options.get("key_padding_mask"))
    s = reference.scores(hand_on("query", query), hand_on("key", key), options.get("scale"), *real)
    grid, window = options.get("grid"), options.get("window", 3)
    found = reference.find_survivors(s, alpha, beta, grid, window, 0, options.get("topk"), True, *real)
    kept = mistakes.get("kept", lambda x: x)(found.kept)
    summed = mistakes.get("summed", lambda x: x)(kept)
    out, lse_kept = reference.attend(hand_on("scores", s), hand_on("value", value), summed)
    out = hand_on("out", out)
    lse = mistakes.get("lse", lambda x: x)(found.lse)
    stats = AsaStats(lse, lse_kept.detach(), mistakes.get("count", lambda x: x)(kept.sum(-1)))
    return (out, stats) if return_stats else kept


def check(monkeypatch, case, mistakes):
    inputs, options = make(case, torch.float32)
    monkeypatch.setattr(compare, "asa_attention", lambda *x, **y: attention(mistakes, *x, **y))
    monkeypatch.setattr(compare, "survivors", lambda impl, x, y: attention(mistakes, *x, **y))
    compare.check_against_reference("copy", inputs, options)


def one(value):
    """Return a change of a single number, or pair, of an image's head."""

    def change(x):
        x = x.clone()
        at = (1, 0, 11, int(x[1, 0, 11].float().abs().argmax())) if x.dim() == 4 else (1, 0, 11)
        x[at] = value(x[at])
        return x

    return change


def swapped(x):
    """Two rows in each other's place."""
    order = torch.arange(x.shape[2])
    order[[0, 1]] = order[[1, 0]]
    return x[:, :, order]


def dropped(kept):
    """The survivor of a row that is first of it, left out."""
    kept = kept.clone()
    kept[0, 0, 7, int(kept[0, 0, 7].float().argmax())] = False
    return kept


MISTAKES = {
    "a dropped key": {"summed": dropped},
    "a pair kept or dropped by mistake": {"kept": one(lambda x: ~x)},
    "the keys beside the survivors": {"kept": lambda kept: kept | kept.roll(1, -1)},
    "a count that is off by one": {"count": one(lambda x: x + 1)},
    "a scale that is off by 1e-4": {"scores": lambda s: s * (1 + 1e-4)},
    "a score that is off by 1e-4": {"scores": one(lambda x: x + 1e-4)},
    "scores in half precision": {"scores": lambda s: s.half().float()},
    "values in half precision": {"value": lambda v: v.half().float()},
    "an output in half precision": {"out": lambda x: x.half().float()},
    "two values in each other's place": {"value": swapped},
    "a normaliser that is off by 1e-5": {"out": lambda x: x * (1 - 1e-5)},
    "an output that is off by 1e-5": {"out": one(lambda x: x + 1e-5)},
    "a log-sum-exp that is off by 1e-4": {"lse": lambda x: x - 1e-4},
    "a log-sum-exp in half precision": {"lse": lambda x: x.half().float()},
    "a gradient of query that is off by 1e-4": {"gradient of query": lambda x: x * (1 + 1e-4)},
    "a gradient of key in half precision": {"gradient of key": lambda x: x.half().float()},
    "a gradient of value without one row": {"gradient of value": one(lambda x: 0)},
    "gradients of two keys in each other's place": {"gradient of key": swapped},
    "a gradient of scores in half precision": {"gradient of scores": lambda x: x.half().float()},
    "a gradient of scores with a delta that is off by 1e-4": {
        "gradient of scores": lambda x: x + 1e-4 * x.abs().mean()
    },
}


@pytest.mark.parametrize("name", ["plain", "sharp", "topk"])
def test_the_formula_itself_passes(monkeypatch, name):
    check(monkeypatch, named(name), {})


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_small_mistake_fails(monkeypatch, mistake):
    with pytest.raises(AssertionError):
        check(monkeypatch, replace(named("plain"), dim=16, dim_v=16), MISTAKES[mistake])


def without_one(x):
    """The same with one token that nothing comes from: a dropped key, or query."""
    return torch.cat([x[..., :1, :] * 0, x[..., 1:, :]], -2)


INPUT_MISTAKES = {
    "a dropped token": without_one,
    "two tokens in each other's place": swapped,
    "a scale that is off by 1e-4": lambda x: x * (1 + 1e-4),
    "half precision": lambda x: x.half().float(),
}
BLOCKS = [  # one of each way to compute
    *("gaussian_short", "dot_product", "concatenation", "linear", "efficient", "axial", "squeeze", "interlaced_long"),
    *("salient", "gaussian_fused"),
]


@pytest.mark.parametrize("mistake", [None, *INPUT_MISTAKES])
@pytest.mark.parametrize("name", BLOCKS)
def test_mistakes_in_blocks_fail(name, mistake):
    """Of the last tensor of a call: value, or the attention map."""
    case = block(name)
    tensors = make_block(case, torch.float32)
    last = [key for key, shape in case.tensors.items() if isinstance(shape, tuple) and len(shape) == 4][-1]

    def run(tensors, change=lambda x: x):
        out = case.reference(**(tensors | {last: change(tensors[last])}), **case.options)
        return [out, *torch.autograd.grad(out.square().sum(), flat(tensors))]

    ours = run(tensors, INPUT_MISTAKES.get(mistake, lambda x: x))
    exact = unflat(case, [x.detach().double().requires_grad_() for x in flat(tensors)])
    names = ["out", *map(str, range(1, len(ours)))]
    with contextlib.nullcontext() if mistake is None else pytest.raises(AssertionError):
        compare.check_errors(names, ours, lambda: run(exact), exp_ulps=20 if case.fused else 0)


def test_what_rounding_may_do():
    """As rounded partial sums in random order do, half a unit in the last place, or nothing where numbers are moved."""
    x = torch.rand(2000, dtype=torch.float64) - 0.3
    u = torch.finfo(torch.float32).eps / 2

    def errors(compute):
        results = rounding.evaluations(lambda: [compute()], torch.float32, count=200)
        return torch.stack([result[0] - compute() for result in results])

    assert 0.9 < errors(lambda: x * 3).abs().max() / (u * (x * 3).abs().max()) <= 1
    assert not errors(lambda: x.flip(0)[None].expand(2, -1).clamp(min=0).sort().values).any()
    orders = torch.stack([x[torch.randperm(2000)] for _ in range(200)])
    added = torch.zeros(200)
    for term in orders.T:
        added += term.float()
    really, expected = (added.double() - orders.float().double().sum(1)).std(), errors(lambda: x.sum()).std()
    assert 0.5 < really / expected < 2
    product = errors(lambda: x[None] @ torch.ones(2000, 1, dtype=torch.float64)).std()
    assert 0.7 < product / expected < 1.4
