"""What is served, until when, and how a failed attempt and a streamed answer are handled: the router's small rules."""

import json
import tomllib
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.router.admission import Arrival, Limits, arrive, refusal
from services.router.chunking import Chunker
from services.router.deadlines import deadline_of
from services.router.settings import RouterSettings
from shared.fleet import Fleet
from shared.inference.attempts import RetrySettings
from shared.kafka.dead_letters import PoisonMessageError
from shared.messages import ErrorDetail
from shared.runtime.clock import Clock
from tests.support.router import fleet_toml

NOON = datetime(2023, 2, 10, 12, tzinfo=UTC)
FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))
LIMITS = Limits(max_request_bytes=2_000, max_prompt_chars=100, default_deadline_s=600, default_deadline_wall_s=30)
REPLAY = Clock(rate=720.0, origin_wall_s=1_000.0, origin_event_s=NOON.timestamp())


def arrived(
    value: bytes | None = None, *, clock: Clock = REPLAY, timestamp: int = 1_001_000, fleet: Fleet = FLEET, **fields
) -> Arrival:
    value = json.dumps({"prompt": "Why?", **fields}).encode() if value is None else value
    record = SimpleNamespace(
        value=value, key=b"k", topic="requests", partition=3, offset=17, timestamp=timestamp, headers=()
    )
    return arrive(record, received_at=NOON + timedelta(hours=1), clock=clock, fleet=fleet, limits=LIMITS)


def code(arrival: Arrival) -> str | None:
    error = refusal(arrival, fleet=FLEET, limits=LIMITS)
    return None if error is None else error.code


def test_a_request_without_id_model_and_time_gets_them_from_its_record_and_the_fleet():
    arrival = arrived()
    assert arrival.request_id == "requests-3-17"
    assert arrival.model == "m"
    assert arrival.requested_at == NOON + timedelta(seconds=720)  # a second of ours after the origin
    assert code(arrival) is None


def test_what_the_producer_says_of_itself_counts():
    arrival = arrived(id="mine", requested_at=NOON.isoformat())
    assert (arrival.request_id, arrival.requested_at) == ("mine", NOON)


def test_a_record_without_a_timestamp_was_requested_when_it_was_received():
    assert arrived(timestamp=-1).requested_at == NOON + timedelta(hours=1)


@pytest.mark.parametrize("value", [b"", b"{", b"null", b"3", b"\xff", b'{"prompt": 3}', b'{"prompt": "a", "id": ""}'])
def test_what_is_no_request_is_poison(value):
    with pytest.raises(PoisonMessageError):
        arrived(value)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"prompt": "x" * 100}, None),
        ({"prompt": "x" * 101}, "prompt_too_large"),
        ({"prompt": None, "messages": [{"role": "user", "content": "x" * 60}] * 2}, "prompt_too_large"),
        ({"metadata": {"a": "x" * 2_000}}, "prompt_too_large"),
        ({"model": "other"}, "unknown_model"),
        ({"deadline": (NOON + timedelta(hours=1)).isoformat()}, "deadline_exceeded"),
        ({"deadline": (NOON + timedelta(hours=1, seconds=1)).isoformat()}, None),
    ],
)
def test_what_is_not_served_is_refused_with_a_code(fields, wanted):
    assert code(arrived(**fields)) == wanted


def test_a_tenants_defaults_apply_where_a_request_says_nothing_and_its_deadline_to_the_letter():
    tenants = '[[tenants]]\nname = "desk"\ndirective = "L2"\nsystem = "Be kind."\ndeadline_s = 5\n'
    fleet = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"]) + tenants))
    received_at = NOON + timedelta(hours=1)
    given = arrived(tenant="desk", fleet=fleet)
    assert given.deadline == received_at + timedelta(seconds=5)
    assert given.request.directive == "L2"
    assert [turn.role for turn in given.request.conversation()] == ["system", "user"]
    said = received_at + timedelta(seconds=90)
    assert arrived(tenant="desk", fleet=fleet, deadline=said.isoformat()).deadline == said
    for stranger in ("other", None):
        alone = arrived(tenant=stranger, fleet=fleet)
        assert alone.deadline == arrived().deadline
        assert (alone.request.directive, len(alone.request.conversation())) == (None, 1)


def test_refusals_never_quote_the_prompt():
    error = refusal(arrived(prompt="secret" * 50), fleet=FLEET, limits=LIMITS)
    assert error is not None
    assert "secret" not in error.message
    assert "'prompt' has 300 characters" in error.message


def test_a_default_deadline_lasts_long_enough_on_the_wall_clock_too():
    def after_s(clock: Clock) -> float:
        deadline = deadline_of(None, received_at=NOON, clock=clock, default_s=600, default_wall_s=30)
        return (deadline - NOON).total_seconds()

    assert after_s(Clock()) == 600
    assert after_s(REPLAY) == 30 * 720
    asked = NOON + timedelta(seconds=1)
    assert deadline_of(asked, received_at=NOON, clock=REPLAY, default_s=600, default_wall_s=30) == asked


@given(st.integers(1, 2_000), st.floats(0, 1, exclude_max=True))
def test_pauses_grow_to_their_limit_and_vary(attempts, jitter):
    rules = RetrySettings(backoff_s=0.1, backoff_max_s=2.0)
    full_s = min(2.0, 0.1 * 2 ** min(attempts - 1, 10))
    assert 0.5 * full_s <= rules.pause_s(attempts, jitter) <= full_s


@pytest.mark.parametrize(
    ("attempts", "published", "pause_s", "remaining_s", "verdict"),
    [
        (1, False, 0.1, 5.0, None),
        (1, True, 0.1, 5.0, "upstream_error"),
        (3, False, 0.1, 5.0, "upstream_error"),
        (1, False, 0.1, 0.1, "deadline_exceeded"),
    ],
)
def test_an_attempt_is_repeated_while_it_is_safe_allowed_and_in_time(
    attempts, published, pause_s, remaining_s, verdict
):
    rules = RetrySettings(max_attempts=3)
    code = rules.give_up_code(attempts=attempts, published=published, pause_s=pause_s, remaining_s=remaining_s)
    assert code == verdict


def test_chunks_are_numbered_and_cut_by_time():
    chunker = Chunker("r", interval_s=1.0)
    assert chunker.due_in_s(0.0) is None
    chunker.add("a")
    assert chunker.due_in_s(10.0) == 0.0
    assert not chunker.started
    first = chunker.cut(10.0)
    chunker.add("b")
    chunker.add("c")
    assert chunker.due_in_s(10.4) == pytest.approx(0.6)
    (last,) = chunker.finish(finish_reason="stop")
    assert [(one.sequence, one.text, one.final, one.finish_reason) for one in (first, last)] == [
        (0, "a", False, None),
        (1, "bc", True, "stop"),
    ]
    assert chunker.started


def test_with_no_interval_every_piece_is_a_chunk():
    chunker = Chunker("r", interval_s=0.0)
    for piece in "abcd":
        chunker.add(piece)
    chunks = [chunker.cut(0.0), *chunker.finish(error=ErrorDetail(code="upstream_error", message="gone"))]
    assert [(one.sequence, one.text) for one in chunks] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert [one.final for one in chunks] == [False, False, False, True]
    assert chunks[-1].error is not None


def test_settings_say_what_does_not_fit(monkeypatch):
    monkeypatch.setenv("SPROUT_ROUTER_MAX_INTENSITY_AGE_S", "null")
    assert RouterSettings().max_intensity_age_s is None
    with pytest.raises(ValidationError, match="COOL_DOWN_MAX_S must not be below"):
        RouterSettings(cool_down_s=5, cool_down_max_s=1)
    with pytest.raises(ValidationError, match="BACKOFF_MAX_S must not be below"):
        RouterSettings(backoff_s=5, backoff_max_s=1)
