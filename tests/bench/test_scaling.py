"""The page of how long one map takes over several processes."""

import dataclasses

from bench import scaling


def test_costs_are_measured_and_predicted():
    costs = scaling.find_costs((16, 16), rounds=1)
    assert all(value > 0 for value in dataclasses.astuple(costs))
    one, two, four = (costs.compute(2**14, size) for size in (1, 2, 4))
    assert four < two < one < 4 * four
    page = scaling.page(costs, {(256, 1): 0.5, (256, 2): 0.25}, cores=2)
    assert "| 256 | 2 | 0.25 |" in page and "| 1.00 |" in page
    assert all(f"{n:,}" in page for n in scaling.TOKENS)


def test_more_processes_receive_less():
    """By the counts that tests/distributed checks."""
    assert scaling.received(2**14, 1) == 0
    others = 2**13
    bits = others * 2**13 // 8
    assert scaling.received(2**14, 2) == others * (3 * 64 + 2) * 4 + bits + others * (64 * 4 + 9 + 24)
