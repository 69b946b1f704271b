"""Training layers with thresholds: parameter groups, a schedule from dense attention, and a monitor."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from asa_ops import asa_attention, nn, reciprocal_neighbors
from asa_ops.core.layout import to_map
from asa_ops.nn.training import attend, scheduled

OPTIONS = [  # of blocks
    {},
    {"heads": 2, "topk": 40, "local": False},
    {"threshold_activation": "softplus", "impl": "blocked"},
    {"impl": "reference"},
    {"published": True},
    {"dims": 1, "window": 5},
    {"dims": 3, "threshold_grad": None},
]
SIDES = {1: (150,), 2: (10, 17), 3: (3, 5, 9)}
each_kind = pytest.mark.parametrize("options", OPTIONS, ids=str)


def attending(**options) -> nn.AdaptiveSparseAttention:
    """Return a block whose weights and thresholds make a difference."""
    block = nn.AdaptiveSparseAttention(16, **options)
    for conv in (block.query, block.key, block.proj):
        torch.nn.init.normal_(conv.weight, std=0.3)
    torch.nn.init.constant_(block.alpha.bias, 1.0)
    return block


def network() -> torch.nn.Sequential:
    inner = torch.nn.Sequential(attending(local=False), torch.nn.ReLU())
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), attending(), inner)


def output_and_gradients(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


# Parameter groups.


def test_thresholds_have_a_learning_rate_of_their_own():
    model = network()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = nn.parameter_groups(model, lr=0.5, threshold_rate=0.1)
    assert [(group["name"], group["lr"]) for group in groups] == [("base", 0.5), ("thresholds", 0.05)]
    found = [[names[id(p)] for p in group["params"]] for group in groups]
    convolutions = ("1.alpha", "1.beta", "2.0.alpha")
    assert found[1] == [f"{name}.{kind}" for name in convolutions for kind in ("weight", "bias")]
    assert sorted(found[0] + found[1]) == sorted(names.values())


def test_each_parameter_is_in_one_group():
    model = network()
    model.append(model[1])  # a block twice
    model[2][0].alpha = model[1].alpha  # a convolution of two blocks
    model.append(torch.nn.Conv2d(16, 1, 3, padding=1))
    model[-1].bias = model[1].beta.bias  # what a threshold shares with something else
    model[0].requires_grad_(False)
    model[1].query.bias.requires_grad_(False)
    base, thresholds = (group["params"] for group in nn.parameter_groups(model, 1.0))
    expected = {p for p in model.parameters() if p.requires_grad}
    assert set(base) | set(thresholds) == expected and len(base) + len(thresholds) == len(expected)
    assert set(thresholds) == {*model[1].alpha.parameters(), *model[1].beta.parameters()}
    for conv in (model[1].alpha, model[1].beta):
        conv.requires_grad_(False)
    assert [group["name"] for group in nn.parameter_groups(model, 1.0)] == ["base"]
    assert [group["name"] for group in nn.parameter_groups(torch.nn.Linear(2, 2), 1.0)] == ["base"]


def test_schedulers_scale_both_groups():
    model, x = network(), torch.randn(1, 3, 6, 7)
    for rate in (0.1, 0):
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(nn.parameter_groups(model, 1e-5, rate), momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        for factor in (1, 0.853553, 0.5):
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == pytest.approx([1e-5 * factor, 1e-5 * factor * rate], rel=1e-4, abs=0)
            output_and_gradients(model, x)
            optimizer.step()
            scheduler.step()
        moved = {name: not torch.equal(y, before[name]) for name, y in model.state_dict().items()}
        assert moved["1.proj.weight"] and moved["1.alpha.weight"] == moved["2.0.alpha.bias"] == (rate > 0)


# The schedule.


@each_kind
def test_schedule_goes_from_dense_attention_to_the_plain_block(options):
    block, x = attending(**options), torch.randn(2, 16, *SIDES[options.get("dims", 2)])
    plain = output_and_gradients(block, x)
    tokens, names = block.tokens(x), list(block.state_dict())
    schedule = nn.ThresholdSchedule(block, 2, 6)
    assert list(block.state_dict()) == names and not any(p.requires_grad for p in block.buffers())
    for factor in (0, 0, 0, 0.25, 0.5, 0.75, 1, 1):
        assert schedule.factor == factor
        assert torch.equal(block.tokens(x)["alpha"], tokens["alpha"] * factor)
        if not factor:
            _, stats = asa_attention(**block.tokens(x), return_stats=True)
            n = x[0, 0].numel()
            if "topk" in options:  # as dense as topk allows
                _, expected = asa_attention(**tokens | {"alpha": None}, return_stats=True)
                assert torch.equal(stats.survivors, expected.survivors)
            else:
                assert (stats.survivors == n).all()
                q, k, v = (tokens[name] for name in ("query", "key", "value"))
                out = F.scaled_dot_product_attention(q, k, v, scale=tokens["scale"])
                torch.testing.assert_close(block(x), x + block.norm(block.proj(to_map(out, x.shape[2:]))))
            gradients = output_and_gradients(block, x)
            assert all(y.isfinite().all() for y in gradients) and not block.alpha.weight.grad.any()
        schedule.step()
    found = output_and_gradients(block, x)
    assert all(torch.equal(y, z) for y, z in zip(found, plain, strict=True))
    schedule.remove()
    assert not list(block.buffers()) and torch.equal(block(x), plain[0])


def test_schedule_goes_on_where_it_was_saved():
    block, x = attending(), torch.randn(1, 16, 6, 7)
    schedule = nn.ThresholdSchedule(block, 1, 5)
    for _ in range(3):
        schedule.step()
    state, weights, expected = schedule.state_dict(), block.state_dict(), block(x)
    other = nn.AdaptiveSparseAttention(16)
    resumed = nn.ThresholdSchedule(other, 0, 100)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert (resumed.start, resumed.stop, resumed.last_step, resumed.factor) == (1, 5, 3, 0.5)
    assert torch.equal(other(x), expected)
    average = torch.optim.swa_utils.AveragedModel(block)
    schedule.step()
    average.update_parameters(block)
    assert torch.equal(average(x), block(x)) and not torch.equal(block(x), expected)
    assert nn.ThresholdSchedule(block, 4, 4).factor == 0  # one that jumps


def test_schedule_and_monitor_compile_once():
    """Not again for each value of the factor, nor for each step that is watched."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block, x = attending(), torch.randn(1, 16, 6, 7)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    schedule = nn.ThresholdSchedule(block, 1, 3)
    for _ in range(4):
        torch.testing.assert_close(output_and_gradients(compiled, x), output_and_gradients(block, x))
        schedule.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with nn.monitor(compiled, tiles=True) as watched:
        for _ in range(3):
            found = [(function(x), watched.statistics())[1] for function in (compiled, block)]
            assert found[0] == pytest.approx(found[1]) and len(found[0]) == 16
            assert "_orig_mod/active_tiles" in found[0]
    torch.testing.assert_close(output_and_gradients(compiled, x), output_and_gradients(block, x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# The monitor.


def summary(x: Tensor) -> dict[str, float]:
    values = {"mean": x.mean(), "min": x.min(), "max": x.max()}
    ordered = x.flatten().sort().values
    values |= {f"q{q:02}": ordered[round(q / 100 * (x.numel() - 1))] for q in (5, 50, 95)}
    return {name: value.item() for name, value in values.items()}


THRESHOLD = ("mean", "min", "max", "q05", "q50", "q95")
FOUND = {f"{layer}/{x}" for layer in ("1", "2.0") for x in ("survivors", "density", "mass")}
FOUND |= {
    f"{layer}/{x}"
    for layer, kind in (("1", "alpha"), ("1", "beta"), ("2.0", "alpha"))
    for x in (f"{kind}_{statistic}" for statistic in THRESHOLD)
}


@each_kind
def test_monitor_counts_and_changes_nothing(options):
    block, x = attending(**options), torch.randn(2, 16, *SIDES[options.get("dims", 2)])
    model = torch.nn.Sequential(block, torch.nn.ReLU())
    plain, attributes = output_and_gradients(model, x), set(vars(block))
    with nn.monitor(model) as watched:
        found = output_and_gradients(model, x)
        statistics = watched.statistics()
        assert watched.statistics() == {}
    assert all(torch.equal(y, z) for y, z in zip(found, plain, strict=True))
    assert set(vars(block)) == attributes

    tokens = block.tokens(x)
    expected = {f"0/alpha_{name}": y for name, y in summary(tokens["alpha"]).items()}
    if block.beta is not None:
        expected |= {f"0/beta_{name}": y for name, y in summary(tokens["beta"]).items()}
    if not options.get("published"):  # whose artefacts add survivors
        _, (lse, lse_kept, survivors) = asa_attention(**tokens, return_stats=True)
        expected["0/survivors"] = survivors.double().mean().item()
        expected["0/mass"] = (lse_kept - lse).exp().mean().item()
        expected["0/density"] = expected["0/survivors"] / x[0, 0].numel()
        assert 0 < expected["0/density"] < 1 and 0 < expected["0/mass"] < 1
    assert {name: statistics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert all(type(y) is float for y in statistics.values())


class Tokens(torch.nn.Module):
    """A layer of tokens with a threshold that is a parameter, as asa_ops.nn.training asks for it."""

    asa_thresholds = ("threshold",)

    def __init__(self, **options):
        super().__init__()
        self.threshold, self.options = torch.nn.Parameter(torch.tensor(1.5)), options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        alpha = scheduled(self, self.threshold)
        tokens = {"query": x, "key": x, "value": x, "alpha": alpha, "key_padding_mask": mask}
        return attend(self, asa_attention, **tokens, **self.options)


@pytest.mark.parametrize("grid", [None, (150,), (16, 24), (10, 17), (4, 16, 4), (5, 5, 9)], ids=str)
def test_monitor_counts_active_tiles(grid):
    n = 300 if grid is None else math.prod(grid)
    side = {1: 64, 2: 8, 3: 4}[len(grid or (n,))]
    places = torch.cartesian_prod(*map(torch.arange, grid or (n,))).view(n, -1) // side
    order = sorted(range(n), key=lambda token: (places[token].tolist(), token))
    tile = {token: i // 64 for i, token in enumerate(order)}

    groups = torch.empty(2, 2, n, dtype=torch.int64)  # of tokens that attend to each other, in runs of 50
    groups[..., order] = torch.randint(9, (2, 2, n // 50 + 1)).repeat_interleave(50, -1)[..., :n]
    x = 4 * F.one_hot(groups, 9).float()
    layer = Tokens(beta=None if grid is None else 0.9, grid=grid)
    with nn.monitor(layer, tiles=True) as watched:
        layer(x)
        found = watched.statistics()["active_tiles"]
        layer.threshold = torch.nn.Parameter(torch.full((2, n), 1.5))  # of each head and token
        layer(x)
        assert watched.statistics()["active_tiles"] == found
    graph = reciprocal_neighbors(x[:1, :1], x[:1, :1], 1.5, **layer.options)
    rows = torch.arange(n).repeat_interleave(graph.row_offsets.diff()).tolist()
    tiles = {(tile[row], tile[column]) for row, column in zip(rows, graph.col_indices.tolist(), strict=True)}
    share = len(tiles) / len(set(tile.values())) ** 2
    assert found == pytest.approx(share) and 0.1 < share < 1


def test_monitor_leaves_padding_out():
    layer, x = Tokens(), torch.randn(2, 2, 100, 8)
    real = torch.arange(100) < torch.tensor([[70], [40]])
    found = []
    with nn.monitor(layer, tiles=True) as watched:
        layer(x, real)
        found.append(watched.statistics())
        by_image = []
        for image, n in enumerate((70, 40)):
            layer(x[image : image + 1, :, :n])
            by_image.append(watched.statistics())
    (padded,) = found
    for name in ("survivors", "density", "mass"):
        expected = (70 * by_image[0][name] + 40 * by_image[1][name]) / 110
        assert padded[name] == pytest.approx(expected, rel=1e-5)
    assert padded["alpha_mean"] == padded["alpha_q95"] == 1.5
    assert padded["active_tiles"] == 1 == by_image[0]["active_tiles"]
    (thresholds,) = nn.parameter_groups(layer, 1.0)
    assert thresholds["name"] == "thresholds" and thresholds["params"] == [layer.threshold]


class Waits(TorchDispatchMode):
    """Counts the operators whose results decide what is called next: on a GPU each would wait for it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._opname in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
        return function(*args, **kwargs or {})


def test_monitor_does_not_wait_for_numbers():
    model, x = network(), torch.randn(1, 3, 6, 7)
    with nn.monitor(model, tiles=True) as watched, Waits() as waits:
        model(x)
        watched.statistics()
        assert waits.count == 0
        x.sum().item()
    assert waits.count == 1


def test_monitor_of_layers_that_are_not_called():
    model = network()
    watched = nn.monitor(model)
    assert watched.statistics() == {}
    model[:2](torch.randn(1, 3, 6, 7))
    assert {name.partition("/")[0] for name in watched.statistics()} == {"1"}
    model(torch.randn(0, 3, 6, 7))  # an empty batch
    assert watched.statistics() == {}
    model(torch.randn(1, 3, 6, 7))
    copied = copy.deepcopy(model)
    other = nn.monitor(copied)
    copied(torch.randn(1, 3, 6, 7))
    torch.func.grad(lambda x: model(x).sum())(torch.randn(1, 3, 6, 7))
    assert watched.statistics().keys() == other.statistics().keys() == FOUND
    torch.func.grad(lambda x: model(x).sum())(torch.randn(1, 3, 6, 7))
    assert watched.statistics() == {}
    with nn.monitor(model):
        model(torch.randn(1, 3, 6, 7))
    watched.remove()
    assert not any(name.startswith("asa_") for name in vars(model[1]))


def test_monitor_of_parts_of_a_wrapper():
    """A compiled module shows the attributes of its own, and is one layer nevertheless."""
    block = torch.compile(attending(), backend="eager")
    with nn.monitor(block) as watched:
        block._orig_mod(torch.randn(1, 16, 6, 7))
        assert "_orig_mod/density" in watched.statistics()
    assert len(nn.parameter_groups(block, 1.0)[1]["params"]) == 4


def test_two_schedules_of_a_model_are_removed():
    block, x = attending(), torch.randn(1, 16, 6, 7)
    expected = block(x)
    schedules = [nn.ThresholdSchedule(block, 0, 4) for _ in range(2)]
    for schedule in schedules:
        schedule.remove()
    assert torch.equal(block(x), expected) and not list(block.buffers())


def test_an_infinite_threshold_begins_as_dense():
    layer, dense = (nn.AdaptiveSparseSelfAttention(16, num_heads=2, alpha=alpha) for alpha in (torch.inf, 0.0))
    dense.load_state_dict({name: x for name, x in layer.state_dict().items() if name != "alpha"})
    nn.ThresholdSchedule(layer, 0, 4)
    x = torch.randn(2, 9, 16)
    assert torch.equal(layer(x), dense(x))


# Errors.

BLOCK = nn.AdaptiveSparseAttention(8)
NO_LAYER = "model must have a layer with thresholds, .* Linear has none"


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: nn.parameter_groups("block", 1.0), TypeError, "model must be a torch.nn.Module, got 'block'"),
        (lambda: nn.parameter_groups(BLOCK, "fast"), TypeError, "lr must be a number, got 'fast'"),
        (lambda: nn.parameter_groups(BLOCK, -1.0), ValueError, r"lr must be >= 0 and finite, got -1.0"),
        (lambda: nn.parameter_groups(BLOCK, 1.0, float("nan")), ValueError, "threshold_rate must be .* got nan"),
        (lambda: nn.parameter_groups(torch.nn.ReLU(), 1.0), ValueError, "must have a parameter .*; ReLU has none"),
        (lambda: nn.monitor(torch.nn.Linear(2, 2)), ValueError, NO_LAYER),
        (lambda: nn.monitor(None), TypeError, "model must be a torch.nn.Module, got None"),
        (lambda: nn.ThresholdSchedule(torch.nn.Linear(2, 2), 0, 1), ValueError, NO_LAYER),
        (lambda: nn.ThresholdSchedule(BLOCK, 0.5, 1), TypeError, "start must be an integer >= 0, got 0.5"),
        (lambda: nn.ThresholdSchedule(BLOCK, 0, 0), ValueError, "stop must be >= 1, got stop=0"),
        (lambda: nn.ThresholdSchedule(BLOCK, 3, 2), ValueError, "start=3 and stop=2"),
        (lambda: nn.ThresholdSchedule(nn.build("asa", 8, device="meta"), 0, 1), ValueError, "meta device"),
    ],
)
def test_errors_of_training(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert not list(BLOCK.buffers()) and not hasattr(BLOCK, "asa_monitored")
