"""The local stack: everything that Sprout needs, as processes of this machine, bound to loopback.

In the foreground (tests, the demo) it is a context manager, plain or asynchronous; whatever ends the block ends every
process. `sprout up` starts it detached: the state file is then all that is needed to find and stop it.
"""

import asyncio
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from deploy.local.broker import InstalledBroker, install_broker
from deploy.local.config import StackConfig
from deploy.local.interruption import signals_as_exit, uninterrupted
from deploy.local.java import Say
from deploy.local.kafka import kafka_spec
from deploy.local.mock_broker import mock_broker_spec
from deploy.local.models import ModelServers
from deploy.local.ports import free_ports
from deploy.local.postgres import create_database, postgres_spec
from deploy.local.processes import ManagedProcess, ProcessSpec, Supervisor
from deploy.local.running import refuse_second_stack
from deploy.local.services import Surroundings, service_spec
from deploy.local.state import StackState, StateError, forget_state
from deploy.local.tuning import service_settings
from shared.kafka.admin import create_topics
from shared.runtime.clock import Clock
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import TOPICS

TOPIC_PREFIX = "sprout."


class LocalStack:
    """A stack that is started, used, and stopped.

    After the start, `state` tells everything about it; `clock`, `kafka` and `database` are what clients need of it.
    """

    def __init__(
        self, config: StackConfig, models: ModelServers, *, say: Say = lambda _: None, detached: bool = False
    ) -> None:
        self.config = config
        self._models = models
        self._say = say
        self._detached = detached
        self._state: StackState | None = None
        self._supervisor = Supervisor(config.state_dir / "logs", tethered=not detached)
        self._handlers = ExitStack()
        self._thread: ThreadPoolExecutor | None = None

    @property
    def state(self) -> StackState:
        """What runs, and where.

        Raises:
            StateError: it was not started.
        """
        if self._state is None:
            raise StateError("the local stack was not started")
        return self._state

    @property
    def clock(self) -> Clock:
        """The clock that every process of the stack shares."""
        return self.state.event_clock

    @property
    def kafka(self) -> KafkaSettings:
        """How to reach the broker."""
        return self.state.kafka

    @property
    def database(self) -> DatabaseSettings:
        """How to reach PostgreSQL."""
        return self.state.database

    def start(self) -> None:
        """Install what is missing, start everything, wait until it is ready; on failure stop what was started.

        Call it where no event loop runs, from a thread that outlives the stack.

        Raises:
            StateError: a stack runs on this state folder already.
            ProcessFailedError: a process ended, or was not ready in time.
            NoJavaError, KafkaInstallationError, PostgresError, ModelServerError: something could not be prepared.
        """
        refuse_second_stack(self.config)
        began = time.monotonic()
        broker = install_broker(self.config.broker, self.config.install_dir, say=self._say)
        self._models.install(self.config, self._say)
        self._state = StackState(
            state_dir=self.config.state_dir,
            owner_pid=None if self._detached else os.getpid(),
            started_at_s=time.time(),
            broker=broker.kind,
            model=self.config.model,
            zone=self.config.zone,
            topic_prefix=TOPIC_PREFIX,
        )
        try:
            self._start_servers(broker)
            self._start_models()
            self._start_services()
        except BaseException:
            self.stop()
            raise
        self._note(ready=True)
        self._say(f"ready after {time.monotonic() - began:.1f} s")

    def stop(self) -> None:
        """Stop every process, the last started first; Ctrl-C does not interrupt it. Nothing happens where none runs."""
        with uninterrupted():
            if self._supervisor.names:
                self._say("stopping")
            self._supervisor.stop_all()
            if self._state is not None:
                forget_state(self.config.state_dir)
                self._state = None

    def check(self) -> None:
        """Say so if any process ended; call it now and then.

        Raises:
            ProcessFailedError: for the first that did, with the end of its log.
        """
        self._supervisor.check()

    async def watch(self, every_s: float = 0.5) -> None:
        """Check for ever; returns only by raising.

        Raises:
            ProcessFailedError: a process ended.
        """
        while True:
            self.check()
            await asyncio.sleep(every_s)

    def process(self, name: str) -> ManagedProcess:
        """One of the processes: `kafka`, `postgres`, `triton`, a service; further routers are `router-2`, ...

        Raises:
            KeyError: none of this name.
        """
        return self._supervisor.process(name)

    def kill(self, name: str) -> None:
        """Kill a process with SIGKILL, as a crash would; `restart` brings it back.

        Raises:
            KeyError: none of this name.
        """
        self._supervisor.kill(name)

    def restart(self, name: str) -> None:
        """Start a process again as it was, after stopping it if it still runs; returns once it is ready.

        Raises:
            KeyError: none of this name was ever started.
            ProcessFailedError: it ended, or was not ready in time.
        """
        process = self._supervisor.respawn(name)
        self._note(processes=tuple(self._supervisor.records()))
        process.wait_ready()

    def __enter__(self) -> Self:
        self._handlers.enter_context(signals_as_exit())
        try:
            self.start()
        except BaseException:
            self._handlers.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            self._handlers.close()

    async def __aenter__(self) -> Self:
        self._handlers.enter_context(signals_as_exit())
        # The processes die with the thread that starts them, so it is one of their own that lives as long.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-stack")
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self.start)
        except BaseException:
            # Cancelled while it starts: the thread's own failure, or this, stops what runs.
            self._supervisor.abort()
            await self._leave(self._thread)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            await self._leave(self._thread)

    async def _leave(self, thread: ThreadPoolExecutor) -> None:
        try:
            with uninterrupted():
                await asyncio.get_running_loop().run_in_executor(thread, self.stop)
        finally:
            thread.shutdown()
            self._handlers.close()

    def _start_servers(self, broker: InstalledBroker) -> None:
        folder = self.config.state_dir / "data"  # replaced at every start, unlike what is installed
        self._say(f"starting {'Kafka' if broker.kind == 'kafka' else 'the in-memory broker'} and PostgreSQL")
        postgres, url = postgres_spec(folder / "postgres")
        if broker.java is not None and broker.libs is not None:
            spec, bootstrap_servers = kafka_spec(folder / "kafka-data", libs=broker.libs, java=broker.java)
            kafka = self._launch(spec)
            self._launch(postgres).wait_ready()
            kafka.wait_ready()
            settings = KafkaSettings(bootstrap_servers=bootstrap_servers, topic_prefix=TOPIC_PREFIX)
            asyncio.run(create_topics(settings))
        else:
            names = [TOPIC_PREFIX + topic.name for topic in TOPICS]
            spec, address_file = mock_broker_spec(folder / "in-memory-broker", topics=names)
            self._launch(spec).wait_ready()
            self._launch(postgres).wait_ready()
            bootstrap_servers = address_file.read_text(encoding="utf-8")
        asyncio.run(create_database(url))
        self._note(bootstrap_servers=bootstrap_servers, database_url=url)

    def _start_models(self) -> None:
        if self.config.event_start is not None:
            clock = Clock(
                rate=self.config.rate,
                origin_wall_s=time.time() + self.config.lead_s,
                origin_event_s=self.config.event_start.timestamp(),
            )
            self._note(clock=clock.environment())
        models = self._models.prepare(self.config, self.state.clock)
        fleet_file = self.config.state_dir / "fleet.toml"
        models.fleet.write(fleet_file)
        self._note(fleet_file=fleet_file)
        self._say(f"starting Triton with {models.description}")
        self._launch(models.process).wait_ready()

    def _start_services(self) -> None:
        if not self.config.services:
            return
        names = [(service, service) for service in self.config.services]
        if "router" in self.config.services:
            names += [("router", f"router-{number}") for number in range(2, self.config.routers + 1)]
        self._say(f"starting {', '.join(name for _, name in names)}")
        settings = service_settings(self.config)
        started = [
            self._launch(self._service(service, name, port, settings.get(service, {})))
            for (service, name), port in zip(names, free_ports(len(names)), strict=True)
        ]
        for process in started:
            process.wait_ready()

    def _service(self, service: str, name: str, port: int, settings: Mapping[str, str]) -> ProcessSpec:
        state = self.state
        if state.fleet_file is None:
            raise StateError("the fleet file is written before the services start")
        around = Surroundings(
            bootstrap_servers=state.bootstrap_servers,
            topic_prefix=state.topic_prefix,
            database_url=state.database_url,
            fleet_file=state.fleet_file,
            clock=state.clock,
        )
        return service_spec(service, port=port, around=around, settings=settings, name=name)

    def _launch(self, spec: ProcessSpec) -> ManagedProcess:
        process = self._supervisor.spawn(spec)
        self._note(processes=tuple(self._supervisor.records()))
        return process

    def _note(self, **changes: object) -> None:
        """Keep the state file true: should this process die now, whatever it started detached can be found."""
        self._state = self.state.model_copy(update=changes)
        self._state.save()
