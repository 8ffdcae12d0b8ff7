"""Whether a control message may be used: a message that steers other services.

Kafka's ACLs say who may write to a topic. These checks bound the damage if one of the writers is faulty, has a wrong
clock, or is not what it claims to be. All consumers of `carbon-intensity`, `policies`, `prompt-groups`, `quality`,
`power-curves`, `load-reports` and `capacity` apply them, see `shared.kafka.records.parse_record`; what fails them
becomes a dead letter with the reason `implausible`.
"""

from collections.abc import Callable, Collection, Iterable
from datetime import datetime, timedelta
from math import prod
from typing import Any, Final

from shared.messages import (
    CarbonIntensity,
    EndpointCurve,
    LoadReport,
    Message,
    PackedArray,
    Policy,
    PoolCapacity,
    PromptGrouping,
    Quality,
)
from shared.messages.base import SCHEMA_VERSION
from shared.runtime.clock import Clock

MAX_AHEAD: Final = timedelta(minutes=5)
"""How far a clock may be ahead of the reader's, event time."""

MAX_AHEAD_WALL_S: Final = 2.0
"""The same in wall seconds, for an accelerated clock: the larger of the two applies."""

MAX_VALIDITY: Final = timedelta(days=7)
"""Longest lifetime of a policy, and of what `capacity` says."""

MAX_FORECAST: Final = timedelta(days=14)
"""How far a forecast may reach."""

MAX_G_PER_KWH: Final = 5_000.0
"""Carbon intensity: no fuel reaches 2,000 gCO2eq/kWh."""

MAX_WATTS: Final = 1e6
"""Power of one endpoint."""

MAX_JOULES: Final = 1e9
MAX_SECONDS: Final = 1e6
"""Energy and duration of one step or token of a model server."""

MAX_TRIALS: Final = 1e9
"""Judged prompts of one group, option and metric."""

MAX_GROUPS: Final = 1_000
"""Prompt groups of one version."""

MAX_ARRAYS: Final = 8
MAX_ARRAY_BYTES: Final = 64 * 1024 * 1024
"""Unpacked size of all arrays of one message together."""

MAX_COUNT: Final = 1_000_000
"""Endpoints, requests in flight: numbers of things that exist."""

_ITEM_BYTES: Final = {"<f2": 2, "<f4": 4, "<f8": 8, "<i8": 8}
_ROUNDING: Final = 1e-6


class ImplausibleError(ValueError):
    """A control message that must not be used; the text says why and quotes nothing of it."""


def check_plausible(message: Message, *, key: bytes | None, clock: Clock) -> None:
    """Check a control message; every other message passes.

    Args:
        key: of the record. Kafka accepts no record without a key on a compacted topic.
        clock: of the reader.

    Raises:
        ImplausibleError: the message must not be used.
    """
    check = _CHECKS.get(type(message))
    if check is None:
        return
    if message.schema_version > SCHEMA_VERSION:
        raise ImplausibleError(
            f"schema_version is newer than {SCHEMA_VERSION}, which this release knows: upgrade Sprout"
        )
    latest = clock.now() + max(MAX_AHEAD, timedelta(seconds=MAX_AHEAD_WALL_S * clock.rate))
    subjects = check(message, latest)
    names = (subjects,) if isinstance(subjects, str) else subjects
    if key is not None and key not in {name.encode("utf-8", errors="surrogatepass") for name in names}:
        raise ImplausibleError("the key is not the name inside the message")


def _check_intensity(message: CarbonIntensity, latest: datetime) -> str:
    _not_after(latest, published_at=message.published_at, latest=message.latest.at)
    for field, points, end in (
        ("latest", (message.latest,), latest),
        ("history", message.history, latest),
        ("forecast", message.forecast, latest + MAX_FORECAST),
    ):
        for point in points:
            if point.intensity_g_per_kwh > MAX_G_PER_KWH:
                raise ImplausibleError(f"{field}: an intensity is above {MAX_G_PER_KWH:g} gCO2eq/kWh")
            if point.at > end:
                raise ImplausibleError(f"{field}: a time is in the future")
    return message.zone


def _check_policy(message: Policy, latest: datetime) -> str:
    _not_after(latest, created_at=message.created_at, solved_for=message.inputs.solved_for)
    _valid_for(message.created_at, message.valid_until)
    _within("intensity_g_per_kwh", message.inputs.intensity_g_per_kwh.values(), MAX_G_PER_KWH)
    if len(message.groups) > MAX_GROUPS:
        raise ImplausibleError(f"groups: more than {MAX_GROUPS}")
    return message.model


def _check_quality(message: Quality, latest: datetime) -> tuple[str, ...]:
    _not_after(latest, evaluated_at=message.evaluated_at)
    for count in message.counts:
        if count.successes > count.trials + _ROUNDING or count.trials > MAX_TRIALS:
            raise ImplausibleError("counts: more successes than trials, or too many trials")
    # Earlier releases used the model as the key.
    return message.evaluation_id, message.model


def _check_grouping(message: PromptGrouping, latest: datetime) -> str:
    _not_after(latest, learned_at=message.learned_at)
    if any(evidence.evaluated_at > latest for evidence in message.evidence):
        raise ImplausibleError("evidence: a time is in the future")
    if len(message.names) > MAX_GROUPS:
        raise ImplausibleError(f"names: more than {MAX_GROUPS} groups")
    if len(message.arrays) > MAX_ARRAYS or sum(map(_unpacked_bytes, message.arrays.values())) > MAX_ARRAY_BYTES:
        raise ImplausibleError(f"arrays: more than {MAX_ARRAYS}, or larger than {MAX_ARRAY_BYTES} bytes unpacked")
    return message.model


def _check_curve(message: EndpointCurve, latest: datetime) -> str:
    _not_after(latest, at=message.at)
    _within("idle_w", (message.idle_w,), MAX_WATTS)
    _within("an energy", (message.step_j, message.token_j, message.prompt_token_j), MAX_JOULES)
    _within("a duration", (message.step_s, message.token_s, message.prompt_token_s), MAX_SECONDS)
    return message.endpoint


def _check_load(message: LoadReport, latest: datetime) -> str:
    _not_after(latest, at=message.at)
    for pool in message.pools:
        _within("pools", (pool.arrivals, pool.waiting, *(one.in_flight for one in pool.endpoints.values())), MAX_COUNT)
    return message.instance


def _check_capacity(message: PoolCapacity, latest: datetime) -> str:
    _not_after(latest, at=message.at)
    _valid_for(message.at, message.valid_until)
    if any(forecast.at > latest + MAX_FORECAST for forecast in message.forecast):
        raise ImplausibleError("forecast: a time is too far in the future")
    _within("endpoints", (message.endpoints, message.endpoints_needed, *message.reserved.values()), MAX_COUNT)
    return message.pool


_CHECKS: Final[dict[type[Message], Callable[[Any, datetime], str | Collection[str]]]] = {
    CarbonIntensity: _check_intensity,
    Policy: _check_policy,
    Quality: _check_quality,
    PromptGrouping: _check_grouping,
    EndpointCurve: _check_curve,
    LoadReport: _check_load,
    PoolCapacity: _check_capacity,
}
"""By message: a check that returns the name which the record's key must be, or several of which it must be one."""


def _not_after(end: datetime, /, **times: datetime) -> None:
    for field, time in times.items():
        if time > end:
            raise ImplausibleError(f"{field} is in the future; do the clocks of the hosts agree?")


def _valid_for(start: datetime, end: datetime) -> None:
    if end - start > MAX_VALIDITY:
        raise ImplausibleError(f"valid_until is more than {MAX_VALIDITY.days} days after the message was made")


def _within(field: str, values: Iterable[float], largest: float) -> None:
    if any(not 0 <= value <= largest for value in values):
        raise ImplausibleError(f"{field} is not between 0 and {largest:g}")


def _unpacked_bytes(array: PackedArray) -> int:
    if any(length < 0 for length in array.shape):
        raise ImplausibleError("arrays: a length is negative")
    return prod(array.shape) * _ITEM_BYTES[array.dtype]
