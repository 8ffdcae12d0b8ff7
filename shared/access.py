"""Who may do what in Kafka: the least that every service, the clients and an operator need, declared once.

`sprout topics acls` prints it as commands, `docs/security.md` as a table.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from shared.runtime.settings import KafkaSettings
from shared.topics import (
    CANCELLATIONS,
    CAPACITY,
    CARBON_INTENSITY,
    DEAD_LETTERS,
    FOOTPRINTS,
    LOAD_REPORTS,
    METERED_SAVINGS,
    POLICIES,
    POWER_CURVES,
    PROMPT_GROUPS,
    QUALITY,
    REPLIES,
    REQUESTS,
    REQUESTS_BATCH,
    RESPONSE_CHUNKS,
    RESPONSES,
    SAMPLES,
    TOPICS,
    USAGE,
    TopicSpec,
)

REDRIVE_ID: Final = "dead-letters.redrive"
"""Transactional id of `sprout dead-letters redrive`, without the prefix of consumer groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a principal may do.

    Attributes:
        reads, writes: topics; of a service those that its AsyncAPI document says it receives from and sends to.
        groups: consumer groups, without the prefix.
        transactions: transactional ids, without the prefix.
        creates: whether it creates and changes topics.
    """

    reads: tuple[TopicSpec, ...] = ()
    writes: tuple[TopicSpec, ...] = ()
    groups: tuple[str, ...] = ()
    transactions: tuple[str, ...] = ()
    creates: bool = False


def leader_group(service: str) -> str:
    """The consumer group that elects the leader of a service, without the prefix."""
    return f"{service}.leader"


_LEDGER_STORES: Final = (RESPONSES, USAGE, CARBON_INTENSITY, QUALITY, PROMPT_GROUPS, POLICIES)

ACCESS: Final[dict[str, Access]] = {
    "carbon_feed": Access(
        reads=(CARBON_INTENSITY,), writes=(CARBON_INTENSITY, DEAD_LETTERS), groups=(leader_group("carbon_feed"),)
    ),
    "router": Access(
        reads=(
            *(REQUESTS, REQUESTS_BATCH, CANCELLATIONS, CARBON_INTENSITY, PROMPT_GROUPS, POLICIES, POWER_CURVES),
            *(CAPACITY, RESPONSES, DEAD_LETTERS),
        ),
        writes=(RESPONSES, RESPONSE_CHUNKS, REPLIES, SAMPLES, LOAD_REPORTS, DEAD_LETTERS),
        groups=("router",),
    ),
    "optimizer": Access(
        reads=(CARBON_INTENSITY, FOOTPRINTS, QUALITY, PROMPT_GROUPS, POWER_CURVES, LOAD_REPORTS, POLICIES),
        writes=(POLICIES, CAPACITY, DEAD_LETTERS),
        groups=("optimizer", leader_group("optimizer")),
    ),
    "evaluator": Access(
        reads=(SAMPLES, CARBON_INTENSITY, FOOTPRINTS, POLICIES, POWER_CURVES, CAPACITY),
        writes=(USAGE, QUALITY, PROMPT_GROUPS, LOAD_REPORTS, DEAD_LETTERS),
        groups=("evaluator", leader_group("evaluator")),
    ),
    "ledger": Access(
        reads=(*_LEDGER_STORES, LOAD_REPORTS, CAPACITY),
        writes=(FOOTPRINTS, POWER_CURVES, METERED_SAVINGS, DEAD_LETTERS),
        groups=tuple(f"ledger.{spec.name}" for spec in _LEDGER_STORES),
    ),
    "gateway": Access(
        reads=(REPLIES, POLICIES, FOOTPRINTS, CARBON_INTENSITY, CAPACITY, METERED_SAVINGS),
        writes=(REQUESTS, REQUESTS_BATCH, CANCELLATIONS, DEAD_LETTERS),
        groups=("gateway",),
    ),
    "sleeper": Access(reads=(CAPACITY, LOAD_REPORTS)),
    "client": Access(reads=(RESPONSES, RESPONSE_CHUNKS, FOOTPRINTS), writes=(REQUESTS, REQUESTS_BATCH, CANCELLATIONS)),
    "operator": Access(
        reads=TOPICS,
        writes=(REQUESTS, REQUESTS_BATCH, DEAD_LETTERS),
        groups=("router",),
        transactions=(REDRIVE_ID,),
        creates=True,
    ),
}
"""By principal. An application that sends requests is a `client`; a person with the `sprout` command an `operator`.

The `sleeper` is the one of the local stack, or an autoscaler that takes its place.
"""


def acl_arguments(
    kafka: KafkaSettings, principals: dict[str, str], *, lanes: tuple[TopicSpec, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """The arguments of `kafka-acls --add`, one tuple for every command.

    Args:
        principals: Kafka's principal, such as `User:sprout-router`, by name in `ACCESS`.
        lanes: topics of requests that `shared.topics.TOPICS` does not declare.
    """
    for name, principal in principals.items():
        access = _with_lanes(ACCESS[name], lanes)
        allow = ("--allow-principal", principal)
        yield from ((*allow, "--operation", "Read", "--topic", kafka.topic(spec)) for spec in access.reads)
        yield from ((*allow, "--operation", "Write", "--topic", kafka.topic(spec)) for spec in access.writes)
        yield from ((*allow, "--operation", "Read", "--group", kafka.group(group)) for group in access.groups)
        for transaction in access.transactions:
            identifier = ("--transactional-id", kafka.group(transaction))
            yield (*allow, "--operation", "Write", "--operation", "Describe", *identifier)
        if access.creates:
            prefix = ("--topic", kafka.topic_prefix, "--resource-pattern-type", "prefixed")
            operations = ("Create", "Describe", "Alter", "DescribeConfigs", "AlterConfigs")
            yield (*allow, *(word for one in operations for word in ("--operation", one)), *prefix)


def _with_lanes(access: Access, lanes: tuple[TopicSpec, ...]) -> Access:
    """Access to the topics of all lanes where there is access to `requests`."""
    return replace(
        access,
        reads=access.reads + (lanes if REQUESTS in access.reads else ()),
        writes=access.writes + (lanes if REQUESTS in access.writes else ()),
    )
