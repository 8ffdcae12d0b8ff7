"""`sprout dead-letters` on real Kafka: list, show, and redrive each once."""

import asyncio
import json

import pytest
from typer.testing import CliRunner

from shared.kafka.dead_letters import dead_letter_for
from shared.runtime.clock import Clock
from shared.topics import DEAD_LETTERS, REDRIVEN_HEADER, REQUESTS
from tests.support.router import producing, reading
from tools.cli.main import app

pytestmark = pytest.mark.integration


class Command:
    """The command, with the test's Kafka."""

    def __init__(self, kafka, monkeypatch):
        monkeypatch.setenv("SPROUT_KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap_servers)
        monkeypatch.setenv("SPROUT_KAFKA_TOPIC_PREFIX", kafka.topic_prefix)
        monkeypatch.setenv("SPROUT_KAFKA_GROUP_PREFIX", kafka.group_prefix)

    async def __call__(self, *arguments: str) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, app, ["dead-letters", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    async def listed(self, *arguments: str) -> list[dict]:
        return json.loads(await self("list", "--json", *arguments))["shown"]


@pytest.fixture
async def command(kafka, monkeypatch):
    async with producing(kafka) as producer, reading(kafka, REQUESTS) as requests:
        values = [b'{"id": "r0", "prompt": 3}', b"{broken\x1b[2J", b'{"id": "r2", "prompt": 3}', b"x" * 200_000]
        for number, value in enumerate(values):
            await producer.raw(value, key=b"k%d" % number, headers=[("trace", b"\xff")])
        for record in sorted(await requests.read(until=4), key=lambda one: one.key):
            reason = {b"k1": "invalid_json", b"k3": "too_large"}.get(record.key, "invalid_message")
            letter = dead_letter_for(record, service="router", reason=reason, detail="why", clock=Clock())
            await producer.post(DEAD_LETTERS, letter, record.key.decode())
    return Command(kafka, monkeypatch)


async def test_dead_letters_are_listed_by_reason_time_and_id(command):
    assert [one["reason"] for one in await command.listed()] == [
        "invalid_message", "invalid_json", "invalid_message", "too_large",
    ]  # fmt: skip
    assert [one["id"] for one in await command.listed("--reason", "invalid_message")] == ["0:0", "0:2"]
    assert [one["request_id"] for one in await command.listed("--id", "r2")] == ["r2"]
    assert [one["id"] for one in await command.listed("--id", "0:1", "--id", "r0")] == ["0:0", "0:1"]
    assert await command.listed("--until", "2020-01-01") == []
    assert len(await command.listed("--since", "2020-01-01", "--topic", "requests")) == 4
    assert await command.listed("--topic", "samples") == []
    assert "invalid_json" in await command("list")


async def test_a_dead_letter_is_shown_without_control_characters(command):
    shown = await command("show", "0:1")
    assert "{broken" in shown
    assert "\x1b" not in shown
    assert json.loads(await command("show", "0:1", "--json"))["dead_letter"]["reason"] == "invalid_json"


async def test_dead_letters_are_redriven_once_with_their_bytes_key_and_headers(command, kafka):
    async with reading(kafka, REQUESTS) as requests:
        await requests.read(until=4)
        assert "would send 3 to" in await command("redrive")
        assert "not sent: 0:3: 134464 bytes of the message were not kept" in await command("redrive")
        await requests.read_to_end()
        assert len(requests.records) == 4, "a dry run sends nothing"

        assert f"2 to {kafka.topic(REQUESTS)}" in await command("redrive", "--reason", "invalid_message", "--execute")
        assert "1 to" in await command("redrive", "--execute")
        assert "no dead letter to send" in await command("redrive", "--execute")
        await requests.read(until=7)
        await requests.read_to_end()
        again = requests.records[4:]
    assert sorted((one.key, one.value) for one in again) == [
        (b"k0", b'{"id": "r0", "prompt": 3}'), (b"k1", b"{broken\x1b[2J"), (b"k2", b'{"id": "r2", "prompt": 3}'),
    ]  # fmt: skip
    assert {tuple(one.headers) for one in again} == {
        (("trace", b"\xff"), (REDRIVEN_HEADER, b"0:%d" % number)) for number in range(3)
    }
    assert [one["redriven"] for one in await command.listed()] == [True, True, True, False]


async def test_dead_letters_can_go_to_another_topic(command, kafka):
    async with reading(kafka, DEAD_LETTERS) as letters:
        await letters.read(until=4)
    async with reading(kafka, REQUESTS) as requests:
        await command("redrive", "--id", "0:0", "--to", "samples", "--execute")
        await requests.read(until=4)
        await requests.read_to_end()
        assert len(requests.records) == 4
    result = await asyncio.to_thread(
        CliRunner().invoke,
        app,
        ["dead-letters", "redrive", "--id", "0:1", "--to", "nowhere", "--execute"],
    )
    assert result.exit_code == 1
