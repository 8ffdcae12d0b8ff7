"""What the ledger's tables hold for a report, as they were read in one snapshot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from shared.messages import Quality, QualityCount
from tools.reporting.calls import Calls
from tools.reporting.grams import IntensitySeries
from tools.reporting.policies import PolicyBook


@dataclass(frozen=True, slots=True)
class Selection:
    """Which part of the books: calls that began in [since, until), of a model, served in a zone; null means all."""

    since: datetime | None = None
    until: datetime | None = None
    model: str | None = None
    zone: str | None = None


@dataclass(frozen=True, slots=True)
class CallSums:
    """Settled calls of one purpose, every model: energy and grams."""

    energy_j: float
    grams: float
    embodied_g: float
    unpriced_j: float


@dataclass(frozen=True, slots=True)
class IntervalSums:
    """Joules of one pool's intervals that began in one hour."""

    zone: str
    pool: str
    middle_s: float
    attributed_j: float
    idle_j: float
    unattributed_j: float


@dataclass(frozen=True, slots=True)
class EvaluationSums:
    """Calls of one evaluation."""

    calls: int
    energy_j: float
    grams: float


@dataclass(frozen=True, slots=True)
class Regrouping:
    """A version of learned prompt groups.

    Attributes:
        prompts: judged prompts that it was learned from.
        counts: what had been judged before, by its groups.
    """

    version: str
    learned_at: datetime
    prompts: int
    counts: tuple[QualityCount, ...]


@dataclass(frozen=True, slots=True)
class Books:
    """A snapshot.

    Attributes:
        requests: settled calls of producers.
        evaluations: settled calls of the evaluator on the models themselves, not on the judge.
        rows: probabilities by option that `requests.row` and `evaluations.row` point at.
        unsettled: producers' requests that were answered and are not settled yet.
        unsettled_calls: calls of any purpose, model and zone that are not settled yet.
        purposes: by `request`, `evaluation`, `judge`.
        policies: all that were ever published: earlier ones may still be in force.
        groupings: versions of prompt groups that were learned in the period, oldest first.
    """

    selection: Selection
    requests: Calls
    evaluations: Calls
    rows: Sequence[Mapping[str, float]]
    unsettled: int
    unsettled_calls: int
    refusals: Mapping[str, int]
    metered_j: float
    purposes: Mapping[str, CallSums]
    intervals: Sequence[IntervalSums]
    grid: Mapping[str, IntensitySeries]
    policies: PolicyBook
    qualities: Sequence[Quality]
    groupings: Sequence[Regrouping]
    evaluation_costs: Mapping[str, EvaluationSums]
