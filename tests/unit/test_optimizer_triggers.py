"""When the optimizer looks for changed estimates: soon after an evaluation, whose footprints follow it."""

from datetime import UTC, datetime, timedelta

import pytest

from services.optimizer.estimates import Estimates
from services.optimizer.settings import OptimizerSettings
from services.optimizer.triggers import SolveInputs, awaits_footprints, estimates_due

NOW = datetime(2024, 2, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@pytest.mark.parametrize(
    ("since_evaluation", "since_check", "due"),
    [
        (MINUTE, timedelta(seconds=14), False),
        (MINUTE, timedelta(seconds=15), True),
        (15 * MINUTE, timedelta(seconds=15), True),
        (16 * MINUTE, timedelta(seconds=15), False),
        (16 * MINUTE, 29 * MINUTE, False),
        (16 * MINUTE, 30 * MINUTE, True),
    ],
)
def test_estimates_are_checked_soon_after_an_evaluation_and_rarely_otherwise(
    since_evaluation: timedelta, since_check: timedelta, due: bool
) -> None:
    last = SolveInputs(
        checked_at=NOW - since_check, intensities={}, groups=None, evaluation="e",
        evaluation_seen_at=NOW - since_evaluation,
        estimates=Estimates(weights={}, groups={}, overall={}, requests_per_s=0.0),
    )  # fmt: skip
    settings = OptimizerSettings()
    assert estimates_due(last, NOW, settings) == due
    assert awaits_footprints(last, NOW, settings) == (since_evaluation <= 15 * MINUTE)
