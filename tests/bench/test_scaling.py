"""The page of how long one map takes over several processes."""

import dataclasses

from bench import scaling


def test_costs_are_measured_and_predicted():
    costs = scaling.find_costs((16, 16), rounds=1)
    assert all(value > 0 for value in dataclasses.astuple(costs))
    page = scaling.page(costs, {(256, 1): 0.5, (256, 2): 0.25}, cores=2)
    assert "| 256 | 2 | 0.25 |" in page and "| 1.00 |" in page
    assert all(f"{n:,}" in page for n in scaling.TOKENS)


def test_products_are_shared():
    costs = scaling.Costs(1e-9, 1e-8, rows=2e-8, columns=3e-8, whole=4e-8, copy=0.0, survivors=0.1)
    assert costs.compute(1000, 1) == 1e6 * (1e-9 + 0.1 * 5e-8)
    assert costs.compute(1000, 4) == 1e6 * (1e-9 + 0.1 * 6e-8) / 4


def test_more_processes_receive_less():
    """By the counts that tests/distributed checks."""
    assert scaling.received(2**14, 1) == 0
    others = 2**13
    bits = others * 2**13 // 8
    assert scaling.received(2**14, 2) == others * (3 * 64 + 2) * 4 + bits + others * (64 * 4 + 9 + 24)
