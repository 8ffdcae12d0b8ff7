"""Which option serves a request: drawn by its id, forced by the producer, or the reference."""

import hashlib
import tomllib
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.grouping import LearnedGroups
from services.router.knowledge import Knowledge
from services.router.sampling import becomes_sample
from services.router.selection import UnknownLevelError, draw, select
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


def decide(request_id: str = "r", *, fleet: Fleet = FLEET, task: str | None = None, **changes) -> Decision:
    given = {"policy": policy(ROW), **changes}
    assignment = LearnedGroups().assign(request(1, task=task), model=MODEL, policy=given["policy"])
    return select(request_id=request_id, model=MODEL, assignment=assignment, fleet=fleet, **given)


def test_the_drawn_number_is_the_documented_one_so_that_others_can_draw_it_too():
    digest = hashlib.blake2b(b"salt\0request-1", digest_size=8).digest()
    assert uniform("salt", "request-1") == (int.from_bytes(digest, "big") >> 11) / 2**53
    assert uniform("option:m", "r1") == 0.7357524318363831
    assert 0 <= uniform("salt", "\ud800 ü") < 1


@given(st.text())
def test_every_number_lies_in_the_unit_interval(text):
    assert 0.0 <= uniform("salt", text) < 1.0


def test_options_are_drawn_as_often_as_the_policy_says():
    drawn = Counter(decide(f"request-{number}").level for number in range(20_000))
    for level, probability in ROW.items():
        assert drawn[level] / 20_000 == pytest.approx(probability, abs=0.012)


def test_draws_of_different_models_and_the_choice_of_samples_are_independent():
    first = [uniform("option:a", str(number)) < 0.5 for number in range(4_000)]
    second = [uniform("option:b", str(number)) < 0.5 for number in range(4_000)]
    third = [uniform("sample", str(number)) < 0.5 for number in range(4_000)]
    for one, other in ((first, second), (first, third)):
        assert sum(a == b for a, b in zip(one, other, strict=True)) / 4_000 == pytest.approx(0.5, abs=0.04)


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1), min_size=1), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_an_option_with_a_positive_probability_whatever_the_order_of_the_row(weights, point):
    total = sum(weights.values())
    if total < 1e-6:
        return
    row = {name: weight / total for name, weight in weights.items()}
    drawn = draw(row, point)
    assert row[drawn] > 0
    assert draw(dict(reversed(row.items())), point) == drawn


def test_the_same_request_draws_the_same_option_and_says_with_which_probability():
    made = policy(ROW, version=7)
    first, second = (decide("again", policy=made) for _ in range(2))
    assert first == second
    assert first.source == "policy"
    assert first.policy_version == 7
    assert first.propensities == made.overall
    assert first.propensity == made.overall[f"{first.pool}/{first.level}"]
    assert first.zone == ZONE


def test_a_group_has_its_own_row_and_an_unnamed_one_the_overall_row():
    made = policy({"L0": 1.0}, groups={"qa": {"p/L2": 1.0}})
    assert decide(policy=made, task="qa").level == "L2"
    assert decide(policy=made, task="maths").level == "L0"


def test_without_a_policy_the_reference_is_served():
    decision = decide(policy=None)
    assert (decision.source, decision.pool, decision.level) == ("fallback", "p", "L0")
    assert (decision.propensity, decision.propensities, decision.policy_version) == (1.0, {"p/L0": 1.0}, None)


def test_a_forbidden_level_is_never_drawn_and_the_others_share_what_it_had():
    drawn = Counter((one.level, one.source, round(one.propensity, 3)) for one in decisions(wish="!L1"))
    assert set(drawn) == {("L0", "forced", 0.4), ("L2", "forced", 0.6)}
    assert drawn["L0", "forced", 0.4] == pytest.approx(800, abs=80)


@pytest.mark.parametrize(("row", "level"), [({"L2": 1.0}, "L0"), ({"L0": 1.0}, "L1")])
def test_where_all_requests_go_to_the_forbidden_level_the_first_other_one_serves(row, level):
    forbidden = next(iter(row))
    assert {one.level for one in decisions(policy=policy(row), wish=f"!{forbidden}")} == {level}


def test_the_only_level_cannot_be_forbidden():
    alone = FLEET.model_copy(update={"directives": FLEET.directives[:1]})
    with pytest.raises(UnknownLevelError, match="forbids the only level"):
        decide(policy=None, fleet=alone, wish="!L0")


def decisions(**changes):
    return [decide(f"r{number}", **changes) for number in range(2_000)]


def test_a_forced_level_keeps_the_policys_choice_of_pools_and_is_not_taken_for_a_draw():
    made = policy({}, overall={"p/L0": 0.25, "q/L0": 0.5, "q/L1": 0.25})
    drawn = Counter(
        (one.pool, one.level, one.source, one.propensity)
        for one in (decide(f"r{n}", fleet=TWO_POOLS, policy=made, wish="L2") for n in range(2_000))
    )
    assert set(drawn) == {("p", "L2", "forced", 0.25), ("q", "L2", "forced", 0.75)}
    assert drawn["p", "L2", "forced", 0.25] == pytest.approx(500, abs=80)
    assert decide(policy=None, wish="L1").pool == "p"


def test_an_unknown_level_is_refused_with_the_levels_that_exist():
    with pytest.raises(UnknownLevelError, match=r"'L9' is not in the catalogue.*L0, L1, L2"):
        decide(wish="L9")


def known(*, max_intensity_age_s: float | None = 3_600.0, fleet: Fleet = FLEET) -> Knowledge:
    knowledge = Knowledge(fleet, max_intensity_age_s=max_intensity_age_s)
    knowledge.learn_intensity(intensity(NOW))
    knowledge.learn_policy(policy(ROW, now=NOW))
    return knowledge


@pytest.mark.parametrize(
    ("knowledge", "later_s", "reason"),
    [
        (known(), 0, None),
        (known(), 3_600, None),
        (known(), 3_601, "expired"),
        (known(max_intensity_age_s=600), 601, "stale_intensity"),
        (known(max_intensity_age_s=None), 3_000, None),
        (known(fleet=TWO_POOLS), 0, "stale_intensity"),  # nothing is known of the second pool's zone
        (Knowledge(FLEET, max_intensity_age_s=600), 0, "no_policy"),
    ],
)
def test_a_policy_is_followed_while_it_is_valid_and_its_intensities_are_fresh(knowledge, later_s, reason):
    standing = knowledge.standing(MODEL, NOW + timedelta(seconds=later_s))
    assert standing.fallback == reason
    assert (standing.policy is None) == (reason is not None)


def test_a_policy_with_an_option_that_is_not_served_is_not_followed():
    knowledge = known()
    knowledge.learn_policy(policy({}, overall={"elsewhere/L0": 1.0}, now=NOW + timedelta(seconds=1)))
    assert knowledge.standing(MODEL, NOW).fallback == "unknown_options"
    knowledge.learn_policy(policy({}, overall={"p/L0": 1.0, "elsewhere/L0": 0.0}, now=NOW + timedelta(seconds=2)))
    assert knowledge.standing(MODEL, NOW).fallback is None


def test_of_two_policies_the_later_one_counts_even_if_its_version_begins_again():
    knowledge = known()
    old = policy(ROW, version=9, now=NOW + timedelta(seconds=5))
    new = policy(ROW, version=1, now=NOW + timedelta(seconds=6))
    assert knowledge.learn_policy(old)
    assert knowledge.learn_policy(new)
    assert not knowledge.learn_policy(old)
    assert knowledge.policy(MODEL) == new
    assert not knowledge.learn_intensity(intensity(NOW - timedelta(hours=1)))
    assert knowledge.intensity_age_s(ZONE, NOW) == 0


def test_samples_are_a_share_of_the_requests_that_allow_it():
    decision, forced = decide(), decide(wish="L1")
    kept = [number for number in range(5_000) if becomes_sample(f"r{number}", request(number), decision, share=0.1)]
    assert len(kept) == pytest.approx(500, abs=70)
    assert kept == [n for n in range(5_000) if becomes_sample(f"r{n}", request(n), decision, share=0.1)]
    assert becomes_sample("r", request(1), decision, share=1.0)
    assert not becomes_sample("r", request(1), decision, share=0.0)
    assert not becomes_sample("r", request(1), forced, share=1.0)
    assert not becomes_sample("r", request(1, evaluation_allowed=False), decision, share=1.0)
