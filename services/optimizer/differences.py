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
        paired: prompts of which it is known how the option did together with the reference: how often it succeeded on
            them (`paired_successes`), how often the reference did (`reference_successes`), and how often both
            (`both`). The others tell the option's share of successes and no more.
    """

    successes: float = 0.0
    trials: float = 0.0
    paired: float = 0.0
    paired_successes: float = 0.0
    reference_successes: float = 0.0
    both: float = 0.0

    @property
    def rate(self) -> float:
        """Share of successes; 0 where nothing was judged."""
        return self.successes / self.trials if self.trials > 0.0 else 0.0

    def __add__(self, other: "Judged") -> "Judged":
        return Judged(
            self.successes + other.successes,
            self.trials + other.trials,
            self.paired + other.paired,
            self.paired_successes + other.paired_successes,
            self.reference_successes + other.reference_successes,
            self.both + other.both,
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """Of an option's outcomes from the reference's in a group: the sum, that of squares, and of how many prompts."""

    total: float = 0.0
    squares: float = 0.0
    trials: float = 0.0

    @classmethod
    def between(cls, option: Judged, reference: Judged) -> "Difference":
        """From what was judged of a group; the reference's outcomes serve where it is not known on which prompts."""
        total = option.paired_successes - option.reference_successes
        squares = option.paired_successes + option.reference_successes - 2.0 * option.both
        paired = cls(total, max(squares, abs(total)), option.paired)
        alone = Judged(option.successes - option.paired_successes, option.trials - option.paired)
        trials = min(alone.trials, reference.trials)
        # Of two answers one is preferred: they succeed together as seldom as their shares allow, unless it is known.
        squares = min(alone.rate + reference.rate, 2.0 - alone.rate - reference.rate)
        return (
            paired + cls(trials * (alone.rate - reference.rate), trials * squares, trials) if trials > 0.0 else paired
        )

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(self.total + other.total, self.squares + other.squares, self.trials + other.trials)

    def weighing(self, trials: float) -> "Difference":
        """The same mean, of so many prompts."""
        part = trials / self.trials
        return Difference(self.total * part, self.squares * part, trials)

    def leaning_on(self, prior: float, trials: float) -> float:
        """The mean, were the prior seen in so many prompts more."""
        return (self.total + trials * prior) / (self.trials + trials)


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
            pseudo_trials: that a mean counts as for what leans on it, until the data tells; more than 0.
            prior_trials: without any difference, that the mean of all leans on; more than 0.
        """
        self._family_of = families
        groups = {group: one for group, one in differences.items() if one.trials > 0.0}
        self.trials = sum(one.trials for one in groups.values())
        self._within = _within(groups.values())
        self._groups = _Level(groups, {group: self._family(group) for group in groups}, self._within, pseudo_trials)
        above = self._groups.above
        # A single family is the whole.
        self._families = _Level(above if len(above) > 1 else {}, dict.fromkeys(above, ""), self._within, pseudo_trials)
        self._whole = (self._families.above if len(above) > 1 else above).get("", sum(above.values(), Difference()))
        self._prior_trials = prior_trials

    def mean(self, group: str) -> float:
        """Of a prompt of the group; the family's, or the whole's, for a group without evidence."""
        whole = self._whole.leaning_on(0.0, self._prior_trials)
        return self._groups.mean(group, self._families.mean(self._family(group), whole))

    def deviations(self, group: str) -> tuple[float, float, float]:
        """Standard deviations of what is particular to the group, of what it takes from its family and shares with it,
        and of what it takes from the whole and shares with all.
        """
        own, borrowed = self._groups.doubt(group)
        family, lent = self._families.doubt(self._family(group))
        whole = math.sqrt(self._within / (self._whole.trials + self._prior_trials))
        return own, borrowed * family, borrowed * lent * whole

    def _family(self, group: str) -> str:
        return self._family_of.get(group, "")


class _Level:
    """Means that lean on what is above them; without members, all that is asked for is what is above.

    Attributes:
        above: what the members say of what they belong to, by its name. A member that was judged much tells it no
            better than members are like each other, so its prompts count for no more than M, the weight it leans with.
    """

    def __init__(
        self, members: Mapping[str, Difference], belonging: Mapping[str, str], within: float, usual: float
    ) -> None:
        self._members = members
        self._within = within
        together: dict[str, Difference] = {}
        for name, one in members.items():
            together[belonging[name]] = together.get(belonging[name], Difference()) + one
        means = {name: one.leaning_on(0.0, 0.0) for name, one in together.items()}
        apart = [(one.total - one.trials * means[belonging[name]], one.trials) for name, one in members.items()]
        self._leans = leaning(apart, usual=usual, within=within)
        self.above: dict[str, Difference] = {}
        for name, one in members.items():
            told = one.weighing(one.trials * self._leans / (one.trials + self._leans))
            self.above[belonging[name]] = self.above.get(belonging[name], Difference()) + told

    def mean(self, name: str, above: float) -> float:
        return self._members.get(name, Difference()).leaning_on(above, self._leans) if self._members else above

    def doubt(self, name: str) -> tuple[float, float]:
        """Standard deviation of what is its own, and the share that it takes from above."""
        if not self._members:
            return 0.0, 1.0
        weight = self._members.get(name, Difference()).trials + self._leans
        return math.sqrt(self._within / weight), self._leans / weight


def _within(differences: Collection[Difference]) -> float:
    """Variance of a single difference in its group, pooled, as if one prompt more had differed: what was not seen yet
    may come. Where groups were hardly judged, that about no difference at all is the better measure.
    """
    trials, squares = sum(one.trials for one in differences), sum(one.squares for one in differences)
    spent = squares - sum(one.total**2 / one.trials for one in differences)
    about_means = (max(spent, 0.0) + 1.0) / max(trials - len(differences) + 1.0, 1.0)
    return min(about_means, (squares + 1.0) / (trials + 1.0))
