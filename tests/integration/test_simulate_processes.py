"""`sprout simulate` in several processes."""

import json

import pytest
from typer.testing import CliRunner

from tools.cli.main import app

pytestmark = pytest.mark.integration


def test_several_processes_compute_what_one_does(tmp_path):
    found = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        options = ["--schemes", "base,sprout_sta,sprout", "--hours", "24", "--jobs", jobs, "--out", str(out)]
        result = CliRunner().invoke(app, ["simulate", *options])
        assert result.exit_code == 0, result.output
        found.append(json.loads((out / "summary.json").read_text()))
    assert found[0] == found[1]
