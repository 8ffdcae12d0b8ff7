"""The progress display of the demo, on a terminal and in a file."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

from shared.messages import CarbonIntensity, IntensityPoint
from shared.runtime.clock import ManualClock
from tests.support.report import MODEL, ZONE, policy_at, quality_at
from tools.demo.clients import Tally
from tools.demo.day import PACES, DemoDay
from tools.demo.progress import Progress, describe_policy, sparkline

START = datetime(2024, 2, 8, tzinfo=UTC)
NOW = START + timedelta(hours=6)


def test_the_display_has_time_grid_requests_directives_policy_and_evaluations():
    day = DemoDay(
        model="llama-2-13b-chat", zone=ZONE, trace=Path("t"), workload=Path("w"), start=START, hours=24.0,
        requests=4_000, seed=1, pace=PACES["llama-2-13b-chat"],
    )  # fmt: skip
    tally = Tally(policies={MODEL: policy_at(6)}, policies_published=4, evaluations=1, last_evaluation=quality_at(1))
    tally.answers.update([f"r{n}" for n in range(90)])
    tally.levels.update({"L0": 60, "L1": 30})
    tally.intensities[ZONE] = CarbonIntensity(
        zone=ZONE,
        latest=IntensityPoint(at=NOW, intensity_g_per_kwh=180),
        history=(IntensityPoint(at=NOW - timedelta(hours=1), intensity_g_per_kwh=90),),
        source="csv",
        published_at=NOW,
    )
    console = Console(width=140)
    progress = Progress(day, ManualClock(NOW), tally, SimpleNamespace(sent=100), console)
    with console.capture() as capture:
        console.print(progress.render(NOW))
    shown = capture.get()
    for part in ("06:00 UTC", "180 gCO2eq/kWh", "▁█", "100 of 4,000 sent, 90 answered", "L0 67 %", "1 evaluation;"):
        assert part in shown
    assert "sent 100, answered 90  (L0 60, L1 30)  policies 4  evaluations 1" in progress.line(NOW)


def test_messages_can_neither_control_the_terminal_nor_be_read_as_markup():
    hostile = "\x1b]0;owned\x07 [/no markup]"
    day = DemoDay(
        model="llama-2-13b-chat", zone=ZONE, trace=Path("t"), workload=Path("w"), start=START, hours=24.0,
        requests=4_000, seed=1, pace=PACES["llama-2-13b-chat"],
    )  # fmt: skip
    tally = Tally(
        policies={MODEL: policy_at(6).model_copy(update={"status": "reference", "reason": hostile})},
        last_evaluation=quality_at(1).model_copy(update={"trigger": hostile}),
    )
    tally.levels.update({hostile: 1})
    console = Console(width=200)
    progress = Progress(day, ManualClock(NOW), tally, SimpleNamespace(sent=100), console)
    with console.capture() as capture:
        console.print(progress.render(NOW))
        console.print(progress.line(NOW), markup=False, soft_wrap=True)
    shown = capture.get()
    assert "\x1b" not in shown
    assert shown.count("�]0;owned� [/no markup]") == 4


def test_the_display_without_data():
    assert sparkline([]) == ""
    assert sparkline([5.0, 5.0]) == "▁▁"
    assert "none yet" in describe_policy(None)
