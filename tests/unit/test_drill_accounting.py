"""What a drill counts: lost, answered twice, and every malformed message with its dead letter."""

from collections import Counter

from tests.drills.accounting import Books, Counts, Letter, count
from tests.drills.result import Result, remarks, table

ASKED = (
    "scenario",
    "sent",
    "answered",
    "lost",
    "answered_twice",
    "malformed_sent",
    "dead_lettered",
    "peak_rss_mb",
    "seconds",
)
"""Keys of `drill.json` that others rely on."""


def books(**changes: object) -> Books:
    return Books(**{"sent": {"a", "b", "c"}, "answers": Counter("abc"), **changes})


def shown(counts: Counts, **changes: object) -> Result:
    values = {
        "scenario": "sigkill",
        "seed": 7,
        "scale": 0.5,
        "counts": counts,
        "peak_rss_mb": 101.5,
        "seconds": 12.3,
        "faults": ("1.0 s: SIGKILL router1",),
        "uncommitted": 0,
        "longest_answer_s": 9.0,
        "problems": counts.problems(),
    }
    return Result(**values | changes)


def test_all_is_well_when_every_request_has_one_answer():
    counts = count(books())
    assert (counts.sent, counts.answered, counts.lost, counts.answered_twice, counts.strays) == (3, 3, 0, 0, 0)
    assert counts.problems() == ()


def test_what_has_no_answer_is_lost_and_what_has_several_is_doubled_once():
    counts = count(books(answers=Counter({"a": 1, "b": 3})))
    assert (counts.answered, counts.lost, counts.answered_twice) == (2, 1, 1)
    assert counts.problems() == ("1 requests lost", "1 requests answered twice")


def test_an_error_is_an_answer_and_told_apart():
    counts = count(books(errors={"b": "upstream_error", "c": "upstream_error", "stray": "unknown_model"}))
    assert (counts.answered, counts.answered_error, counts.errors) == (3, 2, {"upstream_error": 2})
    assert counts.problems() == ()


def test_an_answer_to_nobody_is_a_stray_unless_kafka_has_the_request_without_having_said_so():
    counts = count(books(unsent={"d"}, answers=Counter({"a": 1, "b": 1, "c": 1, "d": 1, "x": 2})))
    assert (counts.sent, counts.answered, counts.unsent, counts.strays) == (3, 3, 1, 2)
    assert counts.problems() == (
        "1 requests were not acknowledged by Kafka",
        "2 answers to requests that nobody sent",
    )


def test_a_dead_letter_counts_with_its_bytes_and_its_reason_alone():
    malformed = {(0, number): (b"x%d" % number, "invalid_json") for number in range(5)}
    right = [Letter((0, number), b"x%d" % number, "invalid_json") for number in (0, 1)]
    wrong = [Letter((0, 2), b"cut", "invalid_json"), Letter((0, 3), b"x3", "handler_error"), Letter((9, 9), b"", "")]
    counts = count(books(malformed=malformed, letters=[*right, right[0], *wrong]))
    assert (counts.malformed_sent, counts.dead_lettered) == (5, 2)
    assert (counts.dead_lettered_wrong, counts.dead_lettered_twice) == (3, 1)
    assert len(counts.problems()) == 3


def test_a_result_is_one_flat_object_with_the_keys_that_others_rely_on():
    written = shown(count(books(answers=Counter({"a": 2, "b": 1})))).to_json()
    assert {key: written[key] for key in ASKED} == {
        "scenario": "sigkill",
        "sent": 3,
        "answered": 2,
        "lost": 1,
        "answered_twice": 1,
        "malformed_sent": 0,
        "dead_lettered": 0,
        "peak_rss_mb": 101.5,
        "seconds": 12.3,
    }
    assert (written["passed"], written["seed"], written["scale"]) == (False, 7, 0.5)
    assert written["problems"] == ("1 requests lost", "1 requests answered twice")


def test_what_died_by_itself_is_told_without_its_log_and_does_not_fail_the_scenario():
    result = shown(count(books()), triton_died=("triton-0 was ended by SIGSEGV. The end of x:\nlast words",))
    assert result.passed
    assert remarks([result]) == ["sigkill: triton-0 was ended by SIGSEGV. The end of x:"]
    assert table([result]).row_count == 1


def test_a_scenario_that_could_not_be_played_to_its_end_has_not_passed():
    assert not shown(count(books()), problems=("ProcessFailedError: router1 ended",)).passed
