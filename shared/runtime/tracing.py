"""Traces for an OpenTelemetry collector; off unless the standard variables name one.

`OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`) enables them. OpenTelemetry's other variables apply too:
sampling (`OTEL_TRACES_SAMPLER`), batches (`OTEL_BSP_*`), TLS and headers (`OTEL_EXPORTER_OTLP_*`), the resource
(`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`).
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class TelemetryError(ValueError):
    """The environment asks for an exporter or protocol that is not supported; the message says what is."""


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for traces.

    Raises:
        TelemetryError: with a protocol or an exporter that is not supported.
    """
    exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower()
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if disabled or exporter == "none" or not any(environment.get(name) for name in ENDPOINTS):
        return False
    if exporter != "otlp":
        raise TelemetryError(f"OTEL_TRACES_EXPORTER is {exporter!r}: only 'otlp' and 'none' are supported")
    protocol = next((value for name in PROTOCOLS if (value := environment.get(name))), "grpc")
    if protocol != "grpc":
        raise TelemetryError(
            f"{' or '.join(PROTOCOLS)} is {protocol!r}: only 'grpc' is supported; collectors listen for it on port 4317"
        )
    return True


def tracer_provider(service: str, *, version: str) -> "TracerProvider | None":
    """The provider of a service's spans, which exports them in the background; `None` if traces are off.

    The caller must call `shutdown`, which exports the remaining spans and blocks until that is done.

    Raises:
        TelemetryError: see `wanted`.
    """
    if not wanted():
        return None
    # Imported here: that takes 0.1 s, and only some images contain the exporter.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    # The environment takes precedence.
    default = Resource({SERVICE_NAME: f"sprout.{service}", SERVICE_VERSION: version})
    environment = Resource.create()
    has_name = not str(environment.attributes[SERVICE_NAME]).startswith("unknown_service")
    resource = default.merge(environment) if has_name else environment.merge(default)
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
