"""Quality of one metric by prompt group and option: paired differences from the baseline, partially pooled.

The program needs the loss of quality of an option against the baseline (the reference option). Both answered the same
prompts, so the mean of the paired differences is estimated: it varies much less than the two success rates do, and it
differs much less between groups (docs/decisions/0004-optimizer-estimates.md).

A group's mean difference is shrunk towards that of its family (groups about similar things), the family's towards the
overall mean, and that towards zero. How strongly is estimated from the data (empirical Bayes, `shrinkage_weight`).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass

from services.optimizer.settings import OptimizerSettings

MIN_WEIGHT, MAX_WEIGHT = 2.0, 200.0
"""Limits of the shrinkage weight, in judged prompts."""

_NO_TRIALS = 1e-9
"""Judged prompts below which a decayed count is empty."""

StandardErrors = tuple[float, float, float]
"""Standard errors of a group's mean difference from the baseline under an option: the group's own component, the one
that it shares with its family, and the one that it shares with all groups."""

NO_ERROR: StandardErrors = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Decayed outcomes of a group under an option.

    Attributes:
        successes, trials: over all judged prompts.
        paired: prompts whose outcome is known under the option and under the reference on the same prompt;
            `paired_successes` of the option on them, `reference_successes` of the reference, `both` of the two at once.
    """

    successes: float = 0.0
    trials: float = 0.0
    paired: float = 0.0
    paired_successes: float = 0.0
    reference_successes: float = 0.0
    both: float = 0.0

    @property
    def rate(self) -> float:
        """Success rate; 0 without trials."""
        return self.successes / self.trials if self.trials > 0.0 else 0.0

    def scaled(self, factor: float) -> "Outcomes":
        """The same rates of another number of prompts."""
        return Outcomes(*(factor * value for value in astuple(self)))

    def __add__(self, other: "Outcomes") -> "Outcomes":
        return Outcomes(
            self.successes + other.successes,
            self.trials + other.trials,
            self.paired + other.paired,
            self.paired_successes + other.paired_successes,
            self.reference_successes + other.reference_successes,
            self.both + other.both,
        )


@dataclass(frozen=True, slots=True)
class PairedDifferences:
    """Differences d = option - reference of one group's outcomes: sum of d, sum of d^2, and the number of prompts."""

    total: float = 0.0
    squares: float = 0.0
    trials: float = 0.0

    @classmethod
    def between(cls, option: Outcomes, reference: Outcomes) -> "PairedDifferences":
        """Differences of a group's outcomes.

        Prompts with paired outcomes give sum d = s_o - s_r and sum d^2 = s_o + s_r - 2 * both. For the rest the
        reference's success rate in the group is used, and the two are assumed to succeed together as rarely as their
        rates allow, which is exact for preference (one of two answers is preferred) and conservative otherwise.
        """
        total = option.paired_successes - option.reference_successes
        squares = option.paired_successes + option.reference_successes - 2.0 * option.both
        paired = cls(total, max(squares, abs(total)), option.paired)
        unpaired = Outcomes(option.successes - option.paired_successes, option.trials - option.paired)
        trials = min(unpaired.trials, reference.trials)
        if trials <= 0.0:
            return paired
        mean_square = min(unpaired.rate + reference.rate, 2.0 - unpaired.rate - reference.rate)
        return paired + cls(trials * (unpaired.rate - reference.rate), trials * mean_square, trials)

    def __add__(self, other: "PairedDifferences") -> "PairedDifferences":
        return PairedDifferences(self.total + other.total, self.squares + other.squares, self.trials + other.trials)

    def reweighted(self, trials: float) -> "PairedDifferences":
        """The same mean and mean square, of this many prompts."""
        factor = trials / self.trials
        return PairedDifferences(self.total * factor, self.squares * factor, trials)

    def shrunk_mean(self, prior: float, weight: float) -> float:
        """(sum d + weight * prior) / (trials + weight)."""
        return (self.total + weight * prior) / (self.trials + weight)


def shrinkage_weight(
    outcomes: Sequence[tuple[float, float]], *, default: float, within_variance: float | None = None
) -> float:
    """Weight M, in judged prompts, of the pooled mean in each group's mean: (sum + M * pooled) / (trials + M).

    M = within_variance / between_variance, where the variance between the groups' true means is what their observed
    means differ by beyond sampling error (method of moments of a one-way random-effects analysis of variance with
    unequal group sizes, as DerSimonian and Laird 1986). For success rates r it is M = r(1 - r) / between_variance - 1,
    the weight of a beta prior. Few or small groups estimate the variance badly, so the estimate is averaged with the
    one that `default` implies, each weighted by its inverse variance.

    Args:
        outcomes: (sum, trials) of every group.
        default: the weight as long as the data say nothing; 0 turns shrinkage off.
        within_variance: variance of a single outcome within a group; None for success rates.

    Returns:
        M, from `MIN_WEIGHT` to `MAX_WEIGHT`; `default` for fewer than two groups, or without variance within groups.
    """
    groups = [(total / count, count) for total, count in outcomes if count > _NO_TRIALS]
    trials = sum(count for _, count in groups)
    if default <= 0.0 or len(groups) < 2:
        return default
    pooled = sum(mean * count for mean, count in groups) / trials
    offset = 0.0 if within_variance is not None else 1.0
    within = within_variance if within_variance is not None else pooled * (1.0 - pooled)
    if within <= 0.0:
        return default
    # From here on variances are in units of the variance of a single outcome.
    freedom = len(groups) - 1
    effective_size = (trials - sum(count**2 for _, count in groups) / trials) / freedom
    excess = sum(count * (mean - pooled) ** 2 for mean, count in groups) / within - freedom
    estimated = max(0.0, excess / (freedom * effective_size))
    expected = 1.0 / (default + offset)
    variance = 2.0 / freedom * (1.0 / effective_size + expected) ** 2
    between = (estimated / variance + 1.0 / expected) / (1.0 / variance + 1.0 / expected**2)
    return min(max(1.0 / between - offset, MIN_WEIGHT), MAX_WEIGHT)


class PooledDifferences:
    """Mean difference of one option from the baseline for every group, pooled by family and over all groups.

    Attributes:
        trials: judged prompts in all groups.
    """

    def __init__(
        self,
        differences: Mapping[str, PairedDifferences],
        families: Mapping[str, str],
        *,
        pseudo_trials: float,
        prior_trials: float,
    ) -> None:
        """Pool the groups' differences.

        Args:
            differences: by group.
            families: by group; a group that is not named belongs to the family "".
            pseudo_trials: weight of a mean for the level below until the data determine it; > 0.
            prior_trials: weight of the prior "no difference" of the overall mean; > 0.
        """
        self._family_of = families
        groups = {group: one for group, one in differences.items() if one.trials > 0.0}
        self.trials = sum(one.trials for one in groups.values())
        self._within = _within_group_variance(groups.values())
        self._groups = _PoolingLevel(
            groups, {group: self._family(group) for group in groups}, self._within, pseudo_trials
        )
        by_family = self._groups.parents
        # A single family is the same as all groups.
        several = len(by_family) > 1
        self._families = _PoolingLevel(
            by_family if several else {}, dict.fromkeys(by_family, ""), self._within, pseudo_trials
        )
        top = self._families.parents if several else by_family
        self._overall = top.get("", sum(by_family.values(), PairedDifferences()))
        self._prior_trials = prior_trials

    def mean(self, group: str) -> float:
        """Shrunk mean difference of a group; that of its family, or of all, for a group without judged prompts."""
        overall = self._overall.shrunk_mean(0.0, self._prior_trials)
        return self._groups.mean(group, self._families.mean(self._family(group), overall))

    def standard_errors(self, group: str) -> StandardErrors:
        """Standard errors of the group's mean: own component, that of its family, that of all groups."""
        own, family_share = self._groups.standard_error(group)
        family, overall_share = self._families.standard_error(self._family(group))
        overall = math.sqrt(self._within / (self._overall.trials + self._prior_trials))
        return own, family_share * family, family_share * overall_share * overall

    def _family(self, group: str) -> str:
        return self._family_of.get(group, "")


class _PoolingLevel:
    """Means that are shrunk towards the means of their parents; without members the parents' means are returned.

    Attributes:
        parents: what the members say about each parent. A member with n prompts counts for n * M / (n + M) of them:
            however many prompts it has, it measures its parent no better than members differ from each other.
    """

    def __init__(
        self,
        members: Mapping[str, PairedDifferences],
        parent_of: Mapping[str, str],
        within_variance: float,
        default_weight: float,
    ) -> None:
        self._members = members
        self._within = within_variance
        pooled: dict[str, PairedDifferences] = {}
        for name, one in members.items():
            pooled[parent_of[name]] = pooled.get(parent_of[name], PairedDifferences()) + one
        means = {name: one.shrunk_mean(0.0, 0.0) for name, one in pooled.items()}
        centred = [(one.total - one.trials * means[parent_of[name]], one.trials) for name, one in members.items()]
        self._weight = shrinkage_weight(centred, default=default_weight, within_variance=within_variance)
        self.parents: dict[str, PairedDifferences] = {}
        for name, one in members.items():
            counted = one.reweighted(one.trials * self._weight / (one.trials + self._weight))
            self.parents[parent_of[name]] = self.parents.get(parent_of[name], PairedDifferences()) + counted

    def mean(self, name: str, parent_mean: float) -> float:
        """Shrunk mean of a member."""
        if not self._members:
            return parent_mean
        return self._members.get(name, PairedDifferences()).shrunk_mean(parent_mean, self._weight)

    def standard_error(self, name: str) -> tuple[float, float]:
        """Standard error of a member's own part, and the share of the parent's mean in its mean."""
        if not self._members:
            return 0.0, 1.0
        weight = self._members.get(name, PairedDifferences()).trials + self._weight
        return math.sqrt(self._within / weight), self._weight / weight


def _within_group_variance(differences: Collection[PairedDifferences]) -> float:
    """Pooled variance of a single difference within its group, with one additional prompt that differed.

    The additional prompt keeps the variance above zero while no difference has been observed. Where groups have very
    few prompts each, the mean square about zero is used if it is smaller.
    """
    trials, squares = sum(one.trials for one in differences), sum(one.squares for one in differences)
    about_group_means = squares - sum(one.total**2 / one.trials for one in differences)
    pooled = (max(about_group_means, 0.0) + 1.0) / max(trials - len(differences) + 1.0, 1.0)
    return min(pooled, (squares + 1.0) / (trials + 1.0))


class QualityModel:
    """Estimated quality of one metric at one instant.

    A metric may be defined for some prompts only: correctness, say, where the right answer is known. A group's quality
    is then the success rate on those prompts times their share (coverage), so that a limit on all traffic weights them
    as they occur.
    """

    def __init__(
        self,
        outcomes: Mapping[str, Mapping[str, Outcomes]],
        reference: str,
        settings: OptimizerSettings,
        *,
        counts: Mapping[str, float] | None = None,
        families: Mapping[str, str] | None = None,
        equivalent: Collection[str] = (),
    ) -> None:
        """Estimate from the outcomes of the metric.

        Args:
            outcomes: by group, then option.
            reference: the baseline option.
            settings: prior weights and the minimum of judged prompts.
            counts: effective judged prompts by group, whether the metric is defined for them or not; None: it is
                defined for all.
            families: by group; None: all groups are of one family.
            equivalent: options that give the reference's own answers: its level by the same weights elsewhere.
        """
        self._families = families or {}
        self._equivalent = {reference, *equivalent}
        self._outcomes = outcomes
        self._reference = reference
        self._settings = settings
        self._counts = {group: self._covered(group) for group in outcomes} if counts is None else counts
        self._of_reference = sum((row.get(reference, Outcomes()) for row in outcomes.values()), Outcomes())
        self._differences = {
            option: PooledDifferences(
                {
                    group: PairedDifferences.between(row[option], row.get(reference, Outcomes()))
                    for group, row in outcomes.items()
                    if option in row
                },
                self._families,
                pseudo_trials=settings.pseudo_trials,
                prior_trials=settings.prior_trials,
            )
            for option in sorted({option for row in outcomes.values() for option in row} - self._equivalent)
        }
        of_groups = [(row[reference].successes, row[reference].trials) for row in outcomes.values() if reference in row]
        self._weight = shrinkage_weight(of_groups, default=settings.pseudo_trials)
        covered, total = sum(map(self._covered, self._counts)), sum(self._counts.values())
        self._overall_coverage = min(covered / total, 1.0) if total > 0.0 else 1.0

    def coverage(self, group: str) -> float:
        """Share of a group's prompts for which the metric is defined, shrunk weakly towards the overall share."""
        prior = self._settings.prior_trials
        count = self._counts.get(group, 0.0) + prior
        return min((self._covered(group) + prior * self._overall_coverage) / count, 1.0)

    def trials(self, option: str) -> float:
        """Effective judged prompts of an option over all groups; those compared with the reference if it is another."""
        if option in self._equivalent:
            return self._of_reference.trials
        return self._differences[option].trials if option in self._differences else 0.0

    def is_sufficient(self, option: str) -> bool:
        """Whether enough prompts were judged to use the option."""
        return self.trials(option) >= self._settings.min_trials

    def group_trials(self, group: str, option: str) -> float:
        """Effective judged prompts of an option in a group."""
        return self._of(group, option).trials

    def mean(self, group: str, option: str) -> float:
        """q[group, option], in [0, 1]; the overall mean for a group without judged prompts."""
        return self.coverage(group) * self._rate(group, option)

    def standard_errors(self, group: str, option: str) -> StandardErrors:
        """Standard errors of q[group, option] - q[group, reference]; zero for the reference and its equivalents."""
        differences = self._differences.get(option)
        if differences is None:
            return NO_ERROR
        coverage = self.coverage(group)
        own, family, overall = differences.standard_errors(group)
        return coverage * own, coverage * family, coverage * overall

    def overall_standard_error(self, option: str, weights: Mapping[str, float]) -> float:
        """Standard error of the quality of all traffic if the option served all of it.

        Components of different groups and families are independent, so they partly cancel out.

        Args:
            option: `<pool>/<level>`.
            weights: traffic share by group.
        """
        own, by_family, overall = 0.0, dict[str, float](), 0.0
        for group, weight in weights.items():
            of_group, of_family, of_all = self.standard_errors(group, option)
            family = self._families.get(group, "")
            own = math.hypot(own, weight * of_group)
            by_family[family] = by_family.get(family, 0.0) + weight * of_family
            overall += weight * of_all
        return math.hypot(own, *by_family.values(), overall)

    def _rate(self, group: str, option: str) -> float:
        one = self._of(group, self._reference)
        rate = (one.successes + self._weight * self._of_reference.rate) / (one.trials + self._weight)
        differences = self._differences.get(option)
        return rate if differences is None else min(max(rate + differences.mean(group), 0.0), 1.0)

    def _covered(self, group: str) -> float:
        """Effective prompts of a group for which the metric is defined."""
        return max((one.trials for one in self._outcomes.get(group, {}).values()), default=0.0)

    def _of(self, group: str, option: str) -> Outcomes:
        return self._outcomes.get(group, {}).get(option, Outcomes())


def lower_confidence_bound(mean: float, standard_error: float, z: float) -> float:
    """mean - z * standard_error, at least 0: what a limit on a single group may rely on."""
    return max(0.0, mean - z * standard_error)
