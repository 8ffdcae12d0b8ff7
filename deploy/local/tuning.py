"""What the services of a local stack are told beyond their defaults: its grid, and figures that a person need not wait
long for."""

import json
from pathlib import Path

from deploy.local.config import StackConfig
from deploy.local.grid import shipped_trace

SETTLE_DELAY_WALL_S = 10.0
"""Age at which the ledger enters energy into its books. A call is known once it has ended: one that took longer, some
400 tokens here, is charged for its end alone, and its beginning is booked as unattributed."""


def service_settings(config: StackConfig) -> dict[str, dict[str, str]]:
    """Environment added to each service, by its name; the stack's own settings win.

    Raises:
        TraceError: the zone has no trace of its own and none is shipped for it.
    """
    told = {
        # Few requests come by hand: let the evaluator have them all, and begin with few.
        "router": {"SPROUT_ROUTER_SAMPLE_SHARE": "1"},
        "evaluator": {"SPROUT_EVALUATOR_MIN_SAMPLES": "20"},
        "ledger": {
            "SPROUT_LEDGER_SCRAPE_INTERVAL_S": "1",
            "SPROUT_LEDGER_SETTLE_DELAY_S": f"{SETTLE_DELAY_WALL_S * config.rate:g}",
            "SPROUT_LEDGER_SETTLE_INTERVAL_S": "1",
        },
    }
    if "carbon_feed" in config.services:
        told["carbon_feed"] = {"SPROUT_CARBON_FEED_PROVIDERS": carbon_providers(config)}
    return {service: told.get(service, {}) | config.settings.get(service, {}) for service in told | config.settings}


def carbon_providers(config: StackConfig) -> str:
    """The chains of providers for carbon_feed, as JSON: the trace of every zone.

    In real time a trace is played over and over, or nothing would be known of today; a replay keeps to what was
    recorded.

    Raises:
        TraceError: the zone has no trace of its own and none is shipped for it.
    """
    traces: dict[str, Path] = dict(config.carbon)
    if config.zone not in traces:
        traces[config.zone] = shipped_trace(config.zone)
    repeat = config.event_start is None
    return json.dumps(
        {zone: [{"kind": "csv", "path": str(path), "repeat": repeat}] for zone, path in sorted(traces.items())}
    )
