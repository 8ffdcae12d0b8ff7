"""How a request is served: the option drawn from the policy in force, or the reference where none may be used.

The draw depends on the request's id and the model alone, so a redelivered request draws the same option. What was
drawn from what, and with which probability, is part of the answer: savings are estimated from it.
"""

from collections.abc import Mapping
from typing import Literal

from services.router.grouping import Assignment
from shared.fleet import Fleet
from shared.hashing import uniform
from shared.messages import Decision, Policy, option_key, split_option
from shared.messages.base import FORBIDDEN

_SALT = "option:"


class UnknownLevelError(ValueError):
    """A request forces a level that the catalogue does not have; the message says which there are."""


def draw(row: Mapping[str, float], point: float) -> str:
    """The option of a row of probabilities in which `point` falls.

    Options are laid out on [0, 1) in the order of their names, so that the order of a message's fields means nothing.

    Args:
        row: probability by option; sums to 1 within rounding, at least one is positive.
        point: in [0, 1).
    """
    total = sum(row.values())
    reached = 0.0
    last = ""
    for option in sorted(row):
        if row[option] <= 0.0:
            continue
        last = option
        reached += row[option] / total
        if point < reached:
            return option
    return last


def select(
    *,
    request_id: str,
    model: str,
    assignment: Assignment,
    policy: Policy | None,
    fleet: Fleet,
    wish: str | None = None,
) -> Decision:
    """Decide how a request is served.

    Args:
        model: one that the fleet serves.
        assignment: the request's prompt group, and the policy's row for it.
        policy: in force for the model; null: none may be followed, which leads to the reference.
        wish: the producer's: a level that is forced, so that the policy only chooses among pools, or one that is
            forbidden.

    Raises:
        UnknownLevelError: there is no such level, or no other.
    """
    row = {fleet.reference_of(model): 1.0} if assignment.row is None else assignment.row
    if wish is not None:
        row = _as_wished(row, wish, fleet.levels)
    option = draw(row, uniform(_SALT + model, request_id))
    pool, level = split_option(option)
    drawn: Literal["policy", "fallback"] = "fallback" if policy is None else "policy"
    return Decision(
        source=drawn if wish is None else "forced",
        group=assignment.group,
        pool=pool,
        level=level,
        zone=fleet.pool(pool).zone,
        policy_version=None if policy is None else policy.version,
        propensity=min(1.0, row[option]),
        propensities=row,
    )


def _as_wished(row: Mapping[str, float], wish: str, levels: tuple[str, ...]) -> dict[str, float]:
    level = wish.removeprefix(FORBIDDEN)
    if level not in levels:
        raise UnknownLevelError(
            f"directive {wish!r} is not in the catalogue (there are {', '.join(levels)}): name one of these, or leave "
            "'directive' out"
        )
    if level == wish:
        return _at_level(row, level)
    others = [other for other in levels if other != level]
    if not others:
        raise UnknownLevelError(f"directive {wish!r} forbids the only level that there is: leave 'directive' out")
    left = {option: share for option, share in row.items() if split_option(option)[1] != level and share > 0.0}
    if not left:
        return _at_level(row, others[0])
    total = sum(left.values())
    return {option: share / total for option, share in left.items()}


def _at_level(row: Mapping[str, float], level: str) -> dict[str, float]:
    """The row with all its probability moved to one level; pools keep their shares."""
    moved: dict[str, float] = {}
    for option, probability in row.items():
        key = option_key(split_option(option)[0], level)
        moved[key] = min(1.0, moved.get(key, 0.0) + probability)
    return moved
