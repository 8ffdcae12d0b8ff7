"""`POST /evaluations`: who may request an evaluation, and what the answer promises."""

import json
from datetime import UTC, datetime
from typing import NoReturn

import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr, ValidationError

from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.requests import evaluation_endpoint
from services.evaluator.scheduler import Scheduler
from services.evaluator.settings import EvaluatorSettings
from shared.carbon import LatestIntensities
from shared.fleet import Switchback
from shared.runtime.clock import ManualClock
from shared.runtime.database import DatabaseUnavailableError
from shared.switchback import SwitchbackSchedule

TOKEN = "a-token-of-this-test"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}


def scheduler_of_one_model() -> Scheduler:
    return Scheduler(
        {"m": "GB"},
        settings=EvaluatorSettings(),
        intensities=LatestIntensities(),
        switchback=SwitchbackSchedule(Switchback(share=0)),
        clock=ManualClock(datetime(2023, 2, 10, tzinfo=UTC)),
        metrics=EvaluatorMetrics(CollectorRegistry()),
    )


class Endpoint:
    """The handler, called as a server would."""

    def __init__(self, *, token: str | None = TOKEN, obstacle: str | Exception | None = None) -> None:
        self.scheduler = scheduler_of_one_model()
        self._found = obstacle
        self._handler = evaluation_endpoint(
            self.scheduler, token=None if token is None else SecretStr(token), obstacle=self._obstacle
        )

    async def _obstacle(self, model: str) -> str | None:
        assert model == "m"
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    async def post(self, query: str = "model=m", headers: dict[str, str] | None = None) -> tuple[int, dict[str, str]]:
        sent: list[dict] = []

        async def receive() -> NoReturn:
            raise AssertionError("the body must not be read: its size has no limit")

        async def send(message: dict) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/evaluations",
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()],
        }
        await self._handler(scope, receive, send)
        start, body = sent
        return start["status"], json.loads(body["body"])

    @property
    def is_requested(self) -> bool:
        return self.scheduler.states["m"].pending is not None


async def test_without_a_configured_token_requests_are_off() -> None:
    endpoint = Endpoint(token=None)
    status, body = await endpoint.post(headers={"Authorization": "Bearer "})
    assert status == 403
    assert "set SPROUT_EVALUATOR_HTTP_TOKEN" in body["error"]
    assert not endpoint.is_requested


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer another-token-of-it"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer \xff\xfe"},
        {"X-Token": TOKEN},
    ],
)
async def test_without_the_right_token_nothing_happens(headers: dict[str, str]) -> None:
    endpoint = Endpoint()
    status, body = await endpoint.post(headers=headers)
    assert status == 401
    assert TOKEN not in json.dumps(body)
    assert not endpoint.is_requested


async def test_with_the_token_an_evaluation_is_requested_once() -> None:
    endpoint = Endpoint()
    assert await endpoint.post(headers=RIGHT) == (202, {"status": "requested"})
    assert endpoint.is_requested
    again = await endpoint.post(headers={"authorization": f"bearer {TOKEN}"})
    assert again == (202, {"status": "requested before, and not begun yet"})


@pytest.mark.parametrize("query", ["", "model=", "model=other", "model=%ff%1b", "x" * 10_000])
async def test_an_unknown_model_is_not_quoted(query: str) -> None:
    endpoint = Endpoint()
    status, body = await endpoint.post(query, RIGHT)
    assert (status, body) == (404, {"error": "set ?model= to the name of a model of the fleet file"})


async def test_nothing_is_promised_if_another_evaluator_would_have_to_do_it() -> None:
    endpoint = Endpoint(obstacle="another evaluator evaluates this model")
    assert await endpoint.post(headers=RIGHT) == (409, {"error": "another evaluator evaluates this model"})
    assert not endpoint.is_requested


async def test_nothing_is_promised_without_postgresql() -> None:
    endpoint = Endpoint(obstacle=DatabaseUnavailableError("PostgreSQL is unavailable (OSError)"))
    status, body = await endpoint.post(headers=RIGHT)
    assert status == 503
    assert "PostgreSQL is unavailable" in body["error"]
    assert not endpoint.is_requested


def test_the_token_is_read_from_a_file_and_must_be_long_enough(tmp_path, monkeypatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    monkeypatch.setenv("SPROUT_EVALUATOR_HTTP_TOKEN_FILE", str(file))
    settings = EvaluatorSettings()
    assert settings.http_token is not None
    assert settings.http_token.get_secret_value() == TOKEN
    assert TOKEN not in repr(settings)
    file.write_text("short")
    with pytest.raises(ValidationError, match="SPROUT_EVALUATOR_HTTP_TOKEN_FILE needs 16 characters") as caught:
        EvaluatorSettings()
    assert "short" not in str(caught.value)
    monkeypatch.setenv("SPROUT_EVALUATOR_HTTP_TOKEN", "short")
    with pytest.raises(ValidationError, match="at least 16") as caught:
        EvaluatorSettings()
    assert "short'" not in str(caught.value)
    monkeypatch.setenv("SPROUT_EVALUATOR_HTTP_TOKEN", TOKEN)
    with pytest.raises(ValidationError, match="not both"):
        EvaluatorSettings()


def test_an_empty_variable_counts_as_none(monkeypatch) -> None:
    monkeypatch.setenv("SPROUT_EVALUATOR_HTTP_TOKEN", "")
    monkeypatch.setenv("SPROUT_EVALUATOR_JUDGE_API_KEY_FILE", "")
    settings = EvaluatorSettings()
    assert (settings.http_token, settings.judge_api_key) == (None, None)
