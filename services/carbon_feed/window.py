"""What a zone's message holds, and when a new one is due. Pure."""

from collections.abc import Iterable
from datetime import datetime, timedelta

from shared.messages import IntensityPoint


class Window:
    """The trailing window of one zone: what was heard, by time; gaps stay gaps."""

    def __init__(self, length: timedelta) -> None:
        self._length = length
        self._points: dict[datetime, IntensityPoint] = {}
        self.latest: IntensityPoint | None = None

    def add(self, points: Iterable[IntensityPoint]) -> None:
        """Take past values; what a provider tells again, corrected, replaces what it told before."""
        self._points.update((point.at, point) for point in points)

    def is_news(self, point: IntensityPoint) -> bool:
        """Whether a latest value says something new; one older than what is known does not."""
        return self.latest is None or (point.at >= self.latest.at and point != self.latest)

    def advance(self, point: IntensityPoint) -> None:
        """Take the latest value, and forget what is older than the window."""
        self.latest = point
        self._points[point.at] = point
        oldest = point.at - self._length
        self._points = {at: kept for at, kept in self._points.items() if at >= oldest}

    def history(self) -> tuple[IntensityPoint, ...]:
        """Everything before the latest, oldest first."""
        if self.latest is None:
            return ()
        return tuple(self._points[at] for at in sorted(self._points) if at < self.latest.at)
