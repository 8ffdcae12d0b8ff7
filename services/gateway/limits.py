"""What a request is counted as, the directive that a carbon budget forces, and refusals. Pure functions.

PostgreSQL decides and counts in one transaction (`admit` in `migrations/0002_accounts.sql`); this module has what does
not need the lock.
"""

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from pydantic import BaseModel

from services.gateway.errors import ApiError
from shared.messages import FORBIDDEN, GenerationRequest

BYTES_PER_TOKEN: Final = 4
"""Of English text with the tokenizers of today's models: an estimate, corrected by the answer's usage."""

TOKENS_PER_TURN: Final = 4
"""Markers of a chat template around a turn."""

HEAD_START: Final = timedelta(days=1)
"""The linear path of a budget begins with the share of one day, so that the first hours of a month are not above it."""

MAX_WAIT_S: Final = 86_400
"""Longest `retry-after` of a spent budget: the operator may raise it before the month ends."""

Refusal = Literal["revoked", "budget", "requests", "tokens", "concurrent"]


class AccountState(BaseModel):
    """Limits of a key or a tenant, and what was used of them before this request; None: no such limit.

    Attributes:
        account: `key/ID` or `tenant/NAME`.
        spent_grams: this month.
        most_level: strictest level that the budget may force.
    """

    account: str
    requests_per_minute: int | None
    used_requests: int
    tokens_per_minute: int | None
    used_tokens: int
    concurrent_requests: int | None
    grams_per_month: float | None
    spent_grams: float | None
    most_level: str | None


class Verdict(BaseModel):
    """What PostgreSQL decided on a request.

    Attributes:
        refusal: None: it is admitted and counted.
        reset_s: until the next minute begins.
    """

    refusal: Refusal | None
    reset_s: float
    accounts: tuple[AccountState, ...]

    @property
    def limits_concurrency(self) -> bool:
        """Whether the number of open requests is limited."""
        return any(account.concurrent_requests is not None for account in self.accounts)

    def is_too_large(self, tokens: int) -> bool:
        """Whether a request has more tokens than a whole minute may have."""
        return tokens > min(self._token_limits(), default=tokens)

    def headers(self, tokens: int) -> dict[str, str]:
        """The `x-ratelimit-*` headers, of the account with the least left, and what is left of the carbon budget.

        Args:
            tokens: that the request counts as.
        """
        counted = self.refusal is None
        headers = {}
        for name, rows in {
            "requests": [
                (one.requests_per_minute - one.used_requests - counted, one.requests_per_minute)
                for one in self.accounts
                if one.requests_per_minute is not None
            ],
            "tokens": [
                (one.tokens_per_minute - one.used_tokens - tokens * counted, one.tokens_per_minute)
                for one in self.accounts
                if one.tokens_per_minute is not None
            ],
        }.items():
            if rows:
                left, limit = min(rows)
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, left))
                headers[f"x-ratelimit-reset-{name}"] = f"{self.reset_s:.3f}s"
        budgets = [
            one.grams_per_month - (one.spent_grams or 0.0) for one in self.accounts if one.grams_per_month is not None
        ]
        if budgets:
            headers["x-sprout-budget-remaining-grams"] = f"{max(0.0, min(budgets)):.6g}"
        return headers

    def spent(self) -> list[str]:
        """The accounts whose carbon budget is spent."""
        return [
            one.account
            for one in self.accounts
            if one.grams_per_month is not None and (one.spent_grams or 0.0) >= one.grams_per_month
        ]

    def error(self, tokens: int, now: datetime, *, defers_batches: bool = False) -> ApiError | None:
        """The answer to a refused request; None if it is admitted.

        Args:
            tokens: that the request would count as.
            now: event time.
            defers_batches: whether batches wait for a new budget.
        """
        if self.refusal is None:
            return None
        if self.refusal == "revoked":
            return ApiError(
                401, "this API key was revoked", kind="authentication_error", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        if self.refusal == "budget":
            advice = "; or send it in a batch, which waits for a new budget" if defers_batches else ""
            return self._refused(
                f"the carbon budget of this month is spent; ask your operator to raise it{advice}",
                kind="insufficient_quota",
                wait_s=min(MAX_WAIT_S, (month_end(now) - now).total_seconds()),
                tokens=tokens,
            )
        if self.refusal == "concurrent":
            return self._refused("too many requests at once for this API key", kind="requests", wait_s=1, tokens=tokens)
        if self.refusal == "tokens" and self.is_too_large(tokens):
            message = (
                f"the request counts as {tokens} tokens, prompt and max_tokens, which is more than the limit of "
                f"{min(self._token_limits())} a minute: shorten it"
            )
        else:
            message = f"the limit of {self.refusal} per minute is reached"
        return self._refused(message, kind=self.refusal, wait_s=self.reset_s, tokens=tokens)

    def _token_limits(self) -> list[int]:
        return [one.tokens_per_minute for one in self.accounts if one.tokens_per_minute is not None]

    def _refused(self, message: str, *, kind: str, wait_s: float, tokens: int) -> ApiError:
        code = "insufficient_quota" if kind == "insufficient_quota" else "rate_limit_exceeded"
        headers = {**self.headers(tokens), "retry-after": str(max(1, math.ceil(wait_s)))}
        return ApiError(429, message, kind=kind, code=code, headers=headers)


def counted_tokens(request: GenerationRequest) -> int:
    """What a request reserves of the tokens per minute: an estimate of its prompt, and all that it may generate."""
    turns = request.conversation()
    size = sum(len(turn.content.encode("utf-8", errors="replace")) for turn in turns)
    return math.ceil(size / BYTES_PER_TOKEN) + TOKENS_PER_TURN * len(turns) + request.sampling.max_tokens


def path_grams(budget_g: float, now: datetime) -> float:
    """What may be spent until now on the budget's linear path through the month, UTC.

    Args:
        budget_g: of the month.
        now: event time.
    """
    start, end = _month_start(now), month_end(now)
    return budget_g * min(1.0, (now - start + HEAD_START) / (end - start))


def forced_level(accounts: Iterable[AccountState], levels: Sequence[str], now: datetime) -> str | None:
    """The level that the budgets force; None while all are on their paths.

    Above the path, the rest of the budget is divided evenly among the levels after the first one, up to `most_level`:
    the more of it is spent ahead of time, the stricter the level.

    Args:
        levels: of the catalogue, the reference first.
        now: event time.
    """
    strictest = 0
    for account in accounts:
        budget, spent = account.grams_per_month, account.spent_grams
        if budget is None or spent is None or account.most_level not in levels:
            continue
        path, steps = path_grams(budget, now), levels.index(account.most_level)
        if spent >= budget:
            strictest = max(strictest, steps)
        elif spent > path:
            strictest = max(strictest, math.ceil((spent - path) / (budget - path) * steps))
    return levels[strictest] if strictest else None


def stricter_directive(requested: str | None, forced: str | None, levels: Sequence[str]) -> str | None:
    """The directive of a request after a budget has forced a level.

    A level that the client forces stays if it is at least as strict. Where the client forbids the forced level, the
    next milder one is taken; before the first directive its own choice stays.

    Args:
        requested: what the client asks for: a level, or one that is forbidden with a prefix.
        forced: None: nothing.
    """
    if forced is None:
        return requested
    if requested is None:
        return forced
    if not requested.startswith(FORBIDDEN):
        known = requested in levels
        return max(requested, forced, key=levels.index) if known else requested
    if requested.removeprefix(FORBIDDEN) != forced:
        return forced
    milder = levels.index(forced) - 1
    return levels[milder] if milder > 0 else requested


def _month_start(now: datetime) -> datetime:
    return now.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def month_end(now: datetime) -> datetime:
    """The end of a time's calendar month, UTC: then budgets begin anew."""
    return (_month_start(now) + timedelta(days=32)).replace(day=1)
