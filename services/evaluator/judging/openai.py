"""A judge behind an OpenAI-compatible chat completions API: a hosted model, vLLM, or any other."""

import asyncio
from typing import Any, Final

import httpx
import stamina
from pydantic import SecretStr

from services.evaluator.judging.judge import Comparison, JudgeError, Opinion
from services.evaluator.judging.prompt import judge_messages, read_verdict
from services.evaluator.spending import Errand

ATTEMPTS: Final = 4
_PASSING: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class OpenAIJudge:
    """Asks `POST {url}/chat/completions` for one token; call `close` at the end.

    Its energy is metered by nobody: an evaluation's cost leaves it out.
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
        """Set up; nothing connects yet.

        Args:
            url: up to and with `/v1`.
            timeout_s: for one answer, wall.
            backoff_s: before the second attempt, wall.
        """
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key.get_secret_value()}"}
        self._client = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout_s)
        self._model = model
        self._max_tokens = max_tokens
        self._backoff_s = backoff_s
        self._turns = asyncio.Semaphore(concurrency)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def best(self, comparison: Comparison, errand: Errand) -> Opinion:  # noqa: ARG002 - it runs on nobody's account
        """Ask once; see `Judge`."""
        messages = judge_messages(comparison.question, comparison.answers, reference=comparison.reference)
        body = {
            "model": self._model,
            "messages": [{"role": one.role, "content": one.content} for one in messages],
            "max_tokens": self._max_tokens,
            "temperature": 0,
        }
        async with self._turns:
            text = await self._ask(body)
        return Opinion(read_verdict(text, answers=len(comparison.answers)))

    async def _ask(self, body: dict[str, Any]) -> str:
        try:
            async for attempt in stamina.retry_context(
                on=_may_pass, attempts=ATTEMPTS, timeout=None, wait_initial=self._backoff_s
            ):
                with attempt:
                    response = await self._client.post("/chat/completions", json=body)
                    response.raise_for_status()
            content = response.json()["choices"][0]["message"]["content"]
        except httpx.HTTPStatusError as error:
            # The body of an error may quote the prompt.
            raise JudgeError(f"the judge at {self._client.base_url.host} said {error.response.status_code}") from None
        except httpx.HTTPError as error:
            raise JudgeError(f"the judge at {self._client.base_url.host}: {type(error).__name__}") from None
        except (ValueError, LookupError, TypeError):
            raise JudgeError(f"the judge at {self._client.base_url.host} answered with no chat completion") from None
        return content if isinstance(content, str) else ""


def _may_pass(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _PASSING
    return isinstance(error, httpx.TransportError)
