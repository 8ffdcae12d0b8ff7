"""What an evaluation takes, and an estimate of its energy and carbon from the footprints of earlier ones."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from shared.fleet import Fleet
from shared.messages import EvaluationCost, Footprint

Purpose = Literal["evaluation", "judge"]
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class Errand:
    """On whose account a call is made."""

    evaluation_id: str
    model: str
    group: str


@dataclass(frozen=True, slots=True)
class Call:
    """One finished call on a model server.

    Attributes:
        seconds: event time from sent to last token.
    """

    purpose: Purpose
    pool: str
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Energy:
    """Energy attributed to tokens.

    Attributes:
        tokens: generated.
    """

    joules: float = 0.0
    tokens: int = 0

    def __add__(self, other: "Energy") -> "Energy":
        return Energy(self.joules + other.joules, self.tokens + other.tokens)


EnergyBook = Mapping[tuple[str, str], Energy]
"""By (purpose, pool)."""


def energy_of(footprints: Iterable[Footprint]) -> dict[tuple[str, str], Energy]:
    """The energy of earlier evaluations' calls; what served requests does not count."""
    book: dict[tuple[str, str], Energy] = defaultdict(Energy)
    for one in footprints:
        if one.purpose != "request":
            book[one.purpose, one.pool] += Energy(one.energy_j, one.completion_tokens)
    return dict(book)


def cost_of(
    calls: Iterable[Call], *, judgements: int, book: EnergyBook, intensities: Mapping[str, float], fleet: Fleet
) -> EvaluationCost:
    """The work of an evaluation, with an estimate of its energy and carbon where all of it can be estimated.

    Args:
        judgements: readings by the judge, on a server of the fleet or elsewhere.
        book: energy per token comes from here.
        intensities: in force, gCO2eq/kWh by zone.
    """
    made = list(calls)
    joules = [_joules(call, book) for call in made]
    grams = [_grams(call, spent, intensities, fleet) for call, spent in zip(made, joules, strict=True)]
    energy_j = _total(joules)
    return EvaluationCost(
        generations=sum(call.purpose == "evaluation" for call in made),
        judgements=judgements,
        completion_tokens=sum(call.tokens for call in made),
        processing_s=sum(call.seconds for call in made),
        energy_kwh=None if energy_j is None else energy_j / JOULES_PER_KWH,
        carbon_g=_total(grams),
    )


def _joules(call: Call, book: EnergyBook) -> float | None:
    known = book.get((call.purpose, call.pool))
    return None if known is None or not known.tokens else call.tokens * known.joules / known.tokens


def _grams(call: Call, joules: float | None, intensities: Mapping[str, float], fleet: Fleet) -> float | None:
    pool = fleet.pool(call.pool)
    intensity = intensities.get(pool.zone)
    if joules is None or intensity is None:
        return None
    return joules / JOULES_PER_KWH * pool.pue * intensity + pool.embodied_g_per_s * call.seconds


def _total(parts: Iterable[float | None]) -> float | None:
    """The sum; null where a part is not known."""
    total = 0.0
    for part in parts:
        if part is None:
            return None
        total += part
    return total
