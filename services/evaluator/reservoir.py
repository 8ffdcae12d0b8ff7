"""Which samples are kept: for every model and prompt group a uniform choice of bounded size.

Every sample draws a number by its request id, and a stratum keeps those with the smallest numbers. Any order of arrival
leads to the same choice, each sample being as likely to stay as any other, and a sample that comes again changes
nothing, whether it was kept or not. (Algorithm R draws by position in the stream: to recognise a repetition it would
have to remember the id of every sample it ever turned away.)

Prompts that were evaluated already yield to those that were not: another verdict on the same prompt is little evidence.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime

from shared.hashing import uniform

_SALT = "reservoir"


@dataclass(frozen=True, slots=True)
class Held:
    """A sample in the reservoir, without its prompt.

    Attributes:
        sampled_at: event time.
        draw: in [0, 1); the smaller, the longer it stays.
        evaluations: in how many it took part.
    """

    request_id: str
    sampled_at: datetime
    draw: float
    evaluations: int = 0

    @property
    def rank(self) -> tuple[int, float, str]:
        """Lower stays; the id settles equal draws."""
        return (self.evaluations, self.draw, self.request_id)


@dataclass(frozen=True, slots=True)
class Admission:
    """What becomes of a stratum.

    Attributes:
        admitted: ids of arrivals to be stored.
        evicted: ids of samples to be deleted, prompts and all.
        fresh: arrivals that were not held already.
    """

    admitted: frozenset[str]
    evicted: frozenset[str]
    fresh: int


def drawn(request_id: str, sampled_at: datetime) -> Held:
    """A sample as it arrives, with its number."""
    return Held(request_id, sampled_at, uniform(_SALT, request_id))


def admit(held: Collection[Held], arrivals: Iterable[Held], *, capacity: int, oldest: datetime) -> Admission:
    """Who stays in one stratum.

    Args:
        held: the stratum as it is.
        arrivals: new samples, and perhaps some that are held already.
        capacity: most samples to keep.
        oldest: event time; what was sampled earlier goes.
    """
    known = {one.request_id for one in held}
    fresh = {one.request_id: one for one in arrivals if one.request_id not in known}
    candidates = [one for one in (*held, *fresh.values()) if one.sampled_at >= oldest]
    kept = {one.request_id for one in sorted(candidates, key=lambda one: one.rank)[:capacity]}
    return Admission(frozenset(kept - known), frozenset(known - kept), len(fresh))
