"""What was judged, by metric, group and option: outcomes that are forgotten by and by."""

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from services.optimizer.caution import Caution
from services.optimizer.decay import DecayedSums
from services.optimizer.differences import Judged
from services.optimizer.posterior import Posterior, PosteriorRules
from shared.messages import Quality, QualityCount


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRules:
    """How counts become beliefs.

    Attributes:
        half_life_s: of a count, event time.
        posterior: what is believed of them.
        caution: for a bound on a group by itself.
    """

    half_life_s: float
    posterior: PosteriorRules
    caution: Caution = field(default_factory=Caution)

    def of(self, metric: str) -> PosteriorRules:
        """The rules of a metric."""
        return replace(self.posterior, caution=self.caution.alone(metric))


class QualityEvidence:
    """The judged outcomes of one model's evaluations."""

    def __init__(
        self,
        evaluations: Iterable[Quality] = (),
        *,
        half_life_s: float,
        families: Mapping[str, str] | None = None,
    ) -> None:
        """Add up evaluations, each of them given once.

        Args:
            families: of groups that are about alike things, by group; null: all are of one.
        """
        self._half_life_s = half_life_s
        self._families = families
        # By metric, group, and (option, reference): without a reference all prompts, with one how they went together.
        self._sums: dict[str, dict[str, dict[tuple[str, str | None], DecayedSums]]] = {}
        self.latest: Quality | None = None
        for evaluation in evaluations:
            self.add(evaluation)

    def add(self, evaluation: Quality, *, groups: Container[str] | None = None) -> None:
        """Take one more evaluation.

        Args:
            groups: whose counts are taken; null: all.
        """
        counts = [count for count in evaluation.counts if groups is None or count.group in groups]
        self.count(counts, at_s=evaluation.evaluated_at.timestamp())
        if self.latest is None or evaluation.evaluated_at > self.latest.evaluated_at:
            self.latest = evaluation

    def count(self, counts: Iterable[QualityCount], *, at_s: float) -> None:
        """Take counts of an event time."""
        for count in counts:
            row = self._sums.setdefault(count.metric, {}).setdefault(count.group, {})
            for against, outcome in _outcomes(count):
                sums = row.setdefault((count.option, against), DecayedSums(at_s, [0.0] * len(outcome)))
                sums.add(outcome, at_s=at_s, half_life_s=self._half_life_s)

    def family(self, group: str) -> str | None:
        """Of a group; null: none is known."""
        return None if self._families is None else self._families.get(group)

    def posterior(
        self, metric: str, reference: str, now_s: float, rules: QualityRules, *, same: Collection[str] = ()
    ) -> Posterior:
        """What the evidence lets believe of a metric at an event time.

        Args:
            same: options whose answers are the reference's.
        """
        judged: dict[str, dict[str, Judged]] = {}
        for group, row in self._sums.get(metric, {}).items():
            found = judged.setdefault(group, {})
            for (option, against), sums in row.items():
                if against in (None, reference):
                    one = Judged(*sums.at(now_s, self._half_life_s))
                    found[option] = found.get(option, Judged()) + one
        asked = self._asked(now_s)
        return Posterior(judged, reference, rules.of(metric), asked=asked, families=self._families, same=same)

    def _asked(self, now_s: float) -> dict[str, float]:
        """Effective judged prompts by group, whatever could be told of them."""
        asked: dict[str, float] = {}
        for rows in self._sums.values():
            for group, row in rows.items():
                trials = max(sums.at(now_s, self._half_life_s)[1] for sums in row.values())
                asked[group] = max(asked.get(group, 0.0), trials)
        return asked


def _outcomes(count: QualityCount) -> Iterator[tuple[str | None, tuple[float, ...]]]:
    """The fields of `Judged`: of all prompts, then of how they went together with a reference."""
    successes = min(count.successes, count.trials)
    yield None, (successes, count.trials, 0.0, 0.0, 0.0, 0.0)
    if (paired := count.paired) is not None:
        theirs = min(paired.successes, count.trials)
        yield paired.reference, (0.0, 0.0, count.trials, successes, theirs, min(paired.both, successes, theirs))
