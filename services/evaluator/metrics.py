"""Prometheus metrics of the evaluator."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from shared.messages import JudgeCard


class EvaluatorMetrics:
    """All metrics of one evaluator process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.evaluations = Counter(
            "sprout_evaluator_evaluations",
            "Evaluations by trigger and outcome (finished, failed)",
            ("model", "trigger", "outcome"),
            registry=registry,
        )
        self.running = Gauge("sprout_evaluator_running", "Evaluations in progress", ("model",), registry=registry)
        self.postponed = Gauge(
            "sprout_evaluator_postponed",
            "Whether an evaluation is due but postponed, by reason: 1 or 0",
            ("model", "reason"),
            registry=registry,
        )
        self.judged_prompts = Counter(
            "sprout_evaluator_judged_prompts", "Prompts with a verdict", ("model",), registry=registry
        )
        self.abstentions = Counter(
            "sprout_evaluator_abstentions",
            "Prompts without a verdict: the judge's votes could not be read",
            ("model",),
            registry=registry,
        )
        self.dropped_prompts = Counter(
            "sprout_evaluator_dropped_prompts",
            "Prompts removed from an evaluation because a call failed",
            ("model",),
            registry=registry,
        )
        self.judge_positions = Counter(
            "sprout_evaluator_judge_positions",
            "Votes of the judge by the position that it named; equal shares without position bias",
            ("position",),
            registry=registry,
        )
        self.judge_votes = Counter(
            "sprout_evaluator_judge_votes",
            "Votes on prompts with a majority: for the winner (yes) or for another answer (no)",
            ("agreeing",),
            registry=registry,
        )
        self.judge_pairs = Counter(
            "sprout_evaluator_judge_pairs",
            "Judge's card, pairs by kind and outcome: votes on the same answers in another order (repeat: same, "
            "flipped), checks in both orders (check: same, flipped), better answers (length: longer, shorter)",
            ("kind", "outcome"),
            registry=registry,
        )
        self.judge_comparisons = Counter(
            "sprout_evaluator_judge_comparisons",
            "Judge's card, compared prompts: with a majority, or a tie",
            ("outcome",),
            registry=registry,
        )
        self.judge_gold = Counter(
            "sprout_evaluator_judge_gold",
            "Judge's card, comparisons of answers known to be right and wrong: whether a right one won",
            ("agreeing",),
            registry=registry,
        )
        self.judge_checks = Counter(
            "sprout_evaluator_judge_checks",
            "Judge's card, checks of meaning by reply: yes, no, open, none (unreadable)",
            ("reply",),
            registry=registry,
        )
        self.judge_controls = Counter(
            "sprout_evaluator_judge_controls",
            "Judge's card, control checks by kind (same: a text with itself; other: an unrelated text)",
            ("kind", "outcome"),
            registry=registry,
        )
        self.judge_usable = Gauge(
            "sprout_evaluator_judge_usable",
            "Whether the judge's verdicts of the last evaluation count, by metric: 1 or 0",
            ("model", "metric"),
            registry=registry,
        )
        self.samples = Counter(
            "sprout_evaluator_samples",
            "Samples: offered to the reservoir, or rejected (unknown model, unusable id)",
            ("outcome",),
            registry=registry,
        )
        self.retries = Counter(
            "sprout_evaluator_retries", "Attempts after a failed attempt", ("pool",), registry=registry
        )
        self.endpoint_failures = Counter(
            "sprout_evaluator_endpoint_failures", "Failed attempts and health checks", ("endpoint",), registry=registry
        )
        self._adjusted = Gauge(
            "sprout_evaluator_adjusted_intensity",
            "Urgency-adjusted carbon intensity, gCO2eq/kWh; NaN before the first evaluation",
            ("model",),
            registry=registry,
        )

    def observe_adjusted_intensity(self, model: str, read: Callable[[], float]) -> None:
        """Call `read` for a model's urgency-adjusted intensity at every scrape."""
        self._adjusted.labels(model).set_function(read)

    def count_card(self, card: JudgeCard) -> None:
        """Count the judge's card of an evaluation; the positions are counted with the votes."""
        counts = (
            (self.judge_pairs.labels("repeat", "flipped"), card.flips),
            (self.judge_pairs.labels("repeat", "same"), card.repeats - card.flips),
            (self.judge_pairs.labels("check", "flipped"), card.check_flips),
            (self.judge_pairs.labels("check", "same"), card.check_repeats - card.check_flips),
            (self.judge_pairs.labels("length", "longer"), card.longer_preferred),
            (self.judge_pairs.labels("length", "shorter"), card.length_pairs - card.longer_preferred),
            (self.judge_comparisons.labels("tie"), card.ties),
            (self.judge_comparisons.labels("decided"), card.comparisons - card.ties),
            (self.judge_gold.labels("yes"), card.gold_agreeing),
            (self.judge_gold.labels("no"), card.gold - card.gold_agreeing),
            (self.judge_checks.labels("yes"), card.checks_yes),
            (self.judge_checks.labels("open"), card.checks_open),
            (self.judge_checks.labels("none"), card.checks_unreadable),
            (self.judge_checks.labels("no"), card.checks - card.checks_yes - card.checks_open - card.checks_unreadable),
            (self.judge_controls.labels("same", "wrong"), card.controls_same_wrong),
            (self.judge_controls.labels("same", "right"), card.controls_same - card.controls_same_wrong),
            (self.judge_controls.labels("other", "wrong"), card.controls_other_wrong),
            (self.judge_controls.labels("other", "right"), card.controls_other - card.controls_other_wrong),
        )
        for counter, count in counts:
            counter.inc(count)
