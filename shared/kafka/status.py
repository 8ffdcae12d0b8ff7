"""Whether Kafka answers, for readiness."""

import asyncio
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient

from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings

CHECK_INTERVAL_S: Final = 2.0
"""Wall seconds between two checks."""

CHECK_TIMEOUT_S: Final = 4.0
"""Wall seconds that a check may take. Kafka's own clients notice a frozen broker only after 30 to 40 s."""

_log = get_logger(__name__)


class KafkaStatus:
    """Asks Kafka again and again for the metadata of a topic, on a connection that does nothing else."""

    def __init__(self, kafka: KafkaSettings, topic: str) -> None:
        """Set up.

        Args:
            topic: full name of a topic of the service.
        """
        self._kafka = kafka
        self._topic = topic
        self._problem: str | None = None

    def problem(self) -> str | None:
        """The readiness check; `None` while Kafka answers."""
        return self._problem

    async def check_forever(self) -> None:
        """Check, without end."""
        admin: AIOKafkaAdminClient | None = None
        try:
            while True:
                try:
                    async with asyncio.timeout(CHECK_TIMEOUT_S):
                        if admin is None:
                            admin = AIOKafkaAdminClient(**self._kafka.client_options())
                            await admin.start()
                        await admin.describe_topics([self._topic])
                except Exception as error:  # noqa: BLE001 - whatever it is, the check continues
                    self._note(f"Kafka does not answer ({type(error).__name__})")
                    await _close(admin)
                    admin = None
                else:
                    self._note(None)
                await asyncio.sleep(CHECK_INTERVAL_S)
        finally:
            await _close(admin)

    def _note(self, problem: str | None) -> None:
        if problem is None and self._problem is not None:
            _log.info("Kafka answers")
        elif problem is not None and self._problem is None:
            _log.warning("waiting for Kafka", problem=problem)
        self._problem = problem


async def _close(admin: AIOKafkaAdminClient | None) -> None:
    if admin is not None:
        await admin.close()
