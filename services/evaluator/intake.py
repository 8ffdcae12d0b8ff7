"""What comes in from Kafka and goes to the database."""

from collections.abc import Awaitable, Callable, Collection

from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.spending import energy_of
from services.evaluator.storage import Storage
from shared.kafka.dead_letters import RetryLaterError
from shared.messages import Footprint, Sample
from shared.runtime.clock import Clock


class Intake:
    """Stores samples and the energy of earlier evaluations; what cannot be stored now is to be delivered again.

    Attributes:
        storage: null until the database is connected.
    """

    def __init__(
        self, models: Collection[str], *, clock: Clock, metrics: EvaluatorMetrics, tell: Callable[[], None]
    ) -> None:
        """Set up.

        Args:
            models: whose samples are kept.
            tell: called when there are new samples.
        """
        self.storage: Storage | None = None
        self._models = models
        self._clock = clock
        self._metrics = metrics
        self._tell = tell

    async def keep(self, samples: list[Sample]) -> None:
        """Let samples into the reservoir.

        Raises:
            RetryLaterError: the database is away.
        """
        # PostgreSQL's text has no place for NUL.
        known = [one for one in samples if one.model in self._models and "\0" not in one.request_id + one.group]
        if known:
            await self._store(lambda storage: storage.keep(known, now=self._clock.now()))
            self._tell()
        self._metrics.samples.labels("offered").inc(len(known))
        self._metrics.samples.labels("refused").inc(len(samples) - len(known))

    async def note(self, footprints: list[Footprint]) -> None:
        """Learn what earlier evaluations took.

        Raises:
            RetryLaterError: the database is away.
        """
        book = energy_of(footprints)
        if book:
            await self._store(lambda storage: storage.add_energy(book))

    def database_problem(self) -> str | None:
        """What is wrong with the database; null while it works."""
        return "not connected yet" if self.storage is None else self.storage.problem

    async def _store(self, write: Callable[[Storage], Awaitable[None]]) -> None:
        if self.storage is None:
            raise RetryLaterError("PostgreSQL is not connected yet")
        try:
            await write(self.storage)
        except RetryLaterError:
            await self.storage.pause()
            raise
