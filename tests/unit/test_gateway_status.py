"""What the gateway's page shows: mix, saving, ages, bounds on what is kept; and its rendering."""

from datetime import UTC, datetime, timedelta

import httpx
import pytest
from fastapi import FastAPI, Request

from services.gateway.keys import ApiKey
from services.gateway.page import add_page, format_grams, is_loopback
from services.gateway.status import ID_LENGTH, MAX_COUNTED, MAX_RECENT, Monitor, level_mix, reason_of, saving_g
from shared.fleet import Fleet
from shared.messages import (
    CarbonIntensity,
    Decision,
    ErrorDetail,
    GenerationResponse,
    IntensityPoint,
    OptionEstimate,
    Policy,
    PoolCapacity,
    SavingOnMeter,
    Timing,
    Usage,
)
from shared.messages.policies import OptionInputs
from shared.runtime.clock import ManualClock
from tests.support.fleets import MODEL, ZONE
from tests.support.messages import policy

NOON = datetime(2024, 2, 8, 12, tzinfo=UTC)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet.model_validate(
        {
            "directives": [{"level": "L0"}, {"level": "L1", "text": "Briefly."}],
            "models": [{"name": MODEL, "chat_template": "llama-2"}],
            "pools": [
                {"name": "p", "model": MODEL, "zone": ZONE, "endpoints": [{"name": "e0", "grpc": "e0:1"}]},
            ],
        }
    )


def decided(level: str = "L1", **changes: object) -> Decision:
    values = {"source": "policy", "group": "default", "pool": "p", "level": level, "zone": ZONE, "policy_version": 1}
    return Decision.model_validate({**values, "propensity": 0.5, **changes})


def response(number: int, decision: Decision | None = None, **changes: object) -> GenerationResponse:
    values = {
        "request_id": f"chatcmpl-{number:032d}", "model": MODEL, "status": "ok", "text": "secret", "endpoint": "e0",
        "finish_reason": "stop", "decision": decision or decided(), "requested_at": NOON,
        "usage": Usage(completion_tokens=30, source="server"),
        "timing": Timing(received_at=NOON, started_at=NOON, finished_at=NOON),
    }  # fmt: skip
    return GenerationResponse.model_validate({**values, **changes})


def priced() -> Policy:
    """300 g/kWh; the reference takes 2 Wh, L1 half of it."""
    made = policy({"L0": 0.25, "L1": 0.75}, now=NOON, bounds={"preference": 0.9}, expected_quality={"preference": 0.95})
    means = {
        f"p/{level}": OptionEstimate(energy_kwh=kwh, processing_s=1.0, quality={}, doubt={})
        for level, kwh in (("L0", 2e-3), ("L1", 1e-3))
    }
    options = {name: OptionInputs(pool="p", g_per_kwh=300.0, embodied_g_per_s=0.0) for name in means}
    inputs = made.inputs.model_copy(update={"estimates": {"default": means}, "options": options})
    return made.model_copy(update={"inputs": inputs})


def test_the_saving_is_the_difference_of_the_means_and_starts_again_at_midnight(fleet):
    monitor = Monitor(fleet, started_at=NOON)
    monitor.note(response(1), grams=0.3, now=NOON)
    assert monitor.status(NOON).saved_today.attributed_g is None  # nothing to compare with, and not 0
    monitor.update_policies([priced()])
    for number, level in enumerate(("L1", "L1", "L0")):
        monitor.note(response(number, decided(level)), grams=0.3, now=NOON)
    saved = monitor.status(NOON).saved_today
    assert saved.attributed_g == pytest.approx(0.6)
    assert (saved.answers, saved.compared, saved.since) == (4, 3, NOON)
    tomorrow = monitor.status(NOON + timedelta(days=1)).saved_today
    assert tomorrow.attributed_g is None
    assert tomorrow.since == datetime(2024, 2, 9, tzinfo=UTC)
    assert saving_g(priced(), decided(group="unknown")) is None


def test_the_saving_on_the_meter_is_the_ledgers_and_that_of_today(fleet):
    monitor = Monitor(fleet, started_at=NOON)
    saved = monitor.status(NOON).saved_today
    assert (saved.on_the_meter_g, saved.meter.interval_g) == (None, None)
    assert saved.meter.reason == "the ledger has not published it today"
    midnight = NOON.replace(hour=0)
    few = SavingOnMeter(window="day", since=midnight, at=NOON, blocks=2, reason="2 reference blocks, 4 are needed")
    monitor.update_savings([few])
    saved = monitor.status(NOON).saved_today
    assert (saved.on_the_meter_g, saved.meter.blocks, saved.meter.reason) == (None, 2, few.reason)
    known = few.model_copy(
        update={"saved_g": 12.0, "saved_g_low": 8.0, "saved_g_high": 16.0, "reason": "", "judge_subtracted": False}
    )
    month = known.model_copy(
        update={"window": "28-days", "saved_share": 0.2, "saved_share_low": 0.1, "saved_share_high": 0.3}
    )
    monitor.update_savings([known, month])
    saved = monitor.status(NOON).saved_today
    assert (saved.on_the_meter_g, saved.meter.interval_g, saved.meter.at) == (12.0, (8.0, 16.0), NOON)
    assert (saved.meter.share_28_days, saved.meter.share_28_days_interval) == (0.2, (0.1, 0.3))
    assert not saved.meter.judge_subtracted
    # The figure of yesterday is none of today.
    tomorrow = monitor.status(NOON + timedelta(days=1)).saved_today
    assert (tomorrow.on_the_meter_g, tomorrow.meter.share_28_days) == (None, 0.2)


def test_the_mix_weighs_the_groups_and_an_expired_policy_means_no_directive(fleet):
    made = priced()
    inputs = made.inputs.model_copy(update={"weights": {"qa": 0.5, "default": 0.5}})
    made = made.model_copy(update={"inputs": inputs, "groups": {"qa": {"p/L0": 1.0}}})
    assert level_mix(made) == pytest.approx({"L0": 0.625, "L1": 0.375})
    monitor = Monitor(fleet, started_at=NOON)
    assert monitor.status(NOON).models[0].policy == "none"
    monitor.update_policies([made])
    model = monitor.status(NOON).models[0]
    assert (model.policy, model.quality[0].expected, model.quality[0].required) == ("current", 0.95, 0.9)
    late = monitor.status(made.valid_until + timedelta(seconds=1)).models[0]
    assert (late.policy, late.mix) == ("expired", {"L0": 1.0})


def test_old_intensities_and_plans_are_not_called_current(fleet):
    monitor = Monitor(fleet, started_at=NOON)
    points = [IntensityPoint(at=NOON + timedelta(hours=hour), intensity_g_per_kwh=100.0 + hour) for hour in range(30)]
    for zone in (ZONE, "elsewhere"):
        monitor.update_intensities(
            [CarbonIntensity(zone=zone, latest=points[0], forecast=tuple(points), source="test", published_at=NOON)]
        )
    plan = {"pool": "p", "at": NOON, "valid_until": NOON + timedelta(minutes=10), "requests_per_s": 2.0, "in_flight": 3,
            "endpoints": 1, "endpoints_needed": 1, "awake": ("e0",), "reason": "load"}  # fmt: skip
    monitor.update_capacities([PoolCapacity.model_validate(plan)])
    now = monitor.status(NOON)
    assert [zone.zone for zone in now.zones] == [ZONE]
    assert now.zones[0].now.g_per_kwh == 100.0
    assert len(now.zones[0].forecast) == 25
    assert (now.pools[0].in_use, now.pools[0].in_flight) == (1, 3)
    later = monitor.status(NOON + timedelta(hours=4))
    assert later.zones[0].now is None
    assert later.pools[0].in_use is None


def test_what_is_kept_is_bounded_and_has_no_text_and_no_whole_id(fleet):
    monitor = Monitor(fleet, started_at=NOON)
    for number in range(2 * MAX_COUNTED):
        monitor.note(response(number, tenant="garden" if number == 999 else None), grams=None, now=NOON)
    status = monitor.status(NOON)
    assert len(status.answers) == MAX_RECENT
    assert status.models[0].served == {"L1": MAX_COUNTED}
    assert "secret" not in status.model_dump_json()
    assert response(999).request_id not in status.model_dump_json()
    assert len(status.answers[0].id) == ID_LENGTH + 1
    assert len(monitor.status(NOON, tenant="garden").answers) == 1


def test_the_reasons_are_told():
    assert reason_of(response(1)) == "drawn by policy 1"
    assert reason_of(response(1, decided(source="forced"))) == "required by the request"
    failed = response(1, status="error", error=ErrorDetail(code="no_endpoint", message="none"))
    assert reason_of(failed) == "error: no_endpoint"


async def nobody(request: Request) -> ApiKey:
    raise AssertionError("on loopback the page needs no key")


async def test_the_page_escapes_what_others_wrote(fleet):
    monitor = Monitor(fleet, started_at=NOON)
    monitor.note(response(1, decided(group="<script>alert(1)</script>")), grams=0.3, now=NOON)
    api = FastAPI()
    add_page(api, monitor, clock=ManualClock(NOON), authenticate=nobody, host="127.0.0.1")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://127.0.0.1") as client:
        text = (await client.get("/")).text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert "300 mg" in text


@pytest.mark.parametrize(
    ("grams", "text"),
    [(0.0, "0.00 mg"), (0.0123, "12.3 mg"), (1.5, "1.50 g"), (250.0, "250 g"), (1.2e6, "1\xa0200 kg")],
)
def test_grams_are_readable(grams, text):
    assert format_grams(grams) == text


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("sprout.example", False), ("localhost.example", False), ("", False)],
)  # fmt: skip
def test_loopback_is_recognised(host, loopback):
    assert is_loopback(host) is loopback
