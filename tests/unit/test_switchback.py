"""The schedule of the reference blocks."""

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from shared.fleet import Switchback
from shared.switchback import SwitchbackSchedule

START = datetime(2024, 3, 1, tzinfo=UTC)
MINUTES = [START + timedelta(minutes=minute) for minute in range(30 * 24 * 60)]


def test_one_block_of_every_stratum_is_a_reference_block() -> None:
    schedule = SwitchbackSchedule(Switchback(share=0.1, block_s=1_800.0, washout_s=300.0))
    reference = [schedule.is_reference(at) for at in MINUTES]
    assert sum(reference) / len(reference) == pytest.approx(0.1, abs=0.005)
    hours = {at.hour for at, is_reference in zip(MINUTES, reference, strict=True) if is_reference}
    assert len(hours) > 18


def test_the_washout_after_each_change_counts_for_neither_world() -> None:
    schedule = SwitchbackSchedule(Switchback(share=0.1, block_s=1_800.0, washout_s=600.0))
    for before, at in itertools.pairwise(MINUTES):
        if schedule.is_reference(before) != schedule.is_reference(at):
            assert schedule.world(at) == "washout"
            assert schedule.world(at + timedelta(minutes=9)) == "washout"
            assert schedule.world(at + timedelta(minutes=11)) in ("sprout", "reference")
            assert schedule.next_change(before) == at


def test_the_key_draws_the_blocks() -> None:
    one, other = (SwitchbackSchedule(Switchback(share=0.1, key=key)) for key in ("a", "b"))
    assert [one.is_reference(at) for at in MINUTES] != [other.is_reference(at) for at in MINUTES]
    assert all(one.is_reference(at) == SwitchbackSchedule(one.settings).is_reference(at) for at in MINUTES[:2_000])


def test_without_a_share_there_is_no_reference_block() -> None:
    schedule = SwitchbackSchedule(Switchback(share=0.0))
    assert {schedule.world(at) for at in MINUTES[:5_000]} == {"sprout"}
    assert schedule.next_change(START) is None


def test_a_washout_that_outlasts_the_block_is_rejected() -> None:
    with pytest.raises(ValidationError, match="washout_s"):
        Switchback(block_s=600.0, washout_s=600.0)
