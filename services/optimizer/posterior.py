"""Quality of one metric as believed at one instant, by group and option (docs/decisions/0004-optimizer-estimates.md).

The program asks how much an option loses against the reference. Both were judged on the same prompts, so that is what
is estimated: the mean difference of their outcomes, which varies far less than the two do, and differs far less between
groups.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from services.optimizer.differences import Difference, Effect, Judged
from services.optimizer.leaning import leaning


@dataclass(frozen=True, slots=True, kw_only=True)
class PosteriorRules:
    """How outcomes become beliefs.

    Attributes:
        pseudo_trials: judged prompts that the whole counts as, in each group, until the groups tell (`leaning.py`).
        prior_trials: judged prompts without any difference that the weak prior counts as, in the whole.
        min_trials: effective judged prompts of an option, in the whole, before it may be used.
        caution: standard deviations by which less than the mean is counted on for a bound on a group by itself.
    """

    pseudo_trials: float
    prior_trials: float
    min_trials: float
    caution: float = 0.0


Doubt = tuple[float, float, float]
"""Standard deviations of a group's quality under an option, against the reference: of what is particular to the group,
of what it shares with its family, and of what it shares with all (`Effect.deviations`)."""

SURE: Doubt = (0.0, 0.0, 0.0)


class Posterior:
    """Quality of one metric at one instant.

    A metric may be told of some prompts alone: whether an answer is right, say, where there is a right answer. A
    group's quality is then the success rate of these prompts times their share, so that a bound on all traffic weighs
    them as they occur.
    """

    def __init__(
        self,
        judged: Mapping[str, Mapping[str, Judged]],
        reference: str,
        rules: PosteriorRules,
        *,
        asked: Mapping[str, float] | None = None,
        families: Mapping[str, str] | None = None,
        same: Collection[str] = (),
    ) -> None:
        """Take effective outcomes of the metric.

        Args:
            judged: by group, then option.
            asked: effective judged prompts by group, whatever was told of them; null: the metric was told of all.
            families: of groups that are about alike things, by group; null: all are of one.
            same: options whose answers are the reference's: of its level, by the same weights elsewhere.
        """
        self._families = families or {}
        self._same = {reference, *same}
        self._judged = judged
        self._reference = reference
        self._rules = rules
        self._asked = {group: self._told(group) for group in judged} if asked is None else asked
        self._of_reference = sum((row.get(reference, Judged()) for row in judged.values()), Judged())
        self._effects = {
            option: Effect(
                {
                    group: Difference.between(row[option], row.get(reference, Judged()))
                    for group, row in judged.items()
                    if option in row
                },
                self._families,
                pseudo_trials=rules.pseudo_trials,
                prior_trials=rules.prior_trials,
            )
            for option in sorted({option for row in judged.values() for option in row} - self._same)
        }
        outcomes = [(row[reference].successes, row[reference].trials) for row in judged.values() if reference in row]
        self._leans = leaning(outcomes, usual=rules.pseudo_trials)
        told, everything = sum(map(self._told, self._asked)), sum(self._asked.values())
        self._usual_share = min(told / everything, 1.0) if everything > 0.0 else 1.0

    def share(self, group: str) -> float:
        """Share of a group's prompts that the metric can be told of; leans weakly on that of all."""
        prior = self._rules.prior_trials
        asked = self._asked.get(group, 0.0) + prior
        return min((self._told(group) + prior * self._usual_share) / asked, 1.0)

    def trials(self, option: str) -> float:
        """Effective judged prompts of an option in all groups; of another than the reference, compared with it."""
        if option in self._same:
            return self._of_reference.trials
        return self._effects[option].trials if option in self._effects else 0.0

    def suffices(self, option: str) -> bool:
        """Whether there is evidence enough to use the option."""
        return self.trials(option) >= self._rules.min_trials

    def group_trials(self, group: str, option: str) -> float:
        """Effective judged prompts of an option in a group."""
        return self._of(group, option).trials

    def mean(self, group: str, option: str) -> float:
        """q[group, option]; the whole's for a group without evidence."""
        return self.share(group) * self._rate(group, option)

    def doubt(self, group: str, option: str) -> Doubt:
        """How far the mean may be off; the reference's is what the others are measured by, so nothing is doubted."""
        effect = self._effects.get(option)
        if effect is None:
            return SURE
        share = self.share(group)
        own, with_family, with_all = effect.deviations(group)
        return share * own, share * with_family, share * with_all

    def doubt_of_all(self, option: str, weights: Mapping[str, float]) -> float:
        """Standard deviation of the quality of all traffic, of these shares by group, were it all served by the option:
        what is particular to groups cancels out in part.
        """
        own, of_families, of_all = 0.0, dict[str, float](), 0.0
        for group, weight in weights.items():
            alone, with_family, with_all = self.doubt(group, option)
            family = self._families.get(group, "")
            own = math.hypot(own, weight * alone)
            of_families[family] = of_families.get(family, 0.0) + weight * with_family
            of_all += weight * with_all
        return math.hypot(own, *of_families.values(), of_all)

    def counted_on(self, mean: float, deviation: float) -> float:
        """The mean less a margin, for a bound on a group by itself."""
        return max(0.0, mean - self._rules.caution * deviation)

    def _rate(self, group: str, option: str) -> float:
        one = self._of(group, self._reference)
        rate = (one.successes + self._leans * self._of_reference.rate) / (one.trials + self._leans)
        effect = self._effects.get(option)
        return rate if effect is None else min(max(rate + effect.mean(group), 0.0), 1.0)

    def _told(self, group: str) -> float:
        return max((one.trials for one in self._judged.get(group, {}).values()), default=0.0)

    def _of(self, group: str, option: str) -> Judged:
        return self._judged.get(group, {}).get(option, Judged())
