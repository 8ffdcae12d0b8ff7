"""The demand of the fleet: tokens that its requests would have generated without Sprout.

Power follows the tokens that are being generated, not those that arrive, so what is expected of each request is spread
over the time in which it would be answered.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.metering.columns import Columns, Floats, Texts, partition

REFERENCE_LEVEL = "L0"
MIN_REQUESTS = 5
"""Fewer requests of a group say too little about its answers."""


@dataclass(frozen=True, slots=True, eq=False)
class Arrivals(Columns):
    """Requests by the time in which they started, as columns of shape `(cells,)`.

    A cell holds requests that started at about the same time, and agree in pool, level and source.

    Attributes:
        at_s: middle of that time, seconds since the Unix epoch.
        requests: their number.
        tokens: generated, of all of them.
        reference_mean, served_mean: tokens expected of one of them at the reference level and at the level that served
            it, by prompt group and task; NaN if unknown.
    """

    at_s: Floats
    pool: Texts
    level: Texts
    source: Texts
    requests: NDArray[np.int64]
    tokens: NDArray[np.int64]
    reference_mean: Floats
    served_mean: Floats

    def __len__(self) -> int:
        return len(self.at_s)

    @property
    def without_sprout(self) -> Floats:
        """Expected tokens of each cell. Where the client chose the level, the answer would be the same."""
        return np.where(self.source == "forced", self.tokens, self.requests * self.reference_mean)

    @property
    def as_served(self) -> Floats:
        """Expected tokens of each cell at the level that served it."""
        known = (self.source != "forced") & ~np.isnan(self.served_mean)
        return np.where(known, self.requests * self.served_mean, self.tokens)


NO_ARRIVALS = Arrivals(*(np.zeros(0, dtype=kind) for kind in (float, object, object, object, int, int, float, float)))


@dataclass(frozen=True, slots=True)
class Answers:
    """Requests of a group, task and level that was not chosen by the client.

    Attributes:
        in_block: in a reference block of the switchback.
        tokens, seconds: generated and used, of all these requests.
    """

    group: str
    task: str
    level: str
    in_block: bool
    requests: int
    tokens: int
    seconds: float


class AnswerLengths:
    """Mean length of answers by prompt group and level, and the time for each token."""

    def __init__(self, answers: Sequence[Answers]) -> None:
        sums: dict[tuple[str, str, str], list[float]] = {}
        paces: dict[tuple[str, bool], list[float]] = {}
        for one in answers:
            for key in _keys(one.group, one.task, one.level):
                total = sums.setdefault(key, [0.0, 0.0])
                total[0] += one.requests
                total[1] += one.tokens
            pace = paces.setdefault((one.level, one.in_block), [0.0, 0.0])
            pace[0] += one.tokens
            pace[1] += one.seconds
        self._means = {key: tokens / requests for key, (requests, tokens) in sums.items() if requests >= MIN_REQUESTS}
        self._paces = {key: seconds / tokens for key, (tokens, seconds) in paces.items() if tokens > 0}

    def mean(self, group: str, task: str, level: str) -> float:
        """Mean tokens of a group; else of its task, else of all requests; NaN if nothing is known."""
        return next((self._means[key] for key in _keys(group, task, level) if key in self._means), float("nan"))

    def seconds_per_token(self, level: str, *, in_block: bool) -> float:
        """Mean time per token; of the other world, or of all levels, if that is unknown; NaN without an answer."""
        for key in ((level, in_block), (level, not in_block)):
            if key in self._paces:
                return self._paces[key]
        return float(np.mean(list(self._paces.values()))) if self._paces else float("nan")


def _keys(group: str, task: str, level: str) -> tuple[tuple[str, str, str], ...]:
    return ("group", group, level), ("task", task, level), ("all", "", level)


def demand(
    arrivals: Arrivals,
    lengths: AnswerLengths,
    edges_s: Floats,
    world: NDArray[np.str_],
    quantiles: Sequence[float] = (1.0,),
) -> Floats:
    """Tokens that would have been generated in each bin without Sprout; NaN if the length of answers is unknown.

    Bins before the first request are NaN too: a fleet that nobody uses yet says nothing about one in use.

    Args:
        edges_s: of the bins, shape `(bins + 1,)`.
        world: of the bins, shape `(bins,)`.
        quantiles: lengths of answers relative to their group's mean.
    """
    if not len(arrivals):
        return np.zeros(len(world))
    reference_pace, served_pace = np.zeros((2, len(arrivals)))
    for (level, source), where in partition(arrivals.level, arrivals.source).items():
        # A client that chooses its level gets it in reference blocks, too.
        chosen = level if source == "forced" else REFERENCE_LEVEL
        reference_pace[where] = lengths.seconds_per_token(chosen, in_block=True)
        served_pace[where] = lengths.seconds_per_token(level, in_block=source == "switchback")

    def expected(tokens: Floats, pace: Floats) -> ExpectedAnswers:
        return ExpectedAnswers(tokens=tokens, seconds=tokens / arrivals.requests * pace)

    reference = expected(arrivals.without_sprout, reference_pace)
    served = expected(arrivals.as_served, served_pace)
    if not (np.isfinite(reference.tokens).all() and np.isfinite(reference.seconds).all()):
        return np.full(len(world), np.nan)
    found = demand_by_bin(
        edges_s, world, arrived_s=arrivals.at_s, reference=reference, served=served, lengths=tuple(quantiles)
    )
    return np.where(edges_s[1:] <= arrivals.at_s.min(), np.nan, found)


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedAnswers:
    """What is expected of each request's answer: means of its prompt group at a level.

    Attributes:
        tokens: (requests,), generated tokens.
        seconds: (requests,), from arrival to the last token, event time.
    """

    tokens: Floats
    seconds: Floats


def demand_by_bin(
    edges_s: ArrayLike,
    world: NDArray[np.str_],
    *,
    arrived_s: ArrayLike,
    reference: ExpectedAnswers,
    served: ExpectedAnswers,
    lengths: Sequence[float] = (1.0,),
) -> Floats:
    """The demand of bins, (edges - 1,), tokens.

    Requests from before the first bin count with the part of their answers that falls into the bins: give those of the
    longest answer's time before it, too.

    Args:
        edges_s: of the bins, increasing, seconds since the epoch.
        world: (edges - 1,), as in `FleetBins`.
        arrived_s: (requests,), when each arrived, seconds since the epoch.
        reference: of each request at the reference level.
        served: of each request at the level at which it was served. It counts in the reference blocks, which begin
            while shorter answers still run.
        lengths: equally likely lengths of an answer relative to its group's mean, such as ten quantiles; the default
            takes all answers of a group to be of its mean length.
    """
    arrived, relative = np.asarray(arrived_s, dtype=float), np.asarray(lengths, dtype=float)
    relative = relative / relative.mean()

    def spread(answers: ExpectedAnswers) -> Floats:
        found = np.zeros(len(world))
        for one in relative.tolist():  # one after the other: together they take a hundred megabytes for a month
            ends, tokens = arrived + answers.seconds * one, answers.tokens * (one / len(relative))
            found += spread_over_bins(arrived, ends, tokens, edges_s)
        return found

    return np.where(world == "reference", spread(served), spread(reference))


def spread_over_bins(begin_s: ArrayLike, end_s: ArrayLike, amount: ArrayLike, edges_s: ArrayLike) -> Floats:
    """Spread amounts evenly over time: tokens of a request over its answer's time, joules over a reading's interval.

    Args:
        begin_s, end_s, amount: one value for each interval.
        edges_s: of the bins, increasing.

    Returns:
        (edges - 1,), the amount in each bin; what lies outside of all bins is left out.
    """
    edges = np.asarray(edges_s, dtype=float)
    begin = np.asarray(begin_s, dtype=float) - edges[0]
    # A millisecond at least, for intervals without length.
    length = np.maximum(np.asarray(end_s, dtype=float) - edges[0] - begin, 1e-3)
    rate = np.asarray(amount, dtype=float) / length
    at = np.concatenate([begin, begin + length])
    change = np.concatenate([rate, -rate])
    order = np.argsort(at, kind="stable")
    at, change = at[order], change[order]
    rates = np.concatenate([[0.0], np.cumsum(change)])
    offsets = np.concatenate([[0.0], np.cumsum(change * at)])
    place = np.searchsorted(at, edges - edges[0], side="right")
    return np.diff(rates[place] * (edges - edges[0]) - offsets[place])
