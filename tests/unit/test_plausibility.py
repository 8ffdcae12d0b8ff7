"""Control messages that must not be used: topic, key, change of a good message, expected words; one line each."""

import base64
import zlib
from datetime import UTC, datetime, timedelta

import pytest

from shared.kafka.plausibility import MAX_AHEAD, ImplausibleError, check_plausible
from shared.messages import Message
from shared.runtime.clock import Clock, ManualClock
from tests.support.contract import EXAMPLES, NOW

CLOCK = ManualClock(NOW)
LATER = NOW + timedelta(minutes=6)
IN_2125 = datetime(2125, 1, 1, tzinfo=UTC)

GOOD: dict[str, tuple[str, Message]] = {
    "carbon-intensity": ("GB", EXAMPLES["carbon-intensity"]),
    "policies": ("m", EXAMPLES["policies"]),
    "quality": ("m", EXAMPLES["quality"]),
    "prompt-groups": ("m", EXAMPLES["prompt-groups"]),
    "power-curves": ("e0", EXAMPLES["power-curves"]),
    "load-reports": ("router-1", EXAMPLES["load-reports"]),
    "capacity": ("p", EXAMPLES["capacity"]),
}

BOMB = base64.b64encode(zlib.compress(bytes(1_000_000))).decode()
COUNT = {"group": "g", "option": "p/L1", "metric": "q"}
ATTACKS = [
    ("carbon-intensity", "GB", {"latest": {"at": IN_2125, "intensity_g_per_kwh": 1}}, "latest is in the future"),
    ("carbon-intensity", "GB", {"published_at": LATER}, "published_at is in the future"),
    ("carbon-intensity", "GB", {"latest": {"at": NOW, "intensity_g_per_kwh": 1e9}}, "an intensity is above"),
    ("carbon-intensity", "GB", {"history": [{"at": NOW, "intensity_g_per_kwh": 5_001}]}, "history: an intensity"),
    ("carbon-intensity", "GB", {"history": [{"at": IN_2125, "intensity_g_per_kwh": 1}]}, "history: a time"),
    ("carbon-intensity", "GB", {"forecast": [{"at": IN_2125, "intensity_g_per_kwh": 1}]}, "forecast: a time"),
    ("carbon-intensity", "FR", {}, "the key is not the name"),
    ("policies", "m", {"created_at": IN_2125, "valid_until": IN_2125}, "created_at is in the future"),
    ("policies", "m", {"valid_until": NOW + timedelta(days=8)}, "valid_until is more than 7 days"),
    ("policies", "m", {"valid_until": IN_2125}, "valid_until is more than 7 days"),
    *((topic, key, {"schema_version": 2}, "schema_version is newer") for topic, (key, _) in GOOD.items()),
    ("policies", "other", {}, "the key is not the name"),
    ("policies", "m", {"groups": {f"g{n}": {"p/L0": 1} for n in range(1_001)}}, "groups: more than 1000"),
    ("quality", "m", {"evaluated_at": LATER}, "evaluated_at is in the future"),
    (
        "quality",
        "m",
        {"counts": [COUNT | {"successes": 6, "trials": 5}]},
        "more successes",
    ),
    (
        "quality",
        "m",
        {"counts": [COUNT | {"successes": 1, "trials": 1e12}]},
        "tri",
    ),
    ("quality", "M", {}, "the key is not the name"),
    ("prompt-groups", "m", {"learned_at": LATER}, "learned_at is in the future"),
    ("prompt-groups", "m", {"evidence": [{"evaluated_at": LATER, "counts": []}]}, "evidence: a time"),
    ("prompt-groups", "m", {"names": [f"g{n}" for n in range(1_001)]}, "names: more than"),
    (
        "prompt-groups",
        "m",
        {"arrays": {f"a{n}": {"dtype": "<f4", "shape": [1], "data": ""} for n in range(9)}},
        "arrays",
    ),
    ("prompt-groups", "m", {"arrays": {"a": {"dtype": "<f8", "shape": [1 << 24], "data": BOMB}}}, "arrays: more than"),
    (
        "prompt-groups",
        "m",
        {"arrays": {"a": {"dtype": "<f8", "shape": [-8, -8], "data": BOMB}}},
        "a length is neg",
    ),
    ("prompt-groups", "other", {}, "the key is not the name"),
    ("power-curves", "e0", {"at": LATER}, "at is in the future"),
    ("power-curves", "e0", {"idle_w": 1e7}, "idle_w is not between"),
    ("power-curves", "e0", {"step_j": 1e12}, "an energy is not between"),
    ("power-curves", "e0", {"prompt_token_s": 1e7}, "a duration is not between"),
    ("power-curves", "e1", {}, "the key is not the name"),
    ("load-reports", "router-1", {"at": LATER}, "at is in the future"),
    ("load-reports", "router-2", {}, "the key is not the name"),
    (
        "load-reports",
        "router-1",
        {"pools": [{"pool": "p", "arrivals": 10**12, "waiting": 0, "endpoints": {}}]},
        "pools is not",
    ),
    ("capacity", "p", {"at": LATER}, "at is in the future"),
    ("capacity", "p", {"valid_until": IN_2125}, "valid_until is more than 7 days"),
    ("capacity", "p", {"endpoints_needed": 10**9}, "endpoints is not between"),
    ("capacity", "p", {"forecast": [{"at": IN_2125, "endpoints_needed": 1}]}, "forecast: a time"),
    ("capacity", "p", {"reserved": {"e0": 10**9}}, "endpoints is not between"),
    ("capacity", "q", {}, "the key is not the name"),
]


@pytest.mark.parametrize("topic", GOOD)
def test_a_good_message_is_believed(topic: str) -> None:
    key, message = GOOD[topic]
    check_plausible(message, key=key.encode(), clock=CLOCK)


def test_an_evaluation_may_have_the_key_of_an_earlier_release():
    _, message = GOOD["quality"]
    for name in ("evaluation_id", "model"):
        check_plausible(message, key=getattr(message, name).encode(), clock=CLOCK)


@pytest.mark.parametrize(("topic", "key", "change", "why"), ATTACKS, ids=lambda value: str(value)[:40])
def test_an_implausible_message_is_rejected(topic: str, key: str, change: dict[str, object], why: str) -> None:
    message = GOOD[topic][1]
    attack = type(message).model_validate(message.model_dump() | change)
    with pytest.raises(ImplausibleError, match=why):
        check_plausible(attack, key=key.encode(), clock=CLOCK)


def test_clocks_may_differ_by_a_few_minutes_and_in_a_replay_by_two_wall_seconds() -> None:
    quality = EXAMPLES["quality"].model_copy(update={"evaluated_at": NOW + MAX_AHEAD})
    check_plausible(quality, key=b"m", clock=CLOCK)
    replay = Clock.starting(NOW - timedelta(minutes=20), rate=720)
    check_plausible(quality.model_copy(update={"evaluated_at": NOW}), key=b"m", clock=replay)
