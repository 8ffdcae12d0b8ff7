"""OpenAI's requests as requests of Sprout: options in headers and metadata, models and zones of the fleet."""

import tomllib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.errors import ApiError
from services.gateway.schema import ChatRequest
from services.gateway.translate import OPTIONS as OPTION_NAMES
from services.gateway.translate import to_request
from shared.fleet import Fleet
from shared.messages import GenerationRequest
from shared.messages.generation import MAX_REFERENCE_CHARS
from tests.support.router import MODEL, ZONE, fleet_toml

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
DEADLINE = NOW + timedelta(seconds=600)
FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))


def translated(
    metadata: dict[str, str] | None = None, headers: dict[str, str] | None = None, **changes: Any
) -> GenerationRequest:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}], "metadata": metadata} | changes
    return to_request(
        ChatRequest.model_validate(body), headers=headers or {}, fleet=FLEET, tenant="acme", reply_partition=3, now=NOW,
        deadline=DEADLINE,
    )  # fmt: skip


def refused(**given: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        translated(**given)
    return caught.value


OPTIONS = {"directive": "!L2", "task": "qa", "reference": " Canberra ", "zone": ZONE}


def test_options_are_taken_from_metadata_or_headers_and_the_rest_of_metadata_is_returned():
    in_metadata = translated({f"sprout_{name}": text for name, text in OPTIONS.items()} | {"user": "7"})
    in_headers = translated({"user": "7"}, {f"x-sprout-{name}": text for name, text in OPTIONS.items()})
    for one in (in_metadata, in_headers):
        assert (one.directive, one.task, one.reference, one.zone) == ("!L2", "qa", "Canberra", ZONE)
        assert (one.metadata, one.tenant, one.reply_partition, one.deadline) == ({"user": "7"}, "acme", 3, DEADLINE)
    assert translated({"sprout_task": "qa"}, {"x-sprout-task": "math"}).task == "math"
    assert translated(headers={"x-sprout-task": ""}).task is None


def test_a_header_is_utf_8_or_latin_1():
    assert translated(headers={"x-sprout-reference": "Zürich".encode().decode("latin-1")}).reference == "Zürich"
    assert translated(headers={"x-sprout-reference": "Z\xfcrich"}).reference == "Zürich"


def test_an_answer_that_is_needed_earlier_has_an_earlier_deadline():
    assert translated({"sprout_complete_by": "2026-06-01T14:05:00+02:00"}).deadline == NOW + timedelta(minutes=5)
    assert translated(headers={"x-sprout-complete-by": "2026-06-02T00:00:00Z"}).deadline == DEADLINE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("directive", "brief"),
        ("task", "x" * 257),
        ("reference", "secret" * MAX_REFERENCE_CHARS),
        ("zone", "secret"),
        ("complete_by", "secret"),
        ("complete_by", "2026-06-01T13:00:00"),
        ("complete_by", NOW.isoformat()),
    ],
)
def test_an_option_that_is_not_valid_is_named_and_not_quoted(name: str, value: str):
    for where in ({"metadata": {f"sprout_{name}": value}}, {"headers": {f"x-sprout-{name.replace('_', '-')}": value}}):
        error = refused(**where)
        assert (error.status, error.body.param, error.body.code) == (400, name, "invalid_value")
        assert "secret" not in error.body.model_dump_json()


@given(st.sampled_from(OPTION_NAMES), st.text() | st.from_regex(r"[-+0-9TZ:. ]*"), st.booleans())
def test_any_value_of_an_option_is_taken_or_an_error_that_names_it(name: str, value: str, in_header: bool):
    options = {f"x-sprout-{name.replace('_', '-')}": value} if in_header else None
    found: GenerationRequest | ApiError
    try:
        found = translated(None if in_header else {f"sprout_{name}": value}, options)
    except ApiError as error:
        found = error
    if isinstance(found, ApiError):
        assert (found.status, found.body.param) == (400, name)
    else:
        assert found.deadline is not None
        assert NOW < found.deadline <= DEADLINE


def test_an_unknown_option_or_model_is_an_error_that_says_what_there_is():
    error = refused(metadata={"sprout_surprise": "1"})
    assert (error.status, error.body.param) == (400, "metadata")
    assert "sprout_reference" in error.body.message
    error = refused(headers={"x-sprout-surprise": "1"})
    assert (error.status, error.body.param) == (400, "headers")
    assert "x-sprout-complete-by" in error.body.message
    error = refused(model="other")
    assert (error.status, error.body.code) == (404, "model_not_found")
    assert MODEL in error.body.message
