"""Writes SAMPLE-SOLAR.csv: ten synthetic days of a grid with much solar power, in the format of Electricity Maps.

`python -m deploy.local.traces.build` writes it, `--check` checks the file.
"""

import argparse
import csv
import io
import math
import random
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

TRACE = Path(__file__).parent / "SAMPLE-SOLAR.csv"
BEGIN = datetime(2024, 2, 1, tzinfo=UTC)
DAYS = 10
UTC_OFFSET_HOURS = -8
SEED = 20240201
HEADER = (
    "Datetime (UTC)",
    "Country",
    "Zone Name",
    "Zone Id",
    "Carbon Intensity gCO₂eq/kWh (direct)",
    "Carbon Intensity gCO₂eq/kWh (LCA)",
    "Low Carbon Percentage",
    "Renewable Percentage",
    "Data Source",
    "Data Estimated",
    "Data Estimation Method",
)


def intensity(local_hour: float, sunshine: float, noise: float) -> float:
    """Direct gCO2eq/kWh: sun at noon, a steep evening, a flat night; `sunshine` in [0, 1]."""
    sun = sunshine * math.pow(max(0.0, math.cos(2 * math.pi * (local_hour - 12.5) / 24.0)), 0.7)
    evening = math.exp(-(((local_hour - 19.0) / 2.4) ** 2))
    return 262.0 - 175.0 * sun + 88.0 * evening + noise


def rows() -> list[tuple[str, ...]]:
    """One row an hour."""
    rng = random.Random(SEED)
    sunshine = [rng.uniform(0.72, 1.0) for _ in range(DAYS + 1)]
    noise = 0.0
    found: list[tuple[str, ...]] = []
    for hour in range(DAYS * 24):
        moment = BEGIN + timedelta(hours=hour)
        local = moment + timedelta(hours=UTC_OFFSET_HOURS)
        noise = 0.7 * noise + rng.gauss(0.0, 5.0)
        direct = intensity(local.hour, sunshine[(local - BEGIN).days + 1], noise)
        low_carbon = 100.0 * (1.0 - direct / 480.0)
        found.append(
            (
                f"{moment:%Y-%m-%d %H:%M:%S}",
                "Nowhere",
                "A made-up grid with much solar power",
                "SAMPLE-SOLAR",
                f"{direct:.2f}",
                f"{direct * 0.98 + 66.0:.2f}",
                f"{low_carbon:.2f}",
                f"{low_carbon * 0.85:.2f}",
                "synthetic",
                "false",
                "",
            )
        )
    return found


def text() -> str:
    """The file."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(rows())
    return out.getvalue()


def main() -> None:
    """Write the file, or check it."""
    parser = argparse.ArgumentParser(description="Write the synthetic sample trace.")
    parser.add_argument("--check", action="store_true", help="only check the file")
    if not parser.parse_args().check:
        TRACE.write_text(text(), encoding="utf-8")
    elif TRACE.read_text(encoding="utf-8") != text():
        sys.stderr.write(f"{TRACE.name} is out of date: run this script without --check\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
