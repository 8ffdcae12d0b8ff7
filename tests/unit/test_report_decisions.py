"""The report shows why the newest policies are what they are."""

from shared.messages import LimitOutcome
from tests.support.report import CONSTANT_DAY, MODEL, REFERENCE, ZONE, made_day, policy_at, snapshot_of
from tools.reporting.collect import compute_report
from tools.reporting.json_report import to_json
from tools.reporting.tables import group_table, limit_table

BINDING = LimitOutcome(required=0.9, mean=0.93, margin=0.03, carbon_points_per_point=1.25)
LOOSE = LimitOutcome(required=0.97, mean=1.01, margin=0.01, carbon_points_per_point=0.0)
BRIEF = REFERENCE.replace("L0", "L1")
BRIEFER = REFERENCE.replace("L0", "L2")


def report_of(**fields):
    early = policy_at(0).model_copy(update={"limits": {"preference": LOOSE}, "extra_g": {"gsm8k": {BRIEF: 9.0}}})
    newest = policy_at(1).model_copy(update=fields)
    return compute_report(
        snapshot_of(made_day(requests=300).records, grid={ZONE: CONSTANT_DAY}, policies=[early, newest])
    )


def test_the_limits_of_the_newest_policy_are_shown_with_margin_and_price():
    report = report_of(limits={"preference": BINDING, "correctness": LOOSE})
    table = limit_table(report)
    assert [row[:2] for row in table.rows] == [(MODEL, "correctness"), (MODEL, "preference")]
    assert table.rows[0][3:] == ("97.00 %", "101.00 %", "1.00 points", "100.00 %", "nothing: not binding")
    assert table.rows[1][3:] == ("90.00 %", "93.00 %", "3.00 points", "90.00 %", "1.2 points of carbon")
    (_, preference) = to_json(report)["report"]["limits"]
    assert (preference["metric"], preference["margin"], preference["policy_version"]) == ("preference", 0.03, 2)


def test_each_group_has_the_best_option_that_is_not_chosen():
    extra = {"gsm8k": {REFERENCE: 0.0, BRIEF: 0.002, BRIEFER: 0.005}, "alpaca": {REFERENCE: 0.0, BRIEF: 0.0}}
    report = report_of(extra_g=extra)
    found = {row.group: (row.next_option, row.next_option_extra_g) for row in report.groups}
    assert found == {"alpaca": (None, None), "gsm8k": (BRIEF, 0.002), "triviaqa": (None, None)}
    table = group_table(report)
    assert table.columns[-1] == "next best option: all would emit more by"
    assert [row[-1] for row in table.rows] == ["", "L1: 2.00 mg", ""]


def test_policies_of_an_earlier_release_explain_nothing():
    report = report_of()
    assert not limit_table(report).rows
    assert not any(column.startswith("next best") for column in group_table(report).columns)
