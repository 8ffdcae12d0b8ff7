"""How much a group leans on the whole: as far as what was judged does not tell groups apart (empirical Bayes).

Where groups differ in truth, as in how often they are answered right, the whole says little of any of them; where they
hardly do, what is seen to differ is chance, and a program that chooses would fall for it.
"""

from collections.abc import Sequence

LEAST, MOST = 2.0, 200.0
"""Judged prompts that the whole may count as."""

_NOTHING = 1e-9
"""Judged prompts: what is left when nothing is."""


def leaning(outcomes: Sequence[tuple[float, float]], *, usual: float, within: float | None = None) -> float:
    """Judged prompts that the whole counts as, in each group: the weight of the prior that groups are drawn from.

    The variance between groups is what their means differ by beyond what sampling explains (method of moments, as in
    an analysis of variance with groups of different sizes). With M judged prompts that the whole counts as, it is
    within/M, or r·(1 − r)/(M + 1) for successes. Few groups, or small ones, tell that variance badly: it is then near
    the one that `usual` means, each of the two weighing by the inverse of its own variance.

    Args:
        outcomes: (sum, trials) of every group.
        usual: what to take until the groups tell.
        within: variance of a single outcome in a group; null: the outcomes are successes, so r·(1 − r), r their rate.
    """
    seen = [(total / count, count) for total, count in outcomes if count > _NOTHING]
    trials = sum(count for _, count in seen)
    if usual <= 0.0 or len(seen) < 2:
        return usual
    whole = sum(mean * count for mean, count in seen) / trials
    besides = 0.0 if within is not None else 1.0
    within = within if within is not None else whole * (1.0 - whole)
    if within <= 0.0:
        return usual
    # All that follows in units of the variance of a single outcome.
    more = len(seen) - 1
    # Of a group, were all of a size and told the variance between them as well.
    size = (trials - sum(count**2 for _, count in seen) / trials) / more
    apart = sum(count * (mean - whole) ** 2 for mean, count in seen) / within - more
    found = max(0.0, apart / (more * size))
    expected = 1.0 / (usual + besides)
    doubt = 2.0 / more * (1.0 / size + expected) ** 2
    between = (found / doubt + 1.0 / expected) / (1.0 / doubt + 1.0 / expected**2)
    return min(max(1.0 / between - besides, LEAST), MOST)
