"""Reads an upload (multipart/form-data) piece by piece, so that it is never in memory as a whole."""

from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from services.gateway.errors import ApiError

MAX_FIELD_BYTES: Final = 1_024
MAX_PARTS: Final = 16
MAX_FILENAME: Final = 255


class Upload:
    """The fields of an upload, and what has arrived of its file and was not taken yet.

    Attributes:
        filename: None until the file has begun.
        ended: whether the end of the form has arrived.
    """

    def __init__(self, content_type: str) -> None:
        """Read a body of this content type.

        Raises:
            ApiError: it is not multipart/form-data.
        """
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise ApiError(400, "send the file as multipart/form-data", code="invalid_content_type")
        self.filename: str | None = None
        self.ended = False
        self._fields: dict[str, bytearray] = {}
        self._file = bytearray()
        self._parts = 0
        self._header = (bytearray(), bytearray())
        self._target: bytearray | None = None
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_part_data": self._add_data,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise _malformed() from None

    def feed(self, data: bytes) -> None:
        """Read the next piece of the body.

        Raises:
            ApiError: the form is malformed.
        """
        try:
            self._parser.write(data)
        except FormParserError:
            raise _malformed() from None

    def take(self) -> bytes:
        """What has arrived of the file since the last call."""
        data = bytes(self._file)
        self._file.clear()
        return data

    def fields(self) -> dict[str, str]:
        """The fields of the form but the file."""
        return {name: value.decode("utf-8", errors="replace") for name, value in self._fields.items()}

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise ApiError(400, f"the form has more than {MAX_PARTS} parts", code="invalid_form")
        self._target = None

    def _end_header(self) -> None:
        name, value = (bytes(part) for part in self._header)
        for part in self._header:
            part.clear()
        if name.lower() != b"content-disposition":
            return
        _, options = parse_options_header(value)
        field = options.get(b"name", b"").decode("utf-8", errors="replace")
        if field != "file":
            self._target = self._fields.setdefault(field, bytearray())
            return
        if self.filename is not None:
            raise ApiError(400, "send one file", param="file", code="invalid_form")
        filename = options.get(b"filename", b"").decode("utf-8", errors="replace")
        self.filename = "".join(one for one in filename if one.isprintable())[:MAX_FILENAME] or "file"
        self._target = self._file

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._target is None:
            raise ApiError(400, "a part of the form has no name", code="invalid_form")
        self._target += data[start:end]
        if self._target is not self._file and len(self._target) > MAX_FIELD_BYTES:
            raise ApiError(400, f"a field of the form is longer than {MAX_FIELD_BYTES} bytes", code="invalid_form")

    def _end(self) -> None:
        self.ended = True


def _malformed() -> ApiError:
    return ApiError(400, "the body is not a valid multipart form", code="invalid_form")
