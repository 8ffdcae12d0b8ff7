"""The report's saving on the meter, and what to know about its readings."""

from dataclasses import dataclass

from shared.metered_saving import Estimate, FleetBins, MeteredSaving
from shared.metering.columns import Flags
from shared.metering.estimation import FleetHistory, Roles, bins_in_period, estimate_saving
from shared.metering.tables import MeterTable
from tools.reporting.format import percent, significant_digits
from tools.reporting.meter_model import MeterSaving
from tools.reporting.query import Snapshot
from tools.reporting.savings import Interval

MUCH_EXTRAPOLATION_PCT = 5.0


@dataclass(frozen=True, slots=True)
class Estimation:
    """The estimate of one report; what is unknown is None.

    Attributes:
        reason: why there is no saving, and what to do; empty with a saving.
        bins: input of the estimator; None if there is none.
        result: its result.
        notes: other things to know about the readings.
    """

    saving: MeterSaving | None
    reason: str
    bins: FleetBins | None = None
    result: MeteredSaving | None = None
    notes: tuple[str, ...] = ()


def estimate(snapshot: Snapshot, roles: Roles) -> Estimation:
    """Estimate the saving on the meter, or say why it cannot be estimated."""
    table, selection = snapshot.readings.table, snapshot.selection
    history = FleetHistory(snapshot.fleet, snapshot.readings, snapshot.grid)
    found = estimate_saving(history, roles, since=selection.since, until=selection.until)
    if found.energy is None or found.carbon is None or found.result is None or table is None:
        return Estimation(None, found.reason, found.bins, found.result)
    saving = MeterSaving(
        saved_g=found.carbon.saved.value,
        saved_g_interval=_interval(found.carbon.saved),
        saved_j=found.energy.saved.value,
        saved_j_interval=_interval(found.energy.saved),
        saving_pct=None if found.energy.saved_pct is None else found.energy.saved_pct.value,
        saving_interval=None if found.energy.saved_pct is None else _interval(found.energy.saved_pct),
        carbon_saving_pct=None if found.carbon.saved_pct is None else found.carbon.saved_pct.value,
        carbon_saving_interval=None if found.carbon.saved_pct is None else _interval(found.carbon.saved_pct),
        without_j=found.energy.without_sprout,
        without_g=found.carbon.without_sprout,
        hours=found.hours,
        hours_left_out=found.hours_left_out,
        extrapolated_pct=100.0 * found.result.extrapolated_share,
    )
    in_period = bins_in_period(table, selection.since, selection.until)
    return Estimation(saving, "", found.bins, found.result, _notes(saving, table, roles, in_period))


def _interval(estimate: Estimate) -> Interval:
    return Interval(estimate.low, estimate.high)


def _notes(saving: MeterSaving, table: MeterTable, roles: Roles, in_period: Flags) -> tuple[str, ...]:
    notes = []
    if saving.hours_left_out > 0:
        gaps = [
            table.endpoint[place]
            for place in table.of_pools([*roles.serving, *roles.judging])
            if not table.complete[place][in_period].all()
        ]
        notes.append(
            f"{significant_digits(saving.hours_left_out, 2)} h are left out because a reading or a carbon intensity is "
            f"missing or wrong (endpoints without all readings: {', '.join(gaps) or 'none'})"
        )
    if saving.extrapolated_pct > MUCH_EXTRAPOLATION_PCT:
        notes.append(
            f"in {percent(saving.extrapolated_pct)} of the time the demand was outside of that of every reference "
            "block, where the estimate extrapolates"
        )
    return tuple(notes)
