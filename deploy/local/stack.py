"""The local stack: Kafka, PostgreSQL, Triton and the services as processes of this machine, bound to loopback.

In the foreground (tests, the demo) the stack is a context manager, synchronous or asynchronous; the end of the block
stops every process. `sprout up` starts it detached and `sprout down` stops it by its state file.
"""

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

import asyncpg

from deploy.local.config import StackConfig
from deploy.local.grid import TraceError
from deploy.local.java import KafkaInstallationError, Say
from deploy.local.kafka import KafkaInstallation, install_kafka, kafka_spec
from deploy.local.model_servers import ModelServers
from deploy.local.postgres import PostgresError, create_database, create_service_roles, postgres_spec
from deploy.local.processes import ManagedProcess, ProcessFailedError, ProcessSpec, Supervisor, free_ports
from deploy.local.services import (
    ServiceEnvironment,
    add_api_key,
    secret_file,
    service_settings,
    service_spec,
    sleeper_spec,
)
from deploy.local.signals import signals_as_exit, uninterrupted
from deploy.local.state import (
    API_KEY_FILE,
    GATEWAY,
    TOKEN_FILE,
    StackState,
    StateError,
    refuse_second_stack,
    remove_state,
)
from deploy.local.triton import ModelServerError
from services import SERVICES
from services.gateway.keys import new_secret
from shared.fleet import FleetError
from shared.kafka.admin import ProvisioningError, create_topics
from shared.kafka.topic_settings import all_topics
from shared.runtime.clock import Clock
from shared.runtime.database_roles import OPERATOR
from shared.runtime.settings import DatabaseSettings, KafkaSettings

TOPIC_PREFIX = "sprout."

STACK_ERRORS: Final[tuple[type[Exception], ...]] = (
    FleetError,
    KafkaInstallationError,
    ModelServerError,
    PostgresError,
    ProcessFailedError,
    ProvisioningError,
    StateError,
    TraceError,
    asyncpg.PostgresError,
)
"""The errors that a start or stop may raise; their messages say what to do."""


class LocalStack:
    """A local stack: started, used, and stopped.

    After the start, `clock`, `kafka` and `database` are what clients need, and `state` has the rest.
    """

    def __init__(
        self, config: StackConfig, models: ModelServers, *, say: Say = lambda _: None, detached: bool = False
    ) -> None:
        self.config = config
        self._models = models
        self._say = say
        self._detached = detached
        self._state: StackState | None = None
        self._supervisor = Supervisor(config.state_dir / "logs", detached=detached)
        self._handlers = ExitStack()
        self._thread: ThreadPoolExecutor | None = None
        self._database_urls: dict[str, str] = {}
        """By service, each with the service's own role and password."""

    @property
    def state(self) -> StackState:
        """The state of the running stack.

        Raises:
            StateError: the stack was not started.
        """
        if self._state is None:
            raise StateError("the local stack was not started")
        return self._state

    @property
    def clock(self) -> Clock:
        """The clock of the stack's processes."""
        return self.state.event_clock

    @property
    def kafka(self) -> KafkaSettings:
        """Settings to connect to Kafka."""
        return self.state.kafka

    @property
    def database(self) -> DatabaseSettings:
        """Settings to connect to PostgreSQL, as the operator: reads all schemas, and creates nothing."""
        return self.state.database

    def start(self) -> None:
        """Install what is missing, start every process, and wait until all are ready; after a failure stop them.

        Call it in a thread without an event loop that outlives the stack.

        Raises:
            STACK_ERRORS: a stack is running in this folder, something could not be installed, or a process exited or
                was not ready in time.
        """
        refuse_second_stack(self.config.state_dir)
        began = time.monotonic()
        kafka = install_kafka(self.config.install_dir, say=self._say)
        self._models.install(self.config, self._say)
        self._state = StackState(
            state_dir=self.config.state_dir,
            owner_pid=None if self._detached else os.getpid(),
            started_at_s=time.time(),
            model=self.config.model,
            zone=self.config.zone,
            topic_prefix=TOPIC_PREFIX,
        )
        try:
            self._start_servers(kafka)
            self._start_models()
            self._start_services()
        except BaseException:
            self.stop()
            raise
        self._save(ready=True)
        self._say(f"ready after {time.monotonic() - began:.1f} s")

    def stop(self) -> None:
        """Stop every process, the last started first; Ctrl-C does not interrupt it."""
        with uninterrupted():
            if self._supervisor.names:
                self._say("stopping")
            self._supervisor.stop_all()
            if self._state is not None:
                remove_state(self.config.state_dir)
                self._state = None

    def check(self) -> None:
        """Check that every process is running.

        Raises:
            ProcessFailedError: one exited; with the end of its log.
        """
        self._supervisor.check()

    async def watch(self, every_s: float = 0.5) -> None:
        """Check periodically until cancelled.

        Raises:
            ProcessFailedError: a process exited.
        """
        while True:
            self.check()
            await asyncio.sleep(every_s)

    def process(self, name: str) -> ManagedProcess:
        """A process by name: `kafka`, `postgres`, `triton` or a service.

        Several model servers are `triton-0`, `triton-1`, ...; more routers are `router-2`, ...; the process that puts
        endpoints to sleep is `sleeper`.

        Raises:
            KeyError: there is no process of this name.
        """
        return self._supervisor.process(name)

    def kill(self, name: str) -> None:
        """Kill a process with SIGKILL; `restart` starts it again.

        Raises:
            KeyError: there is no process of this name.
        """
        self._supervisor.kill(name)

    def restart(self, name: str) -> None:
        """Stop a process if it is running, start it again, and wait until it is ready.

        Raises:
            KeyError: no process of this name was ever started.
            ProcessFailedError: it exited, or was not ready in time.
        """
        process = self._supervisor.respawn(name)
        self._save(processes=tuple(self._supervisor.records()))
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
        # Processes end with the thread that starts them, so this thread lives as long as the stack.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-stack")
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self.start)
        except BaseException:
            # After a cancellation: abort makes the start fail in its thread.
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

    def _start_servers(self, installation: KafkaInstallation) -> None:
        folder = self.config.state_dir / "data"  # replaced at every start, unlike the installation folder
        self._say("starting Kafka and PostgreSQL")
        postgres, url = postgres_spec(folder / "postgres")
        spec, bootstrap_servers = kafka_spec(folder / "kafka-data", installation)
        kafka = self._launch(spec)
        self._launch(postgres).wait_ready()
        kafka.wait_ready()
        settings = KafkaSettings(bootstrap_servers=bootstrap_servers, topic_prefix=TOPIC_PREFIX)
        asyncio.run(create_topics(settings, specs=all_topics()))
        asyncio.run(create_database(url))
        needing = [name for name, service in SERVICES.items() if service.needs_database]
        self._database_urls = asyncio.run(create_service_roles(url, [*needing, OPERATOR]))
        self._save(bootstrap_servers=bootstrap_servers, database_url=self._database_urls[OPERATOR])

    def _start_models(self) -> None:
        if self.config.event_start is not None:
            clock = Clock(
                rate=self.config.rate,
                origin_wall_s=time.time() + self.config.lead_s,
                origin_event_s=self.config.event_start.timestamp(),
            )
            self._save(clock=clock.environment())
        models = self._models.prepare(self.config, self.state.clock)
        fleet_file = self.config.state_dir / "fleet.toml"
        models.fleet.write(fleet_file)
        self._save(fleet_file=fleet_file)
        self._say(f"starting Triton with {models.description}")
        # In parallel: most of a start is waiting.
        started = [self._launch(process) for process in models.processes]
        for process in started:
            process.wait_ready()

    def _start_services(self) -> None:
        names = [(service, service) for service in self.config.services]
        if "router" in self.config.services:
            names += [("router", f"router-{number}") for number in range(2, self.config.routers + 1)]
        specs = [sleeper_spec(self._service_environment())] if self.config.sleep else []
        settings = service_settings(self.config) if names else {}
        secret_file(self.config.state_dir / TOKEN_FILE)
        specs += [
            service_spec(
                service,
                port=port,
                environment=self._service_environment(service),
                settings=settings.get(service, {}),
                name=name,
            )
            for (service, name), port in zip(names, free_ports(len(names)), strict=True)
        ]
        if specs:
            self._say(f"starting {', '.join(spec.name for spec in specs)}")
        started = [self._launch(spec) for spec in specs]
        for process in started:
            process.wait_ready()
        if GATEWAY in self.config.services:
            key = secret_file(self.config.state_dir / API_KEY_FILE, new_secret).read_text(encoding="ascii").strip()
            asyncio.run(add_api_key(self._database_urls[GATEWAY], key, now=self.clock.now()))

    def _service_environment(self, service: str = "") -> ServiceEnvironment:
        state = self.state
        if state.fleet_file is None:
            raise StateError("services are started after the model servers")
        return ServiceEnvironment(
            bootstrap_servers=state.bootstrap_servers,
            topic_prefix=state.topic_prefix,
            database_url=self._database_urls.get(service, ""),
            fleet_file=state.fleet_file,
            draw_key_file=secret_file(state.state_dir / "draw-key"),
            clock=state.clock,
        )

    def _launch(self, spec: ProcessSpec) -> ManagedProcess:
        process = self._supervisor.spawn(spec)
        self._save(processes=tuple(self._supervisor.records()))
        return process

    def _save(self, **changes: object) -> None:
        """Update the state file at every step, so that `sprout down` finds every process if this one dies."""
        self._state = self.state.model_copy(update=changes)
        self._state.save()
