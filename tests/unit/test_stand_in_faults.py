"""Faults on purpose: as often as asked, the same ones every time, and an error in place of an answer's end."""

import pytest

from deploy.triton.stand_in.faults import MESSAGE, FailingOutlet, FaultDraws, FaultRules

IDS = [f"r{number}" for number in range(4_000)]


class Outlet:
    streams = True

    def __init__(self):
        self.said = []

    def send(self, text, *, tokens, final):
        self.said.append((text, tokens, final))

    def fail(self, message):
        self.said.append(message)

    def end_cancelled(self):
        self.said.append("cancelled")

    def is_cancelled(self):
        return True


def failing(draws):
    return {name for name in IDS if draws.fails_after(name) is not None}


def test_without_a_share_nothing_fails():
    assert failing(FaultDraws(FaultRules())) == set()


def test_the_asked_share_fails_anywhere_on_its_way():
    draws = FaultDraws(FaultRules(error_share=0.3, seed=1))
    ends = [end for name in IDS if (end := draws.fails_after(name)) is not None]
    assert len(ends) / len(IDS) == pytest.approx(0.3, abs=0.03)
    assert 0 <= min(ends) < 0.05
    assert 0.95 < max(ends) < 1
    assert sum(ends) / len(ends) == pytest.approx(0.5, abs=0.05)


def test_the_same_ones_fail_every_time_and_others_with_another_seed_or_at_another_attempt():
    rules = FaultRules(error_share=0.3, seed=1)
    draws = FaultDraws(rules)
    first, second = failing(draws), failing(draws)
    assert first == failing(FaultDraws(rules))
    for others in (second, failing(FaultDraws(FaultRules(error_share=0.3, seed=2)))):
        # As many as independent draws have in common.
        assert len(first & others) / len(IDS) == pytest.approx(0.09, abs=0.03)


def test_a_share_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="'error_share' is a probability"):
        FaultRules(error_share=1.5)


def test_a_failing_answer_begins_as_usual_and_ends_with_the_error():
    inner = Outlet()
    outlet = FailingOutlet(inner)
    assert outlet.streams
    assert outlet.is_cancelled()
    outlet.send("a", tokens=1, final=False)
    outlet.send("b", tokens=1, final=True)
    outlet.fail("unloaded")
    outlet.end_cancelled()
    assert inner.said == [("a", 1, False), MESSAGE, "unloaded", "cancelled"]
