"""How a request is served: usable policy, draw of an option, forced level, reference; which requests are samples."""

import hashlib
import tomllib
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.admission import IncomingRequest, should_sample
from services.router.policy import PolicyCache, PromptGroupCache, UnknownLevelError, draw, select_option
from services.router.settings import RouterSettings
from shared.fleet import Fleet
from shared.hashing import uniform
from shared.messages import Decision
from tests.support.router import MODEL, ZONE, fleet_toml, intensity, policy, request

NOW = datetime(2023, 2, 10, 12, tzinfo=UTC)
FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))
TWO_POOLS = Fleet.model_validate(
    tomllib.loads(
        fleet_toml(["h:1"])
        + '[[pools]]\nname = "q"\nmodel = "m"\nzone = "FR"\n[[pools.endpoints]]\nname = "q0"\ngrpc = "h:2"\n'
    )
)
ROW = {"L0": 0.2, "L1": 0.5, "L2": 0.3}


def decide(record: str = "requests/0/1/2", *, fleet: Fleet = FLEET, task: str | None = None, **changes) -> Decision:
    given = {"policy": policy(ROW), **changes}
    assignment = PromptGroupCache().assign(request(1, task=task), model=MODEL, policy=given["policy"])
    return select_option(record=record, model=MODEL, assignment=assignment, fleet=fleet, **given)


def test_the_drawn_number_is_the_documented_one():
    digest = hashlib.blake2b(b"salt\0request-1", digest_size=8).digest()
    assert uniform("salt", "request-1") == (int.from_bytes(digest, "big") >> 11) / 2**53
    assert uniform("option:m", "r1") == 0.7357524318363831
    assert 0 <= uniform("salt", "\ud800 ü") < 1
    keyed = hashlib.blake2b(b"salt\0request-1", digest_size=8, key=b"secret").digest()
    assert uniform("salt", "request-1", b"secret") == (int.from_bytes(keyed, "big") >> 11) / 2**53


@given(st.text())
def test_every_drawn_number_is_in_the_unit_interval(text):
    assert 0.0 <= uniform("salt", text) < 1.0


def test_options_are_drawn_as_often_as_the_policy_says():
    drawn = Counter(decide(f"request-{number}").level for number in range(5_000))
    for level, probability in ROW.items():
        assert drawn[level] / 5_000 == pytest.approx(probability, abs=0.024)


def test_draws_of_different_models_and_the_choice_of_samples_are_independent():
    first = [uniform("option:a", str(number)) < 0.5 for number in range(4_000)]
    second = [uniform("option:b", str(number)) < 0.5 for number in range(4_000)]
    third = [uniform("sample", str(number)) < 0.5 for number in range(4_000)]
    for one, other in ((first, second), (first, third)):
        assert sum(a == b for a, b in zip(one, other, strict=True)) / 4_000 == pytest.approx(0.5, abs=0.04)


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1), min_size=1), st.floats(0, 1, exclude_max=True))
def test_a_draw_has_a_positive_probability_and_does_not_depend_on_field_order(weights, point):
    total = sum(weights.values())
    if total < 1e-6:
        return
    row = {name: weight / total for name, weight in weights.items()}
    drawn = draw(row, point)
    assert row[drawn] > 0
    assert draw(dict(reversed(row.items())), point) == drawn


def test_the_same_request_draws_the_same_option_and_states_its_probability():
    made = policy(ROW, version=7)
    first, second = (decide("again", policy=made) for _ in range(2))
    assert first == second
    assert first.source == "policy"
    assert first.policy_version == 7
    assert first.propensities == made.overall
    assert first.propensity == made.overall[f"{first.pool}/{first.level}"]
    assert first.zone == ZONE


def test_a_group_has_its_own_probabilities_and_an_unknown_group_the_overall_ones():
    made = policy({"L0": 1.0}, groups={"qa": {"p/L2": 1.0}})
    assert decide(policy=made, task="qa").level == "L2"
    assert decide(policy=made, task="maths").level == "L0"


def test_without_a_policy_the_reference_is_served():
    decision = decide(policy=None)
    assert (decision.source, decision.pool, decision.level) == ("fallback", "p", "L0")
    assert (decision.propensity, decision.propensities, decision.policy_version) == (1.0, {"p/L0": 1.0}, None)


def test_a_forbidden_level_is_never_drawn_and_the_others_share_its_probability():
    drawn = Counter((one.level, one.source, round(one.propensity, 3)) for one in decisions(requested_directive="!L1"))
    assert set(drawn) == {("L0", "forced", 0.4), ("L2", "forced", 0.6)}
    assert drawn["L0", "forced", 0.4] == pytest.approx(800, abs=80)


@pytest.mark.parametrize(("row", "level"), [({"L2": 1.0}, "L0"), ({"L0": 1.0}, "L1")])
def test_if_only_the_forbidden_level_has_probability_the_first_other_one_serves(row, level):
    forbidden = next(iter(row))
    assert {one.level for one in decisions(policy=policy(row), requested_directive=f"!{forbidden}")} == {level}


def test_the_only_level_cannot_be_forbidden():
    alone = FLEET.model_copy(update={"directives": FLEET.directives[:1]})
    with pytest.raises(UnknownLevelError, match="forbids the only level"):
        decide(policy=None, fleet=alone, requested_directive="!L0")


def decisions(**changes):
    return [decide(f"r{number}", **changes) for number in range(2_000)]


def test_a_forced_level_keeps_the_policys_probabilities_of_pools():
    made = policy({}, overall={"p/L0": 0.25, "q/L0": 0.5, "q/L1": 0.25})
    drawn = Counter(
        (one.pool, one.level, one.source, one.propensity)
        for one in (decide(f"r{n}", fleet=TWO_POOLS, policy=made, requested_directive="L2") for n in range(2_000))
    )
    assert set(drawn) == {("p", "L2", "forced", 0.25), ("q", "L2", "forced", 0.75)}
    assert drawn["p", "L2", "forced", 0.25] == pytest.approx(500, abs=80)
    assert decide(policy=None, requested_directive="L1").pool == "p"


def test_a_zone_keeps_the_policys_probabilities_within_it_or_its_levels():
    split = policy(ROW).model_copy(update={"overall": {"p/L0": 0.6, "q/L1": 0.3, "q/L2": 0.1}, "groups": {}})
    for number in range(20):
        record = f"requests/0/{number}/2"
        within = decide(record, fleet=TWO_POOLS, policy=split, zone="FR")
        assert (within.zone, within.source) == ("FR", "forced")
        assert within.propensities == pytest.approx({"q/L1": 0.75, "q/L2": 0.25})
        moved = decide(record, fleet=TWO_POOLS, zone="FR")
        assert moved.propensities == pytest.approx({f"q/{level}": share for level, share in ROW.items()})
    assert decide(fleet=TWO_POOLS, policy=None, zone="FR", requested_directive="L2").pool == "q"
    assert decide(fleet=TWO_POOLS, zone="FR", reference_block=True).level == "L0"


def test_in_a_reference_block_the_reference_serves_whatever_the_policy_says():
    made = policy({"L2": 1.0}, groups={"qa": {"p/L2": 1.0}})
    for known in (made, None):
        decision = decide(policy=known, task="qa", reference_block=True)
        assert (decision.source, decision.group, decision.pool, decision.level) == ("switchback", "qa", "p", "L0")
        assert (decision.propensity, decision.propensities) == (1.0, {"p/L0": 1.0})
        assert decision.policy_version is None
        assert should_sample(incoming_request(1), decision, RouterSettings(sample_share=1.0))


@pytest.mark.parametrize(("directive", "level"), [("L2", "L2"), ("!L0", "L1"), ("!L2", "L0")])
def test_in_a_reference_block_a_clients_directive_is_obeyed(directive, level):
    made = policy({}, overall={"q/L2": 1.0})
    decision = decide(fleet=TWO_POOLS, policy=made, requested_directive=directive, reference_block=True)
    assert (decision.source, decision.pool, decision.level, decision.propensity) == ("forced", "p", level, 1.0)


def test_an_unknown_level_is_rejected_with_the_available_levels():
    with pytest.raises(UnknownLevelError, match=r"'L9' does not exist.*L0, L1, L2"):
        decide(requested_directive="L9")


def cache(*, max_intensity_age_s: float | None = 3_600.0, fleet: Fleet = FLEET) -> PolicyCache:
    policies = PolicyCache(fleet, max_intensity_age_s=max_intensity_age_s)
    policies.intensities.update(intensity(NOW))
    policies.update(policy(ROW, now=NOW))
    return policies


@pytest.mark.parametrize(
    ("policies", "later_s", "reason"),
    [
        (cache(), 0, None),
        (cache(), 3_600, None),
        (cache(), 3_601, "expired"),
        (cache(max_intensity_age_s=600), 601, "stale_intensity"),
        (cache(max_intensity_age_s=None), 3_000, None),
        (cache(fleet=TWO_POOLS), 0, "stale_intensity"),  # no intensity of the second pool's zone
        (PolicyCache(FLEET, max_intensity_age_s=600), 0, "no_policy"),
    ],
)
def test_a_policy_is_usable_while_it_is_valid_and_its_intensities_are_fresh(policies, later_s, reason):
    active = policies.active(MODEL, NOW + timedelta(seconds=later_s))
    assert active.fallback == reason
    assert (active.policy is None) == (reason is not None)


def test_a_policy_with_an_unserved_option_is_not_usable():
    policies = cache()
    policies.update(policy({}, overall={"elsewhere/L0": 1.0}, now=NOW + timedelta(seconds=1)))
    assert policies.active(MODEL, NOW).fallback == "unknown_options"
    policies.update(policy({}, overall={"p/L0": 1.0, "elsewhere/L0": 0.0}, now=NOW + timedelta(seconds=2)))
    assert policies.active(MODEL, NOW).fallback is None


def test_the_policy_created_last_is_the_newest_even_if_versions_restart():
    policies = cache()
    old = policy(ROW, version=9, now=NOW + timedelta(seconds=5))
    new = policy(ROW, version=1, now=NOW + timedelta(seconds=6))
    assert policies.update(old)
    assert policies.update(new)
    assert not policies.update(old)
    assert policies.policy(MODEL) == new
    assert not policies.intensities.update(intensity(NOW - timedelta(hours=1)))
    assert policies.intensities.age_s(ZONE, NOW) == 0


def test_samples_are_a_share_of_the_requests_that_allow_them():
    decision, forced = decide(), decide(requested_directive="L1")
    incoming = [incoming_request(number) for number in range(5_000)]
    tenth, keyed = (RouterSettings(sample_share=0.1, draw_key=key) for key in (None, "a secret of 20 bytes"))
    kept, again, other = (
        [one.record for one in incoming if should_sample(one, decision, each)] for each in (tenth, tenth, keyed)
    )
    assert len(kept) == pytest.approx(500, abs=70)
    assert kept == again != other
    everything, nothing = RouterSettings(sample_share=1.0), RouterSettings(sample_share=0.0)
    assert should_sample(incoming[0], decision, everything)
    assert not should_sample(incoming[0], decision, nothing)
    assert not should_sample(incoming[0], forced, everything)
    assert not should_sample(incoming_request(1, evaluation_allowed=False), decision, everything)


def incoming_request(number: int, **changes) -> IncomingRequest:
    return IncomingRequest(
        request_id="r", record=f"requests/0/{number}/1", model=MODEL, request=request(number, **changes),
        requested_at=NOW, received_at=NOW, deadline=NOW,
    )  # fmt: skip


def test_the_draw_depends_on_the_record_and_the_key_and_not_on_the_producers_id():
    records = [f"requests/0/{offset}/1" for offset in range(2_000)]
    without = [decide(record).level for record in records]
    first, second = ([decide(one, draw_key=key * 16).level for one in records] for key in (b"a", b"b"))
    assert first == [decide(one, draw_key=b"a" * 16).level for one in records]
    for one, other in ((without, first), (without, second), (first, second)):
        agreeing = sum(a == b for a, b in zip(one, other, strict=True))
        assert agreeing / 2_000 == pytest.approx(0.2**2 + 0.5**2 + 0.3**2, abs=0.04)  # as independent draws


def test_records_that_draw_the_cheapest_level_without_the_key_draw_as_the_policy_says_with_it():
    """Timestamps, which a producer may set, are ground until they draw L2."""
    ground = [one for time in range(4_000) if decide(one := f"requests/0/7/{time}").level == "L2"]
    drawn = Counter(decide(one, draw_key=b"a secret of the deployment").level for one in ground)
    assert len(ground) > 1_000
    for level, probability in ROW.items():
        assert drawn[level] / len(ground) == pytest.approx(probability, abs=0.04)
