"""Work of an evaluation: the calls it made, and an estimate of their energy and carbon from earlier footprints."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from shared.carbon import JOULES_PER_KWH, embodied_g, operational_g
from shared.fleet import Fleet
from shared.messages import EvaluationCost, Footprint, JudgeCard

Purpose = Literal["evaluation", "judge"]


@dataclass(frozen=True, slots=True)
class Call:
    """One finished call on a model server, for an evaluation or for a served request.

    Attributes:
        tokens: generated.
        seconds: event time from sending the call to the last token.
    """

    purpose: Purpose
    pool: str
    tokens: int
    seconds: float


@dataclass(slots=True)
class Work:
    """Work of an evaluation so far, including that of prompts that were dropped.

    Attributes:
        calls: finished calls on servers of the fleet.
        reused: served answers that were judged without a call.
        judgements: replies of the judge, from a server of the fleet or not.
        card: how the judge voted.
    """

    calls: list[Call] = field(default_factory=list)
    reused: int = 0
    judgements: int = 0
    card: JudgeCard = field(default_factory=JudgeCard)


@dataclass(frozen=True, slots=True)
class CallContext:
    """The evaluation to which the calls for a prompt are charged.

    Attributes:
        group: prompt group of the prompt.
        work: where finished calls and votes are recorded.
    """

    evaluation_id: str
    model: str
    group: str
    work: Work = field(default_factory=Work)


@dataclass(frozen=True, slots=True)
class Energy:
    """Attributed energy, and the generated tokens to which it was attributed."""

    joules: float = 0.0
    tokens: int = 0

    def __add__(self, other: "Energy") -> "Energy":
        return Energy(self.joules + other.joules, self.tokens + other.tokens)

    @property
    def joules_per_token(self) -> float | None:
        """None without tokens."""
        return self.joules / self.tokens if self.tokens else None


EnergyByPool = Mapping[tuple[str, str], Energy]
"""Energy of earlier evaluations by (purpose, pool)."""


def evaluation_energy(footprints: Iterable[Footprint]) -> dict[tuple[str, str], Energy]:
    """Sum the energy of evaluations by (purpose, pool); footprints of served requests are ignored."""
    found: dict[tuple[str, str], Energy] = defaultdict(Energy)
    for one in footprints:
        if one.purpose != "request":
            found[one.purpose, one.pool] += Energy(one.energy_j, one.completion_tokens)
    return dict(found)


CarbonKey = tuple[str, datetime, str]
"""(model, hour, evaluation id; empty for requests)"""


@dataclass(frozen=True, slots=True)
class CallSums:
    """Number of calls and their gCO2eq."""

    calls: int = 0
    grams: float = 0.0


def carbon_by_hour(footprints: Iterable[Footprint]) -> dict[CarbonKey, CallSums]:
    """Sum the carbon of requests and of each evaluation by model and hour; calls of unknown carbon are left out."""
    found: dict[CarbonKey, CallSums] = {}
    for one in footprints:
        if one.total_g is None or (one.purpose == "request") != (one.evaluation_id is None):
            continue
        key = (one.model, one.finished_at.replace(minute=0, second=0, microsecond=0), one.evaluation_id or "")
        before = found.get(key, CallSums())
        found[key] = CallSums(before.calls + 1, before.grams + one.total_g)
    return found


def estimate_cost(
    work: Work, *, energy: EnergyByPool, intensities: Mapping[str, float], fleet: Fleet
) -> EvaluationCost:
    """Estimate the energy and carbon of an evaluation; None where a part cannot be estimated.

    Args:
        energy: of earlier evaluations; gives the energy per token.
        intensities: current, gCO2eq/kWh by zone.
    """
    joules = [_joules(call, energy) for call in work.calls]
    grams = [_grams(call, spent, intensities, fleet) for call, spent in zip(work.calls, joules, strict=True)]
    energy_j = _sum_if_known(joules)
    return EvaluationCost(
        generations=sum(call.purpose == "evaluation" for call in work.calls),
        reused=work.reused,
        judgements=work.judgements,
        completion_tokens=sum(call.tokens for call in work.calls),
        processing_s=sum(call.seconds for call in work.calls),
        energy_kwh=None if energy_j is None else energy_j / JOULES_PER_KWH,
        carbon_g=_sum_if_known(grams),
    )


def _joules(call: Call, energy: EnergyByPool) -> float | None:
    known = energy.get((call.purpose, call.pool))
    if known is None or known.joules_per_token is None:
        return None
    return call.tokens * known.joules_per_token


def _grams(call: Call, joules: float | None, intensities: Mapping[str, float], fleet: Fleet) -> float | None:
    pool = fleet.pool(call.pool)
    intensity = intensities.get(pool.zone)
    if joules is None or intensity is None:
        return None
    return operational_g(energy_j=joules, pue=pool.pue, intensity_g_per_kwh=intensity) + embodied_g(
        seconds=call.seconds, embodied_g_per_s=pool.embodied_g_per_s
    )


def _sum_if_known(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known, start=0.0) if len(known) == len(parts) else None
