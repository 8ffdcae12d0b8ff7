"""The demo's traffic: reproducible by seed, exact in number, with its peak in the local afternoon."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from tools.demo.traffic import Prompt, load_at, plan_traffic

START = datetime(2024, 2, 3, 8, tzinfo=UTC)
PROMPTS = [Prompt(task, f"{task} {i}") for task in ("facts", "sums", "poems") for i in range(5)]


def test_the_traffic_depends_on_the_seed() -> None:
    first = plan_traffic(PROMPTS, start=START, hours=24, requests=200, seed=1)
    assert first == plan_traffic(PROMPTS, start=START, hours=24, requests=200, seed=1)
    assert first != plan_traffic(PROMPTS, start=START, hours=24, requests=200, seed=2)


def test_the_number_of_requests_is_exact_and_they_are_in_order_with_unique_ids() -> None:
    plan = plan_traffic(PROMPTS, start=START, hours=24, requests=500, seed=1)
    assert len({planned.id for planned in plan}) == len(plan) == 500
    assert [planned.at for planned in plan] == sorted(planned.at for planned in plan)
    assert all(START <= planned.at <= START + timedelta(hours=24) for planned in plan)
    assert {planned.task for planned in plan} == {"facts", "sums", "poems"}


def test_the_load_peaks_in_the_local_afternoon() -> None:
    plan = plan_traffic(PROMPTS, start=START, hours=24, requests=4000, seed=1, utc_offset_hours=-8)
    by_local_hour = Counter((planned.at - timedelta(hours=8)).hour for planned in plan)
    afternoon = sum(by_local_hour[hour] for hour in range(12, 17))
    night = sum(by_local_hour[hour] for hour in range(5))
    assert afternoon > 2 * night
    assert sum(load_at(hour) for hour in range(24)) == pytest.approx(24.0)


@pytest.mark.parametrize(
    ("prompts", "hours", "requests", "problem"),
    [([], 24, 10, "no prompts"), (PROMPTS, 0, 10, "hours=0"), (PROMPTS, 24, 0, "requests=0")],
)
def test_invalid_arguments_are_rejected(prompts: list[Prompt], hours: float, requests: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        plan_traffic(prompts, start=START, hours=hours, requests=requests, seed=1)
