"""Small prompt groups are counted together; the numbers of rows and the time of a report do not grow with labels."""

from datetime import timedelta

import numpy as np

from tests.support.report import CONSTANT_DAY, DAY, ZONE, made_day, policy_at, quality_at, record_of, snapshot_of
from tools.reporting.collect import compute_report
from tools.reporting.folding import FEWEST_REQUESTS, MOST_GROUPS, fold_small_groups
from tools.reporting.json_report import to_json
from tools.reporting.query import LearnedGroups
from tools.reporting.tables import group_table

FLOOD = 2_000


def labelled(number: int, group: str) -> dict[str, object]:
    return record_of(f"f{number}", group=group, at=DAY + timedelta(seconds=number))


def test_small_groups_share_one_row_at_the_end_and_nothing_is_lost():
    day = made_day(requests=300)
    flood = [labelled(number, f"label-{number}") for number in range(FLOOD)]
    quality = quality_at(3)
    counts = (*quality.counts, quality.counts[0].model_copy(update={"group": "label-7"}))
    snapshot = snapshot_of(
        [*day.records, *flood],
        grid={ZONE: CONSTANT_DAY},
        policies=[policy_at(hour) for hour in range(24)],
        qualities=[quality.model_copy(update={"counts": counts})],
    )
    report = compute_report(snapshot)
    assert [row.group for row in report.groups] == ["alpaca", "gsm8k", "triviaqa", f"other groups ({FLOOD:,})"]
    other = report.groups[-1]
    assert (other.groups, other.requests, other.task) == (FLOOD, FLOOD, "")
    assert sum(row.requests for row in report.groups) == report.requests.settled
    assert sum(row.energy_j for row in report.groups) == np.sum(snapshot.requests.energy_j)
    assert len(report.measured) <= 4 * 3
    assert not any("label-" in share.group for share in report.quality.judged)


def test_only_the_largest_groups_have_a_row():
    records = [
        labelled(1_000 * group + number, f"group-{group:02}")
        for group in range(MOST_GROUPS + 5)
        for number in range(FEWEST_REQUESTS + group)
    ]
    _, folded = fold_small_groups(snapshot_of(records))
    assert folded.names == {f"group-{group:02}" for group in range(5)}


def test_a_single_small_group_and_learned_groups_keep_their_names():
    alone = snapshot_of([labelled(0, "default")])
    assert fold_small_groups(alone)[0] is alone
    learned = snapshot_of(
        [labelled(number, f"v1.{number:02}") for number in range(9)], groupings=[LearnedGroups("v1", DAY, 9, ())]
    )
    assert fold_small_groups(learned)[0] is learned


def test_groups_show_since_when_they_are_settled_and_how_many_prompts_were_not_judged():
    since = DAY - timedelta(hours=30)
    early = policy_at(0).model_copy(update={"settled": {"gsm8k": since}})
    newest = policy_at(1).model_copy(update={"settled": {"alpaca": since}})
    skipped = [
        quality_at(hour).model_copy(update={"skipped": n, "skipped_by_group": {"alpaca": n - 1, f"label-{n}": 1}})
        for hour, n in ((3, 8), (6, 5))
    ]
    report = compute_report(
        snapshot_of(
            [*made_day(requests=300).records, labelled(5, "label-5"), labelled(8, "label-8")],
            grid={ZONE: CONSTANT_DAY},
            policies=[early, newest],
            qualities=skipped,
        )
    )
    shown = {row.group: (row.settled_since, row.not_judged) for row in report.groups}
    assert shown == {"alpaca": (since, 11), "gsm8k": (None, 0), "triviaqa": (None, 0), "other groups (2)": (None, 2)}
    assert {row["group"]: row["settled_since"] for row in to_json(report)["report"]["groups"]}["alpaca"] == (
        since.isoformat()
    )
    table = group_table(report)
    assert table.columns[-2:] == ("settled since (UTC)", "not judged")
    assert table.rows[0][-2:] == (f"{since:%Y-%m-%d %H:%M}", "11")
    nothing = group_table(compute_report(snapshot_of(made_day(requests=300).records, policies=[policy_at(0)])))
    assert "not judged" not in nothing.columns
