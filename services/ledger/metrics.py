"""Prometheus metrics of the ledger."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class LedgerMetrics:
    """All metrics of one ledger process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.joules = Counter(
            "sprout_ledger_energy_joules",
            "Energy of settled intervals: metered, and its parts attributed, idle, unattributed",
            ("endpoint", "part"),
            registry=registry,
        )
        self.reallocated_joules = Counter(
            "sprout_ledger_reallocated_joules",
            "Unattributed energy of settled intervals, reallocated to late calls",
            ("endpoint",),
            registry=registry,
        )
        self.grams = Counter(
            "sprout_ledger_carbon_grams", "gCO2eq of footprints", ("purpose", "pool", "level"), registry=registry
        )
        self.calls = Counter(
            "sprout_ledger_calls",
            "Settled calls: complete, partial (some energy is missing), unmetered (no footprint)",
            ("outcome",),
            registry=registry,
        )
        self.late_calls = Counter(
            "sprout_ledger_late_calls", "Calls that arrived after their intervals were settled", registry=registry
        )
        self.restarts = Counter(
            "sprout_ledger_counter_restarts",
            "Intervals in which an energy counter was reset; some energy is lost",
            ("endpoint",),
            registry=registry,
        )
        self.stalls = Counter(
            "sprout_ledger_meter_stalls",
            "Intervals in which tokens were generated and the energy counter stood still",
            ("endpoint",),
            registry=registry,
        )
        self.curve = Gauge(
            "sprout_ledger_curve",
            "Learned power and speed by batch size: idle_w, step_j, token_j, step_s, token_s, ...",
            ("endpoint", "coefficient"),
            registry=registry,
        )
        self.curve_identifiable = Gauge(
            "sprout_ledger_curve_identifiable",
            "1 if the energy that a batch shares can be separated from that of each sequence, else 0",
            ("endpoint",),
            registry=registry,
        )
        self.saved_g = Gauge(
            "sprout_ledger_metered_saving_grams",
            "gCO2eq saved on the meters, by window: day (since midnight UTC), 28-days; NaN while unknown",
            ("window",),
            registry=registry,
        )
        self.saved_ratio = Gauge(
            "sprout_ledger_metered_saving_ratio",
            "The same as a share of the grams without Sprout; NaN while unknown",
            ("window",),
            registry=registry,
        )
        self.saving_blocks = Gauge(
            "sprout_ledger_metered_saving_blocks",
            "Reference blocks of the switchback that the estimate uses",
            ("window",),
            registry=registry,
        )
        self.scrape_errors = Counter(
            "sprout_ledger_scrape_errors", "Failed readings of energy counters", ("endpoint",), registry=registry
        )
        self.published = Counter("sprout_ledger_footprints_published", "Footprints published", registry=registry)
        self.unsettled_calls = Gauge("sprout_ledger_unsettled_calls", "Calls not settled yet", registry=registry)
        self.unsettled_age_s = Gauge(
            "sprout_ledger_unsettled_age_seconds",
            "Event time since the end of the oldest call that is not settled; 0 without one",
            registry=registry,
        )
        self.chunk_calls = Histogram(
            "sprout_ledger_chunk_calls",
            "Calls in one transaction of the settlement",
            buckets=(1, 10, 100, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 64_000),
            registry=registry,
        )
        self.unpublished_chunks = Gauge(
            "sprout_ledger_unpublished_chunks", "Settled chunks whose footprints are not published", registry=registry
        )
        self.read_calls = Counter(
            "sprout_ledger_calls_read",
            "Calls read from Kafka and stored, those known already included",
            registry=registry,
        )
        self.lag_records = Gauge(
            "sprout_ledger_lag_records", "Records with calls that are not read from Kafka yet", registry=registry
        )
        self.settled_age_s = Gauge(
            "sprout_ledger_settled_age_seconds",
            "Event time between the end of an endpoint's last settled interval and the watermark",
            ("endpoint",),
            registry=registry,
        )
