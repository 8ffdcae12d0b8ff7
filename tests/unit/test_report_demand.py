"""Demand spread over bins of time."""

import numpy as np
import pytest

from shared.metering.demand import ExpectedAnswers, demand_by_bin, spread_over_bins


def test_amounts_are_spread_evenly_over_their_time() -> None:
    spread = spread_over_bins(
        [5.0, 12.0, 20.0, 95.0], [25.0, 12.0, 120.0, 200.0], [20.0, 3.0, 100.0, 5.0], [0, 10, 20, 30]
    )
    assert spread == pytest.approx([5.0, 13.0, 5.0 + 10.0], abs=1e-6)


def test_demand_in_reference_blocks_counts_requests_as_they_were_served() -> None:
    edges = np.arange(0.0, 500.0, 100.0)
    world = np.array(["sprout", "sprout", "reference", "sprout"])
    demand = demand_by_bin(
        edges,
        world,
        arrived_s=[150.0],
        reference=ExpectedAnswers(np.array([200.0]), np.array([200.0])),
        served=ExpectedAnswers(np.array([60.0]), np.array([100.0])),
    )
    assert demand == pytest.approx([0.0, 50.0, 30.0, 50.0])


def test_answers_of_several_lengths_keep_the_tokens() -> None:
    demand = demand_by_bin(
        np.arange(0.0, 1_000.0, 100.0),
        np.full(9, "sprout"),
        arrived_s=[0.0],
        reference=ExpectedAnswers(np.array([90.0]), np.array([200.0])),
        served=ExpectedAnswers(np.array([90.0]), np.array([200.0])),
        lengths=(1.0, 1.0, 4.0),
    )
    assert demand.sum() == pytest.approx(90.0)
    assert demand[0] == pytest.approx(45.0)
    assert demand[3] == pytest.approx(15.0)
