"""Power and speed of a fleet of batching servers by the tokens that it generates.

Servers have batch curves (`shared/batch_curve.py`). At a token rate r a server's batch settles at B = c·r / (1 - d·r),
where a step takes c + d·B seconds. All figures follow from rates: there is no queue, and a fleet that cannot generate
the tokens of a minute is an error.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from scipy.ndimage import maximum_filter1d

from shared.batch_curve import MEASURED, BatchCurve
from shared.messages import Identifier, Zone
from shared.pools import Dispatch
from tools.simulator.requests import Floats, SimulationInputError

WAKE_AHEAD_MIN = 5
"""Minutes that a server is awake before the load needs it."""

ASLEEP_AFTER_MIN = 10
"""Minutes without need after which a server sleeps."""

ARRIVAL_MOMENTS = 20
"""Moments of a step at which a request arrives, for quantiles of the time to the first token."""

CURVE_FIELDS = ("idle_w", "step_j", "token_j", "step_s", "token_s", "asleep_w")
"""Numbers of a curve in the fleet file; prompts are not simulated apart."""

_ROUNDING = 1e-9


class Overload(SimulationInputError):  # noqa: N818 - named after what it reports
    """The servers cannot generate the tokens of a minute."""


def _curve(value: object) -> object:
    if isinstance(value, dict):
        if unknown := [name for name in value if name not in CURVE_FIELDS]:
            raise ValueError(f"a curve has no {unknown[0]!r} here; it has {', '.join(CURVE_FIELDS)}")
        return value
    if not isinstance(value, str) or value not in MEASURED:
        raise ValueError(f"there is no curve {value!r}; there are {', '.join(MEASURED)}, or give a table of numbers")
    return MEASURED[value]


class Servers(BaseModel):
    """Equal servers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=1, le=100_000, description="Number of servers")
    curve: Annotated[BatchCurve, BeforeValidator(_curve)] = Field(
        description="Name of a measured curve, or a table with its numbers"
    )
    max_batch: int = Field(default=256, ge=1, description="Most requests at once on a server")
    zone: Zone | None = Field(default=None, description="Grid zone; default: that of the simulated window")
    pue: float = Field(default=1.0, ge=1.0, description="Power usage effectiveness of the site")

    @property
    def largest_tokens_per_s(self) -> float:
        """Most tokens per second of a server."""
        return self.curve.tokens_per_s(self.max_batch)

    def target_batch(self, *, target_batch: int | None, tpot_objective_ms: float | None) -> int:
        """Requests at once on a server that packing fills; 0 if no batch keeps the objective."""
        limits = [self.max_batch]
        if target_batch is not None:
            limits.append(target_batch)
        if tpot_objective_ms is not None:
            limits.append(self.curve.largest_batch(tpot_s=tpot_objective_ms / 1_000.0))
        return min(limits)


class ServerFleet(BaseModel):
    """The servers of a what-if study, in the order in which packing fills them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Identifier = "fleet"
    servers: tuple[Servers, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _some_speed(self) -> Self:
        if any(not np.isfinite(one.largest_tokens_per_s) for one in self.servers):
            raise ValueError("a curve has no finite speed")
        return self

    @property
    def count(self) -> int:
        """Number of servers."""
        return sum(one.count for one in self.servers)

    def tokens_per_s_at(self, batch: float) -> float:
        """Tokens per second of all servers, each at this batch or its largest."""
        return sum(one.count * one.curve.tokens_per_s(min(batch, one.max_batch)) for one in self.servers)

    def targets(self, *, target_batch: int | None, tpot_objective_ms: float | None) -> tuple[int, ...]:
        """The batch to which packing fills each group of servers.

        Raises:
            SimulationInputError: it cannot be kept.
        """
        found = []
        for place, one in enumerate(self.servers, 1):
            where = f"fleet {self.name!r}, servers {place}"
            if target_batch is not None and target_batch > one.max_batch:
                raise SimulationInputError(
                    f"{where}: --target-batch {target_batch} is more than max_batch = {one.max_batch}: lower the one "
                    "or raise the other"
                )
            target = one.target_batch(target_batch=target_batch, tpot_objective_ms=tpot_objective_ms)
            if target == 0:
                alone_ms = 1_000.0 * one.curve.step_time_s(1)
                raise SimulationInputError(
                    f"{where}: no batch keeps --latency-objective {tpot_objective_ms:g} ms per output token: a single "
                    f"request takes {alone_ms:.1f} ms; raise it, or take faster servers"
                )
            found.append(target)
        return tuple(found)


def load_server_fleet(path: Path) -> ServerFleet:
    """Read a what-if fleet file; its default name is that of the file.

    Raises:
        SimulationInputError: it cannot be read, or is not valid.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SimulationInputError(f"--fleet {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SimulationInputError(f"--fleet {path} is not valid TOML: {error}") from error
    try:
        return ServerFleet.model_validate({"name": path.stem, **document})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in one['loc']) or 'file'}: {one['msg']}"
            for one in error.errors(include_url=False, include_input=False)
        )
        raise SimulationInputError(f"--fleet {path}: {problems}") from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FleetRun:
    """What a fleet does, minute by minute; G groups of servers.

    Attributes:
        power_w: (minutes, G), of all servers of the group.
        above_idle_w: (minutes, G), the part of it above the idle power.
        tpot_s, tokens_per_s: (minutes, 2·G), seconds per output token, and tokens per second generated at that speed:
            by the servers at the target, and by the last one.
        awake: (minutes,), servers that are awake.
    """

    power_w: Floats
    above_idle_w: Floats
    tpot_s: Floats
    tokens_per_s: Floats
    awake: Floats

    def tpot_quantiles_s(self, quantiles: tuple[float, ...]) -> Floats:
        """Quantiles of the time per output token, over tokens."""
        return _quantiles(self.tpot_s.ravel(), self.tokens_per_s.ravel(), quantiles)

    def ttft_quantiles_s(self, quantiles: tuple[float, ...]) -> Floats:
        """Quantiles of the time to the first token, over requests, without reading the prompt.

        A request waits for the end of the step under way, at which it arrives at any moment, and then takes one step.
        """
        moments = (np.arange(ARRIVAL_MOMENTS) + 0.5) / ARRIVAL_MOMENTS
        values = np.outer(1.0 + moments, self.tpot_s.ravel())
        return _quantiles(values.ravel(), np.tile(self.tokens_per_s.ravel(), ARRIVAL_MOMENTS), quantiles)


def _quantiles(values: Floats, weights: Floats, quantiles: tuple[float, ...]) -> Floats:
    """Quantiles of values with weights."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    return np.asarray(values[order][np.minimum(np.searchsorted(share, quantiles), len(values) - 1)])


def server_power_w(curve: BatchCurve, tokens_per_s: Floats) -> Floats:
    """Power of a server at a token rate, idle power included.

    At a small rate the server has no request for a part of the time. The number of requests is then nearly Poisson, so
    it runs steps in the share 1 - exp(-B) of the time, where B is the mean.
    """
    free = 1.0 - curve.token_s * tokens_per_s
    busy = -np.expm1(-curve.step_s * tokens_per_s / free)
    return np.asarray(curve.idle_w + busy * curve.step_j * free / curve.step_s + curve.token_j * tokens_per_s)


def run_fleet(
    fleet: ServerFleet, tokens_per_s: Floats, *, dispatch: Dispatch, targets: tuple[int, ...], sleep: bool = False
) -> FleetRun:
    """Generate tokens with a fleet.

    `spread`: every server has the same batch. `pack`: servers are filled to their target in order; once all are, all
    have the same batch, beyond the target.

    Args:
        fleet: the servers.
        tokens_per_s: (minutes,), of all requests.
        dispatch: how requests are distributed.
        targets: batch of each group to which `pack` fills.
        sleep: whether servers sleep that are not needed.

    Raises:
        Overload: the fleet cannot generate so many tokens.
    """
    _check_load(fleet, tokens_per_s)
    if dispatch == "spread":
        per_server, full = _spread(fleet, tokens_per_s), np.zeros((len(tokens_per_s), len(fleet.servers)))
        return _figures(fleet, full, per_server, per_server, spread=np.ones(len(tokens_per_s), dtype=bool), sleep=False)
    full, last, at_target = _packed(fleet, tokens_per_s, targets)
    over = tokens_per_s > (at_target * [one.count for one in fleet.servers]).sum() * (1 + _ROUNDING)
    if over.any():
        last[over] = _spread(fleet, tokens_per_s[over])
        full[over] = 0.0
    return _figures(fleet, full, np.broadcast_to(at_target, last.shape), last, spread=over, sleep=sleep)


def needed_servers(fleet: ServerFleet, tokens_per_s: Floats, targets: tuple[int, ...]) -> Floats:
    """(minutes,), the fewest servers that generate the tokens at the target batch; all, if they do not suffice."""
    full, last, _ = _packed(fleet, tokens_per_s, targets)
    return np.asarray((full + (last > 0.0)).sum(axis=1))


def needed_nearby(working: Floats) -> Floats:
    """Servers that are awake if `working`, (minutes, ...), work: awake a little before, asleep a little after."""
    span = WAKE_AHEAD_MIN + ASLEEP_AFTER_MIN + 1
    # Without `origin` the window ends this many minutes ahead: `span - 1 - span // 2`.
    origin = span - 1 - span // 2 - WAKE_AHEAD_MIN
    return np.asarray(maximum_filter1d(working, span, axis=0, origin=origin, mode="nearest"))


def _check_load(fleet: ServerFleet, tokens_per_s: Floats) -> None:
    largest, peak = fleet.tokens_per_s_at(np.inf), float(tokens_per_s.max())
    if peak > largest:
        needed = int(np.ceil(fleet.count * peak / largest))
        raise Overload(
            f"fleet {fleet.name!r} is overloaded: {fleet.count} servers generate {largest:,.0f} tokens/s at their "
            f"largest batch, the load's peak is {peak:,.0f} tokens/s (minute {int(tokens_per_s.argmax())}); about "
            f"{needed} such servers are needed: add servers, or lower --requests-per-hour or --peak-batch"
        )


def _spread(fleet: ServerFleet, tokens_per_s: Floats) -> Floats:
    """(minutes, G), tokens per second of each server at the batch that all of them share."""
    curves, counts = [one.curve for one in fleet.servers], [one.count for one in fleet.servers]
    limits = np.array([one.max_batch for one in fleet.servers], dtype=float)
    if len(curves) == 1:
        return tokens_per_s[:, None] / counts[0]
    step = np.array([one.step_s for one in curves])
    token = np.array([one.token_s for one in curves])

    def rates(batch: Floats) -> Floats:
        capped = np.minimum(batch[:, None], limits)
        return np.asarray(capped / (step + token * capped))

    low, high = np.zeros_like(tokens_per_s), np.full_like(tokens_per_s, limits.max())
    for _ in range(50):
        middle = (low + high) / 2.0
        enough = rates(middle) @ counts >= tokens_per_s
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return rates(high)


def _packed(fleet: ServerFleet, tokens_per_s: Floats, targets: tuple[int, ...]) -> tuple[Floats, Floats, Floats]:
    """Servers at the target, (minutes, G); tokens per second of the one after them, (minutes, G); at the target, (G,).

    Load beyond all targets is left out.
    """
    at_target = np.array([one.curve.tokens_per_s(target) for one, target in zip(fleet.servers, targets, strict=True)])
    counts = np.array([one.count for one in fleet.servers])
    before = np.concatenate([[0.0], np.cumsum(counts * at_target)[:-1]])
    mine = np.clip(tokens_per_s[:, None] - before, 0.0, counts * at_target)
    full = np.floor(mine / at_target + _ROUNDING)
    last = np.maximum(mine - full * at_target, 0.0)
    return full, np.where(last > _ROUNDING * at_target, last, 0.0), at_target


def _figures(
    fleet: ServerFleet, full: Floats, full_rate: Floats, last: Floats, *, spread: np.ndarray, sleep: bool
) -> FleetRun:
    """Power and speed.

    Args:
        fleet: the servers.
        full: (minutes, G), servers at `full_rate`.
        full_rate: (minutes, G), tokens per second of each.
        last: (minutes, G), tokens per second of one more server; of all servers where `spread`.
        spread: (minutes,), minutes in which all servers have the same batch.
        sleep: whether servers sleep that are not needed.
    """
    counts = np.array([one.count for one in fleet.servers])
    lasts = np.where(spread[:, None], counts, (last > 0.0).astype(float))
    working = full + lasts
    awake = np.broadcast_to(counts, working.shape).astype(float)
    if sleep:
        awake = needed_nearby(working)
        awake[:, 0] = np.maximum(awake[:, 0], 1.0)
    power, above, tpot, tokens = [], [], [], []
    for g, one in enumerate(fleet.servers):
        curve = one.curve
        idle = awake[:, g] * curve.idle_w
        busy = full[:, g] * (server_power_w(curve, full_rate[:, g]) - curve.idle_w)
        busy += lasts[:, g] * (server_power_w(curve, last[:, g]) - curve.idle_w)
        above.append(busy)
        power.append(busy + idle + (one.count - awake[:, g]) * curve.asleep_w)
        for number, rate in ((full[:, g], full_rate[:, g]), (lasts[:, g], last[:, g])):
            tokens.append(number * rate)
            # At least one request runs while a token is generated.
            tpot.append(np.maximum(curve.step_s / (1.0 - curve.token_s * rate), curve.step_time_s(1)))
    return FleetRun(
        power_w=np.column_stack(power),
        above_idle_w=np.column_stack(above),
        tpot_s=np.column_stack(tpot),
        tokens_per_s=np.column_stack(tokens),
        awake=awake.sum(axis=1),
    )
