"""Expected energy and quality of the traffic, and the standard errors of measured quality."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support.simulator import measured
from tools.simulator.requests import UNJUDGED, Floats, Measured
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
    """A third of the prompts is not judged; another third, and sums unless `of_sums`, have no known correctness."""
    requests = measured(600)
    unknown = (np.arange(600) % 3 == 0) | ((requests.task == 1) & (not of_sums))
    return replace(
        requests,
        preferred=np.where(np.arange(600) % 3 == 1, UNJUDGED, requests.preferred),
        correct=np.where(unknown[:, None], np.nan, requests.correct),
    )


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("metric", "of_sums"),
    [(PREFERENCE, True), (CORRECTNESS, True), (CORRECTNESS, False)],
    ids=["preference", "correctness", "correctness of one task"],
)
def test_a_quality_varies_between_samples_by_its_standard_error(metric, of_sums):
    requests = partly_known(of_sums=of_sums)
    expected = world(requests).standard_error(metric, MIX, POLICY)
    chance = np.random.default_rng(2)
    again = []
    for _ in range(400):
        rows = np.concatenate(
            [chance.choice(np.flatnonzero(requests.task == task), (requests.task == task).sum()) for task in (0, 1)]
        )
        again.append(relative(drawn(requests, rows), metric, POLICY))
    assert expected == pytest.approx(np.std(again), rel=0.15)


def drawn(requests: Measured, rows: np.ndarray) -> Measured:
    return replace(
        requests,
        prompts=tuple(requests.prompts[row] for row in rows),
        **{
            name: getattr(requests, name)[rows]
            for name in ("task", "energy_kwh", "time_s", "tokens", "preferred", "correct")
        },
    )


def test_the_reference_compared_with_itself_has_no_standard_error():
    one = world(measured(200))
    for metric in (PREFERENCE, CORRECTNESS):
        assert one.standard_error(metric, MIX, one.all_reference(len(MIX))) == 0.0


def test_an_unknown_standard_error_is_none():
    requests = measured(200)
    only_shares = world_of_models(requests, np.array([0.5, 0.6]))
    assert only_shares.standard_error(PREFERENCE, MIX, only_shares.all_reference(len(MIX))) is None
    # A single prompt of a task gives no variance, unless its weight is 0.
    single = drawn(requests, np.array([*np.flatnonzero(requests.task == 0), np.flatnonzero(requests.task == 1)[0]]))
    assert world(single).standard_error(PREFERENCE, MIX, POLICY) is None
    assert world(single).standard_error(PREFERENCE, MIX, world(single).all_reference(len(MIX))) == 0.0
    never = replace(requests, preferred=np.full(200, 2))
    assert world(never).standard_error(PREFERENCE, MIX, POLICY) is None
