"""Bounds, estimates and triggers of the optimizer."""

import math
from datetime import UTC, datetime, timedelta

import pytest

from services.optimizer.bounds import in_force, quality_bounds, trailing_range
from services.optimizer.consumption import Consumption
from services.optimizer.effects import main_effects
from services.optimizer.estimates import Estimates, estimate
from services.optimizer.quality import QualityEvidence
from services.optimizer.settings import OptimizerSettings
from services.optimizer.triggers import moved
from shared.messages import CarbonIntensity, EvaluationCost, Footprint, IntensityPoint, Quality, QualityCount

NOW = datetime(2024, 2, 5, 12, tzinfo=UTC)
SETTINGS = OptimizerSettings()
RULES = SETTINGS.estimate_rules
OPTIONS = ("p/L0", "p/L1", "p/L2")


def grid(*history: float, latest: float = 200.0, age_h: float = 0.0) -> CarbonIntensity:
    at = NOW - timedelta(hours=age_h)
    points = [
        IntensityPoint(at=at - timedelta(hours=len(history) - n), intensity_g_per_kwh=value)
        for n, value in enumerate(history)
    ]
    late = IntensityPoint(at=NOW + timedelta(hours=1), intensity_g_per_kwh=9_999.0)
    return CarbonIntensity(
        zone="Z", latest=IntensityPoint(at=at, intensity_g_per_kwh=latest), history=points, forecast=[late],
        source="t", published_at=at,
    )  # fmt: skip


def footprint(group: str, level: str, joules: float, *, purpose="request", at=NOW) -> Footprint:
    return Footprint(
        request_id="r", purpose=purpose, model="m", group=group, pool="p", level=level, zone="Z", endpoint="e",
        started_at=at, finished_at=at, processing_s=joules / 250, completion_tokens=1, energy_j=joules, embodied_g=0,
    )  # fmt: skip


def consumed(*footprints: Footprint) -> Consumption:
    made = Consumption()
    for one in footprints:
        made.observe(one, now_s=NOW.timestamp(), memory=RULES.memory)
    return made


def evaluated(*counts: QualityCount, at=NOW) -> QualityEvidence:
    quality = Quality(
        evaluation_id="e", model="m", evaluated_at=at, trigger="first", prompts=1, abstentions=0, counts=counts,
        cost=EvaluationCost(generations=0, judgements=0, completion_tokens=0, processing_s=0),
    )  # fmt: skip
    return QualityEvidence([quality], half_life_s=RULES.quality.half_life_s)


def judged(*counts: tuple[str, str, float, float], at=NOW) -> QualityEvidence:
    made = [
        QualityCount(group=group, option=option, metric="preference", successes=won, trials=trials)
        for group, option, won, trials in counts
    ]
    return evaluated(*made, at=at)


def believed(
    consumption: Consumption, evidence: QualityEvidence | None = None, now=NOW, *, rules=RULES, same=()
) -> Estimates | None:
    return estimate(
        consumption,
        evidence or QualityEvidence([], half_life_s=1.0),
        options=OPTIONS,
        reference="p/L0",
        metrics=("preference",),
        rules=rules,
        now_s=now.timestamp(),
        same=same,
    )


def test_the_bound_follows_the_paper_and_never_sees_the_forecast():
    found = trailing_range(grid(*range(100, 400, 10), latest=250.0), window=timedelta(days=30), min_hours=24)
    assert (found.k0_min, found.k0_max) == (100.0, 390.0)
    assert quality_bounds(found.dirtiness(390.0), {"preference": 0.1}) == {"preference": pytest.approx(0.9)}
    assert quality_bounds(found.dirtiness(100.0), {"preference": 0.1}) == {"preference": 1.0}
    assert found.dirtiness(1_000.0) == 1.0


def test_a_constant_bound_does_not_ask_the_grid():
    xi = {"preference": 0.1, "correctness": 0.03}
    for dirtiness in (0.0, 0.5, 1.0):
        bounds = quality_bounds(dirtiness, xi, constant={"correctness"})
        assert bounds == pytest.approx({"preference": 1.0 - 0.1 * dirtiness, "correctness": 0.97})


@pytest.mark.parametrize("history", [(), (100.0, 300.0), (200.0,) * 40])
def test_a_grid_that_is_not_known_tolerates_no_loss(history):
    found = trailing_range(grid(*history), window=timedelta(days=30), min_hours=24)
    assert found.dirtiness(200.0) == 0.0


def test_an_old_value_gives_way_to_the_hours_trailing_mean_then_to_nothing():
    hours = [float(n) for n in range(48)]
    fresh = in_force(grid(*hours, age_h=1), NOW, max_age=timedelta(hours=2))
    assert (fresh.g_per_kwh, fresh.source) == (200.0, "latest")
    stale = in_force(grid(*hours, age_h=3), NOW, max_age=timedelta(hours=2))
    assert (stale.g_per_kwh, stale.source) == ((3.0 + 27.0) / 2, "hour_mean")
    assert in_force(grid(1.0, age_h=5), NOW, max_age=timedelta(hours=2)) is None


def test_a_group_is_compared_with_itself_not_with_cheap_groups():
    # L1 halves the energy in both groups, but is drawn where answers are long.
    totals = {"long": {"L0": (10, 10_000.0), "L1": (90, 45_000.0)}, "short": {"L0": (100, 10_000.0)}}
    fitted = main_effects(totals, pseudo_requests=0.0)
    assert fitted("short", "L1") == pytest.approx(50.0, rel=0.01)


def test_the_fit_comes_to_rest_where_each_group_is_served_by_one_option_but_for_a_few_evaluations():
    level, ratio = {f"g{n}": 100.0 * (n + 1) for n in range(12)}, {"L0": 1.0, "L1": 0.25, "L2": 0.15}
    totals = {
        group: {
            option: (count, count * each * by)
            for option, by in ratio.items()
            for count in (20_000.0 if option == f"L{place % 3}" else 2.0,)
        }
        for place, (group, each) in enumerate(level.items())
    }
    fitted = main_effects(totals, pseudo_requests=0.0)
    for group, each in level.items():
        assert [fitted(group, option) for option in ratio] == pytest.approx([each * by for by in ratio.values()])


def test_an_option_that_takes_nothing_and_groups_that_share_no_option_do_no_harm():
    fitted = main_effects({"a": {"L0": (5, 0.0), "L1": (5, 50.0)}, "b": {"L2": (9, 9.0)}}, pseudo_requests=10.0)
    assert fitted("a", "L0") == 0.0
    assert 0.0 < fitted("b", "L2") < 10.0
    assert main_effects({"a": {"L0": (5, 0.0)}}, pseudo_requests=10.0)("a", "L0") == 0.0
    assert main_effects({}, pseudo_requests=10.0)("a", "L0") == 0.0


def test_a_level_never_seen_in_a_group_costs_the_groups_own_level_times_the_usual_ratio():
    seen = [footprint("long", level, joules) for level, joules in (("L0", 1_000), ("L1", 500)) for _ in range(500)]
    seen += [footprint("short", "L0", 100) for _ in range(500)]
    counts = [("long", option, 40, 100) for option in OPTIONS[:2]]
    found = believed(consumed(*seen), judged(*counts))
    assert found.groups["short"]["p/L1"].energy_kwh * 3.6e6 == pytest.approx(50.0, rel=0.12)
    assert found.weights == pytest.approx({"long": 2 / 3, "short": 1 / 3})
    assert "p/L2" in found.withheld


def test_evaluations_tell_energy_but_not_traffic_and_judges_tell_nothing():
    calls = (("a", "request"), ("b", "evaluation"), ("c", "judge"))
    found = consumed(*(footprint(group, "L0", 1_000, purpose=purpose) for group, purpose in calls))
    assert set(found.cells) == {"a", "b"}
    assert set(found.traffic) == {"a"}


def test_consumption_survives_being_stored_and_forgets_in_event_time():
    made = consumed(*(footprint("a", "L0", 1_000, at=NOW - timedelta(hours=1)) for _ in range(8)))
    again = Consumption.from_document(made.to_document())
    assert again == made
    assert again.requests(NOW.timestamp(), RULES.memory) == {"a": pytest.approx(4.0)}


def test_without_judged_prompts_there_is_nothing_but_the_reference():
    seen = consumed(*(footprint("a", level, 500) for level in ("L0", "L1") for _ in range(50)))
    assert set(believed(seen).whole) == {"p/L0"}
    few = judged(("a", "p/L0", 5, 10), ("a", "p/L1", 5, 10))
    assert set(believed(seen, few).whole) == {"p/L0"}
    enough = judged(("a", "p/L0", 50, 100), ("a", "p/L1", 40, 100))
    assert set(believed(seen, enough).whole) == {"p/L0", "p/L1"}
    assert set(believed(seen, enough, NOW + timedelta(days=12)).whole) == {"p/L0"}
    assert believed(Consumption()) is None


def test_a_group_with_few_judged_prompts_leans_on_the_whole():
    seen = consumed(*(footprint(group, level, 500) for group in "ab" for level in ("L0", "L1") for _ in range(50)))
    counts = [("a", "p/L0", 500, 1_000), ("a", "p/L1", 400, 1_000), ("b", "p/L1", 2, 2), ("b", "p/L0", 0, 2)]
    found = believed(seen, judged(*counts))
    few, many = found.groups["b"]["p/L1"], found.groups["a"]["p/L1"]
    reference = found.groups["b"]["p/L0"].quality["preference"]
    assert -0.1 < few.quality["preference"] - reference < 0.2
    assert many.quality["preference"] == pytest.approx(0.4, abs=0.01)
    # Two of two are next to nothing: half of the traffic is not left to chance.
    assert math.hypot(*few.doubt["preference"]) > 5 * math.hypot(*many.doubt["preference"])
    # Half of each.
    assert found.whole["p/L1"].doubt["preference"][0] > 0.4 * math.hypot(*few.doubt["preference"])


def test_the_reference_is_not_doubted():
    seen = consumed(*(footprint("a", level, 500) for level in ("L0", "L1") for _ in range(50)))
    found = believed(seen, judged(("a", "p/L0", 30, 60), ("a", "p/L1", 30, 60)))
    for option in ("p/L0", "p/L1"):
        assert found.groups["a"][option].quality["preference"] == pytest.approx(0.5)
    assert found.groups["a"]["p/L0"].doubt == found.whole["p/L0"].doubt == {}
    assert math.hypot(*found.groups["a"]["p/L1"].doubt["preference"]) == pytest.approx(math.sqrt(1 / 60), rel=0.1)


def test_a_floor_of_a_group_is_counted_on_by_that_group_alone():
    groups = [f"g{place}" for place in range(8)]
    seen = consumed(*(footprint(group, level, 500) for group in groups for level in ("L0", "L1") for _ in range(50)))
    evidence = judged(*((group, option, 40, 80) for group in groups for option in OPTIONS[:2]))
    rules = OptimizerSettings(floors={"preference": 0.8}).estimate_rules
    found = believed(seen, evidence, rules=rules).groups["g3"]
    assert found["p/L0"].group_quality == found["p/L0"].quality
    single = rules.quality.of("preference").caution * math.hypot(*found["p/L1"].doubt["preference"])
    counted_on = found["p/L1"].quality["preference"] - single
    assert found["p/L1"].group_quality["preference"] == pytest.approx(counted_on)
    assert 0.0 < counted_on < 0.5
    whole = believed(seen, evidence, rules=rules).whole["p/L1"]
    assert counted_on < whole.group_quality["preference"] < whole.quality["preference"]
    assert believed(seen, evidence).groups["g3"]["p/L1"].group_quality == {}


def test_the_same_weights_in_another_zone_need_no_verdicts_of_their_own():
    seen = consumed(*(footprint("a", level, 500) for level in ("L0", "L1") for _ in range(50)))
    found = believed(seen, judged(("a", "p/L0", 50, 100)), same=("p/L0", "p/L1"))
    assert found.groups["a"]["p/L1"].quality == found.groups["a"]["p/L0"].quality


def told(**groups: dict[str, tuple[float, float]]) -> QualityEvidence:
    """Of 100 judged prompts a group; by metric: successes at L1, and of how many prompts it could be told."""
    counts = [
        QualityCount(group=group, option=option, metric=metric, successes=won, trials=known)
        for group, metrics in groups.items()
        for metric, (won, known) in metrics.items()
        for option in ("p/L0", "p/L1")
    ]
    return evaluated(*counts)


def test_a_metric_counts_for_the_share_of_a_groups_prompts_that_it_can_be_told_of():
    evidence = told(
        essays={"preference": (50, 100)},
        mixed={"preference": (50, 100), "correctness": (25, 50)},
        sums={"preference": (50, 100), "correctness": (50, 100)},
    )
    rules = RULES.quality
    correct = evidence.posterior("correctness", "p/L0", NOW.timestamp(), rules)
    # Half of all prompts can be checked, which two prompts' worth of every group leans on.
    assert correct.share("essays") == pytest.approx(1 / 102)
    assert correct.share("mixed") == pytest.approx(0.5)
    assert correct.share("sums") == pytest.approx(101 / 102)
    assert correct.mean("mixed", "p/L1") == pytest.approx(0.25)
    preferred = evidence.posterior("preference", "p/L0", NOW.timestamp(), rules)
    assert [preferred.share(group) for group in ("essays", "mixed", "sums", "unheard-of")] == [1.0] * 4


def test_only_a_material_change_of_the_estimates_calls_for_a_solve():
    def at(joules: float) -> Estimates:
        return believed(consumed(*(footprint("a", "L0", joules) for _ in range(100))))

    assert not moved(at(1_000), at(1_020), SETTINGS.trigger_rules)
    assert moved(at(1_000), at(1_200), SETTINGS.trigger_rules)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("FLOORS", {"floors": {"correctness": 0.9}}), ("CONSTANT_BOUNDS", {"constant_bounds": {"correctness"}})],
)
def test_an_aim_for_an_unknown_metric_is_refused_with_the_remedy(name, setting):
    with pytest.raises(ValueError, match=f"SPROUT_OPTIMIZER_{name} names correctness, .*: add it"):
        OptimizerSettings(**setting)
