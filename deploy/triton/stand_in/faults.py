"""Injected faults: a share of the generations fails partway, to test retries."""

from collections import OrderedDict
from dataclasses import dataclass

from deploy.triton.stand_in.engine import Outlet
from deploy.triton.stand_in.workload import unit_hash

MESSAGE = "injected fault: the stand-in's parameter 'faults.error_share' makes this generation fail"

MOST_REQUESTS_REMEMBERED = 100_000
"""Most requests whose attempts are counted; the oldest are forgotten first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRules:
    """How often a stand-in fails.

    Attributes:
        error_share: probability that a generation ends with an error at some point; 0: never.
        seed: determines which generations fail. Servers of one pool need different seeds, or a request that fails on
            one fails on all.
    """

    error_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.error_share <= 1:
            raise ValueError(f"'error_share' is a probability between 0 and 1, got {self.error_share}")


class FaultDraws:
    """Decides which generations fail, by a hash of the seed, the request's id, and the number of the attempt here."""

    def __init__(self, rules: FaultRules) -> None:
        self._rules = rules
        self._attempts: OrderedDict[str, int] = OrderedDict()

    def fails_after(self, request_id: str) -> float | None:
        """The share of the answer after which this attempt fails, in [0, 1); None if it does not fail."""
        if self._rules.error_share == 0:
            return None
        attempt = self._attempts.pop(request_id, 0) + 1
        self._attempts[request_id] = attempt
        if len(self._attempts) > MOST_REQUESTS_REMEMBERED:
            self._attempts.popitem(last=False)
        draw = unit_hash(str(self._rules.seed), request_id, str(attempt))
        # Given that it is below the share, the draw is uniform.
        return draw / self._rules.error_share if draw < self._rules.error_share else None


class FailingOutlet:
    """Sends the beginning of an answer, and an error in place of its end."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet

    @property
    def streams(self) -> bool:
        """Whether the client wants the answer in parts."""
        return self._outlet.streams

    def send(self, text: str, *, tokens: int, final: bool) -> None:
        """Send the next part of the answer; the last part becomes the error."""
        if final:
            self._outlet.fail(MESSAGE)
        else:
            self._outlet.send(text, tokens=tokens, final=False)

    def fail(self, message: str) -> None:
        """End the answer with another error."""
        self._outlet.fail(message)

    def end_cancelled(self) -> None:
        """End the answer because its client cancelled it."""
        self._outlet.end_cancelled()

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled the request."""
        return self._outlet.is_cancelled()
