"""The report's key figures as Prometheus metrics in text format, for the textfile collector of node_exporter."""

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from tools.reporting.json_report import to_json
from tools.reporting.model import Report

RATIOS = {
    "sprout_saving_on_meter_ratio": (
        "saving_on_meter", "Share of the fleet's energy saved, by switchback, net of the evaluator"
    ),
    "sprout_attributed_saving_ratio": (
        "attributed_saving", "Share of the requests' carbon saved, doubly robust, net of the evaluator"
    ),
}  # fmt: skip
"""Prefix of the JSON keys (`_pct`, `_interval_pct`) and help, by metric."""

AMOUNTS = {
    "sprout_saved_on_meter_grams": ("saved_on_meter_g", "gCO2eq saved on the meter, net of the evaluator"),
    "sprout_attributed_saved_grams": ("attributed_saved_g", "gCO2eq saved by request, net of the evaluator"),
    "sprout_fleet_energy_joules": ("fleet_energy_j", "Energy on the meters of the fleet, idle and judge included"),
    "sprout_idle_energy_joules": ("idle_energy_j", "Idle power of the fleet over time"),
    "sprout_endpoints_needed_mean": ("endpoints_needed_mean", "Fewest endpoints that could carry the load, mean"),
}
"""JSON key and help, by metric."""


def render_metrics(report: Report) -> str:
    """The figures of a report in Prometheus' text format; unknown ones are left out."""
    figures = to_json(report)
    registry = CollectorRegistry()
    for name, (key, text) in RATIOS.items():
        value, interval = figures[f"{key}_pct"], figures[f"{key}_interval_pct"]
        gauge = Gauge(name, f"{text}; bound: value, or low and high of the 95 % interval", ["bound"], registry=registry)
        for bound, percent in (("value", value), *zip(("low", "high"), interval or (None, None), strict=True)):
            if percent is not None:
                gauge.labels(bound).set(percent / 100.0)
    for name, (key, text) in AMOUNTS.items():
        if figures[key] is not None:
            Gauge(name, text, registry=registry).set(figures[key])
    return generate_latest(registry).decode()
