"""A short demo: real services, Kafka, PostgreSQL and Triton; simulated GPU and model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deploy.local.config import REPOSITORY
from tests.support.deadlines import REPLY_S, wait_until

pytestmark = pytest.mark.end_to_end


def test_a_short_demo_passes_its_checks_and_stops_every_process(tmp_path: Path, kafka_server):
    """Six hours and 3,000 requests; the fixture `kafka_server` skips the test if Kafka cannot be installed."""
    state = tmp_path / "state"
    html, figures_file = tmp_path / "report.html", tmp_path / "report.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "tools.cli.main", "demo", "--hours", "6", "--requests", "3000",
            "--day-seconds", "600", "--start", "2024-02-08T03:00", "--html", str(html), "--json", str(figures_file),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "SPROUT_LOCAL_STATE": str(state), "SPROUT_LOCAL_INSTALL": str(REPOSITORY / ".sprout")},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(figures_file.read_text())
    assert figures["requests_sent"] == figures["requests_answered"] == 3_000
    assert figures["duplicates"] == figures["dead_letters"] == 0
    assert figures["evaluations"] >= 1
    assert figures["policies_published"] >= 2
    assert figures["prompt_groups_learned"] >= 1
    assert figures["requests_by_learned_groups"] > 0
    assert figures["broker"] == "kafka"
    assert figures["carbon_saving_pct"] > 5
    assert figures["energy_attributed_j"] == pytest.approx(figures["energy_metered_j"], rel=1e-3)
    assert "carbon saved" in done.stdout
    page = html.read_text(encoding="utf-8")
    assert "SAMPLE-SOLAR" in page
    assert "plotly" in page.lower()
    # A killed process may be listed a moment longer.
    wait_until(
        lambda: not [p for p in psutil.process_iter(["cmdline"]) if str(state) in " ".join(p.info["cmdline"] or [])],
        within_s=REPLY_S,
    )
