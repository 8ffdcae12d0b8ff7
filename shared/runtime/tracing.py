"""Traces to an OpenTelemetry collector; off unless the standard variables name one.

`OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`) switches it on. Everything else is OpenTelemetry's own
environment as well: sampling (`OTEL_TRACES_SAMPLER`), the batches (`OTEL_BSP_*`), TLS and headers
(`OTEL_EXPORTER_OTLP_*`), the resource (`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`).
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class TelemetryError(ValueError):
    """Traces are asked for in a way that is not offered; the message says what is."""


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether traces are to be exported.

    Raises:
        TelemetryError: by a protocol or an exporter that is not installed.
    """
    exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower()
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if disabled or exporter == "none" or not any(environment.get(name) for name in ENDPOINTS):
        return False
    if exporter != "otlp":
        raise TelemetryError(f"OTEL_TRACES_EXPORTER is {exporter!r}: only 'otlp' and 'none' are offered")
    protocol = next((value for name in PROTOCOLS if (value := environment.get(name))), "grpc")
    if protocol != "grpc":
        raise TelemetryError(
            f"{' or '.join(PROTOCOLS)} is {protocol!r}: only 'grpc' is offered; collectors take it on port 4317"
        )
    return True


def tracer_provider(service: str, *, version: str) -> "TracerProvider | None":
    """What makes a service's spans and exports them in the background; null where nobody wants them.

    Whoever asks for it calls `shutdown`, which exports what is left and blocks for as long as that takes.

    Raises:
        TelemetryError: see `wanted`.
    """
    if not wanted():
        return None
    # Here, because they take a tenth of a second and only some images have the exporter.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    # What the environment says about the resource wins over these.
    ours = Resource({SERVICE_NAME: f"sprout.{service}", SERVICE_VERSION: version})
    said = Resource.create()
    named = not str(said.attributes[SERVICE_NAME]).startswith("unknown_service")
    provider = TracerProvider(resource=ours.merge(said) if named else said.merge(ours), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
