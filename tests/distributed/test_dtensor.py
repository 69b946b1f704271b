"""DTensors: what the processes of a mesh compute, split by batch, heads or tokens, is what one process computes."""

import functools
import subprocess
import sys
from dataclasses import replace

import block_cases
import pytest
import torch
from cases import make, named
from implementations import slow
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

import asa_ops
from asa_ops import asa_attention, criss_cross_attention, distributed, nn

pytestmark = pytest.mark.xdist_group("processes")
WHOLE, BATCH, HEADS, TOKENS = Replicate(), Shard(0), Shard(1), Shard(2)
CASES = ["plain", "dense", "topk", "padding", "more_keys", "head_thresholds", "empty_batch", "one_token"]
MESHES = {
    "1": [(BATCH,), (TOKENS,)],
    "2": [(WHOLE,), (BATCH,), (HEADS,), (TOKENS,)],
    "4": [(BATCH,), (HEADS,), (TOKENS,)],
    "2x2": [(BATCH, HEADS), (HEADS, BATCH), (BATCH, TOKENS), (TOKENS, HEADS), (WHOLE, TOKENS), (BATCH, BATCH)],
}


def shape_of(mesh: str) -> tuple[int, ...]:
    return tuple(map(int, mesh.split("x")))


@functools.cache  # a process makes its groups once
def mesh_of(group, mesh: str) -> DeviceMesh:
    shape = shape_of(mesh)
    return DeviceMesh.from_group(group, "cpu") if len(shape) == 1 else init_device_mesh("cpu", shape)


def distribute(x, mesh: DeviceMesh, placements: tuple, grad: bool = True):
    """Return a leaf with these placements."""
    if not isinstance(x, Tensor):
        return x
    kept = [WHOLE if placement.is_partial() else placement for placement in placements]
    local = distribute_tensor(x.detach(), mesh, kept).to_local()
    for dim, placement in enumerate(placements):
        local = local / mesh.size(dim) if placement.is_partial() else local
    x = DTensor.from_local(local, mesh, placements, shape=x.shape, stride=x.contiguous().stride()).detach()
    return x.requires_grad_() if grad and x.is_floating_point() else x


def beside(x, placements: tuple) -> tuple:
    """Return the placements of a threshold beside a query: split as it is, as far as there is something to split."""
    if not isinstance(x, Tensor):
        return placements
    dims = [placement.dim - 3 + x.dim() if isinstance(placement, Shard) else -1 for placement in placements]
    return tuple(Shard(dim) if dim >= 0 and x.shape[dim] > 1 else WHOLE for dim in dims)


def like_query(tensors: list, placements: tuple) -> list[tuple]:
    """Return the placements of query, key, value, alpha and beta."""
    return [placements] * 3 + [beside(x, placements) for x in tensors[3:]]


def of_mask(placements: tuple) -> tuple:
    return tuple({BATCH: BATCH, TOKENS: Shard(1)}.get(placement, WHOLE) for placement in placements)


def weights(shape) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


def results(function, tensors: list, options: dict, backward) -> list:
    """Return outputs, and the gradients of all tensors, None for the others."""
    out, *stats = function(*tensors, **options)
    backward(out)
    return [out, *(stats[0] if stats else ()), *(x.grad if isinstance(x, Tensor) else None for x in tensors)]


def of_one_process(function, tensors: list, options: dict) -> list:
    tensors = [x.detach().clone().requires_grad_() if isinstance(x, Tensor) else x for x in tensors]
    return results(function, tensors, options, lambda out: out.backward(weights(out.shape).to(out.dtype)))


def of_this_process(group, rank: int, mesh: str, function, tensors: list, placements: list, options: dict) -> tuple:
    """Return the placements of the output, and the same as one process does, gathered."""
    mesh = mesh_of(group, mesh)
    options = {name: distribute(x, mesh, of_mask(placements[0])) for name, x in options.items()}
    tensors = [distribute(x, mesh, where) for x, where in zip(tensors, placements, strict=True)]

    def backward(out):
        out.backward(distribute_tensor(weights(out.shape).to(out.dtype), mesh, out.placements))

    found = results(function, tensors, options, backward)
    assert all(x is None or type(x) is DTensor for x in found)
    for x in tensors:
        if isinstance(x, Tensor):
            expected = [WHOLE if placement.is_partial() else placement for placement in x.placements]
            assert list(x.grad.placements) == expected, (x.placements, x.grad.placements)
    return found[0].placements, [x if x is None else x.detach().full_tensor() for x in found]


def call(*args, **options):
    """asa_attention with its statistics, by the implementation that gives the same bits however it is split."""
    return asa_attention(*args, **options, impl="cpu", threshold_grad="straight_through", return_stats=True)


def check(processes, mesh: str, tensors: list, placements: list, options: dict, function=call, exact: int = 7):
    """Compare with one process, the first ``exact`` results to the last bit; return where the output is."""
    expected = of_one_process(function, tensors, options)
    size = torch.Size(shape_of(mesh)).numel()
    answers = processes.run(size, of_this_process, mesh, function, tensors, placements, options)
    for _, found in answers:
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            if y is None:
                assert x is None
            elif i < exact:
                assert torch.equal(x, y) or torch.equal(x.nan_to_num(7), y.nan_to_num(7)), (i, x - y)
            else:  # sums over heads or images in another order
                torch.testing.assert_close(x, y, equal_nan=True)
    return answers[0][0]


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        slow(mesh, name, when=mesh == "4" or (mesh == "2x2" and name not in ("plain", "padding")))
        for mesh in MESHES
        for name in CASES
    ],
)
def test_dtensors_equal_one_process(processes, mesh, name):
    """Three images and heads: over two and four processes parts have different sizes, or are empty."""
    case = named(name)
    if name in ("plain", "topk"):  # more than one block of tokens
        case = replace(case, grid=(9, 17))
    tensors, options = make(replace(case, batch=min(3, 2 * case.batch), heads=3), torch.float32)
    for where in MESHES[mesh]:
        placements = like_query(tensors, where)
        assert check(processes, mesh, tensors, placements, options) == where


@pytest.mark.parametrize("shape", [(), slow((63,)), (3, 1), (1, 1, 63), slow((3, 1, 1))], ids=str)
def test_thresholds_broadcast(processes, shape):
    """A threshold for several images, heads or tokens gets the sum of what processes find."""
    tensors, options = make(replace(named("plain"), batch=3, heads=3), torch.float32)
    tensors[3:] = [torch.rand(shape) + 0.5, torch.rand(shape) + 0.5]
    for mesh in ("2", "2x2"):
        for where in MESHES[mesh]:
            assert check(processes, mesh, tensors, like_query(tensors, where), options) == where


def test_numbers_are_thresholds(processes):
    tensors, options = make(named("padding"), torch.float32)
    tensors[3:] = [1.2, 0.7]
    for where in MESHES["2"]:
        assert check(processes, "2", tensors, [where] * 5, options) == where


@pytest.mark.parametrize(
    ("heads", "key_heads", "split"), [(4, 2, True), (4, 1, True), (3, 1, True), (6, 3, False), (2, 2, True)]
)
def test_heads_that_share_keys(processes, heads, key_heads, split):
    """Heads are split where every part has the keys that it shares, or all share them; else all are gathered."""
    tensors, options = make(replace(named("plain"), heads=heads), torch.float32)
    tensors[1:3] = [x[:, :key_heads] for x in tensors[1:3]]
    shared = (HEADS,) if key_heads > 1 else (WHOLE,)
    placements = [(HEADS,), shared, shared, (WHOLE,), (WHOLE,)]
    # Where all heads share a key its gradient is a sum over processes.
    exact = 7 if key_heads > 1 else 4
    assert check(processes, "2", tensors, placements, options, exact=exact) == ((HEADS,) if split else (WHOLE,))


PARTIAL, DIM = Partial(), Shard(3)
MIXED = [  # of query, key, value; and of the output
    ("2", [(BATCH,), (WHOLE,), (WHOLE,)], (BATCH,)),
    ("2", [(WHOLE,), (HEADS,), (HEADS,)], (HEADS,)),
    ("2", [(WHOLE,), (WHOLE,), (TOKENS,)], (TOKENS,)),
    ("2", [(BATCH,), (HEADS,), (HEADS,)], (HEADS,)),
    ("2", [(BATCH,), (BATCH,), (TOKENS,)], (BATCH,)),
    ("2", [(DIM,), (DIM,), (DIM,)], (WHOLE,)),
    ("2", [(PARTIAL,), (PARTIAL,), (WHOLE,)], (WHOLE,)),
    ("2", [(PARTIAL,), (DIM,), (BATCH,)], (BATCH,)),
    ("2x2", [(BATCH, HEADS), (HEADS, BATCH), (BATCH, HEADS)], (BATCH, HEADS)),
    ("2x2", [(TOKENS, TOKENS)] * 3, (TOKENS, WHOLE)),
    ("2x2", [(BATCH, DIM), (BATCH, PARTIAL), (WHOLE, TOKENS)], (BATCH, TOKENS)),
]


@pytest.mark.parametrize(("mesh", "placements", "expected"), MIXED, ids=str)
def test_placements_that_differ_are_redistributed(processes, mesh, placements, expected):
    tensors, options = make(replace(named("plain"), batch=3, heads=3), torch.float32)
    thresholds = (WHOLE,) * len(placements[0])
    found = check(processes, mesh, tensors, [*placements, thresholds, thresholds], options)
    assert found == expected


def under_autocast(*args, **options):
    with torch.autocast("cpu", torch.bfloat16):
        return call(*args, **options)


def test_is_cast_under_autocast(processes):
    tensors, options = make(named("plain"), torch.float32)
    for where in MESHES["2"]:
        check(processes, "2", tensors, like_query(tensors, where), options, under_autocast)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_other_implementations(processes, impl):
    tensors, options = make(named("plain"), torch.float64)
    function = functools.partial(asa_attention, impl=impl, return_stats=True)
    for where in MESHES["2"]:
        check(processes, "2", tensors, like_query(tensors, where), options, function, exact=0)


class Block:
    """A case of a block's function, called with a flat list of tensors."""

    def __init__(self, case: block_cases.Case):
        self.case = case

    def __call__(self, *tensors):
        return (self.case.op(**block_cases.unflat(self.case, tensors), **self.case.options),)


MORE_CASES = (
    "gaussian_padded_query",
    "channel_empty",
    "axial_plain",
    "axial_video",
    "squeeze_sequence",
    "squeeze_video",
)


@pytest.mark.parametrize("name", [*block_cases.CONTRACT_CASES, *MORE_CASES])
def test_blocks_equal_one_process(processes, name):
    """They split batch and heads; of maps the channels where these do not mix; other dimensions are gathered."""
    case = block_cases.named(name)
    tensors = block_cases.flat(block_cases.make(case))
    channels = (HEADS,) if case.stem != "channelized_axial" else (WHOLE,)
    for mesh, where, expected in [
        ("2", (BATCH,), (BATCH,)),
        ("2", (HEADS,), channels),
        ("2", (TOKENS,), (WHOLE,)),
        ("2x2", (HEADS, BATCH), (*channels, BATCH)),
    ]:
        placements = [where if x.dim() > 2 else (WHOLE,) * len(where) for x in tensors]
        assert check(processes, mesh, tensors, placements, {}, Block(case), exact=0) == expected


def cross(*args):
    return (criss_cross_attention(*args, impl="cpu"),)


def test_criss_cross_equals_one_process(processes):
    tensors = [torch.randn(3, channels, 5, 7) for channels in (4, 4, 6)]
    for mesh, where, expected in [
        ("2", (BATCH,), (BATCH,)),
        ("2", (HEADS,), (WHOLE,)),
        ("4", (BATCH,), (BATCH,)),
        ("2x2", (BATCH, TOKENS), (BATCH, WHOLE)),
    ]:
        assert check(processes, mesh, tensors, [where] * 3, {}, cross, exact=4) == expected


def in_a_module(group, rank: int, name: str) -> tuple:
    """Return output and gradients of a block whose images are split, then those of one process."""
    mesh, found = mesh_of(group, "2"), []
    for distributed_too in (True, False):
        torch.manual_seed(0)
        block, x = block_cases.alive(nn.build(name, 8)), torch.randn(3, 8, 6, 5)
        if distributed_too:
            block, x = distribute_module(block, mesh), distribute_tensor(x, mesh, (BATCH,))
        out = block(x)
        out.sum().backward()
        results = [out, *(parameter.grad for parameter in block.parameters())]
        found.append([x.detach().full_tensor() if isinstance(x, DTensor) else x.detach() for x in results])
    return tuple(found)


@pytest.mark.parametrize("name", ["asa", "criss_cross"])
def test_modules_split_the_batch(processes, name):
    for split, one in processes.run(2, in_a_module, name):
        torch.testing.assert_close(split, one, rtol=1e-4, atol=1e-5)


ERRORS = {
    "key must be a DTensor as query is": lambda x, plain: asa_attention(x, plain, x),
    "alpha must be a DTensor as query is": lambda x, plain: asa_attention(x, x, x, plain[..., 0]),
    "key is a DTensor among plain tensors": lambda x, plain: asa_attention(plain, x, plain),
    "alpha is a DTensor among plain tensors": lambda x, plain: asa_attention(plain, plain, plain, x[..., 0]),
    "key_padding_mask is a DTensor among plain tensors": lambda x, plain: asa_attention(
        plain, plain, plain, key_padding_mask=x[:, 0, :, 0] > 0
    ),
    "key must lie on the mesh of query": lambda x, plain: asa_attention(x, elsewhere(x), x),
    "query must have the 4 dimensions": lambda x, plain: asa_attention(x[0, 0, 0], x, x),
    "value must have the batch of query": lambda x, plain: asa_attention(x, x, distribute(plain[:1], *where(x))),
    "value must have the heads of key": lambda x, plain: asa_attention(x, x, distribute(plain[:, :1], *where(x))),
    "window must be odd": lambda x, plain: asa_attention(x, x, x, window=2),
    "N_k = 6, got topk=7": lambda x, plain: asa_attention(x, x, x, topk=7),
    "value must be a DTensor as query is": lambda x, plain: asa_ops.linear_attention(x, x, plain),
    "value is a DTensor among plain tensors": lambda x, plain: asa_ops.linear_attention(plain, plain, x),
    "unexpected keyword argument": lambda x, plain: asa_ops.linear_attention(query=x, key=x, value=x, scale=1.0),
    "a graph is no DTensor": lambda x, plain: asa_ops.reciprocal_neighbors(x, x),
    "query is a DTensor among plain tensors": lambda x, plain: distributed.asa_attention(
        x, x, x, group=x.device_mesh.get_group()
    ),
}


def where(x: DTensor) -> tuple:
    return x.device_mesh, x.placements


def elsewhere(x: DTensor) -> DTensor:
    mesh = DeviceMesh.from_group(x.device_mesh.get_group(), "cpu", mesh_dim_names=("other",))
    return DTensor.from_local(x.to_local(), mesh, x.placements)


def raises(group, rank: int, message: str, placement) -> None:
    plain = torch.randn(2, 2, 6, 4)
    x = distribute_tensor(plain, mesh_of(group, "2"), (placement,))
    with pytest.raises((TypeError, ValueError), match=message):
        ERRORS[message](x, plain)


@pytest.mark.parametrize("placement", [BATCH, HEADS, TOKENS], ids=str)
def test_errors_are_the_same_in_every_process(processes, placement):
    for message in ERRORS:
        processes.run(2, raises, message, placement)


def explained(group, rank: int) -> str:
    return asa_ops.explain(distribute_tensor(torch.randn(2, 2, 6, 4), mesh_of(group, "2"), (BATCH,)))


def test_explain_takes_dtensors(processes):
    assert set(processes.run(2, explained)) == {asa_ops.explain(torch.randn(2, 2, 6, 4))}


def compiled(backend: str, anew: bool, *args, **options):
    if not isinstance(args[0], DTensor):
        return call(*args, **options)
    if anew:
        torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend=backend)(*args, **options)


@pytest.mark.parametrize(
    ("mesh", "split", "backend"),
    [
        ("2", (BATCH,), "aot_eager"),
        pytest.param("2", (HEADS,), "aot_eager", marks=pytest.mark.slow),
        pytest.param("2x2", (BATCH, HEADS), "inductor", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiles_whole(processes, mesh, split, backend):
    """Forward and backward, split by batch or heads, in one graph."""
    tensors, options = make(replace(named("padding"), batch=4, heads=4, alpha="heads"), torch.float32)
    function = functools.partial(compiled, backend, True)
    assert check(processes, mesh, tensors, like_query(tensors, split), options, function) == split


@pytest.mark.slow
def test_compiles_for_batches_of_any_size(processes):
    for batch in (4, 6, 8):
        tensors, options = make(replace(named("padding"), batch=batch), torch.float32)
        function = functools.partial(compiled, "aot_eager", batch == 4)
        assert check(processes, "2", tensors, like_query(tensors, (BATCH,)), options, function) == (BATCH,)


def test_what_has_no_dtensors_does_not_import_them():
    program = (
        "import sys, torch, asa_ops; x = torch.nn.Parameter(torch.randn(1, 1, 4, 4)); asa_ops.asa_attention(x, x, x); "
        "asa_ops.linear_attention(x, x, x); sys.exit('torch.distributed.tensor' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
