"""SASL/OAUTHBEARER: tokens by client credentials, their reuse, and failures of the endpoint."""

import asyncio

import httpx
import pytest
import respx
from aiokafka.errors import AuthenticationFailedError, KafkaConnectionError
from faststream.security import SASLOAuthBearer
from pydantic import ValidationError

from shared.runtime.settings import KafkaSettings

URL = "https://login.example/token"
SECRET = "v3ry-s3cret"
OAUTH = {
    "security_protocol": "SASL_SSL",
    "sasl_mechanism": "OAUTHBEARER",
    "sasl_username": "router",
    "sasl_password": SECRET,
    "oauth_token_url": URL,
    "oauth_scope": "kafka",
}


def kafka(**changes: object) -> KafkaSettings:
    return KafkaSettings.model_validate({name: value for name, value in (OAUTH | changes).items() if value is not None})


def test_aiokafka_and_faststream_get_the_same_tokens() -> None:
    settings = kafka()
    options = settings.security_options()
    assert options["sasl_mechanism"] == "OAUTHBEARER"
    assert options["sasl_oauth_token_provider"] is settings.oauth_tokens
    assert "sasl_plain_password" not in options
    assert isinstance(settings.broker_security(), SASLOAuthBearer)
    assert SECRET not in repr(settings)


@respx.mock
async def test_a_token_is_requested_once_and_reused_until_it_nears_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    route = respx.post(URL).mock(
        side_effect=[httpx.Response(200, json={"access_token": f"t{n}", "expires_in": 100}) for n in range(2)]
    )
    now = [1_000.0]
    monkeypatch.setattr("shared.runtime.oauth.time.monotonic", lambda: now[0])
    tokens = kafka().oauth_tokens
    assert tokens is not None
    assert await asyncio.gather(*(tokens.token() for _ in range(5))) == ["t0"] * 5
    (call,) = route.calls
    assert call.request.content == b"grant_type=client_credentials&scope=kafka"
    assert call.request.headers["authorization"].startswith("Basic ")
    now[0] += 79
    assert await tokens.token() == "t0"
    now[0] += 2
    assert await tokens.token() == "t1"


@respx.mock
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx.ConnectError("refused"), KafkaConnectionError),
        (httpx.Response(503), KafkaConnectionError),
        (httpx.Response(401, json={"error": "invalid_client"}), AuthenticationFailedError),
        (httpx.Response(200, text="<html>"), AuthenticationFailedError),
        (httpx.Response(200, json={"token_type": "bearer", "id_token": SECRET}), AuthenticationFailedError),
    ],
)
async def test_failures_are_errors_that_kafka_clients_handle(answer: object, error: type[Exception]) -> None:
    respx.post(URL).mock(side_effect=[answer])
    tokens = kafka().oauth_tokens
    assert tokens is not None
    with pytest.raises(error) as caught:
        await tokens.token()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"oauth_token_url": None, "oauth_scope": None}, "needs SPROUT_KAFKA_OAUTH_TOKEN_URL"),
        ({"sasl_mechanism": "PLAIN"}, "OAUTH_TOKEN_URL, SPROUT_KAFKA_OAUTH_SCOPE would not be used"),
        ({"security_protocol": "SSL"}, "would not be used"),
        ({"oauth_token_url": "http://login.example/token"}, "must begin with https"),
        ({"sasl_password": None}, "needs SPROUT_KAFKA_SASL_PASSWORD"),
    ],
)
def test_contradictory_settings_are_rejected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        kafka(**changes)
    assert SECRET not in str(caught.value)
