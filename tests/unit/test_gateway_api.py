"""The OpenAPI document of the gateway."""

from datetime import UTC, datetime
from typing import Any, get_args

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from services.gateway.app import build_app
from services.gateway.errors import ApiError, add_handlers
from services.gateway.limits import AccountState, Verdict
from shared.fleet import Fleet
from shared.messages import ErrorDetail
from shared.messages.generation import ErrorCode
from shared.runtime.settings import DatabaseSettings
from tests.support.fleets import MODEL, ZONE

FLEET = Fleet.model_validate(
    {
        "directives": [{"level": "L0"}],
        "models": [{"name": MODEL, "chat_template": "llama-2"}],
        "pools": [{"name": "p", "model": MODEL, "zone": ZONE, "endpoints": [{"name": "e0", "grpc": "e0:1"}]}],
    }
)


@pytest.fixture
async def document() -> dict[str, Any]:
    app = build_app(database=DatabaseSettings(url=SecretStr("postgresql://nowhere/sprout")), fleet=FLEET)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app.api), base_url="http://gateway") as client:
        found: dict[str, Any] = (await client.get("/v1/openapi.json")).json()
        return found


async def test_every_endpoint_but_the_status_needs_an_api_key_as_a_bearer_token(document):
    (name,) = document["components"]["securitySchemes"]
    scheme = document["components"]["securitySchemes"][name]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    security = {
        f"{method} {path}": operation.get("security")
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    assert security.pop("get /v1/sprout/status") is None  # on loopback it needs none
    assert len(security) > 10
    assert {operation: required for operation, required in security.items() if required != [{name: []}]} == {}


async def test_the_headers_of_a_refusal_are_described(document):
    account = AccountState(
        account="key/k", requests_per_minute=1, used_requests=1, tokens_per_minute=10, used_tokens=0,
        concurrent_requests=None, grams_per_month=1.0, spent_grams=0.5, most_level=None,
    )  # fmt: skip
    refusal = Verdict(refusal="requests", reset_s=3.0, accounts=(account,)).error(1, datetime.now(UTC))
    assert refusal is not None
    responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(responses["429"]["headers"]) == set(refusal.headers)
    assert set(responses["503"]["headers"]) == {"retry-after"}


async def test_a_defect_is_an_error_in_openais_format_and_says_nothing_of_its_cause():
    api = FastAPI()
    add_handlers(api)

    @api.get("/v1/defect")
    async def defect() -> None:
        raise RuntimeError("a secret")

    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.get("/v1/defect")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


def test_every_error_of_a_router_has_a_status_and_those_that_pass_say_when_to_try_again():
    found = {code: ApiError.of_response(ErrorDetail(code=code, message="why")) for code in get_args(ErrorCode)}
    assert {code: (error.status, "retry-after" in error.headers) for code, error in found.items()} == {
        "invalid_request": (400, False),
        "unknown_level": (400, False),
        "unknown_model": (404, False),
        "prompt_too_large": (413, False),
        "cancelled": (499, False),
        "upstream_error": (502, True),
        "no_endpoint": (503, True),
        "deadline_exceeded": (504, False),
    }
    assert {error.body.message for error in found.values()} == {"why"}
