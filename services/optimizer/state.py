"""In-memory state of every model: consumption, judged outcomes, learned prompt groups. No I/O.

A new version of prompt groups carries all earlier judgments re-aggregated by its groups, what the judged answers
used, and the groups' traffic shares. Evaluations and footprints that name its groups are added to that. Judgments
counted by other groups are ignored, because the version contains them already; energy and time of other groups are
kept, because they say how much an option uses relative to another.

What was judged of other texts of the directives than the fleet's does not count.
"""

from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence

from services.optimizer.costs import Consumption, DecayedSums, ResourceUse, decay_factor
from services.optimizer.prior import ModelPrior
from services.optimizer.quality import Outcomes, QualityModel
from services.optimizer.settings import OptimizerSettings
from shared.fleet import Fleet, reworded
from shared.messages import Footprint, PromptGrouping, Quality, QualityCount

TRAFFIC_REQUESTS = 100.0
"""Requests that the traffic shares of a new version of groups count as, until requests name its groups."""


class _Repetitions:
    """How often each prompt of a group was judged.

    Verdicts on the same prompt share its effect and are not independent. They are taken for copies of each other: n_i
    verdicts on prompt i are worth (sum n_i)^2 / (sum n_i^2) prompts (Kish's effective sample size). Means keep the
    prompts' frequencies, as the traffic has them.

    One entry is kept for each different prompt among the verdicts that count.
    """

    def __init__(self) -> None:
        # By prompt: verdicts, each discounted by its time to the newest one, and that time.
        self._prompts: dict[str, tuple[float, float]] = {}
        # Sums over the prompts of n_i and n_i^2, discounted: a prompt whose newest verdict has the weight w counts for
        # no more than w prompts.
        self._sums: DecayedSums | None = None

    def add(self, hashes: Iterable[str], *, at_s: float, half_life_s: float) -> None:
        """Add one verdict for every hash, judged at an event time."""
        sums = self._sums = self._sums or DecayedSums(at_s, [0.0, 0.0])
        for name in hashes:
            count, newest_s = self._prompts.get(name, (0.0, at_s))
            sums.add((-count, -(count**2)), at_s=newest_s, half_life_s=half_life_s)
            discount = decay_factor(abs(at_s - newest_s), half_life_s)
            count = count * discount + 1.0 if at_s >= newest_s else count + discount
            newest_s = max(at_s, newest_s)
            sums.add((count, count**2), at_s=newest_s, half_life_s=half_life_s)
            self._prompts[name] = count, newest_s

    @property
    def independent_share(self) -> float:
        """Independent prompts per verdict, in (0, 1]; the same at any time, because all verdicts age alike."""
        verdicts, squares = self._sums.values if self._sums is not None else (0.0, 0.0)
        return min(verdicts / squares, 1.0) if min(verdicts, squares) > 0.0 else 1.0


class QualityCounts:
    """Decayed outcomes of one model's evaluations, by metric, group and option.

    Attributes:
        latest: the newest evaluation.
    """

    def __init__(
        self,
        evaluations: Iterable[Quality] = (),
        *,
        settings: OptimizerSettings,
        families: Mapping[str, str] | None = None,
    ) -> None:
        """Count evaluations, each given once.

        Args:
            evaluations: in any order.
            settings: the half-life, and the prior weights of the models.
            families: families of groups about similar things, by group; None: all groups are of one family.
        """
        self._settings = settings
        self._families = families
        # By metric, group, and (option, reference): reference None holds all prompts, another the paired outcomes.
        self._sums: dict[str, dict[str, dict[tuple[str, str | None], DecayedSums]]] = {}
        self._repetitions: dict[str, _Repetitions] = defaultdict(_Repetitions)
        self.latest: Quality | None = None
        for evaluation in evaluations:
            self.add(evaluation)

    def add(self, evaluation: Quality, *, groups: Container[str] | None = None) -> None:
        """Count one evaluation; only the counts of `groups` unless that is None."""
        counts = [count for count in evaluation.counts if groups is None or count.group in groups]
        hashes = {name: one for name, one in evaluation.prompt_hashes.items() if groups is None or name in groups}
        self.add_counts(counts, hashes, at_s=evaluation.evaluated_at.timestamp())
        if self.latest is None or evaluation.evaluated_at > self.latest.evaluated_at:
            self.latest = evaluation

    def add_counts(
        self, counts: Iterable[QualityCount], prompt_hashes: Mapping[str, Iterable[str]], *, at_s: float
    ) -> None:
        """Count outcomes that were judged at an event time.

        Args:
            prompt_hashes: of the judged prompts, by group; without a group's, its prompts are taken for different ones.
        """
        for group, hashes in prompt_hashes.items():
            self._repetitions[group].add(hashes, at_s=at_s, half_life_s=self._settings.quality_half_life_s)
        for count in counts:
            row = self._sums.setdefault(count.metric, {}).setdefault(count.group, {})
            for reference, outcome in _outcome_rows(count):
                sums = row.setdefault((count.option, reference), DecayedSums(at_s, [0.0] * len(outcome)))
                sums.add(outcome, at_s=at_s, half_life_s=self._settings.quality_half_life_s)

    def family(self, group: str) -> str | None:
        """Family of a group; None if it is unknown."""
        return None if self._families is None else self._families.get(group)

    def model(
        self,
        metric: str,
        reference: str,
        now_s: float,
        *,
        equivalent: Collection[str] = (),
        prior: ModelPrior | None = None,
    ) -> QualityModel:
        """Estimate the quality of a metric at an event time.

        Args:
            metric: `preference`, `correctness`, ...
            reference: the baseline option.
            now_s: event time.
            equivalent: options that give the reference's own answers.
            prior: what an earlier fleet knew.
        """
        outcomes: dict[str, dict[str, Outcomes]] = {}
        shares = self._independent_shares()
        for group, row in self._sums.get(metric, {}).items():
            of_group = outcomes.setdefault(group, {})
            for (option, paired_with), sums in row.items():
                if paired_with in (None, reference):
                    one = Outcomes(*sums.at(now_s, self._settings.quality_half_life_s))
                    of_group[option] = of_group.get(option, Outcomes()) + one.scaled(shares.get(group, 1.0))
        counts = {group: shares.get(group, 1.0) * count for group, count in self._judged_prompts(now_s).items()}
        before = {} if prior is None else prior.outcomes(metric, self._settings.prior_requests)
        for group, known in before.items():
            of_group = outcomes.setdefault(group, {})
            for option, one in known.items():
                of_group[option] = of_group.get(option, Outcomes()) + one
            counts[group] = counts.get(group, 0.0) + max(one.trials for one in known.values())
        return QualityModel(
            outcomes,
            reference,
            self._settings,
            counts=counts,
            families=self._families,
            equivalent=equivalent,
        )

    def _independent_shares(self) -> dict[str, float]:
        """Independent prompts per verdict, by group; empty where every verdict counts."""
        if self._settings.sampling_unit == "request":
            return {}
        return {group: one.independent_share for group, one in self._repetitions.items()}

    def _judged_prompts(self, now_s: float) -> dict[str, float]:
        """Decayed verdicts by group, whichever metrics are defined for them."""
        found: dict[str, float] = {}
        for rows in self._sums.values():
            for group, row in rows.items():
                trials = max(sums.at(now_s, self._settings.quality_half_life_s)[1] for sums in row.values())
                found[group] = max(found.get(group, 0.0), trials)
        return found


def _outcome_rows(count: QualityCount) -> Iterator[tuple[str | None, tuple[float, ...]]]:
    """The fields of `Outcomes`: those over all prompts, then those paired with a reference."""
    successes = min(count.successes, count.trials)
    yield None, (successes, count.trials, 0.0, 0.0, 0.0, 0.0)
    if (paired := count.paired) is not None:
        of_reference = min(paired.successes, count.trials)
        both = min(paired.both, successes, of_reference)
        yield paired.reference, (0.0, 0.0, count.trials, successes, of_reference, both)


class OptimizerState:
    """Consumption, judged outcomes and prompt groups of every model.

    Attributes:
        consumption: by model, as it is stored in the database.
    """

    def __init__(self, fleet: Fleet, settings: OptimizerSettings) -> None:
        """Start empty.

        Args:
            fleet: its models are those that are remembered, and its directives those that count.
            settings: half-lives and prior weights.
        """
        self.consumption: dict[str, Consumption] = {}
        self._models = [model.name for model in fleet.models]
        self._directives = fleet.directive_hashes
        self._settings = settings
        self._counts: dict[str, QualityCounts] = {}
        self._groupings: dict[str, PromptGrouping] = {}

    def update_grouping(self, grouping: PromptGrouping) -> bool:
        """Store a model's prompt groups unless newer ones are known; call `recount` afterwards.

        Returns:
            Whether they were stored.
        """
        known = self._groupings.get(grouping.model)
        if known is not None and grouping.learned_at <= known.learned_at:
            return False
        # Only routers use the classifier.
        unused: dict[str, object] = {"arrays": {}}
        if reworded(grouping.directives, self._directives):
            unused |= {"evidence": (), "taken": ()}
        self._groupings[grouping.model] = grouping.model_copy(update=unused)
        return True

    def group_version(self, model: str) -> str | None:
        """Version of the learned groups that the model's requests belong to; None: task labels."""
        grouping = self._groupings.get(model)
        return None if grouping is None else grouping.version

    def recount(self, evaluations: Iterable[Quality]) -> None:
        """Count all evaluations, each given once, by the current groups; earlier counts are dropped.

        An evaluation in which the text of some level was another one does not count: its answers were compared with
        each other.
        """
        by_model: dict[str, list[Quality]] = {model: [] for model in self._models}
        for one in evaluations:
            if not reworded(one.directives, self._directives):
                by_model.setdefault(one.model, []).append(one)
        for model, found in by_model.items():
            grouping = self._learned_groups(model)
            if grouping is None:
                self._counts[model] = QualityCounts(found, settings=self._settings)
            else:
                self._counts[model] = counts_by_groups(grouping, found, self._settings)

    def latest_evaluation(self, model: str) -> Quality | None:
        """The newest evaluation of a model."""
        counts = self._counts.get(model)
        return None if counts is None else counts.latest

    def add_footprints(self, consumption: Consumption, footprints: Sequence[Footprint], *, now_s: float) -> None:
        """Count footprints into a model's consumption, which the caller holds locked."""
        consumption.note_directives(self._directives)
        for footprint in footprints:
            consumption.add_footprint(footprint, now_s=now_s, settings=self._settings)

    def consumption_of(self, model: str) -> Consumption:
        """Consumption of a model by its current groups."""
        consumption = self.consumption.get(model, Consumption())
        grouping = self._learned_groups(model)
        return consumption if grouping is None else consumption_by_groups(grouping, consumption, self._settings)

    def counts_of(self, model: str) -> QualityCounts:
        """Judged outcomes of a model by its current groups."""
        return self._counts.get(model) or QualityCounts(settings=self._settings)

    def _learned_groups(self, model: str) -> PromptGrouping | None:
        grouping = self._groupings.get(model)
        return None if grouping is None or grouping.version is None else grouping


def counts_by_groups(
    grouping: PromptGrouping, evaluations: Iterable[Quality], settings: OptimizerSettings
) -> QualityCounts:
    """Outcomes by learned groups: those that the version carries, and those of evaluations that name its groups."""
    counts = QualityCounts(settings=settings, families=grouping.families)
    for aggregated in grouping.evidence:
        at_s = aggregated.evaluated_at.timestamp()
        counts.add_counts(aggregated.counts, aggregated.prompt_hashes, at_s=at_s)
    names = frozenset(grouping.names)
    for evaluation in evaluations:
        counts.add(evaluation, groups=names)
    return counts


def consumption_by_groups(
    grouping: PromptGrouping, consumption: Consumption, settings: OptimizerSettings
) -> Consumption:
    """Consumption by learned groups: all of it, with the version's judged answers and the traffic of its groups."""
    at_s = grouping.learned_at.timestamp()
    found = consumption.with_traffic_of(grouping.names)
    for one in grouping.taken:
        tokens = one.completion_tokens
        used = ResourceUse(
            one.requests,
            one.energy_kwh,
            one.processing_s,
            token_requests=0.0 if tokens is None else one.requests,
            completion_tokens=tokens or 0.0,
        )
        found.add(one.group, one.option, used, at_s=at_s, settings=settings, traffic=0.0)
    half_life_s = found.traffic_half_life_s(at_s, settings)
    for group, share in grouping.traffic.items():
        sums = found.traffic.setdefault(group, DecayedSums(at_s, [0.0]))
        sums.add((TRAFFIC_REQUESTS * share,), at_s=at_s, half_life_s=half_life_s)
    return found
