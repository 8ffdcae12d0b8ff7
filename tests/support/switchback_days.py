"""Days of a simulated fleet with switchback blocks whose true saving is known: both worlds are run.

Everything that could make the estimate's error correlated varies: load and task mix from hour to hour and day to day,
the length of answers in a way that the prompt groups do not show, and the power of the servers (temperature).
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.stats import gamma

from shared.batch_curve import MEASURED, BatchCurve
from shared.carbon import JOULES_PER_KWH
from shared.fleet import Switchback
from shared.metered_saving import DAY_S, FleetBins
from shared.pools import Dispatch
from shared.switchback import SwitchbackSchedule
from tools.reporting.demand import spread_over_bins
from tools.simulator.fleet import needed_nearby, server_power_w

Floats = NDArray[np.float64]

BEGIN = datetime(2024, 1, 1, tzinfo=UTC)
MINUTES = 1_440
BIN_MINUTES = 5

TASK_TOKENS = np.array([60.0, 120.0, 200.0, 300.0, 420.0, 550.0])
"""Mean tokens of an answer without a directive, by task."""

TASK_SHARES = np.array([0.15, 0.2, 0.25, 0.2, 0.12, 0.08])
SPROUT_TOKENS = np.array([0.55, 0.40, 0.30, 0.25, 0.22, 0.20])
"""Share of the tokens that is left with directives, by task."""

LENGTH_SHAPE = 1.3
"""Of the gamma distribution of the answers' lengths."""

LENGTHS = tuple(gamma(LENGTH_SHAPE, scale=1.0 / LENGTH_SHAPE).ppf((np.arange(10) + 0.5) / 10.0))
"""Equally likely lengths of an answer, relative to its task's mean."""

EVALUATOR_SHARE = 0.005
"""Tokens of the evaluator per token of the reference; only with Sprout."""


@dataclass(frozen=True, kw_only=True)
class FleetDays:
    """What is simulated.

    Attributes:
        requests_per_hour: mean. Steps are stretched so that they fill the servers to batch 64 at the usual peak.
        length_drift, power_drift: standard deviations of unseen changes of the answers' length and of the power.
        dispatch, sleep: of the world without Sprout.
        g_per_kwh: (hours,), carbon intensity; None: synthetic.
    """

    days: int
    seed: int
    servers: int = 16
    curve: str = "qwen3-14b-h100"
    requests_per_hour: float = 10_000.0
    share: float = 0.02
    block_s: float = 1_800.0
    washout_s: float = 300.0
    length_drift: float = 0.05
    power_drift: float = 0.01
    dispatch: Dispatch = "spread"
    sleep: bool = False
    g_per_kwh: Floats | None = None


@dataclass(frozen=True, eq=False)
class Truth:
    """Energy, J, and carbon, g, of every day, (days,): without Sprout, and as it was."""

    without_j: Floats
    actual_j: Floats
    without_g: Floats
    actual_g: Floats

    @property
    def saved_pct(self) -> Floats:
        """Energy saved, %."""
        return np.asarray(100.0 * (1.0 - self.actual_j / self.without_j))

    @property
    def carbon_saved_pct(self) -> Floats:
        """Carbon saved, %."""
        return np.asarray(100.0 * (1.0 - self.actual_g / self.without_g))


def simulate_days(case: FleetDays) -> tuple[FleetBins, Truth]:
    """Run both worlds; the bins are those of the fleet that switches."""
    rng = np.random.default_rng(case.seed)
    minutes = case.days * MINUTES
    schedule = SwitchbackSchedule(
        Switchback(share=case.share, block_s=case.block_s, washout_s=case.washout_s, key=str(case.seed))
    )
    at = [datetime.fromtimestamp(BEGIN.timestamp() + 60.0 * minute, UTC) for minute in range(minutes)]
    reference = np.array([schedule.is_reference(one) for one in at])
    world = np.array([schedule.world(one) for one in at[::BIN_MINUTES]])

    requests = _requests(rng, case, minutes)
    peak_tokens_per_s = case.requests_per_hour / 3_600.0 / 0.65 * float(TASK_SHARES @ TASK_TOKENS)
    usual = MEASURED[case.curve]
    curve = usual.stretched(case.servers * usual.tokens_per_s(64) / peak_tokens_per_s)
    hour = np.arange(minutes) // 60
    length = np.exp(case.length_drift * _drift(rng, case.days))[hour, None]
    kept = np.minimum(1.0, SPROUT_TOKENS * np.exp(0.1 * _correlated(rng, case.days * 24, 0.9))[hour, None])

    def generated(mean: Floats) -> Floats:
        return np.asarray(rng.gamma(np.maximum(requests * LENGTH_SHAPE, 1e-9)) / LENGTH_SHAPE * mean)

    without = generated(TASK_TOKENS * length)
    shorter = generated(TASK_TOKENS * length * kept)
    shorter += EVALUATOR_SHARE * without
    # Durations at the usual batch: 40 without Sprout, the target of 128 with it.
    slow_s, fast_s = curve.step_time_s(40) * TASK_TOKENS, curve.step_time_s(128) * TASK_TOKENS * SPROUT_TOKENS
    nothing = np.zeros(minutes)
    with_reference = _rate(np.where(reference[:, None], without, 0.0), slow_s)
    with_sprout = _rate(np.where(reference[:, None], 0.0, shorter), fast_s)
    temperature = np.exp(case.power_drift * _drift(rng, case.days))[hour]
    power = temperature * _power(case, curve, with_reference, with_sprout)
    counterfactual = temperature * _power(case, curve, _rate(without, slow_s), nothing)

    # The means by task are those of a sample, and each answer is taken to last as long as its task's mean.
    expected = TASK_TOKENS * rng.lognormal(0.0, 0.03, len(TASK_TOKENS))
    demand, served = np.zeros(minutes), np.zeros(minutes)
    for task, tokens in enumerate(expected):
        arrived = requests[:, task] * tokens
        demand += _spread(arrived, slow_s[task])
        served += _spread(np.where(reference, arrived, 0.0), slow_s[task])
        served += _spread(np.where(reference, 0.0, arrived * SPROUT_TOKENS[task]), fast_s[task])
    intensity = _synthetic_intensity(rng, case.days) if case.g_per_kwh is None else case.g_per_kwh[: case.days * 24]
    metered = _binned(60.0 * power) * rng.normal(1.0, 0.003, minutes // BIN_MINUTES)
    bins = FleetBins(
        length_s=60.0 * BIN_MINUTES,
        start_s=np.asarray(
            BEGIN.timestamp() + 60.0 * BIN_MINUTES * np.arange(minutes // BIN_MINUTES), dtype=np.float64
        ),
        joules=metered[:, None],
        g_per_kwh=np.repeat(intensity, 60 // BIN_MINUTES)[:, None],
        demand=np.where(world == "reference", _binned(served), _binned(demand)),
        world=world,
    )
    grams_per_j = intensity[hour] / JOULES_PER_KWH

    def daily(values: Floats) -> Floats:
        return np.asarray(60.0 * values.reshape(case.days, MINUTES).sum(axis=1))

    truth = Truth(daily(counterfactual), daily(power), daily(counterfactual * grams_per_j), daily(power * grams_per_j))
    return bins, truth


def day_bounds(day: int) -> tuple[float, float]:
    """Start and end of a simulated day, seconds since the epoch."""
    start_s = BEGIN.timestamp() + day * DAY_S
    return start_s, start_s + DAY_S


def _requests(rng: np.random.Generator, case: FleetDays, minutes: int) -> Floats:
    """(minutes, tasks), numbers of requests."""
    hours = case.days * 24
    of_day = np.arange(minutes) / 60.0 % 24.0
    shape = 0.65 - 0.35 * np.cos(2.0 * np.pi * (of_day - 3.0) / 24.0)
    weekend = np.where(np.arange(minutes) // MINUTES % 7 >= 5, 0.8, 1.05)
    days = np.exp(0.08 * rng.normal(size=case.days))[np.arange(minutes) // MINUTES]
    hourly = np.exp(0.08 * _correlated(rng, hours, 0.8))[np.arange(minutes) // 60]
    load = np.minimum(shape / 0.65 * weekend * days * hourly, 2.0)
    logits = np.log(TASK_SHARES) + 0.4 * np.column_stack([_correlated(rng, hours, 0.9) for _ in TASK_SHARES])
    mix = np.exp(logits)
    mix /= mix.sum(axis=1, keepdims=True)
    expected = case.requests_per_hour / 60.0 * load[:, None] * mix[np.arange(minutes) // 60]
    return np.asarray(rng.poisson(expected), dtype=float)


def _correlated(rng: np.random.Generator, steps: int, correlation: float) -> Floats:
    """A stationary first-order autoregression with standard deviation 1."""
    noise = rng.normal(size=steps + 200) * np.sqrt(1.0 - correlation**2)
    return np.asarray(lfilter([1.0], [1.0, -correlation], noise)[200:])


def _drift(rng: np.random.Generator, days: int) -> Floats:
    """(hours,), with standard deviation 1: partly of the day, partly of the hour, partly with the time of day."""
    hours = days * 24
    of_day = np.sqrt(2.0) * np.sin(2.0 * np.pi * (np.arange(hours) % 24 - 9.0) / 24.0)
    daily = np.repeat(_correlated(rng, days, 0.5), 24)
    return np.asarray(np.sqrt(0.4) * daily + np.sqrt(0.4) * _correlated(rng, hours, 0.8) + np.sqrt(0.2) * of_day)


def _rate(tokens: Floats, duration_s: Floats) -> Floats:
    """(minutes,), tokens per second that are generated, of tokens, (minutes, tasks), that arrive: exponential times."""
    total = np.zeros(len(tokens))
    for task, seconds in enumerate(duration_s):
        kept = np.exp(-60.0 / seconds)
        total += lfilter([1.0 - kept], [1.0, -kept], tokens[:, task])
    return total / 60.0


def _spread(tokens: Floats, duration_s: float) -> Floats:
    """Tokens, (minutes,), spread over answers of the usual lengths, as `demand_by_bin` does."""
    longest = int(duration_s * LENGTHS[-1] // 60.0) + 1
    edges = 60.0 * np.arange(longest + 1)
    lengths_s = duration_s * np.array(LENGTHS)
    weights = spread_over_bins(np.zeros(len(LENGTHS)), lengths_s, lengths_s / lengths_s.sum(), edges)
    return np.asarray(lfilter(weights, [1.0], tokens))


def _power(case: FleetDays, curve: BatchCurve, reference: Floats, sprout: Floats) -> Floats:
    """(minutes,), power of the fleet: answers of both worlds run beside each other after a change.

    Args:
        case: whose dispatch the reference has.
        curve: of the servers.
        reference, sprout: (minutes,), tokens per second of each world.
    """
    if case.dispatch == "spread":
        return _two_parts(case.servers, curve, reference / case.servers, sprout, sleep=True)
    # Without Sprout the servers are filled in the same order: only one part.
    blocks = reference > sprout
    sleep = np.where(blocks, case.sleep, True)
    total = reference + sprout
    nothing = np.zeros_like(total)
    asleep = _two_parts(case.servers, curve, nothing, total, sleep=True)
    awake = _two_parts(case.servers, curve, nothing, total, sleep=False)
    return np.where(sleep, asleep, awake)


def _two_parts(servers: int, curve: BatchCurve, each: Floats, packed: Floats, *, sleep: bool) -> Floats:
    """Power if every server generates `each` tokens per second, and the first ones `packed` besides."""
    at_target = curve.tokens_per_s(128)
    full = np.minimum(np.floor(packed / at_target), servers - 1)
    # Beyond all targets requests queue.
    last = np.minimum(packed - full * at_target, 1.4 * at_target)
    each = np.minimum(each, 0.98 / curve.token_s - at_target)
    awake = np.where(each * curve.step_s > 0.02, servers, needed_nearby(full + 1.0)) if sleep else servers
    power = full * server_power_w(curve, at_target + each) + server_power_w(curve, last + each)
    power += np.maximum(awake - full - 1.0, 0.0) * server_power_w(curve, each)
    return np.asarray(power + (servers - np.maximum(awake, full + 1.0)) * curve.asleep_w)


def _binned(values: Floats) -> Floats:
    return np.asarray(values.reshape(-1, BIN_MINUTES).sum(axis=1))


def _synthetic_intensity(rng: np.random.Generator, days: int) -> Floats:
    """(hours,), with a daily cycle and weather."""
    hours = np.arange(days * 24)
    weather = _correlated(rng, len(hours), 0.97)
    return np.maximum(260.0 - 80.0 * np.cos(2.0 * np.pi * (hours - 3.0) / 24.0) + 60.0 * weather, 15.0)
