"""Dead letters fit their topic, whatever the original message was."""

from types import SimpleNamespace

from shared.kafka.dead_letters import MAX_KEY_BYTES, MAX_VALUE_BYTES, dead_letter_for
from shared.kafka.publish import check_size
from shared.runtime.clock import Clock
from shared.topics import DEAD_LETTERS


def letter_of(**parts):
    record = SimpleNamespace(
        topic="requests", partition=1, offset=7, **{"key": b"k", "value": b"v", "headers": ()} | parts
    )
    return dead_letter_for(record, service="router", reason="invalid_json", detail="no", clock=Clock())


def test_the_original_is_kept_byte_for_byte():
    letter = letter_of(key=b"\x00\xff", value=b"\xfe{", headers=(("trace", b"\x01"), ("empty", None)))
    assert letter.original_value() == b"\xfe{"
    assert (letter.key_base64, letter.headers, letter.truncated_bytes) == ("AP8=", {"trace": "AQ==", "empty": ""}, 0)


def test_an_original_that_is_too_large_is_truncated():
    huge = b"\x00" * (2 * MAX_VALUE_BYTES)
    headers = (("small", b"x"), ("huge", huge), ("after", b"y"))
    letter = letter_of(key=huge, value=huge, headers=headers)
    check_size(DEAD_LETTERS, letter.model_dump_json().encode(), huge[:MAX_KEY_BYTES])
    assert letter.truncated_bytes == MAX_VALUE_BYTES
    assert set(letter.headers) == {"small"}
