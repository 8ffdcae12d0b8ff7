"""What the ledger tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class LedgerMetrics:
    """All metrics of one ledger."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.joules = Counter(
            "sprout_ledger_energy_joules",
            "Settled energy: metered, and its parts attributed, idle, unattributed",
            ("endpoint", "part"),
            registry=registry,
        )
        self.recovered_joules = Counter(
            "sprout_ledger_recovered_joules",
            "Unattributed energy that calls which came late took",
            ("endpoint",),
            registry=registry,
        )
        self.grams = Counter(
            "sprout_ledger_carbon_grams", "gCO2eq of footprints", ("purpose", "pool", "level"), registry=registry
        )
        self.calls = Counter(
            "sprout_ledger_calls",
            "Calls settled: complete, partial (some energy is missing), unmetered (no footprint)",
            ("outcome",),
            registry=registry,
        )
        self.late_calls = Counter(
            "sprout_ledger_late_calls", "Calls that came after their intervals were settled", registry=registry
        )
        self.restarts = Counter(
            "sprout_ledger_counter_restarts",
            "Intervals in which a counter began anew: some energy is lost",
            ("endpoint",),
            registry=registry,
        )
        self.scrape_errors = Counter(
            "sprout_ledger_scrape_errors", "Readings that failed", ("endpoint",), registry=registry
        )
        self.published = Counter("sprout_ledger_footprints_published", "Footprints published", registry=registry)
        self.unsettled_calls = Gauge(
            "sprout_ledger_unsettled_calls", "Calls without a footprint yet", registry=registry
        )
        self.lag_records = Gauge("sprout_ledger_lag_records", "Calls waiting to be read from Kafka", registry=registry)
        self.settled_age_s = Gauge(
            "sprout_ledger_settled_age_seconds",
            "Event time since the last settled interval of an endpoint ended",
            ("endpoint",),
            registry=registry,
        )
