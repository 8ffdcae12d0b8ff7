"""Faults on purpose: a share of the generations fails on its way, so that those who retry can be tried."""

from collections import OrderedDict
from dataclasses import dataclass

from deploy.triton.stand_in.engine import Outlet
from deploy.triton.stand_in.workload import unit_hash

MESSAGE = "this generation failed on purpose: the stand-in's parameter 'faults.error_share' asks for it"

MOST_REQUESTS_REMEMBERED = 100_000
"""Of these the attempts are counted; one that comes again later begins anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRules:
    """How often a stand-in fails.

    Attributes:
        error_share: probability that a generation ends with an error, somewhere on its way; 0: never.
        seed: which ones do; servers of one pool need seeds of their own, or an attempt that one of them fails fails on
            the other as well.
    """

    error_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.error_share <= 1:
            raise ValueError(f"'error_share' is a probability between 0 and 1, got {self.error_share}")


class FaultDraws:
    """Which generations fail: drawn by a hash of the seed, the request's id, and how often it was asked here."""

    def __init__(self, rules: FaultRules) -> None:
        self._rules = rules
        self._asked: OrderedDict[str, int] = OrderedDict()

    def fails_after(self, request_id: str) -> float | None:
        """The share of its answer after which this attempt fails, in [0, 1); null when it does not."""
        if self._rules.error_share == 0:
            return None
        attempt = self._asked.pop(request_id, 0) + 1
        self._asked[request_id] = attempt
        if len(self._asked) > MOST_REQUESTS_REMEMBERED:
            self._asked.popitem(last=False)
        draw = unit_hash(str(self._rules.seed), request_id, str(attempt))
        # Below the share the draw is uniform again.
        return draw / self._rules.error_share if draw < self._rules.error_share else None


class FailingOutlet:
    """Lets the beginning of an answer through, and an error instead of its end."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet

    @property
    def streams(self) -> bool:
        """Whether parts of the answer are wanted."""
        return self._outlet.streams

    def send(self, text: str, *, tokens: int, final: bool) -> None:
        """The newest part of the answer; the last one becomes the error."""
        if final:
            self._outlet.fail(MESSAGE)
        else:
            self._outlet.send(text, tokens=tokens, final=False)

    def fail(self, message: str) -> None:
        """The answer ends with another error."""
        self._outlet.fail(message)

    def end_cancelled(self) -> None:
        """The answer ends because its client left."""
        self._outlet.end_cancelled()

    def is_cancelled(self) -> bool:
        """Whether the client left."""
        return self._outlet.is_cancelled()
