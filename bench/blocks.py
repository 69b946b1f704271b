"""Every block beside its own published-style eager form (bench/eager.py), in interleaved runs.

    python bench/blocks.py                                   # a quarter of an hour or more on two cores
    python bench/blocks.py --maps 64x64x512 --only non_local efficient_attention --out results.json
    python bench/blocks.py --device cuda

Every round times both once, one after the other, so that a slow moment of the machine meets both; the table shows
medians of the rounds' seconds and ratios, with the ratios' quartiles. Forward runs without autograd, in training mode.
Memory is what a call adds to the peak, on a CPU of a fresh process. An eager form that would need more than half of the
memory that is free is left out.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import eager
import torch
from run import commit, peak, processor, quartiles

from asa_ops import nn

CASES = [  # name and options of a block
    ("non_local", {}),
    ("non_local", {"mode": "gaussian"}),
    ("non_local", {"mode": "dot_product"}),
    ("non_local", {"mode": "concatenation"}),
    ("linear_attention", {}),
    ("linear_attention", {"kind": "channel"}),
    ("efficient_attention", {}),
    ("efficient_attention", {"heads": 8}),
    ("criss_cross", {}),
    ("channelized_axial", {}),
    ("squeeze_and_attention", {}),
    ("interlaced_sparse", {}),
    ("salient_positions", {}),
]
HEADER = """| block | map | mode | ms | eager ms | ours / eager (quartiles) | MB | eager MB | ours / eager |
|---|---|---|---|---|---|---|---|---|"""


def make(name: str, options: dict, size: str, device: str):
    """Return the block, an input and a gradient of the output, the same at every call."""
    height, width, channels = map(int, size.split("x"))
    torch.manual_seed(0)
    block = nn.build(name, channels, **options).to(device)
    for parameter in block.parameters():
        if not parameter.any():  # a block that is the identity would compare nothing
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, channels, height, width, device=device)
    return block, x, torch.randn_like(x)


def run(form: str, name: str, block, x, grad_out, backward: bool):
    function = getattr(eager, name) if form == "eager" else type(block).__call__
    with torch.set_grad_enabled(backward):
        out = function(block, x.requires_grad_(backward))
    if backward:
        out.backward(grad_out)
        for tensor in (x, *block.parameters()):
            tensor.grad = None
    return out.detach()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(*arguments, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run(*arguments)
    synchronize(device)
    return time.perf_counter() - start


def free_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    status = Path("/proc/meminfo").read_text()
    return 1024 * int(status.split("MemAvailable:")[1].split()[0])


def added_to_peak(form: str, name: str, options: dict, size: str, backward: bool, device: str) -> float:
    """Return the bytes that a call adds to the peak, of this process on a CPU."""
    run(form, name, *make(name, options, "16x16x" + size.split("x")[2], device), backward)
    tensors = make(name, options, size, device)
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(form, name, *tensors, backward)
        return torch.cuda.max_memory_allocated() - before
    before = peak()
    run(form, name, *tensors, backward)
    return peak() - before


def memory(*arguments, device: str) -> float:
    if device != "cpu":
        return added_to_peak(*arguments, device)
    program = "import json, sys; from blocks import *; print(added_to_peak(*json.loads(sys.argv[1])))"
    command = [sys.executable, "-c", program, json.dumps([*arguments, device])]
    return float(subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True).stdout)


def case(name: str, options: dict, size: str, backward: bool, rounds: int, device: str) -> dict:
    height, width, channels = map(int, size.split("x"))
    # About four tensors of the largest kind are alive in the backward.
    needed = 4 * 4 * eager.largest_tensor(name, options, channels, height, width)
    forms = ["ours", "eager"] if 2 * needed < free_bytes(device) else ["ours"]
    tensors = make(name, options, size, device)
    times = {form: [] for form in forms}
    for i in range(rounds + 1):  # the first warms up
        for form in forms:
            taken = seconds(form, name, *tensors, backward, device=device)
            if i > 0:
                times[form].append(taken)
    del tensors
    used = {form: memory(form, name, options, size, backward, device=device) for form in forms}
    mode = "fwd+bwd" if backward else "fwd"
    return {"block": name, "options": options, "map": size, "mode": mode, "seconds": times, "memory": used}


def check(name: str, options: dict, device: str) -> None:
    """Check that a block and its eager form give the same output."""
    block, x, grad_out = make(name, options, "16x16x32", device)
    outs = [run(form, name, block, x, grad_out, False) for form in ("ours", "eager")]
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-4, msg=lambda text: f"{name} {options}: {text}")


def row(result: dict) -> str:
    times, used = result["seconds"], result["memory"]
    label = " ".join([result["block"], *(f"{key}={value}" for key, value in result["options"].items())])
    ours = f"{1e3 * statistics.median(times['ours']):.0f}"
    cells = [label, result["map"], result["mode"], ours, "-", "-", f"{used['ours'] / 1e6:.0f}", "-", "-"]
    if "eager" in times:
        low, middle, high = quartiles([a / b for a, b in zip(times["ours"], times["eager"], strict=True)])
        cells[4:6] = [f"{1e3 * statistics.median(times['eager']):.0f}", f"{middle:.2f} ({low:.2f}-{high:.2f})"]
        cells[7:] = [f"{used['eager'] / 1e6:.0f}", f"{used['ours'] / max(used['eager'], 1):.2f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", nargs="+", default=["64x64x512", "128x128x256"], help="HxWxC")
    parser.add_argument("--only", nargs="+", choices=nn.available(), help="blocks, default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the raw seconds and bytes as JSON")
    options = parser.parse_args()
    environment = {
        "commit": commit(),
        "device": processor() if options.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }
    print(f"{environment}\n\n{HEADER}", flush=True)
    chosen = [each for each in CASES if each[0] in (options.only or nn.available())]
    results = []
    for name, block_options in chosen:
        check(name, block_options, options.device)
    for size in options.maps:
        for name, block_options in chosen:
            for backward in (False, True):
                results.append(case(name, block_options, size, backward, options.rounds, options.device))
                print(row(results[-1]), flush=True)
                if options.out:
                    options.out.write_text(
                        json.dumps({"environment": environment, "results": results}, indent=1) + "\n"
                    )


if __name__ == "__main__":
    main()
