"""Whose data is erased: tenants and requests, and which messages belong to them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from shared.messages import DeadLetter


@dataclass(frozen=True, slots=True)
class Subjects:
    """Tenants and requests, by the names that producers gave them.

    Attributes:
        found: ids of requests of the tenants, as the topics show them; they are erased too.
    """

    tenants: frozenset[str]
    requests: frozenset[str]
    found: set[str] = field(default_factory=set)

    @property
    def request_ids(self) -> list[str]:
        """Ids of all requests that are known to be meant."""
        return sorted(self.requests | self.found)

    def of_message(self, value: bytes | None, *, position: str = "") -> frozenset[tuple[str, str]]:
        """The subjects that a message belongs to, as (`tenant` or `request`, name).

        Args:
            value: a message with a tenant or a request id, whole or cut off; other content belongs to nobody.
            position: id that a request has if it names none.
        """
        fields = _fields_of(value)
        tenant, request_id = fields.get("tenant"), fields.get("request_id", fields.get("id")) or position
        if not isinstance(request_id, str):
            request_id = position
        subjects: set[tuple[str, str]] = set()
        if isinstance(tenant, str) and tenant in self.tenants:
            subjects.add(("tenant", tenant))
            if request_id:
                self.found.add(request_id)
        if request_id in self.requests or request_id in self.found:
            subjects.add(("request", request_id))
        return frozenset(subjects)

    def of_dead_letter(self, value: bytes | None) -> frozenset[tuple[str, str]]:
        """The subjects that a dead letter's original message belongs to."""
        try:
            letter = DeadLetter.model_validate_json(value or b"")
        except ValidationError:
            return frozenset()
        position = f"{letter.topic}-{letter.partition}-{letter.offset}"
        return self.of_message(letter.original_value(), position=position)


def _fields_of(value: bytes | None) -> Mapping[str, Any]:
    try:
        content = from_json(value or b"", allow_partial=True)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
