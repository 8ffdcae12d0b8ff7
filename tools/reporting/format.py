"""Formats numbers, times and options for people; an unknown value is a dash, never a zero."""

from collections.abc import Mapping
from datetime import datetime

from shared.messages import split_option
from tools.reporting.model import Report
from tools.reporting.savings import Interval

UNKNOWN = "–"
WH = 3600.0
ROUNDING = 1e-9
"""Grams or joules below this are rounding errors of floating-point sums."""


def percent(value: float | None, digits: int = 1) -> str:
    """`12.3 %`."""
    return UNKNOWN if value is None else f"{value:z.{digits}f} %"


def percent_range(interval: Interval | None) -> str:
    """`10.1 to 14.5 %`."""
    return UNKNOWN if interval is None else f"{interval.low:z.1f} to {interval.high:z.1f} %"


def grams_range(interval: Interval | None) -> str:
    """`1.23 to 1.45 kg`, the units that `grams` chooses."""
    return UNKNOWN if interval is None else f"{grams(interval.low)} to {grams(interval.high)}"


def decimal(value: float | None) -> str:
    """`1.2`."""
    return UNKNOWN if value is None else f"{value:.1f}"


def milliseconds(value: float | None) -> str:
    """`12.3 ms`."""
    return UNKNOWN if value is None else f"{significant_digits(value)} ms"


def grams(value: float | None) -> str:
    """gCO2eq with three significant digits, in mg, g, kg or t."""
    if value is None:
        return UNKNOWN
    return _scaled(value, ((1e6, "t"), (1e3, "kg"), (1.0, "g"), (1e-3, "mg")))


def energy(joules: float | None) -> str:
    """Energy with three significant digits, in J, Wh, kWh or MWh."""
    if joules is None:
        return UNKNOWN
    return _scaled(joules, ((1e6 * WH, "MWh"), (1e3 * WH, "kWh"), (WH, "Wh"), (1.0, "J")))


def intensity(value: float | None) -> str:
    """Carbon intensity, whole gCO2eq/kWh."""
    return UNKNOWN if value is None else f"{value:.0f}"


def share(part: float, whole: float) -> str:
    """`12 %`; a dash if the whole is 0."""
    return UNKNOWN if whole <= 0 else percent(100.0 * part / whole, 0)


def timestamp(value: datetime | None) -> str:
    """Date and minute, UTC."""
    return UNKNOWN if value is None else f"{value:%Y-%m-%d %H:%M}"


def option_names(report: Report) -> dict[str, str]:
    """Display names of options: only the level if all options are on one pool."""
    options = dict.fromkeys([*report.options, *report.references, *(judged.option for judged in report.quality.judged)])
    pools = {split_option(option)[0] for option in options}
    return {option: split_option(option)[1] if len(pools) == 1 else option for option in options}


def levels_of(report: Report) -> tuple[str, ...]:
    """Directive levels served, in order."""
    return tuple(sorted({split_option(option)[1] for option in report.options}, key=lambda level: int(level[1:])))


def level_shares(counts: Mapping[str, int], levels: tuple[str, ...]) -> list[str]:
    """Share of requests by level, over all pools.

    Args:
        counts: requests by option.
    """
    total = sum(counts.values())
    served = [(split_option(option)[1], count) for option, count in counts.items()]
    return [share(sum(count for name, count in served if name == level), total) for level in levels]


def relative_difference(percentage: float) -> str:
    """Relative difference of two accounts, %, without its sign; rounding errors show as `under 0.001 %`."""
    return f"{significant_digits(abs(percentage), 2)} %" if abs(percentage) >= 1e-3 else "under 0.001 %"


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    if abs(value) < ROUNDING:
        return f"0 {'g' if units[-1][1] == 'mg' else units[-1][1]}"
    size, unit = next((scale for scale in units if abs(value) >= scale[0]), units[-1])
    return f"{significant_digits(value / size)} {unit}"


def significant_digits(value: float, digits: int = 3) -> str:
    """A number with that many significant digits: `1,234`, `12.3`, `0.0123`."""
    if value == 0:
        return "0"
    before = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if before:
        return f"{value:,.{max(0, digits - before)}f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-4 else f"{value:.1e}"
