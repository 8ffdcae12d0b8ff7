"""Topic `dead-letters`: what could not be processed, for people."""

import base64

from pydantic import Field

from shared.messages.base import Message, UtcDatetime


class DeadLetter(Message):
    """A message that was refused, with its original bytes and the reason."""

    service: str
    topic: str
    partition: int
    offset: int
    key_base64: str | None = Field(default=None, description="Original key, of a very long one the beginning")
    value_base64: str = Field(description="The original value, byte for byte")
    headers: dict[str, str] = Field(
        default_factory=dict, description="Original headers, values in base64; 256 KiB of them at most"
    )
    truncated_bytes: int = Field(default=0, ge=0, description="Bytes cut off the end of a value too large to carry")
    reason: str = Field(description="Short code: invalid_json, invalid_message, too_large, handler_error")
    detail: str = Field(description="What is wrong, by field; never the content")
    failed_at: UtcDatetime

    def original_value(self) -> bytes:
        """The refused message's bytes."""
        return base64.b64decode(self.value_base64)
