"""Calls that the ledger makes from responses and usage records."""

from datetime import timedelta

from services.ledger.calls import request_call, usage_call
from shared.messages import GenerationResponse, UsageRecord
from shared.topics import RESPONSES, USAGE
from tests.support.contract import EXAMPLES


def test_the_times_of_a_call_are_in_order_if_a_clock_was_set_back():
    response, record = EXAMPLES[RESPONSES.name], EXAMPLES[USAGE.name]
    assert isinstance(response, GenerationResponse)
    assert isinstance(record, UsageRecord)
    assert response.timing is not None
    started = response.timing.started_at
    back = response.timing.model_copy(
        update={"first_token_at": started - timedelta(seconds=5), "finished_at": started - timedelta(seconds=3)}
    )
    call = request_call(response.model_copy(update={"timing": back}))
    assert call.started_at == call.first_token_at == call.finished_at == started
    later = record.started_at + timedelta(hours=1)
    call = usage_call(record.model_copy(update={"started_at": later, "first_token_at": None}))
    assert (call.started_at, call.first_token_at, call.finished_at) == (later, None, later)
