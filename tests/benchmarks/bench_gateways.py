"""What each of several gateways reads of the replies: `python -m tests.benchmarks.bench_gateways [--instances 10]`.

Real Kafka, PostgreSQL, router and Triton with the stand-in model. First all streams go through one gateway, and the
others are idle; then as many go through each. It counts, so that other work on the machine changes nothing.
"""

import argparse
import asyncio
import logging
import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import httpx
import uvloop
from pydantic import SecretStr

from deploy.local.postgres import create_database, postgres_spec
from deploy.local.processes import free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from services.gateway.keys import KeyStore
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseStatus, open_pool
from shared.runtime.settings import DatabaseSettings
from tests.benchmarks.gateway_clients import PROMPTS, Http, prompt
from tests.support.environment import Environment
from tests.support.fleets import LEVELS

RATE = 720.0
STREAMS = 100
"""Through a gateway."""


async def run(folder: Path, instances: int) -> None:
    """Start the environment, count and print."""
    clock = Clock.starting(datetime(2024, 2, 8, tzinfo=UTC), rate=RATE)
    answers = {prompt(number): dict.fromkeys(LEVELS, (40, 30.0)) for number in range(PROMPTS)}
    async with Environment(folder, answers=answers, clock=clock) as environment:
        kafka = await environment.topics("bench.")
        router = environment.routers(kafka, {"SPROUT_LOG_LEVEL": "WARNING"}).spec({})
        postgres, url = await asyncio.to_thread(postgres_spec, folder / "postgres")
        await environment.start(postgres)
        await create_database(url)
        services = ServiceEnvironment(
            bootstrap_servers=kafka.bootstrap_servers, topic_prefix=kafka.topic_prefix, database_url=url,
            fleet_file=folder / f"{kafka.topic_prefix}toml", clock=clock.environment(), log_level="WARNING",
        )  # fmt: skip
        patient = {"SPROUT_GATEWAY_PUBLISH_TIMEOUT_S": "60", "SPROUT_GATEWAY_ADMISSION_TIMEOUT_S": "60"}
        ports = free_ports(instances)
        await environment.start(router)
        for number, port in enumerate(ports):
            name = f"gateway{number}"
            await environment.start(
                service_spec("gateway", port=port, environment=services, settings=patient, name=name)
            )
        async with await open_pool(DatabaseSettings(url=SecretStr(url)), schema="gateway") as pool:
            store = KeyStore(pool, DatabaseStatus(), cache_s=0.0)
            _, key = await store.create(name="bench", tenant=None, now=datetime.now(UTC))
        for number in range(STREAMS):
            await ask(ports[0], key, number)
        first = await replies_read(ports)
        print(f"{STREAMS} streams through one of {instances} gateways, replies read: {first}", flush=True)
        for port in ports:
            for number in range(STREAMS):
                await ask(port, key, number)
        second = await replies_read(ports)
        print(f"then {STREAMS} through each, replies read: {[b - a for a, b in zip(first, second, strict=True)]}")


async def ask(port: int, key: str, number: int) -> None:
    """One stream, to its end."""
    client = Http(port, key)
    await client.ask(number, True)
    client.close()


async def replies_read(ports: list[int]) -> list[int]:
    """The replies that each gateway has read so far, its own and others."""
    found = []
    async with httpx.AsyncClient() as client:
        for port in ports:
            text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
            values = re.findall(r"sprout_gateway_replies_total\{[^}]*\} (\S+)", text)
            found.append(round(sum(map(float, values))))
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=10)
    instances: int = parser.parse_args().instances
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it logs retries for new topics
    with tempfile.TemporaryDirectory(prefix="sprout-bench-") as folder:
        uvloop.run(run(Path(folder), instances))


if __name__ == "__main__":
    main()
