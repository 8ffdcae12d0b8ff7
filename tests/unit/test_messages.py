"""The messages: what is valid, which error an invalid one gets, and additive evolution."""

import json
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from shared.messages import (
    ChatMessage,
    Decision,
    GenerationRequest,
    GenerationResponse,
    Policy,
    PolicyInputs,
    option_key,
    split_option,
)
from shared.topics import TOPICS

NOON = datetime(2024, 2, 3, 12, tzinfo=UTC)


def test_a_prompt_is_a_conversation_of_one_turn() -> None:
    request = GenerationRequest(prompt="Why is the sky blue?")
    assert request.conversation() == (ChatMessage(role="user", content="Why is the sky blue?"),)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "give either 'prompt' .* or 'messages' .*, found neither"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "found both"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "must have role 'user'"),
        ({"prompt": 3}, "valid string"),
        ({"prompt": ""}, "at least 1 character"),
        ({"prompt": "a", "directive": "brief"}, "pattern"),
        ({"prompt": "a", "sampling": {"max_tokens": 0}}, "greater than or equal to 1"),
        ({"prompt": "a", "requested_at": "2024-02-03T12:00:00"}, "timezone"),
    ],
)
def test_an_invalid_request_is_rejected_with_the_reason(body: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        GenerationRequest.model_validate_json(json.dumps(body))


def test_unknown_fields_of_a_newer_sender_are_ignored() -> None:
    request = GenerationRequest.model_validate({"prompt": "a", "schema_version": 2, "invented_later": True})
    assert request.prompt == "a"
    assert request.schema_version == 2


def test_timestamps_are_normalised_to_utc() -> None:
    request = GenerationRequest.model_validate_json('{"prompt": "a", "requested_at": "2024-02-03T14:00:00+02:00"}')
    assert request.requested_at == NOON
    assert request.model_dump_json(include={"requested_at"}) == '{"requested_at":"2024-02-03T12:00:00Z"}'


def test_a_response_must_contain_what_attribution_needs() -> None:
    with pytest.raises(ValidationError, match="must carry decision, endpoint, timing, usage"):
        GenerationResponse(request_id="1", model="m", status="ok", text="hello", requested_at=NOON)
    with pytest.raises(ValidationError, match="must carry 'error'"):
        GenerationResponse(request_id="1", model="m", status="error", requested_at=NOON)


def test_a_probability_outside_the_unit_interval_is_rejected() -> None:
    with pytest.raises(ValidationError, match="propensity"):
        Decision(source="policy", group="g", pool="p", level="L1", zone="Z", propensity=1.2)


def policy(**changes: object) -> Policy:
    fields: dict[str, object] = {
        "model": "m",
        "version": 1,
        "created_at": NOON,
        "valid_until": NOON,
        "status": "optimal",
        "reason": "first",
        "reference": "p/L0",
        "groups": {"facts": {"p/L0": 0.25, "p/L1": 0.75}},
        "overall": {"p/L0": 1.0},
        "bounds": {"preference": 0.9},
        "expected_quality": {"preference": 0.95},
        "expected_g_per_request": 0.02,
        "reference_g_per_request": 0.05,
        "inputs": PolicyInputs(
            solved_for=NOON,
            intensity_g_per_kwh={"Z": 200.0},
            k0_zone="Z",
            k0_g_per_kwh=200.0,
            k0_min_g_per_kwh=100.0,
            k0_max_g_per_kwh=300.0,
            xi={"preference": 0.1},
            weights={"facts": 1.0},
            estimates={},
            holdout=0.02,
        ),
    }
    return Policy.model_validate(fields | changes)


def test_an_unknown_group_gets_the_overall_probabilities() -> None:
    assert policy().row("facts")["p/L1"] == 0.75
    assert policy().row("poems") == {"p/L0": 1.0}


def test_probabilities_that_do_not_sum_to_one_are_rejected_by_name() -> None:
    with pytest.raises(ValidationError, match=r"probabilities of 'facts' must sum to 1, got 0\.9"):
        policy(groups={"facts": {"p/L0": 0.9}})


def test_option_names_round_trip_even_with_slashes_in_the_pools_name() -> None:
    assert split_option(option_key("eu/nl-1", "L2")) == ("eu/nl-1", "L2")
    with pytest.raises(ValueError, match="<pool>/<level>"):
        split_option("L2")


def test_every_topic_has_a_described_message_and_a_bound_on_its_size() -> None:
    assert len({spec.name for spec in TOPICS}) == len(TOPICS) == 18
    for spec in TOPICS:
        assert spec.message.__doc__
        assert spec.configuration()["cleanup.policy"] in {"delete", "compact", "compact,delete"}
        if "delete" in spec.cleanup.value:
            assert spec.retention_ms is not None, f"{spec.name} would grow forever"
