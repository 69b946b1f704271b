"""Criss-cross attention beside its published-style eager form, in one interleaved run.

    python bench/criss_cross.py                     # some minutes on two cores
    python bench/criss_cross.py --device cuda --dtype bfloat16

Query and key have C // 8 channels, the value C. Every round times every method once, one after the other, so that a
slow moment of the machine meets all of them; the table shows medians, and of the rounds' ratios their quartiles. Memory
is what a call adds to the peak: of a fresh process on a CPU, of torch's allocator on a GPU, inputs not included. The
output and the gradients are, and any method must hold them; the last column leaves them out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from run import commit, processor, quartiles
from torch import Tensor

from asa_ops import criss_cross_attention

SHAPES = {"64x64x512": (64, 64, 512), "97x97x512": (97, 97, 512), "128x128x256": (128, 128, 256)}


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The published way: copies with rows and with columns as the batch, products, one softmax over H + W scores."""
    batch, _, height, width = query.shape

    def columns(x):  # [B * W, H, C]
        return x.permute(0, 3, 2, 1).contiguous().view(batch * width, height, -1)

    def rows(x):  # [B * H, W, C]
        return x.permute(0, 2, 3, 1).contiguous().view(batch * height, width, -1)

    query_h, query_w = columns(query), rows(query)
    key_h, key_w = columns(key), rows(key)
    value_h, value_w = columns(value), rows(value)
    itself = torch.diag(query.new_full((height,), -torch.inf))
    energy_h = (torch.bmm(query_h, key_h.mT) + itself).view(batch, width, height, height).transpose(1, 2)
    energy_w = torch.bmm(query_w, key_w.mT).view(batch, height, width, width)
    weights = torch.cat([energy_h, energy_w], 3).softmax(3)
    weights_h = weights[..., :height].transpose(1, 2).reshape(batch * width, height, height)
    weights_w = weights[..., height:].reshape(batch * height, width, width)
    out_h = torch.bmm(weights_h, value_h).view(batch, width, height, -1).permute(0, 3, 2, 1)
    out_w = torch.bmm(weights_w, value_w).view(batch, height, width, -1).permute(0, 3, 1, 2)
    return out_h + out_w


METHODS = {"eager": eager, "ours": criss_cross_attention}


def make(shape: str, batch: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return query, key, value and the output's gradient."""
    height, width, channels = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    sizes = channels // 8, channels // 8, channels, channels
    maps = (torch.randn(batch, size, height, width, generator=generator) for size in sizes)
    return [x.to(device, dtype) for x in maps]


def run(name: str, tensors: list[Tensor], backward: bool) -> None:
    *inputs, grad_out = tensors
    if backward:
        inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.set_grad_enabled(backward):
        out = METHODS[name](*inputs)
    if backward:
        out.backward(grad_out)


def seconds(name: str, tensors: list[Tensor], backward: bool) -> float:
    synchronize = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    run(name, tensors, backward)
    synchronize()
    return time.perf_counter() - start


def memory(name: str, shape: str, batch: int, device: str, dtype: str, backward: bool) -> float:
    """Return the bytes that a call adds to the peak."""
    if device == "cuda":
        tensors = make(shape, batch, device, getattr(torch, dtype))
        run(name, [x[:, :, :8, :8].contiguous() for x in tensors], backward)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(name, tensors, backward)
        return torch.cuda.max_memory_allocated() - before
    program = (
        "import sys, torch; from criss_cross import make, run; from run import peak\n"
        "name, shape, batch, dtype, backward = sys.argv[1:]; backward = backward == 'True'\n"
        "tensors = make(shape, int(batch), 'cpu', getattr(torch, dtype))\n"
        "run(name, [x[:, :, :8, :8].contiguous() for x in tensors], backward)\n"
        "before = peak(); run(name, tensors, backward); print(peak() - before)"
    )
    arguments = [name, shape, str(batch), dtype, str(backward)]
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return float(result.stdout)


def case(shape: str, backward: bool, options: argparse.Namespace) -> dict:
    tensors = make(shape, options.batch, options.device, getattr(torch, options.dtype))
    times = {name: [] for name in METHODS}
    for i in range(options.rounds + 2):  # the first two warm up
        for name in METHODS:
            taken = seconds(name, tensors, backward)
            if i > 1:
                times[name].append(taken)
    del tensors
    where = shape, options.batch, options.device, options.dtype, backward
    return {
        "shape": shape,
        "batch": options.batch,
        "dtype": options.dtype,
        "mode": "fwd+bwd" if backward else "fwd",
        "seconds": times,
        "memory": {name: memory(name, *where) for name in METHODS},
    }


def row(result: dict) -> str:
    times, used = result["seconds"], result["memory"]
    eager, ours = (1e3 * statistics.median(times[name]) for name in METHODS)
    height, width, channels = SHAPES[result["shape"]]
    returned = channels if result["mode"] == "fwd" else 2 * channels + 2 * (channels // 8)
    given = result["batch"] * height * width * returned * getattr(torch, result["dtype"]).itemsize
    low, middle, high = quartiles([a / b for a, b in zip(times["ours"], times["eager"], strict=True)])
    return (
        f"| {result['shape']} | {result['dtype']} | {result['mode']} | {eager:.1f} | {ours:.1f} "
        f"| {middle:.2f} ({low:.2f}-{high:.2f}) | {used['eager'] / 1e6:.1f} | {used['ours'] / 1e6:.1f} "
        f"| {used['ours'] / used['eager']:.2f} | {(used['ours'] - given) / (used['eager'] - given):.2f} |"
    )


TITLE = """| map | dtype | mode | eager ms | ours ms | ours / eager (quartiles) | eager MB | ours MB | ours / eager \
| beside results |
|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the raw seconds and bytes as JSON")
    options = parser.parse_args()
    environment = {
        "commit": commit(),
        "processor": processor() if options.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(f"{environment}\n\n{TITLE}", flush=True)
    results = []
    for shape in options.shapes:
        for backward in (False, True):
            results.append(case(shape, backward, options))
            print(row(results[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
