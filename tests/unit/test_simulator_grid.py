"""Recorded grids: hours count from the first row, and nothing is dropped or taken twice in silence."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from tools.simulator.grid import read_grids
from tools.simulator.requests import SimulationInputError

FIRST = datetime(2024, 2, 1, tzinfo=UTC)


def trace(path: Path, values: Iterable[object], *, zones: tuple[str, ...] = ("Z",), minutes: int = 60) -> Path:
    """A file with a row for every value and zone."""
    lines = ["Datetime (UTC),Zone Id,Carbon Intensity gCO₂eq/kWh (direct)"]
    for place, value in enumerate(values):
        lines += [f"{FIRST + place * timedelta(minutes=minutes)},{zone},{value}" for zone in zones]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_gap_at_an_end_of_a_trace_shifts_no_hour(tmp_path: Path) -> None:
    (grid,) = read_grids([trace(tmp_path / "z.csv", ["", "", 12, 13, ""])], column="direct")
    assert grid.begin == FIRST
    np.testing.assert_array_equal(grid.g_per_kwh, [np.nan, np.nan, 12.0, 13.0, np.nan])
    assert grid.missing == 3
    window = grid.window(2, 2)
    assert list(window.g_per_kwh) == [12.0, 13.0]
    assert (window.missing_before(1), window.missing_before(24)) == (1, 2)
    with pytest.raises(SimulationInputError, match=r"1 hours without a value in the window from hour 1 .*02-01 01:00"):
        grid.window(1, 3)


def test_a_zone_in_two_files_is_refused_unless_it_is_not_asked_for(tmp_path: Path) -> None:
    trace(tmp_path / "z_2023.csv", [1, 2])
    trace(tmp_path / "z_2024.csv", [3, 4])
    trace(tmp_path / "y.csv", [5, 6], zones=("Y",))
    with pytest.raises(SimulationInputError, match=r"zone Z is in several files: .*z_2023\.csv, .*z_2024\.csv; join"):
        read_grids([tmp_path], column="direct")
    assert [grid.zone for grid in read_grids([tmp_path], column="direct", zones=["Y"])] == ["Y"]


@pytest.mark.parametrize("minutes", [30, 15, 90])
def test_what_is_not_hourly_is_refused(tmp_path: Path, minutes: int) -> None:
    with pytest.raises(SimulationInputError, match=rf"line 3: .* {minutes} minutes after .*: give hourly means"):
        read_grids([trace(tmp_path / "z.csv", range(9), minutes=minutes)], column="direct")


def test_rows_out_of_order_are_refused_though_they_have_no_value(tmp_path: Path) -> None:
    file = trace(tmp_path / "z.csv", ["", 2, 3], minutes=-60)
    with pytest.raises(SimulationInputError, match=r"does not come after the row before; sort by time"):
        read_grids([file], column="direct")


def test_zones_are_taken_out_of_a_file_of_several(tmp_path: Path) -> None:
    file = trace(tmp_path / "all.csv", [1, 2], zones=("X", "Y", "Z"))
    assert [grid.zone for grid in read_grids([file], column="direct", zones=["Z", "X"])] == ["Z", "X"]
    assert [grid.zone for grid in read_grids([file], column="direct")] == ["X", "Y", "Z"]
    with pytest.raises(SimulationInputError, match="no trace of zone W; there are X, Y, Z"):
        read_grids([file], column="direct", zones=["W"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no zone: it needs a column 'Zone Id'"),
        ("Zone Id,Carbon (direct)\nZ,1\n", "has no column 'Datetime \\(UTC\\)'"),
        ("Datetime (UTC),Zone Id,Carbon (direct)\nnoon,Z,\n2024-02-01,Z,1\n", "line 2: .* must be a time"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "z.csv").write_text(text, encoding="utf-8")
    with pytest.raises(SimulationInputError, match=message):
        read_grids([tmp_path / "z.csv"], column="direct")
