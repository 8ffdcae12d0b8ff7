"""The Triton client over TLS, configured by the fleet file, with and without client certificates."""

from collections.abc import Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deploy.triton.models import stand_in_llm
from shared.fleet import FleetError, load_fleet
from shared.inference.balancer import CircuitBreakerSettings
from shared.inference.base import EndpointUnavailable, GenerationParameters, generate
from shared.inference.pools import Pools
from shared.runtime.clock import Clock
from tests.support.certificate import Authority
from tests.support.deadlines import DEADLINE_S
from tests.support.router import MODEL, fleet_toml, question, write_workload
from tests.support.triton import serving_triton

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Servers:
    """Addresses: `plain` of a server that does not ask for client certificates, `mutual` of one that requires them."""

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
    models = [stand_in_llm(write_workload(folder / "w.jsonl"), model=MODEL)]
    with ExitStack() as stack:
        addresses = {}
        for name in ("plain", "mutual"):
            flags = (
                "--grpc-use-ssl=true",
                f"--grpc-server-cert={server.certificate}",
                f"--grpc-server-key={server.key}",
                f"--grpc-root-cert={authority.certificate}",
                f"--grpc-use-ssl-mutual={str(name == 'mutual').lower()}",
            )
            addresses[name] = stack.enter_context(serving_triton(folder / name, models, flags=flags)).address
        yield Servers(folder / "tls", addresses["plain"], addresses["mutual"])


def pools(servers: Servers, address: str, **tls: object) -> Pools:
    """The pools of a fleet file in the folder of the certificates."""
    literals = {True: "true", False: "false"}
    fields = "".join(f"{name} = {literals.get(value) or repr(value)}\n" for name, value in tls.items())
    path = servers.folder / "fleet.toml"
    path.write_text(fleet_toml([address]) + fields)
    return Pools(
        load_fleet(path),
        clock=Clock(),
        circuit_breaker=CircuitBreakerSettings(),
        on_failure=lambda _: None,
        check_interval_s=60.0,
        check_timeout_s=5.0,
    )


@asynccontextmanager
async def client(made: Pools):
    try:
        with made["p"].lease("e0", datetime.now(UTC)) as leased:
            yield leased
    finally:
        await made.close()


async def answer(made: Pools, *, timeout_s: float = DEADLINE_S) -> str:
    async with client(made) as leased:
        generation = await generate(
            leased,
            f"[INST] {question(1)} [/INST]",
            GenerationParameters(max_tokens=20),
            request_id="r",
            timeout_s=timeout_s,
        )
        return generation.text


TRUSTED = {"tls": True, "tls_ca_file": "authority.pem", "tls_server_name": "triton.internal"}
OURS = {"tls_cert_file": "client.pem", "tls_key_file": "client.key"}


async def test_a_client_that_trusts_the_servers_authority_gets_an_answer(servers):
    assert (await answer(pools(servers, servers.plain, **TRUSTED))).startswith("L0 says:")


async def test_a_client_with_a_certificate_gets_an_answer_where_one_is_required(servers):
    assert (await answer(pools(servers, servers.mutual, **TRUSTED, **OURS))).startswith("L0 says:")


@pytest.mark.parametrize(
    ("mutual", "tls"),
    [
        (False, {}),  # plain text
        (False, {"tls": True, "tls_server_name": "triton.internal"}),  # gRPC's default authorities
        (False, {**TRUSTED, "tls_ca_file": "stranger.pem"}),
        (False, {"tls": True, "tls_ca_file": "authority.pem"}),  # not the certificate's name
        (True, TRUSTED),  # without a client certificate
    ],
)
async def test_without_trust_on_both_sides_there_is_no_answer(servers, mutual, tls):
    async with client(pools(servers, servers.mutual if mutual else servers.plain, **tls)) as leased:
        with pytest.raises(EndpointUnavailable, match="e0: "):
            await leased.probe(timeout_s=3)
        assert not await leased.is_ready(timeout_s=3)


@pytest.mark.parametrize(
    ("tls", "message"),
    [
        ({**TRUSTED, "tls_ca_file": "nowhere.pem"}, r"endpoint 'e0': tls_ca_file .*nowhere\.pem cannot be used"),
        ({**TRUSTED, "tls_ca_file": "client.key"}, r"tls_ca_file .*client\.key cannot be used: .*PEM of an authority"),
        ({**TRUSTED, **OURS, "tls_key_file": "server.key"}, r"client\.pem with tls_key_file .* belong together"),
        ({**TRUSTED, **OURS, "tls_key_file": "nowhere.key"}, r"nowhere\.key cannot be used: .*No such file"),
    ],
)  # fmt: skip
def test_an_unusable_file_is_named_at_the_start(servers, tls, message):
    with pytest.raises(FleetError, match=message):
        pools(servers, servers.plain, **tls)
