"""What traffic takes and how it is judged, and how far the prompts that it was measured on let tell."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support.simulator import measured
from tools.simulator.measured import UNJUDGED, Floats, Measured
from tools.simulator.world import CORRECTNESS, PREFERENCE, World, world_of_levels, world_of_models

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


def partly_known(*, of_sums: bool) -> Measured:
    """A third of the prompts was not judged, another third cannot be checked; nor can sums, unless it is said."""
    requests = measured(600)
    unknown = (np.arange(600) % 3 == 0) | ((requests.task == 1) & (not of_sums))
    return replace(
        requests,
        preferred=np.where(np.arange(600) % 3 == 1, UNJUDGED, requests.preferred),
        correct=np.where(unknown[:, None], np.nan, requests.correct),
    )


@pytest.mark.parametrize(
    ("metric", "of_sums"),
    [(PREFERENCE, True), (CORRECTNESS, True), (CORRECTNESS, False)],
    ids=["preference", "correctness", "correctness of one task"],
)
def test_a_quality_varies_between_samples_by_its_standard_error(metric, of_sums):
    requests = partly_known(of_sums=of_sums)
    told = world(requests).standard_error(metric, MIX, POLICY)
    chance = np.random.default_rng(2)
    again = []
    for _ in range(400):
        rows = np.concatenate(
            [chance.choice(np.flatnonzero(requests.task == task), (requests.task == task).sum()) for task in (0, 1)]
        )
        again.append(relative(drawn(requests, rows), metric, POLICY))
    assert told == pytest.approx(np.std(again), rel=0.15)


def drawn(requests: Measured, rows: np.ndarray) -> Measured:
    return replace(
        requests,
        prompts=tuple(requests.prompts[row] for row in rows),
        **{name: getattr(requests, name)[rows] for name in ("task", "energy_kwh", "time_s", "preferred", "correct")},
    )


def test_the_reference_is_itself_without_any_doubt():
    one = world(measured(200))
    for metric in (PREFERENCE, CORRECTNESS):
        assert one.standard_error(metric, MIX, one.all_reference(len(MIX))) == 0.0


def test_no_error_is_told_where_it_is_unknown():
    requests = measured(200)
    shares_alone = world_of_models(requests, np.array([0.5, 0.6]))
    assert shares_alone.standard_error(PREFERENCE, MIX, shares_alone.all_reference(len(MIX))) is None
    # A single prompt does not say how much others would differ, unless it does not matter.
    lonely = drawn(requests, np.array([*np.flatnonzero(requests.task == 0), np.flatnonzero(requests.task == 1)[0]]))
    assert world(lonely).standard_error(PREFERENCE, MIX, POLICY) is None
    assert world(lonely).standard_error(PREFERENCE, MIX, world(lonely).all_reference(len(MIX))) == 0.0
    never = replace(requests, preferred=np.full(200, 2))
    assert world(never).standard_error(PREFERENCE, MIX, POLICY) is None
