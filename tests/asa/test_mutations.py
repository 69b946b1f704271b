"""Whatever is left out or wrong in how the kernels for sm_90a wait, tell and hand over, shows in the emulation."""

import re

import mutations
import pytest
import simt

# What stands in device.h and neither waits nor tells.
OTHERS = {"copy_bytes", "settled", "multiply_rows", "multiply_weights", "pack_weights"}


def test_every_way_to_wait_is_known():
    code = (simt.ROOT / "csrc/cuda/hopper/device.h").read_text()
    ways = set(re.findall(r"^__device__ __forceinline__ void (\w+)\(", code, re.M)) - OTHERS
    assert len(ways) > 10 and ways <= {re.sub("<.*", "", name) for name in mutations.CALLS}


@pytest.mark.parametrize("source", mutations.sources(), ids=lambda source: source.file)
def test_every_place_is_found(source):
    names = "|".join(sorted(mutations.CALLS, key=len, reverse=True))
    ways = [x for x in re.findall(rf"(?<![\w.])(?:{names})\(", source.code) if not x.endswith("arrive_last_of(")]
    gone = [x for x in source.mutations if x.kind in set(mutations.CALLS.values())]
    assert len([x for x in gone if not x.code.startswith("arrive_last_of")]) == len(ways)


def test_exceptions_are_there():
    assert set(mutations.EXCEPTIONS) <= {x.key for x in mutations.all_mutations()}


@pytest.mark.slow
@pytest.mark.skipif(not simt.AVAILABLE, reason="no C++ compiler here, or a GPU: kernels run there")
def test_every_mutation_shows():
    results = mutations.run(mutations.all_mutations())
    print(*mutations.report(results), sep="\n")
    assert len(results) > 250
    assert not [str(x) for x, told in results.items() if not any(told) and x.key not in mutations.EXCEPTIONS]
