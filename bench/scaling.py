"""How the cost of asa_attention grows: with tokens, with survivors, with the head dim, beside dense attention.

    python bench/scaling.py --out results.json                # half an hour on two cores
    python bench/scaling.py --sweep survivors
    python bench/scaling.py --size 32x32 64x64 128x128

Three sweeps, each with everything else fixed:

    tokens      label maps, D = 64, sizes to 256x256 (65,536 tokens): the fraction of survivors stays about the same
    survivors   independent normal inputs at 64x64 and one threshold for all, from 0 (everybody survives) up; there is
                no structure to find, every tile of pairs has survivors until few are left
    dim         label maps at 64x64, D = 16 to 512

and after them the exponents of cost ~ tokens^e and cost ~ D^e, fitted to the upper half of each sweep.
"""

import argparse
import math
import sys

import report
import run
from record import MODES, files
from tqdm import tqdm
from workloads import Spec

SIZES = ["32x32", "48x48", "64x64", "96x96", "128x128", "192x192", "256x256"]
ALPHAS = [0.0, 0.1, 0.25, 0.4, 0.5, 0.65, 0.8, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0]
DIMS = [16, 32, 64, 128, 256, 512]
LARGE = 20000  # tokens from which one round is timed in place of --rounds; such calls take seconds


def cases(sweep: str, sizes: list[str], dtype: str, device: str) -> list[tuple[Spec, str]]:
    """Return what there is to measure for one sweep."""

    def spec(size="64x64", dim=64, inputs="labels", alpha=None):
        return Spec("asa", size, dim, 1, 1, dtype, inputs, alpha, device)

    specs = {
        "tokens": [spec(size=size) for size in sizes],
        "survivors": [spec(inputs="iid", alpha=alpha) for alpha in ALPHAS],
        "dim": [spec(dim=dim) for dim in DIMS],
    }[sweep]
    modes = MODES if sweep == "tokens" else MODES[:2]
    return [(each, mode) for each in specs for mode in modes]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sweeps = ["tokens", "survivors", "dim"]
    parser.add_argument("--sweep", nargs="+", choices=sweeps, default=sweeps)
    parser.add_argument("--size", nargs="+", type=run.size, default=SIZES, metavar="HxW", help="of the sweep of tokens")
    run.add_common(parser)
    parser.set_defaults(peers=["sdpa flash", "eager"])
    options = parser.parse_args(arguments)
    todo = [
        (sweep, *each) for sweep in options.sweep for each in cases(sweep, options.size, options.dtype, options.device)
    ]
    results = run.start(parser, options, [each[1:] for each in todo])
    mine, wrong = [], []
    with tqdm(todo, desc="cases", unit="case", file=sys.stdout) as bar:
        for sweep, spec, mode in bar:
            rounds = 1 if math.prod(spec.grid) > LARGE else options.rounds
            case = run.measured(spec, mode, options.impl, options.peers, rounds, bar.set_postfix_str, sweep)
            mine.append(case)
            wrong += run.failed(case)
            results.add(case)
            if options.out:
                results.write(options.out)
    print(f"\n{run.summary(mine)}\n\n{report.exponents(mine)}\n\n{report.crossings(mine)}")
    if wrong:
        sys.exit("\n".join(["", "ours failed:", *wrong]))


if __name__ == "__main__":
    files.run(main)
