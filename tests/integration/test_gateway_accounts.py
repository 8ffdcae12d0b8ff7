"""Limits, footprints and usage of the gateway's keys, in PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from deploy.local.postgres import create_database, postgres_spec
from deploy.local.processes import Supervisor
from services.gateway.accounts import Accounts, DeferredError
from services.gateway.admission import Admission
from services.gateway.errors import ApiError
from services.gateway.estimates import Estimate
from services.gateway.keys import ApiKey, KeyStore, Limits, create_key, revoke_key, set_limits, store_key
from services.gateway.metrics import GatewayMetrics
from services.gateway.settings import GatewaySettings
from services.gateway.usage import footprint_of
from shared.messages import (
    Decision,
    ErrorDetail,
    Footprint,
    GenerationRequest,
    GenerationResponse,
    SamplingParameters,
    Timing,
    Usage,
)
from shared.runtime.clock import ManualClock
from shared.runtime.database import DatabaseStatus, DatabaseUnavailableError, migrate, open_pool
from shared.runtime.settings import DatabaseSettings
from tests.support.deadlines import DEADLINE_S

pytestmark = pytest.mark.integration

NOON = datetime(2026, 6, 15, 12, 30, tzinfo=UTC)
MAX_TOKENS = 95
"""With the prompt a request counts as 100."""


@dataclass
class Bench:
    """Two gateways' accounts in one database."""

    pool: asyncpg.Pool
    clock: ManualClock
    accounts: tuple[Accounts, Accounts]
    numbers: list[int] = field(default_factory=lambda: [0])

    async def key(self, limits: Limits = Limits(), *, tenant: str | None = None) -> ApiKey:  # noqa: B008 - immutable
        async with self.pool.acquire() as connection:
            key, _ = await create_key(connection, name="test", tenant=tenant, now=NOON)
            await set_limits(connection, f"key/{key.id}", limits)
        return key

    def request(self, **changes: Any) -> GenerationRequest:
        self.numbers[0] += 1
        sampling = SamplingParameters(max_tokens=MAX_TOKENS)
        return GenerationRequest(id=f"r{self.numbers[0]}", model="m", prompt="hey", sampling=sampling, **changes)

    async def row(self, request_id: str | None) -> asyncpg.Record:
        return await self.pool.fetchrow("SELECT * FROM requests WHERE id = $1", request_id)

    async def sums(self, key: ApiKey) -> dict[str, Any]:
        return dict(await self.pool.fetchrow("SELECT * FROM hours WHERE key_id = $1", key.id) or {})


@pytest.fixture
async def bench(database: DatabaseSettings) -> AsyncIterator[Bench]:
    pool = await open_pool(database, schema="gateway")
    await migrate(pool, schema="gateway", package="services.gateway.migrations")
    clock = ManualClock(NOON)
    both = make_accounts(pool, clock), make_accounts(pool, clock, serve_without_database=True)
    for one in both:
        await one.renew()
    running = [asyncio.create_task(one.run()) for one in both]
    yield Bench(pool, clock, both)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await pool.close()


def make_accounts(pool: asyncpg.Pool, clock: ManualClock, **changes: Any) -> Accounts:
    return Accounts(
        pool,
        DatabaseStatus(),
        levels=("L0", "L1", "L2"),
        settings=GatewaySettings(lease_s=600, admission_timeout_s=30, **changes),
        clock=clock,
        metrics=GatewayMetrics(CollectorRegistry()),
    )


async def refusal(attempt: Any) -> str:
    with pytest.raises(ApiError) as caught:
        await attempt
    return f"{caught.value.body.type} {caught.value.body.message}"


def response(request: GenerationRequest, **changes: Any) -> GenerationResponse:
    values: dict[str, Any] = {
        "request_id": request.id, "record": f"requests/0/{request.id}/1", "model": "m", "status": "ok", "text": "yes",
        "endpoint": "e0", "requested_at": NOON, "usage": Usage(prompt_tokens=7, completion_tokens=3, source="server"),
        "decision": Decision(source="policy", group="g", pool="p", level="L1", zone="GB", propensity=1.0),
        "timing": Timing(received_at=NOON, started_at=NOON, finished_at=NOON),
    }  # fmt: skip
    return GenerationResponse.model_validate(values | changes)


def footprint(request: GenerationRequest, **changes: Any) -> Footprint:
    values: dict[str, Any] = {
        "request_id": request.id, "record": f"requests/0/{request.id}/1", "purpose": "request", "model": "m",
        "group": "g", "pool": "p", "level": "L1", "zone": "GB", "endpoint": "e0", "started_at": NOON,
        "finished_at": NOON, "processing_s": 1.0, "prompt_tokens": 8, "completion_tokens": 4, "energy_j": 50.0,
        "intensity_g_per_kwh": 300.0, "operational_g": 1.5, "embodied_g": 0.5, "total_g": 2.0,
    }  # fmt: skip
    return Footprint.model_validate(values | changes)


async def same_minute(pool: asyncpg.Pool, needed_s: float = 20.0) -> None:
    """Wait until the minute of PostgreSQL's clock lasts long enough."""
    left_s = await pool.fetchval("SELECT 60 - extract(second FROM clock_timestamp())::float")
    if left_s < needed_s:
        await asyncio.sleep(left_s + 0.1)


async def test_two_gateways_admit_exactly_the_limit_of_a_key_and_of_its_tenant(bench: Bench):
    first, second = [await bench.key(Limits(requests_per_minute=8), tenant="t") for _ in range(2)]
    async with bench.pool.acquire() as connection:
        await set_limits(connection, "tenant/t", Limits(requests_per_minute=10))
    await same_minute(bench.pool)
    attempts = [bench.accounts[number % 2].admit(first, bench.request()) for number in range(50)]
    found = await asyncio.gather(*attempts, return_exceptions=True)
    assert sum(not isinstance(one, Exception) for one in found) == 8
    attempts = [bench.accounts[number % 2].admit(second, bench.request()) for number in range(50)]
    found = await asyncio.gather(*attempts, return_exceptions=True)
    admitted = [one for one in found if not isinstance(one, Exception)]
    assert len(admitted) == 2
    assert {one.headers["x-ratelimit-remaining-requests"] for one in admitted} == {"0", "1"}
    assert {one.headers["x-ratelimit-limit-requests"] for one in admitted} == {"10"}
    # A new minute counts from nothing.
    await bench.pool.execute("UPDATE limits SET minute_wall = minute_wall - interval '1 minute'")
    await bench.accounts[0].admit(second, bench.request())


async def test_tokens_are_reserved_and_corrected_by_the_answer(bench: Bench):
    key, accounts = await bench.key(Limits(tokens_per_minute=250)), bench.accounts[0]
    await same_minute(bench.pool)
    first = await accounts.admit(key, bench.request())
    assert first.headers["x-ratelimit-remaining-tokens"] == "150"
    second = await accounts.admit(key, bench.request())
    assert "tokens" in await refusal(accounts.admit(key, bench.request()))
    accounts.finish(first, response(first.request))  # 10 tokens
    failed = response(second.request, status="error", error=ErrorDetail(code="no_endpoint", message=""), usage=None)
    accounts.finish(second, failed)  # none
    await accounts.written()
    third = await accounts.admit(key, bench.request())
    assert third.headers["x-ratelimit-remaining-tokens"] == str(250 - 10 - 100)
    accounts.finish(third, None)  # nobody knows: its reservation stays
    accounts.finish(third, response(third.request))  # what is over is not booked again
    await accounts.written()
    assert await bench.pool.fetchval("SELECT used_tokens FROM limits WHERE account = $1", f"key/{key.id}") == 110


async def test_lines_of_batches_wait_for_tokens_and_leave_half_of_them_to_other_requests(bench: Bench):
    key, accounts = (
        await bench.key(Limits(requests_per_minute=1, tokens_per_minute=480, concurrent_requests=1)),
        bench.accounts[0],
    )
    await same_minute(bench.pool)
    lines = [await accounts.admit_line(key, bench.request()) for _ in range(3)]
    assert [isinstance(one, Admission) for one in lines] == [True, True, False]
    assert 0.0 < lines[2] <= 60.0
    # Neither requests per minute nor places are taken from other requests.
    direct = await accounts.admit(key, bench.request())
    assert direct.headers["x-ratelimit-remaining-tokens"] == "180"
    accounts.finish(lines[0], response(lines[0].request))  # 10 tokens
    accounts.finish(lines[1], response(lines[1].request))
    accounts.finish(direct, response(direct.request))
    await accounts.written()
    again = await accounts.admit_line(key, bench.request())
    # It is published again, by a gateway that does not know whether the first one has an answer: booked once.
    assert isinstance(await bench.accounts[1].admit_line(key, again.request), Admission)
    for one in (accounts, bench.accounts[1]):
        one.finish(again, response(again.request))
        await one.written()
    sums = await bench.sums(key)
    assert (sums["requests"], sums["prompt_tokens"], sums["completion_tokens"]) == (4, 28, 12)
    large = bench.request().model_copy(update={"sampling": SamplingParameters(max_tokens=500)})
    assert "more than the limit of 480 a minute" in await refusal(accounts.admit_line(key, large))
    free = await bench.key()
    assert isinstance(await accounts.admit_line(free, large), Admission)


async def test_lines_of_batches_follow_the_carbon_budget_and_end_with_their_key(bench: Bench):
    accounts, key = bench.accounts[0], await bench.key(Limits(grams_per_month=100.0, most_level="L2"))
    line = await accounts.admit_line(key, bench.request())
    assert line.request.directive is None
    accounts.finish(line, response(line.request), Estimate(1.0, 60.0, "option_mean"))
    await accounts.written()
    line = await accounts.admit_line(key, bench.request())
    assert line.request.directive == "L1"
    await accounts.book([footprint(line.request, total_g=50.0)])
    assert "carbon budget" in await refusal(accounts.admit_line(key, bench.request()))
    async with bench.pool.acquire() as connection:
        await revoke_key(connection, key.id, now=NOON)
    assert "revoked" in await refusal(accounts.admit_line(key, bench.request()))


async def test_lines_of_batches_wait_for_a_budget_if_all_that_are_spent_say_so(bench: Bench):
    accounts, waits = bench.accounts[0], Limits(grams_per_month=0.0, defer_batches=True)
    key = await bench.key(waits, tenant="t")
    with pytest.raises(DeferredError):
        await accounts.admit_line(key, bench.request())
    assert "in a batch" in await refusal(accounts.admit(key, bench.request()))
    for tenant, expected in (
        (Limits(grams_per_month=0.0), "refused"),
        (Limits(grams_per_month=0.0, most_level="L2", when_spent="serve"), "deferred"),
        (waits, "deferred"),
    ):
        async with bench.pool.acquire() as connection:
            await set_limits(connection, "tenant/t", tenant)
        with pytest.raises(ApiError if expected == "refused" else DeferredError):
            await accounts.admit_line(key, bench.request())
    async with bench.pool.acquire() as connection:
        for account in ("tenant/t", f"key/{key.id}"):
            await set_limits(connection, account, Limits(grams_per_month=1.0, defer_batches=True))
    assert isinstance(await accounts.admit_line(key, bench.request()), Admission)


async def test_places_of_a_gateway_that_died_are_free_after_its_lease(bench: Bench):
    key = await bench.key(Limits(concurrent_requests=2), tenant="t")
    dying, living = bench.accounts
    first = await living.admit(key, bench.request())
    await dying.admit(key, bench.request())
    assert "at once" in await refusal(living.admit(key, bench.request()))
    living.finish(first, response(first.request))
    await living.written()
    await living.admit(key, bench.request())
    assert "at once" in await refusal(living.admit(key, bench.request()))
    await bench.pool.execute("UPDATE instances SET expires_at_wall = now() WHERE id = $1", dying._instance)
    await living.admit(key, bench.request())
    # The lease of a single request ends, too.
    await bench.pool.execute("UPDATE requests SET expires_at_wall = now()")
    await living.admit(key, bench.request())


async def test_places_of_a_tenant_are_shared_by_its_keys(bench: Bench):
    first, second = [await bench.key(tenant="t") for _ in range(2)]
    async with bench.pool.acquire() as connection:
        await set_limits(connection, "tenant/t", Limits(concurrent_requests=1))
    held = await bench.accounts[0].admit(first, bench.request())
    assert held.holds_place
    assert "at once" in await refusal(bench.accounts[1].admit(second, bench.request()))
    anonymous = ApiKey("anonymous", "anonymous", None)
    assert not (await bench.accounts[1].admit(anonymous, bench.request())).holds_place


async def test_a_revoked_key_is_refused_although_it_is_remembered(bench: Bench):
    key = await bench.key()
    await bench.accounts[0].admit(key, bench.request())
    async with bench.pool.acquire() as connection:
        assert await revoke_key(connection, key.id, now=NOON)
        assert not await revoke_key(connection, key.id, now=NOON)
    assert "revoked" in await refusal(bench.accounts[0].admit(key, bench.request()))


async def test_as_a_budget_runs_out_levels_are_forced_and_then_work_is_refused(bench: Bench):
    accounts = bench.accounts[0]
    key = await bench.key(tenant="t")
    async with bench.pool.acquire() as connection:
        await set_limits(connection, "tenant/t", Limits(grams_per_month=100.0, most_level="L2"))

    async def spend(grams: float) -> None:
        spending = await accounts.admit(key, bench.request())
        accounts.finish(spending, response(spending.request), Estimate(1.0, grams, "option_mean"))
        await accounts.written()

    await spend(50.0)
    assert (await accounts.admit(key, bench.request())).request.directive is None
    await spend(10.0)  # above the path of 51.7 g
    assert (await accounts.admit(key, bench.request())).request.directive == "L1"
    await spend(20.0)
    last = await accounts.admit(key, bench.request(directive="L0"))
    assert last.request.directive == "L2"
    assert float(last.headers["x-sprout-budget-remaining-grams"]) == pytest.approx(20.0)
    await spend(20.0)
    assert await refusal(accounts.admit(key, bench.request())) == (
        "insufficient_quota the carbon budget of this month is spent; ask your operator to raise it"
    )
    async with bench.pool.acquire() as connection:
        limits = Limits(grams_per_month=100.0, most_level="L2", when_spent="serve")
        await set_limits(connection, "tenant/t", limits)
    assert (await accounts.admit(key, bench.request())).request.directive == "L2"
    bench.clock.advance(timedelta(days=16))  # July
    assert (await accounts.admit(key, bench.request())).request.directive is None


@pytest.mark.parametrize("footprint_first", [False, True])
async def test_a_footprint_replaces_the_estimate_once_in_any_order(bench: Bench, footprint_first: bool):
    key, accounts = await bench.key(tenant="t"), bench.accounts[0]
    admission = await accounts.admit(key, bench.request())
    request = admission.request
    assert (await bench.row(request.id))["energy_j"] is None
    assert await bench.sums(key) == {}

    async def answered() -> None:
        estimate = Estimate(40.0, 1.25, "token_price")
        accounts.finish(admission, response(request), estimate, reference_g=3.0)
        await accounts.written()

    if not footprint_first:
        await answered()
        found = footprint_of(await bench.row(request.id))
        assert (found.joules, found.grams, found.saved_grams, found.estimated_grams) == (None, None, None, 1.25)
        sums = await bench.sums(key)
        assert (sums["requests"], sums["metered"], sums["grams"], sums["estimated_grams"]) == (1, 0, 0, 1.25)
    foreign = footprint(request, record="requests/5/5/5") if not footprint_first else footprint(bench.request())
    await accounts.book([foreign, footprint(request, purpose="judge", energy_j=9.0)])
    assert (await bench.row(request.id))["energy_j"] is None
    await accounts.book([footprint(request)])
    await accounts.book([footprint(request, energy_j=99.0)])
    if footprint_first:
        await answered()
    found = footprint_of(await bench.row(request.id))
    assert (found.joules, found.grams, found.operational_grams, found.saved_grams) == (50.0, 2.0, 1.5, 1.0)
    assert (found.prompt_tokens, found.completion_tokens, found.level, found.zone) == (8, 4, "L1", "GB")
    assert await bench.sums(key) == {
        "key_id": key.id, "tenant": "t", "hour": NOON.replace(minute=0), "requests": 1, "prompt_tokens": 8,
        "completion_tokens": 4, "metered": 1, "joules": 50.0, "priced": 1, "grams": 2.0, "compared": 1,
        "saved_grams": 1.0, "estimated_joules": 0.0, "estimated_grams": 0.0,
    }  # fmt: skip
    assert await bench.pool.fetch("SELECT account, grams FROM months ORDER BY account") == [
        (f"key/{key.id}", 2.0), ("tenant/t", 2.0),
    ]  # fmt: skip


async def test_without_an_intensity_grams_stay_unknown_and_the_estimate_counts(bench: Bench):
    key, accounts = await bench.key(), bench.accounts[0]
    admission = await accounts.admit(key, bench.request())
    accounts.finish(admission, response(admission.request), Estimate(40.0, 1.25, "token_price"))
    await accounts.written()
    unknown = {"intensity_g_per_kwh": None, "operational_g": None, "total_g": None}
    await accounts.book([footprint(admission.request, **unknown)])
    found = footprint_of(await bench.row(admission.request.id))
    assert (found.joules, found.grams) == (50.0, None)
    sums = await bench.sums(key)
    assert (sums["metered"], sums["priced"], sums["estimated_joules"], sums["estimated_grams"]) == (1, 0, 0.0, 1.25)


async def test_hostile_numbers_and_texts_cost_no_other_footprint(bench: Bench):
    key, accounts = await bench.key(), bench.accounts[0]
    admission = await accounts.admit(key, bench.request())
    hostile = footprint(bench.request(), request_id="\x00", completion_tokens=10**30, energy_j=1e308, total_g=1e308)
    await accounts.book([hostile, footprint(admission.request, prompt_tokens=10**30)])
    assert (await bench.row(admission.request.id))["prompt_tokens"] == 2**31 - 1


async def test_old_requests_are_removed_and_their_sums_stay(bench: Bench):
    key, accounts = await bench.key(), bench.accounts[0]
    admission = await accounts.admit(key, bench.request())
    await accounts.book([footprint(admission.request)])
    await accounts._remove(NOON + timedelta(seconds=1))
    assert await bench.row(admission.request.id) is None
    assert (await bench.sums(key))["grams"] == 2.0


async def test_requests_that_come_at_once_share_a_statement_and_one_bad_one_costs_only_itself(bench: Bench):
    """The identifier of a request is used twice: PostgreSQL refuses the second one, and with it its statement."""
    key = await bench.key(Limits(requests_per_minute=12), tenant="t")
    accounts = bench.accounts[0]
    await same_minute(bench.pool)
    requests = [bench.request() for _ in range(20)]
    requests[7] = requests[3]
    outcomes = await asyncio.gather(*(accounts.admit(key, one) for one in requests), return_exceptions=True)
    admitted = [one for one in outcomes if isinstance(one, Admission)]
    assert [one.request.id for one in admitted] == [
        one.id for number, one in enumerate(requests) if number <= 12 and number != 7
    ]
    assert isinstance(outcomes[7], asyncpg.UniqueViolationError)
    assert all(isinstance(one, ApiError) and one.status == 429 for one in outcomes[13:])
    other = await bench.key()
    await asyncio.gather(*(accounts.admit(other, bench.request()) for _ in range(20)))
    transactions = await bench.pool.fetchval(
        "SELECT count(DISTINCT xmin::text) FROM requests WHERE key_id = $1", other.id
    )
    assert transactions <= 2  # the first may have been alone


async def test_requests_admitted_while_postgresql_was_away_are_booked_later(bench: Bench, database: DatabaseSettings):
    key = await bench.key(Limits(requests_per_minute=1), tenant="t")
    away = await open_pool(database, schema="gateway")
    await away.close()
    assert "cannot be checked" in await refusal(make_accounts(away, bench.clock).admit(key, bench.request()))
    serving = make_accounts(away, bench.clock, serve_without_database=True)
    admissions = [await serving.admit(key, bench.request()) for _ in range(2)]
    for one in admissions:
        bench.accounts[1].finish(one, response(one.request), Estimate(1.0, 2.0, "option_mean"))
    await bench.accounts[1].written()
    assert (await bench.sums(key))["requests"] == 2


class CountedPool:
    """A pool that counts queries for one row."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self.queries = 0

    async def fetchrow(self, *arguments: Any) -> Any:
        self.queries += 1
        return await self._pool.fetchrow(*arguments)


async def test_many_requests_at_once_with_a_key_ask_postgresql_once(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    async with bench.pool.acquire() as connection:
        key, secret = await create_key(connection, name="test", tenant=None, now=NOON)
    counted = CountedPool(bench.pool)
    keys = KeyStore(counted, DatabaseStatus(), cache_s=600.0, timeout_s=DEADLINE_S)
    monkeypatch.setattr("services.gateway.keys.WRONG_S", 600.0)
    first = asyncio.create_task(keys.find(secret))
    waiting = [asyncio.create_task(keys.find(secret)) for _ in range(99)]
    await asyncio.sleep(0)
    first.cancel()  # its client has left; the others get the key nevertheless
    assert await asyncio.gather(*waiting) == [key] * 99
    assert await keys.find(secret) == key
    assert await asyncio.gather(*(keys.find("wrong") for _ in range(100))) == [None] * 100
    assert await keys.find("wrong") is None
    assert counted.queries == 2

    # Wrong keys, however many, are remembered within bounds and push no valid key out.
    monkeypatch.setattr("services.gateway.keys.MAX_CACHED", 3)
    assert await asyncio.gather(*(keys.find(f"wrong {number}") for number in range(10))) == [None] * 10
    assert len(keys._wrong) <= 4
    queries = counted.queries
    assert await keys.find(secret) == key
    assert counted.queries == queries
    # One that is made in the meantime is found as soon as it is not remembered as wrong.
    monkeypatch.setattr("services.gateway.keys.WRONG_S", 0.0)
    async with bench.pool.acquire() as connection:
        await store_key(connection, "wrong", name="test", tenant=None, now=NOON)
    found = await keys.find("wrong")
    assert found is not None
    assert found.name == "test"


@pytest.fixture
def own_server(supervisor: Supervisor, tmp_path: Path) -> Iterator[tuple[psutil.Process, str]]:
    """A PostgreSQL of this test, and the URL of its database."""
    spec, url = postgres_spec(tmp_path, name="own-postgres")
    yield psutil.Process(supervisor.start(spec).pid), url
    supervisor.stop(spec.name)


async def test_requests_are_refused_in_time_while_postgresql_hangs(own_server: tuple[psutil.Process, str]):
    server, url = own_server
    await create_database(url)
    pool = await open_pool(DatabaseSettings(url=SecretStr(url), command_timeout_s=600), schema="gateway")
    await migrate(pool, schema="gateway", package="services.gateway.migrations")
    settings, metrics = GatewaySettings(admission_timeout_s=0.2), GatewayMetrics(CollectorRegistry())
    accounts = Accounts(
        pool, DatabaseStatus(), levels=("L0",), settings=settings, clock=ManualClock(NOON), metrics=metrics
    )
    keys = KeyStore(pool, DatabaseStatus(), cache_s=0.0, timeout_s=DEADLINE_S)
    key, secret = await keys.create(name="test", tenant=None, now=NOON)
    assert await keys.find(secret) == key
    keys._timeout_s = 0.2  # only now: a busy machine may take longer
    processes = [server, *server.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(8):  # more than connections
                with pytest.raises(ApiError) as caught:
                    await accounts.admit(key, GenerationRequest(id="r", model="m", prompt="hey"))
                assert (caught.value.status, "retry-after" in caught.value.headers) == (503, True)
            with pytest.raises(DatabaseUnavailableError):
                await keys.find("unknown")
            assert await keys.find(secret) == key
    finally:
        for process in processes:
            process.resume()
        pool.terminate()


async def test_what_waits_for_postgresql_is_bounded_and_a_footprint_replaces_what_is_lost(bench: Bench):
    key, accounts = await bench.key(), bench.accounts[0]
    admissions = [await accounts.admit(key, bench.request()) for _ in range(2)]
    accounts._settings = GatewaySettings(max_unwritten_requests=1)
    for one in admissions:  # the background task cannot run in between
        accounts.finish(one, response(one.request), Estimate(1.0, 2.0, "option_mean"))
    await accounts.written()
    assert accounts._metrics.unwritten._value.get() == 1
    assert (await bench.sums(key))["requests"] == 1
    await accounts.book([footprint(one.request) for one in admissions])
    sums = await bench.sums(key)
    assert (sums["requests"], sums["grams"], sums["estimated_grams"]) == (2, 4.0, 0.0)
