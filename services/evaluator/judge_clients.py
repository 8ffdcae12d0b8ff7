"""Judge models: one in a pool of the fleet, or one behind an OpenAI-compatible API."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import stamina
from pydantic import SecretStr

from services.evaluator.cost import CallContext
from services.evaluator.generate import CallError, ModelCalls
from services.evaluator.judges import Judge, JudgeError
from services.evaluator.settings import EvaluatorSettings
from shared.fleet import Fleet, FleetError
from shared.messages import ChatMessage, SamplingParameters

_HTTP_ATTEMPTS: Final = 4
_RETRIED_STATUS: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


def judge_pool(fleet: Fleet, settings: EvaluatorSettings) -> str | None:
    """The pool of the judge; None if the judge is not of the fleet.

    Raises:
        FleetError: the fleet should have a judge, and has none.
    """
    if settings.judge != "fleet":
        return None
    if fleet.judge is None:
        raise FleetError(
            "the fleet file has no [judge]: name a pool there, or set SPROUT_EVALUATOR_JUDGE=openai with a URL"
        )
    return fleet.judge.pool


@asynccontextmanager
async def open_judge(fleet: Fleet, settings: EvaluatorSettings, calls: ModelCalls) -> AsyncIterator[Judge]:
    """The judge of the settings, until the context ends.

    Raises:
        FleetError: see `judge_pool`.
    """
    pool = judge_pool(fleet, settings)
    if pool is not None:
        yield TritonJudge(calls, pool=pool, max_tokens=settings.judge_max_tokens)
        return
    judge = OpenAIJudge(
        str(settings.judge_url),
        model=settings.judge_model or "",
        api_key=settings.judge_api_key,
        timeout_s=settings.judge_timeout_s,
        concurrency=settings.concurrency,
        max_tokens=settings.judge_max_tokens,
    )
    try:
        yield judge
    finally:
        await judge.close()


class TritonJudge:
    """A judge model in a pool of the fleet."""

    def __init__(self, calls: ModelCalls, *, pool: str, max_tokens: int = 1) -> None:
        self._calls = calls
        self._pool = pool
        # Greedy decoding: the same question gets the same reply.
        self._sampling = SamplingParameters(max_tokens=max_tokens, top_k=1)

    async def reply(self, messages: Sequence[ChatMessage], context: CallContext) -> str:
        """Ask once; see `Judge`."""
        try:
            answer = await self._calls.generate(
                context, purpose="judge", pool=self._pool, level=None, messages=messages, sampling=self._sampling
            )
        except CallError as error:
            raise JudgeError(str(error)) from error
        return answer.text


class OpenAIJudge:
    """A judge behind an OpenAI-compatible API (`POST {url}/chat/completions`); call `close` at the end.

    Its energy is not metered, so the cost of an evaluation excludes it.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        api_key: SecretStr | None,
        timeout_s: float,
        concurrency: int,
        max_tokens: int = 1,
        backoff_s: float = 0.5,
    ) -> None:
        """Create without connecting.

        Args:
            url: including `/v1`.
            timeout_s: of one reply, wall.
            backoff_s: before the second attempt, wall.
        """
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key.get_secret_value()}"}
        self._client = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout_s)
        self._model = model
        self._max_tokens = max_tokens
        self._backoff_s = backoff_s
        self._slots = asyncio.Semaphore(concurrency)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def reply(self, messages: Sequence[ChatMessage], context: CallContext) -> str:  # noqa: ARG002 - not metered
        """Ask once; see `Judge`."""
        body = {
            "model": self._model,
            "messages": [{"role": one.role, "content": one.content} for one in messages],
            "max_tokens": self._max_tokens,
            "temperature": 0,
        }
        async with self._slots:
            return await self._ask(body)

    async def _ask(self, body: dict[str, Any]) -> str:
        host = self._client.base_url.host
        try:
            async for attempt in stamina.retry_context(
                on=_is_transient, attempts=_HTTP_ATTEMPTS, timeout=None, wait_initial=self._backoff_s
            ):
                with attempt:
                    response = await self._client.post("/chat/completions", json=body)
                    response.raise_for_status()
            content = response.json()["choices"][0]["message"]["content"]
        except httpx.HTTPStatusError as error:
            # The body of an error may quote the prompt.
            raise JudgeError(f"the judge at {host} replied with status {error.response.status_code}") from None
        except httpx.HTTPError as error:
            raise JudgeError(f"the judge at {host} cannot be reached: {type(error).__name__}") from None
        except (ValueError, LookupError, TypeError):
            raise JudgeError(f"the judge at {host} sent no chat completion") from None
        return content if isinstance(content, str) else ""


def _is_transient(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _RETRIED_STATUS
    return isinstance(error, httpx.TransportError)
