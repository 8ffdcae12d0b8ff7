"""Apache Kafka without Docker: one broker in KRaft mode, its jars fetched by Maven."""

import asyncio
import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from deploy.local.java import Java, KafkaInstallationError, Say, ensure_java
from deploy.local.processes import LOOPBACK, Probe, ProcessSpec, free_ports

HEAP = "256m"
LARGEST_MESSAGE_BYTES = 9 * 1024 * 1024
"""The largest topic-level limit plus the overhead of a batch."""

# For little memory and a quick start, not for peak throughput.
JVM_FLAGS = ("-Xms128m", f"-Xmx{HEAP}", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")


@dataclass(frozen=True, slots=True)
class KafkaInstallation:
    """An installed Kafka.

    Attributes:
        libs: the folder of its jars.
    """

    java: Java
    libs: Path


def install_kafka(install_dir: Path, *, say: Say) -> KafkaInstallation:
    """Find or install Java, then fetch Kafka's jars with Maven, once; later calls find both.

    Raises:
        KafkaInstallationError: there is no Java and none could be installed, or Maven is missing or failed.
    """
    java = ensure_java(install_dir, say)
    return KafkaInstallation(java, _fetch_jars(install_dir, java, say))


def _fetch_jars(install_dir: Path, java: Java, say: Say) -> Path:
    pom = resources.files("deploy.local").joinpath("maven/pom.xml").read_bytes()
    libs = install_dir / "kafka" / f"libs-{hashlib.sha256(pom).hexdigest()[:12]}"
    if libs.is_dir():
        return libs
    maven = shutil.which("mvn")
    if maven is None:
        raise KafkaInstallationError(
            "Kafka's jars come from Maven Central, and there is no 'mvn' on PATH. Install Apache Maven, for example "
            "with 'apt-get install maven'. 'docker compose up' needs neither Maven nor Java on this machine"
        )
    say("fetching Apache Kafka from Maven Central (about 50 MB, once)")
    libs.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=libs.parent, prefix="fetching-") as scratch:
        folder = Path(scratch)
        (folder / "pom.xml").write_bytes(pom)
        _run(
            [maven, "-q", "-B", "-f", folder / "pom.xml", "dependency:copy-dependencies",
             f"-DoutputDirectory={folder / 'libs'}"],
            "Maven could not fetch Kafka; is Maven Central reachable?",
            environment={} if os.environ.get("JAVA_HOME") else {"JAVA_HOME": str(java.home)},
            timeout_s=900,
        )  # fmt: skip
        try:
            # The rename is atomic: a folder of this name is complete. If two processes fetch, one rename wins.
            (folder / "libs").rename(libs)
        except OSError:
            if not libs.is_dir():
                raise
    return libs


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A listener in addition to the plaintext one.

    Attributes:
        protocol: SSL, SASL_PLAINTEXT or SASL_SSL.
        properties: Kafka's properties of this listener, such as `ssl.keystore.location`.
    """

    name: str
    protocol: str
    port: int
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Its bootstrap servers."""
        return f"{LOOPBACK}:{self.port}"


def kafka_spec(
    data_dir: Path,
    installation: KafkaInstallation,
    *,
    name: str = "kafka",
    listeners: Sequence[Listener] = (),
    scram_users: Mapping[str, str] | None = None,
    further: Mapping[str, str] | None = None,
) -> tuple[ProcessSpec, str]:
    """Format the storage of a new broker.

    Args:
        data_dir: its contents are replaced.
        listeners: in addition to the plaintext one.
        scram_users: passwords by user, for listeners with SCRAM.
        further: Kafka's properties of the broker, beside those that it always has.

    Returns:
        The broker's process, and the bootstrap servers of its plaintext listener.

    Raises:
        KafkaInstallationError: the storage could not be formatted.
    """
    shutil.rmtree(data_dir, ignore_errors=True)
    data_dir.mkdir(parents=True)
    port, controller_port = free_ports(2)
    bootstrap = f"{LOOPBACK}:{port}"
    properties = data_dir / "server.properties"
    settings = {**_properties(port, controller_port, data_dir / "log", listeners), **(further or {})}
    properties.write_text("".join(f"{key}={value}\n" for key, value in settings.items()), encoding="utf-8")
    base = (
        str(installation.java.program), *JVM_FLAGS, "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
        "-cp", f"{installation.libs}/*",
    )  # fmt: skip
    cluster_id = urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
    _run(
        [*base, "kafka.tools.StorageTool", "format", "--standalone", f"--cluster-id={cluster_id}",
         f"--config={properties}", *_scram_arguments(scram_users or {})],
        f"Kafka's storage in {data_dir} could not be formatted",
        timeout_s=120,
    )  # fmt: skip
    spec = ProcessSpec(
        name=name,
        command=(*base, "kafka.Kafka", str(properties)),
        directory=data_dir,
        ready=kafka_probe(bootstrap),
        ready_timeout_s=120.0,
        stop_signal=signal.SIGTERM,
        stop_grace_s=15.0,
        port=port,
    )
    return spec, bootstrap


def kafka_probe(bootstrap_servers: str) -> Probe:
    """Ready once the broker has joined its cluster. Call the probe in a thread without an event loop."""
    host, _, port = bootstrap_servers.rpartition(":")

    async def ask() -> str | None:
        admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers, request_timeout_ms=2_000)
        try:
            await admin.start()
            cluster = await admin.describe_cluster()
        except (KafkaError, OSError) as error:
            return f"no broker answers at {bootstrap_servers} ({type(error).__name__})"
        finally:
            await admin.close()
        return None if cluster["brokers"] else f"the broker at {bootstrap_servers} has not joined its cluster yet"

    def probe() -> str | None:
        try:  # aiokafka logs an error for a closed port
            socket.create_connection((host, int(port)), timeout=2.0).close()
        except OSError as error:
            return f"port {port}: {error}"
        return asyncio.run(ask())

    return probe


def _scram_arguments(users: Mapping[str, str]) -> list[str]:
    return [
        argument
        for user, password in users.items()
        for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
        for argument in ("--add-scram", f"{mechanism}=[name={user},password={password}]")
    ]


def _properties(port: int, controller_port: int, log_dir: Path, listeners: Sequence[Listener]) -> dict[str, str]:
    addresses = {"PLAINTEXT": port, "CONTROLLER": controller_port} | {one.name: one.port for one in listeners}
    listening = ",".join(f"{listener}://{LOOPBACK}:{number}" for listener, number in addresses.items())
    protocols = {"PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT"} | {one.name: one.protocol for one in listeners}
    settings = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.bootstrap.servers": f"{LOOPBACK}:{controller_port}",
        "listeners": listening,
        "advertised.listeners": listening,
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": ",".join(f"{one}:{protocol}" for one, protocol in protocols.items()),
        "log.dirs": str(log_dir),
        "auto.create.topics.enable": "false",
        "message.max.bytes": str(LARGEST_MESSAGE_BYTES),
        "replica.fetch.max.bytes": str(LARGEST_MESSAGE_BYTES),
        # One broker holds every replica.
        "default.replication.factor": "1",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        # No other broker could take over from one that is late because the machine is busy; the default is 9,000.
        "broker.session.timeout.ms": "60000",
        # A broker that was killed cannot register again before its old session has ended; the default is 60,000, too.
        "initial.broker.registration.timeout.ms": "120000",
        # The first consumer waits until they are created; the default is 50.
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.num.partitions": "2",
        # By default the first member of a group waits three seconds for others.
        "group.initial.rebalance.delay.ms": "0",
        # Every partition maps two index files of this size.
        "log.index.size.max.bytes": str(1024 * 1024),
        "num.network.threads": "2",
        "num.io.threads": "4",
        "log.cleaner.dedupe.buffer.size": str(4 * 1024 * 1024),
    }
    for one in listeners:
        settings |= {f"listener.name.{one.name.lower()}.{key}": value for key, value in one.properties.items()}
    return settings


def _run(
    command: list[str | Path], failure: str, *, timeout_s: float, environment: dict[str, str] | None = None
) -> None:
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KafkaInstallationError(f"{failure}: {error}") from error
    if answer.returncode != 0:
        output = (answer.stdout + answer.stderr).strip().splitlines()[-15:]
        raise KafkaInstallationError(f"{failure}:\n" + "\n".join(output))
