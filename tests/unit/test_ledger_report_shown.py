"""How a report is shown: tables, the page, JSON; what is unknown is a dash, never a zero."""

import json
import re

import pytest
from rich.console import Console
from test_ledger_report_accounts import CLEAN_DAY, PURPOSES, books_of, interval

from tests.support.report import MODEL, ZONE, made_day, policy_at, quality_at, record_of
from tools.reporting import render_html, render_tables, to_json
from tools.reporting.assemble import assemble
from tools.reporting.content import summary_lines
from tools.reporting.words import apart, energy, grams, percent


@pytest.fixture(scope="module")
def report():
    return assemble(
        books_of(
            made_day(requests=200).records,
            metered_j=1000.0,
            purposes=PURPOSES,
            intervals=[interval()],
            grid={ZONE: CLEAN_DAY},
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


def test_numbers_are_written_for_people():
    assert [grams(value) for value in (0.0, 0.0123, 4.56, 12_345.0)] == ["0 g", "12.3 mg", "4.56 g", "12.3 kg"]
    assert [energy(value) for value in (12.0, 7_200.0, 7.2e9)] == ["12.0 J", "2.00 Wh", "2.00 MWh"]
    assert (grams(-1.4e-14), percent(-1e-9)) == ("0 g", "0.0 %")
    assert percent(None) == grams(None) == energy(None) == "–"
    assert apart(-0.25) == "0.25 %"
    assert apart(1e-9) == "under 0.001 %"


def test_the_terminal_shows_summary_and_tables(report):
    text = printed(report)
    for words in (MODEL, "carbon saved", "95 % interval", "implied saving", "Zones", "Hours (UTC)", "Prompt groups"):
        assert words in text
    assert "Hours (UTC)" not in printed(report, hours=False)


def test_the_page_needs_nothing_but_itself(report):
    page = render_html(report, title="A day <b>")
    assert page.startswith("<!doctype html>")
    assert "A day &lt;b&gt;" in page
    assert page.count("Plotly.react") >= 1
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert len(page) < 6_000_000
    for title in ("Carbon intensity", "Directive mix", "Grams per request", "Quality", "Energy", "Prompt groups"):
        assert f"<h2>{title}</h2>" in page


def test_names_from_outside_cannot_break_out_of_the_page():
    nasty = assemble(books_of([record_of("a", group="</script><script>alert(1)</script>")]))
    assert "<script>alert(1)" not in render_html(nasty)


def test_an_empty_report_can_be_shown():
    empty = assemble(books_of())
    assert "not known" in printed(empty)
    assert "no policy" in render_html(empty)
    assert to_json(empty)["carbon_saving_pct"] is None


def test_json_holds_the_figures_and_everything_below_them(report):
    document = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert document["evaluations"] == 2
    assert document["policies_published"] == 24
    assert document["energy_metered_j"] == 1000.0
    assert document["carbon_saving_low_pct"] < document["carbon_saving_pct"] < document["carbon_saving_high_pct"]
    assert len(document["report"]["hours"]) == 24


def test_what_was_left_out_of_the_saving_is_said():
    records = [record_of("a"), record_of("b", source="forced"), record_of("c", row={"local-13b/L1": 1.0})]
    lines = dict(summary_lines(assemble(books_of(records, policies=[policy_at(0)]))))
    assert "1 with a directive of their producer's" in lines["not compared"]
    assert "1 under a policy that never draws the reference" in lines["not compared"]
