"""`sprout send`: send one request, and print the answer with its directive, tokens and carbon."""

import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn
from uuid import uuid4

import typer
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from pydantic import ValidationError
from rich.status import Status

from shared.fleet import Fleet
from shared.kafka.records import PoisonMessageError, RecordId, describe, parse
from shared.messages import Footprint, GenerationRequest, GenerationResponse, ResponseChunk
from shared.runtime.clock import Clock
from shared.runtime.logs import printable
from shared.runtime.settings import KafkaSettings
from shared.topics import FOOTPRINTS, REQUESTS, RESPONSE_CHUNKS, RESPONSES, TopicSpec, requests_topic
from tools.cli.console import (
    Bootstrap,
    Exit,
    err,
    fail,
    find_target,
    out,
    print_text,
    quiet_clients,
    unreachable,
)
from tools.cli.offsets import existing_partitions

POLL_MS = 100

LAST_CHUNK_WAIT_S = 2.0
"""Wait for the last chunk after the response, which is in another topic."""

RESTARTED = "\n[another router restarted the answer]\n"


class MissingTopicError(RuntimeError):
    """A required topic does not exist."""


class NoAnswerError(TimeoutError):
    """No response arrived in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The response to a request.

    Attributes:
        footprint: None if it did not arrive in time.
    """

    response: GenerationResponse
    footprint: Footprint | None


class Conversation:
    """One request and its response; callbacks get the chunks in order, then the response."""

    def __init__(
        self,
        kafka: KafkaSettings,
        request: GenerationRequest,
        *,
        lane: TopicSpec = REQUESTS,
        on_chunk: Callable[[str], None],
        on_response: Callable[[GenerationResponse], None],
    ) -> None:
        if request.id is None:
            raise ValueError("the request needs an id, to recognise its response")
        self._kafka = kafka
        self._topic = kafka.topic(lane)
        self._request = request
        self._id = request.id
        self._on_chunk = on_chunk
        self._on_response = on_response
        self._streaming = request.stream
        self._response: GenerationResponse | None = None
        self._footprint: Footprint | None = None
        self._stream: str | None = None
        self._record = ""

    async def run(self, *, timeout_s: float, footprint_wait_s: float) -> Answer:
        """Publish the request, wait for the response, then for its footprint.

        Raises:
            MissingTopicError: a topic does not exist.
            NoAnswerError: no response within `timeout_s`.
            KafkaError: Kafka could not be reached or refused the request.
        """
        specs = {self._kafka.topic(spec): spec for spec in (RESPONSES, RESPONSE_CHUNKS, FOOTPRINTS)}
        consumer: Any = AIOKafkaConsumer(**self._kafka.client_options(), enable_auto_commit=False, fetch_max_wait_ms=50)
        await consumer.start()
        try:
            await self._seek_to_end(consumer, list(specs))
            await self._publish()
            try:
                async with asyncio.timeout(timeout_s):
                    while self._response is None:
                        await self._read(consumer, specs)
            except TimeoutError:
                raise NoAnswerError(f"no answer to request {self._id} within {timeout_s:g} s") from None
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_CHUNK_WAIT_S):
                    while self._streaming:
                        await self._read(consumer, specs)
            self._on_response(self._response)
            if self._response.status == "ok":
                with suppress(TimeoutError):  # the response is printed without it
                    async with asyncio.timeout(footprint_wait_s):
                        while self._footprint is None:
                            await self._read(consumer, specs)
            return Answer(self._response, self._footprint)
        finally:
            await consumer.stop()

    async def _seek_to_end(self, consumer: Any, topics: list[str]) -> None:  # noqa: ANN401 - aiokafka is untyped
        """Assign every partition at its end offset, before the request is published."""
        partitions = await existing_partitions(self._kafka, [*topics, self._topic])
        missing = {*topics, self._topic} - {partition.topic for partition in partitions}
        if missing:
            raise MissingTopicError(f"topics {', '.join(sorted(missing))} do not exist")
        partitions = [partition for partition in partitions if partition.topic in topics]
        ends = await consumer.end_offsets(partitions)
        consumer.assign(partitions)
        for partition, offset in ends.items():
            consumer.seek(partition, offset)

    async def _publish(self) -> None:
        producer: Any = AIOKafkaProducer(
            **self._kafka.client_options(), acks="all", max_request_size=REQUESTS.max_message_bytes
        )
        await producer.start()
        try:
            sent = await producer.send_and_wait(
                self._topic,
                self._request.model_dump_json(exclude_none=True).encode(),
                key=self._id.encode(),
            )
            self._record = str(RecordId.of(sent, self._kafka.topic_prefix))
        finally:
            await producer.stop()

    async def _read(self, consumer: Any, specs: dict[str, TopicSpec]) -> None:  # noqa: ANN401
        batches = await consumer.getmany(timeout_ms=POLL_MS)
        for partition, records in batches.items():
            for record in records:
                if record.value is not None and self._id.encode() in record.value:
                    self._handle(specs[partition.topic], record.value)

    def _handle(self, spec: TopicSpec, value: bytes) -> None:
        try:
            message = parse(spec.message, value)
        except PoisonMessageError:
            return  # another producer's invalid record that contains the id
        match message:
            case ResponseChunk() if message.request_id == self._id:
                if message.sequence == 0 and self._stream not in (None, message.stream):
                    self._on_chunk(RESTARTED)
                self._stream = message.stream
                self._on_chunk(message.text)
                self._streaming = not message.final
            case GenerationResponse() if message.identity in (self._record, self._id):
                self._response = self._response or message
            case Footprint() if message.identity in (self._record, self._id) and message.purpose == "request":
                self._footprint = message
            case _:
                return


def send(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from standard input")],
    *,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it is generated")] = False,
    model: Annotated[str | None, typer.Option(help="Model name; default: the first of the fleet file")] = None,
    directive: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="Force a level (L0, L1, ...), or forbid one (!L2)")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of the prompt, for its prompt group")] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant, whose defaults in the fleet file apply")] = None,
    lane: Annotated[str, typer.Option(help="Topic of the request, a lane of SPROUT_ROUTER_LANES")] = REQUESTS.name,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of generated tokens")] = 512,
    system: Annotated[str | None, typer.Option(help="System message")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How long to wait for the answer")] = 60.0,
    footprint_wait: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="How long to wait for the footprint after the answer")
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print response and footprint as JSON")] = False,
    bootstrap: Bootstrap = None,
) -> None:
    """Send a prompt over Kafka, wait for the answer, and print it with its directive, tokens and carbon.

    Exit codes: 0 answered, 1 the request failed, 2 wrong usage, 3 Kafka is unreachable, 4 no answer in time.
    """
    target = find_target(bootstrap)
    if prompt == "-":
        prompt = sys.stdin.read()
    request = _request(
        prompt,
        clock=target.clock,
        model=model,
        directive=directive,
        task=task,
        tenant=tenant,
        max_tokens=max_tokens,
        system=system,
        stream=stream,
    )
    quiet_clients()
    printed = stream and not as_json
    metering = err.status("answered; waiting for the footprint")
    conversation = Conversation(
        target.kafka,
        request,
        lane=requests_topic(lane),
        on_chunk=_print_chunk if printed else lambda _: None,
        on_response=lambda response: None if as_json else _print_text(response, metering, streamed=printed),
    )
    try:
        answer = asyncio.run(conversation.run(timeout_s=timeout, footprint_wait_s=footprint_wait))
    except MissingTopicError as error:
        fail(str(error), remedy="create them: sprout topics create", code=Exit.NOT_RUNNING)
    except NoAnswerError as error:
        fail(str(error), remedy="is a router running? sprout status, sprout logs router", code=Exit.TIMED_OUT)
    except MessageSizeTooLargeError:
        _too_large(request)
    except (KafkaError, OSError) as error:
        unreachable(target, error)
    finally:
        metering.stop()
    if as_json:
        _print_json(answer)
    else:
        _print_facts(answer, target.fleet())
    if answer.response.status != "ok":
        raise typer.Exit(Exit.FAILED)


def _request(
    prompt: str,
    *,
    clock: Clock,
    model: str | None,
    directive: str | None,
    task: str | None,
    tenant: str | None,
    max_tokens: int,
    system: str | None,
    stream: bool,
) -> GenerationRequest:
    content: dict[str, object] = {"prompt": prompt}
    if system is not None:
        content = {"messages": [{"role": "system", "content": system}, {"role": "user", "content": prompt}]}
    try:
        return GenerationRequest.model_validate(
            {
                "id": f"cli-{uuid4().hex}",
                "model": model,
                "task": task,
                "tenant": tenant,
                "directive": directive,
                "sampling": {"max_tokens": max_tokens},
                "stream": stream,
                "requested_at": clock.now(),
                **content,
            }
        )
    except ValidationError as error:
        fail(f"the request is invalid: {describe(error)}")


def _too_large(request: GenerationRequest) -> NoReturn:
    size = len(request.model_dump_json(exclude_none=True))
    fail(
        f"the request has {size} bytes; topic {REQUESTS.name} accepts at most {REQUESTS.max_message_bytes}",
        remedy="shorten the prompt",
    )


def _print_chunk(text: str) -> None:
    print_text(text, end="")


def _print_text(response: GenerationResponse, metering: Status, *, streamed: bool) -> None:
    if response.error is not None:
        return
    print_text("" if streamed else response.text or "")
    metering.start()


def _print_facts(answer: Answer, fleet: Fleet | None) -> None:
    response = answer.response
    if response.error is not None:
        text = printable(f"error: {response.error.code}: {response.error.message}", keep="\n")
        err.print(text, markup=False, style="red", soft_wrap=True)
        return
    facts = []
    if response.decision is not None:
        level = response.decision.level
        text = fleet.directive_text(level) if fleet is not None and level in fleet.levels else ""
        how = {
            "policy": "drawn from the policy",
            "forced": "requested",
            "fallback": "no valid policy",
            "switchback": "reference block",
        }
        named = f"{level} “{text}”" if text else level
        facts.append(f"directive {named} ({how[response.decision.source]})")
    if response.usage is not None:
        facts.append(f"{response.usage.completion_tokens} tokens")
    facts.append(_grams(answer.footprint))
    out.print("\n" + printable(" · ".join(facts)), style="dim", markup=False, soft_wrap=True)


def _grams(footprint: Footprint | None) -> str:
    if footprint is None:
        return "footprint not available yet (the ledger attributes energy after SPROUT_LEDGER_SETTLE_DELAY_S)"
    if footprint.total_g is None:
        return f"{footprint.energy_j:.0f} J, grams unknown: no carbon intensity for {footprint.zone}"
    return f"{footprint.total_g:.4g} gCO2eq ({footprint.energy_j:.0f} J at {footprint.intensity_g_per_kwh:.0f} g/kWh)"


def _print_json(answer: Answer) -> None:
    document = {
        "response": answer.response.model_dump(mode="json"),
        "footprint": None if answer.footprint is None else answer.footprint.model_dump(mode="json"),
    }
    print_text(json.dumps(document, indent=2, ensure_ascii=False))
