"""Model servers behind TLS, as the fleet file names them: Triton's own, with and without certificates of clients."""

from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.local.config import default_state_dir
from deploy.local.processes import ProcessSpec, Supervisor
from deploy.local.triton import free_triton_ports, install, ready_probe
from deploy.triton.models import stand_in_llm
from deploy.triton.repository import write_repository
from shared.fleet import FleetError, load_fleet
from shared.inference.balancer import CoolDownRules
from shared.inference.base import EndpointUnavailable, GenerationParameters
from shared.inference.pool import Pools
from shared.runtime.clock import Clock
from tests.support.certificate import Authority
from tests.support.router import MODEL, fleet_toml, question, write_workload

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Servers:
    """Addresses: `plain` is one whose clients need no certificate, `mutual` one whose clients do."""

    folder: Path
    plain: str
    mutual: str


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("triton")
    authority = Authority(folder / "tls")
    Authority(folder / "tls", "stranger")
    server = authority.issue("server", alternative="DNS:triton.internal")
    authority.issue("client")
    installation = install(default_state_dir(), say=print)
    write_repository(folder / "models", [stand_in_llm(write_workload(folder / "w.jsonl"), model=MODEL)])
    supervisor = Supervisor(folder / "logs")
    addresses = {}
    try:
        for name in ("plain", "mutual"):
            ports = free_triton_ports()
            flags = (
                "--grpc-use-ssl=true",
                f"--grpc-server-cert={server.certificate}",
                f"--grpc-server-key={server.key}",
                f"--grpc-root-cert={authority.certificate}",
                f"--grpc-use-ssl-mutual={str(name == 'mutual').lower()}",
            )
            supervisor.start(
                ProcessSpec(
                    name=name,
                    command=(*installation.command(folder / "models", ports), *flags),
                    environment=installation.environment(Clock().environment()),
                    ready=ready_probe(ports),
                )
            )
            addresses[name] = f"127.0.0.1:{ports.grpc}"
        yield Servers(folder / "tls", addresses["plain"], addresses["mutual"])
    finally:
        supervisor.stop_all()


def pools(servers: Servers, address: str, **tls: object) -> Pools:
    """Of a fleet file beside the certificates."""
    words = {True: "true", False: "false"}
    fields = "".join(f"{name} = {words.get(value) or repr(value)}\n" for name, value in tls.items())
    path = servers.folder / "fleet.toml"
    path.write_text(fleet_toml([address]) + fields)
    return Pools(
        load_fleet(path),
        clock=Clock(),
        rules=CoolDownRules(),
        on_failure=lambda _: None,
        check_interval_s=60.0,
        check_timeout_s=5.0,
    )


@asynccontextmanager
async def client(made: Pools):
    try:
        with made["p"].lease("e0") as leased:
            yield leased
    finally:
        await made.close()


async def answer(made: Pools, *, timeout_s: float = 20.0) -> str:
    async with client(made) as asked:
        generation = await asked.generate(
            f"[INST] {question(1)} [/INST]",
            GenerationParameters(max_tokens=20),
            request_id="r",
            timeout_s=timeout_s,
        )
        return generation.text


TRUSTED = {"tls": True, "tls_ca_file": "authority.pem", "tls_server_name": "triton.internal"}
OURS = {"tls_cert_file": "client.pem", "tls_key_file": "client.key"}


async def test_an_encrypted_endpoint_answers_who_trusts_its_authority(servers):
    assert (await answer(pools(servers, servers.plain, **TRUSTED))).startswith("L0 says:")


async def test_an_endpoint_that_asks_for_a_certificate_answers_who_has_one(servers):
    assert (await answer(pools(servers, servers.mutual, **TRUSTED, **OURS))).startswith("L0 says:")


@pytest.mark.parametrize(
    ("mutual", "tls"),
    [
        (False, {}),  # plain text
        (False, {"tls": True, "tls_server_name": "triton.internal"}),  # gRPC's own authorities
        (False, {**TRUSTED, "tls_ca_file": "stranger.pem"}),
        (False, {"tls": True, "tls_ca_file": "authority.pem"}),  # another name than the certificate's
        (True, TRUSTED),  # no certificate of ours
    ],
)
async def test_who_does_not_trust_or_is_not_trusted_gets_no_answer(servers, mutual, tls):
    async with client(pools(servers, servers.mutual if mutual else servers.plain, **tls)) as asked:
        with pytest.raises(EndpointUnavailable, match="e0: "):
            await asked.probe(timeout_s=3)
        assert not await asked.is_ready(timeout_s=3)


@pytest.mark.parametrize(
    ("tls", "said"),
    [
        ({**TRUSTED, "tls_ca_file": "nowhere.pem"}, r"endpoint 'e0': tls_ca_file .*nowhere\.pem cannot be used"),
        ({**TRUSTED, "tls_ca_file": "client.key"}, r"tls_ca_file .*client\.key cannot be used: .*PEM of an authority"),
        ({**TRUSTED, **OURS, "tls_key_file": "server.key"}, r"client\.pem with tls_key_file .* belong together"),
        ({**TRUSTED, **OURS, "tls_key_file": "nowhere.key"}, r"nowhere\.key cannot be used: .*No such file"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_do_is_named_at_the_start(servers, tls, said):
    with pytest.raises(FleetError, match=said):
        pools(servers, servers.plain, **tls)
