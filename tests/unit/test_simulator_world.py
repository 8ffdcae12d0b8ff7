"""What traffic takes and how it is judged, and how far the prompts that it was measured on let tell."""

from dataclasses import replace

import numpy as np
import pytest
from simulator_support import measured

from simulator.measured import Floats, Measured
from simulator.world import CORRECTNESS, PREFERENCE, World, world_of_levels, world_of_models

RNG = np.random.default_rng(5)
GROUPS = ("short", "long", "other")
MIX = RNG.dirichlet([4.0, 1.0], size=12)
POLICY = RNG.dirichlet([1.0, 1.0, 1.0], size=(12, len(GROUPS)))


def world(requests: Measured) -> World:
    place = np.array([int(prompt.split()[1]) % len(GROUPS) for prompt in requests.prompts])
    return world_of_levels(requests, place, GROUPS)


def relative(requests: Measured, metric: str, x: Floats) -> float:
    one = world(requests)
    reference = one.mean(one.quality[metric], MIX, one.all_reference(len(MIX)))
    return float((one.mean(one.quality[metric], MIX, x) / reference).mean())


def partly_checkable(*, of_sums: bool) -> Measured:
    requests = measured(600)
    unknown = (np.arange(600) % 3 == 0) | ((requests.task == 1) & (not of_sums))
    return replace(requests, correct=np.where(unknown[:, None], np.nan, requests.correct))


@pytest.mark.parametrize("metric", [PREFERENCE, CORRECTNESS])
@pytest.mark.parametrize("of_sums", [True, False], ids=["both tasks", "one task can be checked"])
def test_a_quality_varies_between_samples_by_its_standard_error(metric, of_sums):
    requests = partly_checkable(of_sums=of_sums)
    told = world(requests).standard_error(metric, MIX, POLICY)
    chance = np.random.default_rng(2)
    again = []
    for _ in range(400):
        rows = np.concatenate(
            [chance.choice(np.flatnonzero(requests.task == task), (requests.task == task).sum()) for task in (0, 1)]
        )
        again.append(relative(drawn(requests, rows), metric, POLICY))
    assert told == pytest.approx(np.std(again), rel=0.15)
    assert 0.01 < told < 0.2


def drawn(requests: Measured, rows: np.ndarray) -> Measured:
    return replace(
        requests,
        prompts=tuple(requests.prompts[row] for row in rows),
        **{name: getattr(requests, name)[rows] for name in ("task", "energy_kwh", "time_s", "preferred", "correct")},
    )


def test_the_reference_is_itself_without_any_doubt():
    one = world(measured(200))
    for metric in (PREFERENCE, CORRECTNESS):
        assert one.standard_error(metric, MIX, one.all_reference(len(MIX))) == pytest.approx(0.0, abs=1e-9)


def test_no_error_is_told_where_it_is_unknown():
    requests = measured(200)
    shares_alone = world_of_models(requests, np.array([0.5, 0.6]))
    assert shares_alone.standard_error(PREFERENCE, MIX, shares_alone.all_reference(len(MIX))) is None
    lonely = drawn(requests, np.array([*np.flatnonzero(requests.task == 0), np.flatnonzero(requests.task == 1)[0]]))
    assert world(lonely).standard_error(PREFERENCE, MIX, POLICY) is None
    never = replace(requests, preferred=np.full(200, 2))
    assert world(never).standard_error(PREFERENCE, MIX, POLICY) is None
