"""The report on a terminal, as an HTML page and as JSON; an unknown value is a dash, never a zero."""

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from shared.metering.columns import IntensitySeries
from shared.metering.tables import Latency
from tests.support.metered import fleet_days, metered_fleet, readings_of
from tests.support.report import (
    CONSTANT_DAY,
    DAY,
    MODEL,
    POOL,
    PURPOSES,
    ZONE,
    interval_sums,
    made_day,
    policy_at,
    quality_at,
    record_of,
    snapshot_of,
)
from tools.reporting import render_html, render_metrics, render_tables, to_csv, to_json
from tools.reporting.collect import compute_report
from tools.reporting.format import energy, grams, percent, relative_difference
from tools.reporting.plots import power_figure
from tools.reporting.summary import summary_lines


@pytest.fixture(scope="module")
def report():
    return compute_report(
        snapshot_of(
            made_day(requests=200).records,
            metered_j=1000.0,
            purposes=PURPOSES,
            intervals=[interval_sums()],
            grid={ZONE: CONSTANT_DAY},
            policies=[policy_at(hour) for hour in range(24)],
            qualities=[quality_at(1), quality_at(12)],
            groupings=[],
        )
    )


def printed(report, **options):
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as capture:
        render_tables(report, console, **options)
    return capture.get()


def test_numbers_are_formatted_for_people():
    assert [grams(value) for value in (0.0, 0.0123, 4.56, 12_345.0)] == ["0 g", "12.3 mg", "4.56 g", "12.3 kg"]
    assert [energy(value) for value in (12.0, 7_200.0, 7.2e9)] == ["12.0 J", "2.00 Wh", "2.00 MWh"]
    assert (grams(-1.4e-14), percent(-1e-9)) == ("0 g", "0.0 %")
    assert percent(None) == grams(None) == energy(None) == "–"
    assert relative_difference(-0.25) == "0.25 %"
    assert relative_difference(1e-9) == "under 0.001 %"


def test_the_terminal_shows_summary_and_tables(report):
    text = printed(report)
    for words in (
        MODEL,
        "carbon saved",
        "95 % interval",
        "saving by policies",
        "answer quality",
        "Zones",
        "Hours (UTC)",
        "Prompt groups",
    ):
        assert words in text
    assert "Hours (UTC)" not in printed(report, hours=False)


def test_the_page_is_self_contained(report):
    page = render_html(report, title="A day <b>")
    assert page.startswith("<!doctype html>")
    assert "A day &lt;b&gt;" in page
    assert page.count("Plotly.react") >= 1
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert len(page) < 6_000_000
    for title in ("Carbon intensity", "Directive mix", "Grams per request", "Quality", "Energy", "Prompt groups"):
        assert f"<h2>{title}</h2>" in page


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}&lt;b&gt;"


def test_hostile_names_cannot_break_out_of_the_page():
    hostile = [record_of("a", group=HOSTILE, zone=HOSTILE, option="<svg onload=alert(3)>/L0")]
    page = render_html(compute_report(snapshot_of(hostile)), title=HOSTILE)
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page
    assert "<svg onload" not in page
    assert "&lt;img src=x onerror=alert(2)&gt;{{ 7 * 7 }}&amp;lt;b&amp;gt;" in page
    assert page.count("</script>") == page.count("<script>") + page.count('<script type="application/json"')


def test_gain_and_loss_are_both_shown(report):
    lines = dict(summary_lines(report))
    assert lines["carbon saved"].startswith(f"{report.saving.saving_pct:.1f} %")
    assert "compared with the baseline (no directive)" in lines["carbon saved"]
    assert f"({100 - report.quality.preference_pct:.1f} % worse)" in lines["answer quality"]
    assert "% of the requests' carbon" in lines["evaluations"]


@pytest.fixture(scope="module")
def metered():
    fleet = metered_fleet()
    days = fleet_days(fleet)
    hours = DAY.timestamp() + np.arange(48.0) * 3600
    latencies = [
        Latency(pool, in_block, 10, *((20.0, 30.0, 200.0, 300.0) if in_block else (40.0, 60.0, 250.0, 400.0)))
        for pool in (None, POOL)
        for in_block in (False, True)
    ]
    return compute_report(
        snapshot_of(
            days.records,
            grid={ZONE: IntensitySeries(hours, np.full(48, 200.0), np.zeros(48, dtype=bool))},
            fleet=fleet,
            readings=replace(readings_of(days), latencies=latencies),
            policies=[policy_at(0)],
        )
    )


def test_the_meters_are_shown_everywhere(metered):
    lines = dict(summary_lines(metered))
    assert lines["latency"] == (
        "40.0 ms per output token, 60.0 ms p95 (objective 1,200 ms); first token after 250 ms, 400 ms p95; in "
        "reference blocks 30.0 ms per token and 300 ms to the first token, p95"
    )
    assert re.search(r"\d of 4 servers could have slept \d+ % of the time; 1\.\d needed", lines["capacity"])
    text, page = printed(metered), render_html(metered)
    for words in ("saving on the meter", "attributed saving", "why they differ", "Capacity", "Latency and prices"):
        assert words in text
        assert words in page
    for words in ("<h2>Power of the fleet</h2>", "without Sprout, predicted", "servers needed"):
        assert words in page
    figure = power_figure(metered)
    assert len(figure.layout.shapes) == len(metered.metered.blocks) > 0
    assert len(figure.data) == 2


def test_the_json_has_both_savings_and_the_fleet(metered):
    document = json.loads(json.dumps(to_json(metered), allow_nan=False))
    low, high = document["saving_on_meter_interval_pct"]
    assert low < document["saving_on_meter_pct"] < high
    low, high = document["attributed_saving_interval_pct"]
    assert low < document["attributed_saving_pct"] < high
    assert document["net_of_evaluator"] is True
    assert document["fleet_energy_j"] > document["idle_energy_j"] > 0
    assert document["endpoints"] == 4
    assert 1 <= document["endpoints_needed_mean"] <= 4
    assert (document["tpot_p95_ms"], document["ttft_p95_ms"], document["tpot_objective_ms"]) == (60.0, 400.0, 1200.0)
    assert document["report"]["metered"]["pools"][0]["pool"] == POOL


def test_without_meters_the_report_says_so(report):
    lines = dict(summary_lines(report))
    assert lines["saving on the meter"].startswith("not known: the fleet file is unknown")
    assert not {"why they differ", "pools left out", "capacity", "latency", "price of a token"} & lines.keys()
    page = render_html(report)
    assert "Power of the fleet" not in page
    assert "not known; see the summary" in page
    document = to_json(report)
    assert document["saving_on_meter_pct"] is None
    assert document["saving_on_meter_interval_pct"] is None


def test_an_empty_report_can_be_shown():
    empty = compute_report(snapshot_of())
    assert "not known" in printed(empty)
    assert "no policy" in render_html(empty)
    assert to_json(empty)["carbon_saving_pct"] is None


def test_json_holds_key_figures_and_all_details(report):
    document = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert document["evaluations"] == 2
    assert document["policies_published"] == 24
    assert document["energy_metered_j"] == 1000.0
    assert document["carbon_saving_low_pct"] < document["carbon_saving_pct"] < document["carbon_saving_high_pct"]
    assert len(document["report"]["hours"]) == 24


def test_requests_excluded_from_the_saving_are_reported_with_the_reason():
    records = [record_of("a"), record_of("b", source="forced"), record_of("c", row={"local-13b/L1": 1.0})]
    lines = dict(summary_lines(compute_report(snapshot_of(records, policies=[policy_at(0)]))))
    assert "1 with a directive chosen by the client" in lines["not compared"]
    assert "1 under a policy that never chooses the baseline" in lines["not compared"]


def test_the_figures_as_metrics_leave_out_what_is_unknown(report):
    net = report.net
    text = render_metrics(report)
    assert f'sprout_attributed_saving_ratio{{bound="value"}} {net.saving_pct / 100.0}' in text
    assert f'sprout_attributed_saving_ratio{{bound="low"}} {net.saving_interval.low / 100.0}' in text
    assert f"sprout_attributed_saved_grams {net.saved_g}" in text
    assert "sprout_saving_on_meter_ratio{bound=" not in text
    assert "sprout_saved_on_meter_grams" not in text


def test_every_table_is_a_csv_file_and_no_label_becomes_a_formula():
    records = made_day(requests=50).records
    for record in records:
        record["grp"] = "=1+1"
    files = to_csv(compute_report(snapshot_of(records, policies=[policy_at(hour) for hour in range(24)])))
    assert {"summary.csv", "hours.csv", "groups.csv", "zones.csv"} <= files.keys()
    (group,) = csv.DictReader(io.StringIO(files["groups.csv"]))
    assert (group["group"], group["requests"]) == ("'=1+1", "50")
    assert float(group["saving.emitted_g"]) > 0
    summary = {row["figure"]: row["value"] for row in csv.DictReader(io.StringIO(files["summary.csv"]))}
    assert summary["saving_on_meter_pct"] == ""
    assert float(summary["carbon_saving_pct"]) > 0
