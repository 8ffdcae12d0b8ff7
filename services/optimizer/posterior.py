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
        caution: standard deviations of the quality of all traffic by which less than the mean is counted on.
    """

    pseudo_trials: float
    prior_trials: float
    min_trials: float
    caution: float = 0.0


Spread = Mapping[str, tuple[float, float, float]]
"""By option: how far a group's three doubts (`Effect.deviations`) count for all traffic. Its own cancels out in part,
what it shares with others does not. Weighed so and summed up over the traffic, they give the standard deviation of the
quality of all traffic, were it all served by the option."""


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

    def counted_on(self, group: str, option: str, spread: Spread) -> float:
        """The mean less a margin; nothing is taken off the reference, which the others are measured by.

        A program that may choose among noisy estimates chooses those that chance made too high; counting on less than
        the mean makes up for it. What is to be kept is a bound on all traffic, so the margin is that of all traffic,
        `caution` standard deviations, and every group bears its part of it. Where a program moves a share s of groups
        alike from the reference, doubts cancel out less: the margin is then `caution`·√s of its standard deviations.
        """
        factors = spread.get(option, (1.0, 1.0, 1.0))
        doubts = self._deviations(group, option)
        return self._less(group, option, sum(factor * one for factor, one in zip(factors, doubts, strict=True)))

    def counted_on_alone(self, group: str, option: str) -> float:
        """The same for a bound on the group by itself."""
        return self._less(group, option, math.hypot(*self._deviations(group, option)))

    def spread(self, weights: Mapping[str, float]) -> Spread:
        """For traffic of these shares by group."""
        return {option: self._factors(effect, weights) for option, effect in self._effects.items()}

    def _factors(self, effect: Effect, weights: Mapping[str, float]) -> tuple[float, float, float]:
        # By those who share a doubt: the group alone, its family, all.
        own, families, whole = [], dict[str, float](), 0.0
        for group, weight in weights.items():
            part = weight * self.share(group)
            alone, with_family, with_all = effect.deviations(group)
            family = self._families.get(group, "")
            own.append(part * alone)
            families[family] = families.get(family, 0.0) + part * with_family
            whole += part * with_all
        sums = sum(own), sum(families.values()), whole
        sizes = math.hypot(*own), math.hypot(*families.values()), whole
        all_traffic = math.hypot(*sizes)
        first, second, third = (
            size / total * size / all_traffic if size > 0.0 else 0.0 for size, total in zip(sizes, sums, strict=True)
        )
        return first, second, third

    def _deviations(self, group: str, option: str) -> tuple[float, float, float]:
        effect = self._effects.get(option)
        return effect.deviations(group) if effect is not None else (0.0, 0.0, 0.0)

    def _less(self, group: str, option: str, deviation: float) -> float:
        return self.share(group) * max(0.0, self._rate(group, option) - self._rules.caution * deviation)

    def _rate(self, group: str, option: str) -> float:
        one = self._of(group, self._reference)
        rate = (one.successes + self._leans * self._of_reference.rate) / (one.trials + self._leans)
        effect = self._effects.get(option)
        return rate if effect is None else min(max(rate + effect.mean(group), 0.0), 1.0)

    def _told(self, group: str) -> float:
        return max((one.trials for one in self._judged.get(group, {}).values()), default=0.0)

    def _of(self, group: str, option: str) -> Judged:
        return self._judged.get(group, {}).get(option, Judged())
