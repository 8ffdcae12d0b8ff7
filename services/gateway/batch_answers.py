"""Answers the lines of a batch: counts each against the limits, and publishes its request until it is answered."""

import asyncio
import contextlib
from datetime import datetime, timedelta
from typing import Final, Literal

from aiokafka.errors import KafkaError
from faststream.exceptions import IncorrectState

from services.gateway.accounts import Accounts
from services.gateway.admission import Admission
from services.gateway.batch_lines import LineReader, Result, Task
from services.gateway.batch_state import Status
from services.gateway.batch_store import Batch
from services.gateway.errors import ApiError
from services.gateway.estimates import Estimates
from services.gateway.keys import ApiKey
from services.gateway.messaging import PendingAnswer, ReplyInbox, RequestPublisher
from services.gateway.schema import ChatRequest
from services.gateway.settings import GatewaySettings
from services.gateway.translate import Answers, to_request
from shared.fleet import Fleet
from shared.kafka.publish import TOO_LARGE
from shared.messages import Cancellation, GenerationRequest, GenerationResponse
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseStatus
from shared.runtime.logs import get_logger, where

CHECK_S: Final = 1.0
"""How long a waiting line does not notice that its batch has ended, wall."""

PAUSE_S: Final = 2.0
"""Before a request that failed is published again, wall."""

ATTEMPTS: Final = 3
"""Attempts of a line whose model server fails or whose answer gets lost."""

GRACE_S: Final = 15.0
"""After a request's deadline in which the router's answer may still arrive, wall."""

_AGAIN: Final = frozenset({"no_endpoint", "upstream_error"})
_ENDINGS: Final = {
    "batch_expired": "the batch was not done within its completion window",
    "batch_cancelled": "the batch was cancelled",
}
Ending = Literal["batch_expired", "batch_cancelled"]

_log = get_logger(__name__)


class BatchAnswers:
    """Answers the lines of one batch.

    Attributes:
        reader: of its lines.
        cancelled: whether the batch was cancelled: no further line is answered.
    """

    def __init__(
        self,
        batch: Batch,
        *,
        status: DatabaseStatus,
        accounts: Accounts,
        inbox: ReplyInbox,
        estimates: Estimates,
        publisher: RequestPublisher,
        reply_partition: int,
        fleet: Fleet,
        settings: GatewaySettings,
        clock: Clock,
    ) -> None:
        """Answer nothing yet.

        Args:
            reply_partition: that this gateway reads.
        """
        self.reader = LineReader(batch.id, batch.endpoint)
        self.cancelled = batch.status is Status.CANCELLING
        self._batch = batch
        self._key = ApiKey(batch.key_id, "", batch.tenant)
        self._retry = status.retry
        self._accounts = accounts
        self._inbox = inbox
        self._estimates = estimates
        self._publisher = publisher
        self._reply_partition = reply_partition
        self._fleet = fleet
        self._settings = settings
        self._clock = clock

    async def admit(self, task: Task) -> tuple[Task, Admission] | Result:
        """Count a line against the limits of the batch's key; waits while too few tokens are left in this minute."""
        try:
            message = self._message(task, self._clock.now())
            while (ending := self._ending()) is None:
                admitted = await self._retry(lambda: self._accounts.admit_line(self._key, message))
                if isinstance(admitted, Admission):
                    return task, admitted
                while admitted > 0 and self._ending() is None:
                    await asyncio.sleep(min(CHECK_S, admitted))
                    admitted -= CHECK_S
        except ApiError as error:
            return self.reader.refused(task.number, task.custom_id, error)
        return self.reader.unprocessed(task.number, task.custom_id, ending, _ENDINGS[ending])

    async def result(self, task: Task, admission: Admission) -> Result:
        """The result of a line that was admitted."""
        with self._inbox.expect(self.reader.request_id(task.number)) as pending:
            try:
                result = await self._answer(task, admission, pending)
            except ApiError as error:
                result = self.reader.refused(task.number, task.custom_id, error)
            except Exception as error:  # noqa: BLE001 - a defect that one line shows must not stop the batch
                _log.error("a line of a batch failed", batch=self._batch.id, line=task.number,
                           error=type(error).__name__, where=where(error))  # fmt: skip
                internal = ApiError(500, "the gateway failed on this line", kind="server_error", code="internal_error")
                result = self.reader.refused(task.number, task.custom_id, internal)
        if pending.response is None:
            self._accounts.finish(admission, None)
        else:
            self._accounts.answered(admission, pending.response, self._estimates)
        return result

    async def _answer(self, task: Task, admission: Admission, pending: PendingAnswer) -> Result:
        """Publish the request of a line until it is answered, or the batch ends.

        Raises:
            ApiError: the answer is an error.
        """
        attempts = 0
        while (ending := self._ending()) is None:
            created = self._clock.now()
            message = self._message(task, created).model_copy(update={"directive": admission.request.directive})
            if not await self._publish(message):
                await asyncio.sleep(PAUSE_S)
                continue
            response = await self._response(pending, message)
            if response is None or _is_worth_another_attempt(response):
                attempts += 1
            elif not _is_late(response):
                return self._answered(task, response, created)
            if attempts >= ATTEMPTS:
                if response is not None and response.error is not None:
                    raise ApiError.of_response(response.error)
                raise ApiError(504, "there was no answer in time", kind="timeout_error", code="timeout")
            pending.response = None
            if attempts:
                await asyncio.sleep(PAUSE_S)
        return self.reader.unprocessed(task.number, task.custom_id, ending, _ENDINGS[ending])

    def _message(self, task: Task, now: datetime) -> GenerationRequest:
        limit = now + timedelta(seconds=self._settings.batch_request_s * self._clock.rate)
        message = to_request(
            task.body,
            headers={},
            fleet=self._fleet,
            tenant=self._batch.tenant,
            reply_partition=self._reply_partition,
            now=now,
            deadline=min(limit, self._batch.expires_at),
        )
        return message.model_copy(update={"id": self.reader.request_id(task.number)})

    async def _publish(self, message: GenerationRequest) -> bool:
        """Publish a request; returns whether Kafka has it for certain.

        Raises:
            ApiError: it is too large.
        """
        try:
            async with asyncio.timeout(self._settings.publish_timeout_s):
                await self._publisher.publish_to_lane(message)
        except TOO_LARGE:
            raise ApiError(
                413, "the request is too large: shorten the prompt", param="messages", code="context_length_exceeded"
            ) from None
        except (KafkaError, TimeoutError, IncorrectState):
            return False
        return True

    async def _response(self, pending: PendingAnswer, message: GenerationRequest) -> GenerationResponse | None:
        """Wait for the response; None if the batch ends, or if none arrives in time."""
        deadline = message.deadline or self._batch.expires_at
        while pending.response is None:
            if self.cancelled:
                cancellation = Cancellation(request_id=str(message.id), cancelled_at=self._clock.now())
                with contextlib.suppress(KafkaError, TimeoutError, IncorrectState):
                    async with asyncio.timeout(self._settings.publish_timeout_s):
                        await self._publisher.cancel(cancellation)
                return None
            if self._clock.wall_seconds_until(deadline) < -GRACE_S:
                return None
            await pending.wait(CHECK_S)
        return pending.response

    def _answered(self, task: Task, response: GenerationResponse, created: datetime) -> Result:
        if response.error is not None:
            raise ApiError.of_response(response.error)
        answers = Answers(
            request_id=response.request_id,
            model=task.body.model,
            created=int(created.timestamp()),
            chat=isinstance(task.body, ChatRequest),
        )
        estimate = self._estimates.of(response.model, response.decision, response.usage)
        return self.reader.answered(task, answers.whole(response, estimate).model_dump(mode="json"))

    def _ending(self) -> Ending | None:
        """Why no further line is answered."""
        if self.cancelled:
            return "batch_cancelled"
        return "batch_expired" if self._clock.now() >= self._batch.expires_at else None


def _is_worth_another_attempt(response: GenerationResponse) -> bool:
    """Whether the model server failed."""
    return response.error is not None and response.error.code in _AGAIN


def _is_late(response: GenerationResponse) -> bool:
    """Whether the request waited too long, or the answer was cut off because of that."""
    return response.finish_reason == "deadline" or (
        response.error is not None and response.error.code == "deadline_exceeded"
    )
