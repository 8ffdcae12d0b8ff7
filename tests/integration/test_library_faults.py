"""Faults of libraries for which there is a workaround, on the bare library: a test that fails says that it was mended.

Then the workaround can go; docs/architecture.md lists where each is.
"""

import asyncio
import subprocess
import sys
from pathlib import Path

import asyncpg
import highspy
import pytest
import uvicorn
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import MessageSizeTooLargeError, OutOfOrderSequenceNumber
from faststream.kafka import KafkaBroker

from services.gateway.workarounds import MAX_HEAD_BYTES
from shared.runtime.settings import KafkaSettings
from shared.topics import MEBIBYTE, POLICIES, QUALITY, RESPONSES
from tests.support.acls import GuardedKafka, guarded_kafka
from tests.support.deadlines import DEADLINE_S, until

pytestmark = pytest.mark.integration

__all__ = ["guarded_kafka"]  # a fixture

DATA = Path(__file__).parents[1] / "data"
TOO_LARGE = b"x" * 2 * MEBIBYTE
"""More than the topics below accept."""


async def test_aiokafka_does_not_recover_from_a_rejected_batch(kafka: KafkaSettings):
    """`shared.kafka.producer`."""
    producer = AIOKafkaProducer(
        **kafka.client_options(), acks="all", enable_idempotence=True, max_request_size=8 * MEBIBYTE
    )
    await producer.start()
    try:
        await producer.send_and_wait(kafka.topic(QUALITY), b"small", key=b"k")
        with pytest.raises(MessageSizeTooLargeError):
            await producer.send_and_wait(kafka.topic(QUALITY), TOO_LARGE, key=b"k")
        with pytest.raises(OutOfOrderSequenceNumber):
            await producer.send_and_wait(kafka.topic(QUALITY), b"small", key=b"k")
    finally:
        await producer.stop()


async def test_aiokafka_asserts_that_a_partition_exists(kafka: KafkaSettings):
    """`shared.kafka.workarounds.UNKNOWN_PARTITION`."""
    producer = AIOKafkaProducer(**kafka.client_options())
    await producer.start()
    try:
        with pytest.raises(AssertionError):
            await producer.send_and_wait(kafka.topic(POLICIES), b"{}", partition=99)
    finally:
        await producer.stop()


async def test_aiokafka_calls_no_listener_of_a_consumer_without_a_group(kafka: KafkaSettings):
    """`shared.kafka.workarounds.until_assigned`."""

    class Listener(ConsumerRebalanceListener):
        calls = 0

        async def on_partitions_revoked(self, revoked):
            self.calls += 1

        async def on_partitions_assigned(self, assigned):
            self.calls += 1

    listener = Listener()
    consumer = AIOKafkaConsumer(**kafka.client_options(), enable_auto_commit=False)
    consumer.subscribe([kafka.topic(POLICIES)], listener=listener)
    await consumer.start()
    try:
        await consumer.getmany(timeout_ms=10)
        assert consumer.assignment()
        assert listener.calls == 0
    finally:
        await consumer.stop()


async def test_aiokafka_reports_no_commits_where_the_whole_answer_is_an_error(guarded_kafka: GuardedKafka):
    """`shared.kafka.workarounds.read_commits`; the error is that this principal may not read the group."""
    await guarded_kafka.prepare()
    client = guarded_kafka.user("client")
    admin = AIOKafkaAdminClient(**client.client_options())
    try:
        await admin.start()
        partition = TopicPartition(client.topic(RESPONSES), 0)
        found = await admin.list_consumer_group_offsets("any", group_coordinator_id=1, partitions=[partition])
    finally:
        await admin.close()
    assert found == {}


async def test_faststream_fails_at_binary_headers(kafka: KafkaSettings):
    """`shared.kafka.workarounds.parse_any_headers`."""
    broker, errors = KafkaBroker(kafka.bootstrap_servers), asyncio.Queue[Exception]()

    async def parse(record, parse_as_faststream_does):
        try:
            return await parse_as_faststream_does(record)
        except Exception as error:
            errors.put_nowait(error)
            raise

    @broker.subscriber(kafka.topic(QUALITY), auto_offset_reset="earliest", parser=parse)
    async def ignore(message: object) -> None: ...

    producer = AIOKafkaProducer(**kafka.client_options())
    await producer.start()
    try:
        await producer.send_and_wait(kafka.topic(QUALITY), b"{}", headers=[("binary", b"\xff")])
        await broker.start()
        async with asyncio.timeout(DEADLINE_S):
            assert isinstance(await errors.get(), UnicodeDecodeError)
    finally:
        await broker.stop()
        await producer.stop()


async def test_asyncpg_does_not_end_a_cancelled_query_while_the_server_hangs():
    """`shared.runtime.workarounds.within`."""

    asked, stopped = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a login, and answer no query; a request to cancel one comes on another connection."""
        await reader.read(1_000)
        version = b"server_version\x0017.0\0"
        for kind, content in ((b"R", bytes(4)), (b"S", version), (b"K", bytes(8)), (b"Z", b"I")):
            writer.write(kind + (len(content) + 4).to_bytes(4) + content)
        if await reader.read(1_000):
            asked.set()
        await stopped.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    pool = await asyncpg.create_pool(host="127.0.0.1", port=port, user="u", database="d", ssl=False, min_size=1)
    query = asyncio.create_task(pool.execute("SELECT 1"))
    async with asyncio.timeout(DEADLINE_S):
        await asked.wait()
    query.cancel()
    _, unfinished = await asyncio.wait({query}, timeout=1.0)
    stopped.set()
    await asyncio.gather(query, return_exceptions=True)
    pool.terminate()
    server.close()
    assert unfinished


def test_highs_prints_its_licence_whatever_its_options_are():
    """`services.optimizer.highs.warm_up`."""
    program = "import highspy; solver = highspy.Highs(); solver.setOptionValue('output_flag', False)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert run.stdout.startswith("Running HiGHS")


def test_highs_ends_without_a_result():
    """`services.optimizer.highs.outcome`: a program whose limits cannot be kept."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)  # as everywhere: the first model of a process sets the size of HiGHS's pool
    solver.readModel(str(DATA / "highs_unknown.mps.gz"))
    solver.run()
    assert solver.getModelStatus() == highspy.HighsModelStatus.kUnknown


async def test_uvicorns_fast_parser_takes_headers_of_any_size():
    """`services.gateway.workarounds`."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    config = uvicorn.Config(app, host="127.0.0.1", port=0, http="httptools", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nx-padding: " + b"a" * 10 * MAX_HEAD_BYTES + b"\r\n\r\n")
    async with asyncio.timeout(DEADLINE_S):
        assert (await reader.readline()).startswith(b"HTTP/1.1 204")
    writer.close()
    server.should_exit = True
    await serving
