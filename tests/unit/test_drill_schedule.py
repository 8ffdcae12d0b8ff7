"""The schedule of faults: reproducible by seed, within its limits, and spread over time."""

from itertools import pairwise

import pytest

from shared.kafka.records import PoisonMessageError, parse
from shared.messages import GenerationRequest
from tests.drills.malformed import KINDS, malformed
from tests.drills.schedule import faults, randomness, storm

SEEDS = range(50)


def drawn(seed, scenario="sigkill"):
    return faults(randomness(seed, scenario), number=3, victims=2, hold_s=(1.0, 2.0), within=(0.1, 0.7))


def test_faults_depend_on_seed_and_scenario_only():
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(1) != drawn(1, "sigterm")


def test_faults_keep_their_limits_and_distance():
    for seed in SEEDS:
        plan = drawn(seed)
        assert len(plan) == 3
        assert all(0.1 <= fault.after <= 0.7 and 1.0 <= fault.hold_s <= 2.0 for fault in plan)
        assert all(later.after - earlier.after >= 0.1 for earlier, later in pairwise(plan))
    assert {fault.victim for seed in SEEDS for fault in drawn(seed)} == {0, 1}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_number_of_routers_in_a_storm_stays_within_its_limits(seed):
    running = 2
    moves = storm(randomness(seed, "storm"), moves=12, routers=2, most=4)
    assert [move.after for move in moves] == sorted(move.after for move in moves)
    for move in moves:
        assert move.kind == "join" or move.victim < running
        running += 1 if move.kind == "join" else -1
        assert 1 <= running <= 4


def test_every_kind_of_malformed_message_is_rejected_for_the_expected_reason():
    made = malformed(randomness(1, "malformed"), 20 * len(KINDS))
    assert {message.kind for message in made} == set(KINDS)
    for message in made:
        with pytest.raises(PoisonMessageError) as rejected:
            parse(GenerationRequest, message.value)
        assert rejected.value.reason == message.reason, message
    assert malformed(randomness(1, "malformed"), 40) == made[:40]
