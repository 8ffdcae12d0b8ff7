"""What an evaluation consists of: which prompts, and which answers to each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shared.fleet import Fleet, Pool
from shared.messages import option_key

MOST_ANSWERS: Final = 8
"""That a judge can tell apart by letters, and hold in mind."""


class PlanError(ValueError):
    """A model cannot be evaluated as the fleet stands; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One of the answers that are compared: what a variant of the model says at a level.

    Attributes:
        pools: that serve this variant; any of them may be asked, and the verdict holds for all.
    """

    level: str
    pools: tuple[str, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """The options that this answer speaks for."""
        return tuple(option_key(pool, self.level) for pool in self.pools)

    def pool_for(self, turn: int) -> str:
        """Which pool is asked in the `turn`-th prompt: each in turn, so that the energy of all of them is learned."""
        return self.pools[turn % len(self.pools)]


def contestants(fleet: Fleet, model: str) -> tuple[Contestant, ...]:
    """All answers to compare for one prompt: every level of every variant, the reference's first.

    Raises:
        PlanError: more than a judge can compare.
    """
    variants: dict[str | None, list[Pool]] = {}
    for pool in fleet.pools_of(model):
        variants.setdefault(pool.weights, []).append(pool)
    found = tuple(
        Contestant(level, tuple(pool.name for pool in pools)) for pools in variants.values() for level in fleet.levels
    )
    if len(found) > MOST_ANSWERS:
        raise PlanError(
            f"model {model!r} has {len(found)} answers to compare ({len(variants)} variants at {len(fleet.levels)} "
            f"levels), a judge can compare {MOST_ANSWERS}: take out 'directives' or variants"
        )
    return found


def allocate(available: Mapping[str, int], traffic: Mapping[str, float], *, total: int, minimum: int) -> dict[str, int]:
    """How many prompts to take from each group: some of every group, the rest by traffic share.

    Args:
        available: prompts in the reservoir, by group.
        traffic: any measure of how often a group is asked for; a group that is left out counts nothing.
        total: most prompts to take.
        minimum: to take from a group before traffic counts, as far as `total` allows; groups with more traffic first.
    """
    taken = dict.fromkeys(available, 0)
    left = min(total, sum(available.values()))
    for group in sorted(available, key=lambda one: (-traffic.get(one, 0.0), one)):
        taken[group] = min(minimum, available[group], left)
        left -= taken[group]
    weights = {group: traffic.get(group, 0.0) for group in available}
    while left:
        group = _furthest_behind(taken, weights, available)
        taken[group] += 1
        left -= 1
    return {group: number for group, number in taken.items() if number}


def _furthest_behind(taken: Mapping[str, int], weights: Mapping[str, float], available: Mapping[str, int]) -> str:
    """The group with prompts left that has fewest for its traffic (the highest-averages rule)."""
    open_groups = [group for group, number in taken.items() if number < available[group]]
    return min(
        open_groups,
        key=lambda group: ((taken[group] + 1) / weights[group] if weights[group] > 0 else float("inf"), group),
    )


def in_turn(chosen: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(group, prompt) pairs so ordered that an evaluation which ends early has seen something of every group."""
    longest = max((len(prompts) for prompts in chosen.values()), default=0)
    return [
        (group, prompts[place]) for place in range(longest) for group, prompts in chosen.items() if place < len(prompts)
    ]
