"""The safety margin is widened while evaluations miss what the policies promised more often than chance explains."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from services.optimizer.safety_margin import MEMORY, Calibration, QualityScores, calibrated
from services.optimizer.settings import OptimizerSettings
from shared.messages import Paired, Quality, QualityCount
from shared.prequential import QualityScore
from tests.support.contract import EXAMPLES

NOW = datetime(2024, 2, 3, tzinfo=UTC)
DAY = timedelta(days=1)
SETTINGS = OptimizerSettings(xi={"preference": 0.1, "correctness": 0.03})
KEPT = QualityScore("e", "m", "preference", NOW - DAY, NOW, 0.95, 0.9, 400, 0.4, 0.4, 1e-4, 1e-4, 0.5e-4)
MISSED = replace(KEPT, served=0.3)


def scores(*, missed: int, kept: int) -> list[QualityScore]:
    made = [MISSED] * missed + [KEPT] * kept
    return [
        replace(one, evaluation_id=f"e{number}", since=NOW - (number + 1) * DAY / 2, until=NOW - number * DAY / 2)
        for number, one in enumerate(made)
    ]


@pytest.mark.parametrize(
    ("missed", "kept", "extra"), [(0, 20, 0.0), (1, 19, 0.0), (3, 17, 0.0), (4, 16, 0.5), (10, 10, 1.0)]
)
def test_the_margin_is_widened_within_its_limit(missed, kept, extra):
    watch = QualityScores(SETTINGS)
    watch.add(scores(missed=missed, kept=kept))
    (found,) = watch.calibrations("m", NOW).values()
    assert (found.scored, found.missed) == (missed + kept, missed)
    assert found.extra_z == pytest.approx(extra, abs=0.12)
    adapted, notes = calibrated(SETTINGS, {"preference": found})
    if found.extra_z == 0.0:
        assert (adapted, notes) == (SETTINGS, [])
        return
    # Two limits hold together: 1.41 standard errors each.
    assert adapted.confidence_z_by_metric == {"preference": pytest.approx(1.41 + found.extra_z, abs=0.001)}
    assert notes[0].startswith(f"preference missed its promise in {missed} of {missed + kept} evaluations, more often")
    assert "instead of 1.41" in notes[0]


def test_the_margin_is_never_widened_if_the_setting_forbids_it():
    watch = QualityScores(SETTINGS.model_copy(update={"max_extra_confidence_z": 0.0}))
    watch.add(scores(missed=10, kept=0))
    assert watch.calibrations("m", NOW) == {"preference": Calibration(10, 10, 0.0)}


def test_misses_are_forgotten():
    watch = QualityScores(SETTINGS)
    watch.add(scores(missed=8, kept=0))
    assert watch.calibrations("m", NOW)["preference"].missed == 8
    watch.add([replace(KEPT, evaluation_id="late", since=NOW + MEMORY, until=NOW + MEMORY + DAY)])
    assert watch.calibrations("m", NOW + MEMORY + DAY)["preference"] == Calibration(1, 0, 0.0)
    assert watch.calibrations("m", NOW + 3 * MEMORY) == {}


def test_the_week_s_quality_has_an_interval():
    watch = QualityScores(SETTINGS)
    assert watch.recent("m", "preference", NOW) is None
    watch.add([*scores(missed=0, kept=4), replace(MISSED, since=NOW - 10 * DAY, until=NOW - 8 * DAY)])
    found = watch.recent("m", "preference", NOW)
    assert found is not None
    assert found.estimate == pytest.approx(1.0)
    assert found.low < 1.0 < found.high


def test_an_evaluation_is_scored_once_and_only_against_policies_before_it():
    policy = EXAMPLES["policies"].model_copy(update={"created_at": NOW, "model": "m"})
    counts = tuple(
        QualityCount(
            group="g1", option=option, metric="preference", successes=wins, trials=40,
            paired=Paired(reference="p/L0", successes=20, both=20.0 * (option == "p/L0")),
        )
        for option, wins in (("p/L0", 20), ("p/L1", 20))
    )  # fmt: skip
    example = EXAMPLES["quality"]
    assert isinstance(example, Quality)
    quality = example.model_copy(update={"counts": counts, "evaluated_at": NOW + DAY})
    watch = QualityScores(SETTINGS)
    assert watch.score(quality) == []
    watch.update_policy(policy)
    (one,) = watch.score(quality)
    assert (one.served, one.reference, one.promised, one.bound) == (0.5, 0.5, 0.95, 0.9)
    assert watch.score(quality) == []
