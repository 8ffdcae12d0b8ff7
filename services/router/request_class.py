"""The class of a request: lane, tenant and model, read from a record that waits, before it is parsed.

A producer can name any tenant. Only those of the fleet file have parts of the places of their own. All others share a
few parts, so that nobody gets more by inventing tenants.
"""

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any, Final

from pydantic_core import from_json

from services.router.fair_queue import FairQueue, QueueLimits
from services.router.settings import RouterSettings
from shared.fleet import Fleet
from shared.runtime.settings import KafkaSettings

OTHER: Final = ""
"""The tenant of requests that name none, or one that the fleet file does not have; with a number where they share
several parts of the places."""


class RequestClasses:
    """Reads the classes of records.

    Attributes:
        lanes: names, by full name of the topic.
    """

    def __init__(self, *, fleet: Fleet, kafka: KafkaSettings, settings: RouterSettings) -> None:
        self.lanes: Mapping[str, str] = {kafka.topic(spec): spec.name for spec in settings.lane_topics}
        self._fleet = fleet
        self._settings = settings
        self._models = {model.name for model in fleet.models}
        self._parts = settings.unknown_tenant_parts
        # Then all requests are of one class, and none is read.
        self._uniform = not fleet.tenants and len(fleet.models) == 1 and self._parts == 1

    def queue(self) -> FairQueue:
        """An empty queue for these classes."""
        settings, places = self._settings, self._settings.max_in_flight
        by_tenant = max(1, int(settings.max_tenant_share * places))
        by_model = max(1, int(settings.max_model_share * places)) if len(self._models) > 1 else places
        limits = QueueLimits(
            places=places,
            run_bytes=settings.max_in_flight_bytes,
            lane_records=ceil(settings.max_waiting / len(self.lanes)),
            lane_bytes=settings.max_waiting_bytes // len(self.lanes),
            default_tenant_places=by_tenant,
            tenant_places={
                tenant.name: min(tenant.max_in_flight, by_tenant)
                for tenant in self._fleet.tenants
                if tenant.max_in_flight is not None
            },
            model_places=by_model,
        )
        return FairQueue(settings.lanes, limits)

    def tenants(self) -> Iterator[str]:
        """Every tenant that `of` can return."""
        yield from (tenant.name for tenant in self._fleet.tenants)
        yield from (self._other(part) for part in range(self._parts))

    def of(self, value: bytes | None) -> tuple[str, str | None]:
        """Tenant and model of a record's value; the model is None if it is not served: no model server is needed.

        What is no request counts as one that names neither.
        """
        if self._uniform:
            return OTHER, self._fleet.default_model
        fields: Mapping[str, Any] = {}
        if value is not None and len(value) <= self._settings.max_request_bytes:
            try:
                content = from_json(value)
            except ValueError:
                content = None
            if isinstance(content, dict):
                fields = content
        name = fields.get("tenant")
        tenant = self._fleet.tenant(name) if isinstance(name, str) else None
        model = fields.get("model") or (tenant.model if tenant is not None else None) or self._fleet.default_model
        served = model if isinstance(model, str) and model in self._models else None
        if tenant is not None:
            return tenant.name, served
        return self._other(hash(name) % self._parts if isinstance(name, str) else 0), served

    def _other(self, part: int) -> str:
        return OTHER if self._parts == 1 else f"{OTHER}#{part}"
