"""Malformed request messages of many kinds, as faulty producers send them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

NOT_JSON: Final = "invalid_json"
NOT_A_REQUEST: Final = "invalid_message"


@dataclass(frozen=True, slots=True)
class Malformed:
    """A malformed message and its expected rejection reason.

    Attributes:
        value: None for a record without a value.
    """

    kind: str
    value: bytes | None
    reason: str


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


_KINDS: Final[dict[str, tuple[str, Callable[[Random], bytes | None]]]] = {
    "no value": (NOT_JSON, lambda _: None),
    "empty": (NOT_JSON, lambda _: b""),
    "text": (NOT_JSON, lambda rng: f"please answer number {rng.random()}".encode()),
    "cut off": (NOT_JSON, lambda rng: _json({"prompt": "A question " * rng.randint(1, 50)})[: -rng.randint(1, 9)]),
    "not UTF-8": (NOT_JSON, lambda rng: b'{"prompt": "\xff\xfe' + rng.randbytes(8).replace(b'"', b"\xff") + b'"}'),
    "random bytes": (NOT_JSON, lambda rng: b"\x00" + rng.randbytes(rng.randint(1, 2_000))),
    "a list": (NOT_A_REQUEST, lambda rng: _json([{"prompt": f"Question {rng.random()}?"}])),
    "a number": (NOT_A_REQUEST, lambda rng: _json(rng.randint(0, 10**9))),
    "null": (NOT_A_REQUEST, lambda _: b"null"),
    "no prompt": (NOT_A_REQUEST, lambda rng: _json({"id": f"no-prompt-{rng.random()}"})),
    "empty prompt": (NOT_A_REQUEST, lambda _: _json({"prompt": ""})),
    "prompt of a wrong type": (NOT_A_REQUEST, lambda rng: _json({"prompt": {"text": rng.random()}})),
    "prompt and messages": (
        NOT_A_REQUEST,
        lambda _: _json({"prompt": "Question?", "messages": [{"role": "user", "content": "Question?"}]}),
    ),
    "last turn not the user's": (
        NOT_A_REQUEST,
        lambda _: _json({"messages": [{"role": "assistant", "content": "An answer."}]}),
    ),
    "sampling out of range": (
        NOT_A_REQUEST,
        lambda rng: _json({"prompt": "Q?", "sampling": {"top_p": 1 + rng.random()}}),
    ),
    "deadline without a zone": (NOT_A_REQUEST, lambda _: _json({"prompt": "Q?", "deadline": "2024-02-08T12:00:30"})),
    "no such level's name": (NOT_A_REQUEST, lambda _: _json({"prompt": "Q?", "directive": "shorter"})),
    "id too long": (NOT_A_REQUEST, lambda rng: _json({"prompt": "Q?", "id": "x" * rng.randint(257, 600)})),
}

KINDS: Final = tuple(_KINDS)


def malformed(rng: Random, number: int) -> list[Malformed]:
    """Draw malformed messages; every kind is equally frequent."""
    made = []
    for index in range(number):
        kind = KINDS[index % len(KINDS)]
        reason, make = _KINDS[kind]
        made.append(Malformed(kind, make(rng), reason))
    return made
