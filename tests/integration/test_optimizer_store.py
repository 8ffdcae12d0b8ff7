"""What the optimizer keeps in PostgreSQL: arrivals by hour of the day, and the account of a promise by period."""

import asyncio
import json
import tomllib
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry

from services.optimizer import migrations
from services.optimizer.intake import Intake
from services.optimizer.metrics import OptimizerMetrics
from services.optimizer.prices import PoolPrices
from services.optimizer.promise import Account, Period, Sums
from services.optimizer.service import PolicyService
from services.optimizer.settings import OptimizerSettings
from services.optimizer.store import ACCOUNT_RETENTION, Store
from shared.fleet import Fleet
from shared.messages import Policy
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseStatus, migrate, open_pool
from shared.topics import (
    CARBON_INTENSITY,
)
from tests.support.fleets import DIRECTIVES
from tests.support.optimizer import (
    FLEET,
    NOW,
    explained,
    footprint,
    intensity,
    peers,
    quality,
    start_optimizer,
)

pytestmark = pytest.mark.integration


async def test_the_arrivals_by_hour_of_day_are_stored(database):
    pool = await open_pool(database, schema="optimizer_profiles")
    try:
        await migrate(pool, schema="optimizer_profiles", package=migrations.__name__)
        store = Store(pool, status=DatabaseStatus(), remembered_footprints=1_000)
        assert await store.arrival_profiles() == {}
        for arrivals in (1.0, 2.0):
            profiles = {"p": {"12": [5.0, arrivals, 60.0]}, "q": {}}
            await store.put_arrival_profiles(profiles)
            assert await store.arrival_profiles() == profiles
    finally:
        await pool.close()


BY_PERIOD = {"SPROUT_OPTIMIZER_PROMISE": "period", "SPROUT_OPTIMIZER_XI": json.dumps({"preference": 0.1})}


async def test_a_period_that_ended_while_the_optimizer_was_away_is_closed(supervisor, kafka, database, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    name = start_optimizer(supervisor, kafka, database, fleet, **BY_PERIOD)
    try:
        async with peers(kafka) as around:
            await around.send_evidence()
            found = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
            promise = found.promise
            assert promise is not None
            assert promise.current.start <= NOW < promise.current.end
            assert promise.current.end - promise.current.start == timedelta(days=30)
            # This hour is one of the dirtiest: the others of the period need more than it has to give.
            assert found.bounds["preference"] == pytest.approx(0.9)
            assert 0.9 < promise.rest["preference"] < 1.0
            assert sum(hours.share for hours in found.inputs.later) > 0.9
            await explained(kafka, found)

            supervisor.kill(name)
            pool = await open_pool(database, schema="optimizer")
            try:
                await pool.execute("UPDATE promise_booked SET until = $1", promise.current.start - timedelta(hours=30))
            finally:
                await pool.close()
            name = start_optimizer(supervisor, kafka, database, fleet, **BY_PERIOD)
            await around.send(CARBON_INTENSITY, "GB", intensity(100.0))
            closed = await around.policy(lambda one: one.version > found.version)
            assert closed.promise is not None
            assert closed.promise.previous is not None
            assert closed.promise.previous.end == closed.promise.current.start
            for account in (closed.promise.previous, closed.promise.current):
                assert account.requests > 0.0
                assert account.promised["preference"] == pytest.approx(found.bounds["preference"], abs=0.01)
    finally:
        supervisor.stop(name)


async def test_time_is_booked_once_into_an_account_that_outlives_its_process(database):
    pool = await open_pool(database, schema="optimizer_account")
    start_of_day = datetime(2026, 3, 2, tzinfo=UTC)
    until = start_of_day

    def book(account: Account) -> None:
        begin = account.booked_until or start_of_day
        account.booked_until = until
        if begin < until:
            account.add(begin, 10.0, promised={"preference": 0.95}, kept={"preference": 0.9})

    try:
        await migrate(pool, schema="optimizer_account", package=migrations.__name__)
        for hour in (1, 2):
            until = start_of_day + timedelta(hours=hour)
            store = Store(pool, status=DatabaseStatus(), remembered_footprints=1_000)
            # Two copies of the optimizer at once: the row of the model is locked.
            both = await asyncio.gather(*(store.book_promise("m", book, since=start_of_day) for _ in range(2)))
            for account in both:
                assert account.total(Period.at(start_of_day, days=1))["preference"] == Sums(
                    10.0 * hour, pytest.approx(9.5 * hour), pytest.approx(9.0 * hour)
                )
        until = start_of_day + ACCOUNT_RETENTION + timedelta(hours=1)
        await store.book_promise("m", book, since=until)
        # The row of the first hour is older than the retention; the time since the second one is booked at its start.
        hours = await pool.fetch("SELECT hour FROM promise_account ORDER BY hour")
        assert [row["hour"] for row in hours] == [start_of_day + timedelta(hours=hour) for hour in (1, 2)]
    finally:
        await pool.close()


async def test_what_is_known_of_another_text_of_a_directive_does_not_count(database, capsys):
    before, after = (
        Fleet.model_validate(tomllib.loads(text)) for text in (FLEET, FLEET.replace(DIRECTIVES["L1"], "One word."))
    )
    settings, status = OptimizerSettings(), DatabaseStatus()
    assert before.reference_of("m") == "p/L0"
    pool = await open_pool(database, schema="optimizer_texts")

    async def started(fleet: Fleet) -> tuple[Intake, PolicyService]:
        """A copy of the optimizer that has read its tables."""
        clock, metrics, prices = Clock(), OptimizerMetrics(CollectorRegistry()), PoolPrices(fleet)
        made = Intake(fleet=fleet, clock=clock, settings=settings, metrics=metrics, prices=prices)
        await made.restore(Store(pool, status=status, remembered_footprints=1_000))
        return made, PolicyService(
            made, fleet=fleet, clock=clock, settings=settings, metrics=metrics, prices=prices, publish=never
        )

    async def never(policy: Policy) -> None:
        raise AssertionError(policy)

    async def requests(intake: Intake) -> dict[str, float]:
        """Effective requests whose energy counts, by option."""
        cells = (await intake.store.consumption())["m"].totals(Clock().now_s(), settings)["qa"]
        return {option: used.requests for option, used in cells.items()}

    try:
        await migrate(pool, schema="optimizer_texts", package=migrations.__name__)
        first, first_loop = await started(before)
        await first.add_footprints([footprint(n, level) for level in ("L0", "L1") for n in range(3)])
        # By an earlier evaluator: it counts for the present texts.
        first.add_evaluations([quality("e1", successes={"L0": 60, "L1": 40})])
        await first_loop.run_once()
        assert (await requests(first)).keys() == {"p/L0", "p/L1"}
        assert first.evaluation_age_s("m") is not None
        capsys.readouterr()

        changed, changed_loop = await started(after)
        assert (await requests(changed)).keys() == {"p/L0"}
        assert changed.evaluation_age_s("m") is None
        log = capsys.readouterr().out
        assert log.count("the text of directives has changed") == 1
        assert "One word." not in log
        # Of a call that began before the change; and Kafka delivers the evaluation again.
        await changed.add_footprints([footprint(9, "L1")])
        changed.add_evaluations([quality("e1", successes={"L0": 60, "L1": 40})])
        await changed_loop.run_once()
        assert (await requests(changed))["p/L1"] == 0.0
        assert changed.evaluation_age_s("m") is None
        # A copy with the old file that still runs takes nothing away, and its evaluations do not count here.
        await first.add_footprints([footprint(10, "L0")])
        of_first = quality("e2", successes={"L0": 60, "L1": 40}).model_copy(
            update={"directives": before.directive_hashes, "evaluated_at": datetime.now(UTC)}
        )
        for one, loop in ((first, first_loop), (changed, changed_loop)):
            one.add_evaluations([of_first])
            await loop.run_once()
        assert first.evaluation_age_s("m") is not None
        assert changed.evaluation_age_s("m") is None
        assert "give every service the same SPROUT_FLEET_FILE" in capsys.readouterr().out
        assert (await requests(changed))["p/L0"] > 3.0
        # The old text again: its evaluations count again.
        again, _ = await started(before)
        assert again.evaluation_age_s("m") is not None
    finally:
        await pool.close()
