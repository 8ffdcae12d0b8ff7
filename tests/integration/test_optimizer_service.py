"""The optimizer as a process, on real Kafka and PostgreSQL."""

from datetime import UTC, datetime

import pytest

from shared.messages import (
    EndpointCurve,
    GroupEvidence,
    PackedArray,
    PromptGrouping,
    QualityCount,
)
from shared.topics import (
    CARBON_INTENSITY,
    FOOTPRINTS,
    POWER_CURVES,
    PROMPT_GROUPS,
    QUALITY,
)
from tests.support.fleets import fleet_toml
from tests.support.optimizer import FLEET, LEVELS, NOW, explained, footprint, intensity, peers, quality, start_optimizer
from tests.support.processes import leader

pytestmark = pytest.mark.integration

PACKED = fleet_toml(["127.0.0.1:9"] * 3, levels=LEVELS, pool='dispatch = "pack"\ntarget_batch = 8\nsleep = true')


def grouping(*, learned_at: datetime) -> PromptGrouping:
    """Two groups: L0 is preferred in the first, L1 in the second."""
    counts = [
        QualityCount(group=group, option=f"p/{level}", metric="preference", successes=won, trials=100)
        for group, row in {"v.00": {"L0": 90, "L1": 10}, "v.01": {"L0": 20, "L1": 80}}.items()
        for level, won in row.items()
    ]
    return PromptGrouping(
        model="m", version="v", learned_at=learned_at, prompts=200, names=("v.00", "v.01"), features=1,
        arrays={"weights": PackedArray(dtype="<f4", shape=(0,), data="")}, traffic={"v.00": 0.5, "v.01": 0.5},
        evidence=(GroupEvidence(evaluated_at=learned_at, counts=counts),),
    )  # fmt: skip


def curve(endpoint: str) -> EndpointCurve:
    """At a batch of 8 a step takes 0.1 s and 30 J, of which 10 J are idle power: 3.75 J a token."""
    return EndpointCurve(
        endpoint=endpoint, pool="p", at=NOW, idle_w=100.0, step_j=12.0, token_j=1.0, step_s=0.06, token_s=0.005,
        identifiable=True, intervals=100, mean_batch=4.0,
    )  # fmt: skip


async def test_evidence_becomes_a_policy_and_a_restart_continues_where_it_was(supervisor, kafka, database, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    name = start_optimizer(supervisor, kafka, database, fleet)
    try:
        async with peers(kafka) as around:
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            await around.send(FOOTPRINTS, "f", footprint(0, "L0", model="unknown"))
            for level in ("L0", "L1"):
                await around.send(FOOTPRINTS, "f", *(footprint(n, level) for n in range(40)))
            cautious = await around.policy(lambda one: one.inputs.weights.get("qa") == 1.0)
            assert cautious.status == "reference"
            assert cautious.overall == cautious.row("qa") == {"p/L0": 1.0}
            assert "judged prompts" in cautious.reason or "footprints" in cautious.reason
            await around.until_counted()

            await around.send(QUALITY, "m", quality("e1", successes={"p/L0"[2:]: 60, "L1": 40}))
            bold = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
            assert bold.status == "optimal"
            assert bold.bounds["preference"] == pytest.approx(0.9)
            assert bold.expected_quality["preference"] == pytest.approx(0.9, abs=1e-6)
            assert bold.row("qa")["p/L1"] == pytest.approx(0.202, abs=0.02)  # 0.3 without a safety margin
            assert bold.expected_g_per_request < bold.reference_g_per_request
            assert bold.limits["preference"].mean - bold.limits["preference"].margin == pytest.approx(0.9, abs=1e-6)
            assert bold.limits["preference"].carbon_points_per_point > 0.0
            assert bold.extra_g == {"qa": {"p/L0": 0.0, "p/L1": 0.0}}
            assert cautious.limits == cautious.extra_g == {}
            assert bold.version > cautious.version
            await explained(kafka, bold)

            supervisor.kill(name)
            await around.send(FOOTPRINTS, "f", *(footprint(n, "L0") for n in range(40)))  # redelivered
            name = start_optimizer(supervisor, kafka, database, fleet)
            await around.send(CARBON_INTENSITY, "GB", intensity(100.0))
            clean = await around.policy(lambda one: one.version > bold.version)
            assert clean.version == bold.version + 1
            assert clean.inputs.k0_g_per_kwh == 100.0  # the last policy was published, so it was not repeated
            assert clean.bounds["preference"] == 1.0
            assert clean.row("qa") == {"p/L0": 1.0}
            assert clean.inputs.estimates["qa"]["p/L0"].requests == pytest.approx(40.0, rel=0.01)

            learned = grouping(learned_at=datetime.now(UTC))
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            await around.send(PROMPT_GROUPS, "m", learned)
            grouped = await around.policy(lambda one: one.group_version == "v")
            assert grouped.groups.keys() == {"v.00", "v.01"}
            assert grouped.row("v.01").get("p/L1", 0.0) > grouped.row("v.00").get("p/L1", 0.0)

            supervisor.kill(name)
            name = start_optimizer(supervisor, kafka, database, fleet)
            await around.send(CARBON_INTENSITY, "GB", intensity(250.0))
            again = await around.policy(lambda one: one.version > grouped.version)
            assert again.group_version == "v"  # it waited for the topic of prompt groups to be read
    finally:
        supervisor.stop(name)


async def test_footprints_that_follow_an_evaluation_make_a_policy_at_once(supervisor, kafka, database, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    settings = {"SPROUT_OPTIMIZER_ESTIMATES_INTERVAL_MIN": "600", "SPROUT_OPTIMIZER_EVALUATION_INTERVAL_S": "1"}
    name = start_optimizer(supervisor, kafka, database, fleet, **settings)
    try:
        async with peers(kafka) as around:
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            await around.send(FOOTPRINTS, "f", *(footprint(n, "L0") for n in range(40)))
            # While the optimizer was away, two evaluations of the model came in: both count.
            await around.send(QUALITY, "e1", quality("e1", successes={"L0": 60, "L1": 40}))
            await around.send(QUALITY, "e2", quality("e2", successes={"L0": 60, "L1": 40}))
            first = await around.policy(lambda one: one.inputs.weights.get("qa") == 1.0)
            assert "footprints" in first.reason
            await around.send(FOOTPRINTS, "f", *(footprint(n, "L1") for n in range(40)))
            useful = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
            assert useful.inputs.estimates["qa"]["p/L1"].trials == pytest.approx(200.0, rel=0.01)
    finally:
        supervisor.stop(name)


async def test_of_two_optimizers_one_publishes_and_the_other_takes_over(supervisor, kafka, database, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    names = [start_optimizer(supervisor, kafka, database, fleet) for _ in range(2)]
    try:
        async with peers(kafka) as around:
            await around.send_evidence()
            before = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0.1)
            killed = await leader(supervisor, names)
            supervisor.kill(killed)
            (left,) = set(names) - {killed}
            assert await leader(supervisor, [left]) == left
            await around.send(CARBON_INTENSITY, "GB", intensity(100.0))
            after = await around.policy(lambda one: one.inputs.k0_g_per_kwh == 100.0)
            assert after.inputs.estimates["qa"]["p/L1"].requests == pytest.approx(40.0, rel=0.01)
            assert after.version > before.version
            versions = await around.versions()
            assert versions == list(range(1, after.version + 1))  # none twice
    finally:
        for name in set(names) & set(supervisor.names):
            supervisor.stop(name)


async def test_curves_and_load_reports_become_prices_and_awake_endpoints(supervisor, kafka, database, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(PACKED)
    settings = {
        "SPROUT_OPTIMIZER_LOAD_EXPIRY_S": "1",
        "SPROUT_OPTIMIZER_CAPACITY_INTERVAL_S": "0.2",
        "SPROUT_OPTIMIZER_CAPACITY_DWELL_MIN": "0.05",
        "SPROUT_OPTIMIZER_PSEUDO_REQUESTS": "0.001",
    }
    name = start_optimizer(supervisor, kafka, database, fleet, **settings)
    try:
        async with peers(kafka) as around:
            await around.send_evidence()
            attributed = await around.policy(lambda one: one.inputs.weights.get("qa") == 1.0)
            assert attributed.inputs.prices["p"].basis == "attributed"
            assert "no power curve of its endpoints is known yet" in attributed.reason
            joules = attributed.inputs.estimates["qa"]["p/L0"].energy_kwh * 3.6e6
            assert joules == pytest.approx(1_000.0, rel=0.01)

            await around.send(POWER_CURVES, "e0", curve("e0"))
            priced = await around.policy(lambda one: one.inputs.prices["p"].basis == "average")
            price = priced.inputs.prices["p"]
            assert (price.batch, price.token_j) == (8.0, pytest.approx(3.75))
            cell = priced.inputs.estimates["qa"]["p/L0"]
            assert cell.energy_kwh * 3.6e6 == pytest.approx(10 * 3.75, rel=0.01)
            assert cell.server_s == pytest.approx(10 * 0.1 / 8, rel=0.01)

            async with around.reporting(6, 5, 0):
                plan = await around.plan(lambda one: True)
                # 11 requests and a margin of 2 * sqrt(11) need 3 endpoints with 8 each.
                assert (plan.target_batch, plan.in_flight, plan.endpoints_needed) == (8, 11, 3)
                assert plan.awake == ("e0", "e1", "e2")
            async with around.reporting(1, 0, 0):
                plan = await around.plan(lambda one: len(one.awake) == 1)
                assert plan.awake == ("e0",)
                assert len(plan.forecast) == 6

                supervisor.kill(name)
                name = start_optimizer(supervisor, kafka, database, fleet, **settings)
                again = await around.plan(lambda one: one.at > plan.at)
                assert again.awake == ("e0",)
    finally:
        supervisor.stop(name)
