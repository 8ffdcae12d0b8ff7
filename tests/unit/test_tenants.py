"""Defaults of a tenant's requests: applied only where the request sets nothing."""

import pytest

from shared.messages import GenerationRequest
from shared.tenants import Tenant, with_defaults

DESK = Tenant.model_validate(
    {
        "name": "desk",
        "model": "small",
        "system": "Be kind.",
        "directive": "L1",
        "deadline_s": 5.0,
        "sampling": {"max_tokens": 64, "temperature": 0.2, "stop": ["END"]},
    }
)


def request(**fields) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": "Why?", "tenant": "desk", **fields})


def turns(made: GenerationRequest) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in made.conversation()]


def test_a_request_that_sets_nothing_gets_all_defaults():
    made = with_defaults(request(top_p=0.5), DESK)
    assert (made.model, made.directive) == ("small", "L1")
    assert turns(made) == [("system", "Be kind."), ("user", "Why?")]
    assert (made.sampling.max_tokens, made.sampling.temperature, made.sampling.stop) == (64, 0.2, ("END",))
    assert GenerationRequest.model_validate_json(made.model_dump_json()) == made  # still a valid message


def test_values_of_the_request_take_precedence():
    said = request(
        prompt=None,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        model="large",
        directive="L0",
        sampling={"max_tokens": 512, "temperature": 0.0, "stop": ["x"]},
    )
    assert with_defaults(said, DESK) == said


def test_each_default_applies_on_its_own():
    made = with_defaults(request(sampling={"temperature": 1.0, "seed": 3}), DESK)
    assert (made.sampling.temperature, made.sampling.seed, made.sampling.max_tokens) == (1.0, 3, 64)


@pytest.mark.parametrize("sampling", [{"temperature": None}, {"stop": []}])
def test_null_and_an_empty_stop_count_as_not_set(sampling):
    made = with_defaults(request(model=None, directive=None, sampling=sampling), DESK)
    assert (made.model, made.sampling.temperature, made.sampling.stop) == ("small", 0.2, ("END",))


def test_a_tenant_without_defaults_and_an_unknown_one_change_nothing():
    asked = request()
    assert with_defaults(asked, None) is asked
    assert with_defaults(asked, Tenant(name="desk")) is asked
    assert with_defaults(asked, Tenant(name="desk", directive="optimize")).directive is None


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u200b", "\ufeff \u2060", "\x00"])
def test_a_blank_system_message_does_not_drop_the_tenants(blank):
    said = request(prompt=None, messages=[{"role": "system", "content": blank}, {"role": "user", "content": "Why?"}])
    assert turns(with_defaults(said, DESK)) == [("system", "Be kind."), ("user", "Why?")]
