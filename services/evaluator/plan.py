"""Plans an evaluation: which answers are compared, and which prompts are taken. Pure functions."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shared.fleet import Fleet
from shared.messages import ServedAnswer, option_key
from shared.pools import Pool

MAX_CANDIDATES: Final = 8
"""Answers that a judge can compare in one prompt."""

_ROUNDING: Final = 1e-9


class PlanError(ValueError):
    """A model of the fleet cannot be evaluated; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the compared answers: a variant of the model at a level.

    Attributes:
        pools: pools with this variant. One of them generates the answer, and the verdict counts for all.
    """

    level: str
    pools: tuple[str, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """Options for which the verdict counts."""
        return tuple(option_key(pool, self.level) for pool in self.pools)

    def pool_for(self, prompt_number: int) -> str:
        """The pool that answers a prompt. Pools alternate, so that the energy of each is measured."""
        return self.pools[prompt_number % len(self.pools)]


def candidates_of(fleet: Fleet, model: str) -> tuple[Candidate, ...]:
    """All answers to compare for one prompt: every level of every variant, the reference first.

    Raises:
        PlanError: more than a judge can compare.
    """
    variants: dict[str | None, list[Pool]] = {}
    for pool in fleet.pools_of(model):
        variants.setdefault(pool.weights, []).append(pool)
    found = tuple(
        Candidate(level, tuple(pool.name for pool in pools)) for pools in variants.values() for level in fleet.levels
    )
    if len(found) > MAX_CANDIDATES:
        raise PlanError(
            f"model {model!r} has {len(found)} answers to compare ({len(variants)} variants at {len(fleet.levels)} "
            f"levels), a judge can compare {MAX_CANDIDATES}: remove 'directives' or variants"
        )
    return found


def served_candidate(
    served: ServedAnswer | None, candidates: Sequence[Candidate], fleet: Fleet, *, max_tokens: int
) -> int | None:
    """Place of the candidate whose answer the request was served; None: every answer has to be generated.

    A served answer counts if the evaluator's own call could have brought it: with the same directive, and within the
    evaluator's limit of tokens.

    Args:
        max_tokens: limit of the evaluator's own call for this sample.
    """
    if served is None or served.completion_tokens > max_tokens:
        return None
    for place, candidate in enumerate(candidates):
        if served.option in candidate.options and served.directive == fleet.directive_text(candidate.level):
            return place
    return None


def allocate(available: Mapping[str, int], traffic: Mapping[str, float], *, total: int, minimum: int) -> dict[str, int]:
    """Number of prompts to take from each group: a minimum of every group, the rest by traffic share.

    Args:
        available: prompts in the reservoir, by group.
        traffic: frequency of each group in any unit; a missing group counts 0.
        total: maximum number of prompts.
        minimum: prompts per group before traffic counts, as far as `total` allows; groups with more traffic first.
    """
    taken = dict.fromkeys(available, 0)
    left = min(total, sum(available.values()))
    for group in sorted(available, key=lambda one: (-traffic.get(one, 0.0), one)):
        taken[group] = min(minimum, available[group], left)
        left -= taken[group]
    weights = {group: traffic.get(group, 0.0) for group in available}
    while left:
        taken[_most_underrepresented(taken, weights, available)] += 1
        left -= 1
    return {group: number for group, number in taken.items() if number}


def _most_underrepresented(taken: Mapping[str, int], weights: Mapping[str, float], available: Mapping[str, int]) -> str:
    """The group that gets the next prompt by the highest-averages (D'Hondt) method."""
    return min(
        (group for group, number in taken.items() if number < available[group]),
        key=lambda group: ((taken[group] + 1) / weights[group] if weights[group] > 0 else float("inf"), group),
    )


def interleave(chosen: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(group, prompt) pairs in round-robin order, so that the first prompts cover every group."""
    longest = max((len(prompts) for prompts in chosen.values()), default=0)
    return [
        (group, prompts[index]) for index in range(longest) for group, prompts in chosen.items() if index < len(prompts)
    ]


def thin(
    groups: Mapping[str, str], settled: Collection[str], *, share: float, minimum: int, draw: Callable[[str], float]
) -> dict[str, float]:
    """The prompts to judge, each with the number of prompts that it stands for.

    Prompts of settled groups are sampled at random, at least one of every group; all others are judged.

    Args:
        groups: by prompt, the group in which it is counted.
        share: of the prompts of settled groups.
        minimum: prompts to judge at least, as far as there are so many.
        draw: a random number of a prompt; the smallest are judged.
    """
    settled_prompts: dict[str, list[str]] = defaultdict(list)
    for prompt, group in groups.items():
        if group in settled:
            settled_prompts[group].append(prompt)
    number = sum(map(len, settled_prompts.values()))
    if number:
        share = min(1.0, max(share, (minimum - (len(groups) - number)) / number))
    stands_for = {prompt: 1.0 for prompt, group in groups.items() if group not in settled}
    for prompts in settled_prompts.values():
        kept = sorted(prompts, key=draw)[: math.ceil(share * len(prompts) - _ROUNDING)]
        stands_for |= dict.fromkeys(kept, len(prompts) / len(kept))
    return stands_for
