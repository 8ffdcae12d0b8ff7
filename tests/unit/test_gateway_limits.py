"""Limits and carbon budgets of the gateway: what a request counts as, headers, refusals, the path through the month."""

from datetime import UTC, datetime
from typing import Any

import pytest

from services.gateway.limits import (
    AccountState,
    Verdict,
    counted_tokens,
    forced_level,
    path_grams,
    stricter_directive,
)
from shared.messages import ChatMessage, GenerationRequest, SamplingParameters

LEVELS = ("L0", "L1", "L2")
START = datetime(2026, 6, 1, tzinfo=UTC)
MIDDLE = datetime(2026, 6, 15, tzinfo=UTC)
"""After 14 of 30 days: with the head start half of a budget is on the path."""


def account(**changes: Any) -> AccountState:
    values: dict[str, Any] = {
        "account": "key/k", "requests_per_minute": None, "used_requests": 0, "tokens_per_minute": None,
        "used_tokens": 0, "concurrent_requests": None, "grams_per_month": None, "spent_grams": None, "most_level": None,
    }  # fmt: skip
    return AccountState.model_validate(values | changes)


def verdict(*accounts: AccountState, refusal: str | None = None, reset_s: float = 12.25) -> Verdict:
    return Verdict.model_validate({"refusal": refusal, "reset_s": reset_s, "accounts": accounts})


def test_a_request_counts_as_its_prompt_and_all_that_it_may_generate():
    request = GenerationRequest(
        messages=(ChatMessage(role="system", content="x" * 40), ChatMessage(role="user", content="é" * 21)),
        sampling=SamplingParameters(max_tokens=100),
    )
    assert counted_tokens(request) == 21 + 2 * 4 + 100  # 82 bytes
    assert counted_tokens(GenerationRequest(prompt="x")) == 1 + 4 + 512


def test_headers_are_of_the_account_with_the_least_left():
    found = verdict(
        account(requests_per_minute=10, used_requests=3, tokens_per_minute=1_000, used_tokens=900),
        account(requests_per_minute=8, used_requests=7),
    ).headers(150)
    assert found == {
        "x-ratelimit-limit-requests": "8",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "12.250s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "12.250s",
    }


def test_a_refused_request_is_not_counted_in_the_headers():
    refused = verdict(account(requests_per_minute=10, used_requests=10, tokens_per_minute=1_000), refusal="requests")
    assert refused.headers(500)["x-ratelimit-remaining-tokens"] == "1000"
    assert verdict(account()).headers(5) == {}
    spent = verdict(account(grams_per_month=10.0, spent_grams=7.5))
    assert spent.headers(5) == {"x-sprout-budget-remaining-grams": "2.5"}


@pytest.mark.parametrize(
    ("refusal", "status", "kind", "code", "retry_after"),
    [
        ("requests", 429, "requests", "rate_limit_exceeded", "13"),
        ("tokens", 429, "tokens", "rate_limit_exceeded", "13"),
        ("concurrent", 429, "requests", "rate_limit_exceeded", "1"),
        ("budget", 429, "insufficient_quota", "insufficient_quota", "86400"),
    ],
)
def test_a_refusal_is_an_error_in_openais_format(refusal, status, kind, code, retry_after):
    error = verdict(account(tokens_per_minute=100), refusal=refusal).error(50, MIDDLE)
    assert (error.status, error.body.type, error.body.code) == (status, kind, code)
    assert error.headers["retry-after"] == retry_after
    assert "x-ratelimit-limit-tokens" in error.headers


@pytest.mark.parametrize("defers_batches", [False, True])
def test_a_spent_budget_names_batches_as_a_way_to_wait_only_where_they_do(defers_batches):
    spent = verdict(account(grams_per_month=1.0, spent_grams=1.0), account(grams_per_month=2.0), refusal="budget")
    assert spent.spent() == ["key/k"]
    error = spent.error(50, MIDDLE, defers_batches=defers_batches)
    assert (error.status, "batch" in error.body.message) == (429, defers_batches)


def test_other_verdicts():
    assert verdict(account()).error(1, MIDDLE) is None
    assert verdict(refusal="revoked").error(1, MIDDLE).status == 401
    assert "shorten" in verdict(account(tokens_per_minute=10), refusal="tokens").error(11, MIDDLE).body.message


def test_the_path_of_a_budget_is_linear_through_the_month_with_a_day_ahead():
    assert path_grams(30.0, START) == pytest.approx(1.0)
    assert path_grams(30.0, MIDDLE) == pytest.approx(15.0)
    assert path_grams(30.0, datetime(2026, 6, 30, 12, tzinfo=UTC)) == pytest.approx(30.0)
    assert path_grams(31.0, datetime(2026, 12, 31, 23, tzinfo=UTC)) == pytest.approx(31.0)
    assert path_grams(29.0, datetime(2028, 2, 29, tzinfo=UTC)) == pytest.approx(29.0)


@pytest.mark.parametrize(
    ("spent", "level"),
    [(0.0, None), (15.0, None), (15.1, "L1"), (22.5, "L1"), (22.6, "L2"), (29.9, "L2"), (30.0, "L2"), (90.0, "L2")],
)
def test_above_the_path_the_rest_of_the_budget_is_divided_among_the_levels(spent, level):
    assert forced_level([account(grams_per_month=30.0, spent_grams=spent, most_level="L2")], LEVELS, MIDDLE) == level


def test_the_strictest_budget_counts_and_most_level_is_kept():
    generous = account(grams_per_month=1_000.0, spent_grams=20.0, most_level="L2")
    spent = account(grams_per_month=20.0, spent_grams=19.9, most_level="L1")
    assert forced_level([generous, spent], LEVELS, MIDDLE) == "L1"
    assert forced_level([generous], LEVELS, MIDDLE) is None
    for without in (account(), account(grams_per_month=1.0, spent_grams=2.0), spent.model_copy(
        update={"most_level": "L9"}
    )):  # fmt: skip
        assert forced_level([without], LEVELS, MIDDLE) is None
    assert forced_level([account(grams_per_month=0.0, spent_grams=0.0, most_level="L2")], LEVELS, MIDDLE) == "L2"
    assert forced_level([spent.model_copy(update={"most_level": "L0"})], LEVELS, MIDDLE) is None


@pytest.mark.parametrize(
    ("requested", "forced", "directive"),
    [
        (None, None, None),
        ("L0", None, "L0"),
        (None, "L1", "L1"),
        ("L0", "L1", "L1"),
        ("L2", "L1", "L2"),
        ("!L0", "L1", "L1"),
        ("!L2", "L2", "L1"),
        ("!L1", "L1", "!L1"),
        ("L9", "L1", "L9"),
    ],
)
def test_a_budget_takes_no_directive_back_that_is_stricter_or_forbidden(requested, forced, directive):
    assert stricter_directive(requested, forced, LEVELS) == directive
