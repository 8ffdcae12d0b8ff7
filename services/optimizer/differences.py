"""What an option changes against the reference, group by group, from outcomes on the same prompts.

The difference of two outcomes on one prompt varies far less than the outcomes do, and its mean differs far less between
groups; so it is what is estimated, and what leans (docs/decisions/0004-optimizer-estimates.md).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from services.optimizer.leaning import leaning


@dataclass(frozen=True, slots=True)
class Judged:
    """Effective outcomes of a group under an option.

    Attributes:
        with_reference: sum over prompts of success times the reference's success, of `paired` prompts.
        paired: prompts of which that is known; for the others the two are taken for independent.
    """

    successes: float = 0.0
    trials: float = 0.0
    with_reference: float = 0.0
    paired: float = 0.0

    @property
    def rate(self) -> float:
        """Share of successes; 0 where nothing was judged."""
        return self.successes / self.trials if self.trials > 0.0 else 0.0

    def __add__(self, other: "Judged") -> "Judged":
        return Judged(
            self.successes + other.successes,
            self.trials + other.trials,
            self.with_reference + other.with_reference,
            self.paired + other.paired,
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """Of an option's outcomes from the reference's, on the same prompts of a group: the sum, and that of squares."""

    total: float
    squares: float
    trials: float

    @classmethod
    def between(cls, option: Judged, reference: Judged) -> "Difference":
        """From what was judged of the same prompts under both."""
        trials = min(option.trials, reference.trials)
        if trials <= 0.0:
            return cls(0.0, 0.0, 0.0)
        known = min(option.paired / option.trials, 1.0)
        by_chance = option.rate * reference.rate
        both = option.with_reference / option.paired * known if known > 0.0 else 0.0
        # A success is 0 or 1, so that its square is itself; where ties share one, the variance is taken for a bit more.
        squares = option.rate + reference.rate - 2.0 * (both + (1.0 - known) * by_chance)
        return cls(trials * (option.rate - reference.rate), trials * max(squares, 0.0), trials)

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(self.total + other.total, self.squares + other.squares, self.trials + other.trials)

    def leaning_on(self, prior: float, trials: float) -> float:
        """The mean, were the prior seen in so many prompts more."""
        weight = self.trials + trials
        return (self.total + trials * prior) / weight if weight > 0.0 else prior


_NOTHING = Difference(0.0, 0.0, 0.0)


class Effect:
    """What an option changes against the reference: a mean for every group.

    A group leans on its family, the groups that are about alike things; the family leans on the whole.
    """

    def __init__(
        self,
        differences: Mapping[str, Difference],
        families: Mapping[str, str],
        *,
        pseudo_trials: float,
        prior_trials: float,
    ) -> None:
        """Take the differences by group.

        Args:
            families: by group; a group that is not named is of the family without a name.
            pseudo_trials: that a mean counts as for what leans on it, until the data tells.
            prior_trials: without any difference, that the mean of all leans on.
        """
        self._family_of = families
        groups = {group: one for group, one in differences.items() if one.trials > 0.0}
        within, of_families = _within(groups.values()), dict[str, Difference]()
        for group, one in groups.items():
            family = self._family(group)
            of_families[family] = of_families.get(family, _NOTHING) + one
        self._whole = sum(groups.values(), _NOTHING).leaning_on(0.0, prior_trials)
        # A single family is the whole.
        kept = of_families if len(of_families) > 1 else {}
        self._families = _Level(kept, dict.fromkeys(kept, self._whole), within, usual=pseudo_trials)
        above = {group: self._families.mean(self._family(group), self._whole) for group in groups}
        self._groups = _Level(groups, above, within, usual=pseudo_trials)
        self._whole_deviation = (self._families if kept else self._groups).deviation_of_mean()

    def mean(self, group: str) -> float:
        """Of a prompt of the group; the family's, or the whole's, for a group without evidence."""
        return self._groups.mean(group, self._families.mean(self._family(group), self._whole))

    def deviations(self, group: str) -> tuple[float, float, float]:
        """Standard deviations of what is particular to the group, of what it takes from its family and shares with it,
        and of what it takes from the whole and shares with all.
        """
        own, borrowed = self._groups.doubt(group)
        family, lent = self._families.doubt(self._family(group))
        return own, borrowed * family, borrowed * lent * self._whole_deviation

    def _family(self, group: str) -> str:
        return self._family_of.get(group, "")


class _Level:
    """Means that lean on what is above them; without members, all that is asked for is what is above."""

    def __init__(
        self, members: Mapping[str, Difference], above: Mapping[str, float], within: float, *, usual: float
    ) -> None:
        self._members = members
        self._within = within
        apart = [(one.total - one.trials * above[name], one.trials) for name, one in members.items()]
        self._leans = leaning(apart, usual=usual, within=within)

    def mean(self, name: str, above: float) -> float:
        return self._members.get(name, _NOTHING).leaning_on(above, self._leans) if self._members else above

    def doubt(self, name: str) -> tuple[float, float]:
        """Standard deviation of what is its own, and the share that it takes from above."""
        weight = self._members.get(name, _NOTHING).trials + self._leans
        if not self._members or weight <= 0.0:
            return 0.0, 1.0
        return math.sqrt(self._within / weight), self._leans / weight

    def deviation_of_mean(self) -> float:
        """Of the mean of all: what was judged much tells it no better than the members are like each other."""
        if self._within <= 0.0:
            return 0.0
        between = self._within / self._leans if self._leans > 0.0 else 0.0
        telling = sum(1.0 / (between + self._within / one.trials) for one in self._members.values())
        return math.sqrt(1.0 / telling) if telling > 0.0 else 0.0


def _within(differences: Collection[Difference]) -> float:
    """Variance of a single difference within its group, pooled."""
    spent = sum(one.squares - one.total**2 / one.trials for one in differences)
    return max(spent, 0.0) / max(sum(one.trials for one in differences) - len(differences), 1.0)
