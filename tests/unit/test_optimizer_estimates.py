"""Quality limits, estimates and settings of the optimizer."""

import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from services.optimizer.bounds import current_intensity, joint_confidence_z, quality_bounds, trailing_range
from services.optimizer.costs import Consumption, ResourceUse
from services.optimizer.estimates import Estimates, estimate, estimates_changed
from services.optimizer.multiplicative_model import fit_multiplicative_model
from services.optimizer.settings import OptimizerSettings
from services.optimizer.state import QualityCounts
from shared.messages import CarbonIntensity, EvaluationCost, Footprint, IntensityPoint, Quality, QualityCount

NOW = datetime(2024, 2, 5, 12, tzinfo=UTC)
SETTINGS = OptimizerSettings()
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


def footprint(group: str, level: str, joules: float, *, purpose="request", at=NOW, **more: Any) -> Footprint:
    return Footprint(
        request_id="r", purpose=purpose, model="m", group=group, pool="p", level=level, zone="Z", endpoint="e",
        started_at=at, finished_at=at, processing_s=joules / 250, completion_tokens=1, energy_j=joules, embodied_g=0,
        **more,
    )  # fmt: skip


def consumption_of(*footprints: Footprint) -> Consumption:
    made = Consumption()
    for one in footprints:
        made.add_footprint(one, now_s=NOW.timestamp(), settings=SETTINGS)
    return made


def evaluated(*counts: QualityCount, at=NOW) -> QualityCounts:
    quality = Quality(
        evaluation_id="e", model="m", evaluated_at=at, trigger="first", prompts=1, abstentions=0, counts=counts,
        cost=EvaluationCost(generations=0, judgements=0, completion_tokens=0, processing_s=0),
    )  # fmt: skip
    return QualityCounts([quality], settings=SETTINGS)


def judged(*counts: tuple[str, str, float, float], at=NOW) -> QualityCounts:
    made = [
        QualityCount(group=group, option=option, metric="preference", successes=won, trials=trials)
        for group, option, won, trials in counts
    ]
    return evaluated(*made, at=at)


def estimated(
    consumption: Consumption, counts: QualityCounts | None = None, now=NOW, *, settings=SETTINGS, equivalent=()
) -> Estimates | None:
    return estimate(
        consumption,
        counts or QualityCounts([], settings=SETTINGS),
        options=OPTIONS,
        reference="p/L0",
        settings=settings,
        now_s=now.timestamp(),
        equivalent=equivalent,
    )


def test_the_limit_follows_the_paper_and_ignores_the_forecast():
    extremes = OptimizerSettings(range_percentile=0.0)
    found = trailing_range(grid(*range(100, 400, 10), latest=250.0), extremes)
    assert (found.k0_min, found.k0_max) == (100.0, 390.0)
    assert quality_bounds(found.position(390.0), SETTINGS) == {"preference": pytest.approx(0.9)}
    assert quality_bounds(found.position(100.0), SETTINGS) == {"preference": 1.0}
    assert found.position(1_000.0) == 1.0


def test_a_single_wrong_value_does_not_move_the_limits():
    hours = [float(value) for value in range(100, 400)]
    right = trailing_range(grid(*hours, latest=250.0), SETTINGS)
    wrong = trailing_range(grid(*hours[:-1], 9_000.0, latest=250.0), SETTINGS)
    assert wrong.k0_max == pytest.approx(right.k0_max, rel=0.01)
    assert right.k0_min == pytest.approx(103.0, abs=1.0)


def test_a_constant_limit_is_independent_of_the_carbon_intensity():
    settings = OptimizerSettings(xi={"preference": 0.1, "correctness": 0.03}, constant_bounds={"correctness"})
    for position in (0.0, 0.5, 1.0):
        bounds = quality_bounds(position, settings)
        assert bounds == pytest.approx({"preference": 1.0 - 0.1 * position, "correctness": 0.97})


@pytest.mark.parametrize("history", [(), (100.0, 300.0), (200.0,) * 40])
def test_with_too_little_history_no_loss_is_tolerated(history):
    found = trailing_range(grid(*history), SETTINGS)
    assert found.position(200.0) == 0.0


def test_an_old_value_is_replaced_by_the_mean_of_this_hour_of_earlier_days_or_by_none():
    hours = [float(n) for n in range(48)]
    fresh = current_intensity(grid(*hours, age_h=1), NOW, SETTINGS)
    assert (fresh.g_per_kwh, fresh.source) == (200.0, "latest")
    stale = current_intensity(grid(*hours, age_h=3), NOW, SETTINGS)
    assert (stale.g_per_kwh, stale.source) == ((3.0 + 27.0) / 2, "hour_mean")
    assert current_intensity(grid(1.0, age_h=5), NOW, SETTINGS) is None


def test_a_group_is_compared_with_itself_not_with_cheap_groups():
    # L1 halves the energy in both groups, but is drawn where answers are long.
    totals = {"long": {"L0": (10, 10_000.0), "L1": (90, 45_000.0)}, "short": {"L0": (100, 10_000.0)}}
    fitted = fit_multiplicative_model(totals, pseudo_requests=0.0)
    assert fitted("short", "L1") == pytest.approx(50.0, rel=0.01)


def test_the_fit_converges_if_each_group_is_served_by_one_option_except_for_a_few_evaluations():
    level, ratio = {f"g{n}": 100.0 * (n + 1) for n in range(12)}, {"L0": 1.0, "L1": 0.25, "L2": 0.15}
    totals = {
        group: {
            option: (count, count * each * by)
            for option, by in ratio.items()
            for count in (20_000.0 if option == f"L{place % 3}" else 2.0,)
        }
        for place, (group, each) in enumerate(level.items())
    }
    fitted = fit_multiplicative_model(totals, pseudo_requests=0.0)
    for group, each in level.items():
        assert [fitted(group, option) for option in ratio] == pytest.approx([each * by for by in ratio.values()])


def test_options_without_energy_and_groups_without_a_common_option_are_handled():
    fitted = fit_multiplicative_model(
        {"a": {"L0": (5, 0.0), "L1": (5, 50.0)}, "b": {"L2": (9, 9.0)}}, pseudo_requests=10.0
    )
    assert fitted("a", "L0") == 0.0
    assert 0.0 < fitted("b", "L2") < 10.0
    assert fit_multiplicative_model({"a": {"L0": (5, 0.0)}}, pseudo_requests=10.0)("a", "L0") == 0.0
    assert fit_multiplicative_model({}, pseudo_requests=10.0)("a", "L0") == 0.0


def test_a_level_never_used_in_a_group_costs_the_groups_baseline_times_the_options_usual_ratio():
    seen = [footprint("long", level, joules) for level, joules in (("L0", 1_000), ("L1", 500)) for _ in range(500)]
    seen += [footprint("short", "L0", 100) for _ in range(500)]
    counts = [("long", option, 40, 100) for option in OPTIONS[:2]]
    found = estimated(consumption_of(*seen), judged(*counts))
    assert found.groups["short"]["p/L1"].energy_kwh * 3.6e6 == pytest.approx(50.0, rel=0.12)
    assert found.weights == pytest.approx({"long": 2 / 3, "short": 1 / 3})
    assert "p/L2" in found.ineligible


def test_evaluations_count_for_energy_but_not_for_traffic_and_judge_calls_for_nothing():
    calls = (("a", "request"), ("b", "evaluation"), ("c", "judge"))
    found = consumption_of(*(footprint(group, "L0", 1_000, purpose=purpose) for group, purpose in calls))
    assert set(found.cells) == {"a", "b"}
    assert set(found.traffic) == {"a"}


def test_cancelled_calls_count_for_traffic_but_not_for_energy_time_and_tokens():
    whole = [footprint("a", "L0", 1_000, finish_reason=reason) for reason in ("stop", "length", None) for _ in range(9)]
    cut_short = [footprint(group, "L0", 10, finish_reason="cancelled") for group in "ab" for _ in range(27)]
    found, expected = (consumption_of(*some) for some in (whole + cut_short, whole))
    now_s = NOW.timestamp()
    assert found.totals(now_s, SETTINGS)["a"] == expected.totals(now_s, SETTINGS)["a"]
    assert found.requests(now_s, SETTINGS) == {"a": pytest.approx(54.0), "b": pytest.approx(27.0)}
    assert found.requests_per_s(now_s, SETTINGS) == pytest.approx(3 * expected.requests_per_s(now_s, SETTINGS))
    row = estimated(found, settings=OptimizerSettings(pseudo_requests=1e-9)).groups
    assert [one["p/L0"].energy_kwh * 3.6e6 for one in row.values()] == pytest.approx([1_000.0, 1_000.0])
    assert estimated(consumption_of(*cut_short)) is None


def test_consumption_can_be_stored_and_decays_in_event_time():
    made = consumption_of(*(footprint("a", "L0", 1_000, at=NOW - timedelta(hours=1)) for _ in range(8)))
    again = Consumption.from_document(made.to_document())
    assert again == made
    by_hours = OptimizerSettings(traffic_half_life_requests=0)
    assert again.requests(NOW.timestamp(), by_hours) == {"a": pytest.approx(4.0)}


def test_what_a_level_used_with_another_text_does_not_count_but_its_requests_are_traffic():
    now_s, hour = NOW.timestamp(), timedelta(hours=1)
    old, new = {"L0": "0", "L1": "1"}, {"L0": "0", "L1": "other", "L2": "2"}
    made = consumption_of(*(footprint("a", level, 1_000, at=NOW - hour) for level in ("L0", "L1") for _ in range(4)))
    assert made.drop_reworded(old, now_s=now_s - 3_600.0) == []  # stored by a release that did not know the texts
    assert len(made.totals(now_s, SETTINGS)["a"]) == 2
    made = Consumption.from_document(json.loads(json.dumps(made.to_document())))
    assert made.drop_reworded(new, now_s=now_s) == ["L1"]
    assert list(made.totals(now_s, SETTINGS)["a"]) == ["p/L0"]
    assert made.drop_reworded(new, now_s=now_s + 9.0) == []  # another copy starts
    requests = made.requests(now_s, SETTINGS)["a"]
    for at, counted in ((NOW - hour, 0.0), (NOW, 1.0)):  # a call from before the change arrives late
        made.add_footprint(footprint("a", "L1", 500, at=at), now_s=now_s, settings=SETTINGS)
        assert made.totals(now_s, SETTINGS)["a"]["p/L1"].requests == pytest.approx(counted)
    assert made.requests(now_s, SETTINGS)["a"] > requests + 1.0


def served_at(per_hour: int, hours: int, group: str = "a") -> Consumption:
    made = Consumption()
    used = ResourceUse(1.0, 1e-4, 1.0)
    for number in range(per_hour * hours):
        at_s = NOW.timestamp() - 3_600.0 * hours + 3_600.0 * number / per_hour
        made.add(group, "p/L0", used, at_s=at_s, settings=SETTINGS, traffic=1.0)
    return made


@pytest.mark.parametrize(("per_hour", "half_life_h"), [(5, 24.0), (100, 2.5), (1_000, 1.0)])
def test_the_memory_of_rate_and_traffic_is_counted_in_requests_within_limits_in_hours(per_hour, half_life_h):
    made, now_s = served_at(per_hour, 30), NOW.timestamp()
    assert made.traffic_half_life_s(now_s, SETTINGS) == pytest.approx(3_600.0 * half_life_h, rel=0.02)
    assert made.requests_per_s(now_s, SETTINGS) == pytest.approx(per_hour / 3_600.0, rel=0.03)


def test_old_traffic_loses_its_share_the_faster_the_more_requests_arrive():
    shares = {}
    for per_hour in (20, 2_000):
        made = served_at(per_hour, 30)
        for number in range(2 * per_hour):
            at_s = NOW.timestamp() + 3_600.0 * number / per_hour
            made.add("b", "p/L0", ResourceUse(1.0, 1e-4, 1.0), at_s=at_s, settings=SETTINGS, traffic=1.0)
        requests = made.requests(NOW.timestamp() + 2 * 3_600.0, SETTINGS)
        shares[per_hour] = requests["a"] / sum(requests.values())
    assert shares[20] > 0.85
    assert shares[2_000] == pytest.approx(0.25, abs=0.02)


def test_the_request_rate_follows_a_change_whatever_the_memory():
    made = served_at(20, 48)
    for number in range(4_000):
        at_s = NOW.timestamp() + 3_600.0 * number / 1_000
        made.add("a", "p/L0", ResourceUse(1.0, 1e-4, 1.0), at_s=at_s, settings=SETTINGS, traffic=1.0)
    assert made.requests_per_s(NOW.timestamp() + 4 * 3_600.0, SETTINGS) == pytest.approx(1_000 / 3_600.0, rel=0.2)


def test_a_request_rate_that_the_first_release_stored_is_read():
    stored = served_at(1_000, 10).to_document()
    as_of_s, requests, _ = stored["recent"]
    stored |= {"recent": [as_of_s, requests], "first_request_s": as_of_s - 10 * 3_600.0}
    again = Consumption.from_document(stored)
    assert again.requests_per_s(NOW.timestamp(), SETTINGS) == pytest.approx(1_000 / 3_600.0, rel=0.01)


def test_without_judged_prompts_only_the_reference_is_eligible():
    seen = consumption_of(*(footprint("a", level, 500) for level in ("L0", "L1") for _ in range(50)))
    assert set(estimated(seen).overall) == {"p/L0"}
    few = judged(("a", "p/L0", 5, 10), ("a", "p/L1", 5, 10))
    assert set(estimated(seen, few).overall) == {"p/L0"}
    enough = judged(("a", "p/L0", 50, 100), ("a", "p/L1", 40, 100))
    assert set(estimated(seen, enough).overall) == {"p/L0", "p/L1"}
    assert set(estimated(seen, enough, NOW + timedelta(days=12)).overall) == {"p/L0"}
    assert estimated(Consumption()) is None


def test_a_group_with_few_judged_prompts_is_shrunk_towards_the_overall_mean():
    seen = consumption_of(
        *(footprint(group, level, 500) for group in "ab" for level in ("L0", "L1") for _ in range(50))
    )
    counts = [("a", "p/L0", 500, 1_000), ("a", "p/L1", 400, 1_000), ("b", "p/L1", 2, 2), ("b", "p/L0", 0, 2)]
    found = estimated(seen, judged(*counts))
    few, many = found.groups["b"]["p/L1"], found.groups["a"]["p/L1"]
    reference = found.groups["b"]["p/L0"].quality["preference"]
    assert -0.1 < few.quality["preference"] - reference < 0.2
    assert many.quality["preference"] == pytest.approx(0.4, abs=0.01)
    # Two of two are almost no data, so the standard error stays large.
    assert math.hypot(*few.doubt["preference"]) > 5 * math.hypot(*many.doubt["preference"])
    # Half of each.
    assert found.overall["p/L1"].doubt["preference"][0] > 0.4 * math.hypot(*few.doubt["preference"])


def test_the_reference_has_no_standard_error():
    seen = consumption_of(*(footprint("a", level, 500) for level in ("L0", "L1") for _ in range(50)))
    found = estimated(seen, judged(("a", "p/L0", 30, 60), ("a", "p/L1", 30, 60)))
    for option in ("p/L0", "p/L1"):
        assert found.groups["a"][option].quality["preference"] == pytest.approx(0.5)
    assert found.groups["a"]["p/L0"].doubt == found.overall["p/L0"].doubt == {}
    assert math.hypot(*found.groups["a"]["p/L1"].doubt["preference"]) == pytest.approx(math.sqrt(1 / 60), rel=0.1)


def test_a_group_floor_uses_the_standard_error_of_that_group_only():
    groups = [f"g{place}" for place in range(8)]
    seen = consumption_of(
        *(footprint(group, level, 500) for group in groups for level in ("L0", "L1") for _ in range(50))
    )
    evidence = judged(*((group, option, 40, 80) for group in groups for option in OPTIONS[:2]))
    settings = OptimizerSettings(floors={"preference": 0.8})
    found = estimated(seen, evidence, settings=settings).groups["g3"]
    assert found["p/L0"].group_quality == found["p/L0"].quality
    single = settings.confidence_z_of("preference") * math.hypot(*found["p/L1"].doubt["preference"])
    lower_bound = found["p/L1"].quality["preference"] - single
    assert found["p/L1"].group_quality["preference"] == pytest.approx(lower_bound)
    assert 0.0 < lower_bound < 0.5
    overall = estimated(seen, evidence, settings=settings).overall["p/L1"]
    assert lower_bound < overall.group_quality["preference"] < overall.quality["preference"]
    assert estimated(seen, evidence).groups["g3"]["p/L1"].group_quality == {}


def test_the_same_weights_in_another_zone_need_no_judgments_of_their_own():
    seen = consumption_of(*(footprint("a", level, 500) for level in ("L0", "L1") for _ in range(50)))
    found = estimated(seen, judged(("a", "p/L0", 50, 100)), equivalent=("p/L0", "p/L1"))
    assert found.groups["a"]["p/L1"].quality == found.groups["a"]["p/L0"].quality


def covered(**groups: dict[str, tuple[float, float]]) -> QualityCounts:
    """100 judged prompts per group; by metric: successes at L1, and the prompts for which the metric is defined."""
    counts = [
        QualityCount(group=group, option=option, metric=metric, successes=won, trials=known)
        for group, metrics in groups.items()
        for metric, (won, known) in metrics.items()
        for option in ("p/L0", "p/L1")
    ]
    return evaluated(*counts)


def test_a_metric_counts_for_the_share_of_a_groups_prompts_for_which_it_is_defined():
    evidence = covered(
        essays={"preference": (50, 100)},
        mixed={"preference": (50, 100), "correctness": (25, 50)},
        sums={"preference": (50, 100), "correctness": (50, 100)},
    )
    correct = evidence.model("correctness", "p/L0", NOW.timestamp())
    # Overall the metric is defined for half of the prompts; that counts for two prompts in every group.
    assert correct.coverage("essays") == pytest.approx(1 / 102)
    assert correct.coverage("mixed") == pytest.approx(0.5)
    assert correct.coverage("sums") == pytest.approx(101 / 102)
    assert correct.mean("mixed", "p/L1") == pytest.approx(0.25)
    preferred = evidence.model("preference", "p/L0", NOW.timestamp())
    assert [preferred.coverage(group) for group in ("essays", "mixed", "sums", "unheard-of")] == [1.0] * 4


def test_a_limited_metric_that_was_never_judged_leaves_the_reference_only():
    settings = OptimizerSettings(xi={"preference": 0.1, "correctness": 0.1})
    seen = consumption_of(*(footprint("sums", level, 500) for level in ("L0", "L1") for _ in range(50)))
    found = estimated(seen, covered(sums={"preference": (50, 100)}), settings=settings)
    assert set(found.overall) == {"p/L0"}
    assert "correctness" in found.ineligible["p/L1"]
    assert "preference" not in found.ineligible["p/L1"]
    known = covered(sums={"preference": (50, 100), "correctness": (50, 100)})
    assert set(estimated(seen, known, settings=settings).overall) == {"p/L0", "p/L1"}
    # Verdicts of the metric that none of a group's prompts has: the group loses nothing of it.
    seen.add_footprint(footprint("essays", "L0", 500), now_s=NOW.timestamp(), settings=settings)
    partly = covered(essays={"preference": (50, 100)}, sums={"preference": (50, 100), "correctness": (50, 100)})
    essays = estimated(seen, partly, settings=settings).groups["essays"]
    assert essays["p/L0"].quality["correctness"] < 0.01
    assert essays["p/L1"].quality["correctness"] == pytest.approx(essays["p/L0"].quality["correctness"], abs=0.001)


def test_only_a_material_change_of_the_estimates_triggers_a_solve():
    def at(joules: float) -> Estimates:
        return estimated(consumption_of(*(footprint("a", "L0", joules) for _ in range(100))))

    assert not estimates_changed(at(1_000), at(1_020), SETTINGS.estimates_change)
    assert estimates_changed(at(1_000), at(1_200), SETTINGS.estimates_change)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("FLOORS", {"floors": {"correctness": 0.9}}), ("CONSTANT_BOUNDS", {"constant_bounds": {"correctness"}})],
)
def test_a_setting_for_an_unknown_metric_is_rejected_with_the_remedy(name, setting):
    with pytest.raises(ValueError, match=f"SPROUT_OPTIMIZER_{name} names correctness, .*: add it"):
        OptimizerSettings(**setting)


def test_several_limits_hold_together_as_often_as_one():
    """Each of two limits may be missed half as often, of three a third: z of 1 becomes 1.41 and 1.62."""
    assert joint_confidence_z({"preference": 0.9}, SETTINGS) == {"preference": pytest.approx(1.0)}
    two = joint_confidence_z({"preference": 0.9, "correctness": 1.0}, SETTINGS)
    assert two["correctness"] == pytest.approx(1.410, abs=1e-3)
    wider = joint_confidence_z(two, OptimizerSettings(confidence_z=1.645))
    assert wider["correctness"] == pytest.approx(1.960, abs=1e-3)
    assert joint_confidence_z({"a": 0.9, "b": 0.9, "c": 0.9}, SETTINGS)["b"] == pytest.approx(1.618, abs=1e-3)


def test_a_large_margin_is_joint_too():
    found = joint_confidence_z({"a": 0.9, "b": 0.9}, OptimizerSettings(confidence_z=10.0))
    assert found == {"a": pytest.approx(10.07, abs=0.01), "b": pytest.approx(10.07, abs=0.01)}


def test_limits_may_have_unequal_shares_of_the_probability_of_missing_one():
    found = joint_confidence_z({"a": 0.9, "b": 0.9}, SETTINGS, shares={"a": 0.02, "b": 0.98})
    assert found == {"a": pytest.approx(2.730, abs=1e-3), "b": pytest.approx(1.013, abs=1e-3)}


def test_a_limit_of_zero_is_not_counted():
    assert joint_confidence_z({"preference": 0.9, "correctness": 0.0}, SETTINGS) == {"preference": pytest.approx(1.0)}


def test_a_confidence_level_of_a_single_metric_is_used_as_it_is():
    settings = OptimizerSettings(confidence_z=0.0, confidence_z_by_metric={"correctness": 0.5})
    assert joint_confidence_z({"a": 0.9, "correctness": 0.9}, settings) == {"a": 0.0, "correctness": 0.5}
    assert (settings.confidence_z_of("a"), settings.confidence_z_of("correctness")) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("CAUTION", "0.5", "confidence_z", 0.5),
        ("CONFIDENCE_Z", "0.5", "confidence_z", 0.5),
        ("CAUTIONS", '{"correctness": 1.0}', "confidence_z_by_metric", {"correctness": 1.0}),
        ("CONFIDENCE_Z_BY_METRIC", '{"correctness": 1.0}', "confidence_z_by_metric", {"correctness": 1.0}),
        ("TURN_INTERVAL_S", "2", "loop_interval_s", 2.0),
        ("LOOP_INTERVAL_S", "2", "loop_interval_s", 2.0),
    ],
)
def test_renamed_settings_are_read_under_both_names(monkeypatch, name, value, field, expected):
    monkeypatch.setenv(f"SPROUT_OPTIMIZER_{name}", value)
    assert getattr(OptimizerSettings(), field) == expected
