"""Kafka with credentials and TLS: services and command line, accepted and rejected."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import pytest
from typer.testing import CliRunner

from deploy.local.config import default_state_dir
from deploy.local.java import KafkaInstallationError
from deploy.local.kafka import Listener, install_kafka, kafka_spec
from deploy.local.processes import Supervisor, free_ports
from shared.runtime.settings import KafkaSettings
from tests.support.certificate import Authority, Certificate
from tests.support.deadlines import DEADLINE_S, until
from tests.support.router import RouterProcess, fleet_toml, question
from tools.cli.console import Exit
from tools.cli.main import app

pytestmark = pytest.mark.integration

USER, PASSWORD, WRONG = "sprout-user", "v3ry-s3cret", "wr0ng-s3cret"
JAAS = "org.apache.kafka.common.security"


@dataclass(frozen=True)
class SecuredKafka:
    """One broker with a listener for each way in."""

    listeners: dict[str, Listener]
    authority: Authority
    client: Certificate
    token_url: str

    def way(self, name: str, *, password: str = PASSWORD) -> dict[str, str]:
        """The environment of a client that comes in that way."""
        login = {"SASL_USERNAME": USER, "SASL_PASSWORD": password}
        ca = {"SSL_CA_FILE": str(self.authority.certificate)}
        ways: dict[str, tuple[str, dict[str, str]]] = {
            "plain": ("SASL", {"SECURITY_PROTOCOL": "SASL_PLAINTEXT", "SASL_MECHANISM": "PLAIN", **login}),
            "scram": ("SASL", {"SECURITY_PROTOCOL": "SASL_PLAINTEXT", "SASL_MECHANISM": "SCRAM-SHA-256", **login}),
            "scram over tls": (
                "SASLTLS",
                {"SECURITY_PROTOCOL": "SASL_SSL", "SASL_MECHANISM": "SCRAM-SHA-512", **login, **ca},
            ),
            "client certificate": (
                "MUTUAL",
                {
                    "SECURITY_PROTOCOL": "SSL",
                    **ca,
                    "SSL_CERTIFICATE_FILE": str(self.client.certificate),
                    "SSL_KEY_FILE": str(self.client.key),
                    "SSL_KEY_PASSWORD": "key-secret",
                },
            ),
            "oauth": (
                "OAUTH",
                {
                    "SECURITY_PROTOCOL": "SASL_PLAINTEXT",
                    "SASL_MECHANISM": "OAUTHBEARER",
                    "OAUTH_TOKEN_URL": self.token_url,
                    **login,
                },
            ),
            "another name": ("OTHERNAME", {"SECURITY_PROTOCOL": "SSL", **ca}),
        }
        listener, variables = ways[name]
        variables["BOOTSTRAP_SERVERS"] = self.listeners[listener].address
        return {f"SPROUT_KAFKA_{variable}": value for variable, value in variables.items()}


@pytest.fixture(scope="module")
def secured(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    try:
        installation = install_kafka(default_state_dir(), say=print)
    except KafkaInstallationError as error:
        pytest.skip(f"no real Kafka: {error}")
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    server = authority.issue("server")
    other = authority.issue("other", alternative="DNS:kafka.example")

    def tls(certificate: Certificate) -> dict[str, str]:
        return {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(certificate.both),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(authority.certificate),
        }

    scram = {
        f"scram-sha-{bits}.sasl.jaas.config": f"{JAAS}.scram.ScramLoginModule required;" for bits in ("256", "512")
    }
    plain = {"plain.sasl.jaas.config": f'{JAAS}.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'}
    login = f'{JAAS}.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";'
    ports = free_ports(5)
    listeners = [
        Listener(
            name="SASL",
            protocol="SASL_PLAINTEXT",
            port=ports[0],
            properties={"sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512", **scram, **plain},
        ),
        Listener(
            name="SASLTLS",
            protocol="SASL_SSL",
            port=ports[1],
            properties={"sasl.enabled.mechanisms": "SCRAM-SHA-512", **scram, **tls(server)},
        ),
        Listener(
            name="MUTUAL", protocol="SSL", port=ports[2], properties={"ssl.client.auth": "required", **tls(server)}
        ),
        Listener(
            name="OAUTH",
            protocol="SASL_PLAINTEXT",
            port=ports[4],
            # Kafka's own check for development: it accepts tokens without a signature.
            properties={"sasl.enabled.mechanisms": "OAUTHBEARER", "oauthbearer.sasl.jaas.config": login},
        ),
        Listener(name="OTHERNAME", protocol="SSL", port=ports[3], properties=tls(other)),
    ]
    spec, _ = kafka_spec(
        tmp_path_factory.mktemp("kafka"),
        installation,
        name="secured-kafka",
        listeners=listeners,
        scram_users={USER: PASSWORD},
    )
    supervisor.start(spec)
    client = authority.issue("client", password="key-secret")
    with ThreadingHTTPServer(("127.0.0.1", 0), TokenEndpoint) as endpoint:
        threading.Thread(target=endpoint.serve_forever, daemon=True).start()
        token_url = f"http://127.0.0.1:{endpoint.server_port}/token"
        yield SecuredKafka({one.name: one for one in listeners}, authority, client, token_url)
        endpoint.shutdown()
    supervisor.stop(spec.name)


class TokenEndpoint(BaseHTTPRequestHandler):
    """Answers the client-credentials grant with a token that has no signature."""

    def do_POST(self) -> None:
        expected = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        form = self.rfile.read(int(self.headers["Content-Length"]))
        accepted = self.headers["Authorization"] == expected and form == b"grant_type=client_credentials"
        now = time.time()
        parts = ({"alg": "none"}, {"sub": USER, "iat": now, "exp": now + 300})
        token = "".join(base64.urlsafe_b64encode(json.dumps(one).encode()).decode().rstrip("=") + "." for one in parts)
        body = json.dumps({"access_token": token, "expires_in": 300} if accepted else {"error": "invalid_client"})
        self.send_response(200 if accepted else 401)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Sets the environment, of this process and so of those that it starts; returns what they read from it."""

    def settings(variables: dict[str, str]) -> KafkaSettings:
        prefix = f"t{uuid4().hex[:10]}."
        monkeypatch.setenv("SPROUT_LOCAL_STATE", str(tmp_path))
        for name in ("TOPIC_PREFIX", "GROUP_PREFIX"):
            monkeypatch.setenv(f"SPROUT_KAFKA_{name}", prefix)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return KafkaSettings()

    return settings


async def sprout(*arguments: str):
    return await asyncio.to_thread(CliRunner().invoke, app, list(arguments))


async def ended(supervisor: Supervisor, name: str) -> None:
    process = supervisor.process(name)
    await until(lambda: not process.alive)


@pytest.mark.parametrize("way", ["plain", "scram", "scram over tls", "client certificate", "oauth"])
async def test_topics_are_created_and_a_request_answered(way, secured, triton, enter, supervisor, tmp_path):
    kafka = enter(secured.way(way))
    created = await sprout("topics", "create")
    assert created.exit_code == 0, created.output
    listed = await sprout("topics", "list")
    assert listed.exit_code == 0, listed.output
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(fleet_toml([triton.address]))
    routers = RouterProcess(supervisor, kafka, fleet)
    name = routers.start()
    try:
        sent = await sprout("send", question(3), "--directive", "L2", "--footprint-wait", "0")
        assert sent.exit_code == 0, sent.output
        assert "L2 says: word" in sent.output
        routers.stop_gently(name, within_s=DEADLINE_S)
        assert PASSWORD not in routers.log(name)
    finally:
        supervisor.stop(name)


@pytest.mark.parametrize(
    ("way", "changes", "advice", "cause"),
    [
        (
            "plain",
            {"SPROUT_KAFKA_SASL_PASSWORD": WRONG},
            f"the credentials of user '{USER}' for PLAIN",
            "Authentication",
        ),
        ("scram", {"SPROUT_KAFKA_SASL_PASSWORD": WRONG}, f"credentials of user '{USER}' for SCRAM", "Authentication"),
        ("scram over tls", {"SPROUT_KAFKA_SASL_MECHANISM": "PLAIN"}, f"credentials of user '{USER}' for PLAIN", "Sasl"),
        ("another name", {}, "the certificates (SPROUT_KAFKA_SSL_*)", "IP address mismatch"),
        ("another name", {"SPROUT_KAFKA_SSL_CA_FILE": None}, "the certificates (SPROUT_KAFKA_SSL_*)", "self-signed"),
    ],
)
async def test_a_rejected_client_says_what_to_check_and_a_service_ends(
    way, changes, advice, cause, secured, enter, supervisor, tmp_path
):
    variables = secured.way(way)
    kafka = enter({name: value for name, value in (variables | changes).items() if value is not None})
    created = await sprout("topics", "create")
    assert (created.exit_code, advice in created.output) == (Exit.NOT_RUNNING, True), created.output
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(fleet_toml(["127.0.0.1:9"]))
    routers = RouterProcess(supervisor, kafka, fleet)
    name = routers.start_unready(SPROUT_KAFKA_CONNECT_TIMEOUT_S="10")
    await ended(supervisor, name)
    log = routers.log(name)
    assert "Kafka is not ready after 10 s: no broker answers" in log, log
    assert advice in log, log
    assert cause in log, log
    for secret in (PASSWORD, WRONG):
        assert secret not in log + created.output
    supervisor.stop(name)


async def test_the_name_in_the_certificate_may_be_left_unchecked(secured, enter):
    enter(secured.way("another name") | {"SPROUT_KAFKA_SSL_CHECK_HOSTNAME": "false"})
    created = await sprout("topics", "create")
    assert created.exit_code == 0, created.output


async def test_settings_that_contradict_each_other_end_a_service_with_one_line(secured, enter, supervisor, tmp_path):
    kafka = enter(secured.way("plain"))
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(fleet_toml(["127.0.0.1:9"]))
    routers = RouterProcess(supervisor, kafka, fleet)
    name = routers.start_unready(SPROUT_KAFKA_SECURITY_PROTOCOL="PLAINTEXT")
    await ended(supervisor, name)
    log = routers.log(name)
    assert log.startswith("router: KafkaSettings: Value error, SPROUT_KAFKA_SASL_MECHANISM, "), log
    assert len(log.splitlines()) == 1
    assert PASSWORD not in log
    supervisor.stop(name)
