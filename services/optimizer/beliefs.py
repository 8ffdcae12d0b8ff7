"""What is believed of every model, from all that has come in: consumption, judged outcomes, prompt groups. No I/O."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from services.optimizer.consumption import Consumption
from services.optimizer.estimates import EstimateRules, Estimates, estimate
from services.optimizer.learned import consumption_by, evidence_by
from services.optimizer.quality import QualityEvidence
from shared.fleet import Fleet
from shared.messages import Footprint, PromptGrouping, Quality


class Beliefs:
    """Evidence of every model.

    Attributes:
        consumption: by model, as it is kept in the database.
    """

    def __init__(self, fleet: Fleet, *, metrics: Sequence[str], rules: EstimateRules) -> None:
        """Believe nothing yet.

        Args:
            metrics: that an option's quality must be known in before it may be used.
        """
        self.consumption: dict[str, Consumption] = {}
        self._fleet = fleet
        self._metrics = tuple(metrics)
        self._rules = rules
        self._evidence: dict[str, QualityEvidence] = {}
        self._groupings: dict[str, PromptGrouping] = {}

    def learn_grouping(self, grouping: PromptGrouping) -> bool:
        """Take a model's prompt groups unless newer ones are known; `add_up` must follow.

        Returns:
            Whether they were taken.
        """
        known = self._groupings.get(grouping.model)
        if known is not None and grouping.learned_at <= known.learned_at:
            return False
        # The classifier is the routers' concern.
        self._groupings[grouping.model] = grouping.model_copy(update={"arrays": {}})
        return True

    def group_version(self, model: str) -> str | None:
        """Version of the learned groups that the model's requests belong to; null: task labels."""
        grouping = self._groupings.get(model)
        return None if grouping is None else grouping.version

    def add_up(self, evaluations: Iterable[Quality]) -> None:
        """Count the evaluations anew, each of them given once, by the groups in force."""
        by_model: dict[str, list[Quality]] = {model.name: [] for model in self._fleet.models}
        for one in evaluations:
            by_model.setdefault(one.model, []).append(one)
        half_life_s = self._rules.quality.half_life_s
        for model, found in by_model.items():
            grouping = self._learned(model)
            if grouping is None:
                self._evidence[model] = QualityEvidence(found, half_life_s=half_life_s)
            else:
                self._evidence[model] = evidence_by(grouping, found, half_life_s=half_life_s)

    def latest_evaluation(self, model: str) -> Quality | None:
        """The newest evaluation of a model."""
        evidence = self._evidence.get(model)
        return None if evidence is None else evidence.latest

    def count(self, consumption: Consumption, footprints: Sequence[Footprint], *, now_s: float) -> None:
        """Count footprints into a model's consumption."""
        for footprint in footprints:
            consumption.observe(footprint, now_s=now_s, memory=self._rules.memory)

    def estimate(self, model: str, now: datetime) -> Estimates | None:
        """What is believed at an event time; null as long as no footprint of the reference is known."""
        consumption = self.consumption.get(model, Consumption())
        grouping = self._learned(model)
        if grouping is not None:
            consumption = consumption_by(grouping, consumption, self._rules.memory)
        return estimate(
            consumption,
            self._evidence.get(model) or QualityEvidence(half_life_s=self._rules.quality.half_life_s),
            options=self._fleet.options_of(model),
            reference=self._fleet.reference_of(model),
            metrics=self._metrics,
            rules=self._rules,
            now_s=now.timestamp(),
            same=self._fleet.same_as_reference(model),
        )

    def _learned(self, model: str) -> PromptGrouping | None:
        grouping = self._groupings.get(model)
        return None if grouping is None or grouping.version is None else grouping
