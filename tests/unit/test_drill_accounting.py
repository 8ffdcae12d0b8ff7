"""The counts of a drill: lost and duplicate answers, dead letters of malformed messages, results."""

from collections import Counter

from tests.drills.accounting import Counts, Letter, Messages, Result, count, remarks, table

USED_KEYS = (
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
"""Keys of `drill.json` that other tools use."""


def messages(**changes: object) -> Messages:
    return Messages(**{"sent": {"a", "b", "c"}, "answers": Counter("abc"), **changes})


def result_of(counts: Counts, **changes: object) -> Result:
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


def test_one_answer_per_request_is_no_problem():
    counts = count(messages())
    assert (counts.sent, counts.answered, counts.lost, counts.answered_twice, counts.orphans) == (3, 3, 0, 0, 0)
    assert counts.problems() == ()


def test_lost_and_duplicate_answers_are_counted_once_per_request():
    counts = count(messages(answers=Counter({"a": 1, "b": 3})))
    assert (counts.answered, counts.lost, counts.answered_twice) == (2, 1, 1)
    assert counts.problems() == ("1 requests lost", "1 requests answered twice")


def test_an_answer_that_names_another_record_is_a_problem():
    counts = count(messages(records={"a": "0", "b": "1"}, answered_records={"a": {"0"}, "b": {"1", "2"}}))
    assert counts.problems() == ("1 requests with an answer that names another record",)


def test_an_error_response_is_an_answer_and_counted_separately():
    counts = count(messages(errors={"b": "upstream_error", "c": "upstream_error", "orphan": "unknown_model"}))
    assert (counts.answered, counts.answered_error, counts.errors) == (3, 2, {"upstream_error": 2})
    assert counts.problems() == ()


def test_an_answer_without_a_request_is_an_orphan_unless_the_request_was_not_acknowledged():
    counts = count(messages(unsent={"d"}, answers=Counter({"a": 1, "b": 1, "c": 1, "d": 1, "x": 2})))
    assert (counts.sent, counts.answered, counts.unsent, counts.orphans) == (3, 3, 1, 2)
    assert counts.problems() == (
        "1 requests were not acknowledged by Kafka",
        "2 orphan answers, to requests that were not sent",
    )


def test_a_dead_letter_must_have_the_original_bytes_and_reason():
    malformed = {(0, number): (b"x%d" % number, "invalid_json") for number in range(5)}
    right = [Letter((0, number), b"x%d" % number, "invalid_json") for number in (0, 1)]
    wrong = [Letter((0, 2), b"cut", "invalid_json"), Letter((0, 3), b"x3", "handler_error"), Letter((9, 9), b"", "")]
    counts = count(messages(malformed=malformed, letters=[*right, right[0], *wrong]))
    assert (counts.malformed_sent, counts.dead_lettered) == (5, 2)
    assert (counts.dead_lettered_wrong, counts.dead_lettered_twice) == (3, 1)
    assert len(counts.problems()) == 3


def test_a_result_is_a_flat_object_with_the_keys_that_other_tools_use():
    written = result_of(count(messages(answers=Counter({"a": 2, "b": 1})))).to_json()
    assert {key: written[key] for key in USED_KEYS} == {
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


def test_an_unexpected_exit_is_a_remark_without_its_log_and_no_failure():
    result = result_of(count(messages()), triton_died=("triton-0 was ended by SIGSEGV. The end of x:\nlast words",))
    assert result.passed
    assert remarks([result]) == ["sigkill: triton-0 was ended by SIGSEGV. The end of x:"]
    assert table([result]).row_count == 1


def test_a_scenario_that_ended_early_has_not_passed():
    assert not result_of(count(messages()), problems=("ProcessFailedError: router1 ended",)).passed
