"""What torch.onnx.export makes of the blocks and of asa_attention, in onnxruntime."""

import importlib.util
import itertools

import block_cases
import cases
import pytest
import torch
from implementations import slow
from torch import Tensor
from torch.export import Dim

from asa_ops import asa_attention, nn

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.xdist_group("onnx"),  # the exporter takes seconds to import
]


class Together(torch.nn.ModuleList):
    """Modules that are all given the same inputs, so that one export has them all."""

    def forward(self, *inputs: Tensor) -> list:
        return [module(*inputs) for module in self]


class Exported:
    """A program of torch.onnx.export, run by onnxruntime."""

    def __init__(self, model, inputs: tuple = (), **options):
        import onnxruntime

        program = torch.onnx.export(model, inputs, dynamo=True, verbose=False, **options)
        self.domains = {node.domain for node in program.model.graph.all_nodes()}
        self.session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        names = [x.name for x in self.session.get_inputs()]
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(x) for x in self.session.run(None, feed)]


def blocks_of(rows) -> Together:
    """Return the blocks of rows (name, options, ...), of 16 channels, none of which is the identity."""
    torch.manual_seed(0)
    blocks = Together(block_cases.alive(nn.build(name, 16, **options)) for name, options, *_ in rows)
    for name, parameter in blocks.named_parameters():
        if name.endswith(("query.weight", "key.weight", "alpha.weight", "beta.weight")):
            parameter.data *= 0.3 / parameter.std()  # as a trained block: scores and thresholds differ
    return blocks.eval().requires_grad_(False)


def maps_of(*sizes: tuple[int, ...], batches=(1, 2)) -> list[Tensor]:
    return [torch.randn(batch, 16, *size) for size, batch in itertools.product(sizes, batches)]


def check_blocks(program: Exported, blocks: Together, maps: list[Tensor]) -> None:
    for x in maps:
        for block, out, expected in zip(blocks, program(x), blocks(x), strict=True):
            tolerance = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(out, expected, rtol=0, atol=tolerance, msg=lambda text, b=block: f"{b}: {text}")


def any_size(dims: int) -> dict:
    return dict.fromkeys((0, *range(2, dims + 2)), Dim.DYNAMIC)


def rows_of(name: str, dims: int) -> list[tuple]:
    return [
        row for row in block_cases.MODULES + block_cases.OTHER_DIMS if row[0] == name and row[1].get("dims", 2) == dims
    ]


SIZES = {1: ((11,), (20,)), 2: ((6, 8), (9, 7)), 3: ((4, 5, 6), (5, 7, 4))}


@pytest.mark.parametrize(
    "name, dims", [slow(name, dims, when=True) for name in nn.available() for dims in SIZES], ids=str
)
def test_blocks_at_any_size(name, dims):
    blocks = blocks_of(rows_of(name, dims))
    sample = torch.randn(2, 16, *SIZES[dims][0])
    program = Exported(blocks, (sample,), dynamic_shapes=((any_size(dims),),))
    check_blocks(program, blocks, maps_of(*SIZES[dims]))
    assert program.domains == {""}  # ONNX's own operators


@pytest.mark.parametrize("name", [slow(name, when=name != "criss_cross") for name in nn.available()])
def test_blocks_at_one_size(name):
    blocks = blocks_of([row for row in rows_of(name, 2) if row[1] in ({}, {"published": True})] or rows_of(name, 2)[:1])
    sample, *others = maps_of(SIZES[2][0], batches=(2, 2))
    program = Exported(blocks, (sample,))
    check_blocks(program, blocks, others)
    assert program.domains == {""}


@pytest.mark.slow
def test_a_program_exported_before_at_any_size():
    (block,) = blocks = blocks_of([("asa", {})])
    exported = torch.export.export(block, (torch.randn(2, 16, 6, 8),), dynamic_shapes=(any_size(2),))
    program = Exported(exported)
    check_blocks(program, blocks, maps_of(*SIZES[2]))
    assert program.domains == {""}
    # It is the exporter to ONNX that replaces the op, nobody else.
    for each in (exported, exported.run_decompositions()):
        assert any("asa_ops" in str(node.target) for node in each.graph.nodes)


class Call(torch.nn.Module):
    """A call of asa_attention whose tensors are chosen by name from query, key, value, alpha, beta, mask."""

    def __init__(self, *names: str, shared: bool = False, **options):
        super().__init__()
        self.names, self.shared, self.options = names, shared, options

    def forward(self, query, key, value, alpha=None, beta=None, mask=None):
        given = {"alpha": alpha, "beta": beta, "key_padding_mask": mask}
        if self.shared:  # one key and value for all heads
            key, value = key[:, :1], value[:, :1]
        given = {name: x for name, x in given.items() if name in self.names}
        out, stats = asa_attention(query, key, value, **given, **self.options, return_stats=True)
        return out, *stats


CALLS = {
    "map": Call("beta", grid=(4, 6), window=(1, 5), scale=0.3, shared=True),
    "volume": Call("alpha", "beta", "mask", grid=(2, 3, 4), window=(3, 1, 3), topk=9),
    "extra_tokens": Call("alpha", "beta", extra_tokens=3, grid=(3, 7)),
    "one_way": Call("alpha", reciprocal=False, impl="blocked"),
}


def test_calls():
    def inputs() -> tuple[Tensor, ...]:
        query, key, value = torch.randn(3, 2, 2, 24, 6, dtype=torch.float64)
        alpha, beta = torch.rand(2, 2, 2, 24, dtype=torch.float64) * 2
        alpha[:, :, :3] = torch.inf  # rows without survivors, where there is no beta
        return 1.5 * query, key, value, alpha, beta, torch.rand(2, 24) < 0.8

    calls, given = Together(CALLS.values()).eval(), inputs()
    program = Exported(calls, inputs())
    outputs = program(*given)
    for i, (name, call) in enumerate(CALLS.items()):
        check_call(outputs[4 * i : 4 * i + 4], call(*given), name)
    assert not outputs[-1].all()  # some rows are empty
    assert program.domains == {""}


def check_call(found: list[Tensor], expected: tuple[Tensor, ...], name: str) -> None:
    """Compare output and statistics; the exporter writes numbers of Python, the scale among them, in float32."""
    assert torch.equal(found[3], expected[3]), name  # the numbers of survivors
    for x, y in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, msg=lambda text: f"{name}: {text}")


@pytest.mark.slow
@cases.each_case
def test_calls_of_every_kind(case):
    inputs, options = cases.make(case)
    given = {"alpha": inputs[3], "beta": inputs[4], "mask": options.pop("key_padding_mask", None)}
    given = {name: x for name, x in given.items() if x is not None}
    call = Call(*given, **options)
    tensors = dict(zip(("query", "key", "value"), inputs, strict=False)) | given
    program = Exported(call, kwargs=tensors)
    check_call(program(*tensors.values()), call(**tensors), case.name)


@pytest.mark.slow
def test_half_precision():
    blocks = blocks_of([("asa", {}), ("criss_cross", {})])
    x = torch.randn(2, 16, 6, 8)
    out, expected = Exported(blocks.half(), (x.half(),))(x.half()), blocks.float()(x.half().float())
    for found, wanted in zip(out, expected, strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=1e-2 * wanted.abs().max().item())
