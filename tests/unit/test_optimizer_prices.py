"""What a token costs in a pool, and the energy and server time of requests that follow from it."""

import json
import tomllib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from services.optimizer.bounds import CurrentIntensity, TrailingRange
from services.optimizer.costs import Consumption, ResourceUse
from services.optimizer.estimates import Estimates, estimate, estimates_changed
from services.optimizer.policy import Situation, make_policy, policy_difference
from services.optimizer.prices import PoolPrices
from services.optimizer.settings import OptimizerSettings
from services.optimizer.state import QualityCounts
from shared.batch_curve import MEASURED, BatchCurve
from shared.carbon import JOULES_PER_KWH
from shared.fleet import Fleet
from shared.messages import EndpointCurve, EvaluationCost, Footprint, Policy, PoolPrice, Quality, QualityCount
from tests.support.fleets import MODEL, fleet_toml

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
SETTINGS = OptimizerSettings(pseudo_requests=1e-9)
CURVE = MEASURED["qwen3-14b-h100"]
TOKENS = {"L0": 200, "L1": 100, "L2": 60}
PROMPT = 50


def fleet(**pool: Any) -> Fleet:
    """A pool `p` with endpoints e0 and e1."""
    document = tomllib.loads(fleet_toml(["h:1", "h:2"]))
    document["pools"][0] |= pool
    return Fleet.model_validate(document)


def curve_of(endpoint: str, curve: BatchCurve = CURVE, *, pool: str = "p", at=NOW, **more: Any) -> EndpointCurve:
    made = {
        "idle_w": curve.idle_w, "step_j": curve.step_j, "token_j": curve.token_j, "step_s": curve.step_s,
        "token_s": curve.token_s, "prompt_token_j": 0.01, "prompt_token_s": 0.0001, "identifiable": True,
        "intervals": 100, "mean_batch": 8.0, "mean_prompt_tokens": float(PROMPT),
    }  # fmt: skip
    return EndpointCurve(endpoint=endpoint, pool=pool, at=at, **(made | more))


def footprint(level: str, number: int = 0, *, pool: str = "p", **more: Any) -> Footprint:
    made = {
        "request_id": f"{pool}-{level}-{number}", "purpose": "request", "model": MODEL, "group": "a", "pool": pool,
        "level": level, "zone": "GB", "endpoint": "e0", "started_at": NOW, "finished_at": NOW, "processing_s": 4.0,
        "server_s": 0.5, "prompt_tokens": PROMPT, "completion_tokens": TOKENS[level], "energy_j": 60.0,
        "embodied_g": 0.0,
    }  # fmt: skip
    return Footprint(**(made | more))


def consumption_of(*footprints: Footprint) -> Consumption:
    made = Consumption()
    for one in footprints:
        made.add_footprint(one, now_s=NOW.timestamp(), settings=SETTINGS)
    return made


def served(**more: Any) -> Consumption:
    return consumption_of(*(footprint(level, n, **more) for level in TOKENS for n in range(20)))


def judged(*options: str) -> QualityCounts:
    counts = [
        QualityCount(group="a", option=option, metric="preference", successes=50, trials=100) for option in options
    ]
    cost = EvaluationCost(generations=0, judgements=0, completion_tokens=0, processing_s=0.0)
    quality = Quality(
        evaluation_id="e", model=MODEL, evaluated_at=NOW, trigger="first", prompts=100, abstentions=0, counts=counts,
        cost=cost,
    )  # fmt: skip
    return QualityCounts([quality], settings=SETTINGS)


def estimated(of: Fleet, consumption: Consumption, *curves: EndpointCurve, load: float | None = None) -> Estimates:
    prices = PoolPrices(of)
    prices.update_curves(curves)
    if load is not None:
        prices.load = {"p": load}
    options = of.options_of(MODEL)
    found = estimate(
        consumption,
        judged(*options),
        options=options,
        reference=of.reference_of(MODEL),
        settings=SETTINGS,
        now_s=NOW.timestamp(),
        prices=prices.of_model(MODEL, consumption, now_s=NOW.timestamp(), settings=SETTINGS),
    )
    assert found is not None
    return found


def policy_of(estimates: Estimates, of: Fleet) -> Policy:
    situation = Situation(
        model=MODEL,
        now=NOW,
        trigger="start",
        intensities={"GB": CurrentIntensity(300.0, NOW)},
        range=TrailingRange(100.0, 300.0),
        estimates=estimates,
    )
    return make_policy(situation, fleet=of, settings=OptimizerSettings(), version=1)[0]


def test_where_capacity_follows_the_load_a_token_costs_its_share_of_a_full_batch():
    of = fleet(dispatch="pack", target_batch=32)
    found = estimated(of, served(), curve_of("e0"), curve_of("e1"))
    price = found.prices["p"]
    assert (price.basis, price.batch) == ("average", 32)
    assert price.token_j == price.meter_token_j == pytest.approx(CURVE.average_token_j(32))
    assert price.prompt_token_j == pytest.approx(0.01 + CURVE.idle_w * 0.0001 / 32)
    for level, tokens in TOKENS.items():
        cell = found.groups["a"][f"p/{level}"]
        joules = tokens * price.token_j + PROMPT * price.prompt_token_j
        assert cell.energy_kwh * JOULES_PER_KWH == pytest.approx(joules)
        # 32 sequences share the server's time.
        assert cell.server_s == pytest.approx((tokens * CURVE.step_time_s(32) + PROMPT * 0.0001) / 32)
        assert cell.processing_s == pytest.approx(4.0)
        assert found.overall[f"p/{level}"].server_s == pytest.approx(cell.server_s)


def test_the_target_follows_from_the_latency_objective_and_the_mean_curve():
    of = fleet(dispatch="pack", tpot_objective_ms=1_000.0 * CURVE.stretched(2.0).step_time_s(40))
    found = estimated(of, served(), curve_of("e0"), curve_of("e1", CURVE.stretched(3.0)))
    assert found.prices["p"].batch == 40


def test_an_objective_that_no_batch_keeps_is_named():
    of = fleet(dispatch="pack", tpot_objective_ms=5.0)
    price = estimated(of, served(), curve_of("e0")).prices["p"]
    assert price.batch == 1
    assert price.reason.startswith("no batch keeps tpot_objective_ms = 5: a step takes 12 ms")


def test_where_servers_run_anyway_a_token_costs_what_one_more_adds():
    of = fleet()
    busy, quiet = (estimated(of, served(), curve_of("e0"), load=load) for load in (50.0, 0.2))
    price = busy.prices["p"]
    assert (price.basis, price.batch) == ("marginal", 50.0)
    assert price.token_j == pytest.approx(CURVE.marginal_token_j(50.0))
    assert price.prompt_token_j == pytest.approx(0.01)
    assert price.meter_token_j == pytest.approx(CURVE.poisson_power_w(50.0) / CURVE.poisson_tokens_per_s(50.0))
    assert price.token_j < 0.25 * price.meter_token_j
    assert quiet.prices["p"].token_j > 10 * price.token_j
    # A shorter answer takes no server away.
    assert {cell.server_s for cell in busy.groups["a"].values()} == {0.0}


def test_the_load_is_estimated_by_littles_law_as_long_as_none_is_reported():
    consumption = served()
    of = fleet()
    price = estimated(of, consumption, curve_of("e0")).prices["p"]
    rate = consumption.requests_per_s(NOW.timestamp(), SETTINGS)
    assert price.batch == pytest.approx(rate * 4.0 / 2)


def test_a_curve_by_which_more_tokens_cost_less_gives_no_negative_price():
    price = estimated(fleet(), served(), curve_of("e0", token_j=0.0), load=50.0).prices["p"]
    assert price.token_j == 0.0
    assert "less than nothing" in price.reason


@pytest.mark.parametrize(
    ("pool", "curves", "reason"),
    [
        ({}, (), "no power curve of its endpoints is known yet"),
        ({}, (curve_of("e0", pool="other"),), "no power curve of its endpoints is known yet"),
        (
            {},
            (curve_of("e0", identifiable=False, reason="always the same batch"),),
            "its power curve cannot be identified: always the same batch",
        ),
        ({"scaling": "elastic"}, (curve_of("e0"),), "it has no target batch: set target_batch or tpot_objective_ms"),
    ],
)
def test_without_a_usable_curve_the_energy_is_the_attributed_one(pool, curves, reason):
    found = estimated(fleet(**pool), served(server_s=None), *curves)
    assert found.prices["p"] == PoolPrice(basis="attributed", reason=reason)
    without_prices = estimate(
        served(server_s=None),
        judged("p/L0", "p/L1", "p/L2"),
        options=("p/L0", "p/L1", "p/L2"),
        reference="p/L0",
        settings=SETTINGS,
        now_s=NOW.timestamp(),
    )
    assert found.groups == without_prices.groups
    assert found.groups["a"]["p/L0"].energy_kwh * JOULES_PER_KWH == pytest.approx(60.0)
    assert found.groups["a"]["p/L0"].server_s is None


def test_only_identifiable_curves_count_and_the_newest_of_each_endpoint():
    prices = PoolPrices(fleet())
    assert prices.update_curves([curve_of("e0", idle_w=200.0), curve_of("e1", idle_w=999.0, identifiable=False)])
    assert prices.curve_of(fleet().pools[0]).curve.idle_w == 200.0
    assert not prices.update_curves([curve_of("e0", idle_w=5.0, at=NOW - timedelta(hours=1))])
    assert prices.update_curves([curve_of("e1", idle_w=100.0)])
    assert prices.curve_of(fleet().pools[0]).curve.idle_w == 150.0


def test_an_identified_curve_is_kept_when_a_later_one_cannot_be_identified():
    prices = PoolPrices(fleet())
    assert prices.update_curves([curve_of("e0")])
    later = curve_of("e0", at=NOW + timedelta(hours=1), identifiable=False, reason="the batch was always about 1.0")
    assert not prices.update_curves([later])
    assert prices.curve_of(fleet().pools[0]).curve is not None


def test_attributed_options_are_charged_for_the_measured_server_time_all_or_none():
    of = fleet()
    known = estimated(of, served())
    assert known.groups["a"]["p/L1"].server_s == pytest.approx(0.5)
    partly = consumption_of(
        *(footprint(level, n, server_s=None if level == "L1" else 0.5) for level in TOKENS for n in range(20))
    )
    assert {cell.server_s for cell in estimated(of, partly).groups["a"].values()} == {None}


def test_without_counted_prompts_reading_them_is_left_out_and_named():
    found = estimated(fleet(), served(prompt_tokens=None), curve_of("e0"), load=50.0)
    price = found.prices["p"]
    assert price.prompt_token_j is None
    assert "the length of the prompts is not known" in price.reason
    assert found.groups["a"]["p/L1"].energy_kwh * JOULES_PER_KWH == pytest.approx(100 * price.token_j)


def stored_by_the_first_release(consumption: Consumption) -> Consumption:
    """The document that the first release would have stored: three sums in every cell."""
    document = json.loads(json.dumps(consumption.to_document()))
    for row in document["cells"].values():
        for option, sums in row.items():
            row[option] = sums[:4]
    return Consumption.from_document(document)


def test_sums_that_an_earlier_release_stored_have_unknown_tokens_not_none():
    of = fleet()
    old = stored_by_the_first_release(served())
    found = estimated(of, old, curve_of("e0"), load=50.0)
    assert found.prices["p"].basis == "attributed"
    assert found.prices["p"].reason == "tokens are known of 0.0 of 10 footprints of p/L0"
    assert found.groups["a"]["p/L0"].energy_kwh * JOULES_PER_KWH == pytest.approx(60.0)
    for level in TOKENS:
        for n in range(10):
            old.add_footprint(footprint(level, n), now_s=NOW.timestamp(), settings=SETTINGS)
    found = estimated(of, old, curve_of("e0"), load=50.0)
    price = found.prices["p"]
    assert price.basis == "marginal"
    joules = 100 * price.token_j + PROMPT * price.prompt_token_j
    assert found.groups["a"]["p/L1"].energy_kwh * JOULES_PER_KWH == pytest.approx(joules)
    assert found.groups["a"]["p/L1"].requests == pytest.approx(30.0)


def test_the_sums_survive_storage():
    made = served()
    assert Consumption.from_document(json.loads(json.dumps(made.to_document()))) == made
    used = made.totals(NOW.timestamp(), SETTINGS)["a"]["p/L1"]
    assert used == ResourceUse(
        requests=20.0, energy_kwh=pytest.approx(1_200.0 / JOULES_PER_KWH), processing_s=80.0, token_requests=20.0,
        completion_tokens=2_000.0, prompt_requests=20.0, prompt_tokens=20.0 * PROMPT, server_requests=20.0,
        server_s=10.0, energy_squares=pytest.approx(20.0 * (60.0 / JOULES_PER_KWH) ** 2),
    )  # fmt: skip


def test_a_level_never_used_in_a_group_has_the_groups_tokens_times_the_options_usual_ratio():
    settings = OptimizerSettings()
    made = Consumption()
    for group, tokens in (("long", {"L0": 1_000, "L1": 500}), ("short", {"L0": 100})):
        for level, number in tokens.items():
            for n in range(500):
                one = footprint(level, n, group=group, completion_tokens=number)
                made.add_footprint(one, now_s=NOW.timestamp(), settings=settings)
    prices = {"p": PoolPrice(basis="average", batch=8, token_j=2.0, prompt_token_j=0.0, reason="")}
    counts = judged("p/L0", "p/L1")
    found = estimate(
        made, counts, options=("p/L0", "p/L1"), reference="p/L0", settings=settings, now_s=NOW.timestamp(),
        prices=prices,
    )  # fmt: skip
    assert found.groups["short"]["p/L1"].energy_kwh * JOULES_PER_KWH == pytest.approx(100.0, rel=0.12)


def test_a_pool_with_a_curve_is_compared_with_one_without_in_joules_of_their_meters():
    document = tomllib.loads(fleet_toml(["h:1", "h:2"]))
    document["pools"][0] |= {"dispatch": "pack", "target_batch": 32}
    endpoints = [{"name": "f0", "grpc": "h:3"}]
    document["pools"].append({"name": "q", "model": MODEL, "zone": "GB", "endpoints": endpoints})
    of = Fleet.model_validate(document)
    consumption = consumption_of(
        *(footprint(level, n, pool=pool) for pool in "pq" for level in TOKENS for n in range(20))
    )
    found = estimated(of, consumption, curve_of("e0"))
    assert {pool: price.basis for pool, price in found.prices.items()} == {"p": "average", "q": "attributed"}
    row = found.groups["a"]
    priced = 200 * CURVE.average_token_j(32) + PROMPT * found.prices["p"].prompt_token_j
    assert row["p/L0"].energy_kwh * JOULES_PER_KWH == pytest.approx(priced)
    assert row["q/L0"].energy_kwh * JOULES_PER_KWH == pytest.approx(60.0)
    assert row["q/L0"].server_s == pytest.approx(0.5)


def test_a_policy_names_the_prices_and_expects_the_grams_that_requests_add():
    consumption = served()
    elastic, fixed = fleet(dispatch="pack", target_batch=64), fleet()
    packed = policy_of(estimated(elastic, consumption, curve_of("e0")), elastic)
    spread = policy_of(estimated(fixed, consumption, curve_of("e0"), load=64.0), fixed)
    attributed = policy_of(estimated(fixed, consumption), fixed)
    assert "a token in p costs 0.169 J, average at batch 64: capacity follows the load, so fewer" in packed.reason
    assert "a token in p costs 0.0379 J, marginal at batch 64, of 0.169 J on the meter per token" in spread.reason
    assert "a request in p costs the energy attributed to earlier ones: no power curve" in attributed.reason
    assert spread.inputs.prices["p"].basis == "marginal"
    pool = fixed.pools[0]
    price = spread.inputs.prices["p"]
    joules = 200 * price.token_j + PROMPT * price.prompt_token_j
    assert spread.reference_g_per_request == pytest.approx(joules / JOULES_PER_KWH * 300.0 * pool.pue)
    # On servers that run anyway, the same shorter answers save much less than where servers follow the load.
    saved = [one.reference_g_per_request - one.expected_g_per_request for one in (spread, packed)]
    assert 0.0 < saved[0] < 0.25 * saved[1]
    assert policy_difference(attributed, spread, OptimizerSettings()) is not None


def test_another_price_triggers_a_solve_and_another_basis_a_policy():
    of = fleet()
    consumption = served()
    at_50, at_51, at_1 = (estimated(of, consumption, curve_of("e0"), load=load) for load in (50.0, 51.0, 1.0))
    attributed = estimated(of, consumption)
    change = OptimizerSettings().estimates_change
    assert not estimates_changed(at_50, at_51, change)
    assert estimates_changed(at_50, at_1, change)
    assert estimates_changed(at_50, attributed, 1e9)
    old, new = policy_of(attributed, of), policy_of(at_50, of)
    indifferent = OptimizerSettings(carbon_change=1.0, probability_change=1.0)
    assert policy_difference(old, new, indifferent) == "tokens are priced in another way"
    earlier = old.model_copy(update={"inputs": old.inputs.model_copy(update={"prices": {}})})
    assert policy_difference(earlier, old, indifferent) is None
