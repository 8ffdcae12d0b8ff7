"""HTTP/1.1 on the wire: uvicorn's fast parser, and a limit on what a client sends that is no body.

A workaround for a fault of uvicorn (0.54.0), whose fast parser (httptools) takes headers of any size; the other one is
too slow for the gateway. Asked for: https://github.com/Kludex/uvicorn/pull/1684.
`tests/integration/test_library_faults.py` fails when uvicorn limits them itself.
"""

from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 16_384
"""Of the request line and the headers together, and of anything else between bodies: as with uvicorn's other parser."""


class HeadTooLargeError(Exception):
    """The headers of a request are larger than `MAX_HEAD_BYTES`."""


class BoundedHttp(HttpToolsProtocol):
    """Answers 400 and ends the connection when a client sends more than `MAX_HEAD_BYTES` that are no body.

    The parser has no such limit. It keeps what is incomplete and says nothing until it is complete, when it calls the
    methods `on_...` here; so the bytes that arrive without any progress are counted, and those of complete headers.
    What comes in one read with the end of something else is not: the limit is exceeded by one read at most.
    """

    _unfinished = 0
    """Bytes received since the parser last completed the headers, a part of the body, or the message."""

    _head = 0
    """Bytes of the headers of the present request, and of its trailers."""

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")

    def on_message_begin(self) -> None:
        """See httptools."""
        self._head = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._unfinished = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        self._unfinished = 0
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > MAX_HEAD_BYTES:
            raise HeadTooLargeError  # the parser makes an error of it, as of anything malformed
