"""Whether a failed attempt is repeated, and after how long."""

from dataclasses import dataclass
from typing import Literal

GiveUp = Literal["upstream_error", "no_endpoint", "deadline_exceeded"]
"""The error code of a request that is not tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRules:
    """Limits of repetition; wall seconds.

    Attributes:
        max_attempts: endpoints asked for one request, >= 1.
        backoff_s: before the second attempt; doubles with every further one.
        backoff_max_s: longest pause.
    """

    max_attempts: int = 6
    backoff_s: float = 0.05
    backoff_max_s: float = 2.0

    def pause_s(self, attempts: int, jitter: float) -> float:
        """Pause after `attempts` failed ones, between half and all of the backoff.

        Args:
            jitter: in [0, 1); keeps requests that failed together from coming back together.
        """
        full_s = min(self.backoff_max_s, self.backoff_s * 2.0 ** min(attempts - 1, 30))
        return full_s * (0.5 + 0.5 * jitter)

    def verdict(self, *, attempts: int, published: bool, pause_s: float, remaining_s: float) -> GiveUp | None:
        """Why a request is not tried again; null when it is.

        Args:
            attempts: made so far, all failed.
            published: a part of the answer has been published; another attempt would contradict it.
            remaining_s: until the deadline.
        """
        if published or attempts >= self.max_attempts:
            return "upstream_error"
        return "deadline_exceeded" if pause_s >= remaining_s else None
