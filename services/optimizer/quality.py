"""Quality by group and option: judged outcomes that are forgotten by and by, and what they let believe."""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace

from services.optimizer.decay import DecayedSums
from services.optimizer.leaning import leaning
from shared.messages import Quality, QualityCount


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRules:
    """How counts become a posterior.

    Attributes:
        half_life_s: of a count, event time.
        pseudo_trials: judged prompts that the whole counts as, in each group, until the groups tell (`leaning.py`).
        prior_trials: judged prompts that the weak prior counts as, in the whole.
        min_trials: effective judged prompts of an option, in the whole, before it may be used.
        caution: standard deviations of the posterior by which less than its mean is counted on.
        cautions: the same by metric, where it differs.
    """

    half_life_s: float
    pseudo_trials: float
    prior_trials: float
    min_trials: float
    caution: float = 0.0
    cautions: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judged:
    """Effective outcomes."""

    successes: float = 0.0
    trials: float = 0.0

    def mean(self, prior: float, prior_trials: float) -> float:
        """Posterior mean of the success rate under a Beta prior of this mean and weight."""
        trials = self.trials + prior_trials
        return min((self.successes + prior * prior_trials) / trials, 1.0) if trials > 0.0 else prior


class QualityEvidence:
    """The judged outcomes of one model's evaluations."""

    def __init__(self, evaluations: Iterable[Quality] = (), *, half_life_s: float) -> None:
        """Add up evaluations, each of them given once."""
        self._half_life_s = half_life_s
        self._sums: dict[str, dict[str, dict[str, DecayedSums]]] = {}
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
            sums = row.setdefault(count.option, DecayedSums(at_s, [0.0, 0.0]))
            outcome = (min(count.successes, count.trials), count.trials)
            sums.add(outcome, at_s=at_s, half_life_s=self._half_life_s)

    def posterior(self, metric: str, now_s: float, rules: QualityRules) -> "Posterior":
        """What the evidence lets believe of a metric at an event time."""
        judged = {
            group: {option: Judged(*sums.at(now_s, self._half_life_s)) for option, sums in row.items()}
            for group, row in self._sums.get(metric, {}).items()
        }
        caution = rules.cautions.get(metric, rules.caution)
        return Posterior(judged, replace(rules, caution=caution), self._asked(now_s))

    def _asked(self, now_s: float) -> dict[str, float]:
        """Effective judged prompts by group, whatever could be told of them."""
        asked: dict[str, float] = {}
        for rows in self._sums.values():
            for group, row in rows.items():
                trials = max(sums.at(now_s, self._half_life_s)[1] for sums in row.values())
                asked[group] = max(asked.get(group, 0.0), trials)
        return asked


class Posterior:
    """Quality of one metric at one instant.

    An option's quality in the whole leans on a weak prior, the mean of all options; a group's leans on the whole's.

    A metric may be told of some prompts alone: whether an answer is right, say, where there is a right answer. A
    group's quality is then the success rate of these prompts times their share, so that a bound on all traffic weighs
    them as they occur.
    """

    def __init__(
        self,
        judged: Mapping[str, Mapping[str, Judged]],
        rules: QualityRules,
        asked: Mapping[str, float] | None = None,
    ) -> None:
        """Take effective outcomes of the metric.

        Args:
            asked: effective judged prompts by group, whatever was told of them; null: the metric was told of all.
        """
        self._judged = judged
        self._asked = {group: self._told(group) for group in judged} if asked is None else asked
        self._rules = rules
        self._whole: dict[str, Judged] = {}
        for row in judged.values():
            for option, one in row.items():
                known = self._whole.get(option, Judged())
                self._whole[option] = Judged(known.successes + one.successes, known.trials + one.trials)
        trials = sum(one.trials for one in self._whole.values())
        self._prior = sum(one.successes for one in self._whole.values()) / trials if trials > 0.0 else 0.0
        self._leaning = {
            option: leaning(
                [(row[option].successes, row[option].trials) for row in judged.values() if option in row],
                usual=rules.pseudo_trials,
            )
            for option in self._whole
        }
        told = sum(map(self._told, self._asked))
        everything = sum(self._asked.values())
        self._usual_share = min(told / everything, 1.0) if everything > 0.0 else 1.0

    def share(self, group: str) -> float:
        """Share of a group's prompts that the metric can be told of; leans weakly on that of all."""
        prior = self._rules.prior_trials
        asked = self._asked.get(group, 0.0) + prior
        if asked <= 0.0:
            return self._usual_share
        return min((self._told(group) + prior * self._usual_share) / asked, 1.0)

    def trials(self, option: str) -> float:
        """Effective judged prompts of an option in all groups."""
        return self._whole.get(option, Judged()).trials

    def suffices(self, option: str) -> bool:
        """Whether there is evidence enough to use the option."""
        return self.trials(option) >= self._rules.min_trials

    def group_trials(self, group: str, option: str) -> float:
        """Effective judged prompts of an option in a group."""
        return self._of(group, option).trials

    def mean(self, group: str, option: str) -> float:
        """q[group, option]; the whole's for a group without evidence."""
        return self.share(group) * self._rate(group, option)

    def _rate(self, group: str, option: str) -> float:
        whole = self._whole.get(option, Judged()).mean(self._prior, self._rules.prior_trials)
        return self._of(group, option).mean(whole, self._leans(option))

    def counted_on(self, group: str, option: str) -> float:
        """The mean less `caution` standard deviations of the Beta posterior, at least 0.

        A program that may choose among noisy estimates chooses those that chance made too high; counting on less than
        the mean makes up for it (docs/decisions/0004-optimizer-estimates.md).
        """
        rate = self._rate(group, option)
        trials = self._of(group, option).trials + self._leans(option)
        deviation = math.sqrt(rate * (1.0 - rate) / (trials + 1.0))
        return self.share(group) * max(0.0, rate - self._rules.caution * deviation)

    def _leans(self, option: str) -> float:
        return self._leaning.get(option, self._rules.pseudo_trials)

    def _told(self, group: str) -> float:
        return max((one.trials for one in self._judged.get(group, {}).values()), default=0.0)

    def _of(self, group: str, option: str) -> Judged:
        return self._judged.get(group, {}).get(option, Judged())
