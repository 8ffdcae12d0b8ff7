"""Batches of the gateway without I/O: states, lines of files, and uploads that arrive in pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.batch_lines import InputLine, LineReader, LineSplitter, Result, Task
from services.gateway.batch_state import ACTIVE, Event, Status, following
from services.gateway.errors import ApiError
from services.gateway.uploads import Upload

CHAT = "/v1/chat/completions"


@given(st.lists(st.sampled_from(Event)))
def test_a_batch_that_has_ended_never_changes_again(events: list[Event]):
    status, history = Status.VALIDATING, [Status.VALIDATING]
    for event in events:
        status = following(status, event) or status
        history.append(status)
    ended = [one for one in history if one not in ACTIVE]
    assert len(set(ended)) <= 1
    assert not ended or history[-1] is ended[0]
    if Status.CANCELLING in history:
        assert status in {Status.CANCELLING, Status.CANCELLED}
    if status in {Status.COMPLETED, Status.EXPIRED}:
        assert Status.FINALIZING in history


def test_every_batch_can_end():
    reached = dict.fromkeys(ACTIVE, False)
    for _ in ACTIVE:
        for status in ACTIVE:
            after = [following(status, event) for event in Event]
            reached[status] = any(one is not None and (one not in ACTIVE or reached[one]) for one in after)
    assert all(reached.values())
    assert all(following(status, event) is None for status in set(Status) - ACTIVE for event in Event)


@given(
    st.lists(st.one_of(st.binary(max_size=12).filter(lambda one: b"\n" not in one), st.just(b" \r")), max_size=12),
    st.lists(st.integers(1, 9), min_size=1),
    st.booleans(),
)
def test_lines_do_not_depend_on_how_the_file_is_cut(lines: list[bytes], sizes: list[int], ends_with_newline: bool):
    data = b"\n".join(lines) + b"\n" * ends_with_newline
    splitter, found, start, turn = LineSplitter(max_bytes=8), [], 0, 0
    while start < len(data):
        size = sizes[turn % len(sizes)]
        found += splitter.feed(data[start : start + size])
        start, turn = start + size, turn + 1
    found += splitter.finish()
    expected = [
        InputLine(number, None if len(line) > 8 else line.strip())
        for number, line in enumerate(data.split(b"\n"), start=1)
        if len(line) > 8 or line.strip()
    ]
    assert found == expected


def test_a_byte_order_mark_is_no_part_of_the_first_line():
    splitter = LineSplitter(max_bytes=100)
    assert [*splitter.feed(b"\xef\xbb\xbf{}\n"), *splitter.finish()] == [InputLine(1, b"{}")]


def line(**changes) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
    return json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": body} | changes).encode()


@pytest.mark.parametrize(
    ("content", "custom_id", "code"),
    [
        (None, None, "line_too_long"),
        (b"{", None, "invalid_json_line"),
        (b"\xff", None, "invalid_json_line"),
        (b"[" * 100_000, None, "invalid_json_line"),
        (b"[]", None, "invalid_json_line"),
        (b'{"custom_id": "a"}', "a", "missing_required_parameter"),
        (b'{"custom_id": 7}', None, "invalid_value"),
        (line(method="GET"), "a", "invalid_value"),
        (line(url="/v1/embeddings"), "a", "invalid_value"),
        (line(url="/v1/completions"), "a", "mismatched_endpoint"),
        (line(surprise=1), "a", "unknown_parameter"),
        (line(custom_id="x" * 513), "x" * 512, "invalid_value"),
    ],
)
def test_a_malformed_line_is_an_error_that_names_it(content, custom_id, code):
    result = LineReader("batch_1", CHAT).read(InputLine(7, content))
    assert isinstance(result, Result)
    assert (result.number, result.outcome) == (7, "failed")
    document = json.loads(result.document)
    assert (document["id"], document["custom_id"], document["response"]) == ("batch_req_1_7", custom_id, None)
    assert (document["error"]["code"], document["error"]["line"]) == (code, 7)


@pytest.mark.parametrize(
    ("body", "param"),
    [({"model": "m"}, "messages"), ({"model": "m", "messages": []}, "messages"), ({"n": 2}, "model")],
)
def test_a_body_that_is_not_valid_gets_the_answer_of_the_endpoint(body, param):
    document = json.loads(LineReader("batch_1", CHAT).read(InputLine(1, line(body=body))).document)
    assert document["error"] is None
    assert document["response"]["status_code"] == 400
    assert document["response"]["body"]["error"]["param"] == param


def test_a_stream_and_a_second_line_with_the_same_id_are_refused():
    reader = LineReader("batch_1", CHAT)
    first = reader.read(InputLine(1, line()))
    assert isinstance(first, Task)
    assert (first.custom_id, reader.request_id(first.number)) == ("a", "batch_1-1")
    again = json.loads(reader.read(InputLine(2, line())).document)
    assert again["error"]["code"] == "duplicate_custom_id"
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    refused = json.loads(reader.read(InputLine(3, line(custom_id="b", body=body))).document)
    assert refused["response"]["body"]["error"]["param"] == "stream"


def test_lone_surrogates_of_an_id_stay_what_they_were():
    content = line().replace(b'"a"', b'"\\ud800"')
    result = LineReader("batch_1", CHAT).read(InputLine(1, content))
    assert isinstance(result, Result)
    result.document.encode()


FORM = (
    b'--edge\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--edge\r\nContent-Disposition: form-data; name="file"; filename="in\x00put.jsonl"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\none\r\ntwo\n--edg\r\n--edge--\r\n"
)


@given(st.lists(st.integers(1, 60), min_size=1))
def test_an_upload_does_not_depend_on_how_it_is_cut(sizes: list[int]):
    upload, content, start, turn = Upload("multipart/form-data; boundary=edge"), b"", 0, 0
    while start < len(FORM):
        size = sizes[turn % len(sizes)]
        upload.feed(FORM[start : start + size])
        content += upload.take()
        start, turn = start + size, turn + 1
    assert upload.ended
    assert upload.filename == "input.jsonl"
    assert upload.fields() == {"purpose": "batch"}
    assert content == b"one\r\ntwo\n--edg"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=edge", b"no form"),
        (
            "multipart/form-data; boundary=edge",
            b'--edge\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 2000,
        ),
        ("multipart/form-data; boundary=edge", b"--edge\r\nX: y\r\n\r\ndata\r\n--edge--\r\n"),
        (
            "multipart/form-data; boundary=edge",
            b'--edge\r\nContent-Disposition: form-data; name="p"\r\n\r\nx\r\n' * 17 + b"--edge--\r\n",
        ),
        ("multipart/form-data; boundary=edge", b"--edge\r\n" + b"X: y\r\n" * 100 + b"\r\n"),
    ],
)
def test_a_malformed_upload_is_an_error(content_type, body):
    with pytest.raises(ApiError) as caught:
        Upload(content_type).feed(body)
    assert caught.value.status == 400
