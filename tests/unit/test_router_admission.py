"""Admission: parsing, defaults, deadlines and rejections; retries; chunks; settings."""

import json
import tomllib
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.evaluator.settings import EvaluatorSettings
from services.router.admission import (
    IncomingRequest,
    default_deadline,
    error_of_unparsed,
    held_bytes,
    parse_request,
    parsed_bytes,
    rejection,
)
from services.router.handler import error_response, sample_of, served_answer
from services.router.settings import RouterSettings
from services.router.streaming import Chunker
from shared.fleet import Fleet
from shared.inference.attempts import RetrySettings
from shared.kafka.records import PoisonMessageError, parse
from shared.messages import (
    MAX_SERVED_CHARS,
    Decision,
    ErrorDetail,
    GenerationRequest,
    GenerationResponse,
    Policy,
    Timing,
    Usage,
)
from shared.runtime.clock import Clock
from tests.support.router import fleet_toml

NOON = datetime(2023, 2, 10, 12, tzinfo=UTC)
FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))
SETTINGS = RouterSettings(
    max_request_bytes=2_000, max_prompt_chars=100, default_deadline_s=600, default_deadline_wall_s=30
)
RECORD = "requests/3/17/1001000"
REPLAY = Clock(rate=720.0, origin_wall_s=1_000.0, origin_event_s=NOON.timestamp())


def record_of(value: bytes | None, timestamp: int = 1_001_000) -> SimpleNamespace:
    return SimpleNamespace(
        value=value, key=b"k", topic="requests", partition=3, offset=17, timestamp=timestamp, headers=()
    )


def parsed(
    value: bytes | None = None, *, clock: Clock = REPLAY, timestamp: int = 1_001_000, fleet: Fleet = FLEET, **fields
) -> IncomingRequest:
    value = json.dumps({"prompt": "Why?", **fields}).encode() if value is None else value
    return parse_request(
        record_of(value, timestamp),
        record_id=RECORD,
        received_at=NOON + timedelta(hours=1),
        clock=clock,
        fleet=fleet,
        settings=SETTINGS,
    )


def code(incoming: IncomingRequest) -> str | None:
    error = rejection(incoming, fleet=FLEET, settings=SETTINGS)
    return None if error is None else error.code


def test_id_model_and_time_default_to_those_of_the_record_and_the_fleet():
    incoming = parsed()
    assert incoming.request_id == "requests-3-17"
    assert incoming.model == "m"
    assert incoming.requested_at == NOON + timedelta(seconds=720)  # a wall second after the origin
    assert code(incoming) is None


def test_id_and_time_of_the_client_take_precedence():
    incoming = parsed(id="mine", requested_at=NOON.isoformat())
    assert (incoming.request_id, incoming.record, incoming.requested_at) == ("mine", RECORD, NOON)


def test_a_record_without_a_timestamp_was_requested_when_it_was_received():
    assert parsed(timestamp=-1).requested_at == NOON + timedelta(hours=1)


@pytest.mark.parametrize("timestamp", [2**63 - 1, 10**15])
def test_a_timestamp_that_is_no_date_counts_as_the_time_of_the_receipt(timestamp):
    assert parsed(timestamp=timestamp).requested_at == NOON + timedelta(hours=1)


@pytest.mark.parametrize("value", [b"", b"{", b"null", b"3", b"\xff", b'{"prompt": 3}', b'{"prompt": "a", "id": ""}'])
def test_an_invalid_request_is_a_poison_message(value):
    with pytest.raises(PoisonMessageError):
        parsed(value)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"prompt": "x" * 100}, None),
        ({"prompt": "x" * 101}, "prompt_too_large"),
        ({"prompt": None, "messages": [{"role": "user", "content": "x" * 60}] * 2}, "prompt_too_large"),
        ({"prompt": None, "messages": [{"role": "user", "content": ""}] * 2}, None),
        ({"prompt": None, "messages": [{"role": "user", "content": ""}] * 3}, "prompt_too_large"),
        ({"prompt": None, "messages": [{"role": "user", "content": ""}] * 21}, "prompt_too_large"),
        ({"model": "other"}, "unknown_model"),
        ({"zone": "XX"}, "invalid_request"),
        ({"deadline": (NOON + timedelta(hours=1)).isoformat()}, "deadline_exceeded"),
        ({"deadline": (NOON + timedelta(hours=1, seconds=1)).isoformat()}, None),
    ],
)
def test_a_request_is_rejected_with_a_code(fields, wanted):
    assert code(parsed(**fields)) == wanted


def test_the_size_is_seen_before_a_request_is_parsed():
    with pytest.raises(PoisonMessageError, match="too_large: the record has 2002 bytes, the limit is 2000"):
        parsed(b"[" * 2_001)


@pytest.mark.parametrize(
    ("model", "fields", "wanted"),
    [
        (GenerationRequest, {"prompt": "a", "metadata": {"MARKER": 3}}, "metadata.*: Input should be a valid string"),
        (GenerationRequest, {"prompt": "a", "metadata": {"prompt": {"MARKER": 1}}}, "metadata.*: Input should be"),
        (GenerationRequest, {"messages": [{"role": "MARKER", "content": "a"}]}, "messages.0.role: Input should be"),
        (GenerationResponse, {"metadata": {"MARKER": 3}}, "metadata.*: Input should be a valid string"),
        (Policy, {"groups": {"MARKER": {"p/L0": 7}}}, "groups.*: Input should be less than or equal to 1"),
    ],
)
def test_no_problem_quotes_a_key_or_a_value_of_the_writer(model, fields, wanted):
    with pytest.raises(PoisonMessageError) as caught:
        parse(model, json.dumps(fields).encode())
    assert wanted in caught.value.detail
    assert "MARKER" not in caught.value.detail


UNPARSED = [
    (b'{"id": "r1", "prompt": 3}', ("r1", "m", "invalid_request")),
    (b'{"id": "r1", "model": "m", "prompt": "cut of', ("r1", "m", "invalid_request")),
    (b'{"id": "r1", "model": "gpt-9", "prompt": 3}', ("r1", "m", "invalid_request")),
    (b'{"id": "r1", "model": ["m"], "tenant": {}, "prompt": 3}', ("r1", "m", "invalid_request")),
    (
        b'{"id": "r1", "messages": [' + b'{"role": "user", "content": ""},' * 99 + b"{}]}",
        ("r1", "m", "prompt_too_large"),
    ),
    (b'{"id": "cut of', None),
    (b'{"id": "", "prompt": 3}', None),
    (b'{"id": 7, "prompt": 3}', None),
    (b'{"id": "%s", "prompt": 3}' % (b"x" * 257), None),
    (b'["id", "r1"]', None),
    (b'{"prompt": 3}', None),
    (b"\xff\xfe", None),
    (b"[" * 2_001, None),
    (b"", None),
    (None, None),
]
"""Records that are no requests, and the id, model and code of their error responses."""


@pytest.mark.parametrize(("value", "wanted"), UNPARSED, ids=lambda value: str(value)[:40])
def test_whatever_has_a_readable_id_gets_an_error_response(value, wanted):
    received_at = NOON + timedelta(hours=1)
    options = {"record_id": RECORD, "received_at": received_at, "clock": REPLAY, "fleet": FLEET, "settings": SETTINGS}
    with pytest.raises(PoisonMessageError) as caught:
        parse_request(record_of(value), **options)
    response = error_of_unparsed(record_of(value), caught.value, **options)
    assert wanted == (None if response is None else (response.request_id, response.model, response.error.code))
    assert response is None or response.record == RECORD


def test_a_draw_key_is_a_secret_that_is_neither_short_nor_shown(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("x" * 16 + "\n")
    monkeypatch.setenv("SPROUT_ROUTER_DRAW_KEY_FILE", str(file))
    monkeypatch.setenv("SPROUT_EVALUATOR_DRAW_KEY_FILE", str(file))
    assert RouterSettings().draw_key_bytes == EvaluatorSettings().draw_key_bytes == b"x" * 16
    assert "xxxx" not in repr(RouterSettings())
    monkeypatch.setenv("SPROUT_ROUTER_DRAW_KEY", "y" * 16)
    with pytest.raises(ValidationError, match="either SPROUT_ROUTER_DRAW_KEY or SPROUT_ROUTER_DRAW_KEY_FILE"):
        RouterSettings()
    monkeypatch.delenv("SPROUT_ROUTER_DRAW_KEY_FILE")
    for wrong in ("too short", "x" * 65):
        monkeypatch.setenv("SPROUT_ROUTER_DRAW_KEY", wrong)
        with pytest.raises(ValidationError, match="SPROUT_ROUTER_DRAW_KEY must have 16 to 64 bytes") as caught:
            RouterSettings()
        assert wrong not in str(caught.value)


def test_the_memory_of_a_request_is_estimated_without_parsing_it():
    small, turns = record_of(b'{"prompt": "Why?"}'), record_of(b'{"role":"user","content":""},' * 1_000)
    assert held_bytes(small) + parsed_bytes(small.value) < 2_000
    assert held_bytes(turns) < 50_000
    assert parsed_bytes(turns.value) > 500_000
    assert held_bytes(record_of(None)) < 1_000
    assert parsed_bytes(None) == 0


def test_a_tenant_can_keep_its_prompts_out_of_the_samples():
    tenants = '[[tenants]]\nname = "desk"\nsampled = false\n[[tenants]]\nname = "shop"\n'
    fleet = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"]) + tenants))
    assert not parsed(tenant="desk", fleet=fleet, evaluation_allowed=True).request.evaluation_allowed
    sold = parsed(tenant="shop", fleet=fleet)
    assert sold.request.evaluation_allowed
    assert sample_of(sold, None, clock=Clock()).tenant == "shop"


def answered(**fields) -> GenerationResponse:
    decision = Decision(source="policy", group="qa", pool="p", level="L1", zone="GB", propensity=1.0)
    timing = Timing(received_at=NOON, started_at=NOON, finished_at=NOON + timedelta(seconds=3))
    return GenerationResponse(
        **{
            "request_id": "r1", "model": "m", "status": "ok", "text": "Because.", "finish_reason": "stop",
            "decision": decision, "endpoint": "e", "timing": timing, "requested_at": NOON,
            "usage": Usage(completion_tokens=2, source="server"), **fields,
        }
    )  # fmt: skip


def test_a_sample_carries_the_served_answer_with_its_option_and_directive():
    served = served_answer(answered(), FLEET)
    assert served is not None
    assert (served.option, served.directive) == ("p/L1", FLEET.directive_text("L1"))
    assert (served.text, served.completion_tokens, served.processing_s) == ("Because.", 2, 3.0)
    assert "Because" not in repr(sample_of(parsed(), served, clock=Clock()))
    assert served_answer(answered(finish_reason="length"), FLEET) is not None


@pytest.mark.parametrize(
    "fields", [{"finish_reason": "cancelled"}, {"finish_reason": "deadline"}, {"text": "x" * (MAX_SERVED_CHARS + 1)}]
)
def test_an_answer_that_was_cut_off_or_is_too_long_is_not_kept_with_its_sample(fields):
    assert served_answer(answered(**fields), FLEET) is None


def test_a_reference_reaches_the_sample_and_nothing_else():
    incoming = parsed(reference=" Canberra ")
    assert sample_of(incoming, None, clock=Clock()).reference == "Canberra"
    detail = ErrorDetail(code="upstream_error", message="down")
    assert "Canberra" not in error_response(incoming, detail).model_dump_json()
    assert "Canberra" not in str(incoming.request.conversation()) + repr(incoming)
    assert sample_of(parsed(reference=" "), None, clock=Clock()).reference is None
    with pytest.raises(PoisonMessageError, match="reference: String should have at most 8000 characters") as raised:
        parse(GenerationRequest, json.dumps({"prompt": "p", "reference": "secret" * 2_000}).encode())
    assert "secret" not in str(raised.value)


def test_a_tenants_defaults_apply_to_fields_that_a_request_omits():
    tenants = '[[tenants]]\nname = "desk"\ndirective = "L2"\nsystem = "Be kind."\ndeadline_s = 5\n'
    fleet = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"]) + tenants))
    received_at = NOON + timedelta(hours=1)
    given = parsed(tenant="desk", fleet=fleet)
    assert given.deadline == received_at + timedelta(seconds=5)
    assert given.request.directive == "L2"
    assert [turn.role for turn in given.request.conversation()] == ["system", "user"]
    said = received_at + timedelta(seconds=90)
    assert parsed(tenant="desk", fleet=fleet, deadline=said.isoformat()).deadline == said
    for stranger in ("other", None):
        plain = parsed(tenant=stranger, fleet=fleet)
        assert plain.deadline == parsed().deadline
        assert (plain.request.directive, len(plain.request.conversation())) == (None, 1)


def test_rejections_never_quote_the_prompt():
    error = rejection(parsed(prompt="secret" * 50), fleet=FLEET, settings=SETTINGS)
    assert error is not None
    assert "secret" not in error.message
    assert "'prompt' has 300 characters" in error.message


def test_the_default_deadline_has_a_minimum_in_wall_time():
    def after_s(clock: Clock) -> float:
        return (default_deadline(NOON, clock=clock, settings=SETTINGS) - NOON).total_seconds()

    assert after_s(Clock()) == 600
    assert after_s(REPLAY) == 30 * 720
    soon = NOON + timedelta(hours=1, seconds=1)
    assert parsed(deadline=soon.isoformat()).deadline == soon


@given(st.integers(1, 2_000), st.floats(0, 1, exclude_max=True))
def test_pauses_grow_to_their_limit_and_vary(attempts, jitter):
    retry = RetrySettings(backoff_s=0.1, backoff_max_s=2.0)
    full_s = min(2.0, 0.1 * 2 ** min(attempts - 1, 10))
    assert 0.5 * full_s <= retry.pause_s(attempts, jitter) <= full_s


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
    retry = RetrySettings(max_attempts=3)
    code = retry.give_up_code(attempts=attempts, published=published, pause_s=pause_s, remaining_s=remaining_s)
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


def test_without_an_interval_every_piece_is_a_chunk():
    chunker = Chunker("r", interval_s=0.0)
    for piece in "abcd":
        chunker.add(piece)
    chunks = [chunker.cut(0.0), *chunker.finish(error=ErrorDetail(code="upstream_error", message="gone"))]
    assert [(one.sequence, one.text) for one in chunks] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert [one.final for one in chunks] == [False, False, False, True]
    assert chunks[-1].error is not None


def test_null_removes_the_limit_of_the_intensity_age(monkeypatch):
    monkeypatch.setenv("SPROUT_ROUTER_MAX_INTENSITY_AGE_S", "null")
    assert RouterSettings().max_intensity_age_s is None


@pytest.mark.parametrize("settings", [RouterSettings, EvaluatorSettings])
def test_settings_with_a_maximum_below_the_first_pause_are_rejected(settings):
    with pytest.raises(ValidationError, match="CIRCUIT_OPEN_MAX_S must not be below"):
        settings(circuit_open_s=5, circuit_open_max_s=1)
    with pytest.raises(ValidationError, match="BACKOFF_MAX_S must not be below"):
        settings(backoff_s=5, backoff_max_s=1)


@pytest.mark.parametrize("name", ["CIRCUIT_OPEN_S", "COOL_DOWN_S"])
def test_a_renamed_setting_is_read_by_its_old_name_too(monkeypatch, name):
    monkeypatch.setenv(f"SPROUT_ROUTER_{name}", "2.5")
    assert RouterSettings().circuit_open_s == 2.5
