"""Tokens for SASL/OAUTHBEARER: the client-credentials grant of OAuth 2.0 (RFC 6749, section 4.4)."""

import asyncio
import time
from typing import Any, Final

from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import AuthenticationFailedError, KafkaConnectionError
from pydantic import BaseModel, Field, SecretStr, ValidationError

TIMEOUT_S: Final = 10.0
REUSE_SHARE: Final = 0.8
"""Share of its lifetime for which a token is used."""


class _Token(BaseModel):
    access_token: SecretStr
    expires_in: float = Field(default=60.0, gt=0, description="Lifetime, s; an endpoint should state it")


class ClientCredentials(AbstractTokenProvider):  # type: ignore[misc] # aiokafka has no types
    """Gets tokens from an endpoint and reuses each for most of its lifetime; aiokafka asks at every connection."""

    def __init__(self, url: str, *, client_id: str, client_secret: str, scope: str | None) -> None:
        self._url = url
        self._login = (client_id, client_secret)
        self._form = {"grant_type": "client_credentials"} | ({} if scope is None else {"scope": scope})
        self._token = ""
        self._use_until_s = 0.0
        self._lock = asyncio.Lock()

    async def token(self) -> str:
        """A token that is valid for some time.

        Raises:
            KafkaConnectionError: the endpoint cannot be reached.
            AuthenticationFailedError: it refuses the credentials, or answers with something else than a token.
        """
        async with self._lock:
            if time.monotonic() >= self._use_until_s:
                requested_s = time.monotonic()
                fresh = await self._request()
                self._token = fresh.access_token.get_secret_value()
                self._use_until_s = requested_s + REUSE_SHARE * fresh.expires_in
            return self._token

    def extensions(self) -> dict[str, str]:
        """SASL extensions: none."""
        return {}

    async def _request(self) -> _Token:
        import httpx  # noqa: PLC0415 - only deployments with OAUTHBEARER load it

        try:
            async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
                answer = await client.post(self._url, data=self._form, auth=self._login)
        except httpx.HTTPError as error:
            raise KafkaConnectionError(f"the token endpoint does not answer ({type(error).__name__})") from error
        if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise KafkaConnectionError(f"the token endpoint answers with status {answer.status_code}")
        if answer.status_code != httpx.codes.OK:
            raise AuthenticationFailedError(f"the token endpoint answers with status {answer.status_code}")
        try:
            content: Any = answer.json()
            return _Token.model_validate(content)
        except (ValueError, ValidationError):  # whose text may quote the token
            raise AuthenticationFailedError("the token endpoint's answer holds no token") from None
